"""The shapes of Whisper's and Qwen3's models by name, so that one can be built, or counted, without its weights."""

from typing import Any

WHISPER = {
    name: {"n_mels": bins, "n_audio_ctx": 1500, "n_audio_state": width, "n_audio_head": heads, "n_audio_layer": layers}
    for name, bins, width, heads, layers in (
        ("tiny", 80, 384, 6, 4), ("base", 80, 512, 8, 6), ("small", 80, 768, 12, 12), ("medium", 80, 1024, 16, 24),
        ("large-v1", 80, 1280, 20, 32), ("large-v2", 80, 1280, 20, 32), ("large-v3", 128, 1280, 20, 32),
        ("large-v3-turbo", 128, 1280, 20, 32),
    )
}  # fmt: skip
"""What whisper.model.ModelDimensions has of the encoder."""

_HUB = {name: WHISPER[name] for name in ("tiny", "base", "small", "medium", "large-v2", "large-v3", "large-v3-turbo")}
WHISPER |= {"large": WHISPER["large-v3"], "turbo": WHISPER["large-v3-turbo"]}
WHISPER |= {f"openai/whisper-{name}": dims for name, dims in {**_HUB, "large": WHISPER["large-v1"]}.items()}

QWEN3 = {
    f"Qwen/Qwen3-{name}": {
        "hidden_size": width, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
        "tie_word_embeddings": width < 4096,
    }
    for name, width, intermediate, layers, heads in (
        ("0.6B", 1024, 3072, 28, 16), ("1.7B", 2048, 6144, 28, 16), ("4B", 2560, 9728, 36, 32),
        ("8B", 4096, 12288, 36, 32), ("14B", 5120, 17408, 40, 40), ("32B", 5120, 25600, 64, 64),
    )
}  # fmt: skip
"""What transformers.Qwen3Config says of each."""

FOUND_IN_TRANSFORMERS = {
    "n_mels": "num_mel_bins",
    "n_audio_ctx": "max_source_positions",
    "n_audio_state": "d_model",
    "n_audio_head": "encoder_attention_heads",
    "n_audio_layer": "encoder_layers",
    "n_vocab": "vocab_size",
}
"""What transformers.WhisperConfig calls the sizes of whisper.model.ModelDimensions."""

DECODER_IN_TRANSFORMERS = {
    "n_text_ctx": "max_target_positions",
    "n_text_state": "d_model",
    "n_text_head": "decoder_attention_heads",
    "n_text_layer": "decoder_layers",
}
"""The same for the sizes of the decoder."""


def whisper_dims(config: dict[str, Any], *, with_decoder: bool = False) -> dict[str, int]:
    """The sizes in a Whisper's config.json, ours or transformers', by openai-whisper's names; KeyError if one lacks."""
    names = FOUND_IN_TRANSFORMERS | (DECODER_IN_TRANSFORMERS if with_decoder else {})
    if "dims" in config:
        return {name: config["dims"][name] for name in names}
    return {name: config[theirs] for name, theirs in names.items()}

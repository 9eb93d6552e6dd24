"""The shapes of Whisper's and Qwen3's models by name, so that one can be built, or counted, without its weights."""

from typing import Any

LARGE = {"n_audio_state": 1280, "n_audio_head": 20, "n_audio_layer": 32}

WHISPER = {
    "tiny": {"n_mels": 80, "n_audio_state": 384, "n_audio_head": 6, "n_audio_layer": 4, "n_text_layer": 4},
    "base": {"n_mels": 80, "n_audio_state": 512, "n_audio_head": 8, "n_audio_layer": 6, "n_text_layer": 6},
    "small": {"n_mels": 80, "n_audio_state": 768, "n_audio_head": 12, "n_audio_layer": 12, "n_text_layer": 12},
    "medium": {"n_mels": 80, "n_audio_state": 1024, "n_audio_head": 16, "n_audio_layer": 24, "n_text_layer": 24},
    "large-v1": {"n_mels": 80, **LARGE, "n_text_layer": 32},
    "large-v2": {"n_mels": 80, **LARGE, "n_text_layer": 32},
    "large-v3": {"n_mels": 128, **LARGE, "n_text_layer": 32},
    "large-v3-turbo": {"n_mels": 128, **LARGE, "n_text_layer": 4},
}
"""What whisper.model.ModelDimensions has of the encoder, and the number of the decoder's layers."""

_HUB = {name: WHISPER[name] for name in ("tiny", "base", "small", "medium", "large-v2", "large-v3", "large-v3-turbo")}
WHISPER |= {"large": WHISPER["large-v3"], "turbo": WHISPER["large-v3-turbo"]}
WHISPER |= {f"openai/whisper-{name}": dims for name, dims in {**_HUB, "large": WHISPER["large-v1"]}.items()}

QWEN3 = {
    f"Qwen/Qwen3-{name}": {
        "hidden_size": width, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    for name, width, intermediate, layers, heads in (
        ("0.6B", 1024, 3072, 28, 16), ("1.7B", 2048, 6144, 28, 16), ("4B", 2560, 9728, 36, 32),
        ("8B", 4096, 12288, 36, 32), ("14B", 5120, 17408, 40, 40), ("32B", 5120, 25600, 64, 64),
    )
}  # fmt: skip
"""What transformers.Qwen3Config says of each; all have 8 key-value heads of width 128 and 151,936 words."""

FOUND_IN_TRANSFORMERS = {
    "n_mels": "num_mel_bins",
    "n_audio_ctx": "max_source_positions",
    "n_audio_state": "d_model",
    "n_audio_head": "encoder_attention_heads",
    "n_audio_layer": "encoder_layers",
    "n_vocab": "vocab_size",
}
"""What transformers.WhisperConfig calls the sizes of whisper.model.ModelDimensions."""


def whisper_dims(config: dict[str, Any]) -> dict[str, int]:
    """The sizes in a Whisper's config.json, ours or transformers', by openai-whisper's names; KeyError if one lacks."""
    if "dims" in config:
        return {name: config["dims"][name] for name in FOUND_IN_TRANSFORMERS}
    return {name: config[theirs] for name, theirs in FOUND_IN_TRANSFORMERS.items()}

"""How closely exported models repeat what a run computes.

transformers' encoder takes exactly 30 s, so both are given such windows: audio cut, or padded with silence.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import whisper
from lhotse import Recording
from torch import Tensor, nn

from zipperasr.data import audio, features
from zipperasr.errors import UserError
from zipperasr.model.encoder import SpeechEncoder
from zipperasr.model.speech_llm import SpeechLLM
from zipperasr.prompts import prompt_ids

NOISE_S = 3


@torch.inference_mode()
def parity(
    model: SpeechLLM, windows: Mapping[str, Sequence[Tensor]], encoder_of: Callable[[str], nn.Module], llm: nn.Module,
    dtype: torch.dtype,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """The largest differences, by language, between `model` in fp32 and exported models in `dtype`.

    windows: {language: features [30 s, bins] to compare on}. encoder_of gives the exported encoder of a language.
    `encoder` is over all frames of the windows, `llm_logits` over the logits on the prompt and the run's own speech
    embeddings; `*_scale` are the largest values of the run there.
    """
    rows = {}
    for lang, some in windows.items():
        encoder, frames, logits = encoder_of(lang), [], []
        for window in some:
            ours, lengths = model.encoder([window], [lang])
            frames.append((ours, encoder(window.T[None].to(dtype)).last_hidden_state[0]))
            prompt = prompt_ids(model.tokenizer, lang)
            x = model.decoder_inputs([prompt], model.projector(ours, lengths))[0][None]  # [1, S, H]
            logits.append((model.llm(inputs_embeds=x).logits, llm(inputs_embeds=x.to(dtype)).logits))
        rows[lang] = _largest("encoder", frames) | _largest("llm_logits", logits)
    return rows


def recorded_window(path: Path, encoder: SpeechEncoder) -> Tensor:
    """The features [30 s, bins] of an audio file. Raises UserError where it is not whole."""
    try:
        audio.probe(str(path))
    except audio.BadAudio as error:
        raise UserError(f"--audio: {error.detail}; give whole audio files") from error
    return _window(torch.from_numpy(audio.load_audio(Recording.from_file(path).to_cut())), encoder)


def noise_window(seed: int, encoder: SpeechEncoder) -> Tensor:
    """The features [30 s, bins] of NOISE_S seconds of noise."""
    noise = torch.randn(NOISE_S * audio.SAMPLE_RATE, generator=torch.Generator().manual_seed(seed))
    return _window(0.1 * noise, encoder)


def _window(samples: Tensor, encoder: SpeechEncoder) -> Tensor:
    samples = whisper.pad_or_trim(samples, encoder.max_frames * features.HOP)
    return features.log_mel(samples, encoder.conv1.in_channels)


def _largest(name: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    difference = torch.stack([(ours - theirs).abs().max() for ours, theirs in pairs]).max().item()
    return {name: difference, f"{name}_scale": max(ours.abs().max().item() for ours, _ in pairs)}

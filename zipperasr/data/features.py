"""Whisper's log-mel features at true length.

Whisper lifts everything to at most 8 (log10 units, before scaling) below the loudest bin of what it is given. So the
features of an utterance depend on the whole of it: they are computed once and cut into chunks afterwards.

F frames (100 Hz), T samples.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator

from zipperasr.config import Settings
from zipperasr.data import audio
from zipperasr.data.augment import SpecAugmentSettings

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

N_FFT, HOP = 400, 160  # samples at 16 kHz
Speed = Annotated[float, Field(ge=0.5, le=2)]


class FeatureSettings(Settings):
    """What stage 3 stores, the width of features (128 for Whisper large-v3), and how training audio is augmented.

    `precomputed` stores features, 30 to 50 kB a second; `audio` stores the audio as 16 kHz FLAC, half as much or less;
    `on_the_fly` stores nothing and reads the corpora's own files. From audio, features are computed on reading.
    """

    storage: Literal["precomputed", "audio", "on_the_fly"] = "precomputed"
    num_mel_bins: Literal[80, 128] = 80
    speed_perturb: tuple[Speed, ...] = ()
    """Further speeds, as in [0.9, 1.1]: a copy at each of every utterance that is trained on, if it is within 30 s."""
    spec_augment: SpecAugmentSettings | None = None
    """As in {} (Lhotse's values) or {time_warp_factor: null}: masks on what is trained on, new ones at each step."""

    @field_validator("speed_perturb")
    @classmethod
    def _are_further(cls, speeds: tuple[float, ...]) -> tuple[float, ...]:
        if 1 in speeds or len(set(speeds)) < len(speeds):
            raise ValueError("speeds are unlike each other and unlike 1, which there is anyway")
        return speeds


def num_frames(duration_s: float) -> int:
    """Frames of an utterance: one for each whole 10 ms."""
    return audio.num_samples(duration_s) // HOP


def log_mel(samples: np.ndarray | Tensor, num_mel_bins: int) -> Tensor:
    """The log-mel features [T // 160, num_mel_bins] of 16 kHz mono float32 samples [T], without padding to 30 s.

    The operations of whisper.log_mel_spectrogram in the same order, so the same bits, with fewer copies: samples are
    reflected at both ends at once, most is done in place, and the last operation writes the layout that is read.
    More than 200 samples are needed.
    """
    import torch
    from whisper.audio import mel_filters

    x, half = torch.as_tensor(samples), N_FFT // 2
    assert len(x) > half
    x = torch.cat([x[1 : half + 1].flip(0), x, x[-half - 1 : -1].flip(0)])
    spectrum = torch.stft(x, N_FFT, HOP, window=_window(x.device), center=False, return_complex=True)  # [201, F + 1]
    power = spectrum[:, :-1].abs().square_()
    log = (mel_filters(x.device, num_mel_bins) @ power).clamp_(min=1e-10).log10_()  # [num_mel_bins, F]
    torch.maximum(log, log.max() - 8.0, out=log)
    features = log.new_empty(log.shape[::-1])  # [F, num_mel_bins]
    torch.div(log.add_(4.0), 4.0, out=features.T)
    return features


@functools.lru_cache
def _window(device: torch.device) -> Tensor:
    import torch

    return torch.hann_window(N_FFT, device=device)

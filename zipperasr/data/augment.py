"""Augmentation of training utterances, off by default: speed perturbation of audio, SpecAugment of features.

F frames (100 Hz), T samples.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from zipperasr.config import Settings
from zipperasr.data.audio import SAMPLE_RATE, num_samples
from zipperasr.data.validation import MAX_DURATION_S

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Fraction = Annotated[float, Field(gt=0, le=1)]


class SpecAugmentSettings(Settings):
    """Lhotse's SpecAugment (arXiv:1904.08779): warped in time, then bands of bins and of frames set to the mean.

    The mean is that of the utterance's own features, so that a mask is neither silence nor speech.
    """

    p: Fraction = 0.9
    """Share of the utterances that are augmented."""
    time_warp_factor: PositiveInt | None = 80
    """Most frames that the middle moves; utterances of fewer than twice as many stay as they are; null is off."""
    num_feature_masks: NonNegativeInt = 2
    features_mask_size: Annotated[int, Field(ge=2, le=80)] = 27
    """A band has fewer bins than this."""
    num_frame_masks: PositiveInt = 10
    frames_mask_size: Annotated[int, Field(ge=2)] = 100
    """A band has fewer frames than this."""
    max_frames_mask_fraction: Fraction = 0.15
    """All bands of frames together cover no more than this much of an utterance; of the shortest ones, nothing."""


def spec_augment(features: Sequence[Tensor], settings: SpecAugmentSettings, *, seed: str) -> list[Tensor]:
    """The features [F_u, bins] of some utterances, each augmented at its true length; the same for the same seed."""
    from lhotse.dataset.signal_transforms import SpecAugment

    augment = SpecAugment(**settings.model_dump())
    with _seeded(seed):
        return [augment(x[None])[0] if len(x) * settings.max_frames_mask_fraction >= 1 else x for x in features]


def copy_id(utt_id: str, speed: float) -> str:
    """The id of an utterance's copy at another speed, as Kaldi forms it."""
    return utt_id if speed == 1 else f"sp{speed:g}-{utt_id}"


def copy_duration_s(duration_s: float, speed: float) -> float:
    """Seconds of an utterance's copy at another speed: whole samples at 16 kHz."""
    from lhotse.utils import perturb_num_samples

    return duration_s if speed == 1 else perturb_num_samples(num_samples(duration_s), speed) / SAMPLE_RATE


def has_copy(duration_s: float, speed: float) -> bool:
    """Whether a copy at another speed is short enough for the encoder, as training material must be."""
    return copy_duration_s(duration_s, speed) <= MAX_DURATION_S


def perturb_speed(samples: np.ndarray, speed: float) -> np.ndarray:
    """Samples [T] played `speed` times as fast: shorter for more than 1, and higher, as by `sox speed`."""
    from lhotse.augmentation import Speed
    from lhotse.utils import perturb_num_samples

    if speed == 1:
        return samples
    return Speed(speed)(samples[None], SAMPLE_RATE)[0, : perturb_num_samples(len(samples), speed)]


@contextlib.contextmanager
def _seeded(seed: str) -> Iterator[None]:
    """Seeds the three generators that Lhotse draws from, and puts them back as they were."""
    import numpy as np
    import torch

    draw, states = random.Random(seed), (random.getstate(), np.random.get_state())
    with torch.random.fork_rng(devices=[]):
        random.seed(draw.getrandbits(32))
        np.random.seed(draw.getrandbits(32))
        torch.manual_seed(draw.getrandbits(32))
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])

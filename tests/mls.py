"""Corpora of noise in the layout of Multilingual LibriSpeech, for tests of the data stages."""

from pathlib import Path

import numpy as np
import soundfile


def noise(path: Path, *, seconds: float = 0.5, rate: int = 16000, channels: int = 1, seed: int = 0, **kwargs) -> Path:
    """Write noise to an audio file of the format that its name (or `kwargs`) says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (round(seconds * rate), channels)
    soundfile.write(path, np.random.default_rng(seed).normal(0, 0.1, shape).clip(-1, 1), rate, **kwargs)
    return path


def make(corpus: Path, sizes: dict[str, int], *, suffix: str = ".flac") -> Path:
    """Write `sizes` ({"<folder>/<split>": utterances}) under `corpus`; ids are <speaker>_1_<number>."""
    for speaker, (where, count) in enumerate(sizes.items(), start=1):
        ids = [f"{speaker}_1_{number:06}" for number in range(count)]
        for number, utt_id in enumerate(ids):
            path = corpus / where / "audio" / str(speaker) / "1" / (utt_id + suffix)
            noise(path, seconds=0.3 + 0.1 * (number % 3), seed=number + 100 * speaker)
        (corpus / where).mkdir(parents=True, exist_ok=True)
        lines = "".join(f"{utt_id}\twords of {utt_id}\n" for utt_id in ids)
        (corpus / where / "transcripts.txt").write_text(lines, encoding="utf-8", newline="\n")
    return corpus

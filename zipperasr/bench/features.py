"""What log-mel features cost on one core, beside Lhotse's function and the feature extractor of transformers.

All get the same utterances of noise, one at a time. That of transformers pads each to 30 s, which ours does not
(model.encoder.pad_to_30s comes after it); a row says what padding first would cost. Two rows say what training waits
for when nothing is stored: files as LibriSpeech and Common Voice have them, read, resampled, and extracted from.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
import whisper
from lhotse.features import whisper_fbank
from transformers import WhisperFeatureExtractor

from zipperasr.bench import data, timing
from zipperasr.bench.timing import Report, Row, Target
from zipperasr.data.audio import SAMPLE_RATE, Span
from zipperasr.data.features import N_FFT, log_mel, num_frames
from zipperasr.data.utterances import Utterance

OURS, PADDED = "log_mel", "log_mel, padded to 30 s"
LHOTSE, TRANSFORMERS = "Lhotse's WhisperFbank, its core", "transformers, one at a time"
WHISPER = "openai-whisper"
FLAC, MP3 = "reading a 16 kHz FLAC file, log_mel", "reading a 48 kHz MP3 file, log_mel"
FILES = {FLAC: ("flac", SAMPLE_RATE), MP3: ("mp3", 48_000)}
UTTERANCES = 12  # of each kind


def run(*, rounds: int) -> Report:
    """Every case on utterances that last as in each kind of corpus, with 80 and 128 bins, by one thread."""
    at = {"device": "cpu", "dtype": torch.float32}
    torch.set_num_threads(1)
    rows = [row for kind in data.KINDS for bins in (80, 128) for row in time_cases(kind, bins, rounds)]
    return Report({**timing.header(at), "rounds": rounds}, rows, list(targets(rows)))


def time_cases(kind: str, bins: int, rounds: int) -> list[Row]:
    """A row for each case: its time as a multiple of ours in the same round, and seconds of audio per second."""
    seconds = data.durations_s(kind, UTTERANCES)
    samples = [_noise(i, s, SAMPLE_RATE) for i, s in enumerate(seconds)]
    steps = {name: _all(case, samples) for name, case in cases(bins).items()}
    where = f"{kind}, {bins} bins"
    with tempfile.TemporaryDirectory(prefix="zipperasr-") as folder:
        for name, (suffix, rate) in FILES.items():
            steps[name] = _all(
                Utterance.features, [_file(Path(folder), i, s, suffix, rate, bins) for i, s in enumerate(seconds)]
            )
        taken = timing.interleave(steps, rounds=rounds, title=where)
    return [
        {
            "where": where,
            "case": name,
            "ratio": timing.ratio(taken[name], taken[OURS]),
            "ms/utt": round(1000 * statistics.median(taken[name]) / UTTERANCES, 3),
            "audio s/s": round(seconds.sum() / statistics.median(taken[name])),
        }
        for name in steps
    ]


def cases(bins: int) -> dict[str, Callable[[np.ndarray], object]]:
    """What is called on the samples of an utterance. Lhotse's class itself needs librosa, for the same filters."""
    filters, window = whisper.audio.mel_filters("cpu", bins), torch.hann_window(N_FFT)
    extractor = WhisperFeatureExtractor(feature_size=bins)
    return {
        TRANSFORMERS: lambda x: extractor(x, sampling_rate=SAMPLE_RATE, return_tensors="pt"),
        PADDED: lambda x: log_mel(whisper.pad_or_trim(x), bins),
        WHISPER: lambda x: whisper.log_mel_spectrogram(x, bins),
        LHOTSE: lambda x: whisper_fbank.log_mel_spectrogram(x, filters, window=window),
        OURS: lambda x: log_mel(x, bins),
    }


def targets(rows: Sequence[Row]) -> Iterator[Target]:
    """At least as fast as Lhotse, three times as fast as transformers; a core feeds 200 s of audio a second."""
    for row in rows:
        if row["case"] == FLAC:
            yield Target(f"{row['where']}: {FLAC}, audio s/s", row["audio s/s"], 200, ">=")
        if row["case"] in (LHOTSE, TRANSFORMERS):
            limit = 1.0 if row["case"] == LHOTSE else 3.0
            yield Target(f"{row['where']}: {row['case']}, over ours", row["ratio"], limit, ">=")


def _all(case: Callable, utterances: Sequence) -> Callable[[], None]:
    def step() -> None:
        for x in utterances:
            case(x)

    return step


def _noise(seed: int, duration_s: float, rate: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, int(duration_s * rate)).astype(np.float32)


def _file(folder: Path, number: int, duration_s: float, suffix: str, rate: int, bins: int) -> Utterance:
    path = folder / f"{number}.{suffix}"
    soundfile.write(path, _noise(number, duration_s, rate), rate)
    span = Span(str(path), 0.0, duration_s, rate, (0,), (0,))
    return Utterance(path.stem, "en", "", "", duration_s, num_frames(duration_s), bins, span)

"""Audio files: what they hold, whether they are whole, and their samples as Whisper wants them (16 kHz, mono).

C channels, T samples.
"""

from __future__ import annotations

import functools
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import soundfile

from zipperasr.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from lhotse.cut import Cut

SAMPLE_RATE = 16000
TOLERANCE_S = 0.04
"""MP3 headers may promise up to one frame (1152 samples) more than decoders give; it is filled with silence."""
_TAIL_S = 0.1
_UNKNOWN_LENGTH = 0x7FFF0000  # a WAV header written to a pipe claims about this many bytes, or more
_DECLARED = re.compile(r"\b(?:data|SSND) : (\d+) \(should be (\d+)\)")


@dataclass(frozen=True)
class AudioInfo:
    """What a file holds: sampling rate in Hz, number of samples (of one channel) and of channels, container."""

    sampling_rate: int
    num_samples: int
    num_channels: int
    format: str

    @property
    def duration_s(self) -> float:
        """Seconds."""
        return self.num_samples / self.sampling_rate


class BadAudio(Exception):
    """A file that cannot be used: `kind` is `missing audio`, `unreadable audio` or `truncated audio`."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


def probe(path: str) -> AudioInfo:
    """The properties of an audio file of any codec that libsndfile reads, without decoding more than its end.

    Raises BadAudio when the file is missing, unreadable, or ends before the audio its header declares.
    """
    if not Path(path).is_file():
        raise BadAudio("missing audio", f"{path}: no such file")
    if not Path(path).stat().st_size:
        raise BadAudio("unreadable audio", f"{path}: an empty file")
    try:
        file = soundfile.SoundFile(path)
    except soundfile.SoundFileError as error:
        raise BadAudio("unreadable audio", f"{path}: {error.error_string}") from error
    with file:
        tail = min(file.frames, int(_TAIL_S * file.samplerate))
        try:
            file.seek(file.frames - tail)
            missing = tail - len(file.read(tail))
        except soundfile.SoundFileError:
            missing = file.frames
        if missing > TOLERANCE_S * file.samplerate or _is_cut(file):
            raise BadAudio("truncated audio", f"{path}: ends before the audio that its header declares")
        return AudioInfo(file.samplerate, file.frames, file.channels, file.format)


def _is_cut(file: soundfile.SoundFile) -> bool:
    """Whether a container ends too early where libsndfile makes do with what is there: RIFF, AIFF and Ogg."""
    if file.format == "OGG":
        return not _has_last_page(file.name)
    declared = _DECLARED.search(file.extra_info)
    return declared is not None and int(declared[2]) < int(declared[1]) < _UNKNOWN_LENGTH


def _has_last_page(path: str) -> bool:
    """Whether an Ogg file ends with a whole page that carries the end-of-stream flag (RFC 3533, section 6)."""
    with open(path, "rb") as stream:
        stream.seek(max(0, Path(path).stat().st_size - 2**16))
        page = stream.read()
    page = page[max(0, page.rfind(b"OggS")) :]
    if len(page) < 27 or not page[5] & 4:
        return False
    num_segments = page[26]
    return len(page) >= 27 + num_segments + sum(page[27 : 27 + num_segments])


def num_samples(duration_s: float) -> int:
    """Samples at 16 kHz of a cut's duration, rounded as Lhotse's compute_num_samples rounds, ten times as fast."""
    return int(round(duration_s * SAMPLE_RATE, 8) + 0.5)


@dataclass(slots=True)
class Span:
    """A piece of an audio file: `duration_s` from `start_s` on, the mean of the `picked` ones of the file's `channels`.

    All that reading takes, in a fraction of a cut's memory; not frozen, for there are millions of them.
    """

    path: str
    start_s: float
    duration_s: float
    sampling_rate: int
    channels: tuple[int, ...]
    picked: tuple[int, ...]

    @classmethod
    def of(cls, cut: dict[str, Any]) -> Span:
        """What a cut's dictionary says of its audio. Raises UserError unless that is one file."""
        recording, channel = cut["recording"], cut["channel"]
        source, *others = recording["sources"]
        if others or source["type"] != "file":
            what = f"{1 + len(others)} sources" if others else f"a source of type '{source['type']}'"
            raise UserError(f"cut '{cut['id']}': its recording has {what}; recordings are files here: export it to one")
        rate = recording["sampling_rate"]
        for transform in reversed(recording.get("transforms") or ()):
            if transform["name"] != "Resample":  # which is done below, from the file's own rate
                mend = "write its audio to a file (Lhotse's save_audio)"
                raise UserError(f"cut '{cut['id']}': its recording is changed by '{transform['name']}'; {mend}")
            rate = transform["kwargs"]["source_sampling_rate"]
        channels, picked = _shared(*source["channels"]), _shared(*(channel if isinstance(channel, list) else [channel]))
        start_s = cut["start"] or 0.0  # one object, as it mostly is
        return cls(source["source"], start_s, cut["duration"], rate, channels, picked)

    def load(self, utt_id: str) -> np.ndarray:
        """The samples, float32 [num_samples(duration_s)]: channels averaged, resampled to 16 kHz.

        Lhotse reads and resamples (torchaudio is not needed), but its tolerance of half a second is not used: it would
        fill a truncated file with repeated audio. Raises UserError naming `utt_id` when the audio is not all there.
        """
        import numpy as np
        from lhotse.audio import AudioLoadingError, AudioSource
        from lhotse.augmentation import Resample
        from lhotse.utils import compute_num_samples

        source, rate = AudioSource("file", list(self.channels), self.path), self.sampling_rate
        what = f"cut '{utt_id}': {self.path}"
        try:
            samples = source.load_audio(self.start_s, self.duration_s, force_opus_sampling_rate=rate)  # [C, T]
        except (AudioLoadingError, OSError, RuntimeError) as error:
            raise UserError(f"{what} cannot be read; run stage 1 again, which names the defect") from error
        expected = compute_num_samples(self.duration_s, rate)
        if abs(samples.shape[1] - expected) > TOLERANCE_S * rate:
            raise UserError(
                f"{what} holds {samples.shape[1]} samples, not {expected} as its manifest says; run stage 1 again"
            )
        mono = samples[[self.channels.index(c) for c in self.picked]].mean(axis=0, keepdims=True)  # [1, T]
        if rate != SAMPLE_RATE:
            mono = Resample(rate, SAMPLE_RATE)(mono, rate)
        length = num_samples(self.duration_s)
        return np.pad(mono[0, :length], (0, max(0, length - mono.shape[1])))


def load_audio(cut: Cut) -> np.ndarray:
    """The samples of a cut, float32 [num_samples(cut.duration)], as `Span.load` reads them."""
    return Span.of(cut.to_dict()).load(cut.id)


def encode_flac(samples: np.ndarray) -> bytes:
    """16 kHz float32 samples [T] as a FLAC file of 16 bits: without loss if they come from 16 bits."""
    import numpy as np

    stream = io.BytesIO()
    whole = np.rint(samples * 2**15).clip(-(2**15), 2**15 - 1).astype(np.int16)  # soundfile's own scale would be 32767
    soundfile.write(stream, whole, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return stream.getvalue()


def decode_flac(data: bytes) -> np.ndarray:
    """The float32 samples [T] of a FLAC file in memory."""
    return soundfile.read(io.BytesIO(data), dtype="float32")[0]


@functools.lru_cache(maxsize=64)
def _shared(*channels: int) -> tuple[int, ...]:
    """Millions of spans share a few of these."""
    return channels

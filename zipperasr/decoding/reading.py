"""Audio that is to be transcribed: read, cut into pieces, its language detected; and what came of each file.

T samples (16 kHz).
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from zipperasr.data import stream
from zipperasr.data.audio import SAMPLE_RATE
from zipperasr.data.features import log_mel
from zipperasr.decoding.guards import has_speech
from zipperasr.decoding.inputs import Source
from zipperasr.decoding.job import TranscriptionJob
from zipperasr.decoding.pieces import Piece, segment
from zipperasr.decoding.segments import cut
from zipperasr.decoding.transcript import Segment, Transcript
from zipperasr.errors import TooLong, UserError
from zipperasr.model.encoder import FRAMES_PER_S
from zipperasr.model.language_id import LanguageDetector
from zipperasr.model.speech_llm import SpeechLLM

DETECTION_S = 30  # of speech, in which the language is detected
UNKNOWN = ""  # the language of a piece before it is detected
Detect = Callable[[Sequence[Tensor], Collection[str]], dict[str, float]]
"""Probabilities of languages from log-mel features, the most probable first: what a LanguageDetector is."""


@dataclass(eq=False)
class File:
    """A source, and what is known of it so far. `lang` is what it was given, until it is detected."""

    source: Source
    given: str | None
    lang: str | None = field(init=False)
    segments: list[Segment] = field(default_factory=list)
    probabilities: dict[str, float] = field(default_factory=dict)
    num_samples: int = 0
    num_channels: int | None = None

    def __post_init__(self) -> None:
        self.lang = self.given

    @property
    def duration_s(self) -> float:
        """Of what has been read."""
        return self.num_samples / SAMPLE_RATE

    def transcript(self, doubt: float) -> Transcript:
        """All of it, when it is done. A given language is doubted from this probability of another one on."""
        detected = next(iter(self.probabilities), None)
        has_text = any("no_speech" not in segment.flags for segment in self.segments)
        doubts = self.given and detected != self.given and self.probabilities.get(detected, 0) >= doubt
        flags = (*["no_speech"] * (not has_text), *["language_doubt"] * bool(doubts))
        probability = self.probabilities.get(self.lang)
        return Transcript(
            self.source.name, self.duration_s, self.num_channels, self.lang,
            probability and round(probability, 4), detected, flags,
            tuple(sorted(self.segments, key=lambda segment: segment.start_s)),
        )  # fmt: skip


class Reader:
    """Reads files piece by piece, and finds out their languages."""

    def __init__(
        self, job: TranscriptionJob, detect: Detect | None, *, max_s: float, num_bins: int, checks_given: bool = True
    ) -> None:
        """`max_s` and `num_bins`: those of `limits`. `checks_given`: whether to doubt a language that was given."""
        self.job, self.detect, self.num_bins, self.checks_given = job, detect, num_bins, checks_given
        self.max_s = min(job.transcription.max_segment_s, max_s)

    def read(
        self, file: File, *, max_audio_s: float = math.inf, check: Callable[[], None] = lambda: None
    ) -> Iterator[Piece | Segment]:
        """A file's pieces with speech, and the segments without, in order, when the file's language is known.

        `check` is called at each block of audio, and may raise: hours of silence hold no piece at which to stop.
        Raises UserError when it holds no audio or a broken one, and TooLong for more than `max_audio_s`.
        """
        heard, held, held_s = self._heard(file, max_audio_s, check), [], 0.0
        for found in heard if self.detect and (self.checks_given or not file.given) else ():
            held.append(found)
            held_s += found.duration_s if isinstance(found, Piece) else 0
            if held_s >= DETECTION_S:
                break
        if held_s:
            langs = dict.fromkeys([*self.job.langs, *[file.given] * (file.given is not None)])
            features = [torch.from_numpy(piece.features) for piece in held if isinstance(piece, Piece)]
            file.probabilities = self.detect(features, langs)
            file.lang = file.given or next(iter(file.probabilities))
        for found in itertools.chain(held, heard):
            yield replace(found, lang=file.lang) if isinstance(found, Piece) else found

    def _heard(self, file: File, max_audio_s: float, check: Callable[[], None]) -> Iterator[Piece | Segment]:
        source = file.source
        info = stream.describe(source.path)
        file.num_channels = None if source.channels or info is None else info.num_channels
        span = {"start_s": source.start_s, "end_s": source.end_s, "channels": source.channels}
        if info is not None and source.end_s is None:
            _check_length(source, info.duration_s, max_audio_s)
        blocks = _checked(file, stream.read(source.path, info, **span), max_audio_s, check)
        settings = self.job.transcription
        pieces = cut(blocks, max_s=self.max_s, min_pause_s=settings.min_pause_s, margin_s=settings.margin_s)
        for piece in pieces:
            features, duration_s = log_mel(piece.samples, self.num_bins), len(piece.samples) / SAMPLE_RATE
            if has_speech(features, self.job.decoding):
                yield Piece(UNKNOWN, piece.start_s, duration_s, features.numpy())
            else:
                yield segment(piece.start_s, duration_s, "", flags=("no_speech",))
        if not file.num_samples:
            raise UserError(f"{source.path}: holds no audio" + " at these times" * (source.end_s is not None))


def _checked(
    file: File, blocks: Iterable[np.ndarray], max_audio_s: float, check: Callable[[], None]
) -> Iterator[np.ndarray]:
    for block in blocks:
        check()
        file.num_samples += len(block)
        _check_length(file.source, file.duration_s, max_audio_s)
        yield block


def _check_length(source: Source, duration_s: float, max_audio_s: float) -> None:
    if duration_s > max_audio_s:
        raise TooLong(f"{source.path}: longer than the {max_audio_s:g} s that are taken; cut it into parts")


def limits(model: SpeechLLM) -> dict[str, float | int]:
    """The longest piece `max_s` in seconds that the model's encoder takes, and the `num_bins` of its features."""
    return {"max_s": model.encoder.max_frames / FRAMES_PER_S, "num_bins": model.encoder.conv1.in_channels}


def load_detector(job: TranscriptionJob, *, device: str, is_needed: bool) -> LanguageDetector | None:
    """Whisper's detector of languages; None where there can be none, and none `is_needed`.

    Raises UserError where there is none and it is needed.
    """
    try:
        if job.run.model.init == "random":
            raise UserError(f"{job.run_dir}: its Whisper has random weights")
        detector = LanguageDetector.load(job.run.model.encoder.pretrained, device=device)
        if not detector.tokens.keys() & set(job.langs):
            raise UserError(f"{job.run.model.encoder.pretrained}: knows no language of {', '.join(job.langs)}")
        return detector
    except UserError as error:
        if is_needed:
            raise UserError(f"no language can be detected: {error}; name it, as in --language de") from error
        return None

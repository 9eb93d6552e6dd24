"""Audio of any length transcribed: read and cut into pieces, its language detected, decoded in batches across files.

This process reads, a second thread or `nj` processes decode what has been read. What is held at a time is a few minutes
of features, however long the audio is.
F frames (100 Hz), T samples (16 kHz).
"""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from zipperasr.alignment.words import Word
from zipperasr.data import stream
from zipperasr.data.audio import SAMPLE_RATE
from zipperasr.data.features import log_mel
from zipperasr.decoding import DecodingSettings
from zipperasr.decoding.decode import start_pools
from zipperasr.decoding.generate import Hypothesis, Transcriber
from zipperasr.decoding.guards import has_speech
from zipperasr.decoding.inputs import Source
from zipperasr.decoding.job import TranscriptionJob
from zipperasr.decoding.segments import cut
from zipperasr.decoding.transcript import Segment, Transcript
from zipperasr.decoding.worker import batches, load_model, max_tokens, segment_s
from zipperasr.errors import UserError
from zipperasr.model.aligner import Aligner
from zipperasr.model.encoder import FRAMES_PER_S
from zipperasr.model.language_id import LanguageDetector

DETECTION_S = 30  # of speech, in which the language is detected
FIRST_POOL_S, LARGEST_POOL_S = 30, 480  # of speech, sorted by length; the first is small, so that it is soon there


@dataclass(eq=False)
class Piece:
    """A segment to be: its features [F, bins], float32."""

    start_s: float
    duration_s: float
    features: np.ndarray

    @property
    def num_frames(self) -> int:
        """F."""
        return len(self.features)


@dataclass(eq=False)
class _File:
    """A source, and what is known of it so far."""

    source: Source
    lang: str | None
    segments: list[Segment] = field(default_factory=list)
    probabilities: dict[str, float] = field(default_factory=dict)
    num_samples: int = 0
    num_channels: int | None = None
    decoded_s: float = 0.0
    num_waiting: int = 0  # pieces that are read and not decoded
    is_read: bool = False
    error: UserError | None = None

    @property
    def is_done(self) -> bool:
        return self.is_read and (self.num_waiting == 0 or self.error is not None)


def transcribe(
    sources: Iterable[Source], job: TranscriptionJob, *, nj: int = 1, on_progress: Callable[[float], None]
) -> Iterator[tuple[Source, Transcript | UserError]]:
    """Each source with its transcript, or with why it has none, as soon as it is done; mostly in order.

    `nj` processes decode, on GPUs at most one each. `on_progress` is told of further seconds of audio that are done.
    Raises UserError where the model is not whole, or a language is to be detected and cannot be.
    """
    waiting = deque(_File(source, job.lang or source.lang) for source in sources)
    files_, pending, turn = list(waiting), deque(), itertools.count()

    def finished() -> Iterator[tuple[Source, Transcript | UserError]]:
        for file in _done(waiting):
            on_progress(file.num_samples / SAMPLE_RATE - file.decoded_s)
            yield file.source, file.error or _transcript(file, job)

    with ExitStack() as stack:
        executors = start_pools(nj, stack) if nj > 1 else [ThreadPoolExecutor(1)]
        stack.callback(executors[0].shutdown, cancel_futures=True)
        devices = [f"cuda:{j}" if torch.cuda.is_available() else "cpu" for j in range(len(executors))]
        limits = executors[0].submit(_limits, job, devices[0])
        detector = _detector(job, device=devices[0], is_needed=any(file.lang is None for file in files_))
        reader = _Reader(job, detector, *_result(limits))
        for pool in itertools.chain(_pools(reader.read(files_)), [None]):
            for file_lang, items in _by_lang(pool or ()).items():
                j = next(turn) % len(executors)
                pieces = [piece for _, piece in items]
                future = executors[j].submit(_decode, job, file_lang, pieces, devices[j], nj > 1)
                pending.append((future, items))
            while pending and (pool is None or len(pending) > len(executors) or pending[0][0].done()):
                on_progress(_take(*pending.popleft()))
                yield from finished()
            yield from finished()


class _Reader:
    """Reads files piece by piece, and finds out their languages."""

    def __init__(self, job: TranscriptionJob, detector: LanguageDetector | None, max_s: float, num_bins: int) -> None:
        self.job, self.detector, self.num_bins = job, detector, num_bins
        self.max_s = min(job.transcription.max_segment_s, max_s)

    def read(self, waiting: Sequence[_File]) -> Iterator[tuple[_File, Piece]]:
        """The pieces with speech of all files in order, when the language of their file is known."""
        for file in waiting:
            try:
                for piece in self._when_language_is_known(file, self._heard(file)):
                    file.num_waiting += 1
                    yield file, piece
            except UserError as error:
                file.error = error
            file.is_read = True

    def _heard(self, file: _File) -> Iterator[Piece]:
        """The pieces that may hold speech; the others are segments already."""
        source = file.source
        info = stream.describe(source.path)
        file.num_channels = None if source.channels or info is None else info.num_channels
        span = {"start_s": source.start_s, "end_s": source.end_s, "channels": source.channels}
        blocks = self._counted(file, stream.read(source.path, info, **span))
        settings = self.job.transcription
        pieces = cut(blocks, max_s=self.max_s, min_pause_s=settings.min_pause_s, margin_s=settings.margin_s)
        for piece in pieces:
            features, duration_s = log_mel(piece.samples, self.num_bins), len(piece.samples) / SAMPLE_RATE
            if has_speech(features, self.job.decoding):
                yield Piece(piece.start_s, duration_s, features.numpy())
            else:
                file.segments.append(_segment(piece.start_s, duration_s, "", flags=("no_speech",)))
        if not file.num_samples:
            raise UserError(f"{source.path}: holds no audio" + " at these times" * (source.end_s is not None))

    @staticmethod
    def _counted(file: _File, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for block in blocks:
            file.num_samples += len(block)
            yield block

    def _when_language_is_known(self, file: _File, pieces: Iterator[Piece]) -> Iterator[Piece]:
        held, held_s = [], 0.0
        for piece in pieces if self.detector else ():
            held.append(piece)
            held_s += piece.duration_s
            if held_s >= DETECTION_S:
                break
        if held:
            langs = dict.fromkeys([*self.job.langs, *[file.lang] * (file.lang is not None)])
            file.probabilities = self.detector([torch.from_numpy(piece.features) for piece in held], langs)
            file.lang = file.lang or next(iter(file.probabilities))
        yield from itertools.chain(held, pieces)


def _pools(pieces: Iterator[tuple[_File, Piece]]) -> Iterator[list[tuple[_File, Piece]]]:
    """Runs of pieces that are decoded together: more and more, up to LARGEST_POOL_S."""
    pool, pool_s, most_s = [], 0.0, FIRST_POOL_S
    for file, piece in pieces:
        pool.append((file, piece))
        pool_s += piece.duration_s
        if pool_s >= most_s:
            yield pool
            pool, pool_s, most_s = [], 0.0, min(2 * most_s, LARGEST_POOL_S)
    yield pool


def _by_lang(pool: Iterable[tuple[_File, Piece]]) -> dict[str, list[tuple[_File, Piece]]]:
    groups: dict[str, list[tuple[_File, Piece]]] = {}
    for file, piece in pool:
        if not file.error:
            groups.setdefault(file.lang, []).append((file, piece))
    return groups


def _decode(
    job: TranscriptionJob, lang: str, pieces: Sequence[Piece], device: str, has_neighbours: bool
) -> list[Segment]:
    """The segment of each piece; runs in the thread or the process that has the model."""
    if has_neighbours:
        torch.set_num_threads(1)
    transcriber, segments = _transcriber(job.run_dir, job.steps, job.model, device, lang, job.decoding), {}
    aligner = _aligner(job.run_dir, job.aligner, device) if job.aligner else None
    longest_s = segment_s(transcriber.model, job.run.model.encoder)
    longest_first = sorted(pieces, key=lambda piece: -piece.num_frames)
    for batch in batches(longest_first, job.decoding, prompt_tokens=len(transcriber.prompt)):
        caps = [max_tokens(piece, job.decoding) for piece in batch]
        try:
            speech, frames = transcriber.encode([torch.from_numpy(piece.features) for piece in batch], longest_s)
            found = transcriber(speech, caps)
        except torch.OutOfMemoryError as error:
            mend = f"lower decoding.max_tokens_per_batch={job.decoding.max_tokens_per_batch}"
            raise UserError(f"{len(batch)} segments do not fit the GPU's memory; {mend}") from error
        words = (
            [one.words for one in aligner(frames, lang, [said.text for said in found])]
            if aligner
            else [None] * len(found)
        )
        for piece, said, timed in zip(batch, found, words, strict=True):
            segments[piece] = _decoded(piece, said, timed)
    return [segments[piece] for piece in pieces]


def _decoded(piece: Piece, said: Hypothesis, words: Sequence[Word] | None) -> Segment:
    flags = (*said.flags, *["empty"] * (not said.text), *["unaligned"] * bool(said.text and words == []))
    segment = _segment(piece.start_s, piece.duration_s, said.text, round(said.logprob, 5), flags)
    if words is None:
        return segment
    shifted = (
        replace(w, start_s=round(w.start_s + piece.start_s, 3), end_s=round(w.end_s + piece.start_s, 3)) for w in words
    )
    return replace(segment, words=tuple(shifted))


@functools.lru_cache(maxsize=2)
def _transcriber(
    run_dir: Path, steps: tuple[int, ...], digest: str, device: str, lang: str, settings: DecodingSettings
) -> Transcriber:
    return Transcriber(load_model(run_dir, steps, digest, device).merged(lang), lang, settings)


@functools.lru_cache(maxsize=1)
def _aligner(run_dir: Path, digest: str, device: str) -> Aligner:
    return Aligner.load(run_dir, device=device)


def _limits(job: TranscriptionJob, device: str) -> tuple[float, int]:
    """The longest segment in seconds that the model's encoder takes, and the number of its mel bins."""
    encoder = load_model(job.run_dir, job.steps, job.model, device).encoder
    return encoder.max_frames / FRAMES_PER_S, encoder.conv1.in_channels


def _detector(job: TranscriptionJob, *, device: str, is_needed: bool) -> LanguageDetector | None:
    """Whisper's detector of languages; None where there can be none, and none `is_needed`."""
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


def _segment(start_s: float, duration_s: float, text: str, logprob: float | None = None, flags=()) -> Segment:
    return Segment(round(start_s, 3), round(start_s + duration_s, 3), text, logprob, flags)


def _take(future: Future, items: Sequence[tuple[_File, Piece]]) -> float:
    """Give the files their segments when they are decoded; return how many seconds these are."""
    for (file, piece), segment in zip(items, _result(future), strict=True):
        file.segments.append(segment)
        file.num_waiting -= 1
        file.decoded_s += piece.duration_s
    return sum(piece.duration_s for _, piece in items)


def _result(future: Future):
    try:
        return future.result()
    except BrokenProcessPool as error:
        mend = "lower --nj if memory is short, and run the same command again to go on"
        raise UserError(f"a decoding process was killed; {mend}") from error


def _done(waiting: deque[_File]) -> list[_File]:
    """Take the files that are done out of those that wait."""
    done = [file for file in itertools.takewhile(lambda file: file.is_read, waiting) if file.is_done]
    for file in done:
        waiting.remove(file)
    return done


def _transcript(file: _File, job: TranscriptionJob) -> Transcript:
    given, detected = job.lang or file.source.lang, next(iter(file.probabilities), None)
    has_text = any("no_speech" not in segment.flags for segment in file.segments)
    doubts = given and detected != given and file.probabilities.get(detected, 0) >= job.transcription.doubt
    flags = (*["no_speech"] * (not has_text), *["language_doubt"] * bool(doubts))
    probability = file.probabilities.get(file.lang)
    return Transcript(
        file.source.name, file.num_samples / SAMPLE_RATE, file.num_channels, file.lang,
        probability and round(probability, 4), detected, flags, tuple(sorted(file.segments, key=lambda s: s.start_s)),
    )  # fmt: skip

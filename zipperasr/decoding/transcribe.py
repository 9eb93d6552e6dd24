"""Audio of any length transcribed in batches across files.

This process reads, a second thread or `nj` processes decode what has been read. What is held at a time is a few minutes
of features, however long the audio is.
"""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from zipperasr.decoding import DecodingSettings
from zipperasr.decoding.decode import start_pools
from zipperasr.decoding.generate import Transcriber
from zipperasr.decoding.inputs import Source
from zipperasr.decoding.job import TranscriptionJob
from zipperasr.decoding.pieces import Piece, decode
from zipperasr.decoding.reading import File, Reader, limits, load_detector
from zipperasr.decoding.transcript import Segment, Transcript
from zipperasr.decoding.worker import load_model, segment_s
from zipperasr.errors import UserError
from zipperasr.model.aligner import Aligner

FIRST_POOL_S, LARGEST_POOL_S = 30, 480  # of speech, sorted by length; the first is small, so that it is soon there


@dataclass(eq=False)
class _Work(File):
    """A file, and how far it is."""

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
    waiting = deque(_Work(source, job.lang or source.lang) for source in sources)
    todo, pending, turn = list(waiting), deque(), itertools.count()

    def finished() -> Iterator[tuple[Source, Transcript | UserError]]:
        for file in _done(waiting):
            on_progress(file.duration_s - file.decoded_s)
            yield file.source, file.error or file.transcript(job.transcription.doubt)

    with _naming_killed_process(), ExitStack() as stack:
        executors = start_pools(nj, stack) if nj > 1 else [ThreadPoolExecutor(1)]
        stack.callback(executors[0].shutdown, cancel_futures=True)
        devices = [f"cuda:{j}" if torch.cuda.is_available() else "cpu" for j in range(len(executors))]
        known_limits = executors[0].submit(_limits, job, devices[0])
        detector = load_detector(job, device=devices[0], is_needed=any(file.lang is None for file in todo))
        reader = Reader(job, detector, **known_limits.result())
        for pool in itertools.chain(_pools(_read(reader, todo)), [None]):
            for items in _by_lang(pool or ()):
                j = next(turn) % len(executors)
                future = executors[j].submit(_decode, job, [piece for _, piece in items], devices[j], nj > 1)
                pending.append((future, items))
            while pending and (pool is None or len(pending) > len(executors) or pending[0][0].done()):
                on_progress(_take(*pending.popleft()))
                yield from finished()
            yield from finished()


def _read(reader: Reader, todo: Sequence[_Work]) -> Iterator[tuple[_Work, Piece]]:
    """The pieces of all files in order."""
    for file in todo:
        try:
            for found in reader.read(file):
                if isinstance(found, Segment):
                    file.segments.append(found)
                else:
                    file.num_waiting += 1
                    yield file, found
        except UserError as error:
            file.error = error
        file.is_read = True


def _pools(pieces: Iterator[tuple[_Work, Piece]]) -> Iterator[list[tuple[_Work, Piece]]]:
    """Runs of pieces that are decoded together: more and more, up to LARGEST_POOL_S."""
    pool, pool_s, most_s = [], 0.0, FIRST_POOL_S
    for file, piece in pieces:
        pool.append((file, piece))
        pool_s += piece.duration_s
        if pool_s >= most_s:
            yield pool
            pool, pool_s, most_s = [], 0.0, min(2 * most_s, LARGEST_POOL_S)
    yield pool


def _by_lang(pool: Iterable[tuple[_Work, Piece]]) -> Iterable[list[tuple[_Work, Piece]]]:
    """A pool's pieces of each language: there are enough of them for a model that is merged for it."""
    groups: dict[str, list[tuple[_Work, Piece]]] = {}
    for file, piece in pool:
        if not file.error:
            groups.setdefault(piece.lang, []).append((file, piece))
    return groups.values()


def _decode(job: TranscriptionJob, pieces: Sequence[Piece], device: str, has_neighbours: bool) -> list[Segment]:
    """The segment of each piece of one language; runs in the thread or the process that has the model."""
    if has_neighbours:
        torch.set_num_threads(1)
    transcriber = _transcriber(job.run_dir, job.steps, job.model, device, pieces[0].lang, job.decoding)
    aligner = _aligner(job.run_dir, job.aligner, device) if job.aligner else None
    segments: dict[Piece, Segment] = {}
    for some in decode(pieces, transcriber, aligner, longest_s=segment_s(transcriber.model, job.run.model.encoder)):
        segments |= some
    return [segments[piece] for piece in pieces]


@functools.lru_cache(maxsize=2)
def _transcriber(
    run_dir: Path, steps: tuple[int, ...], digest: str, device: str, lang: str, settings: DecodingSettings
) -> Transcriber:
    return Transcriber(load_model(run_dir, steps, digest, device).merged(lang), settings)


@functools.lru_cache(maxsize=1)
def _aligner(run_dir: Path, digest: str, device: str) -> Aligner:
    return Aligner.load(run_dir, device=device)


def _limits(job: TranscriptionJob, device: str) -> dict[str, float | int]:
    return limits(load_model(job.run_dir, job.steps, job.model, device))


def _take(future: Future, items: Sequence[tuple[_Work, Piece]]) -> float:
    """Give the files their segments when they are decoded; return how many seconds these are."""
    for (file, piece), found in zip(items, future.result(), strict=True):
        file.segments.append(found)
        file.num_waiting -= 1
        file.decoded_s += piece.duration_s
    return sum(piece.duration_s for _, piece in items)


@contextmanager
def _naming_killed_process() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        mend = "lower --nj if memory is short, and run the same command again to go on"
        raise UserError(f"a decoding process was killed; {mend}") from error


def _done(waiting: deque[_Work]) -> list[_Work]:
    """Take the files that are done out of those that wait."""
    done = [file for file in itertools.takewhile(lambda file: file.is_read, waiting) if file.is_done]
    for file in done:
        waiting.remove(file)
    return done

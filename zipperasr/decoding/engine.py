"""A run's model that transcribes what many send at once, in batches across requests and languages.

A thread of its own reads each request's audio, and one thread has the models. It takes pieces from the requests in
turn, so that a long recording holds up nobody, and decodes what has come together in the meantime.
"""

import asyncio
import contextlib
import logging
import math
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zipperasr.decoding.generate import Transcriber
from zipperasr.decoding.inputs import Source
from zipperasr.decoding.job import TranscriptionJob
from zipperasr.decoding.pieces import Piece, decode
from zipperasr.decoding.reading import File, Reader, limits, load_detector
from zipperasr.decoding.transcript import Segment, Transcript
from zipperasr.decoding.worker import load_model, segment_s
from zipperasr.errors import TooLong, UserError
from zipperasr.model.aligner import Aligner
from zipperasr.model.clock import clock

log = logging.getLogger(__name__)

ROUND_S = 120  # of speech that is decoded before what has come meanwhile has its turn
AHEAD_S = 240  # of speech that a request may have read and not decoded


class Fault(RuntimeError):
    """Something went wrong here, not in what was sent."""


@dataclass(eq=False)
class _Request:
    """A file that somebody waits for; `order` holds what was read of it and not given back yet."""

    file: File
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    order: deque[Piece | Segment] = field(default_factory=deque)
    waiting: deque[Piece] = field(default_factory=deque)
    decoded: dict[Piece, Segment] = field(default_factory=dict)
    is_begun: bool = False  # its language has been told
    is_read: bool = False
    is_dropped: bool = False

    @property
    def has_room(self) -> bool:
        return sum(piece.duration_s for piece in self.waiting) < AHEAD_S

    def give(self, event: str | Segment | Transcript | Exception) -> None:
        """To whoever waits, if anybody still does."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class Engine:
    """Transcribes files of any languages at once. What one request has said never depends on the others."""

    def __init__(
        self,
        job: TranscriptionJob,
        *,
        checks_given: bool = True,
        on_batch: Callable[[int, int, float, float], None] = lambda *_: None,
    ) -> None:
        """`checks_given`: whether a language that is given is doubted, for which it is detected too.

        `on_batch` is told, in another thread, each batch's segments, languages, seconds of audio and of work.

        Raises UserError where the run is not whole.
        """
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
        model = load_model(job.run_dir, job.steps, job.model, device).merged()
        self.job, self.langs, self.on_batch = job, job.langs, on_batch
        self.transcriber = Transcriber(model, job.decoding)
        self.aligner = Aligner.load(job.run_dir, device=device) if job.aligner else None
        self.detector = load_detector(job, device=device, is_needed=False)
        self.longest_s = segment_s(model, job.run.model.encoder)
        self.reader = Reader(job, self._detect if self.detector else None, checks_given=checks_given, **limits(model))
        self.has_words, self.can_detect = self.aligner is not None, self.detector is not None
        self.requests: deque[_Request] = deque()
        self.detections: deque[tuple[Future, Sequence[Tensor], Collection[str]]] = deque()
        self.changed, self.is_closed = threading.Condition(), False
        for lang in self.langs:
            self.transcriber.prompt(lang)
        self.is_well = True  # what was decoded last could be, or a second of nothing at least
        self._try()  # what is broken fails now
        self.thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self.thread.start()

    @property
    def waiting(self) -> int:
        """Pieces that are read and not decoded."""
        with self.changed:
            return sum(len(request.waiting) for request in self.requests)

    async def transcribe(
        self, path: Path, *, name: str, lang: str | None = None, max_audio_s: float = math.inf
    ) -> AsyncIterator[str | Segment | Transcript]:
        """The language of an audio file, then its segments in order, each as soon as it is known, and its transcript.

        There is no language where none was given and nothing is said.
        Without `lang` the language is detected. Closing the generator drops what is not done.
        Raises UserError for bad audio and where nothing can be detected, TooLong for more than `max_audio_s`, and Fault
        where the model fails.
        """
        if lang is None and not self.can_detect:
            raise UserError("the language cannot be detected by this model; name it, as in language=de")
        request = _Request(File(Source(name, path), lang), asyncio.get_running_loop())
        with self.changed:
            if self.is_closed:
                raise Fault("the engine is closed")
            self.requests.append(request)
        threading.Thread(target=self._read, args=(request, max_audio_s), name="reader", daemon=True).start()
        try:
            event = None
            while not isinstance(event, Transcript):
                event = await request.events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            with self.changed:
                request.is_dropped = True
                self.requests.remove(request)
                self.changed.notify_all()

    def close(self) -> None:
        """End the threads; whoever still waits gets a Fault."""
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()
        self.thread.join()

    def _read(self, request: _Request, max_audio_s: float) -> None:
        torch.set_num_threads(1)  # of this thread: the cores are the model's
        path = str(request.file.source.path)

        def check() -> None:
            if request.is_dropped or self.is_closed:
                raise Fault("the engine is closed")

        try:
            for found in self.reader.read(request.file, max_audio_s=max_audio_s, check=check):
                with self.changed:
                    self.changed.wait_for(lambda: request.has_room or request.is_dropped or self.is_closed)
                    check()
                    request.order.append(found)
                    if isinstance(found, Piece):
                        request.waiting.append(found)
                        self.changed.notify_all()
                    self._give(request)
            with self.changed:
                request.is_read = True
                self._give(request)
        except UserError as error:
            kind = TooLong if isinstance(error, TooLong) else UserError
            request.give(kind(str(error).replace(path, request.file.source.name)))
        except Exception as error:
            if not isinstance(error, Fault):
                log.exception("reading failed")
            request.give(error if isinstance(error, Fault) else Fault("the audio could not be read"))

    def _give(self, request: _Request) -> None:
        """What is known of a request's beginning, and its transcript when that is all. Needs the lock."""
        if request.order and request.file.lang and not request.is_begun:
            request.is_begun = True
            request.give(request.file.lang)
        while request.order and (isinstance(request.order[0], Segment) or request.order[0] in request.decoded):
            found = request.order.popleft()
            segment = found if isinstance(found, Segment) else request.decoded.pop(found)
            request.file.segments.append(segment)
            request.give(segment)
        if request.is_read and not request.order:
            request.give(request.file.transcript(self.job.transcription.doubt))

    def _detect(self, features: Sequence[Tensor], langs: Collection[str]) -> dict[str, float]:
        """The detector's answer, from the thread that has the models."""
        asked: Future = Future()
        with self.changed:
            if self.is_closed:
                raise Fault("the engine is closed")
            self.detections.append((asked, features, langs))
            self.changed.notify_all()
        return asked.result()

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(self._has_work)
                detections, owners = list(self.detections), self._take()
                self.detections.clear()
                if self.is_closed:
                    for asked, *_ in detections:
                        asked.set_exception(Fault("the engine is closed"))
                    for request in self.requests:
                        request.give(Fault("the engine is closed"))
                    return
                self.changed.notify_all()  # there is room for more
            for asked, *what in detections:
                try:
                    asked.set_result(self.detector(*what))
                except Exception:
                    log.exception("detecting a language failed")
                    asked.set_exception(Fault("the language could not be detected"))
            if owners:
                self._decode(owners)

    def _has_work(self) -> bool:
        return self.is_closed or bool(self.detections) or any(request.waiting for request in self.requests)

    def _take(self) -> dict[Piece, _Request]:
        """A round's pieces, one of each request in turn. Needs the lock."""
        owners, taken_s = {}, 0.0
        while taken_s < ROUND_S and any(request.waiting for request in self.requests):
            request = self.requests[0]
            self.requests.rotate(-1)
            if request.waiting:
                piece = request.waiting.popleft()
                owners[piece] = request
                taken_s += piece.duration_s
        return owners

    def _try(self) -> None:
        second = Piece(self.langs[0], 0.0, 1.0, np.zeros((100, self.reader.num_bins), np.float32))
        list(decode([second], self.transcriber, self.aligner, longest_s=self.longest_s))

    def _decode(self, owners: dict[Piece, _Request]) -> None:
        """Decode a round; if that fails, its pieces one by one, so that only what is to blame is lost."""
        left = dict(owners)
        try:
            began = clock()
            for some in decode(owners, self.transcriber, self.aligner, longest_s=self.longest_s):
                now = clock()
                audio_s = sum(piece.duration_s for piece in some)
                self.on_batch(len(some), len({piece.lang for piece in some}), audio_s, now - began)
                began, self.is_well = now, True
                with self.changed:
                    for piece, segment in some.items():
                        request = left.pop(piece)
                        request.decoded[piece] = segment
                        self._give(request)
        except Exception:
            log.exception("decoding %d of %d segments failed", len(left), len(owners))
        # what has failed holds its memory as long as its exception is handled
        for piece, request in left.items():
            if len(owners) > 1:
                self._decode({piece: request})
                continue
            request.give(Fault("a segment could not be decoded"))
            try:
                self._try()
            except Exception:  # of the model, as where its GPU has failed, and not of the piece
                self.is_well = False
                log.exception("nothing can be decoded any more")

"""Long audio cut at pauses, while it is read, into pieces that the encoder takes.

The rule. The level of a 10-ms frame is its power without its mean (so neither an offset nor rumble counts), averaged
over 30 ms. Among the levels of the minute around a frame the 10th percentile is taken for the noise, and the 95th for
the speech. A frame holds speech if it is louder than the noise by 0.3 of their distance, but by 3 to 6 dB; where they
are less than MIN_CONTRAST_DB apart every frame does. That is far more than a detector of speech would keep, as a frame
too many costs little here, and a lost one a word. What nobody could hear (below -80 dBFS, or 54 dB below the speech)
is none.

A piece begins a margin before speech, and ends in a pause: at once in one of LONG_PAUSE, else in the longest one that
leaves it between MIN_SHARE and the whole of its greatest length, else in the last one before, and where there is none,
at its quietest frame. Pieces never overlap, and only what is no speech, and a margin away from it, is in none.
Audio that is no longer than one piece is not cut at all.

A trained detector, such as Silero's, finds more of what is no speech; the guards of decoding do that here.
F frames (100 Hz), T samples (16 kHz).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

FRAME = 160  # samples
MIN_SAMPLES = 1600  # in less than 0.1 s nobody says a word
LONG_PAUSE = 200  # frames
CONTEXT = 3000  # frames before and behind that tell noise from speech
MIN_SHARE = 0.4
MIN_CONTRAST_DB = 6.0  # steady noise has 1 to 2
SILENCE_DB = -80.0


@dataclass(frozen=True)
class Piece:
    """Samples [T] that begin at `start_s` of their audio."""

    start_s: float
    samples: np.ndarray


def cut(blocks: Iterable[np.ndarray], *, max_s: float, min_pause_s: float, margin_s: float) -> Iterator[Piece]:
    """The pieces, of at most `max_s`, of audio that comes in blocks [T] of any length.

    A pause is one from `min_pause_s` on. What is held at a time is little more than a minute.
    """
    limits = _Limits(*(round(100 * seconds) for seconds in (max_s, min_pause_s, margin_s)))
    longest = limits.longest
    blocks, held, past, at, is_last = iter(blocks), np.zeros(0, np.float32), np.zeros(0), 0, False
    while not is_last:
        while len(held) < (longest + LONG_PAUSE + CONTEXT) * FRAME and not is_last:
            block = next(blocks, None)
            is_last = block is None
            held = held if is_last else np.concatenate([held, block])
        if is_last and at == 0 and len(held) <= longest * FRAME:
            if len(held) >= MIN_SAMPLES:
                yield Piece(0.0, held)
            return
        level = level_db(held)
        speech = np.flatnonzero(level > threshold_db(np.concatenate([past, level])))
        plan = _Plan(level, speech, limits, is_last)
        for start, end in plan.spans():
            yield Piece((at + start) / 100, held[start * FRAME : end * FRAME])
        past = np.concatenate([past, level[: plan.begin]])[-CONTEXT:]
        at, held = at + plan.begin, held[plan.begin * FRAME :]


def level_db(samples: np.ndarray) -> np.ndarray:
    """The level of each frame [F] in dB below a full-scale square wave, of samples [T]; the last may be partial."""
    if not len(samples):
        return np.zeros(0)
    frames = np.pad(samples, (0, -len(samples) % FRAME)).reshape(-1, FRAME)
    power = np.convolve(np.pad(frames.var(axis=1), 1, mode="edge"), np.ones(3) / 3, mode="valid")
    return 10 * np.log10(power + 1e-12)


def threshold_db(level: np.ndarray) -> float:
    """Above which level a frame holds speech, from the levels [F] around it."""
    noise, speech = np.percentile(level, [10, 95]) if len(level) else (SILENCE_DB, SILENCE_DB)
    noise = max(noise, speech - 60)
    above = np.clip(0.3 * (speech - noise), 3, 6) if speech - noise > MIN_CONTRAST_DB else -np.inf
    return max(SILENCE_DB, noise + above)


class _Limits(NamedTuple):
    """In frames."""

    longest: int
    shortest_pause: int
    margin: int


@dataclass
class _Plan:
    """Where to cut what is held: frames of `level` [F], of which those in `speech` hold some."""

    level: np.ndarray
    speech: np.ndarray
    limits: _Limits
    is_last: bool
    begin: int = 0  # the first frame that is neither in a piece nor left out yet

    def spans(self) -> Iterator[tuple[int, int]]:
        """Start and end of each piece that can be cut without knowing what follows."""
        num_frames = len(self.level)
        while True:
            speech = self.speech[np.searchsorted(self.speech, self.begin) :]
            if not len(speech):
                self.begin = num_frames if self.is_last else max(self.begin, num_frames - self.limits.margin)
                return
            start = max(self.begin, int(speech[0]) - self.limits.margin)
            if not self.is_last and num_frames - start < self.limits.longest + LONG_PAUSE:
                self.begin = start
                return
            self.begin = self._end(start, speech)
            yield start, self.begin

    def _end(self, start: int, speech: np.ndarray) -> int:
        """Where the piece from `start` on ends."""
        longest, shortest_pause, margin = self.limits
        limit, enough, num_frames = start + longest, start + int(MIN_SHARE * longest), len(self.level)
        best, best_length = None, 0
        for last, following in pairwise([*speech[: longest + 1].tolist(), num_frames + LONG_PAUSE]):
            pause, length = last + 1, following - last - 1
            if pause > limit:
                break
            if length >= shortest_pause:
                end = min(pause + min(margin, length // 2), limit, num_frames)
                if length >= LONG_PAUSE:
                    return end
                if pause < enough or length > best_length:
                    best, best_length = end, 0 if pause < enough else length
        if best is not None:
            return best
        around = np.convolve(np.pad(self.level, 2, mode="edge"), np.ones(5), mode="valid")
        earliest, latest = enough, min(limit, num_frames - (enough - start))
        return earliest + int(np.argmin(around[earliest:latest]))

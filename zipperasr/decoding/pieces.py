"""Pieces of audio decoded: batches of any languages together, with word times where there is an aligner.

F frames (100 Hz).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from zipperasr.alignment.words import Word
from zipperasr.decoding.generate import Hypothesis, Transcriber
from zipperasr.decoding.transcript import Segment
from zipperasr.decoding.worker import batches, max_tokens
from zipperasr.errors import UserError
from zipperasr.model.aligner import Aligner


@dataclass(eq=False)
class Piece:
    """A segment to be: its features [F, bins], float32."""

    lang: str
    start_s: float
    duration_s: float
    features: np.ndarray

    @property
    def num_frames(self) -> int:
        """F."""
        return len(self.features)


def decode(
    pieces: Iterable[Piece], transcriber: Transcriber, aligner: Aligner | None, *, longest_s: float
) -> Iterator[dict[Piece, Segment]]:
    """The segments of all pieces, batch by batch, the longest first; `longest_s` is what the encoder takes at once.

    Raises UserError when a batch does not fit the GPU's memory.
    """
    longest_first = sorted(pieces, key=lambda piece: -piece.num_frames)
    settings, prompt_tokens = transcriber.settings, transcriber.prompt_tokens({piece.lang for piece in longest_first})
    for some in batches(longest_first, settings, prompt_tokens=prompt_tokens):
        batch = sorted(some, key=lambda piece: piece.lang)  # adapters run once per run of a language
        langs, features = [piece.lang for piece in batch], [torch.from_numpy(piece.features) for piece in batch]
        try:
            speech, frames = transcriber.encode(features, langs, longest_s)
            found = transcriber(speech, langs, [max_tokens(piece, settings) for piece in batch])
        except torch.OutOfMemoryError as error:
            mend = f"lower decoding.max_tokens_per_batch={settings.max_tokens_per_batch}"
            raise UserError(f"{len(batch)} segments do not fit the GPU's memory; {mend}") from error
        texts, durations_s = [said.text for said in found], [piece.duration_s for piece in batch]
        heard = aligner(frames, langs, texts, durations_s) if aligner else []
        words = [one.words for one in heard] or [None] * len(batch)
        yield {piece: decoded(piece, *one) for piece, *one in zip(batch, found, words, strict=True)}


def decoded(piece: Piece, said: Hypothesis, words: Sequence[Word] | None) -> Segment:
    """The segment of a piece, from its hypothesis and its words, whose times count from the piece's beginning."""
    flags = (*said.flags, *["empty"] * (not said.text), *["unaligned"] * bool(said.text and words == []))
    found = segment(piece.start_s, piece.duration_s, said.text, round(said.logprob, 5), flags)
    if words is None:
        return found
    shifted = (
        replace(w, start_s=round(w.start_s + piece.start_s, 3), end_s=round(w.end_s + piece.start_s, 3)) for w in words
    )
    return replace(found, words=tuple(shifted))


def segment(start_s: float, duration_s: float, text: str, logprob: float | None = None, flags=()) -> Segment:
    """A segment with times in whole milliseconds."""
    return Segment(round(start_s, 3), round(start_s + duration_s, 3), text, logprob, flags)

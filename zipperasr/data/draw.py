"""Our own draw: the first utterances of an endless sequence that the seed, a set's name and its ids alone determine.

The sequence is all ids in the order of a keyed hash, again and again. So a draw does not depend on the order of the
manifest, on the platform or on a random number generator, the list of one hour begins the list of thirty, and a list
longer than its corpus repeats it.
"""

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_serializer, model_validator

from zipperasr.config import Settings
from zipperasr.errors import UserError

DIGEST_BYTES = 16
"""Of SHA-256's 32: two ids that agree in so many will not be met, and sorting by them is sorting by all."""
TOLERANCE_S = 1e-6


class Draw(Settings):
    """What a list takes: `hours` (None: everything, once). In YAML a bare number, or null, is the hours.

    `splits` names those that it is drawn from, of the set's corpus and language; None: the one of its own name.
    """

    hours: Annotated[float, Field(gt=0)] | None = None
    splits: Annotated[list[str], Field(min_length=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_hours(cls, value: Any) -> Any:
        return value if isinstance(value, dict | cls) else {"hours": value}

    @model_serializer
    def _to_hours(self) -> Any:
        return {"hours": self.hours, "splits": self.splits} if self.splits else self.hours

    def sets(self, name: str) -> list[str]:
        """The sets whose utterances the list `name` is drawn from."""
        corpus, lang, split = name.split("_", 2)
        return [f"{corpus}_{lang}_{one}" for one in self.splits or [split]]


@dataclass(frozen=True)
class Drawn:
    """Drawn ids, in order, with repeats; packed, since a Python object an utterance is too much for millions.

    `text` holds the ids of all candidates, one behind the other, number i from `ends[i]` to `ends[i + 1]`; `picked` has
    the numbers of those drawn.
    """

    text: bytearray
    ends: array
    picked: np.ndarray
    num_unique: int
    duration_s: float

    def __len__(self) -> int:
        return len(self.picked)

    def __iter__(self) -> Iterator[str]:
        return (self.text[self.ends[i] : self.ends[i + 1]].decode() for i in self.picked)


def draw(candidates: Iterable[tuple[str, float]], *, seed: int, name: str, hours: float | None) -> Drawn:
    """The first utterances of the sequence of set `name` that together last at least `hours`; all, once, for None.

    `candidates` are ids with their seconds; an id that comes again is the same utterance. In memory are about 150 bytes
    a candidate. Raises UserError where there is no candidate, or none that lasts.
    """
    text, ends, digests, seconds = bytearray(), array("q", [0]), bytearray(), array("d")
    for utt_id, duration_s in candidates:
        text += utt_id.encode()
        ends.append(len(text))
        digests += hashlib.sha256(f"{seed} {name} {utt_id}".encode()).digest()[:DIGEST_BYTES]
        seconds.append(duration_s)
    _, cycle = np.unique(np.frombuffer(digests, f"S{DIGEST_BYTES}"), return_index=True)
    if not len(cycle):
        mend = "take it out of the setting, or let it draw from more splits"
        raise UserError(f"{name}: no utterance is left to draw from; {mend}")
    cycle_s = np.frombuffer(seconds)[cycle]
    count = len(cycle) if hours is None else _count(cycle_s, name=name, hours=hours)
    duration_s = float(np.resize(cycle_s, count).sum())
    return Drawn(text, ends, np.resize(cycle, count), min(count, len(cycle)), duration_s)


def _count(cycle_s: np.ndarray, *, name: str, hours: float) -> int:
    """How many utterances last `hours`, going round and round."""
    if cycle_s.sum() <= 0:
        raise UserError(f"{name}: its utterances last 0 s, so no list of {hours} h can be drawn; run stage 1 again")
    count, left_s = 0, hours * 3600
    while left_s > TOLERANCE_S:
        left = np.subtract.accumulate(np.concatenate(([left_s], cycle_s)))  # after 0, 1, 2, ... utterances
        taken = int(np.argmax(left <= TOLERANCE_S)) or len(cycle_s)
        count, left_s = count + taken, left[taken]
    return count

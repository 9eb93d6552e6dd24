"""CTC posteriors and texts: where each token is said, the loss, and the best text. Three engines behind one seam.

`torch` is always there, `k2` and `torchaudio` where they can be imported (engines.py); on the same posteriors all find
the same path, but for the rounding of paths that are equally good.
Legend: N utterances, T frames, V units with the blank among them, S tokens of an utterance.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zipperasr.alignment.engines import available, choose

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Alignment", "available", "choose", "ctc_loss", "forced_align", "greedy", "min_frames", "n_best"]


@dataclass(frozen=True)
class Alignment:
    """The best path of an utterance: in each frame a unit [T] and its posterior [T]; and the frames of each token.

    `spans` are S pairs (first frame, frame behind the last). Between two tokens there may be blanks.
    """

    path: list[int]
    posteriors: Tensor
    spans: list[tuple[int, int]]


def forced_align(
    log_probs: Sequence[Tensor], targets: Sequence[Sequence[int]], *, blank: int = 0, engine: str | None = None
) -> list[Alignment | None]:
    """The most probable path of each utterance that reads as its targets; None where the frames are too few for it.

    log_probs: [T, V] of each utterance; targets: S tokens each, without blanks. Raises UserError as `choose`.
    """
    found: list[Alignment | None] = [None] * len(log_probs)
    fitting = [i for i, ids in enumerate(targets) if len(log_probs[i]) >= max(min_frames(ids), 1)]
    some = [log_probs[i].detach().float() for i in fitting]
    paths = choose(engine, "align").paths(some, [list(targets[i]) for i in fitting], blank) if fitting else []
    for i, scores, path in zip(fitting, some, paths, strict=True):
        posteriors = scores.gather(1, path[:, None].to(scores.device))[:, 0].exp().cpu()
        found[i] = Alignment(path.tolist(), posteriors, list(_spans(path.tolist(), blank)))
    return found


def ctc_loss(
    log_probs: Sequence[Tensor], targets: Sequence[Sequence[int]], *, blank: int = 0, engine: str | None = None
) -> Tensor:
    """[N]: minus the log-probability of all paths [T, V] that read as an utterance's targets; inf if there is none."""
    return choose(engine, "loss").losses(log_probs, targets, blank)


def greedy(log_probs: Tensor, *, blank: int = 0) -> list[int]:
    """The tokens of the path [T, V] with the most probable unit in every frame."""
    return [unit for unit in log_probs.argmax(-1).unique_consecutive().tolist() if unit != blank]


def n_best(log_probs: Tensor, num: int, *, blank: int = 0, engine: str | None = None) -> list[tuple[list[int], float]]:
    """At most `num` texts of an utterance [T, V], the most probable first, each with its log-probability.

    That is summed over all paths; k2 draws the texts from a lattice, torch searches with a beam of prefixes.
    """
    texts = [ids for ids in choose(engine, "texts").texts(log_probs, num, blank) if min_frames(ids) <= len(log_probs)]
    scores = -ctc_loss([log_probs] * len(texts), texts, blank=blank, engine=engine)
    ranked = sorted(zip(texts, scores.tolist(), strict=True), key=lambda one: -one[1])
    return ranked[:num]


def min_frames(targets: Sequence[int]) -> int:
    """The frames of the shortest path: one a token, and a blank between two that are alike."""
    return len(targets) + sum(a == b for a, b in itertools.pairwise(targets))


def _spans(path: list[int], blank: int):
    at = 0
    for unit, run in itertools.groupby(path):
        start, at = at, at + sum(1 for _ in run)
        if unit != blank:
            yield start, at

"""Prefix beam search: texts of CTC posteriors, summed over their paths while searching. T frames, V units."""

import math
from collections import defaultdict

import numpy as np
from torch import Tensor


def prefixes(log_probs: Tensor, width: int, blank: int, beam_nats: float) -> list[list[int]]:
    """The texts that are left of a beam of `width` at the end of the frames [T, V], likely ones first.

    A unit that is `beam_nats` less likely than its frame's best is not tried.
    """
    beam = {(): (0.0, -math.inf)}  # log-probability of the paths that end in a blank, and in the last token
    for frame in log_probs.double().cpu().numpy():
        best_units, least = np.argsort(-frame)[: width + 1].tolist(), frame.max() - beam_nats
        likely = [unit for unit in best_units if unit != blank and frame[unit] > least]
        longer: dict[tuple[int, ...], list[float]] = defaultdict(lambda: [-math.inf, -math.inf])
        for text, (in_blank, in_token) in beam.items():
            both = np.logaddexp(in_blank, in_token)
            _add(longer[text], 0, both + frame[blank])
            if text:
                _add(longer[text], 1, in_token + frame[text[-1]])
            for unit in likely:
                _add(longer[(*text, unit)], 1, (in_blank if text[-1:] == (unit,) else both) + frame[unit])
        best = sorted(longer, key=lambda text: -np.logaddexp(*longer[text]))[:width]
        beam = {text: tuple(longer[text]) for text in best}
    return [list(text) for text in beam]


def _add(scores: list[float], at: int, score: float) -> None:
    scores[at] = np.logaddexp(scores[at], score)

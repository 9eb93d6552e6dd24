"""Confidence intervals and significance by resampling utterances (Bisani & Ney, doi:10.1109/ICASSP.2004.1326009).

Whole utterances are drawn, with replacement: errors within one hang together, those of different ones hardly do.
"""

import zlib
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np

BLOCK = 1_000_000  # utterances drawn at once, which bounds the memory
Value = TypeVar("Value", float, np.ndarray)


def seed_of(name: str) -> int:
    """A seed for a set: two systems draw the same of its utterances, and two sets draw independently."""
    return zlib.crc32(name.encode())


def distribution(errors: Sequence[int], lengths: Sequence[int], *, num: int = 1000, seed: int = 0) -> np.ndarray:
    """Error rates in percent over `num` resamples of a set's utterances; nan for one without any reference unit.

    `errors` and `lengths` (of the references) are those of each utterance. The same seed draws the same utterances:
    the difference of two systems' distributions is the distribution of their difference.
    """
    errors, lengths = np.asarray(errors), np.asarray(lengths)
    draw, size = np.random.default_rng(seed), len(errors)
    rates, block = np.empty(num), max(1, BLOCK // size)
    for start in range(0, num, block):
        drawn = draw.integers(size, size=(min(block, num - start), size))
        with np.errstate(divide="ignore", invalid="ignore"):
            rates[start : start + block] = 100 * errors[drawn].sum(axis=1) / lengths[drawn].sum(axis=1)
    return np.where(np.isfinite(rates), rates, np.nan)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The central 95% of a distribution, by its percentiles."""
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def p_value(difference: float, values: np.ndarray) -> float:
    """The two-sided p of a difference of which `values` is the distribution.

    It is the share of resamples that are as far from the difference as the difference is from 0; the observed one
    counts among them, so that p is never 0.
    """
    is_as_far = np.abs(values - difference) >= abs(difference) - 1e-9
    return float(1 + is_as_far.sum()) / (1 + len(values))


def macro(values: Iterable[tuple[str, Value]]) -> Value:
    """The mean over languages of the mean over each one's sets; `values` are (language, rate or distribution) pairs."""
    by_language: dict[str, list[Value]] = {}
    for lang, value in values:
        by_language.setdefault(lang, []).append(value)
    means = [sum(group) / len(group) for group in by_language.values()]
    return sum(means) / len(means)

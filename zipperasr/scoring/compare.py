"""Two systems on the same references: how their error rates differ, whether by chance, and in which utterances."""

import dataclasses
import heapq
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from zipperasr.errors import UserError
from zipperasr.scoring import bootstrap
from zipperasr.scoring.directory import signature
from zipperasr.scoring.score import Aligned, Counts, Decoded, read, score, some

NUM = 10_000  # resamples: p has a standard error of 0.002 where it is 0.05
LEVELS = {0.001: "***", 0.01: "**", 0.05: "*"}


@dataclasses.dataclass(frozen=True)
class Pair:
    """A set as two systems transcribed it: its utterances in the same order, and what else differs between the two."""

    set: str
    lang: str
    metric: str
    a: list[Aligned]
    b: list[Aligned]
    warnings: list[str]

    @property
    def rates(self) -> list[float]:
        """The error rates of A and B in percent."""
        return [sum((u.counts for u in side), Counts()).error_rate for side in (self.a, self.b)]

    @property
    def gained(self) -> list[int]:
        """By utterance, how many errors more B has than A."""
        return [b.counts.errors - a.counts.errors for a, b in zip(self.a, self.b)]

    def differences(self) -> np.ndarray:
        """B's error rate minus A's in percent points, over resamples of the utterances."""
        by_id = sorted(zip((u.id for u in self.a), self.gained, (u.counts.ref_len for u in self.a)))
        _, gained, lengths = zip(*by_id)
        return bootstrap.distribution(gained, lengths, num=NUM, seed=bootstrap.seed_of(self.set))


@dataclasses.dataclass(frozen=True)
class Row:
    """B against A in one language, or over several: rates and difference in percent, numbers of utterances.

    `p` is two-sided and of this row alone: of twenty rows one has p < 0.05 by chance.
    """

    name: str
    rates: list[float]
    interval: tuple[float, float]
    p: float
    num_better: int
    num_worse: int
    num_equal: int

    @property
    def difference(self) -> float:
        """B's rate minus A's."""
        return self.rates[1] - self.rates[0]

    @property
    def verdict(self) -> str:
        """Which system is better, with a star for p < 0.05, two for 0.01, three for 0.001."""
        stars = next((stars for level, stars in LEVELS.items() if self.p < level), "")
        return f"{'B' if self.difference < 0 else 'A'} better {stars}" if stars else "not significant"


def pair_directories(a: Path, b: Path) -> tuple[list[tuple[Path, Path]], list[Path]]:
    """The decode directories to compare (`a` and `b` themselves, or those in the two runs), and those of one run alone.

    Raises UserError where there are none, naming what is there.
    """
    if all((side / "ref").exists() or side.name.startswith("decode_") for side in (a, b)):
        return [(a, b)], []
    sets = [{path.name for path in side.glob("decode_*")} for side in (a, b)]
    for side, names in zip((a, b), sets):
        if not names:
            raise UserError(f"{side}: no decode_<set> here; give two runs, or two decode directories of one set")
    if not (both := sorted(sets[0] & sets[1])):
        raise UserError(f"no set in common: {a} has {some(sorted(sets[0]))}, {b} has {some(sorted(sets[1]))}")
    alone = [side / name for side, names in zip((a, b), sets) for name in sorted(names.difference(both))]
    return [(a / name, b / name) for name in both], alone


def pair(a: Path, b: Path, *, profile: str, lang: str | None = None) -> Pair:
    """Two decode directories aligned with their common references.

    Raises UserError naming the utterances whose references differ, for a set without any reference, and as
    `score.read`.
    """
    decoded = read(a, lang=lang), read(b, lang=lang)
    if decoded[0].language != decoded[1].language:
        raise UserError(
            f"{a} is {decoded[0].language.name}, but {b} is {decoded[1].language.name}; compare one language"
        )
    aligned = [{u.id: u for u in score(side.refs, side.hyps, side.language, profile)} for side in decoded]
    refs = [{utt_id: u.ref for utt_id, u in side.items()} for side in aligned]
    if other := [i for i in refs[0] | refs[1] if i not in refs[0] or i not in refs[1] or refs[0][i] != refs[1][i]]:
        raise UserError(f"{a} and {b}: {len(other)} references differ: {some(other)}; compare what is of one list")
    if not any(refs[0].values()):
        raise UserError(f"{a}: every reference is empty, so there is no error rate to compare")
    sides = [[side[utt_id] for utt_id in refs[0]] for side in aligned]
    language = decoded[0].language
    return Pair(decoded[0].set, language.code, language.metric, *sides, _warnings(decoded, sides, profile))


def compare(pairs: Sequence[Pair]) -> list[Row]:
    """A row for each language (the mean of its sets), then, if there are several, one of the mean over languages."""
    drawn = [(pair, pair.differences()) for pair in pairs]
    langs = sorted({pair.lang for pair in pairs})
    rows = [_row(lang, [one for one in drawn if one[0].lang == lang]) for lang in langs]
    return rows + ([_row(f"macro ({len(langs)})", drawn)] if len(langs) > 1 else [])


def changed(pairs: Sequence[Pair], num: int) -> list[tuple[Pair, Aligned, Aligned]]:
    """The utterances with the largest change in their number of errors, at most `num`."""
    all_of_them = [(pair, a, b) for pair in pairs for a, b, more in zip(pair.a, pair.b, pair.gained) if more]
    return heapq.nlargest(num, all_of_them, key=lambda one: abs(one[2].counts.errors - one[1].counts.errors))


def _row(name: str, drawn: Sequence[tuple[Pair, np.ndarray]]) -> Row:
    rates = [bootstrap.macro((pair.lang, pair.rates[side]) for pair, _ in drawn) for side in (0, 1)]
    values = bootstrap.macro((pair.lang, differences) for pair, differences in drawn)
    gained = np.concatenate([pair.gained for pair, _ in drawn])
    numbers = (int((sign == np.sign(gained)).sum()) for sign in (-1, 1, 0))
    return Row(name, rates, bootstrap.interval(values), bootstrap.p_value(rates[1] - rates[0], values), *numbers)


def _warnings(decoded: Sequence[Decoded], sides: Sequence[list[Aligned]], profile: str) -> list[str]:
    parts = [signature(one, profile, side).split("|") for one, side in zip(decoded, sides)]
    found = []
    if parts[0] != parts[1]:
        alone = [" ".join(p for p in parts[i] if p not in parts[1 - i]) or "nothing" for i in (0, 1)]
        found.append(f"signatures differ: {alone[0]} in A, {alone[1]} in B")
    missing = [sum(u.hyp is None for u in side) for side in sides]
    if any(missing):
        found.append("utterances without hypothesis, counted as deleted: {} in A, {} in B".format(*missing))
    return found

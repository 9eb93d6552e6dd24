"""Which utterances each rank trains on at each step: rows packed within one language, dealt evenly to the ranks.

A *row* is a sequence of at most `max_tokens_per_row` LLM tokens holding several utterances of one language, a
*micro-batch* is the rows of one forward pass on one rank, and a *step* is one optimizer step over `num_slots`
micro-batches: the number of ranks times the micro-batches that each rank accumulates.

Everything here is a pure function of the utterances, the seed, the epoch and the step. So every rank and every loader
worker computes the same plan without talking to the others, and a resumed run continues at exactly the next utterance.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate, chain, compress, count, islice
from operator import methodcaller, not_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from zipperasr import prompts
from zipperasr.config import Settings
from zipperasr.data.features import FeatureSettings
from zipperasr.data.tokenizer import BatchTokenizer, Targets
from zipperasr.data.utterances import Utterance, load_utterances
from zipperasr.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

MORE_CHARS = 20
"""Characters that any utterance may have beyond `max_chars_per_s`, as the ends of short ones are cut off."""
MAX_OPEN_ROWS = 32
"""First-fit looks at this many unfilled rows, so that packing stays linear in the number of utterances."""


class RowsPerBatch(Settings):
    """Rows of one micro-batch on one GPU, by the encoder's context (section V-A, arXiv:2603.17558).

    `auto` is as many as fit into memory when a run begins: quick, but what is learnt then depends on the GPU.
    """

    full: PositiveInt | Literal["auto"] = 10
    chunked: PositiveInt | Literal["auto"] = 16


class PackingSettings(Settings):
    """How utterances share rows. `skip_too_long` leaves out utterances over the row length, counted and logged."""

    max_tokens_per_row: PositiveInt = 2048
    rows_per_batch: RowsPerBatch = RowsPerBatch()
    skip_too_long: bool = False
    max_chars_per_s: PositiveFloat = 50
    """An utterance whose text has more than these and MORE_CHARS is not what its audio says, and is left out, counted
    and logged: quick speech has 25."""
    lookahead: NonNegativeInt = 0
    """Of so many utterances that are to come, the one that fills a row best is taken to end it. Rows of a few long
    utterances need it: with 64, those of 10 to 20 s fill 98% of 2048 tokens. 0 is first-fit."""


class SamplingSettings(Settings):
    """How often each language is trained on. By default each as often as there is data of it, which is the paper's way.

    An epoch has as many rows as there are, whatever the shares: of one language some rows come several times in it,
    of another not all.
    """

    temperature: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """A language of n rows gets a share in proportion to n^(1 / temperature): 1 is natural, 1000 nearly even."""
    weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = None
    """Shares of the rows by language, in any unit, in place of a temperature; every language must be named."""

    @model_validator(mode="after")
    def _only_one(self) -> SamplingSettings:
        if self.weights is not None and self.temperature != 1:
            raise ValueError("temperature and weights exclude each other; leave one of them out")
        return self

    @property
    def is_natural(self) -> bool:
        """Whether every row comes exactly once an epoch."""
        return self.weights is None and self.temperature == 1

    def quotas(self, num_rows: Mapping[str, int]) -> dict[str, int]:
        """The rows of an epoch by language, as many in all as there are: largest remainders, at least one each.

        Raises UserError naming the languages that have no weight, and those that have one but no data.
        """
        langs, total = sorted(num_rows), sum(num_rows.values())
        weights = self.weights
        if weights is None:
            weights = {lang: num_rows[lang] ** (1 / self.temperature) for lang in langs}
        if lacking := ", ".join(sorted(num_rows.keys() - weights.keys())):
            raise UserError(f"sampling.weights: none for {lacking}, which the training data has; add one for each")
        if unknown := ", ".join(sorted(weights.keys() - num_rows.keys())):
            raise UserError(f"sampling.weights: no training data for {unknown}; take out what is not trained on")
        exact = {lang: total * weights[lang] / sum(weights.values()) for lang in langs}
        quotas = {lang: int(exact[lang]) for lang in langs}
        for lang in sorted(langs, key=lambda lang: quotas[lang] - exact[lang])[: total - sum(quotas.values())]:
            quotas[lang] += 1
        for lang in langs:
            if not quotas[lang]:
                quotas[max(langs, key=quotas.__getitem__)] -= 1
                quotas[lang] = 1
        return quotas


NATURAL = SamplingSettings()


def num_speech_tokens(num_frames: int) -> int:
    """LLM positions of `num_frames` log-mel frames (100 Hz): halved by Whisper, quartered by the projector."""
    return ((num_frames + 1) // 2 + 3) // 4


@dataclass(slots=True, eq=False)
class Example:
    """An utterance with its token ids around the speech: the prompt that its language shares, and the target [S]."""

    utterance: Utterance
    prompt: list[int]
    target: np.ndarray
    num_tokens: int = field(init=False)
    """Length in a packed row: prompt, speech, transcript and end of text."""

    def __post_init__(self) -> None:
        self.num_tokens = len(self.prompt) + num_speech_tokens(self.utterance.num_frames) + len(self.target)


@dataclass
class Batch:
    """One micro-batch. Utterances are sorted by language: each language is one contiguous run.

    `features` holds [F_u, bins] per utterance, `targets` end with end-of-text; `ctc_targets` are empty without CTC.
    A batch without utterances is a filler, for a rank that has no row left in the last step of an epoch.
    """

    ids: list[str]
    langs: list[str]
    features: list[Tensor]
    prompts: list[list[int]]
    targets: list[list[int]]
    ctc_targets: list[list[int]] = field(default_factory=list)

    @property
    def num_target_tokens(self) -> int:
        """Tokens that the loss covers."""
        return sum(map(len, self.targets))

    @property
    def num_tokens(self) -> int:
        """LLM positions: prompts, speech and targets."""
        speech = sum(num_speech_tokens(len(x)) for x in self.features)
        return sum(map(len, self.prompts)) + speech + self.num_target_tokens

    @property
    def audio_s(self) -> float:
        """Seconds of speech."""
        return sum(map(len, self.features)) / 100

    def to(self, device: torch.device) -> Batch:
        """The same batch with its features on `device`, moved as one tensor."""
        if all(x.device == device for x in self.features):
            return self
        return self._with_features(lambda flat: flat.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in memory that a GPU can copy from by itself; the loader asks for it."""
        return self._with_features(lambda flat: flat.pin_memory())

    def _with_features(self, change: Callable[[Tensor], Tensor]) -> Batch:
        flat, lengths = _join(self.features)
        return dataclasses.replace(self, features=_split(change(flat), lengths))

    def __getstate__(self) -> dict:
        """One feature tensor crosses from a loader worker, not one (and one open file) an utterance."""
        return {**self.__dict__, "features": _join(self.features)}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, features=_split(*state["features"]))


def _join(features: list[Tensor]) -> tuple[Tensor, list[int]]:
    import torch

    return torch.cat(features) if features else torch.empty(0, 0), [len(x) for x in features]  # [sum F, bins]


def _split(flat: Tensor, lengths: list[int]) -> list[Tensor]:
    return list(flat.split(lengths)) if lengths else []


def make_batch(
    rows: Sequence[Sequence[Example]],
    features: Callable[[Utterance], Tensor] = methodcaller("features"),
    *,
    ctc_targets: Callable[[Utterance], list[int]] | None = None,
) -> Batch:
    """The micro-batch of some packed rows (each of one language), with the features that are read or computed."""
    examples = list(chain.from_iterable(sorted(rows, key=lambda row: row[0].utterance.lang)))
    return Batch(
        ids=[x.utterance.id for x in examples],
        langs=[x.utterance.lang for x in examples],
        features=[features(x.utterance) for x in examples],
        prompts=[x.prompt for x in examples],
        targets=[x.target.tolist() for x in examples],
        ctc_targets=[ctc_targets(x.utterance) for x in examples] if ctc_targets else [],
    )


def load_examples(
    data_dir: Path | str,
    setting: str,
    part: str,
    *,
    tokenizer: BatchTokenizer,
    features: FeatureSettings,
    packing: PackingSettings,
) -> list[Example]:
    """The utterances of a setting's lists (see load_utterances), tokenised while they are being read."""
    with _millions_of_objects(), Targets(tokenizer) as targets:
        utterances = load_utterances(data_dir, setting, part, None, features, on_text=targets.add)
        return _examples(utterances, targets, tokenizer, packing)


def tokenize(utterances: Sequence[Utterance], tokenizer: BatchTokenizer, settings: PackingSettings) -> list[Example]:
    """Each utterance with its prompt and target ids.

    Raises UserError naming the utterances longer than a row, unless the settings say to leave them out with a warning.
    """
    with Targets(tokenizer) as targets:
        for utterance in utterances:
            targets.add(utterance.text)
        return _examples(utterances, targets, tokenizer, settings)


def _examples(
    utterances: Sequence[Utterance], targets: Targets, tokenizer: BatchTokenizer, settings: PackingSettings
) -> list[Example]:
    limit, ids = settings.max_tokens_per_row, targets.by_text()
    is_spoken = [len(u.text) <= MORE_CHARS + settings.max_chars_per_s * u.num_frames / 100 for u in utterances]
    if num_unspoken := is_spoken.count(False):
        named = ", ".join(u.id for u in islice(compress(utterances, map(not_, is_spoken)), 5))
        why = f"their texts are longer than their audio can be (data.packing.max_chars_per_s): {named}"
        logging.warning("%d of %d utterances left out: %s", num_unspoken, len(utterances), why)
        utterances = list(compress(utterances, is_spoken))
    prompt = {lang: prompts.prompt_ids(tokenizer, lang) for lang in sorted({u.lang for u in utterances})}
    examples = [Example(u, prompt[u.lang], ids[u.text]) for u in utterances]
    too_long = [x for x in examples if x.num_tokens > limit]
    if too_long and not settings.skip_too_long:
        named = ", ".join(f"{x.utterance.id} ({x.num_tokens})" for x in too_long[:5])
        raise UserError(
            f"{len(too_long)} utterances exceed data.packing.max_tokens_per_row={limit}: {named}"
            f"{' ...' if len(too_long) > 5 else ''}; raise it, or set data.packing.skip_too_long=true to leave them out"
        )
    for example in too_long:
        logging.warning("utterance %s left out: %d tokens exceed %d", example.utterance.id, example.num_tokens, limit)
    if too_long:
        logging.warning("%d of %d utterances left out: longer than a row", len(too_long), len(examples))
    return [x for x in examples if x.num_tokens <= limit] if too_long else examples


@contextlib.contextmanager
def _millions_of_objects() -> Iterator[None]:
    """Objects made in the block are no garbage: it is not looked for among them, now or later."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


def pack(examples: Sequence[Example], *, max_tokens: int, seed: int, lookahead: int = 0) -> list[list[int]]:
    """Rows of indices into `examples` in a seeded order, each within one language: first-fit, or with `lookahead`."""
    lengths, langs = [x.num_tokens for x in examples], [x.utterance.lang for x in examples]
    shuffled = list(range(len(examples)))
    random.Random(f"pack {seed}").shuffle(shuffled)
    if not lookahead:
        return _pack_first_fit(shuffled, lengths, langs, max_tokens)
    by_lang: dict[str, list[int]] = {}
    for index in shuffled:
        by_lang.setdefault(langs[index], []).append(index)
    return [row for order in by_lang.values() for row in _pack_ahead(order, lengths, max_tokens, lookahead)]


def _pack_ahead(order: list[int], lengths: list[int], max_tokens: int, lookahead: int) -> Iterator[list[int]]:
    """Rows of one language: the next utterance goes into a row while any would have room, then the longest that has."""
    coming, longest = iter(order), max(lengths[index] for index in order)
    pool = list(islice(coming, lookahead))
    while pool:
        row, free = [], max_tokens
        while pool and (at := 0 if free >= longest else _longest(pool, lengths, free)) is not None:
            row.append(pool.pop(at))
            free -= lengths[row[-1]]
            pool += islice(coming, 1)
        yield row


def _longest(pool: list[int], lengths: list[int], free: int) -> int | None:
    """Where the longest is that has room, the first of several; None without one."""
    longest, where = 0, None
    for at, index in enumerate(pool):
        if longest < lengths[index] <= free:
            longest, where = lengths[index], at
    return where


def _pack_first_fit(order: list[int], lengths: list[int], langs: list[str], max_tokens: int) -> list[list[int]]:
    rows: list[list[int]] = []
    unfilled: dict[str, list[tuple[int, int]]] = {}  # language -> (free tokens, row) of its open rows, oldest first
    for index in order:
        length, open_rows = lengths[index], unfilled.setdefault(langs[index], [])
        at = next((i for i, (free, _) in enumerate(open_rows) if free >= length), None)
        if at is None:
            rows.append([])
            del open_rows[: len(open_rows) - MAX_OPEN_ROWS + 1]
            at = len(open_rows)
            open_rows.append((max_tokens, len(rows) - 1))
        free, row = open_rows[at]
        rows[row].append(index)
        open_rows[at] = (free - length, row)
    return rows


@dataclass(frozen=True)
class Plan:
    """What is trained on at each step of each epoch: with natural sampling, every utterance exactly once an epoch.

    Utterances are packed into rows once; each epoch shuffles the rows over all languages, cuts them into steps of
    `rows_per_batch` * `num_slots` rows, and deals a step's rows to the slots in turn, so that the last, partial step is
    spread evenly. One slot of 2 n rows and two slots of n rows therefore train on the same rows at each step.

    With other sampling the epochs of a language take their quotas of rows, one after another, from an endless sequence
    of shuffled passes over its rows: none comes again, at whatever step, before all others have come as often.
    """

    rows: list[list[int]]
    rows_per_batch: int
    num_slots: int
    seed: int
    langs: Sequence[str] = ()
    """Of each row; natural sampling needs none."""
    sampling: SamplingSettings = NATURAL

    def __post_init__(self) -> None:
        assert len(self.langs) == len(self.rows) or (self.sampling.is_natural and not self.langs)
        _ = self.quotas  # raises UserError before anything is trained

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, the same on every rank."""
        return -(-len(self.rows) // (self.rows_per_batch * self.num_slots))

    @cached_property
    def quotas(self) -> dict[str, int]:
        """Rows of an epoch by language."""
        return self._num_rows if self.sampling.is_natural else self.sampling.quotas(self._num_rows)

    @property
    def passes_per_epoch(self) -> dict[str, float]:
        """How often the data of each language is gone through in an epoch."""
        return {lang: quota / self._num_rows[lang] for lang, quota in self.quotas.items()}

    def order(self, epoch: int) -> list[int]:
        """The rows in the order of an epoch."""
        if self.sampling.is_natural:
            return _shuffled(len(self.rows), f"epoch {self.seed} {epoch}")
        counts = tuple((lang, self._num_rows[lang], quota) for lang, quota in self.quotas.items())
        return list(map(self._by_lang.__getitem__, _sampled(counts, self.seed, epoch)))

    def slot_rows(self, step: int, slot: int) -> list[list[int]]:
        """The rows of a micro-batch; none for a filler. `step` counts from 0 over all epochs."""
        epoch, at = divmod(step, self.steps_per_epoch)
        size = self.rows_per_batch * self.num_slots
        return [self.rows[row] for row in self.order(epoch)[at * size : (at + 1) * size][slot :: self.num_slots]]

    @cached_property
    def _num_rows(self) -> dict[str, int]:
        return dict(sorted(Counter(self.langs).items()))

    @cached_property
    def _by_lang(self) -> list[int]:
        """The rows in the order of their languages."""
        return sorted(range(len(self.rows)), key=self.langs.__getitem__)


@lru_cache(maxsize=2)
def _shuffled(count: int, seed: str) -> list[int]:
    return _shuffle(range(count), seed)


@lru_cache(maxsize=2)
def _sampled(counts: tuple[tuple[str, int, int], ...], seed: int, epoch: int) -> list[int]:
    """The order of an epoch by (language, number of its rows, quota); rows are numbered in the order of languages.

    What is shuffled is whose turn it is, so that the rows of a language keep the order of its passes.
    """
    starts = accumulate((num_rows for _, num_rows, _ in counts), initial=0)
    rows = [
        _from_passes(range(start, start + num_rows), quota, f"pass {seed} {lang}", epoch)
        for start, (lang, num_rows, quota) in zip(starts, counts, strict=False)
    ]
    turns = chain.from_iterable([i] * quota for i, (_, _, quota) in enumerate(counts))
    return [next(rows[turn]) for turn in _shuffle(turns, f"epoch {seed} {epoch}")]


def _from_passes(rows: range, quota: int, seed: str, epoch: int) -> Iterator[int]:
    """What an epoch takes, after those before it, of the endless shuffled passes over the rows of a language."""
    first, skip = divmod(epoch * quota, len(rows))
    passes = chain.from_iterable(_shuffle(rows, f"{seed} {number}") for number in count(first))
    return islice(passes, skip, skip + quota)


def _shuffle(items: Iterable[int], seed: str) -> list[int]:
    order = list(items)
    random.Random(seed).shuffle(order)
    return order

"""Which utterances each rank trains on at each step: rows packed within one language, dealt evenly to the ranks.

A *row* is a sequence of at most `max_tokens_per_row` LLM tokens holding several utterances of one language, a
*micro-batch* is the rows of one forward pass on one rank, and a *step* is one optimizer step over `num_slots`
micro-batches: the number of ranks times the micro-batches that each rank accumulates.

Everything here is a pure function of the utterances, the seed, the epoch and the step. So every rank and every loader
worker computes the same plan without talking to the others, and a resumed run continues at exactly the next utterance.
"""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from pydantic import PositiveInt

from zipperasr import prompts
from zipperasr.config import Settings
from zipperasr.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from zipperasr.data.utterances import Utterance

MAX_OPEN_ROWS = 32
"""First-fit looks at this many unfilled rows, so that packing stays linear in the number of utterances."""


class RowsPerBatch(Settings):
    """Rows of one micro-batch on one GPU, by the encoder's context (section V-A, arXiv:2603.17558)."""

    full: PositiveInt = 10
    chunked: PositiveInt = 16


class PackingSettings(Settings):
    """How utterances share rows. `skip_too_long` leaves out utterances over the row length, counted and logged."""

    max_tokens_per_row: PositiveInt = 2048
    rows_per_batch: RowsPerBatch = RowsPerBatch()
    skip_too_long: bool = False


def num_speech_tokens(num_frames: int) -> int:
    """LLM positions of `num_frames` log-mel frames (100 Hz): halved by Whisper, quartered by the projector."""
    return ((num_frames + 1) // 2 + 3) // 4


@dataclass(frozen=True)
class Example:
    """An utterance with its token ids around the speech."""

    utterance: Utterance
    prompt: list[int]
    target: list[int]

    @property
    def num_tokens(self) -> int:
        """Length in a packed row: prompt, speech, transcript and end of text."""
        return len(self.prompt) + num_speech_tokens(self.utterance.num_frames) + len(self.target)


@dataclass
class Batch:
    """One micro-batch. Utterances are sorted by language, then row: each language is one contiguous run.

    `features` holds [F_u, bins] per utterance, `targets` end with end-of-text, `rows` is each utterance's packed row.
    A batch without utterances is a filler, for a rank that has no row left in the last step of an epoch.
    """

    ids: list[str]
    langs: list[str]
    features: list[Tensor]
    prompts: list[list[int]]
    targets: list[list[int]]
    rows: list[int]
    num_rows: int

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
        flat, lengths = _join(self.features)
        return dataclasses.replace(self, features=_split(flat.to(device), lengths))

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


def make_batch(rows: Sequence[Sequence[Example]]) -> Batch:
    """The micro-batch of some packed rows (each of one language); reads or computes the features."""
    rows = sorted(rows, key=lambda row: row[0].utterance.lang)
    flat = [(number, example) for number, row in enumerate(rows) for example in row]
    return Batch(
        ids=[x.utterance.id for _, x in flat],
        langs=[x.utterance.lang for _, x in flat],
        features=[x.utterance.features() for _, x in flat],
        prompts=[x.prompt for _, x in flat],
        targets=[x.target for _, x in flat],
        rows=[number for number, _ in flat],
        num_rows=len(rows),
    )


def tokenize(utterances: Sequence[Utterance], tokenizer: prompts.Tokenizer, settings: PackingSettings) -> list[Example]:
    """Each utterance with its prompt and target ids, tokenised once.

    Raises UserError naming the utterances longer than a row, unless the settings say to leave them out with a warning.
    """
    limit = settings.max_tokens_per_row
    prompt = {lang: prompts.prompt_ids(tokenizer, lang) for lang in sorted({u.lang for u in utterances})}
    examples = [Example(u, prompt[u.lang], prompts.target_ids(tokenizer, u.text)) for u in utterances]
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
    return [x for x in examples if x.num_tokens <= limit]


def pack(examples: Sequence[Example], *, max_tokens: int, seed: int) -> list[list[int]]:
    """Rows of indices into `examples`, first-fit in a seeded order, each row within one language."""
    shuffled = list(range(len(examples)))
    random.Random(f"pack {seed}").shuffle(shuffled)
    rows: list[list[int]] = []
    unfilled: dict[str, list[tuple[int, int]]] = {}  # language -> (free tokens, row) of its open rows, oldest first
    for index in shuffled:
        example = examples[index]
        length, open_rows = example.num_tokens, unfilled.setdefault(example.utterance.lang, [])
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
    """What is trained on at each step of each epoch: every utterance exactly once an epoch.

    Utterances are packed into rows once; each epoch shuffles the rows over all languages, cuts them into steps of
    `rows_per_batch` * `num_slots` rows, and deals a step's rows to the slots in turn, so that the last, partial step is
    spread evenly. One slot of 2 n rows and two slots of n rows therefore train on the same rows at each step.
    """

    rows: list[list[int]]
    rows_per_batch: int
    num_slots: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, the same on every rank."""
        return -(-len(self.rows) // (self.rows_per_batch * self.num_slots))

    def order(self, epoch: int) -> list[int]:
        """The rows in the order of an epoch."""
        return _shuffled(len(self.rows), f"epoch {self.seed} {epoch}")

    def slot_rows(self, step: int, slot: int) -> list[list[int]]:
        """The rows of a micro-batch; none for a filler. `step` counts from 0 over all epochs."""
        epoch, at = divmod(step, self.steps_per_epoch)
        size = self.rows_per_batch * self.num_slots
        return [self.rows[row] for row in self.order(epoch)[at * size : (at + 1) * size][slot :: self.num_slots]]


@lru_cache(maxsize=2)
def _shuffled(count: int, seed: str) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order

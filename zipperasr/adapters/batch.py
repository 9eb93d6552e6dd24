"""Which tokens of a batch are of which language, told to the adapted layers explicitly.

This project's encoder hands `Runs` to its layers. A model that is not ours calls its layers with nothing but x: there,
`batch_languages` says the language of each row for the length of a `with` block. In both cases the languages are looked
up once per batch, not once per layer, and one that is missing or of another batch is an error.

Legend: T tokens of all utterances laid end to end, N rows, G distinct languages of a batch.
"""

import contextlib
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zipperasr.errors import UserError


@dataclass(frozen=True)
class Runs:
    """Contiguous runs of one language over a batch's tokens.

    langs: the distinct languages [G]; None stands for a batch without languages. runs: (index into `langs`, start,
    stop). is_real: bool [T], false where a token is padding; None where all are real.
    """

    langs: tuple[str | None, ...]
    runs: tuple[tuple[int, int, int], ...]
    num_tokens: int
    is_real: Tensor | None = None


def language_runs(langs: Sequence[str], lengths: Sequence[int], is_real: Tensor | None = None) -> Runs:
    """Runs over utterances of `langs` and of `lengths` tokens laid end to end; neighbours of one language share one.

    Rows sorted by language once per batch therefore cost one run a language. Raises ValueError for unlike lengths.
    """
    runs: list[tuple[int, int, int]] = []
    distinct = tuple(dict.fromkeys(langs))
    start = 0
    for lang, length in zip(langs, lengths, strict=True):
        at, stop = distinct.index(lang), start + length
        if runs and runs[-1][0] == at:
            runs[-1] = (at, runs[-1][1], stop)
        else:
            runs.append((at, start, stop))
        start = stop
    return Runs(distinct, tuple(runs), start, is_real)


@dataclass(frozen=True)
class _Rows:
    """The languages of a batch's rows, for layers of a model that is not ours."""

    langs: tuple[str, ...]
    beams: int
    is_real: Tensor | None
    in_backward: bool = False
    found: dict[tuple[int, ...], Runs] = field(default_factory=dict)  # by the shape of x without its width

    def runs(self, shape: tuple[int, ...]) -> Runs:
        if shape not in self.found:
            self.found[shape] = self._runs(shape)
        return self.found[shape]

    def _runs(self, shape: tuple[int, ...]) -> Runs:
        num_rows, per_row = shape[0] if shape else 1, shape[1:].numel() if len(shape) > 1 else 1
        repeats = {len(self.langs): 1, len(self.langs) * self.beams: self.beams}.get(num_rows)
        if repeats is None:
            beams = f" of {self.beams} beams" if self.beams > 1 else ""
            raise UserError(
                f"batch_languages names {len(self.langs)} rows{beams}, but an adapted layer got {num_rows}; "
                "name the language of every row of this batch (and beams=, if beam search repeats them)"
            )
        real = self.is_real
        if real is not None and repeats > 1:
            real = real.repeat_interleave(repeats, 0)
        if real is not None and real.shape != shape:
            raise UserError(f"batch_languages: is_real has shape {list(real.shape)}, the layer's rows {list(shape)}")
        langs = [lang for lang in self.langs for _ in range(repeats)]
        return language_runs(langs, [per_row] * num_rows, None if real is None else real.flatten())


_rows: ContextVar[_Rows | None] = ContextVar("rows", default=None)


def batch_languages(
    langs: Sequence[str], *, beams: int = 1, is_real: Tensor | None = None
) -> contextlib.AbstractContextManager[None]:
    """Within the block, row i of every batch that reaches an adapted layer is in `langs[i]`.

    beams: how many times a beam search repeats each row, as neighbours (layers then take N or N * beams rows).
    is_real: bool [N, T], false on padding; only FlyLoRA's load balancing asks.
    A layer outside any block, or with another number of rows, raises UserError. Under activation checkpointing, layers
    run again in the backward pass, perhaps after the block: give `checkpoint_contexts` to the checkpointing function.
    """
    return _Saying(_Rows(tuple(langs), beams, is_real))


def checkpoint_contexts() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """`context_fn` for torch.utils.checkpoint (use_reentrant=False): recomputation sees the forward pass's languages.

    With transformers: model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts}).
    """
    rows = _rows.get()
    again = rows and _Rows(rows.langs, rows.beams, rows.is_real, in_backward=True, found=rows.found)
    return contextlib.nullcontext(), _Saying(again)


@torch.compiler.disable
def current_runs(x: Tensor, layer: str) -> Runs:
    """The runs over x [N, ..., I] that the enclosing `batch_languages` says. Raises UserError without one."""
    rows = _rows.get()
    is_backward = torch._C._current_graph_task_id() != -1
    if rows is not None and rows.in_backward == is_backward:
        return rows.runs(x.shape[:-1])
    if is_backward:
        raise UserError(
            f"{layer} is recomputed in the backward pass, where the languages of its batch are not known; pass "
            "context_fn=zipperasr.adapters.checkpoint_contexts and use_reentrant=False to activation checkpointing"
        )
    raise UserError(
        f"{layer} depends on the language, and none was said; call the model within "
        "`with zipperasr.adapters.batch_languages([...]):`, a language for each row"
    )


def current_is_real(x: Tensor) -> Tensor | None:
    """Which tokens of x [N, ..., I] the enclosing `batch_languages` calls real [T]; None without one."""
    rows = _rows.get()
    return rows.runs(x.shape[:-1]).is_real if rows is not None and rows.is_real is not None else None


class _Saying(contextlib.AbstractContextManager[None]):
    """Says the languages of rows within a block, more than once if a kept graph has a second backward pass."""

    def __init__(self, rows: _Rows | None):
        self.rows = rows

    def __enter__(self) -> None:
        self.token = _rows.set(self.rows)

    def __exit__(self, *_: object) -> None:
        _rows.reset(self.token)


class Banks:
    """Whose bank each language uses: its own, or what `unseen` says for a language without one."""

    def __init__(self, langs: Sequence[str], others: dict[str, str | None]):
        """others: {language without a bank: the one whose bank it uses, or None for no bank}."""
        self._of = {**others, **{lang: lang for lang in langs}}
        self._langs = tuple(langs)

    def of(self, lang: str | None) -> str | None:
        """The language whose bank serves `lang`; None where it has none. Raises UserError for an unknown language."""
        if lang not in self._of:
            raise UserError(
                f"unknown language '{lang}': the adapters have {', '.join(self._langs) or 'no languages'}; use one of "
                "them, or train with it in the adapter's langs"
            )
        return self._of[lang]

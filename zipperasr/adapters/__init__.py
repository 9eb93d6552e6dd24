"""Low-rank adapters on frozen linear layers, one file per method and one line in REGISTRY each."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from zipperasr.config import Settings
from zipperasr.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from zipperasr.adapters.base import AdaptedLinear

REGISTRY = {
    "vanilla": "Vanilla",
    "zipper_soft": "ZipperSoft",
}  # method (also the name of its file here) -> class


class AdapterSettings(Settings):
    """How linear layers are adapted. Rank and alpha follow arXiv:2603.17558, section V-B."""

    method: str = "zipper_soft"
    rank: int = Field(32, gt=0)
    alpha: float = Field(64, gt=0)
    langs: tuple[str, ...] = ()  # languages with a bank of their own
    unseen: Literal["shared"] = "shared"  # what a language outside `langs` gets: the shared bank alone

    @field_validator("method")
    @classmethod
    def _is_known(cls, method: str) -> str:
        if method not in REGISTRY:
            raise ValueError(f"known methods: {', '.join(REGISTRY)}")
        return method


def method_class(method: str) -> type[AdaptedLinear]:
    """The layer class of a method."""
    return getattr(importlib.import_module(f"{__name__}.{method}"), REGISTRY[method])


def adapt(
    module: nn.Module, patterns: Iterable[str], settings: AdapterSettings, *, language_embeddings: Tensor | None = None
) -> int:
    """Replace every linear layer of `module` whose name ends in one of `patterns` by its adapted form.

    language_embeddings: [L, E], one row per language of `settings.langs`; only methods with a router read it.
    Returns the number of layers. Raises UserError when a pattern matches no layer.
    """
    cls, count = method_class(settings.method), 0
    for pattern in patterns:
        names = [name for name, _ in module.named_modules() if f".{name}".endswith(f".{pattern}")]
        if not names:
            raise UserError(f"no layer '{pattern}' in {type(module).__name__}: this architecture is not supported")
        for name in names:
            module.set_submodule(name, cls(module.get_submodule(name), settings, language_embeddings))
        count += len(names)
    return count


def language_runs(langs: Sequence[str], lengths: Sequence[int]) -> list[tuple[str, int, int]]:
    """Contiguous runs (lang, start, stop) of one language, for utterances of `lengths` laid end to end."""
    runs: list[tuple[str, int, int]] = []
    start = 0
    for lang, length in zip(langs, lengths, strict=True):
        stop = start + length
        if runs and runs[-1][0] == lang:
            runs[-1] = (lang, runs[-1][1], stop)
        else:
            runs.append((lang, start, stop))
        start = stop
    return runs

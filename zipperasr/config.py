"""Typed configuration: strict pydantic models filled from YAML and `key=value` overrides.

Each package owns the model of its own section (the only home of its defaults); this file only reads, merges and checks.
"""

import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from zipperasr import files
from zipperasr.errors import UserError


class Settings(BaseModel):
    """Base of every section: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


S = TypeVar("S", bound=Settings)


def load(path: Path | str, cls: type[S], *, overrides: Iterable[str] = (), section: str | None = None) -> S:
    """The settings in a YAML file, as an instance of `cls`.

    `overrides` are `a.b.c=value` strings, the value read as YAML. `section` takes one top-level key of the file
    (where it is not there: the defaults).
    A top-level `base: other.yaml` is read first, relative to the file, and this file's keys are laid over it.
    Raises UserError for a missing file, bad YAML, unknown keys (the known ones are listed) and wrong values.
    """
    tree = _read(Path(path))
    for override in overrides:
        _set(tree, override)
    return parse(tree.get(section) or {} if section else tree, cls, source=str(path))


def parse(tree: dict[str, Any], cls: type[S], *, source: str) -> S:
    """`tree` checked against `cls`; `source` is named in errors."""
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        raise UserError("; ".join(_explain(cls, source, item) for item in error.errors())) from error


def save(path: Path | str, settings: Settings) -> None:
    """Write every value of `settings`, defaults included, as YAML that `load` reads back."""
    with files.write(path) as stream:
        yaml.safe_dump(settings.model_dump(mode="json"), stream, sort_keys=False, allow_unicode=True)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError as error:
        near = sorted(str(p) for p in path.parent.glob("*.yaml"))
        raise UserError(f"{path}: no such configuration; there are {', '.join(near) or 'none beside it'}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds a {type(tree).__name__}, not `key: value` lines")
    base = tree.pop("base", None)
    return _merge(_read(path.parent / base), tree) if base else tree


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = dict(under)
    for key, value in over.items():
        is_tree = isinstance(value, dict) and isinstance(both.get(key), dict)
        both[key] = _merge(both[key], value) if is_tree else value
    return both


def _set(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"override '{override}': write key=value, as in training.stage2.lr=1e-4")
    *parents, last = key.split(".")
    for parent in parents:
        tree[parent] = dict(tree[parent]) if isinstance(tree.get(parent), dict) else {}  # a copy: YAML aliases share it
        tree = tree[parent]
    tree[last] = yaml.safe_load(value)


def _explain(cls: type[BaseModel], source: str, item: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] != "extra_forbidden":
        spans_fields = item["type"] == "value_error" and isinstance(item["input"], dict)  # the message names them
        got = "" if spans_fields else f" (got {item.get('input')!r})"
        return f"{source}: {where}: {item['msg'].removeprefix('Value error, ')}{got}"
    owner = _model_at(cls, item["loc"][:-1])
    known = ", ".join(sorted(owner.model_fields)) if owner else "none"
    return f"{source}: unknown key '{where}'; known here: {known}"


def _model_at(annotation: Any, loc: tuple) -> type[BaseModel] | None:
    """The settings class that the path `loc` leads to, through optional fields, dicts and lists."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if not loc:
            return annotation
        field = annotation.model_fields.get(str(loc[0]))
        return _model_at(field.annotation, loc[1:]) if field else None
    is_container = typing.get_origin(annotation) in (dict, list, tuple)
    for argument in typing.get_args(annotation):
        found = _model_at(argument, loc[1:] if is_container else loc)
        if found:
            return found
    return None

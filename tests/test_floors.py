"""Imports only point down the floors of the house."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import zipperasr
from zipperasr.cli.main import VERBS

ROOT = Path(zipperasr.__file__).parent
FLOORS = {
    "cli": 5,
    "reporting": 4,
    "bench": 4,
    "serving": 4,
    "training": 3,
    "decoding": 3,
    "model": 2,
    "data": 1,
    "adapters": 1,
    "scoring": 1,
    "alignment": 1,
    "errors": 0,
    "files": 0,
    "config": 0,
    "languages": 0,
    "markdown": 0,
    "prompts": 0,
}
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py") if path.relative_to(ROOT) != Path("__init__.py"))
HEAVY = ("torch", "lhotse", "transformers", "deepspeed", "matplotlib", "whisper")


def room_of(path: Path) -> str:
    """The package or floor-0 module that a file belongs to."""
    return path.with_suffix("").parts[0]


def imported(path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, also inside functions; relative imports stay in their own room."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def may_import(room: str, other: str) -> bool:
    """Whether `room` stands above `other`; the modules of the ground floor share it."""
    return room == other or FLOORS[other] < FLOORS[room] or FLOORS[other] == FLOORS[room] == 0


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_only_point_down(path):
    rooms = {name.split(".")[1] for name in imported(path) if name.startswith("zipperasr.")}
    assert not [other for other in rooms if not may_import(room_of(path), other)]


def test_every_module_stands_on_a_floor():
    assert {room_of(path) for path in MODULES} <= set(FLOORS)


def test_the_rule_forbids_what_it_should():
    assert may_import("model", "data") and may_import("config", "files")
    assert not may_import("data", "adapters") and not may_import("scoring", "model")
    assert not may_import("training", "decoding") and not may_import("files", "data")


def test_scoring_never_imports_torch():
    names = {name.split(".")[0] for path in MODULES if room_of(path) == "scoring" for name in imported(path)}
    assert "torch" not in names
    assert "torch" not in modules_after("import zipperasr.cli.score, zipperasr.scoring.score")


def test_no_verb_imports_heavy_libraries_before_it_runs():
    verbs = ", ".join(f"zipperasr.cli.{verb.replace('-', '_')}" for verb in VERBS)
    assert not modules_after(f"import zipperasr.cli.recipe, {verbs}") & set(HEAVY)


def modules_after(statement: str) -> set[str]:
    """Names of the modules that a fresh interpreter has loaded after `statement`."""
    code = f"{statement}; import sys; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())

"""What an experiment directory holds: its runs, their scores by set, and which sets are source and target domain.

Anything may be missing: a report after stage 5, or while decoding goes on, shows what there is.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from zipperasr import config, files
from zipperasr.errors import UserError
from zipperasr.reporting import ReportSettings

ENCODERS = {"chunked": "Chunked", "full": "Non-chunked"}
SYSTEMS = {
    "stage1": "Stage 1",
    "vanilla": "Vanilla-LoRA",
    "flylora": "FlyLoRA",
    "independent": "Independent-LoRA",
    "zipper_static": "Zipper-LoRA-Static",
    "zipper_hard": "Zipper-LoRA-Hard",
    "zipper_soft": "Zipper-LoRA-Soft",
}
INITIAL_B = "_initial_b"


@dataclasses.dataclass(frozen=True)
class Run:
    """One run directory `<system>_<encoder>`; `scores` and `timing` are its decode directories' files by set."""

    directory: Path
    system: str
    encoder: str
    stage: int
    scores: dict[str, dict]
    timing: dict[str, dict]
    train: dict

    @property
    def label(self) -> str:
        """The system's name as in the paper's tables."""
        base = self.system.removesuffix(INITIAL_B)
        return SYSTEMS.get(base, base) + (" + Initial-B" if self.system != base else "")

    def error_rate(self, sets: Iterable[Iterable[str]]) -> float | None:
        """Percent: the mean over groups of sets of each group's mean; None unless every set is scored."""
        groups = [[self.scores.get(name, {}).get("error_rate") for name in group] for group in sets]
        if not groups or any(rate is None for group in groups for rate in group):
            return None
        return fmean(fmean(group) for group in groups)


@dataclasses.dataclass(frozen=True)
class Results:
    """Every run of an experiment, Stage 1 first, then in the paper's order; sets that some run has scored, sorted."""

    directory: Path
    runs: list[Run]
    source_sets: list[str]
    target_sets: list[str]
    low_resource: list[str]

    def of(self, encoder: str) -> list[Run]:
        """The runs of one encoder context."""
        return [run for run in self.runs if run.encoder == encoder]

    @property
    def encoders(self) -> list[str]:
        """The encoder contexts that some run has, chunked first."""
        return [encoder for encoder in ENCODERS if self.of(encoder)]

    def targets(self, *, low_resource: bool | None = None) -> list[str]:
        """Target-domain sets: all, only those of low-resource languages, or only the others."""
        return [s for s in self.target_sets if low_resource in (None, lang_of(s) in self.low_resource)]


def collect(exp_dir: Path | str, *, low_resource: list[str] | None = None) -> Results:
    """Read every run under `exp_dir`; `low_resource` goes before the newest `config.yaml`'s section `report`.

    Raises UserError when there is no run, or a file of one is broken.
    """
    exp_dir = Path(exp_dir)
    runs = sorted(map(_read_run, _run_directories(exp_dir)), key=_order)
    if not runs:
        raise UserError(f"{exp_dir}: no run here (<run>/log.jsonl or <run>/decode_<set>/scores.json); run stage 4")
    configs = sorted(exp_dir.glob("*/config.yaml"), key=lambda path: path.stat().st_mtime)
    settings = config.load(configs[-1], ReportSettings, section="report") if configs else ReportSettings()
    scored = sorted({name for run in runs for name in run.scores})
    source, target = (_test_sets(configs, stage) for stage in ("stage1", "stage2"))
    return Results(
        directory=exp_dir,
        runs=runs,
        source_sets=[name for name in scored if name in source],
        target_sets=[name for name in scored if name in target],
        low_resource=settings.low_resource if low_resource is None else low_resource,
    )


def by_language(sets: Iterable[str]) -> list[list[str]]:
    """Sets grouped by language."""
    groups: dict[str, list[str]] = {}
    for name in sets:
        groups.setdefault(lang_of(name), []).append(name)
    return list(groups.values())


def lang_of(name: str) -> str:
    """The language code of a set `<corpus>_<lang>_<split>`."""
    return name.split("_", 2)[1]


def read_log(run: Run) -> list[dict]:
    """The steps of a run's training log in order; one that was logged again after a resume counts as last seen."""
    path = run.directory / "log.jsonl"
    if not path.is_file():
        return []
    with open(path, encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream if line.endswith("\n")]  # a line being written has no end yet
    by_step = {row["step"]: row for row in rows}
    return [by_step[step] for step in sorted(by_step)]


def language_embeddings(results: Results) -> dict[str, list[float]]:
    """Whisper's language embeddings as some run saved them; empty if none did."""
    paths = (run.directory / "language_embeddings.json" for run in results.runs)
    return next((files.read_json(path) for path in paths if path.is_file()), {})


def _run_directories(exp_dir: Path) -> set[Path]:
    patterns = ("*/decode_*/scores.json", "*/log.jsonl", "*/train.json")
    return {exp_dir / path.relative_to(exp_dir).parts[0] for pattern in patterns for path in exp_dir.glob(pattern)}


def _read_run(directory: Path) -> Run:
    scores, timing, meta = {}, {}, {}
    for path in sorted(directory.glob("decode_*/scores.json")):
        name = path.parent.name.removeprefix("decode_")
        scores[name] = files.read_json(path)
        timing[name] = _read_if_there(path.with_name("timing.json"))
        meta = _read_if_there(path.with_name("meta.json")) or meta
    encoder = meta.get("encoder") or directory.name.rpartition("_")[2]
    system = directory.name.removesuffix(f"_{encoder}")
    stage = meta.get("stage") or (1 if system == "stage1" else 2)
    return Run(directory, system, encoder, stage, scores, timing, _read_if_there(directory / "train.json"))


def _read_if_there(path: Path) -> dict:
    return files.read_json(path) if path.is_file() else {}


def _order(run: Run) -> tuple:
    known, base = list(SYSTEMS), run.system.removesuffix(INITIAL_B)
    return run.stage, known.index(base) if base in known else len(known), run.directory.name


def _test_sets(configs: list[Path], stage: str) -> set[str]:
    """Names of the test sets of a stage's list setting, over all runs' configurations."""
    names: set[str] = set()
    for path in configs:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        setting = _at(tree, "training", stage, "setting")
        names |= set(_at(tree, "data", "lists", "settings", setting, "test") or {})
    return names


def _at(tree: Any, *keys: str) -> Any:
    for key in keys:
        tree = (tree or {}).get(key)
    return tree

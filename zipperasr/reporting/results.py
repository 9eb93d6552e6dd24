"""What an experiment directory holds: its runs, their scores by set, and which sets are source and target domain.

Anything may be missing: a report after stage 5, or while decoding goes on, shows what there is.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import yaml

from zipperasr import config, files
from zipperasr.errors import UserError
from zipperasr.reporting import ReportSettings, cross_check
from zipperasr.scoring import bootstrap
from zipperasr.scoring.directory import resample
from zipperasr.scoring.score import read_per_utt

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
    """One run directory `<system>_<encoder>`; `scores`, `meta` and `timing` are its decode directories' files by set.

    A score has on top the counts, rate and interval of one text profile: the one asked for, or else its own headline.
    `stress` has the scores of the wrong-language stress test, {language that decoded: {set: score}}.
    """

    directory: Path
    system: str
    encoder: str
    stage: int
    setting: str | None
    scores: dict[str, dict]
    meta: dict[str, dict]
    timing: dict[str, dict]
    stress: dict[str, dict[str, dict]]
    train: dict

    @property
    def label(self) -> str:
        """The system's name as in the paper's tables."""
        base = self.system.removesuffix(INITIAL_B)
        return SYSTEMS.get(base, base) + (" + Initial-B" if self.system != base else "")

    @property
    def is_known(self) -> bool:
        """Whether it is one of the methods that are compared, and not a further run under a name of its own."""
        return self.system.removesuffix(INITIAL_B) in SYSTEMS

    def error_rate(self, sets: Iterable[Iterable[str]], *, headline: bool = False) -> float | None:
        """Percent: the mean over groups of sets of each group's mean; None unless every set is scored.

        With `headline` it is that of the headline profile, whichever was asked for.
        """

        def rate(name: str) -> float | None:
            score = self.scores.get(name, {})
            return (score["profiles"][score["headline"]] if headline and score else score).get("error_rate")

        return mean_rate(sets, rate)

    def distribution(self, sets: Iterable[str]) -> np.ndarray | None:
        """The mean over languages of resampled error rates [1000], of the headline profile; None unless all are scored.

        What is drawn from a set depends on its name alone, so that two runs' distributions are paired by subtracting.
        """
        if any(name not in self.scores for name in sets):
            return None
        counts = {name: read_per_utt(self.decode_dir(name) / "per_utt") for name in sets}
        return bootstrap.macro((lang_of(name), resample(own, self.scores[name]["set"])) for name, own in counts.items())

    @functools.cached_property
    def checks(self) -> dict[str, cross_check.Check]:
        """By set what the CTC head alone hears, where the run has been aligned; errors are of the profile asked for."""
        aligned = {name: s for name, s in self.scores.items() if (self.decode_dir(name) / cross_check.WORDS).is_file()}
        return {
            name: cross_check.read_check(self.decode_dir(name), lang=score["lang"], profile=score["profile"])
            for name, score in aligned.items()
        }

    def decode_dir(self, name: str) -> Path:
        """The directory of a set's hypotheses."""
        return self.directory / f"decode_{name}"


@dataclasses.dataclass(frozen=True)
class Results:
    """Every run of an experiment, Stage 1 first, then in the paper's order; sets that some run has scored, sorted."""

    directory: Path
    runs: list[Run]
    source_sets: list[str]
    target_sets: list[str]
    low_resource: list[str]

    def of(self, encoder: str, *, known: bool = False) -> list[Run]:
        """The runs of one encoder context; with `known` only those of methods that are compared."""
        return [run for run in self.runs if run.encoder == encoder and (run.is_known or not known)]

    @property
    def encoders(self) -> list[str]:
        """The encoder contexts that some run has, chunked first."""
        return [encoder for encoder in ENCODERS if self.of(encoder)]

    def targets(self, *, low_resource: bool | None = None) -> list[str]:
        """Target-domain sets: all, only those of low-resource languages, or only the others."""
        return [s for s in self.target_sets if low_resource in (None, lang_of(s) in self.low_resource)]

    @property
    def headlines(self) -> str:
        """The text profile of the files beside the scores, on which whatever goes by utterance is based."""
        return ", ".join(sorted({score["headline"] for run in self.runs for score in run.scores.values()}))

    @functools.cached_property
    def macros(self) -> dict[Path, np.ndarray]:
        """By run directory the distribution of the mean over target languages, where all of them are scored."""
        drawn = {run.directory: run.distribution(self.targets()) for run in self.runs if self.target_sets}
        return {directory: values for directory, values in drawn.items() if values is not None}


def collect(exp_dir: Path | str, *, low_resource: list[str] | None = None, profile: str | None = None) -> Results:
    """Read every run under `exp_dir`; `low_resource` goes before the newest `config.yaml`'s section `report`.

    Rates are those of the text profile `profile`, or of each score's own.
    Raises UserError when there is no run, a file of one is broken or of an older version, or has no such profile.
    """
    exp_dir = Path(exp_dir)
    paths = sorted(exp_dir.glob("*/config.yaml"), key=lambda path: path.stat().st_mtime)
    configs = {path.parent: _read_yaml(path) for path in paths}
    runs = sorted((_read_run(path, configs.get(path), profile) for path in _run_directories(exp_dir)), key=_order)
    if not runs:
        raise UserError(f"{exp_dir}: no run here (<run>/log.jsonl or <run>/decode_<set>/scores.json); run stage 4")
    settings = config.load(paths[-1], ReportSettings, section="report") if paths else ReportSettings()
    scored = sorted({name for run in runs for name in run.scores})
    source, target = (_test_sets(configs.values(), stage) for stage in ("stage1", "stage2"))
    return Results(
        directory=exp_dir,
        runs=runs,
        source_sets=[name for name in scored if name in source],
        target_sets=[name for name in scored if name in target],
        low_resource=settings.low_resource if low_resource is None else low_resource,
    )


def mean_rate(sets: Iterable[Iterable[str]], rate_of: Callable[[str], float | None]) -> float | None:
    """The mean over groups of sets of each group's mean rate; None where there is no set, or one has no rate."""
    groups = [[rate_of(name) for name in group] for group in sets]
    if not groups or any(rate is None for group in groups for rate in group):
        return None
    return fmean(fmean(group) for group in groups)


def context(encoder: str) -> str:
    """An encoder context in words."""
    return f"{ENCODERS.get(encoder, encoder).lower()} encoder"


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
    try:
        with open(path, encoding="utf-8") as stream:
            rows = [json.loads(line) for line in stream if line.endswith("\n")]  # a line being written has no end yet
    except ValueError as error:
        raise UserError(f"{path}: a line is not JSON ({error}); take it out") from error
    by_step = {row["step"]: row for row in rows}
    return [by_step[step] for step in sorted(by_step)]


def language_embeddings(results: Results) -> dict[str, list[float]]:
    """Whisper's language embeddings as some run saved them; empty if none did."""
    paths = (run.directory / "language_embeddings.json" for run in results.runs)
    return next((files.read_json(path) for path in paths if path.is_file()), {})


def _run_directories(exp_dir: Path) -> set[Path]:
    patterns = ("*/decode_*/scores.json", "*/log.jsonl", "*/train.json")
    return {exp_dir / path.relative_to(exp_dir).parts[0] for pattern in patterns for path in exp_dir.glob(pattern)}


def _read_run(directory: Path, configuration: Any, profile: str | None) -> Run:
    scores = _read_scores(directory, profile)
    decoded = {name: directory / f"decode_{name}" for name in scores}
    meta = {name: _read_if_there(path / "meta.json") for name, path in decoded.items()}
    described = next((m for m in meta.values() if m), {})
    encoder = described.get("encoder") or directory.name.rpartition("_")[2]
    system = directory.name.removesuffix(f"_{encoder}")
    stress = {path.name.removeprefix("as_"): _read_scores(path, profile) for path in sorted(directory.glob("as_*"))}
    stage = described.get("stage") or (1 if system == "stage1" else 2)
    return Run(
        directory=directory,
        system=system,
        encoder=encoder,
        stage=stage,
        setting=_at(configuration, "training", f"stage{stage}", "setting"),
        scores=scores,
        meta=meta,
        timing={name: _read_if_there(path / "timing.json") for name, path in decoded.items()},
        stress={lang: scores for lang, scores in stress.items() if scores},
        train=_read_if_there(directory / "train.json"),
    )


def _read_scores(directory: Path, profile: str | None) -> dict[str, dict]:
    """{set: score} of the decode directories in `directory`, with one profile's figures on top."""
    scores = {}
    for path in sorted(directory.glob("decode_*/scores.json")):
        score = files.read_json(path)
        if "profiles" not in score:
            raise UserError(f"{path}: scored by an older version; run local/score.sh on it again")
        chosen = profile or score["profile"]
        if chosen not in score["profiles"]:
            raise UserError(f"{path}: has no text profile '{chosen}'; known: {', '.join(score['profiles'])}")
        score |= score["profiles"][chosen] | {"profile": chosen, "headline": score["profile"]}
        scores[path.parent.name.removeprefix("decode_")] = score
    return scores


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error


def _read_if_there(path: Path) -> dict:
    return files.read_json(path) if path.is_file() else {}


def _order(run: Run) -> tuple:
    known, base = list(SYSTEMS), run.system.removesuffix(INITIAL_B)
    return run.stage, known.index(base) if base in known else len(known), run.directory.name


def _test_sets(configs: Iterable[Any], stage: str) -> set[str]:
    """Names of the test sets of a stage's list setting, over all runs' configurations."""
    names: set[str] = set()
    for tree in configs:
        setting = _at(tree, "training", stage, "setting")
        names |= set(_at(tree, "data", "lists", "settings", setting, "test") or {})
    return names


def _at(tree: Any, *keys: str) -> Any:
    for key in keys:
        tree = (tree or {}).get(key)
    return tree

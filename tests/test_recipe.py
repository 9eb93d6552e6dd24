"""The recipe from stage 0 to stage 8, shortened: the same run.sh on a fiftieth of the mini corpora, for a few steps."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from zipperasr import files
from zipperasr.training import runs

RECIPE = Path(__file__).resolve().parents[1] / "egs" / "multilingual12"
SHORT = {
    "base": str(RECIPE / "conf" / "mini.yaml"),
    "corpora": {"read": {"synthetic": 0.02}, "talk": {"synthetic": 0.02}},
    "training": {stage: {"max_steps": 4, "save_every": 2} for stage in ("stage1", "stage2")},
    "decoding": {"min_max_tokens": 4, "max_tokens_per_s": 4},
}


FEW = {
    "base": "short.yaml",  # the same but for its tests, which --method all would repeat seven times
    "data": {"lists": {"settings": {"source": {"test": {"talk_zh_test_net": None}},
                                    "target_1h": {"test": {"read_ar_test": None, "read_de_test": None}}}}},
}  # fmt: skip
ROWS = ["vanilla", "flylora", "independent", "zipper_static", "zipper_hard", "zipper_soft", "zipper_soft_initial_b"]


def run(work: Path, *args: str, conf: str = "short.yaml") -> subprocess.CompletedProcess:
    command = [RECIPE / "run.sh", "--conf", work / conf, "--data-dir", work / "data", "--exp-dir", work / "exp"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, command), *args], env=environment, capture_output=True, text=True, timeout=600)


def zipperasr(*args: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "zipperasr.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=RECIPE, timeout=120)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    work = tmp_path_factory.mktemp("recipe")
    (work / "short.yaml").write_text(yaml.safe_dump(SHORT))
    result = run(work)
    assert result.returncode == 0, result.stdout + result.stderr
    assert all(f"stage {stage}: " in result.stdout for stage in range(9))
    return work


def contents(folder: Path) -> dict[Path, str]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path: files.sha256(path) for path in found if path.name != "times.tsv" and path.suffix != ".log"}


def times(folder: Path) -> dict[Path, int]:
    """When everything that takes long was written."""
    found = (path for end in ("flac", "npy", "safetensors", "gz", "hyp") for path in folder.rglob(f"*{end}"))
    return {path: path.stat().st_mtime_ns for path in found}


def test_every_test_set_is_decoded_scored_and_reported_after_both_stages(work):
    sets = zipperasr("show", "--conf", work / "short.yaml", "sets").stdout.split()
    assert len(sets) == 17
    for stage_run in ("stage1_full", "zipper_soft_full"):
        for name in sets:
            decoded = work / "exp" / stage_run / f"decode_{name}"
            scores = json.loads((decoded / "scores.json").read_text())
            references = (decoded / "ref").read_text().splitlines()
            assert scores["num_utts"] == len(references) > 0 and scores["num_missing"] == 0
            assert len((decoded / "words.jsonl").read_text().splitlines()) == len(references)
    overview = (work / "exp" / "report" / "README.md").read_text()
    assert "Zipper-LoRA-Soft" in overview
    assert len(list((work / "exp" / "report" / "figures").glob("*.png"))) >= 4


def test_run_again_it_changes_nothing(work):
    before = contents(work), times(work)
    result = run(work)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (contents(work), times(work)) == before


def test_a_checkpoint_of_another_rank_is_refused_in_one_line(work):
    where = ["--conf", work / "short.yaml", "--data-dir", work / "data", "--run-dir", work / "exp" / "other"]
    result = zipperasr("train", *where, "--stage", "2", "--init", work / "exp" / "stage1_full", "model.llm.lora.rank=4")
    assert result.returncode == 1
    (error,) = (line for line in result.stderr.splitlines() if "error" in line)
    assert error.startswith("zipperasr: error:") and "has shape" in error


def test_all_methods_are_trained_decoded_scored_and_reported_side_by_side(work):
    """Last of all: it adds runs to the experiment."""
    (work / "few.yaml").write_text(yaml.safe_dump(FEW))
    result = run(work, "--stage", "6", "--method", "all", conf="few.yaml")
    assert result.returncode == 0, result.stdout + result.stderr
    assert zipperasr("show", "--conf", work / "few.yaml", "methods").stdout.split() == ROWS
    source, begun = (load_file(runs.final_weights(work / "exp" / f"{name}_full")) for name in ROWS[-2:])
    assert source.keys() == begun.keys() and any(not torch.equal(source[name], begun[name]) for name in source)
    with open(work / "exp" / "report" / "tables" / "overview_full.csv", encoding="utf-8") as stream:
        (row,) = (row for row in csv.DictReader(stream) if row["Set"] == "read ar")
    assert list(row)[4:] == [
        "Vanilla-LoRA",
        "FlyLoRA",
        "Independent-LoRA",
        "Zipper-LoRA-Static",
        "Zipper-LoRA-Hard",
        "Zipper-LoRA-Soft",
        "Zipper-LoRA-Soft + Initial-B",
    ]
    assert all(float(rate) >= 0 for rate in list(row.values())[3:])
    readme = (work / "exp" / "report" / "README.md").read_text()
    assert all(f"| {name}_full | " in readme for name in ROWS)

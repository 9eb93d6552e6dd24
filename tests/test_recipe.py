"""The recipe from stage 0 to stage 8, shortened: the same run.sh on a fiftieth of the mini corpora, for a few steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from zipperasr import files

RECIPE = Path(__file__).resolve().parents[1] / "egs" / "multilingual12"
SHORT = {
    "base": str(RECIPE / "conf" / "mini.yaml"),
    "corpora": {"read": {"synthetic": 0.02}, "talk": {"synthetic": 0.02}},
    "training": {stage: {"max_steps": 4, "save_every": 2} for stage in ("stage1", "stage2")},
    "decoding": {"min_max_tokens": 4, "max_tokens_per_s": 4},
}


def run(work: Path, *args: str) -> subprocess.CompletedProcess:
    command = [RECIPE / "run.sh", "--conf", work / "short.yaml", "--data-dir", work / "data", "--exp-dir", work / "exp"]
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

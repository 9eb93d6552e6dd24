"""Ranks fail together, whichever fails and wherever, and the first cause is what is shown."""

import os
import subprocess
import sys

import pytest
import tiny_recipe

from zipperasr.data import lists
from zipperasr.training.process import ALONE

RANK_1_FAILS = """
import os, sys
from zipperasr.cli.main import main
from zipperasr.model.speech_llm import SpeechLLM
forward, calls = SpeechLLM.forward, []

def failing(model, batch, chunk_s=None):
    calls.append(batch)
    if os.environ["RANK"] == "1" and len(calls) == 5:
        raise RuntimeError("what rank 1 says")
    return forward(model, batch, chunk_s)

SpeechLLM.forward = failing
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def recipe(tmp_path):
    return tiny_recipe.make(tmp_path)


def run(command):
    environment = {name: value for name, value in os.environ.items() if name not in ALONE}
    return subprocess.run(command, timeout=120, capture_output=True, text=True, env=environment)


def test_a_rank_that_fails_in_a_step_ends_the_others(recipe, tmp_path):
    script = tmp_path / "rank_1_fails.py"
    script.write_text(RANK_1_FAILS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = run([*launcher, script, *recipe.train(1, tmp_path / "run", "training.stage1.max_steps=8")])
    assert done.returncode == 1
    assert done.stderr.count("Traceback (most recent call last)") == 2, "that of rank 1 and the launcher's own"
    assert "RuntimeError: what rank 1 says" in done.stderr
    assert not list((tmp_path / "run" / "checkpoints").glob("step-4"))


def test_a_rank_whose_data_cannot_be_read_ends_the_others_with_one_line(recipe, tmp_path):
    utt_id = lists.read(recipe.data / "lists/all/train/noise_de_train.txt")[0]
    (tmp_path / "audio" / f"{utt_id}.wav").unlink()
    args = recipe.train(1, tmp_path / "run", "--ranks", "2", "training.stage1.epochs=1")
    done = run([sys.executable, "-m", "zipperasr.cli", *args])
    assert done.returncode == 1
    assert done.stderr.startswith("zipperasr: error: ") and utt_id in done.stderr and done.stderr.count("\n") == 1

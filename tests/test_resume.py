"""Killed and resumed equals uninterrupted; two ranks equal one that accumulates twice."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import tiny_recipe
import torch
from deepspeed import DeepSpeedEngine
from safetensors.torch import load_file

from zipperasr import files
from zipperasr.cli import recipe as recipes
from zipperasr.cli.main import main
from zipperasr.data.packing import pack, tokenize
from zipperasr.data.tokenizer import load_tokenizer
from zipperasr.data.utterances import load_utterances
from zipperasr.model import checkpoints_by_step
from zipperasr.training import checkpoints, runs
from zipperasr.training.engine import ALONE
from zipperasr.training.trainer import Trainer

STAGE = "training.stage2"
TIMING = ("tokens_per_s", "audio_s_per_s")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny_recipe.make(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def stage1(recipe, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("exp") / "stage1_full"
    assert main(recipe.train(1, run_dir, "training.stage1.max_steps=2")) == 0
    return run_dir


def log(run_dir):
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMING} for row in rows]


def train_elsewhere(args, *, num_ranks=1, stderr=subprocess.DEVNULL):
    command = [sys.executable, "-m", "zipperasr.cli", *args, "--ranks", str(num_ranks)]
    environment = {name: value for name, value in os.environ.items() if name not in ALONE}  # of this process's own rank
    return subprocess.Popen(command, stderr=stderr, text=True, env=environment)


def test_a_killed_run_ends_as_an_uninterrupted_one(recipe, stage1, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ["--init", str(stage1), f"{STAGE}.max_steps=40", f"{STAGE}.save_every=3"]
    assert main(recipe.train(2, whole, *more)) == 0

    process = train_elsewhere(recipe.train(2, killed, *more))
    while not checkpoints_by_step(killed):
        assert process.poll() is None
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.3))
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (killed / runs.FINISHED).exists()
    assert 0 < max(checkpoints_by_step(killed)) < 40

    with open(killed / "log.jsonl", "a") as stream:
        stream.write('{"step": 39, "lo')  # as when killed in the middle of a line
    assert main(recipe.train(2, killed, *more)) == 0
    assert log(killed) == log(whole) and [row["step"] for row in log(killed)] == list(range(1, 41))
    ends = [load_file(runs.final_weights(run_dir)) for run_dir in (whole, killed)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    done = [files.read_json(run_dir / runs.FINISHED) for run_dir in (whole, killed)]
    assert done[0]["audio_s"] == done[1]["audio_s"] and done[0]["step"] == done[1]["step"] == 40
    assert not list(killed.glob("checkpoints/**/.tmp*")) and not list(killed.glob("checkpoints/*/engine"))


def test_two_ranks_train_on_everything_once_and_equal_one_that_accumulates(recipe, stage1, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["--init", str(stage1), f"{STAGE}.epochs=1", f"{STAGE}.save_every=4"]
    process = train_elsewhere(recipe.train(2, two, *more), num_ranks=2)
    assert main(recipe.train(2, one, *more, f"{STAGE}.accumulation=2")) == 0
    assert process.wait() == 0

    whole = recipes.load(recipe.conf)
    utterances = load_utterances(recipe.data, "all", "train", None, whole.data.features)
    rows = pack(
        tokenize(utterances, load_tokenizer(whole.model.llm.pretrained), whole.data.packing), max_tokens=96, seed=0
    )
    assert len(rows) % 4 == 1, "the second rank should have a filler in the last step of an epoch"
    audio_s = sum(u.num_frames for u in utterances) / 100
    assert files.read_json(two / runs.FINISHED)["audio_s"] == pytest.approx(audio_s)
    for a, b in zip(log(one), log(two), strict=True):
        assert a["loss_per_lang"] == pytest.approx(b["loss_per_lang"], abs=1e-5)
        assert [a[x] for x in ("loss", "grad_norm")] == pytest.approx([b[x] for x in ("loss", "grad_norm")], abs=1e-5)
    weights, others = (load_file(runs.final_weights(run_dir)) for run_dir in (one, two))
    for name in weights:
        torch.testing.assert_close(weights[name], others[name], atol=1e-5, rtol=0, msg=name)


def test_a_rank_that_fails_says_why_in_one_line_and_ends_the_others(recipe, stage1, tmp_path):
    wrong = recipe.train(2, stage1, "--init", str(stage1))  # a stage-2 run where stage 1 has trained
    process = train_elsewhere(wrong, num_ranks=2, stderr=subprocess.PIPE)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert said.startswith(f"zipperasr: error: {stage1}: begun with another configuration") and said.count("\n") == 1


def test_only_the_last_checkpoints_are_kept(recipe, tmp_path):
    more = ["training.stage1.max_steps=9", "training.stage1.save_every=2", "training.stage1.keep_last=3"]
    assert main(recipe.train(1, tmp_path, *more)) == 0
    assert list(checkpoints_by_step(tmp_path)) == [6, 8, 9]
    assert all((path / "trainable.safetensors").is_file() for path in checkpoints_by_step(tmp_path).values())


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(recipe, tmp_path, monkeypatch, capsys):
    save = DeepSpeedEngine.save_checkpoint

    def fail_at_step_4(engine, folder, **more):
        save(engine, folder, **more)
        if "step-4" in str(folder):
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 6912 vs 6804")

    monkeypatch.setattr(DeepSpeedEngine, "save_checkpoint", fail_at_step_4)
    monkeypatch.setattr(checkpoints, "FULL", math.inf)
    assert main(recipe.train(1, tmp_path)) == 1
    assert "step-4: the disk is full; free some space" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"]


def test_another_number_of_ranks_is_refused(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "_finish", lambda trainer: None)
    assert main(recipe.train(1, tmp_path, "training.stage1.max_steps=1")) == 0
    state = tmp_path / "checkpoints/step-1/state.json"
    files.write_json(state, files.read_json(state) | {"num_ranks": 2})
    assert main(recipe.train(1, tmp_path, "training.stage1.max_steps=1")) == 1
    assert "saved by 2 ranks, resumed with 1; resume with 2" in capsys.readouterr().err


def test_an_unfinished_checkpoint_is_not_resumed_from(recipe, tmp_path):
    half = tmp_path / "checkpoints" / ".tmp-step-2"
    half.mkdir(parents=True)
    (half / "state.json").write_text("{")
    assert main(recipe.train(1, tmp_path, "training.stage1.max_steps=1")) == 0
    assert not half.exists() and list(checkpoints_by_step(tmp_path)) == [1]

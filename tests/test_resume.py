"""Killed and resumed equals uninterrupted; two ranks equal one that accumulates twice."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import tiny_recipe
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from zipperasr import files
from zipperasr.cli import recipe as recipes
from zipperasr.cli.main import main
from zipperasr.data.packing import pack, tokenize
from zipperasr.data.tokenizer import load_tokenizer
from zipperasr.data.utterances import load_utterances
from zipperasr.errors import UserError
from zipperasr.model import checkpoints_by_step
from zipperasr.training import checkpoints, runs
from zipperasr.training.process import ALONE

STAGE = "training.stage2"
TIMING = ("tokens_per_s", "audio_s_per_s", "tflops", "waited_for_data")


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


def ends_alike(run_dir, other):
    """Whether two finished runs have the same log and the same weights, bit for bit."""
    ends = [load_file(runs.final_weights(folder)) for folder in (run_dir, other)]
    assert log(run_dir) == log(other)
    assert ends[0].keys() == ends[1].keys()
    return all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def is_after_a_step(run_dir):
    return bool(checkpoints_by_step(run_dir))


def is_writing(run_dir):
    folder = run_dir / "checkpoints"
    return folder.is_dir() and any(name.startswith(".tmp-step") for name in os.listdir(folder))


def test_a_run_killed_in_a_step_and_in_a_write_ends_as_an_uninterrupted_one(recipe, stage1, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ["--init", str(stage1), f"{STAGE}.max_steps=40", f"{STAGE}.save_every=2"]
    assert main(recipe.train(2, whole, *more)) == 0
    for is_time in (is_after_a_step, is_writing):
        process = train_elsewhere(recipe.train(2, killed, *more))
        while not is_time(killed):
            assert process.poll() is None
        time.sleep(random.uniform(0, 0.1) if is_time is is_after_a_step else 0)
        process.kill()
        assert process.wait() == -signal.SIGKILL and not (killed / runs.FINISHED).exists()
        for folder in checkpoints_by_step(killed).values():
            assert all(load_file(file) for file in folder.glob("*.safetensors")), "what there is should be whole"
    with open(killed / "log.jsonl", "a") as stream:
        stream.write('{"step": 39, "lo')  # as when killed in the middle of a line
    assert main(recipe.train(2, killed, *more)) == 0
    assert ends_alike(killed, whole) and [row["step"] for row in log(killed)] == list(range(1, 41))
    done = [files.read_json(run_dir / runs.FINISHED) for run_dir in (whole, killed)]
    assert done[0]["audio_s"] == done[1]["audio_s"] and done[0]["step"] == done[1]["step"] == 40
    assert not list(killed.glob("checkpoints/**/.tmp*")) and not list(killed.glob("checkpoints/*/optimizer*"))


@pytest.mark.parametrize(("begun", "accumulation", "resumed"), [(1, 3, 2), (2, 1, 1)])
def test_a_run_goes_on_with_another_number_of_ranks(recipe, stage1, tmp_path, begun, accumulation, resumed):
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    more = ["--init", str(stage1), f"{STAGE}.max_steps=9", f"{STAGE}.save_every=4", f"{STAGE}.weight_decay=0.1"]
    assert main(recipe.train(2, whole, *more, f"{STAGE}.accumulation={begun * accumulation}")) == 0
    more.append(f"{STAGE}.accumulation={accumulation}")
    process = train_elsewhere(recipe.train(2, moved, *more), num_ranks=begun)
    while not checkpoints_by_step(moved):
        assert process.poll() is None
        time.sleep(0.005)
    process.terminate()
    assert process.wait() != 0 and max(checkpoints_by_step(moved)) < 9
    assert train_elsewhere(recipe.train(2, moved, *more), num_ranks=resumed).wait() == 0
    assert files.read_json(moved / runs.FINISHED)["num_slots"] == begun * accumulation
    for a, b in zip(log(whole), log(moved), strict=True):
        assert a["loss_per_lang"] == pytest.approx(b["loss_per_lang"], abs=2e-5)
    weights, others = (load_file(runs.final_weights(run_dir)) for run_dir in (whole, moved))
    for name in weights:
        torch.testing.assert_close(weights[name], others[name], atol=2e-5, rtol=0, msg=name)


def test_more_ranks_than_micro_batches_are_refused(recipe, tmp_path, capsys):
    assert main(recipe.train(1, tmp_path, "training.stage1.max_steps=1")) == 0
    (tmp_path / runs.FINISHED).unlink()
    folder = tmp_path / "checkpoints/step-1"
    files.write_json(folder / "state.json", files.read_json(folder / "state.json") | {"num_slots": 0})
    (folder / checkpoints.OPTIMIZER).write_bytes(b"")
    assert main(recipe.train(1, tmp_path, "training.stage1.max_steps=1")) == 1
    assert "a step has 0 micro-batches, too few for 1 ranks; go on with at most 0 (--ngpu)" in capsys.readouterr().err


def test_two_ranks_train_on_everything_once_and_equal_one_that_accumulates(recipe, stage1, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["--init", str(stage1), f"{STAGE}.max_steps=24", f"{STAGE}.save_every=50"]
    process = train_elsewhere(recipe.train(2, two, *more), num_ranks=2)
    assert main(recipe.train(2, one, *more, f"{STAGE}.accumulation=2")) == 0
    assert process.wait() == 0

    whole = recipes.load(recipe.conf)
    utterances = load_utterances(recipe.data, "all", "train", None, whole.data.features)
    rows = pack(
        tokenize(utterances, load_tokenizer(whole.model.llm.pretrained), whole.data.packing), max_tokens=96, seed=0
    )
    assert len(rows) % 4 == 1, "the second rank should have a filler in the last step of an epoch"
    audio_s = 4 * sum(u.num_frames for u in utterances) / 100
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


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [9]), (3, [6, 8, 9]), (5, [2, 4, 6, 8, 9])])
def test_only_the_last_checkpoints_are_kept(recipe, tmp_path, keep_last, kept):
    more = ["training.stage1.max_steps=9", "training.stage1.save_every=2", f"training.stage1.keep_last={keep_last}"]
    assert main(recipe.train(1, tmp_path, *more)) == 0
    assert list(checkpoints_by_step(tmp_path)) == kept
    assert all((path / "trainable.safetensors").is_file() for path in checkpoints_by_step(tmp_path).values())


def test_the_best_checkpoints_are_kept_too(tmp_path):
    writer = checkpoints.Writer(tmp_path, keep_last=1, keep_best=2)
    for step, dev in enumerate([5.0, 3.0, None, 2.0, 4.0, 6.0, None], start=1):
        state = checkpoints.State(num_slots=1, rows_per_batch=1, step=step, dev=dev)
        writer.save(state, {"w": torch.ones(2)}, {"m": torch.ones(2)})
    writer.wait()
    kept = checkpoints_by_step(tmp_path)
    assert list(kept) == [2, 4, 7]
    assert [step for step, path in kept.items() if (path / checkpoints.OPTIMIZER).exists()] == [7]


def full_at_step_4(tensors, path, metadata):
    if "step-4" in str(path):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    save_file(tensors, path, metadata)


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("zipperasr.model.tensors.save_file", full_at_step_4)
    assert main(recipe.train(1, tmp_path)) == 1
    assert "step-4: the disk is full; free some space" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"]


def test_a_disk_that_is_really_full_leaves_a_whole_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk takes the rights to do so")
    try:
        writer = checkpoints.Writer(disk, keep_last=1, keep_best=0)
        for step, size in ((1, 10_000), (2, 80_000)):
            state = checkpoints.State(num_slots=1, rows_per_batch=1, step=step)
            writer.save(state, {"w": torch.ones(size)}, {"m": torch.ones(size // 2)})
        with pytest.raises(UserError, match="step-2: the disk is full; free some space"):
            writer.wait()
        assert [path.name for path in (disk / "checkpoints").iterdir()] == ["step-1"]
        assert torch.equal(load_file(disk / "checkpoints/step-1/trainable.safetensors")["w"], torch.ones(10_000))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_write_does_not_hold_up_training(tmp_path, monkeypatch):
    hold = threading.Event()
    monkeypatch.setattr("zipperasr.model.tensors.save_file", lambda *args: hold.wait(30) and save_file(*args))
    writer = checkpoints.Writer(tmp_path, keep_last=1, keep_best=0)
    writer.save(checkpoints.State(num_slots=1, rows_per_batch=1, step=1), {"w": torch.ones(2)}, {"m": torch.ones(2)})
    writer.wait(only_if_done=True)
    assert not checkpoints_by_step(tmp_path), "it should have come back before anything is written"
    hold.set()
    writer.wait()
    assert list(checkpoints_by_step(tmp_path)) == [1]


def test_an_unfinished_checkpoint_is_not_resumed_from(recipe, tmp_path):
    half = tmp_path / "checkpoints" / ".tmp-step-2"
    half.mkdir(parents=True)
    (half / "state.json").write_text("{")
    assert main(recipe.train(1, tmp_path, "training.stage1.max_steps=1")) == 0
    assert not half.exists() and list(checkpoints_by_step(tmp_path)) == [1]


WITHOUT_DEEPSPEED = """
import sys
sys.modules["deepspeed"] = None  # as where it is not installed
from zipperasr.model.checkpoint import load_run
from zipperasr.model.speech_llm import stage_tensors
model = load_run(sys.argv[1])
print(sum(t.double().sum().item() for t in stage_tensors(model, 2).values()))
"""


def test_a_checkpoint_loads_without_deepspeed(recipe, stage1, tmp_path):
    assert main(recipe.train(2, tmp_path, "--init", str(stage1), f"{STAGE}.max_steps=2")) == 0
    command = [sys.executable, "-c", WITHOUT_DEEPSPEED, tmp_path]
    total = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    stored = load_file(runs.final_weights(tmp_path))
    assert float(total) == pytest.approx(sum(t.double().sum().item() for t in stored.values()), abs=1e-9)
    assert all(t.dtype == torch.float32 for t in stored.values())

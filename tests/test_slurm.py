"""Training on two nodes of a real Slurm, where one is installed: stopped and resumed, and failing together."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm
import tiny_recipe

from zipperasr.model import checkpoints_by_step
from zipperasr.training import runs
from zipperasr.training.launch import FAILED_ON_A_NODE, STOPPED
from zipperasr.training.process import ALONE

ROOT = Path(__file__).resolve().parents[1]
MORE = ["training.stage1.max_steps=60", "training.stage1.save_every=1000", "training.stage1.num_workers=1"]


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as env:
        yield {name: value for name, value in env.items() if name not in ALONE} | {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def recipe(env, tmp_path_factory):
    return tiny_recipe.make(tmp_path_factory.mktemp("recipe"))


def start(env, log, *command):
    """The step of a job that utils/run_slurm.sh makes, without the seconds that sbatch waits."""
    srun = ["srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", *command]
    with open(log, "a") as stream:
        return subprocess.Popen(srun, env=env, stdout=stream, stderr=stream, start_new_session=True)


def train(recipe, run_dir):
    return [sys.executable, "-m", "zipperasr.cli", *recipe.train(1, run_dir, *MORE)]


def test_an_array_and_a_job_of_two_nodes_run_where_they_should(env, tmp_path):
    runner = ROOT / "utils/run_slurm.sh"
    array = [runner, "JOB=1:3", tmp_path / "a.JOB.log", "bash", "-c", "echo JOB; [ JOB != 2 ]"]
    job = [runner, "--nodes=2", tmp_path / "x.log", "bash", "-c", 'echo "$SLURMD_NODENAME"']
    array, job = (subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for command in (array, job))
    _, said = array.communicate()
    assert array.returncode == 1 and "a job of the array failed" in said
    assert [(tmp_path / f"a.{job}.log").read_text() for job in (1, 2, 3)] == ["1\n", "2\n", "3\n"]
    assert job.wait() == 0 and not job.stderr.read()
    assert sorted((tmp_path / "x.log").read_text().split()) == ["first", "second"]


def test_a_training_on_two_nodes_saves_when_it_is_stopped_and_goes_on(env, recipe, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "x.log"
    job = start(env, log, *train(recipe, run_dir))
    deadline = time.monotonic() + 60
    while not (run_dir / "log.jsonl").is_file() or not (run_dir / "log.jsonl").stat().st_size:
        assert job.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    subprocess.run(["scancel", "--signal=TERM", f"--user={os.geteuid()}"], env=env, check=True)
    assert job.wait() == STOPPED
    assert "stopped, saved at step" in log.read_text() and "Traceback" not in log.read_text()
    (stopped_at,) = checkpoints_by_step(run_dir)
    assert 0 < stopped_at < 60
    assert start(env, log, *train(recipe, run_dir)).wait() == 0, log.read_text()
    assert [json.loads(line)["step"] for line in (run_dir / "log.jsonl").open()] == list(range(1, 61))
    assert (run_dir / runs.FINISHED).is_file()


def test_a_rank_that_fails_on_one_node_ends_the_other(env, recipe, tmp_path):
    log = tmp_path / "x.log"
    wrong = 'if [ "$SLURM_NODEID" = 1 ]; then set -- "$@" training.stage1.setting=none; fi; exec "$@"'
    began = time.monotonic()
    assert start(env, log, "bash", "-c", wrong, "-", *train(recipe, tmp_path / "run")).wait() == FAILED_ON_A_NODE
    assert time.monotonic() - began < 30
    said = log.read_text()
    assert said.count("zipperasr: error: ") == 1 and "'none' is not in data.lists.settings" in said
    assert "Traceback" not in said

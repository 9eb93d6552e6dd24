"""Stages that are split into jobs: on this machine or as a Slurm array, the same work, each share once."""

import os
import subprocess
from pathlib import Path

import pytest

from zipperasr.cli.main import main
from zipperasr.training.launch import FAILED_ON_A_NODE, STOPPED

ROOT = Path(__file__).resolve().parents[1]
SBATCH = r"""#!/usr/bin/env bash
# What Slurm does with a job or an array, one task after the other; notes its options.
printf '%s\n' "$@" >"$NOTES"
cat >"$NOTES.script"
echo 17
status=0 tasks=('') mode='' SLURM_JOB_ID=17 SLURM_JOB_NUM_NODES=1
for arg in "$@"; do
  case $arg in
    --array=1-*) mapfile -t tasks < <(seq "${arg#--array=1-}") ;;
    --output=*) output=${arg#--output=} ;;
    --open-mode=append) mode=append ;;
    --nodes=*) SLURM_JOB_NUM_NODES=${arg#--nodes=} ;;
    --cpus-per-task=*) export SLURM_CPUS_PER_TASK=${arg#--cpus-per-task=} ;;
  esac
done
export SLURM_JOB_ID SLURM_JOB_NUM_NODES
for task in "${tasks[@]}"; do
  [ -z "$task" ] || export SLURM_ARRAY_TASK_ID=$task
  log=${output//%a/$task}
  [ -n "$mode" ] || rm -f "$log"
  bash "$NOTES.script" >>"$log" 2>&1 </dev/null || status=$?
done
exit $status
"""
SRUN = r"""#!/usr/bin/env bash
# A task on each node, one after the other; the status is the highest of theirs.
printf '%s\n' "$@" >"$NOTES.srun"
while [[ $1 == -* ]]; do shift; done
status=0
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
  SLURM_NODEID=$node "$@" || { now=$?; status=$((now > status ? now : status)); }
done
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
echo "$*" >"$NOTES.scontrol"
"""


@pytest.fixture
def runner(request, tmp_path):
    """A function that runs a command by utils/<runner>.sh, with stand-ins for Slurm's commands."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "NOTES": str(tmp_path / "notes")}
    script, *options = request.param

    def run(*args: str) -> subprocess.CompletedProcess:
        command = [ROOT / "utils" / script, *options, *args]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)

    return run


RUNNERS = [("run_local.sh",), ("run_slurm.sh", "--partition=cpu", "--comment=a b")]
both = pytest.mark.parametrize("runner", RUNNERS, indirect=True, ids=["local", "slurm"])


@both
def test_every_job_runs_once_with_its_number_and_its_log(runner, tmp_path):
    result = runner(
        "JOB=1:3", "log dir/x.JOB.log", "bash", "-c", 'echo "$PWD: $1 of 3, $2"', "-", "JOB", "it's; $HOME *"
    )
    assert result.returncode == 0, result.stderr
    logs = {path.name: path.read_text() for path in (tmp_path / "log dir").iterdir()}
    assert logs == {f"x.{job}.log": f"{tmp_path}: {job} of 3, it's; $HOME *\n" for job in (1, 2, 3)}


@both
def test_a_failed_job_is_said_and_the_others_run(runner, tmp_path):
    result = runner("JOB=1:3", "x.JOB.log", "bash", "-c", "echo JOB; [ JOB != 2 ]")
    assert result.returncode == 1
    assert "x.2.log" in result.stderr or "x.*.log" in result.stderr
    assert (tmp_path / "x.3.log").read_text() == "3\n"


@both
def test_one_job_adds_its_output_to_the_log(runner, tmp_path):
    (tmp_path / "x.log").write_text("before\n")
    assert runner("x.log", "bash", "-c", 'echo "$PWD: $1"', "-", "JOB; it's $HOME *").returncode == 0
    assert (tmp_path / "x.log").read_text() == f"before\n{tmp_path}: JOB; it's $HOME *\n"
    assert runner("x.log", "bash", "-c", "exit 3").returncode != 0


@both
@pytest.mark.parametrize("args", [(), ("JOB=1:0", "log", "true"), ("JOB=1:2", "log"), ("log",)])
def test_wrong_use_is_one_line(runner, args):
    result = runner(*args)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("Usage: utils/run_")


@pytest.mark.parametrize("runner", RUNNERS[1:], indirect=True)
def test_slurm_gets_one_array_and_its_options(runner, tmp_path):
    assert runner("JOB=1:5", "x.JOB.log", "true").returncode == 0
    notes = (tmp_path / "notes").read_text().splitlines()
    assert {"--wait", "--array=1-5", "--output=x.%a.log", "--partition=cpu", "--comment=a b"} <= set(notes)


@pytest.mark.parametrize("runner", [("run_slurm.sh", "--nodes=2", "--cpus-per-task=8")], indirect=True)
def test_one_job_runs_once_on_each_node_with_all_its_cpus(runner, tmp_path):
    assert runner("x.log", "bash", "-c", 'echo "node $SLURM_NODEID"').returncode == 0
    assert (tmp_path / "x.log").read_text() == "node 0\nnode 1\n"
    notes = (tmp_path / "notes.srun").read_text().splitlines()
    assert {"--ntasks-per-node=1", "--kill-on-bad-exit=1", "--cpus-per-task=8"} <= set(notes)


REQUEUING = ("run_slurm.sh", "--nodes=2", "--requeue")


@pytest.mark.parametrize(
    ("runner", "statuses", "is_requeued"),
    [
        (REQUEUING, (STOPPED, STOPPED), True),
        (REQUEUING[:2], (STOPPED, STOPPED), False),
        (REQUEUING, (0, 0), False),
        (REQUEUING, (STOPPED, FAILED_ON_A_NODE), False),  # one failed, and the other was ended for it
        (REQUEUING, (1, 1), False),
    ],
    indirect=["runner"],
)
def test_a_job_that_was_stopped_is_requeued_if_asked_and_one_that_failed_is_not(
    runner, tmp_path, statuses, is_requeued
):
    result = runner("x.log", "bash", "-c", 'shift "$SLURM_NODEID"; exit "$1"', "-", *map(str, statuses))
    assert (result.returncode == 0) == (not any(statuses))
    asked = tmp_path / "notes.scontrol"
    assert (asked.exists() and asked.read_text() == "requeue 17\n") == is_requeued


def shown(capsys, *more: str) -> list[tuple[str, str]]:
    assert main(["show", "--conf", str(ROOT / "egs/multilingual12/conf/paper.yaml"), "corpora", *more]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    return [(corpus, lang) for corpus, _, _, *langs in lines for lang in langs]


@pytest.mark.parametrize("num_jobs", [1, 3, 30])
def test_the_shares_of_the_corpora_cover_each_language_once(capsys, num_jobs):
    whole = shown(capsys)
    parts = [shown(capsys, "--share", f"{job}/{num_jobs}") for job in range(1, num_jobs + 1)]
    assert sorted(pair for part in parts for pair in part) == sorted(whole)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/2/3"])
def test_a_share_that_is_none_is_refused(capsys, text):
    with pytest.raises(SystemExit):
        shown(capsys, "--share", text)
    assert f"'{text}' is not <job>/<number of jobs>" in capsys.readouterr().err

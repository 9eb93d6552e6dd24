"""Stages that are split into jobs: on this machine or as a Slurm array, the same work, each share once."""

import os
import subprocess
from pathlib import Path

import pytest

from zipperasr.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
SBATCH = r"""#!/usr/bin/env bash
# What Slurm does with an array, one task after the other; notes its options.
printf '%s\n' "$@" >"$NOTES"
cat >"$NOTES.script"
status=0
for arg in "$@"; do
  case $arg in
    --array=1-*) last=${arg#--array=1-} ;;
    --output=*) output=${arg#--output=} ;;
  esac
done
for ((task = 1; task <= last; task++)); do
  SLURM_ARRAY_TASK_ID=$task bash "$NOTES.script" >"${output//%a/$task}" 2>&1 </dev/null || status=$?
done
exit $status
"""


@pytest.fixture
def runner(request, tmp_path):
    """A function that runs a command by utils/<runner>.sh, with a stand-in for sbatch."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(SBATCH)
    sbatch.chmod(0o755)
    env = {**os.environ, "PATH": f"{sbatch.parent}:{os.environ['PATH']}", "NOTES": str(tmp_path / "notes")}
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
@pytest.mark.parametrize("args", [(), ("JOB=1:0", "log", "true"), ("JOB=1:2", "log"), ("log", "true")])
def test_wrong_use_is_one_line(runner, args):
    result = runner(*args)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("Usage: utils/run_")


@pytest.mark.parametrize("runner", RUNNERS[1:], indirect=True)
def test_slurm_gets_one_array_and_its_options(runner, tmp_path):
    assert runner("JOB=1:5", "x.JOB.log", "true").returncode == 0
    notes = (tmp_path / "notes").read_text().splitlines()
    assert {"--wait", "--array=1-5", "--output=x.%a.log", "--partition=cpu", "--comment=a b"} <= set(notes)


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

"""Ranks on the nodes of a Slurm step and on the hosts of a file: how they are found, and what is refused."""

import logging
import os
import sys
from pathlib import Path

import pytest
import torch

from zipperasr.cli.main import main
from zipperasr.errors import UserError
from zipperasr.training import launch
from zipperasr.training.launch import Nodes

TRAIN = ["train", "--conf", "x.yaml", "--stage", "1", "--data-dir", "data", "--run-dir", "exp"]
STEP = {
    "SLURM_JOB_ID": "4070042",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_NODEID": "1",
}
SCONTROL = """#!/usr/bin/env bash
case "$*" in
  "show hostnames gpu[07-08]") printf 'gpu07\\ngpu08\\n' ;;
  "show node gpu07") printf 'NodeName=gpu07 Arch=x86_64\\n   NodeAddr=127.0.0.1 NodeHostName=gpu07\\n' ;;
esac
"""
PDSH = r"""#!/usr/bin/env bash
# Runs a command for each host here, as pdsh does there.
while [[ $1 == -* ]]; do
  case $1 in -w) hosts=${2//,/ }; shift 2 ;; -f) shift 2 ;; *) shift ;; esac
done
status=0 number=0
for host in $hosts; do
  if [ "$host" = gone ]; then echo "pdsh@here: gone: ssh exited with exit code 255" >&2; status=255; continue; fi
  command="$*"
  bash -c "${command//%n/$number}" &
  number=$((number + 1))
done
while ((number--)); do wait -n || status=$?; done
exit $status
"""
SSH = "#!/usr/bin/env bash\necho 127.0.0.1\n"


@pytest.fixture(autouse=True)
def outside(monkeypatch):
    """No rank and no Slurm task, whatever runs the tests; the launcher's silence ends with the test."""
    for name in [name for name in os.environ if name.startswith("SLURM_")] + ["WORLD_SIZE", "TORCHELASTIC_RUN_ID"]:
        monkeypatch.delenv(name, raising=False)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Stand-ins for what a cluster has: scontrol, pdsh, ssh."""
    for name, script in (("scontrol", SCONTROL), ("pdsh", PDSH), ("ssh", SSH)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(script)
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


def set_step(monkeypatch, **changed):
    for name, value in {**STEP, **changed}.items():
        monkeypatch.setenv(name, value)


def test_fewer_gpus_than_ranks_are_refused_before_anything_starts(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.chdir(tmp_path)
    assert main([*TRAIN, "--ranks", "4"]) == 1
    said = capsys.readouterr().err
    assert "--ranks 4: 2 GPUs are visible here; give --ranks 2, or make more visible" in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_nodes_of_a_step_are_those_of_slurm(monkeypatch, commands):
    assert Nodes.of_slurm() is None
    set_step(monkeypatch)
    assert Nodes.of_slurm() == Nodes(2, 1, "127.0.0.1:20045", "4070042.3") and not launch.is_first_node()
    set_step(monkeypatch, SLURM_STEP_NUM_NODES="1", SLURM_STEP_NUM_TASKS="1", SLURM_NODEID="0")
    assert Nodes.of_slurm() == Nodes() and launch.is_first_node()


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"SLURM_JOB_NUM_NODES": "2"}, "this Slurm job has 2 nodes and would use one; start it by srun"),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "8"}, "this Slurm step has 8 tasks on 2 nodes; start it by srun"),
    ],
)
def test_a_job_without_one_task_on_each_node_is_refused(monkeypatch, capsys, env, said):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert main(TRAIN) == 1
    assert said in capsys.readouterr().err


def test_a_node_that_does_not_come_is_waited_for_no_longer_than_said(monkeypatch, commands):
    set_step(monkeypatch, SLURM_NODEID="0")
    with pytest.raises(UserError, match="2 nodes did not meet at 127.0.0.1:20045: "):
        launch.launch(TRAIN, num_ranks=1, meet_s=2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "hosts: no such hostfile; write lines like"),
        ("# none\n", "hosts: no hosts; write lines like"),
        ("gpu-1\n", "'gpu-1' is not a line `<host> slots=<GPUs>`"),
        ("gpu-1 slots=2\ngpu-1 slots=2\n", "'gpu-1 slots=2' is not a line `<host> slots=<GPUs>` of a host of its own"),
        ("gpu-1 slots=2\ngpu-2 slots=1\n", "gpu-2 has slots=1, fewer than --ranks 2"),
        ("gpu-1 slots=2\ngone slots=2\n", "not every host can be reached by ssh: pdsh@here: gone: ssh exited"),
    ],
)
def test_a_hostfile_that_cannot_be_used_is_one_line(commands, capsys, tmp_path, text, said):
    hostfile = tmp_path / "hosts"
    if text is not None:
        hostfile.write_text(text)
    assert main([*TRAIN, "--ranks", "2", "--hostfile", str(hostfile)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_hosts_need_pdsh(monkeypatch, capsys, tmp_path):
    (tmp_path / "hosts").write_text("gpu-1 slots=1\n")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert main([*TRAIN, "--hostfile", str(tmp_path / "hosts")]) == 1
    assert "--hostfile needs pdsh" in capsys.readouterr().err


def test_each_host_of_a_file_gets_its_ranks_and_their_failure_comes_back(commands, capfd, tmp_path):
    hostfile = tmp_path / "two hosts"
    hostfile.write_text("gpu-1 slots=1\ngpu-2 slots=2 # one of them is asked for\n")
    status = launch.launch([*TRAIN[:1], "--conf", "it's $HOME.yaml", *TRAIN[3:]], num_ranks=1, hostfile=hostfile)
    out, err = capfd.readouterr()
    assert status == 1
    count = (out + err).count("zipperasr: error: it's $HOME.yaml: no such configuration")
    assert count in (1, 2) and "Traceback" not in out + err  # the first one may have ended the other

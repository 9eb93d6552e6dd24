"""A Slurm of two nodes on this machine: a controller and two node daemons, without munge and cgroups."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

CONF = """ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
NodeName=first NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName=second NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4
PartitionName=all Nodes=ALL Default=YES State=UP
"""


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which sbatch and the like find the two nodes; they end with the block."""
    if not (shutil.which("slurmctld") and shutil.which("slurmd")):
        pytest.skip("Slurm is not here (on Debian: apt-get install slurm-wlm, as root)")
    if os.geteuid():
        pytest.skip("Slurm's daemons start jobs as root only")
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        ports = [s.getsockname()[1] for s in sockets]
    for name in ("state", "spool.first", "spool.second"):
        (folder / name).mkdir(parents=True)
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(folder=folder, ports=ports, user="root"))
    commands = [["slurmctld"], ["slurmd", "-N", "first"], ["slurmd", "-N", "second"]]
    with open(folder / "daemons.log", "w") as log:
        daemons = [subprocess.Popen([*c, "-D", "-f", str(conf)], stdout=log, stderr=log) for c in commands]
    env = {**os.environ, "SLURM_CONF": str(conf)}
    try:
        deadline = time.monotonic() + 20
        command = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
        while subprocess.run(command, env=env, capture_output=True, text=True).stdout.strip() != "2":
            assert time.monotonic() < deadline, (folder / "daemons.log").read_text()
            time.sleep(0.2)
        yield env
    finally:
        subprocess.run(["scancel", "--user=root"], env=env)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait()

"""Ranks of a training, each a process: on this machine, on every node of a Slurm step, or on the hosts of a file.

torch's elastic launcher starts them, without its traceback where one line is enough; on hosts, DeepSpeed's does.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from zipperasr.errors import UserError

STOPPED = 75
"""Exit status after SIGTERM (EX_TEMPFAIL): saved; run again, it goes on. utils/run_slurm.sh requeues such a job."""
FAILED_ON_A_NODE = 76
"""Exit status when a rank of several nodes fails. srun then ends the others by SIGTERM, and its own status is the
highest of all: above STOPPED, so that the job is not requeued."""
SAVING_S = 900
"""How long ranks that were asked to stop may take to save."""
CARRIED = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")
"""Variables that ranks on other hosts get too, beside those of Python and NCCL, which DeepSpeed carries."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say how many ranks there are, and where."""
    text = "processes of a node that share each batch, as many as its GPUs (default: 1)"
    parser.add_argument("--ranks", type=int, default=1, help=text)
    text = "lines `<host> slots=<GPUs>`: run on all of them, by DeepSpeed's launcher, pdsh and ssh"
    parser.add_argument("--hostfile", type=Path, help=text)


def is_rank() -> bool:
    """Whether this process is a rank that a launcher has started."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 or "TORCHELASTIC_RUN_ID" in os.environ


def is_needed(args: argparse.Namespace) -> bool:
    """Whether this process is to start ranks (`launch`) rather than to train itself."""
    return not is_rank() and (args.ranks > 1 or args.hostfile is not None or Nodes.of_slurm() is not None)


def is_first_node() -> bool:
    """Whether what is to be done once, after the ranks have ended, is to be done here."""
    return (Nodes.of_slurm() or Nodes()).rank == 0


def launch(argv: Sequence[str], *, num_ranks: int, hostfile: Path | None = None, meet_s: int = 300) -> int:
    """Run `zipperasr` with `argv` as `num_ranks` ranks on every node, and return its exit status.

    When one rank fails it has said why; the others are ended, and the status is 1, or FAILED_ON_A_NODE. SIGTERM and
    SIGINT reach every rank, and are waited for; the status is then STOPPED, or 130. Raises UserError where there are
    fewer GPUs than ranks, and when a host cannot be reached or a node's launcher has not come within `meet_s` seconds.
    """
    if hostfile:
        return _launch_on_hosts(argv, num_ranks=num_ranks, hostfile=hostfile)
    with _silenced():
        import torch.distributed
    _check_devices(num_ranks)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # this process only waits
    nodes = Nodes.of_slurm() or Nodes()
    config = LaunchConfig(
        min_nodes=nodes.num,
        max_nodes=nodes.num,
        nproc_per_node=num_ranks,
        run_id=nodes.run_id,
        rdzv_backend="static" if nodes.num > 1 else "c10d",
        rdzv_endpoint=nodes.endpoint,
        rdzv_configs={"rank": nodes.rank, "timeout": meet_s} if nodes.num > 1 else {},
        max_restarts=0,
        monitor_interval=0.2,
        shutdown_timeout=SAVING_S,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "zipperasr.cli", *argv)
    except ChildFailedError:
        return 1 if nodes.num == 1 else FAILED_ON_A_NODE
    except SignalException as stopped:
        for number in (signal.SIGTERM, signal.SIGINT):  # srun sends another one when the first node is through
            signal.signal(number, signal.SIG_IGN)
        return 130 if stopped.sigval == signal.SIGINT else STOPPED
    except torch.distributed.DistError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{nodes.num} nodes did not meet at {nodes.endpoint}: {reason}; run it again") from error
    return 0


@dataclass(frozen=True)
class Nodes:
    """The nodes that this launcher shares a training with, and its place among them."""

    num: int = 1
    rank: int = 0
    endpoint: str = "localhost:0"
    run_id: str = ""

    @classmethod
    def of_slurm(cls) -> Nodes | None:
        """Those of the Slurm step that this process is a task of; None outside a step.

        Raises UserError unless the step has one task on each node.
        """
        env = os.environ
        mend = "start it by srun --ntasks-per-node=1, as utils/run_slurm.sh does; it starts --ranks ranks on each node"
        if "SLURM_STEP_NUM_NODES" not in env:
            if int(env.get("SLURM_JOB_NUM_NODES", 1)) > 1:
                raise UserError(f"this Slurm job has {env['SLURM_JOB_NUM_NODES']} nodes and would use one; {mend}")
            return None
        num, num_tasks = int(env["SLURM_STEP_NUM_NODES"]), int(env["SLURM_STEP_NUM_TASKS"])
        if num != num_tasks:
            raise UserError(f"this Slurm step has {num_tasks} tasks on {num} nodes; {mend}")
        if num == 1:
            return cls()
        job, step = env["SLURM_JOB_ID"], env["SLURM_STEP_ID"]
        first = _scontrol("hostnames", env["SLURM_STEP_NODELIST"]).split()[0]
        address = re.search(r"NodeAddr=(\S+)", _scontrol("node", first))[1]  # a node's name need not be a host's
        port = 10000 + (int(job) + int(step)) % 20000  # below those that systems give to clients
        return cls(num, int(env["SLURM_NODEID"]), f"{address}:{port}", f"{job}.{step}")


def _scontrol(what: str, names: str) -> str:
    return subprocess.run(["scontrol", "show", what, names], stdout=subprocess.PIPE, text=True, check=True).stdout


@contextmanager
def _silenced() -> Iterator[None]:
    """torch, if imported in the block, prints no C++ traces of connections that the other nodes' end has cut."""
    added = {"TORCH_CPP_LOG_LEVEL": "FATAL"} if "TORCH_CPP_LOG_LEVEL" not in os.environ else {}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:  # the ranks say what they have to say
            del os.environ[name]


def _check_devices(num_ranks: int) -> None:
    import torch

    num_gpus = torch.cuda.device_count()
    if 0 < num_gpus < num_ranks:
        mend = f"give --ranks {num_gpus}, or make more visible (CUDA_VISIBLE_DEVICES, --gpus-per-node of Slurm)"
        raise UserError(f"--ranks {num_ranks}: {num_gpus} GPUs are visible here; {mend}")


def _launch_on_hosts(argv: Sequence[str], *, num_ranks: int, hostfile: Path) -> int:
    """DeepSpeed's launcher: it carries signals to the ranks, and gives them 30 s to save."""
    hosts = _read_hostfile(hostfile, num_ranks)
    _check_hosts(hosts)
    rank = [*(f"{name}={os.environ[name]}" for name in CARRIED if name in os.environ), sys.executable]
    rank += ["-m", "zipperasr.cli", *argv]
    options = ["--hostfile", str(hostfile), "--num_gpus", str(num_ranks), "--force_multi", "--no_ssh_check", "--quiet"]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *options, "--no_local_rank", "--no_python", "env"]
    command += map(_quoted, rank)
    process = subprocess.Popen(command, start_new_session=True)  # a terminal's Ctrl-C reaches it once, through us
    asked = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: (asked.append(number), process.send_signal(number)))
    status = process.wait()
    if asked:
        return 130 if asked[0] == signal.SIGINT else STOPPED
    return 1 if status else 0


def _quoted(text: str) -> str:
    """`text` as the hosts' shells read it back; around what has spaces, DeepSpeed puts double quotes itself."""
    return re.sub(r"([\\$`])", r"\\\1", text) if " " in text else shlex.quote(text)


def _read_hostfile(path: Path, num_ranks: int) -> list[str]:
    """The hosts of a hostfile. Raises UserError for what is none, and for hosts with too few slots."""
    if not path.is_file():
        raise UserError(f"{path}: no such hostfile; write lines like `gpu-1 slots=4` into it")
    lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    slots = {}
    for line in filter(None, lines):
        found = re.fullmatch(r"(\S+)\s+slots=(\d+)", line)
        if not found or found[1] in slots:
            raise UserError(f"{path}: '{line}' is not a line `<host> slots=<GPUs>` of a host of its own")
        slots[found[1]] = int(found[2])
    if not slots:
        raise UserError(f"{path}: no hosts; write lines like `gpu-1 slots=4` into it")
    for host, num in slots.items():
        if num < num_ranks:
            raise UserError(f"{path}: {host} has slots={num}, fewer than --ranks {num_ranks}; lower --ranks")
    return list(slots)


def _check_hosts(hosts: Sequence[str]) -> None:
    """Raise UserError unless each host lets us in without being asked for a password."""
    if not shutil.which("pdsh"):
        raise UserError("--hostfile needs pdsh (a package of that name); install it, or run under Slurm")
    options = {"PDSH_RCMD_TYPE": "ssh", "PDSH_SSH_ARGS_APPEND": "-o BatchMode=yes"}
    command = ["pdsh", "-S", "-w", ",".join(hosts), "true"]
    found = subprocess.run(command, env=options | os.environ, capture_output=True, text=True)
    if found.returncode:
        said = found.stderr.strip().replace("\n", "; ")
        raise UserError(f"not every host can be reached by ssh: {said}; set up ssh keys, or mend the hostfile")

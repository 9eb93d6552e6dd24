"""The machine: Python, processors, memory, GPUs and installed packages."""

import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path

from zipperasr.training.preflight import GIB, Finding, gib

SHM_PER_GPU = GIB
"""Of /dev/shm: the batches that loader workers hand over, about 100 MB each, and NCCL's buffers."""
MIN_OPEN_FILES = 1024
FIRST_WITH_BF16 = 8
"""Compute capability (Ampere)."""

ok, warning, error = (partial(Finding, "machine", level) for level in ("ok", "warning", "error"))


@dataclass(frozen=True)
class Gpu:
    """A GPU that this process sees; `memory` in bytes, `capability` the first number of NVIDIA's compute capability."""

    name: str
    memory: int
    capability: int


@dataclass(frozen=True)
class Machine:
    """What training depends on. `memory` is what a container may use; None stands for what is not there."""

    python: str = "3.11.0"
    num_cores: int = 1
    memory: int = 0
    shm: int | None = None
    open_files: int = MIN_OPEN_FILES
    torch: str = ""
    cuda: str | None = None
    nccl: str | None = None
    driver: str | None = None
    gpus: tuple[Gpu, ...] = ()
    packages: Mapping[str, str] = field(default_factory=dict)
    pinned: Mapping[str, str] = field(default_factory=dict)
    torchaudio_failure: str | None = None
    """Why torchaudio, where it stands beside a PyTorch without CUDA, cannot be imported."""

    @property
    def gpu_memory(self) -> int | None:
        """Bytes of the smallest GPU."""
        return min((gpu.memory for gpu in self.gpus), default=None)


def describe() -> Machine:
    """This machine."""
    import torch

    cuda, packages = torch.version.cuda, {_plain(d.name): d.version for d in metadata.distributions() if d.name}
    shm = Path("/dev/shm")
    return Machine(
        python=platform.python_version(),
        num_cores=len(os.sched_getaffinity(0)),
        memory=memory_bytes(),
        shm=shutil.disk_usage(shm).total if shm.is_dir() else None,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        torch=torch.__version__,
        cuda=cuda,
        nccl=".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        driver=_driver(),
        gpus=tuple(_gpu(torch.cuda.get_device_properties(i)) for i in range(torch.cuda.device_count())),
        packages=packages,
        pinned=_pinned(),
        torchaudio_failure=_failure("torchaudio") if "torchaudio" in packages and not cuda else None,
    )


def check(machine: Machine, *, num_gpus: int) -> Iterator[Finding]:
    """Findings on the machine that is to train with `num_gpus` of its GPUs."""
    yield ok(f"Python {machine.python}, {machine.num_cores} CPU cores, {gib(machine.memory)} of memory")
    yield from _check_torch(machine, num_gpus)
    yield from _check_gpus(machine, num_gpus)
    yield from _check_limits(machine, num_gpus)
    yield from _check_packages(machine)


def _check_torch(machine: Machine, num_gpus: int) -> Iterator[Finding]:
    built = f"CUDA {machine.cuda}, NCCL {machine.nccl}" if machine.cuda else "without CUDA"
    if num_gpus and not machine.cuda:
        mend = "point pip at PyTorch's CUDA wheels and delete .venv (path.sh makes it again)"
        yield error(f"PyTorch {machine.torch} is built {built}, and --ngpu asks for {num_gpus} GPUs; {mend}")
    else:
        yield ok(f"PyTorch {machine.torch}, {built}")
    if machine.torchaudio_failure:
        said = f"torchaudio cannot be imported ({machine.torchaudio_failure})"
        yield error(f"{said}, and PEFT and transformers fail with it; pip uninstall torchaudio")


def _check_gpus(machine: Machine, num_gpus: int) -> Iterator[Finding]:
    driver = f"driver {machine.driver}" if machine.driver else "driver unknown"
    for number, gpu in enumerate(machine.gpus):
        yield ok(f"GPU {number}: {gpu.name}, {gib(gpu.memory)}, {driver}")
    if not machine.gpus and not num_gpus:
        yield ok("no GPU: training runs on the CPU, in fp32")
    if machine.driver and machine.cuda and not machine.gpus:
        reasons = f"is CUDA_VISIBLE_DEVICES empty, or the driver too old for CUDA {machine.cuda}?"
        yield warning(f"{driver} is there, but no GPU is visible: {reasons} See nvidia-smi")
    if machine.cuda and len(machine.gpus) < num_gpus:
        mend = "ask for fewer, or see CUDA_VISIBLE_DEVICES and the job's --gres"
        yield error(f"{num_gpus} GPUs are asked for and {len(machine.gpus)} are visible; {mend}")
    if len({gpu.name for gpu in machine.gpus[:num_gpus]}) > 1:
        yield warning("the GPUs are unlike: every step waits for the slowest; choose by CUDA_VISIBLE_DEVICES")
    if old := {gpu.name for gpu in machine.gpus[:num_gpus] if gpu.capability < FIRST_WITH_BF16}:
        yield error(f"{', '.join(sorted(old))}: no bf16, in which GPUs are trained; use Ampere (A100) or newer")


def _check_limits(machine: Machine, num_gpus: int) -> Iterator[Finding]:
    if machine.shm is not None:
        wanted = max(1, num_gpus) * SHM_PER_GPU
        said, mend = f"/dev/shm has {gib(machine.shm)}", f"--shm-size={wanted // GIB}g or --ipc=host in Docker"
        if machine.shm >= wanted:
            yield ok(said)
        else:
            why = "loader workers hand over batches there" + (", and NCCL needs it" if num_gpus else "")
            yield (error if num_gpus else warning)(f"{said}: {why}; {mend}")
    if 0 <= machine.open_files < MIN_OPEN_FILES:  # -1 is no limit
        yield warning(f"{machine.open_files} open files are allowed; ulimit -n 4096")


def _check_packages(machine: Machine) -> Iterator[Finding]:
    if not machine.pinned:
        return
    wrong = [
        f"{name} {machine.packages.get(name, 'missing')} (wanted {wanted})"
        for name, wanted in machine.pinned.items()
        if _public(machine.packages.get(name)) != wanted and not (name == "torchaudio" and not machine.cuda)
    ]
    if wrong:
        some = ", ".join(wrong[:5]) + (" ..." if len(wrong) > 5 else "")
        yield warning(f"{len(wrong)} packages are not those of constraints.txt: {some}; `. ./path.sh` in the checkout")
    else:
        yield ok(f"{len(machine.pinned)} packages are those of constraints.txt")


def memory_bytes() -> int:
    """Bytes that this process may use: the machine's, or its container's if that has fewer."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(limits + ([int(text)] if text.isdecimal() else []))


def _gpu(properties) -> Gpu:
    return Gpu(properties.name, properties.total_memory, properties.major)


def _driver() -> str | None:
    """The version that nvidia-smi tells, if it does."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return told[0].strip() if told else None


def _failure(module: str) -> str | None:
    """The last line of the error that importing `module` gives."""
    code = f"import {module}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = run.stderr.strip().splitlines()
    return (lines[-1] if lines else f"status {run.returncode}") if run.returncode else None


def _pinned() -> dict[str, str]:
    """The versions of constraints.txt that count for this Python; none outside a checkout."""
    from packaging.requirements import Requirement

    path = Path(__file__).resolve().parents[3] / "constraints.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {
        _plain(one.name): next(iter(one.specifier)).version
        for one in wanted
        if one.marker is None or one.marker.evaluate()
    }


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _public(version: str | None) -> str | None:
    """A version without what a build adds, as in 2.13.0+cu128."""
    return version and version.partition("+")[0]

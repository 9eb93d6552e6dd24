"""Checkpoints of a run: `checkpoints/step-N/` is whole or absent, whenever the run is killed.

- trainable.safetensors: the weights that are trained, in fp32, for everybody
- optimizer.safetensors: AdamW's moments of each, for resuming with any number of ranks; only the newest keeps it
- state.json: where the run stands
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from zipperasr import files
from zipperasr.errors import UserError
from zipperasr.model import WEIGHTS, checkpoints_by_step

if TYPE_CHECKING:
    from torch import Tensor

OPTIMIZER = "optimizer.safetensors"


@dataclass
class State:
    """Where a run stands after `step` steps; data, schedule and random draws all follow from the step."""

    num_slots: int
    """Micro-batches of a step, over all ranks."""
    rows_per_batch: int
    """Rows of a micro-batch."""
    step: int = 0
    mean_loss: float | None = None
    """Running mean over steps, in nats a token."""
    lowest_mean: float | None = None
    audio_s: float = 0.0
    wall_s: float = 0.0
    optimizer_steps: list[int] = field(default_factory=list)
    """Of each parameter group: one whose language was absent has taken fewer."""
    dev: float | None = None
    """What `keep_best` goes by, if the dev lists were passed at this step."""


def newest(run_dir: Path) -> State | None:
    """Where the checkpoint stands that the run would go on from; None without one."""
    path = _resumable(run_dir)
    return State(**files.read_json(path / "state.json")) if path else None


@contextlib.contextmanager
def reading(run_dir: Path) -> Iterator[Callable[[str, str], Tensor]]:
    """Within the block, a function that reads a tensor of that checkpoint by its file and its name.

    Raises UserError when a file is broken.
    """
    from safetensors import SafetensorError, safe_open

    path = _resumable(run_dir)
    try:
        with safe_open(path / WEIGHTS, "pt") as weights, safe_open(path / OPTIMIZER, "pt") as optimizer:
            stored = {WEIGHTS: weights, OPTIMIZER: optimizer}
            yield lambda file, name: stored[file].get_tensor(name)
    except SafetensorError as error:
        raise UserError(f"{path}: broken ({error}); delete it and run again, from the checkpoint before it") from error


class Writer:
    """Writes checkpoints in a thread, one after another, while training goes on. Only rank 0 has one.

    Whoever calls `save` or `wait` gets the exception of the write before; UserError when the disk is full.
    """

    def __init__(self, run_dir: Path, *, keep_last: int, keep_best: int):
        self.run_dir, self.keep_last, self.keep_best = run_dir, keep_last, keep_best
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self.pending: Future | None = None

    def save(self, state: State, weights: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        """Begin to write; the tensors, on the CPU, are the writer's from now on."""
        self.wait()
        self.pending = self.pool.submit(self._write, asdict(state), weights, optimizer)

    def wait(self, *, only_if_done: bool = False) -> None:
        """Return when nothing is being written any more; with `only_if_done`, at once."""
        if self.pending and not (only_if_done and not self.pending.done()):
            pending, self.pending = self.pending, None
            pending.result()

    def _write(self, state: dict, weights: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        from zipperasr.model.tensors import write_tensors

        path = self.run_dir / "checkpoints" / f"step-{state['step']}"
        temporary = path.with_name(f".tmp-{path.name}")
        try:
            with files.writing(path):
                temporary.mkdir(parents=True, exist_ok=True)
                for name, tensors in ((WEIGHTS, weights), (OPTIMIZER, optimizer)):
                    write_tensors(temporary / name, tensors)
                    files.flush(temporary / name)
                files.write_json(temporary / "state.json", state)
                _remove(path)
                os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._prune()

    def _prune(self) -> None:
        """Drop what is needed no longer: checkpoints neither recent nor good, and the moments of all but the newest."""
        *older, last = checkpoints_by_step(self.run_dir).values()
        rated = [(files.read_json(path / "state.json")["dev"], path) for path in [*older, last]]
        best = [path for _, path in sorted((dev, path) for dev, path in rated if dev is not None)[: self.keep_best]]
        for position, path in enumerate(reversed(older), start=2):
            (path / OPTIMIZER).unlink(missing_ok=True)
            if position > self.keep_last and path not in best:
                _remove(path)


def clean(run_dir: Path) -> None:
    """Remove what a killed run left half-written."""
    for path in list((run_dir / "checkpoints").glob("**/.tmp-*")):
        shutil.rmtree(path, ignore_errors=True)


def finish(run_dir: Path) -> None:
    """Remove the optimizer's state of a finished run: its weights are all that is needed."""
    for path in checkpoints_by_step(run_dir).values():
        (path / OPTIMIZER).unlink(missing_ok=True)


def _resumable(run_dir: Path) -> Path | None:
    paths = reversed(checkpoints_by_step(run_dir).values())
    return next((path for path in paths if (path / OPTIMIZER).is_file()), None)


def _remove(path: Path) -> None:
    """Remove a directory so that it is whole or gone for any reader."""
    hidden = path.with_name(f".tmp-old-{path.name}")
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, hidden)
        shutil.rmtree(hidden)

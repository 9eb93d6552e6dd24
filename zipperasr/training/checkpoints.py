"""Checkpoints of a run: `checkpoints/step-N/` is whole or absent, whenever the run is killed.

- trainable.safetensors: the weights that are trained, for everybody
- state.json: where the run stands
- engine/: DeepSpeed's state, for resuming; only the newest checkpoint keeps it
"""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zipperasr import files
from zipperasr.errors import UserError
from zipperasr.model import checkpoints_by_step

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

ENGINE = "engine"
FULL = 1 << 20
"""A disk with fewer bytes left is full."""


@dataclass
class State:
    """Where a run stands after `step` steps; data, schedule and random draws all follow from the step."""

    num_ranks: int
    step: int = 0
    mean_loss: float | None = None
    """Running mean over steps, in nats a token."""
    audio_s: float = 0.0
    wall_s: float = 0.0


def save(engine: DeepSpeedEngine, state: State, *, run_dir: Path, keep_last: int) -> None:
    """Write the checkpoint of `state.step` beside and rename it; then drop what older ones need no longer.

    Every rank calls this: each writes its own part of the engine's state. Raises UserError when the disk is full.
    """
    from torch import distributed

    from zipperasr.model.checkpoint import save_trainable

    path = run_dir / "checkpoints" / f"step-{state.step}"
    temporary, is_first = path.with_name(f".tmp-{path.name}"), engine.global_rank == 0
    try:
        engine.save_checkpoint(temporary, tag=ENGINE, save_latest=False, exclude_frozen_parameters=True)
        distributed.barrier()
        if is_first:
            for script in temporary.glob("zero_to_*.py"):  # DeepSpeed's converters: the weights are plain already
                script.unlink()
            save_trainable(engine.module, temporary)
            files.write_json(temporary / "state.json", asdict(state))
            _remove(path)
            os.replace(temporary, path)
    except RuntimeError as error:  # torch's writer does not say why it failed
        if shutil.disk_usage(run_dir).free < FULL:
            raise UserError(f"{path}: the disk is full; free some space and run the same command again") from error
        raise
    finally:
        if is_first:
            shutil.rmtree(temporary, ignore_errors=True)
    if is_first:
        older = list(checkpoints_by_step(run_dir).values())[:-1]
        for checkpoint in older:
            _remove(checkpoint / ENGINE)
        for checkpoint in older[: len(older) + 1 - keep_last]:
            _remove(checkpoint)


def resume(engine: DeepSpeedEngine, *, run_dir: Path) -> State:
    """Load the newest checkpoint that has the engine's state and return where it stands; a new State without one.

    Raises UserError when the run began with another number of ranks, because they share the data differently.
    """
    path = next((path for path in reversed(checkpoints_by_step(run_dir).values()) if (path / ENGINE).is_dir()), None)
    if path is None:
        return State(num_ranks=engine.world_size)
    state = State(**files.read_json(path / "state.json"))
    if state.num_ranks != engine.world_size:
        raise UserError(
            f"{path}: saved by {state.num_ranks} ranks, resumed with {engine.world_size}; "
            f"resume with {state.num_ranks}, or begin anew in another --exp-dir"
        )
    engine.load_checkpoint(path, tag=ENGINE, load_module_strict=False)
    return state


def clean(run_dir: Path) -> None:
    """Remove what a killed run left half-written."""
    for path in list((run_dir / "checkpoints").glob("**/.tmp-*")):
        shutil.rmtree(path, ignore_errors=True)


def drop_engine(run_dir: Path) -> None:
    """Remove the engine's state of a finished run: its weights are all that is needed."""
    for path in checkpoints_by_step(run_dir).values():
        _remove(path / ENGINE)


def _remove(path: Path) -> None:
    """Remove a directory so that it is whole or gone for any reader."""
    hidden = path.with_name(f".tmp-old-{path.name}")
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, hidden)
        shutil.rmtree(hidden)

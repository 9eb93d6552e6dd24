"""Whether the heaviest batch fits into memory: tried before training starts, not found out hours later."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import distributed

from zipperasr.adapters import adapted_layers
from zipperasr.data.packing import Example, make_batch
from zipperasr.errors import UserError
from zipperasr.model import EncoderSettings
from zipperasr.training.preflight import GIB, machine

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MARGIN = 0.92
"""Share of the memory that `largest` fills: the allocator's gaps and the communication buffers need the rest."""


class Trial:
    """Forward and backward passes on the rows with the most speech, which no step of training will exceed.

    Every rank makes the same ones at the same time. They leave neither gradients nor anything else behind.
    """

    def __init__(
        self, engine: DeepSpeedEngine, examples: Sequence[Example], rows: Sequence[list[int]], encoder: EncoderSettings
    ):
        self.engine = engine
        frames = [sum(examples[i].utterance.num_frames for i in row) for row in rows]
        heaviest = sorted(range(len(rows)), key=frames.__getitem__, reverse=True)[:512]
        self.rows = [[examples[i] for i in rows[at]] for at in heaviest]
        self.context = encoder.context
        self.chunk_s = max(encoder.chunk_durations_s) if encoder.context == "chunked" else None

    def check(self, num_rows: int) -> str:
        """Try batches of `num_rows` rows; a line that says what they took. Raises UserError where they do not fit."""
        examples = list(chain.from_iterable(self.rows[:num_rows]))
        audio_s, tokens = sum(x.utterance.num_frames for x in examples) / 100, sum(x.num_tokens for x in examples)
        what = f"heaviest batch ({num_rows} rows, {audio_s:,.0f} s of audio, {tokens:,} tokens)"
        peak, total = self.peak(num_rows), total_bytes(self.engine.device)
        if peak is None:
            raise UserError(does_not_fit(what, self.engine.module.stage, self.context, total))
        return f"{what}: {peak / GIB:.1f} of {total / GIB:.1f} GiB"

    def largest(self, limit: float | None = None) -> int:
        """The most rows of a batch that take at most `limit` bytes (by default most of what is free).

        The first trials, with one and two rows, say where to look.
        """
        limit = limit or MARGIN * free_bytes(self.engine.device)
        one, two = self.peak(1), self.peak(min(2, len(self.rows)))
        if one is None or two is None:
            return 1
        fits = lambda n: (peak := self.peak(n)) is not None and peak <= limit  # noqa: E731
        num_rows = min(len(self.rows), max(1, 1 + int((limit - one) / max(two - one, 1))))
        while num_rows > 1 and not fits(num_rows):
            num_rows = num_rows * 9 // 10
        while num_rows < len(self.rows) and fits(more := min(len(self.rows), num_rows + max(1, num_rows // 16))):
            num_rows = more
        return num_rows

    def peak(self, num_rows: int) -> float | None:
        """The bytes that a batch takes at most, on the rank that takes most; None where it does not fit on one.

        Its features are zeros, so that nothing is read.
        """
        model, num_bins = self.engine.module.train(), self.engine.module.encoder.conv1.in_channels
        batch = make_batch(
            self.rows[:num_rows],
            features=lambda u: torch.zeros(u.num_frames, num_bins),
            ctc_targets=model.units and model.units.targets,
        )
        batch = batch.to(self.engine.device)
        wanted = [p for p in model.parameters() if p.requires_grad]

        def both_passes() -> None:
            torch.autograd.grad(model(batch, self.chunk_s).total(1.0), wanted, allow_unused=True)

        try:
            peak = peak_bytes(both_passes, self.engine.device)
        except torch.OutOfMemoryError:
            peak = float("inf")
        for layer in adapted_layers(model).values():
            if layer.balances:
                layer.load.zero_()
        most = torch.tensor(peak, dtype=torch.float64, device=self.engine.device)
        distributed.all_reduce(most, distributed.ReduceOp.MAX)
        return None if most.isinf() else most.item()


def does_not_fit(what: str, stage: int, context: str, total: float) -> str:
    """The message for a batch that is too much for a GPU of `total` bytes."""
    return (
        f"{what} does not fit into the {total / GIB:.0f} GiB of this GPU; set training.stage{stage}.recompute_encoder "
        f"nearer to 1, then recompute_llm, or lower data.packing.rows_per_batch.{context} and raise accumulation"
    )


def peak_bytes(function: Callable[[], None], device: torch.device) -> float:
    """The most memory that this process held while it called `function`: of the GPU, or resident on a CPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):  # in a container that forbids it, the peak is that since the process began
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts anew
    function()
    return _kib("/proc/self/status", "VmHWM")


def total_bytes(device: torch.device) -> float:
    """The memory of a GPU, or what this process may use of the machine's."""
    is_cuda = device.type == "cuda"
    return torch.cuda.get_device_properties(device).total_memory if is_cuda else machine.memory_bytes()


def free_bytes(device: torch.device) -> float:
    """What this process may hold in all: of its GPU, or a rank's share of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return _kib("/proc/self/status", "VmRSS") + _kib("/proc/meminfo", "MemAvailable") / ranks


def _kib(file: str, field: str) -> float:
    """A line of a table of the kernel's, in bytes."""
    line = next(line for line in Path(file).read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])

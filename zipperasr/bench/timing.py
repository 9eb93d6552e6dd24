"""Interleaved timing, and what a benchmark reports.

A machine that others use, or that grows warm, is not equally fast all the time. So every case runs once in each round,
in turn; a case is compared with another of the same round, and the median is taken over rounds.
"""

import platform
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from zipperasr import files, markdown
from zipperasr.model.clock import clock

WARM_UP = 2  # rounds that are not counted
Cell = str | float | int | None
Row = dict[str, Cell]
K = TypeVar("K", bound=Hashable)


def device(threads: int | None) -> dict[str, Any]:
    """Where tensors go, and their dtype: a GPU in bf16, else the CPU in fp32; sets the process's CPU `threads`."""
    if threads:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        return {"device": "cuda", "dtype": torch.bfloat16}
    return {"device": "cpu", "dtype": torch.float32}


def header(at: dict[str, Any]) -> Row:
    """What a report says of the machine."""
    name = torch.cuda.get_device_name() if at["device"] == "cuda" else _cpu_name()
    dtype = str(at["dtype"]).removeprefix("torch.")
    return {"device": name, "dtype": dtype, "torch": torch.__version__, "threads": torch.get_num_threads()}


def interleave(
    steps: Mapping[K, Callable[[], object]], *, rounds: int, title: str, clock: Callable[[], float] = clock
) -> dict[K, list[float]]:
    """The seconds of every step in each of `rounds`, which WARM_UP more precede; a round runs each step once, in turn.

    title: of the progress bar, which a terminal shows.
    """
    seconds: dict[K, list[float]] = {key: [] for key in steps}
    for _ in tqdm(range(WARM_UP + rounds), desc=title, unit="round", leave=False, disable=None):
        for key, step in steps.items():
            start = clock()
            step()
            seconds[key].append(clock() - start)
    return {key: taken[WARM_UP:] for key, taken in seconds.items()}


def peak_flops(device: str, dtype: torch.dtype) -> float:
    """FLOPs a second of a large product of matrices: what this device can do, the best of a few."""
    size, times = (8192, 20) if device == "cuda" else (2048, 5)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = interleave({"": lambda: a @ b}, rounds=times, title="peak")[""]
    return 2 * size**3 / min(seconds)


def ratio(seconds: Sequence[float], baseline: Sequence[float]) -> float:
    """The median over rounds of the ratio within a round."""
    return round(statistics.median(a / b for a, b in zip(seconds, baseline, strict=True)), 3)


@dataclass(frozen=True)
class Target:
    """A figure and its limit; value is None where it was not measured."""

    what: str
    value: float | None
    limit: float
    relation: str = "<="

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        is_met = self.value <= self.limit if self.relation == "<=" else self.value >= self.limit
        return "met" if is_met else "missed"


@dataclass(frozen=True)
class Report:
    """What was measured, and where."""

    header: Row
    rows: list[Row]
    targets: list[Target]

    def text(self) -> str:
        """The header, the rows as a Markdown table, and a line for each target."""
        header = "".join(f"{key}: {_text(value)}\n" for key, value in self.header.items())
        targets = "\n".join(f"{t.what}: {_text(t.value)} {t.relation} {t.limit:.2f}, {t.verdict}" for t in self.targets)
        return f"{header}\n{_table(self.rows)}\n{targets}"

    def write_json(self, path: Path) -> None:
        """The same figures as JSON."""
        targets = [{**asdict(target), "verdict": target.verdict} for target in self.targets]
        files.write_json(path, {"header": self.header, "rows": self.rows, "targets": targets})


def _table(rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return markdown.table(columns, ([_text(row.get(column)) for column in columns] for row in rows))


def _text(cell: Cell) -> str:
    if cell is None:
        return "–"
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)


def _cpu_name() -> str:
    """The processor's model, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())

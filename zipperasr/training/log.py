"""What a run says while it trains: log.jsonl (every step), TensorBoard and a progress bar."""

import json
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from zipperasr import files


class RunLog:
    """The log of a run from step `start` on, kept by rank 0; lines of later steps, from before a kill, are dropped.

    On a terminal there is a bar, elsewhere a line every so many steps.
    """

    def __init__(self, run_dir: Path, *, start: int, total: int, every: int, rank: int = 0):
        self.enabled = rank == 0
        if not self.enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        path = run_dir / "log.jsonl"
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= start]
        with files.write(path) as stream:
            stream.writelines(kept)
        self.every, self.total = every, total
        self.stream = open(path, "a", encoding="utf-8", newline="\n", buffering=1)  # noqa: SIM115
        self.tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start + 1)
        self.bar = tqdm(total=total, initial=start, unit="step", desc=run_dir.name, mininterval=1.0, disable=None)
        self.first, self.began = start, time.monotonic()

    def write(self, row: dict[str, Any]) -> None:
        """Record one step."""
        if not self.enabled:
            return
        self.stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.bar.update()
        if row["step"] % self.every == 0 or row["step"] == self.total or "dev_loss" in row:
            self.bar.set_postfix_str(_figures(row), refresh=False)
            if self.bar.disable:
                left = self._left(row["step"])
                print(f"step {row['step']:,} of {self.total:,}: {_figures(row)}, {left} left", flush=True)
            for name, value in _scalars(row):
                self.tensorboard.add_scalar(name, value, row["step"])

    def say(self, *lines: str) -> None:
        """Print lines, beside the bar if there is one."""
        for line in lines if self.enabled else ():
            tqdm.write(line)

    def _left(self, step: int) -> str:
        """The time to the last step, at the pace so far."""
        pace_s = (time.monotonic() - self.began) / max(1, step - self.first)
        return tqdm.format_interval(pace_s * (self.total - step))

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            self.bar.close()
            self.tensorboard.close()
            self.stream.close()


def _lines(path: Path) -> list[str]:
    """The whole lines of a log; the last one is not, if the run was killed while writing it."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return lines if not lines or lines[-1].endswith("\n") else lines[:-1]


def _figures(row: dict[str, Any]) -> str:
    """What is said of a step; hours of audio an hour are seconds a second."""
    figures = f"loss {row['loss']:.3f}, {row['audio_s_per_s']:,.0f} h/h, {row['tokens_per_s']:,.0f} tokens/s"
    figures += f", {row['tflops']:.1f} TFLOP/s" if row["tflops"] >= 1 else ""
    figures += f" (MFU {row['mfu']:.0%})" if "mfu" in row else ""
    others = ("ctc_loss", "dev_loss", "dev_error")
    return figures + "".join(f", {name} {row[name]:.2f}" for name in others if name in row)


def _scalars(row: dict[str, Any]) -> list[tuple[str, float]]:
    """`loss_per_lang: {de: 1.0}` becomes `loss_per_lang/de`."""
    dicts = [(name, value) for name, value in row.items() if isinstance(value, dict)]
    flat = [(name, value) for name, value in row.items() if isinstance(value, int | float) and name != "step"]
    return flat + [(f"{name}/{key}", x) for name, value in dicts for key, x in value.items()]

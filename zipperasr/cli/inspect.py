"""Print what a checkpoint holds: its stage, its adapter, how many numbers, and how its routers share the ranks.

Nothing but the run directory is read.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zipperasr import files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="a run directory (its latest checkpoint) or a checkpoint folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same figures as JSON too")


def run(args: argparse.Namespace) -> None:
    from zipperasr.model.inspect import inspect

    figures = inspect(args.folder)
    print("\n".join(_lines(figures)))
    if args.json:
        files.write_json(args.json, figures)


def _lines(figures: dict[str, Any]) -> Iterator[str]:
    counts, adapter = figures["parameters"], figures.get("adapter")
    yield f"{figures['checkpoint']}: stage {figures['stage']}"
    yield f"parameters  {counts['total']:,}: {_listed(counts['by_part'])}"
    if adapter:
        yield f"adapter     {adapter['method']}, rank {adapter['rank']}, alpha {adapter['alpha']:g}"
        yield f"languages   {' '.join(adapter['langs'])}"
        yield f"of encoder  {_listed(counts['adapter'])}"
    if share := figures.get("specific_share"):
        yield from _table(share)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _table(share: dict[str, list[float]]) -> Iterator[str]:
    """A language a row, an encoder block a column."""
    num_blocks = len(next(iter(share.values())))
    yield "share of specific ranks, a column for each encoder block:"
    yield f"{'':<6}{' mean'}  {''.join(f'{block:>5}' for block in range(num_blocks))}"
    for lang, row in share.items():
        yield f"{lang:<6}{sum(row) / num_blocks:5.2f}  {''.join(f'{value:5.2f}' for value in row)}"

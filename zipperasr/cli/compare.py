"""`zipperasr compare`: whether the error rates of two systems differ, in which languages, and in which utterances."""

import argparse
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zipperasr.scoring.compare import Pair, Row
    from zipperasr.scoring.score import Aligned

HEADER = ("language", "A", "B", "B - A", "95% interval", "p", "", "better", "worse", "equal")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    of = "a run, or the decode directory of a set"
    parser.add_argument("a", type=Path, metavar="A", help=of)
    parser.add_argument("b", type=Path, metavar="B", help=f"{of}, to be compared with A")
    parser.add_argument("--profile", help="text normalisation, whisper or marks (default: as in the config.yaml of A)")
    parser.add_argument("--lang", help="language code, for directories without meta.json")
    parser.add_argument("--changed", type=int, default=10, metavar="N", help="show the N utterances that changed most")
    parser.add_argument("--color", choices=["auto", "always", "never"], default="auto")


def run(args: argparse.Namespace) -> None:
    """Print rates, paired differences and their significance by language and overall, then the alignments."""
    from zipperasr import markdown
    from zipperasr.cli.score import profile_of
    from zipperasr.scoring import compare

    directories, alone = compare.pair_directories(args.a, args.b)
    profile = args.profile or profile_of(directories[0][0])
    pairs = [compare.pair(a, b, profile=profile, lang=args.lang) for a, b in directories]
    sets = textwrap.fill(f"sets: {' '.join(pair.set for pair in pairs)}", 120, subsequent_indent="      ")
    print(f"A: {args.a}\nB: {args.b}\n{sets}\nprofile: {profile}\n", flush=True)
    warnings = [f"{path}: the other run has no such set, so it is not compared" for path in alone]
    warnings += [f"{pair.set}: {warning}" for pair in pairs for warning in pair.warnings]
    print(*(f"zipperasr: warning: {warning}\n" for warning in warnings), sep="", end="", file=sys.stderr)
    rows = compare.compare(pairs)
    metrics = {pair.lang: pair.metric.upper() for pair in pairs}
    print(markdown.table(HEADER, [_cells(row, metrics.get(row.name)) for row in rows], align="<>>>>><>>>"))
    print("Rates in percent. p: two-sided, by paired bootstrap of utterances; * p < 0.05, ** 0.01, *** 0.001.")
    in_color = args.color == "always" or (args.color == "auto" and sys.stdout.isatty())
    for found in compare.changed(pairs, args.changed):
        print(*_alignments(*found, in_color=in_color), sep="\n")


def _cells(row: "Row", metric: str | None) -> list[str]:
    numbers = (f"{row.rates[0]:.2f}", f"{row.rates[1]:.2f}", f"{row.difference:+.2f}")
    utterances = map(str, (row.num_better, row.num_worse, row.num_equal))
    interval = "[{:+.2f}, {:+.2f}]".format(*row.interval)
    return [f"{row.name} {metric or ''}".strip(), *numbers, interval, f"{row.p:.4f}", row.verdict, *utterances]


def _alignments(pair: "Pair", a: "Aligned", b: "Aligned", *, in_color: bool) -> Iterator[str]:
    from zipperasr.scoring.score import grid

    yield f"\n{pair.set} {a.id}: {a.counts.errors} errors in A, {b.counts.errors} in B, of {a.counts.ref_len}"
    for label, side in (("A", a), ("B", b)):
        yield from grid(side, label=label, most=shutil.get_terminal_size((120, 24)).columns, in_color=in_color)

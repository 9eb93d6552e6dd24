"""`zipperasr score`: error rates of decode directories."""

import argparse
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zipperasr.errors import UserError

WIDTH = 120
COLUMNS = "{:<21} {:<4} {:<6} {:>7} {:>7} {:>15} {:>15} {:>5} {:>5} {:>5}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directories", nargs="+", type=Path, metavar="DECODE_DIR", help="holds hyp, ref and meta.json")
    parser.add_argument(
        "--profile",
        help="which text normalisation per_utt, per_spk, align and averages are of: whisper "
        "or marks (default: as in the run's config.yaml); scores.json has both",
    )
    parser.add_argument("--lang", help="language code, for directories without meta.json")


def run(args: argparse.Namespace) -> None:
    """Score every directory that can be scored, then average over runs; UserError at the end if one could not."""
    from zipperasr.scoring.directory import averages, score_directory

    failed: list[str] = []
    runs: dict[Path, list[Path]] = {}
    print(
        COLUMNS.format("set", "lang", "metric", "whisper", "marks", "95% interval", "errors / ref", "ins", "del", "sub")
    )
    for directory in dict.fromkeys(args.directories):
        try:
            scores = score_directory(directory, profile=args.profile or profile_of(directory), lang=args.lang)
        except UserError as error:
            failed.append(str(directory))
            print(f"zipperasr: error: {error}", file=sys.stderr)
            continue
        runs.setdefault(directory.resolve().parent, []).append(directory)
        print(_line(scores), flush=True)
    for directories in runs.values():
        if len(directories) > 1:
            print(_average(directories[0].parent, averages(directories)))
    if failed:
        raise UserError(f"{len(failed)} of {len(args.directories)} directories not scored: {' '.join(failed)}")


def profile_of(directory: Path) -> str:
    """The profile that the configuration of a decode directory's run names."""
    from zipperasr import config
    from zipperasr.scoring import ScoringSettings

    parent = directory.resolve().parent
    path = (parent.parent if parent.name.startswith("as_") else parent) / "config.yaml"
    return (config.load(path, ScoringSettings, section="scoring") if path.is_file() else ScoringSettings()).profile


def _line(scores: dict[str, Any]) -> str:
    """A line of numbers (the star marks the profile that all but the rates are of), and what is of note."""
    from zipperasr.scoring.score import percent

    rates = [
        percent(p["error_rate"]) + ("*" if name == scores["profile"] else " ") for name, p in scores["profiles"].items()
    ]
    counts = scores["profiles"][scores["profile"]]
    interval = "[{:.2f}, {:.2f}]".format(*counts["interval"]) if counts["interval"] else "-"
    errors = f"{counts['sub'] + counts['ins'] + counts['del']} / {counts['ref_len']}"
    numbers = (errors, counts["ins"], counts["del"], counts["sub"])
    line = COLUMNS.format(scores["set"], scores["lang"], scores["metric"].upper(), *rates, interval, *numbers)
    notes = ", ".join(_notes(scores))
    if len(line) + 2 + len(notes) <= WIDTH:
        return f"{line}  {notes}".rstrip()
    indent = " " * 4
    return line + "\n" + textwrap.fill(notes, WIDTH, initial_indent=indent, subsequent_indent=indent)


def _notes(scores: dict[str, Any]) -> Iterator[str]:
    from zipperasr.scoring.score import some

    found, flags, language = scores["analysis"], scores["flags"], scores["analysis"]["language_mismatch"]
    if scores["missing"]:
        yield f"{scores['num_missing']} missing: {some(scores['missing'])}"
    if scores["num_empty_refs"] == scores["num_utts"]:
        yield "every reference is empty: no error rate"
    elif scores["num_empty_refs"]:
        yield f"{scores['num_empty_refs']} empty references"
    yield from (f"{num} {flag}" for flag, num in sorted(flags.items()))
    for key, words in (("insertion_bursts", "insertion bursts"), ("whole_deletions", "whole deletions")):
        if found[key]:
            yield f"{found[key]} {words}"
    if found["script_mismatch"]["num"]:
        yield "{num} of {of} in a foreign script (references: {num_in_refs})".format(**found["script_mismatch"])
    if language["num"] > language["num_in_refs"]:
        langs = " ".join(language["langs"])
        yield "{num} of {of} in another language: {0} (references: {num_in_refs})".format(langs, **language)


def _average(run: Path, found: dict[str, Any]) -> str:
    from zipperasr.scoring.score import percent

    interval = " [{:.2f}, {:.2f}]".format(*found["interval"]) if found["interval"] else ""
    micro = ", ".join(f"{metric.upper()} {percent(counts.error_rate)}" for metric, counts in found["micro"].items())
    macro = f"macro {percent(found['macro'])}{interval} over {found['num_langs']} languages"
    return f"{run}: {macro}; micro {micro}"

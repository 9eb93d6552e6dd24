"""`zipperasr score`: error rates of decode directories."""

import argparse
import sys
from pathlib import Path

from zipperasr.errors import UserError

COLUMNS = "{:<28} {:<4} {:<6} {:>6}  {:<44} {}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directories", nargs="+", type=Path, metavar="DECODE_DIR", help="holds hyp, ref and meta.json")
    parser.add_argument("--profile", help="text normalisation, whisper or marks (default: as in the run's config.yaml)")
    parser.add_argument("--lang", help="language code, for directories without meta.json")


def run(args: argparse.Namespace) -> None:
    """Score every directory that can be scored; raises UserError at the end if one could not."""
    from zipperasr.scoring import score

    failed = []
    print(COLUMNS.format("set", "lang", "metric", "%err", "[errors / ref, ins, del, sub]", "missing"))
    for directory in args.directories:
        try:
            scores = score.score_directory(directory, profile=args.profile or _profile(directory), lang=args.lang)
            print(_line(scores), flush=True)
        except UserError as error:
            failed.append(str(directory))
            print(f"zipperasr: error: {error}", file=sys.stderr)
    if failed:
        raise UserError(f"{len(failed)} of {len(args.directories)} directories not scored: {' '.join(failed)}")


def _profile(directory: Path) -> str:
    """The profile that the configuration of the directory's run names."""
    from zipperasr import config
    from zipperasr.scoring import ScoringSettings

    path = directory.resolve().parent / "config.yaml"
    return (config.load(path, ScoringSettings, section="scoring") if path.is_file() else ScoringSettings()).profile


def _line(scores: dict) -> str:
    from zipperasr.scoring.score import percent, some

    errors = scores["sub"] + scores["ins"] + scores["del"]
    counts = f"[{errors} / {scores['ref_len']}, {scores['ins']} ins, {scores['del']} del, {scores['sub']} sub]"
    missing = f"{scores['num_missing']}: {some(scores['missing'])}" if scores["missing"] else "0"
    rate = percent(scores["error_rate"])
    return COLUMNS.format(scores["set"], scores["lang"], scores["metric"].upper(), rate, counts, missing)

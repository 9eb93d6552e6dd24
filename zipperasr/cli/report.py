"""`zipperasr report`: tables and figures of every scored run of an experiment directory."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--exp-dir", type=Path, required=True, help="holds the runs, as in exp/mini")
    parser.add_argument("--out", type=Path, help="where to write (default: <exp-dir>/report)")
    parser.add_argument(
        "--low-resource", nargs="*", metavar="LANG", help="languages of Table VI (default: as configured)"
    )


def run(args: argparse.Namespace) -> None:
    from zipperasr.reporting import report, results

    readme = report.write(
        results.collect(args.exp_dir, low_resource=args.low_resource), args.out or args.exp_dir / "report"
    )
    print(f"results: {readme}")
    for path in sorted((readme.parent / "figures").glob("*.png")):
        print(f"figure:  {path}")

"""`zipperasr report`: one page about every scored run of an experiment directory, with tables and figures beside it."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--exp-dir", type=Path, required=True, help="holds the runs, as in exp/mini")
    parser.add_argument("--data-dir", type=Path, help="has the manifests: the worst utterances can be heard then")
    parser.add_argument("--out", type=Path, help="where to write (default: <exp-dir>/report)")
    parser.add_argument(
        "--low-resource", nargs="*", metavar="LANG", help="languages of Table VI (default: as configured)"
    )
    parser.add_argument("--profile", help="text profile of the error rates (default: the one each set was scored with)")
    parser.add_argument("--beside", type=Path, metavar="EXP_DIR", help="the same on more data, for a figure of both")


def run(args: argparse.Namespace) -> None:
    from zipperasr.reporting import report, results

    def collect(exp_dir: Path) -> results.Results:
        return results.collect(exp_dir, low_resource=args.low_resource, profile=args.profile)

    out, other = args.out or args.exp_dir / "report", collect(args.beside) if args.beside else None
    readme = report.write(collect(args.exp_dir), out, data_dir=args.data_dir, beside=other)
    print(f"results: {readme}\npage:    {readme.with_name('index.html')}")

"""Precompute the log-mel features of all listed utterances (nothing to do where they are computed on the fly)."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--conf", required=True, help="YAML file; its section data.features says what to compute")
    parser.add_argument("--data-dir", type=Path, required=True, help="holds manifests/ and lists/")
    parser.add_argument("--nj", type=int, default=1, help="number of processes (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values laid over the file")


def run(args: argparse.Namespace) -> None:
    """Compute what is not there yet and print the counts."""
    from zipperasr.cli import recipe
    from zipperasr.data import features

    settings = recipe.load(args.conf, overrides=args.overrides).data.features
    if settings.storage == "on_the_fly":
        print("features are computed on the fly: nothing to do")
        return
    done = features.precompute(args.data_dir, settings, nj=args.nj)
    where = args.data_dir / "features"
    print(f"{where}: complete; computed {sum(done.values())} utterances of {len(done)} sets now")

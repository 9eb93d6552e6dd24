"""Store the log-mel features, or the 16 kHz audio, of all listed utterances (nothing to do for storage on_the_fly).

Run again, it stores what is missing. Jobs that each do their --share (a Slurm array, for example) divide the work;
afterwards a run without it does what they have left, and completes the sets.
"""

import argparse
from pathlib import Path

from zipperasr.cli import recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--conf", required=True, help="YAML file; its section data.features says what to store")
    parser.add_argument("--data-dir", type=Path, required=True, help="holds manifests/ and lists/")
    parser.add_argument("--nj", type=int, default=1, help="number of processes (default: %(default)s)")
    parser.add_argument("--share", type=recipe.share, help="do the share of one job alone: 2/8")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values laid over the file")


def run(args: argparse.Namespace) -> None:
    """Store what is not there yet and print the counts."""
    from zipperasr.data import store

    settings = recipe.load(args.conf, overrides=args.overrides).data.features
    if settings.storage == "on_the_fly":
        print("features are computed on the fly: nothing to do")
        return
    done = store.precompute(args.data_dir, settings, nj=args.nj, job=args.share)
    state = f"share {args.share[0]} of {args.share[1]} is done" if args.share else "complete"
    where = store.root_of(args.data_dir, settings)
    print(f"{where}: {state}; stored {sum(done.values())} utterances of {len(done)} sets now")

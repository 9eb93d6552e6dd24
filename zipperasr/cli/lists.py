"""Draw the fixed utterance lists of every setting."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--conf", required=True, help="YAML file; its section data.lists is drawn")
    parser.add_argument("--data-dir", type=Path, required=True, help="holds manifests/; lists/ is written")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values laid over the file")


def run(args: argparse.Namespace) -> None:
    """Write the lists and print a line each."""
    from zipperasr.cli import recipe
    from zipperasr.data import lists

    settings = recipe.load(args.conf, overrides=args.overrides).data.lists
    for setting, drawn in lists.write(args.data_dir, settings).items():
        directory = args.data_dir / "lists" / setting
        for line in [f"{directory}: complete"] if drawn is None else [f"{directory}/{one}" for one in drawn]:
            print(line)

"""Write the fixed utterance lists of every setting: those that were released, or our own draw."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--conf", required=True, help="YAML file; its section data.lists says which lists")
    parser.add_argument("--data-dir", type=Path, required=True, help="holds manifests/; lists/ is written")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values laid over the file")


def run(args: argparse.Namespace) -> None:
    """Write the lists and print a line each."""
    from zipperasr.cli import recipe
    from zipperasr.data import list_report, lists

    settings = recipe.load(args.conf, overrides=args.overrides).data.lists
    for setting, written in lists.write(args.data_dir, settings).items():
        directory = args.data_dir / "lists" / setting
        for line in [f"{directory}: complete"] if written is None else [f"{directory}/{one}" for one in written]:
            print(line)
        print(f"{directory / list_report.REPORT}: where each list comes from")

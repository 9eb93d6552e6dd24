"""Check a configuration and print it whole, with every default."""

import argparse

import yaml

from zipperasr.cli import recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--conf", required=True, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values laid over the file")


def run(args: argparse.Namespace) -> None:
    whole = recipe.load(args.conf, overrides=args.overrides)
    print(yaml.safe_dump(whole.model_dump(mode="json"), sort_keys=False, allow_unicode=True), end="")

"""Print what a configuration names, a line each, for shell scripts.

corpora: name, preparer, `real` or the size of a synthetic one, languages. sets: every test set that the settings of
training name. pretrained: encoder and LLM. methods: the encoder adapters, as the paper's tables compare them.
"""

import argparse
from collections.abc import Iterator

from zipperasr.cli import recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--conf", required=True, help="YAML file")
    parser.add_argument("what", choices=sorted(SHOWN), help="which names")
    parser.add_argument("--part", choices=("train", "dev", "test"), default="test", help="of sets (default: test)")


def run(args: argparse.Namespace) -> None:
    for line in SHOWN[args.what](recipe.load(args.conf), args):
        print(line)


def _corpora(whole: recipe.Config, args: argparse.Namespace) -> Iterator[str]:
    for name, corpus in whole.corpora.items():
        yield f"{name} {corpus.prepare} {corpus.synthetic or 'real'} {' '.join(corpus.langs)}"


def _sets(whole: recipe.Config, args: argparse.Namespace) -> list[str]:
    settings = (whole.training.stage1.setting, whole.training.stage2.setting)
    return list(dict.fromkeys(name for s in settings for name in getattr(whole.data.lists.settings[s], args.part)))


def _pretrained(whole: recipe.Config, args: argparse.Namespace) -> tuple[str, str]:
    return whole.model.encoder.pretrained, whole.model.llm.pretrained


def _methods(whole: recipe.Config, args: argparse.Namespace) -> list[str]:
    from zipperasr.adapters import REGISTRY

    return [*REGISTRY, "zipper_soft_initial_b"]


SHOWN = {"corpora": _corpora, "sets": _sets, "pretrained": _pretrained, "methods": _methods}

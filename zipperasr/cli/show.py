"""Print what a configuration names, a line each, for shell scripts.

corpora: name, preparer, `real` or the size of a synthetic one, languages (all, or those of a job's share), options.
downloads: arguments of local/download.sh, which fetch the real corpora and the pretrained models.
sets: every test set that the settings of training name. pretrained: encoder and LLM, unless they begin at random.
methods: the encoder adapters, as the paper's tables compare them.
"""

import argparse
from collections.abc import Iterator

from zipperasr.cli import recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--conf", required=True, help="YAML file")
    parser.add_argument("what", choices=sorted(SHOWN), help="which names")
    parser.add_argument("--share", type=recipe.share, default=(1, 1), help="of corpora, of their languages: 2/8")
    parser.add_argument("--part", choices=("train", "dev", "test"), default="test", help="of sets (default: test)")


def run(args: argparse.Namespace) -> None:
    for line in SHOWN[args.what](recipe.load(args.conf), args):
        print(line)


def _corpora(whole: recipe.Config, args: argparse.Namespace) -> Iterator[str]:
    job, num_jobs = args.share
    every = [(name, lang) for name, corpus in whole.corpora.items() for lang in corpus.langs]
    mine = every[job - 1 :: num_jobs]
    for name, corpus in whole.corpora.items():
        if langs := [lang for owner, lang in mine if owner == name]:
            yield f"{name} {corpus.prepare} {corpus.synthetic or 'real'} {' '.join([*langs, *corpus.options])}"


def _downloads(whole: recipe.Config, args: argparse.Namespace) -> Iterator[str]:
    for name, corpus in whole.corpora.items():
        if not corpus.synthetic:
            yield " ".join(["--corpus", name, "--lang", *corpus.langs, *corpus.download])
    yield from (f"--model {model}" for model in _pretrained(whole, args))


def _sets(whole: recipe.Config, args: argparse.Namespace) -> list[str]:
    settings = (whole.training.stage1.setting, whole.training.stage2.setting)
    return list(dict.fromkeys(name for s in settings for name in getattr(whole.data.lists.settings[s], args.part)))


def _pretrained(whole: recipe.Config, args: argparse.Namespace) -> list[str]:
    is_random = whole.model.init == "random"
    return [] if is_random else [whole.model.encoder.pretrained, whole.model.llm.pretrained]


def _methods(whole: recipe.Config, args: argparse.Namespace) -> list[str]:
    from zipperasr.adapters import REGISTRY

    return [*REGISTRY, "zipper_soft_initial_b"]


SHOWN = {
    "corpora": _corpora,
    "downloads": _downloads,
    "sets": _sets,
    "pretrained": _pretrained,
    "methods": _methods,
}

"""Give a trained stage-2 run another language: a new run, of which only what is that language's own is trained.

Everything else stays bit-identical, and at the end that is checked. Run again, it goes on where it stopped. No CTC loss
is trained, whatever the base was trained with: train-aligner gives the new run its word times.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from zipperasr import files, languages
from zipperasr.adapters.extend import BEGINS, extended
from zipperasr.cli import recipe
from zipperasr.cli.train import begin_and_train
from zipperasr.data import lists
from zipperasr.errors import UserError
from zipperasr.model import WEIGHTS
from zipperasr.training import launch, runs

if TYPE_CHECKING:
    from zipperasr.model.speech_llm import SpeechLLM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run-dir", required=True, type=Path, help="written: a run like any other, and identity.json")
    parser.add_argument("--base", required=True, type=Path, help="a finished stage-2 run of a method with banks")
    parser.add_argument("--lang", required=True, help="code of the language to add")
    parser.add_argument("--setting", required=True, help="of data.lists.settings; its train lists are of the language")
    parser.add_argument("--data-dir", required=True, type=Path)
    parser.add_argument("--bank", choices=BEGINS, default="nearest", help="what it begins with (default: %(default)s)")
    parser.add_argument("--conf", help="YAML file that has the setting, if the base's config.yaml has not")
    launch.add_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values laid over the base's configuration")


def run(args: argparse.Namespace) -> int:
    from zipperasr.training import add_language

    base = _base(args)
    whole = _with_language(args, base)
    _check_lists(args)
    proves = not launch.is_rank() and launch.is_first_node()
    if proves:  # before training: what the proof needs is missed at once
        setting, langs = base.training.stage2.setting, base.model.adapter.langs
        utterances = add_language.choose(args.data_dir, setting, langs, whole.data.features)
    if not launch.is_needed(args):
        begin_and_train(args, whole, begin=_begin, build_model=_model)
    elif status := launch.launch(sys.argv[1:], num_ranks=args.ranks, hostfile=args.hostfile):
        return status
    if proves:
        print(add_language.prove(args.run_dir, args.base, utterances, whole.model.encoder))
    return 0


def _base(args: argparse.Namespace) -> recipe.Config:
    """The configuration of the run to extend. Raises UserError where it cannot be extended by the language."""
    runs.final_weights(args.base)
    base = recipe.load(args.base / "config.yaml")
    if base.stage != 2:
        raise UserError(f"{args.base}: a stage-1 run has no adapters; give a stage-2 run as --base")
    languages.get(args.lang)
    try:
        extended(base.model.adapter, args.lang)
    except UserError as error:
        raise UserError(f"{args.base}: {error}") from error
    return base


def _with_language(args: argparse.Namespace, base: recipe.Config) -> recipe.Config:
    """The base's configuration with the language, the setting that trains it, and the overrides."""
    fixed = ("stage=", "model", "training.stage2.setting=", "training.stage2.ctc_weight=")
    if given := [text for text in args.overrides if text.startswith(fixed)]:
        raise UserError(f"override '{given[0]}': the model is the base's, and --setting names what it is trained on")
    scales = {part: by for part, by in base.training.stage2.lr_scale.items() if part.startswith("encoder")}
    values = {
        **_setting(args, base),
        "model.adapter.langs": extended(base.model.adapter, args.lang).langs,
        "training.stage2.setting": args.setting,
        "training.stage2.lr_scale": scales,  # of what is trained
        "training.stage2.ctc_weight": 0.0,  # its head would have to learn the language's characters too
    }
    overrides = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    return recipe.load(args.base / "config.yaml", overrides=[*overrides, *args.overrides])


def _setting(args: argparse.Namespace, base: recipe.Config) -> dict[str, object]:
    """What the base's configuration lacks of the setting: its lists and their corpora, from --conf."""
    conf = recipe.load(args.conf) if args.conf else base
    if args.setting not in conf.data.lists.settings:
        known = ", ".join(conf.data.lists.settings)
        mend = "add it to data.lists.settings of a configuration and give that as --conf"
        raise UserError(f"{args.conf or args.base / 'config.yaml'}: no setting '{args.setting}' ({known}); {mend}")
    lists_of = conf.data.lists.settings[args.setting]
    names = {name.partition("_")[0] for part in lists.PARTS for name in getattr(lists_of, part)}
    return {
        **{f"corpora.{name}": conf.corpora[name].model_dump() for name in sorted(names)},
        f"data.lists.settings.{args.setting}": lists_of.model_dump(),
    }


def _check_lists(args: argparse.Namespace) -> None:
    """Raise UserError unless the setting trains on the language, and on it alone."""
    names = list(lists.find(args.data_dir, args.setting, "train"))
    others = [name for name in names if name.split("_")[1] != args.lang]
    if others or not names:
        what = f"trains on {', '.join(others)}" if others else "has no train lists"
        raise UserError(f"setting '{args.setting}' {what}; give one that trains on sets of '{args.lang}' alone")


def _begin(args: argparse.Namespace, whole: recipe.Config) -> None:
    inputs = {
        "lists": files.sha256(args.data_dir / "lists" / args.setting / "SHA256SUMS"),
        "base": files.sha256(runs.final_weights(args.base)),
        "bank": args.bank,
    }
    bound = ("stage", "data.features", "data.packing", "model", "training.stage2")
    runs.begin(args.run_dir, settings=whole, inputs=inputs, bound=bound)
    runs.link_init(args.run_dir, args.base / "init" / WEIGHTS)


def _model(args: argparse.Namespace, whole: recipe.Config) -> SpeechLLM:
    from zipperasr.training.add_language import build_with_language

    model, near = build_with_language(whole.model, args.base, args.lang, args.bank)
    if near and int(os.environ.get("RANK", 0)) == 0:
        print(f"{args.lang} begins with the bank of {near}")
    return model

"""Train stage 1 or stage 2 of a recipe; run again, it goes on where it stopped.

Where training.stage<N>.ctc_weight is above 0, the run ends with an aligner (see zipperasr train-aligner).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from zipperasr import files
from zipperasr.cli import recipe
from zipperasr.errors import UserError
from zipperasr.model import ALIGNER, ALIGNER_SETTINGS, WEIGHTS
from zipperasr.training import launch, runs

if TYPE_CHECKING:
    from zipperasr.model.speech_llm import SpeechLLM
    from zipperasr.training.trainer import Trainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--conf", required=True, help="YAML file")
    parser.add_argument("--stage", required=True, type=int, choices=(1, 2))
    parser.add_argument("--data-dir", required=True, type=Path)
    parser.add_argument("--run-dir", required=True, type=Path, help="written: config.yaml, log.jsonl, checkpoints, ...")
    parser.add_argument("--init", type=Path, help="run directory of stage 1, for stage 2")
    launch.add_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values laid over the configuration")


def run(args: argparse.Namespace) -> int:
    if launch.is_needed(args):
        return launch.launch(sys.argv[1:], num_ranks=args.ranks, hostfile=args.hostfile)
    if (args.stage == 2) != (args.init is not None):
        raise UserError("--stage 2 begins from a stage-1 run: give its directory with --init (and stage 1 takes none)")
    whole = recipe.load(args.conf, overrides=args.overrides)
    adapter = whole.model.adapter if args.stage == 2 else None
    whole = whole.model_copy(update={"stage": args.stage, "model": whole.model.model_copy(update={"adapter": adapter})})
    begin_and_train(args, whole, begin=_begin, build_model=_model)
    return 0


def begin_and_train(
    args: argparse.Namespace,
    whole: recipe.Config,
    *,
    begin: Callable[[argparse.Namespace, recipe.Config], None],
    build_model: Callable[[argparse.Namespace, recipe.Config], SpeechLLM],
) -> None:
    """Train what `build_model` leaves unfrozen into `args.run_dir`, locked and begun by rank 0, unless it is done."""
    is_first = int(os.environ.get("RANK", 0)) == 0
    with files.lock(args.run_dir) if is_first else nullcontext():
        if is_first:
            begin(args, whole)
        if (args.run_dir / runs.FINISHED).is_file():
            if is_first:
                _complete(args, whole)
                print(f"{args.run_dir}: trained already")
            return
        trainer = _trainer(args, whole, build_model)
        if is_first:
            runs.write_language_embeddings(args.run_dir, trainer.engine.module.language_embeddings)
            if trainer.units:
                trainer.units.save(args.run_dir)
        trainer.run()
        if is_first:
            _complete(args, whole)
            print(f"{args.run_dir}: trained")


def _complete(args: argparse.Namespace, whole: recipe.Config) -> None:
    """Write what a finished run lacks: inspect.json, what `zipperasr inspect` says of it, for the report, and the
    aligner from the CTC head that it was trained with, if it was."""
    path = args.run_dir / "inspect.json"
    if not path.is_file():
        from zipperasr.model.inspect import inspect

        files.write_json(path, inspect(args.run_dir))
    if getattr(whole.training, f"stage{whole.stage}").ctc_weight:
        _write_aligner(args, whole)


def _write_aligner(args: argparse.Namespace, whole: recipe.Config) -> None:
    """Write RUN_DIR/aligner unless there is one of these weights, be it that of `zipperasr train-aligner`."""
    import torch

    from zipperasr.data.utterances import load_utterances
    from zipperasr.decoding.worker import segment_s
    from zipperasr.model.checkpoint import load_run
    from zipperasr.training import aligner

    settings = getattr(whole.training, f"stage{whole.stage}")
    weights, folder = runs.final_weights(args.run_dir), args.run_dir / ALIGNER
    step, digest = int(weights.parent.name.removeprefix("step-")), files.sha256(weights)
    with files.lock(folder):
        path = folder / ALIGNER_SETTINGS
        if path.is_file() and files.read_json(path)["weights"] == digest:
            return
        model = load_run(args.run_dir, [step])
        model.encoder.to("cuda" if torch.cuda.is_available() else "cpu")  # all that is needed
        aligner.finish(
            args.run_dir,
            model,
            load_utterances(args.data_dir, settings.setting, "train", None, whole.data.features),
            settings=settings,
            packing=whole.data.packing,
            chunk_s=segment_s(model, whole.model.encoder),
            about={"trained_on": [settings.setting], "step": step, "weights": digest},
        )


def _begin(args: argparse.Namespace, whole: recipe.Config) -> None:
    setting = getattr(whole.training, f"stage{args.stage}").setting
    lists = args.data_dir / "lists" / setting / "SHA256SUMS"
    if not lists.is_file():
        raise UserError(f"{lists}: no lists of setting '{setting}'; run stage 2 of the recipe first")
    inputs = {"lists": files.sha256(lists)}
    if args.init:
        runs.final_weights(args.init)
        inputs["init"] = files.sha256(args.init / runs.FINISHED)
    if folder := _initial_b(whole):
        inputs["init_from"] = files.sha256(folder / WEIGHTS)
    bound = ("stage", "data.features", "data.packing", "model", f"training.stage{args.stage}")
    runs.begin(args.run_dir, settings=whole, inputs=inputs, bound=bound)
    if args.init:
        runs.link_init(args.run_dir, runs.final_weights(args.init))


def _initial_b(whole: recipe.Config) -> Path | None:
    """The checkpoint that the adapters begin from, if any: the one named, or the last of the finished run named."""
    if not (whole.model.adapter and whole.model.adapter.init_from):
        return None
    path = Path(whole.model.adapter.init_from)
    return path if (path / WEIGHTS).is_file() else runs.final_weights(path).parent


def _model(args: argparse.Namespace, whole: recipe.Config) -> SpeechLLM:
    from zipperasr.model.checkpoint import build, load_trainable, warm_start

    model = build(whole.model, whole.stage)
    if args.init:
        load_trainable(model, runs.final_weights(args.init).parent, stage=1)
    if folder := _initial_b(whole):
        warm_start(model, folder, whole.model.adapter)
    return model


def _trainer(args: argparse.Namespace, whole: recipe.Config, build_model: Callable) -> Trainer:
    from zipperasr.training.process import prepare_process

    prepare_process()  # before the imports below, which import DeepSpeed
    import torch

    from zipperasr.data.packing import load_examples
    from zipperasr.decoding.errors import count_errors
    from zipperasr.model.checkpoint import add_ctc
    from zipperasr.model.ctc import Units
    from zipperasr.training.trainer import Trainer

    settings = getattr(whole.training, f"stage{whole.stage}")
    torch.manual_seed(settings.seed)  # of fresh parameters
    model = build_model(args, whole)
    train, dev = (
        load_examples(
            args.data_dir,
            settings.setting,
            part,
            tokenizer=model.tokenizer,
            features=whole.data.features,
            packing=whole.data.packing,
        )
        for part in ("train", "dev")
    )
    if not train:
        raise UserError(f"data.lists.settings.{settings.setting}.train: no utterances; name a set with a list")
    if settings.ctc_weight:
        init = (args.init, runs.final_weights(args.init)) if args.init else None
        add_ctc(model, Units.of(x.utterance.text for x in train), init)
    return Trainer(
        model,
        train=train,
        dev=dev,
        settings=settings,
        packing=whole.data.packing,
        spec_augment=whole.data.features.spec_augment,
        encoder=whole.model.encoder,
        run_dir=args.run_dir,
        count_errors=partial(
            count_errors, encoder=whole.model.encoder, decoding=whole.decoding, profile=whole.scoring.profile
        ),
    )

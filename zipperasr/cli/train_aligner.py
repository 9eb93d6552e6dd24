"""Train a CTC head on the frozen encoder of a finished run, for word times (zipperasr align): into RUN_DIR/aligner.

The run itself stays as it is. It takes minutes and is not resumed: if it is stopped, it begins anew.
"""

import argparse
from pathlib import Path

from zipperasr import files
from zipperasr.cli import recipe
from zipperasr.data import lists
from zipperasr.training import runs

OVERRIDABLE = ("training.aligner.", "data.features.storage")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run-dir", type=Path, required=True, help="a finished run")
    parser.add_argument("--data-dir", type=Path, required=True, help="holds manifests/, lists/ and features/")
    parser.add_argument("--setting", nargs="+", help="whose train lists (default: those the run was trained on)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as training.aligner.epochs=2")


def run(args: argparse.Namespace) -> None:
    import torch

    from zipperasr.data.utterances import load_utterances
    from zipperasr.decoding.worker import segment_s
    from zipperasr.model import ALIGNER
    from zipperasr.model.checkpoint import load_run
    from zipperasr.training import aligner

    settings = [name for name in args.setting or () if "=" not in name]
    overrides = [text for text in args.setting or () if "=" in text] + args.overrides  # those behind --setting too
    whole = recipe.load_run(args.run_dir, overrides=overrides, allowed=OVERRIDABLE)
    weights = runs.final_weights(args.run_dir)
    settings = settings or [getattr(whole.training, f"stage{whole.stage}").setting]
    listed = [path for name in settings for path in lists.find(args.data_dir, name, "train").values()]
    about = {
        "trained_on": settings,
        "step": int(weights.parent.name.removeprefix("step-")),
        "weights": files.sha256(weights),
    }
    key = files.fingerprint([about, whole.training.aligner.model_dump(), *map(files.sha256, listed)])
    folder = args.run_dir / ALIGNER
    with files.lock(folder):
        if files.is_done(folder, key):
            print(f"{folder}: trained already")
            return
        (folder / ".done").unlink(missing_ok=True)
        utterances = [
            utterance
            for name in settings
            for utterance in load_utterances(args.data_dir, name, "train", None, whole.data.features)
        ]
        model = load_run(args.run_dir, [about["step"]]).to("cuda" if torch.cuda.is_available() else "cpu")
        said = aligner.train(
            args.run_dir,
            model,
            utterances,
            settings=whole.training.aligner,
            packing=whole.data.packing,
            chunk_s=segment_s(model, whole.model.encoder),
            about=about,
        )
        files.mark_done(folder, key)
    early_ms, late_ms = (round(1000 * said[name]) for name in ("early_s", "late_s"))
    print(
        f"{folder}: loss {said['loss']:.3f} nats a character; words begin {early_ms} ms before and end {late_ms} ms "
        "behind what the head says"
    )

"""Transcribe sets with a trained run, into RUN_DIR/decode_<set>; finished sets are skipped, partial ones go on.

Jobs that each do their --share (a Slurm array, for example) divide the utterances of every set; afterwards a run
without it does what they have left, and writes the outputs.
"""

import argparse
from pathlib import Path

from zipperasr.adapters import AdapterSettings
from zipperasr.cli import recipe
from zipperasr.errors import UserError

OVERRIDABLE = ("decoding.", "data.features.storage")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run-dir", type=Path, required=True, help="a trained run: config.yaml and checkpoints")
    parser.add_argument("--data-dir", type=Path, required=True, help="holds manifests/, lists/ and features/")
    parser.add_argument("--sets", nargs="+", required=True, metavar="SET", help="<corpus>_<lang>_<split>")
    parser.add_argument("--setting", help="whose test lists (default: the run's own, else any that has the set)")
    recipe.add_checkpoint_arguments(parser)
    parser.add_argument(
        "--as", nargs="+", dest="as_langs", default=[None], metavar="LANG",
        help="stress test: with the adapter and prompt of these languages, or of all that the run has adapters for, "
        "into RUN_DIR/as_<lang>/decode_<set>",
    )  # fmt: skip
    parser.add_argument("--first", type=recipe.positive, metavar="N", help="only so many utterances of each list")
    parser.add_argument(
        "--nj", type=recipe.positive, default=1, help="number of processes (%(default)s; on GPUs at most one each)"
    )
    parser.add_argument("--share", type=recipe.share, help="do the share of one job alone: 2/8")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as decoding.beam=4")


def run(args: argparse.Namespace) -> None:
    """Decode what is not done yet and print a line for each set."""
    from zipperasr.decoding import decode
    from zipperasr.model import RunSettings

    sets = [name for name in args.sets if "=" not in name]
    overrides = [text for text in args.sets if "=" in text] + args.overrides  # those behind --sets too
    whole = recipe.load_run(args.run_dir, overrides=overrides, allowed=OVERRIDABLE)
    setting = args.setting or getattr(whole.training, f"stage{whole.stage}").setting
    settings = RunSettings(stage=whole.stage, model=whole.model)
    as_langs = _languages(args.run_dir, whole.model.adapter) if args.as_langs == ["all"] else args.as_langs
    jobs = decode.plan(
        args.run_dir, args.data_dir, sets, run=settings, data=whole.data, decoding=whole.decoding,
        setting=setting, step=args.step, average=args.average, as_langs=as_langs, first=args.first,
    )  # fmt: skip
    for job in (job for job in jobs if job.is_done):
        print(f"{job.directory}: complete", flush=True)
    todo = [job for job in jobs if not job.is_done]
    for job, timing in decode.decode(todo, nj=args.nj, share=args.share) if todo else ():
        if timing is None:
            print("{}: share {} of {} is done".format(job.directory, *args.share), flush=True)
            continue
        flags = "".join(f", {count} {flag}" for flag, count in timing["flags"].items())
        print(f"{job.directory}: {timing['num_utts']} utterances, RTFx {timing['rtfx']:.0f}{flags}", flush=True)


def _languages(run_dir: Path, adapter: AdapterSettings | None) -> list[str]:
    if adapter is None:
        raise UserError(f"{run_dir}: a stage-1 run has no adapters; name the languages of --as")
    return adapter.langs

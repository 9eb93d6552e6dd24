"""Time this code beside what it is compared with, all in one run, and print a table.

adapters: every adapter method on a linear layer, beside the frozen layer and PEFT, and perhaps in a whole encoder.
features: log-mel extraction beside Lhotse's and the feature extractor of transformers.
data: reading, validating, selecting from and packing a synthetic corpus, and how long training takes to start with it.
train: whole training steps at a given size, beside padded rows and what a user would write.
decode: transcribing, merged and batched, beside the unmerged model and one utterance at a time.
serve: a trained run (--run-dir) on real audio (--inputs): transcribe, align, batches of mixed languages, many clients.
"""

import argparse
import importlib
from pathlib import Path

from zipperasr.adapters import REGISTRY
from zipperasr.bench import LENGTHS, MINI, SIZES
from zipperasr.cli import recipe
from zipperasr.cli.recipe import positive
from zipperasr.errors import UserError
from zipperasr.model.sizes import QWEN3, WHISPER

BENCHMARKS = {
    "adapters": ("sizes", "langs", "tokens", "rounds", "encoder", "threads"),
    "features": ("rounds",),
    "data": ("cuts", "tokenizer"),
    "train": (
        *("size", "encoder", "llm", "stage", "method", "baselines", "context", "rows", "tokens_per_row", "lengths"),
        *("recompute_encoder", "recompute_llm", "rounds", "threads"),
    ),
    "decode": (
        *("size", "encoder", "llm", "method", "context", "utterances", "batch_tokens", "lengths", "rounds", "threads"),
    ),
    "serve": ("job", "inputs", "clients", "seconds", "rounds", "threads"),
}  # file of zipperasr/bench -> its options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmark", choices=sorted(BENCHMARKS), help="what to time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same figures as JSON too")
    parser.add_argument("--rounds", type=positive, default=7, help="how often each case is timed (default: 7)")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--tokens", type=positive, default=3200, help="of a batch, in 12 rows (default: 3200)")
    parser.add_argument(
        "--langs", type=int, nargs="+", default=[1, 4, 12], choices=range(1, 13), metavar="N",
        help="numbers of languages in a batch, 1 to 12 (default: 1 4 12)",
    )  # fmt: skip
    parser.add_argument(
        "--sizes", type=_size, nargs="+", default=[(1280, 1280), (1280, 5120)], metavar="INxOUT",
        help="widths of the layer (default: 1280x1280 1280x5120)",
    )  # fmt: skip
    parser.add_argument(
        "--encoder", choices=[*WHISPER, "none"],
        help="adapters: also a whole encoder (default: large-v3 on a GPU, else none); train: in place of the size's",
    )  # fmt: skip
    parser.add_argument("--cuts", type=positive, default=2_000_000, help="of the synthetic corpus (default: 2000000)")
    parser.add_argument(
        "--tokenizer",
        default=str(MINI / "lm"),
        help="folder or Hugging Face model id (default: that of the mini recipe)",
    )
    train = parser.add_argument_group("train and decode")
    train.add_argument("--size", choices=SIZES, default="mini", help="the models' shapes (default: mini)")
    train.add_argument("--llm", choices=QWEN3, help="in place of the size's")
    train.add_argument("--stage", type=int, choices=(1, 2), default=2, help="what is trained (default: 2)")
    train.add_argument(
        "--method", nargs="+", choices=REGISTRY, help="of stage 2 (default: zipper_soft; train: all on a CPU)"
    )
    train.add_argument(
        "--baselines", action=argparse.BooleanOptionalAction,
        help="also what ours is compared with (default: on a CPU at size mini)",
    )  # fmt: skip
    train.add_argument("--context", choices=("full", "chunked"), default="full", help="of the encoder (default: full)")
    train.add_argument("--rows", type=positive, help="of a batch (default: the paper's on a GPU, else 12)")
    train.add_argument("--tokens-per-row", type=positive, help="at most (default: 2048 on a GPU, else 192)")
    train.add_argument(
        "--lengths",
        choices=LENGTHS,
        default="commonvoice",
        help="the corpus that utterances last as in (default: commonvoice)",
    )
    train.add_argument("--utterances", type=positive, help="decode: how many (default: 1024 on a GPU, else 64)")
    train.add_argument(
        "--batch-tokens", type=positive, nargs="+", metavar="N",
        help="decode: decoding.max_tokens_per_batch (default: the setting's; on a GPU up to 8 times as many too)",
    )  # fmt: skip
    serve = parser.add_argument_group("serve")
    serve.add_argument("--run-dir", type=Path, help="a trained run (needed)")
    serve.add_argument(
        "--inputs", nargs="+", metavar="INPUT", default=[],
        help="manifests of Lhotse or Kaldi data directories that say the language of each (needed)",
    )  # fmt: skip
    serve.add_argument("--clients", type=positive, default=32, help="at the same time (default: 32)")
    serve.add_argument("--seconds", type=positive, default=60, help="for which they call (default: 60)")
    for part in ("encoder", "llm"):
        train.add_argument(
            f"--recompute-{part}", type=_share, default=0.0, help="share of its blocks, 0 to 1 (default: 0)"
        )


def run(args: argparse.Namespace) -> None:
    if args.benchmark == "train":
        from zipperasr.training.process import prepare_process

        prepare_process()
    if args.benchmark == "serve":
        args.job = _job(args)
    benchmark = importlib.import_module(f"zipperasr.bench.{args.benchmark}")
    report = benchmark.run(**{option: getattr(args, option) for option in BENCHMARKS[args.benchmark]})
    print(report.text())
    if args.json:
        report.write_json(args.json)


def _job(args: argparse.Namespace):
    """What `serve` transcribes with. Raises UserError where there is no such run, or no inputs."""
    if args.run_dir is None or not args.inputs:
        raise UserError("bench serve: give a trained run (--run-dir) and audio with its languages (--inputs)")
    recipe.bound_memory()
    return recipe.transcription_job(args.run_dir, recipe.load_run(args.run_dir), step=None, average=1)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a share from 0 to 1")
    return share


def _size(text: str) -> tuple[int, int]:
    wide, _, high = text.partition("x")
    try:
        return positive(wide), positive(high)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"'{text}' is not INxOUT, such as 1280x5120") from None

"""Time this code beside what it is compared with, all in one run, and print a table.

adapters: every adapter method on a linear layer, beside the frozen layer and PEFT, and perhaps in a whole encoder.
features: log-mel extraction beside Lhotse's and the feature extractor of transformers.
data: reading, validating, selecting from and packing a synthetic corpus, and how long training takes to start with it.
"""

import argparse
import importlib
from pathlib import Path

import zipperasr
from zipperasr.bench import ENCODERS

TOKENIZER = Path(zipperasr.__file__).parents[1] / "egs" / "multilingual12" / "pretrained" / "mini" / "lm"
BENCHMARKS = {
    "adapters": ("sizes", "langs", "tokens", "rounds", "encoder", "threads"),
    "features": ("rounds",),
    "data": ("cuts", "tokenizer"),
}  # file of zipperasr/bench -> its options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmark", choices=sorted(BENCHMARKS), help="what to time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same figures as JSON too")
    parser.add_argument("--rounds", type=_positive, default=7, help="how often each case is timed (default: 7)")
    parser.add_argument("--threads", type=_positive, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--tokens", type=_positive, default=3200, help="of a batch, in 12 rows (default: 3200)")
    parser.add_argument(
        "--langs", type=int, nargs="+", default=[1, 4, 12], choices=range(1, 13), metavar="N",
        help="numbers of languages in a batch, 1 to 12 (default: 1 4 12)",
    )  # fmt: skip
    parser.add_argument(
        "--sizes", type=_size, nargs="+", default=[(1280, 1280), (1280, 5120)], metavar="INxOUT",
        help="widths of the layer (default: 1280x1280 1280x5120)",
    )  # fmt: skip
    parser.add_argument(
        "--encoder", choices=[*ENCODERS, "none"], help="also a whole encoder (default: large-v3 on a GPU, else none)"
    )
    parser.add_argument("--cuts", type=_positive, default=2_000_000, help="of the synthetic corpus (default: 2000000)")
    parser.add_argument(
        "--tokenizer", default=str(TOKENIZER), help="folder or Hugging Face model id (default: that of the mini recipe)"
    )


def run(args: argparse.Namespace) -> None:
    benchmark = importlib.import_module(f"zipperasr.bench.{args.benchmark}")
    report = benchmark.run(**{option: getattr(args, option) for option in BENCHMARKS[args.benchmark]})
    print(report.text())
    if args.json:
        report.write_json(args.json)


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    wide, _, high = text.partition("x")
    try:
        return _positive(wide), _positive(high)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"'{text}' is not INxOUT, such as 1280x5120") from None

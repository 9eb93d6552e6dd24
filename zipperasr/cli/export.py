"""Write a trained run in the formats of transformers and PEFT, and compare what was written with the run.

transformers' Whisper encoder takes a fixed window of 30 s and hears shorter audio padded with silence. A run trained at
true lengths (model.encoder.pad_to_30s: false) has not met that silence: its accuracy there is not what it is here.
"""

import argparse
from pathlib import Path
from typing import Any

from zipperasr.cli import recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run-dir", type=Path, required=True, help="a trained run: config.yaml and checkpoints")
    parser.add_argument("--lang", nargs="+", required=True, help="codes of languages, or all that the adapter has")
    parser.add_argument("--format", choices=("peft", "merged"), required=True, help="adapters, or plain models")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    recipe.add_checkpoint_arguments(parser)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="(%(default)s)")
    parser.add_argument(
        "--audio", type=Path, nargs="+", default=[], metavar="FILE", help="to compare on (default: seeded noise)"
    )


def run(args: argparse.Namespace) -> None:
    import torch

    from zipperasr.model.export import export

    report = export(
        args.run_dir, args.out, args.lang, format=args.format, dtype=getattr(torch, args.dtype), step=args.step,
        average=args.average, recordings=args.audio,
    )  # fmt: skip
    print(f"{args.out}: {report['format']}, {report['dtype']}\n{_table(report)}")


def _table(report: dict[str, Any]) -> str:
    """The largest differences, a language a row, beside the largest values that they are differences of."""
    heard = report["audio"] if isinstance(report["audio"], str) else f"{len(report['audio'])} recordings"
    lines = [f"largest differences from the run in fp32 on {heard} ({report['frames']}):"]
    lines.append(f"{'':<6}{'encoder':>10}{'of up to':>10}{'LLM logits':>12}{'of up to':>10}")
    for lang, row in report["largest_difference"].items():
        numbers = (row[key] for key in ("encoder", "encoder_scale", "llm_logits", "llm_logits_scale"))
        lines.append("{:<6}{:>10.1e}{:>10.3g}{:>12.1e}{:>10.3g}".format(lang, *numbers))
    return "\n".join(lines)

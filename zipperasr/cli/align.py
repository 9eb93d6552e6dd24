"""Word times and confidences for decoded sets: ctm, textgrid/ and words.jsonl in RUN_DIR/decode_<set>.

The run needs an aligner (zipperasr train-aligner). words.jsonl has beside each text what the CTC head alone hears, and
how far the two disagree: a sign of text that nobody has said. Sets that are aligned already are skipped. What is left
of texts or an aligner that are no longer there is removed.
"""

import argparse
import dataclasses
import time
from pathlib import Path

from zipperasr import files
from zipperasr.alignment.words import OUTPUTS
from zipperasr.cli import recipe
from zipperasr.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run-dir", type=Path, required=True, help="a run with an aligner and decoded sets")
    parser.add_argument("--data-dir", type=Path, required=True, help="holds manifests/, lists/ and features/")
    parser.add_argument("--sets", nargs="+", required=True, metavar="SET", help="<corpus>_<lang>_<split>")
    parser.add_argument("--text", choices=("hyp", "ref"), default="hyp", help="what is aligned (default: %(default)s)")
    parser.add_argument(
        "--format", nargs="+", choices=OUTPUTS, default=["ctm", "textgrid", "json"],
        help="(default: %(default)s); nbest: the best texts of the CTC head alone",
    )  # fmt: skip
    parser.add_argument("--engine", help="k2, torchaudio or torch (default: the first of them that is there)")


def run(args: argparse.Namespace) -> None:
    """Align what is not aligned yet and print a line for each set."""
    import torch

    from zipperasr.data.utterances import load_utterances
    from zipperasr.decoding import align
    from zipperasr.model import ALIGNER, ALIGNER_SETTINGS
    from zipperasr.model.aligner import Aligner
    from zipperasr.model.checkpoint import load_run
    from zipperasr.model.ctc import WEIGHTS
    from zipperasr.scoring import score

    device = "cuda" if torch.cuda.is_available() else "cpu"
    whole, model = recipe.load_run(args.run_dir), None
    aligner = Aligner.load(args.run_dir, device=device, engine=args.engine)
    made_by = [args.run_dir / ALIGNER / name for name in (WEIGHTS, ALIGNER_SETTINGS)]
    for name in dict.fromkeys(args.sets):
        directory = args.run_dir / f"decode_{name}"
        decoded = score.read(directory)
        every, meta = {"hyp": decoded.hyps, "ref": decoded.refs}, decoded.meta
        keys = {what: files.fingerprint([every[what], what, *map(files.sha256, made_by)]) for what in every}
        texts, key = every[args.text], keys[args.text]
        todo = [f for f in args.format if not align.is_current(directory, f, key)]
        if not todo:
            print(f"{directory}: aligned already", flush=True)
            continue
        model = model or load_run(args.run_dir, [aligner.step]).to(device)
        utterances = load_utterances(args.data_dir, meta["setting"], "test", [name], whole.data.features)[
            : meta["first"]
        ]
        if {u.id for u in utterances} != decoded.refs.keys():
            raise UserError(f"{directory}: decoded by another list than that in {args.data_dir}; decode it again")
        aligner = dataclasses.replace(aligner, num_best=align.NUM_BEST if "nbest" in todo else 0)
        began = time.perf_counter()
        heard = align.align(
            aligner, model.merged(decoded.language.code), decoded.language.code, utterances, texts,
            encoder=whole.model.encoder, decoding=whole.decoding,
        )  # fmt: skip
        rtfx = sum(u.duration_s for u in utterances) / (time.perf_counter() - began)
        align.remove(directory, [f for f in OUTPUTS if f in todo or not align.is_current(directory, f, *keys.values())])
        said = align.write(directory, utterances, texts, heard, todo)
        for output in todo:
            files.mark_done(directory, key, name=f".aligned.{output}")
        print(
            f"{directory}: {said['num_words']} words of {said['num_utts']} utterances ({said['num_unaligned']} have "
            f"none), confidence {said['confidence']:.2f}, disagreement {said['disagreement']:.2f}, RTFx {rtfx:.0f}",
            flush=True,
        )

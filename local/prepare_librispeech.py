#!/usr/bin/env python3
"""Manifests of LibriSpeech (openslr.org/12): sets <corpus>_en_{train,dev_clean,dev_other,test_clean,test_other}.

    <corpus-dir>/[LibriSpeech/]<part>/<speaker>/<chapter>/<speaker>-<chapter>.trans.txt     "id TEXT"
    <corpus-dir>/[LibriSpeech/]<part>/<speaker>/<chapter>/<speaker>-<chapter>-<number>.flac

`train` is made of the parts train-* that are there. Lhotse's own recipe holds a part in memory, calls the language
"English" and stops at a line without text; so it is not used.
"""

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from zipperasr.data import prepare
from zipperasr.data.prepare import Clip
from zipperasr.errors import UserError

PARTS = {
    "train": ("train-clean-100", "train-clean-360", "train-other-500"),
    "dev_clean": ("dev-clean",),
    "dev_other": ("dev-other",),
    "test_clean": ("test-clean",),
    "test_other": ("test-other",),
}


def run(args: argparse.Namespace) -> None:
    prepare.check_corpus(args.corpus)
    if args.langs != ["en"]:
        raise UserError(f"--langs {' '.join(args.langs)}: LibriSpeech is English; say --langs en")
    folders = find_parts(args.corpus_dir)
    for split, parts in PARTS.items():
        name = f"{args.corpus}_en_{split}"
        for part in parts:
            if part not in folders:
                print(f"{args.corpus_dir}: no {part}; {name} is made without it", flush=True)
        transcripts = [path for part in parts if part in folders for path in find_transcripts(folders[part])]
        if transcripts:
            prepare.write_manifests(args, [name], functools.partial(rows, name, transcripts), sources=transcripts)


def find_parts(corpus_dir: Path) -> dict[str, Path]:
    """The folder of each part that is there. Raises UserError when none is."""
    root = corpus_dir / "LibriSpeech" if (corpus_dir / "LibriSpeech").is_dir() else corpus_dir
    folders = {part: root / part for parts in PARTS.values() for part in parts if (root / part).is_dir()}
    if not folders:
        known = ", ".join(part for parts in PARTS.values() for part in parts)
        raise UserError(f"{corpus_dir}: no LibriSpeech; looked there and in LibriSpeech/ for {known}")
    return folders


def find_transcripts(folder: Path) -> list[Path]:
    """The transcripts of a part, in order. Raises UserError when there are none."""
    found = sorted(folder.glob("*/*/*.trans.txt"))
    if not found:
        raise UserError(f"{folder}: no transcripts; looked for <speaker>/<chapter>/<speaker>-<chapter>.trans.txt")
    return found


def rows(name: str, transcripts: Sequence[Path]) -> Iterator[tuple[str, Clip]]:
    for path in transcripts:
        for line in prepare.read_lines(path):
            utt_id, _, text = line.strip().partition(" ")
            if utt_id:
                yield name, Clip(utt_id, path.parent / f"{utt_id}.flac", "en", text, utt_id.partition("-")[0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus-dir", type=Path, required=True, help="holds LibriSpeech/<part>, or <part>")
    parser.add_argument("--langs", nargs="+", default=["en"], help="en, the only one there is")
    prepare.add_arguments(parser)
    sys.exit(prepare.main(parser, run))

#!/usr/bin/env python3
"""Manifests of Kaldi data directories, which ESPnet uses too: a directory is a split, and each language in it a set.

    prepare_kaldi.py --corpus mine --langs de fr --corpus-dir data               every folder of it that holds a wav.scp
    prepare_kaldi.py --corpus mine --langs de --splits train=dump/raw/tr_sp dev=dump/raw/train_dev

Read are wav.scp and text and, if they are there, segments, utt2spk and utt2lang (codes, ISO 639-3 codes or English
names; without it, everything is in the one language of --langs). A split is held out if its name begins with dev or
test: ESPnet's train_dev needs another name, as above.

wav.scp may name files of any codec that libsndfile reads, and entries of arks (x.ark:12). A command (sox ... |) is run
only with --run-commands: it may do anything. What is not a file of its own is stored once as FLAC, in
<out>/../audio/<corpus>/<split>. Relative paths start where you are, as in Kaldi, or in --root. For
run.sh, the configuration names such options: mine: {prepare: kaldi, langs: [de], options: [--root, /data/mine]}.

feats.scp is not read: Whisper hears its own log-mel features alone, and stage 3 makes them from the audio.
"""

import argparse
import functools
import sys
from collections import Counter
from pathlib import Path

from zipperasr import languages
from zipperasr.data import kaldi, prepare
from zipperasr.data.kaldi_audio import Locator
from zipperasr.errors import UserError


def run(args: argparse.Namespace) -> None:
    prepare.check_corpus(args.corpus)
    missing = {languages.get(lang).code for lang in args.langs}
    if not args.root.is_dir():
        raise UserError(f"--root {args.root}: no such folder")
    for split, directory in find_splits(args).items():
        missing -= prepare_split(args, split, kaldi.read(directory))
    if missing:
        raise UserError(
            f"--langs {' '.join(sorted(missing))}: no utterance in any data directory; mend utt2lang or --langs"
        )


def find_splits(args: argparse.Namespace) -> dict[str, Path]:
    """The data directory of each split. Raises UserError when there is none."""
    if args.splits:
        splits = dict(args.splits)
        if len(splits) < len(args.splits):
            raise UserError(f"--splits {' '.join(split for split, _ in args.splits)}: each takes a name of its own")
        return splits
    found = {path.parent.name: path.parent for path in sorted(args.corpus_dir.glob("*/wav.scp"))}
    if not found:
        raise UserError(f"{args.corpus_dir}: no data directory; looked for {args.corpus_dir}/<split>/wav.scp")
    return found


def prepare_split(args: argparse.Namespace, split: str, data: kaldi.DataDir) -> set[str]:
    """Write the manifests of one data directory; return its languages."""
    langs = data.langs(args.langs[0] if len(args.langs) == 1 else None)
    counts = Counter(langs.values())
    for lang in sorted(counts.keys() - set(args.langs)):
        print(f"{data.path}: {counts[lang]} utterances of {lang} are not taken; --langs does not name it", flush=True)
    sets = {lang: f"{args.corpus}_{lang}_{split}" for lang in args.langs if lang in counts}
    store = args.out.parent / "audio" / args.corpus / split
    locator = Locator(args.root, store, run_commands=args.run_commands, nj=args.nj)
    if sets:
        rows = functools.partial(data.rows, sets, langs, locator)
        prepare.write_manifests(args, [*sets.values()], rows, sources=data.sources)
    return set(sets)


def split_of(text: str) -> tuple[str, Path]:
    """A split and its directory, from `dev=data/train_dev`: a type of options."""
    split, equals, directory = text.partition("=")
    if not (split and equals and directory):
        raise argparse.ArgumentTypeError(f"'{text}' is not <split>=<data directory>")
    return split, Path(directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--corpus-dir", type=Path, help="holds a data directory for each split")
    where.add_argument("--splits", nargs="+", type=split_of, metavar="SPLIT=DIR", help="data directories, one by one")
    parser.add_argument("--langs", nargs="+", required=True, help="language codes to take")
    parser.add_argument(
        "--root", type=Path, default=Path(), help="where relative paths and commands start (default: here)"
    )
    parser.add_argument("--run-commands", action="store_true", help="run the commands in wav.scp; read them first")
    prepare.add_arguments(parser)
    sys.exit(prepare.main(parser, run))

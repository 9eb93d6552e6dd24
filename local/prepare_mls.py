#!/usr/bin/env python3
"""Manifests of a corpus in the layout of Multilingual LibriSpeech (openslr.org/94): one for each language and split.

    <corpus-dir>/<folder>/<split>/transcripts.txt                              "id<TAB>text"
    <corpus-dir>/<folder>/<split>/audio/<speaker>/<book>/<speaker>_<book>_<number>.{flac,opus,wav,mp3}

<folder> is a language code (de), or as released (mls_german, mls_german_opus). Every split in it is prepared.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from zipperasr import languages
from zipperasr.data import prepare
from zipperasr.data.prepare import Clip
from zipperasr.errors import UserError

SUFFIXES = (".flac", ".opus", ".wav", ".mp3")


def run(args: argparse.Namespace) -> None:
    prepare.check_corpus(args.corpus)
    for lang in args.langs:
        for transcripts in _transcripts(args.corpus_dir, lang):
            name, key = f"{args.corpus}_{lang}_{transcripts.parent.name}", prepare.key_of(transcripts)
            if not prepare.is_prepared(name, out=args.out, key=key):
                prepare.write_manifest(_clips(transcripts, lang), name, out=args.out, nj=args.nj, key=key)


def _transcripts(corpus_dir: Path, lang: str) -> list[Path]:
    """The transcripts of every split of a language."""
    name = languages.get(lang).name.lower()
    folders = [corpus_dir / folder for folder in (lang, f"mls_{name}", f"mls_{name}_opus")]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        raise UserError(f"{corpus_dir}: no language '{lang}'; looked for {', '.join(f.name for f in folders)}")
    found = sorted(folder.glob("*/transcripts.txt"))
    if not found:
        raise UserError(f"{folder}: no split there; looked for {folder}/*/transcripts.txt")
    return found


def _clips(transcripts: Path, lang: str) -> Iterator[Clip]:
    for number, line in enumerate(prepare.read_lines(transcripts), start=1):
        utt_id, _, text = line.strip("\r\n").partition("\t")
        speaker, _, rest = utt_id.partition("_")
        book, _, last = rest.rpartition("_")
        if not (speaker and book and last):
            raise UserError(f"{transcripts}:{number}: '{utt_id}' is not <speaker>_<book>_<number>; mend the line")
        stem = transcripts.parent / "audio" / speaker / book / utt_id
        paths = [stem.with_name(utt_id + suffix) for suffix in SUFFIXES]
        path = next((path for path in paths if path.is_file()), paths[0])
        yield Clip(utt_id, path, lang, text.strip(), speaker)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus-dir", type=Path, required=True, help="holds a folder for each language")
    parser.add_argument("--langs", nargs="+", required=True, help="language codes")
    prepare.add_arguments(parser)
    sys.exit(prepare.main(parser, run))

#!/usr/bin/env python3
"""Manifests of a corpus in the layout of Multilingual LibriSpeech (openslr.org/94): one for each language and split.

    <corpus-dir>/<folder>/<split>/transcripts.txt                              "id<TAB>text"
    <corpus-dir>/<folder>/<split>/audio/<speaker>/<book>/<speaker>_<book>_<number>.{flac,opus,wav,mp3}

<folder> is a language code (de), or as released (mls_german, mls_german_opus); of several the first of these is taken.
Every split in it is prepared. Lhotse's own recipe holds a language in memory, calls it "german", takes in every
language that lies there, and writes flac and opus trees of one language to the same files; so it is not used.
"""

import argparse
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

from zipperasr import languages
from zipperasr.data import prepare
from zipperasr.data.prepare import Clip, Rejected
from zipperasr.errors import UserError

SUFFIXES = (".flac", ".opus", ".wav", ".mp3")


def run(args: argparse.Namespace) -> None:
    prepare.check_corpus(args.corpus)
    for lang in args.langs:
        for transcripts in find_transcripts(args.corpus_dir, lang):
            name = f"{args.corpus}_{lang}_{transcripts.parent.name}"
            prepare.write_manifests(
                args, [name], functools.partial(rows, name, transcripts, lang), sources=[transcripts]
            )


def find_transcripts(corpus_dir: Path, lang: str) -> list[Path]:
    """The transcripts of every split of a language. Raises UserError when there are none."""
    name = languages.get(lang).name.lower()
    folders = [corpus_dir / folder for folder in (lang, f"mls_{name}", f"mls_{name}_opus")]
    there = [folder for folder in folders if folder.is_dir()]
    if not there:
        raise UserError(f"{corpus_dir}: no language '{lang}'; looked for {', '.join(f.name for f in folders)}")
    if len(there) > 1:
        print(f"{corpus_dir}: takes {there[0].name}, not {', '.join(f.name for f in there[1:])}", flush=True)
    found = sorted(there[0].glob("*/transcripts.txt"))
    if not found:
        raise UserError(f"{there[0]}: no split there; looked for {there[0]}/*/transcripts.txt")
    return found


def rows(name: str, transcripts: Path, lang: str) -> Iterator[tuple[str, Clip | Rejected]]:
    for number, line in enumerate(prepare.read_lines(transcripts), start=1):
        utt_id, _, text = line.strip().partition("\t")
        match utt_id.split("_"):
            case [speaker, book, last] if speaker and book and last:
                folder = transcripts.parent / "audio" / speaker / book
                yield name, Clip(utt_id, find_audio(folder, utt_id), lang, text, speaker)
            case _ if utt_id:
                where = f"{transcripts}:{number}: '{utt_id}' is not <speaker>_<book>_<number>"
                yield name, Rejected(utt_id, "bad row", where)


def find_audio(folder: Path, utt_id: str) -> Path:
    """The audio of an utterance; where there is none, the file that should be there."""
    paths = (folder / f"{utt_id}{suffix}" for suffix in SUFFIXES)
    return next((path for path in paths if path.is_file()), folder / f"{utt_id}{SUFFIXES[0]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus-dir", type=Path, required=True, help="holds a folder for each language")
    parser.add_argument("--langs", nargs="+", required=True, help="language codes")
    prepare.add_arguments(parser)
    sys.exit(prepare.main(parser, run))

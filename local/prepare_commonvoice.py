#!/usr/bin/env python3
"""Manifests of Common Voice 18.0: sets <corpus>_<lang>_{train,dev,test,validated,other} for each language.

    <corpus-dir>/[cv-corpus-18.0-2024-06-14/]<lang>/{train,dev,test,validated,other}.tsv    columns by name
    <corpus-dir>/[cv-corpus-18.0-2024-06-14/]<lang>/clips/*.mp3                             ids are their stems

The released lists of utterances name ids of validated and other too. `validated` repeats train, dev and test; here it
is without them, so that no utterance is in two sets. Splits are drawn anew for each release: another one is refused.
Lhotse's own recipe holds a split in memory, leaves out missing clips without counting them, does not find every
language by itself, and stops at a repeated row; so it is not used.
"""

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from zipperasr import languages
from zipperasr.data import prepare, sources
from zipperasr.data.prepare import Clip, Rejected
from zipperasr.errors import UserError

RELEASE = "cv-corpus-18.0-2024-06-14"
DRAWN = ("train", "dev", "test")
COLUMNS = ("client_id", "path", "sentence")


def run(args: argparse.Namespace) -> None:
    prepare.check_corpus(args.corpus)
    for lang in args.langs:
        tables = find_tables(args.corpus_dir, languages.get(lang).code, any_release=args.any_release)
        drawn = [tables[split] for split in DRAWN]
        for split, table in tables.items():
            name, others = f"{args.corpus}_{lang}_{split}", drawn if split == "validated" else []
            stream = functools.partial(rows, name, table, lang, others=others)
            prepare.write_manifests(args, [name], stream, sources=[table, *others])


def find_tables(corpus_dir: Path, lang: str, *, any_release: bool = False) -> dict[str, Path]:
    """The table of each split of a language. Raises UserError when one is missing or of another release."""
    releases = sorted(corpus_dir.glob(f"cv-corpus-*/{lang}"), key=lambda path: path.parent.name != RELEASE)
    folders = [folder for folder in (*releases, corpus_dir / lang) if folder.is_dir()]
    if not folders:
        raise UserError(f"{corpus_dir}: no language '{lang}'; looked for {RELEASE}/{lang} and {lang}")
    folder = folders[0]
    release = next((part for part in folder.resolve().parts if part.startswith("cv-corpus-")), RELEASE)
    if release != RELEASE and not any_release:
        mend = f"splits differ between releases, so get {RELEASE}, or take this one with --any-release"
        raise UserError(f"{folder}: is of {release}; {mend}")
    tables = {split: folder / f"{split}.tsv" for split in (*DRAWN, "validated", "other")}
    if missing := [path.name for path in tables.values() if not path.is_file()]:
        raise UserError(f"{folder}: no {', '.join(missing)}; unpack the whole archive of this language")
    return tables


def rows(name: str, table: Path, lang: str, *, others: Sequence[Path]) -> Iterator[tuple[str, Clip | Rejected]]:
    """The clips of a table, but for those of the tables `others`, of which the ids are held in memory."""
    elsewhere = {id_of(row): other.stem for other in others for _, row in sources.read_table(other, COLUMNS)}
    for number, row in sources.read_table(table, COLUMNS):
        if missing := [column for column in COLUMNS if column not in row]:
            yield name, Rejected(id_of(row), "bad row", f"{table}:{number}: no {', '.join(missing)}")
        elif id_of(row) in elsewhere:
            yield name, Rejected(id_of(row), "in another split", elsewhere[id_of(row)])
        else:
            yield name, Clip(id_of(row), table.parent / "clips" / row["path"], lang, row["sentence"], row["client_id"])


def id_of(row: dict[str, str]) -> str:
    """The utterance id of a row, as in the released lists: the stem of its mp3; empty where it names none."""
    return Path(row.get("path", "")).stem


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus-dir", type=Path, required=True, help="holds the release, or a folder a language")
    parser.add_argument("--langs", nargs="+", required=True, help="language codes")
    parser.add_argument("--any-release", action="store_true", help=f"take a release other than {RELEASE}")
    prepare.add_arguments(parser)
    sys.exit(prepare.main(parser, run))

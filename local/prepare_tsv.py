#!/usr/bin/env python3
"""Manifests of any recordings, from a table: the simplest way to bring data, and the template of a preparation.

    prepare_tsv.py --corpus mine --tsv clips.tsv --split test         this table is the split
    prepare_tsv.py --corpus mine --corpus-dir data/corpora/mine       every <split>.tsv in there (train.tsv, test.tsv)

The table is UTF-8 with tabs between columns and a header. It needs the columns id, path (relative to the table), lang
(a language code) and transcript, in any order; others are ignored. Quotes have no special meaning. Files may be of
any codec that libsndfile reads (wav, flac, mp3, ogg, opus, aiff), any sampling rate, mono or stereo. It makes one
manifest a language.
"""

import argparse
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

from zipperasr import languages
from zipperasr.data import prepare, sources
from zipperasr.data.prepare import Clip, Rejected
from zipperasr.errors import UserError

COLUMNS = ("id", "path", "lang", "transcript")


def run(args: argparse.Namespace) -> None:
    prepare.check_corpus(args.corpus)
    for split, table in find_tables(args).items():
        langs = args.langs or sorted({lang for lang, _ in read(table)})
        if not langs:
            raise UserError(f"{table}: no rows of any language")
        names = {languages.get(lang).code: f"{args.corpus}_{lang}_{split}" for lang in langs}
        prepare.write_manifests(args, [*names.values()], functools.partial(rows, table, names), sources=[table])


def find_tables(args: argparse.Namespace) -> dict[str, Path]:
    """The table of each split."""
    if args.tsv and not args.split:
        raise UserError(f"--tsv {args.tsv}: say with --split which split it is")
    tables = {args.split: args.tsv} if args.tsv else {path.stem: path for path in sorted(args.corpus_dir.glob("*.tsv"))}
    missing = [path for path in tables.values() if not path.is_file()] if tables else [args.corpus_dir / "<split>.tsv"]
    if missing:
        raise UserError(f"{missing[0]}: no such table; it takes the columns {', '.join(COLUMNS)}")
    return tables


def rows(table: Path, names: dict[str, str]) -> Iterator[tuple[str, Clip | Rejected]]:
    """The set of each row with its clip: a stream, so that a table may be of any size."""
    return ((names[lang], row) for lang, row in read(table) if lang in names)


def read(table: Path) -> Iterator[tuple[str, Clip | Rejected]]:
    """The language of each row with its clip. Raises UserError for a row of no language, as it belongs to no set."""
    for number, row in sources.read_table(table, COLUMNS):
        where, lang = f"{table}:{number}", row.get("lang", "")
        if lang not in languages.LANGUAGES:
            raise UserError(f"{where}: unknown language '{lang}'; has the row as many columns as the header?")
        if missing := [column for column in COLUMNS if column not in row]:
            yield lang, Rejected(row.get("id", where), "bad row", f"{where}: no {', '.join(missing)}")
        else:
            yield lang, Clip(row["id"], table.parent / row["path"], lang, row["transcript"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--tsv", type=Path, help="the table")
    where.add_argument("--corpus-dir", type=Path, help="holds a table for each split, <split>.tsv")
    parser.add_argument("--split", help="of --tsv: train, dev, test or another name")
    parser.add_argument("--langs", nargs="+", help="language codes to take (default: all there are)")
    prepare.add_arguments(parser)
    sys.exit(prepare.main(parser, run))

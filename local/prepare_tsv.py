#!/usr/bin/env python3
"""Manifests of any recordings, from a table: the simplest way to bring data.

    prepare_tsv.py --corpus mine --tsv clips.tsv --split test         this table is the split
    prepare_tsv.py --corpus mine --corpus-dir data/corpora/mine       every <split>.tsv in there (train.tsv, test.tsv)

The table is UTF-8 with tabs between columns and a header. It needs the columns id, path (relative to the table), lang
(a language code) and transcript, in any order; others are ignored. Quotes have no special meaning. Files may be of
any codec that libsndfile reads (wav, flac, mp3, ogg, opus, aiff), any sampling rate, mono or stereo. It makes one
manifest a language.
"""

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from zipperasr import languages
from zipperasr.data import prepare
from zipperasr.data.prepare import Clip
from zipperasr.errors import UserError

COLUMNS = ("id", "path", "lang", "transcript")


def run(args: argparse.Namespace) -> None:
    prepare.check_corpus(args.corpus)
    for lang in args.langs or ():
        languages.get(lang)
    for split, tsv in _tables(args).items():
        key, clips = prepare.key_of(tsv), {}
        for clip in _clips(tsv):
            clips.setdefault(clip.lang, []).append(clip)
        for lang in sorted(clips.keys() & set(args.langs or clips)):
            name = f"{args.corpus}_{lang}_{split}"
            if not prepare.is_prepared(name, out=args.out, key=key):
                prepare.write_manifest(clips[lang], name, out=args.out, nj=args.nj, key=key)
        if missing := sorted(set(args.langs or [*clips, "any language"][:1]) - clips.keys()):
            raise UserError(f"{tsv}: no rows of {', '.join(missing)}; add some, or mend --langs")


def _tables(args: argparse.Namespace) -> dict[str, Path]:
    """The table of each split."""
    if args.tsv and not args.split:
        raise UserError(f"--tsv {args.tsv}: say with --split which split it is")
    tables = {args.split: args.tsv} if args.tsv else {path.stem: path for path in sorted(args.corpus_dir.glob("*.tsv"))}
    missing = [path for path in tables.values() if not path.is_file()] if tables else [args.corpus_dir / "<split>.tsv"]
    if missing:
        raise UserError(f"{missing[0]}: no such table; it takes the columns {', '.join(COLUMNS)}")
    return tables


def _clips(tsv: Path) -> Iterator[Clip]:
    rows = csv.DictReader(prepare.read_lines(tsv), delimiter="\t", quoting=csv.QUOTE_NONE)
    yield from (_clip(tsv, rows.line_num, row) for row in rows)


def _clip(tsv: Path, line: int, row: dict[str, str]) -> Clip:
    if missing := [column for column in COLUMNS if row.get(column) is None]:
        found = ", ".join(str(column) for column in row if row[column] is not None)
        raise UserError(f"{tsv}:{line}: no {', '.join(missing)}; columns with a value here: {found}")
    try:
        languages.get(row["lang"])
    except UserError as error:
        raise UserError(f"{tsv}:{line}: '{row['id']}': {error}") from error
    return Clip(row["id"], tsv.parent / row["path"], row["lang"], row["transcript"].strip())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--tsv", type=Path, help="the table")
    where.add_argument("--corpus-dir", type=Path, help="holds a table for each split, <split>.tsv")
    parser.add_argument("--split", help="of --tsv: train, dev, test or another name")
    parser.add_argument("--langs", nargs="+", help="language codes to take (default: all there are)")
    prepare.add_arguments(parser)
    sys.exit(prepare.main(parser, run))

"""Transcripts as corpora ship them, read as streams: tables with tabs, JSON of long recordings with their segments."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ijson

from zipperasr.data import prepare
from zipperasr.data.prepare import Clip, Rejected
from zipperasr.errors import UserError


def read_table(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and {column: value} of each row of a table with tabs and a header; empty lines are not rows.

    Quotes have no special meaning: real tables hold unbalanced ones. A row that is too short lacks its last columns;
    one that is too long has none at all, as nothing says which value belongs where.
    Raises UserError when the header lacks one of `columns`.
    """
    lines = enumerate(prepare.read_lines(path), start=1)
    header = next(lines, (1, ""))[1].rstrip("\r").split("\t")
    if missing := [column for column in columns if column not in header]:
        raise UserError(f"{path}: no column {', '.join(missing)}; its header has: {', '.join(header)}")
    for number, line in lines:
        if line.strip():
            values = line.rstrip("\r").split("\t")
            yield number, dict(zip(header, values)) if len(values) <= len(header) else {}


def read_audios(path: Path) -> Iterator[dict[str, Any]]:
    """The long recordings of a JSON file {"audios": [{aid, segments, ...}, ...]}, one in memory at a time.

    Raises UserError when the file is not whole or holds none.
    """
    audio = None
    with open(path, "rb") as stream:
        stream.seek(len(codecs.BOM_UTF8) if stream.read(3) == codecs.BOM_UTF8 else 0)
        try:
            for audio in ijson.items(stream, "audios.item", use_float=True):
                yield audio
        except ijson.JSONError as error:
            what = str(error).splitlines()[0].strip()
            raise UserError(f"{path}: not whole JSON ({what}); fetch it again") from error
    if audio is None:
        raise UserError(f'{path}: no "audios" in it; this is not the list of recordings')


def clip(segment: Mapping[str, Any], path: Path, lang: str, *, text: str) -> Clip | Rejected:
    """The utterance of a segment {sid, begin_time, end_time, `text`} of the recording `path`; times are in seconds."""
    try:
        start_s, end_s = float(segment["begin_time"]), float(segment["end_time"])
        written = "" if segment[text] is None else str(segment[text])
        return Clip(str(segment["sid"]), path, lang, written, start_s=start_s, end_s=end_s)
    except (KeyError, TypeError, ValueError) as error:
        return Rejected(str(segment.get("sid")), "bad row", f"{path}: segment {dict(segment)}: {error!r}")

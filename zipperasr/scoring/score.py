"""Units to counts and alignments, and the files that hold texts and counts.

Every reference is in the denominator: an utterance without a hypothesis counts as deleted. An empty reference adds
nothing to it, but what was inserted there counts.
"""

import dataclasses
import functools
import json
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rapidfuzz.distance import Levenshtein

from zipperasr import files, languages
from zipperasr.errors import UserError
from zipperasr.languages import Language
from zipperasr.scoring import normalise

OPS = {"equal": "", "replace": "S", "insert": "I", "delete": "D"}
PAINT = {"S": "\x1b[33m", "I": "\x1b[36m", "D": "\x1b[31m"}  # yellow, cyan, red


@dataclasses.dataclass(frozen=True, slots=True)
class Counts:
    """Edit operations of a minimal alignment, in words or characters."""

    hits: int = 0
    sub: int = 0
    ins: int = 0
    dele: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.hits + other.hits, self.sub + other.sub, self.ins + other.ins, self.dele + other.dele)

    @property
    def ref_len(self) -> int:
        """Number of units in the reference."""
        return self.hits + self.sub + self.dele

    @property
    def errors(self) -> int:
        """Substitutions, insertions and deletions."""
        return self.sub + self.ins + self.dele

    @property
    def error_rate(self) -> float | None:
        """Errors in percent of the reference; None where it is empty (its insertions still count in a sum)."""
        return 100 * self.errors / self.ref_len if self.ref_len else None

    def as_dict(self) -> dict[str, int]:
        """The numbers by the names they have in files."""
        return {"ref_len": self.ref_len, "hits": self.hits, "sub": self.sub, "ins": self.ins, "del": self.dele}


@dataclasses.dataclass(frozen=True, slots=True)
class Aligned:
    """One scored utterance: its counts, and the units of reference and hypothesis (None where there is none)."""

    id: str
    counts: Counts
    ref: list[str]
    hyp: list[str] | None

    @property
    def columns(self) -> list[tuple[str, str, str]]:
        """The alignment as (reference unit, hypothesis unit, operation), "" for a gap and for a hit."""
        hyp, columns = self.hyp or [], []
        for tag, r0, r1, h0, h1 in Levenshtein.opcodes(self.ref, hyp):
            length = max(r1 - r0, h1 - h0)
            columns += zip(self.ref[r0:r1] or [""] * length, hyp[h0:h1] or [""] * length, [OPS[tag]] * length)
        return columns


def align(utt_id: str, ref: list[str], hyp: list[str] | None) -> Aligned:
    """A minimal alignment of two sequences of units; `hyp` is None where there is no hypothesis."""
    tags = [edit.tag for edit in Levenshtein.editops(ref, hyp or [])]
    sub, ins, dele = map(tags.count, ("replace", "insert", "delete"))
    return Aligned(utt_id, Counts(len(ref) - sub - dele, sub, ins, dele), ref, hyp)


def score(refs: dict[str, str], hyps: dict[str, str], language: Language, profile: str = "whisper") -> list[Aligned]:
    """Every reference, in its order, aligned with its hypothesis after normalisation, by profile (see normalise.py)."""
    split = normalise.splitter(language, profile)
    return [align(i, split(text), split(hyps[i]) if i in hyps else None) for i, text in refs.items()]


@dataclasses.dataclass(frozen=True)
class Decoded:
    """A decode directory as read: texts by utterance id, and what meta.json and utts.jsonl say (nothing without)."""

    directory: Path
    language: Language
    refs: dict[str, str]
    hyps: dict[str, str]
    meta: dict[str, Any]
    utts: dict[str, dict]

    @property
    def set(self) -> str:
        """The set's name: as described, or by the directory's name."""
        return self.meta.get("set") or self.directory.resolve().name.removeprefix("decode_")


def read(directory: Path | str, *, lang: str | None = None) -> Decoded:
    """What a decode directory holds; the language is `lang`, or the one of its `meta.json`.

    Raises UserError for a directory that is not decoded to the end, a missing or malformed file, ids that stand twice,
    hypotheses without a reference, an unknown language and mixed languages.
    """
    directory = Path(directory)
    _check_whole(directory)
    refs, hyps = read_text(directory / "ref"), read_text(directory / "hyp")
    if not refs:
        raise UserError(f"{directory / 'ref'}: holds no utterance; decode this set again")
    if unknown := [utt_id for utt_id in hyps if utt_id not in refs]:
        raise UserError(f"{directory}: {len(unknown)} hypotheses have no reference: {some(unknown)}; decode it again")
    meta, utts = directory / "meta.json", directory / "utts.jsonl"
    described = files.read_json(meta) if meta.is_file() else {}
    if not (lang := lang or described.get("lang")):
        raise UserError(f"{directory}: no meta.json that names its language; give it by --lang")
    rows = read_rows(utts) if utts.is_file() else {}
    if others := {row["lang"]: utt_id for utt_id, row in rows.items() if row.get("lang", lang) != lang}:
        found = ", ".join(f"{code} ({utt_id})" for code, utt_id in sorted(others.items()))
        raise UserError(f"{utts}: scored as {lang} but also holds {found}; a set has one language, so split it")
    return Decoded(directory, languages.get(lang), refs, hyps, described, rows)


def _check_whole(directory: Path) -> None:
    """Raises UserError where decoding has begun (it leaves a lock, and parts until the end) and has not ended."""
    parts = sorted(directory.glob("part.*.jsonl"), key=lambda path: path.stat().st_mtime)
    if (directory / ".done").is_file() or not (parts or (directory / ".lock").is_file()):
        return
    newest = parts[-1].name.split(".")[1] if parts else ""
    num = sum(part.read_bytes().count(b"\n") for part in parts if part.name.split(".")[1] == newest)
    raise UserError(f"{directory}: decoding has not ended, {num} utterances are decoded; run its stage again to go on")


def read_rows(path: Path, *, again: str = "decode this set again") -> dict[str, dict]:
    """The JSON objects of a file's lines by id. Raises UserError, with `again` as the mend, for a broken file."""
    try:
        return {row["id"]: row for row in map(json.loads, read_lines(path))}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a JSON object with an id in each line ({error}); {again}") from None


def read_text(path: Path) -> dict[str, str]:
    """A Kaldi text file ("id text" lines; an id alone has empty text) as {id: text}, in file order.

    Raises UserError naming the file, and the ids that stand twice in it.
    """
    texts: dict[str, str] = {}
    twice = []
    for number, line in enumerate(read_lines(path), 1):
        utt_id, *text = line.split(maxsplit=1) or [None]
        if utt_id is None:
            raise UserError(f"{path}: line {number} is empty; every line begins with an utterance id")
        twice += [utt_id] if utt_id in texts else []
        texts[utt_id] = text[0].strip() if text else ""
    if twice:
        raise UserError(f"{path}: {len(twice)} ids stand more than once: {some(twice)}; decode this set again")
    return texts


def read_per_utt(path: Path) -> dict[str, Counts]:
    """The counts in a `per_utt` file by utterance id. Raises UserError naming the file when it is missing or broken."""
    try:
        header, *rows = [line.split("\t") for line in read_lines(path)]
        if header != ["id", *Counts().as_dict(), "rate"]:
            raise ValueError(f"its first line is {header}")
        return {utt_id: Counts(*map(int, (hits, sub, ins, dele))) for utt_id, _, hits, sub, ins, dele, _ in rows}
    except ValueError as error:
        raise UserError(f"{path}: not a table of counts ({error}); score this set again") from error


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file. Raises UserError naming the file when it is missing or not that."""
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give decode directories, made by stages 5 and 7") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}: line {line} is not UTF-8 ({error.reason}); write it as UTF-8") from error
    if text.startswith("\ufeff"):
        raise UserError(f"{path}: begins with a byte order mark; write it as UTF-8 without one")
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UserError(f"{path}: line {line} has a NUL character; take it out, or write the file again")
    return text.removesuffix("\n").split("\n") if text else []


def some(ids: Sequence[str], most: int = 5) -> str:
    """The first of `ids`, and how many more there are."""
    return " ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")


def percent(rate: float | None) -> str:
    """A rate with two decimals; "-" where it is undefined because the reference is empty."""
    return "-" if rate is None else f"{rate:.2f}"


def grid(utterance: Aligned, *, label: str = "hyp", most: float = math.inf, in_color: bool = False) -> Iterator[str]:
    """Lines of an alignment: reference, hypothesis (named `label`) and operations, one column over the other.

    They go on in further lines after at most `most` columns of a terminal.
    """
    columns = [[shown(cell) for cell in column] for column in utterance.columns]
    for block in _blocks(columns, most - len("ref  ")):
        widths = [max(map(width, column)) for column in block]
        paint = [PAINT.get(op) if in_color else None for *_, op in block]
        for name, gap, cells in zip(("ref", label, "op"), "** ", zip(*block)):
            padded = [cell + (" " if cell else gap) * (w - width(cell)) for cell, w in zip(cells, widths)]
            painted = [f"{color}{cell}\x1b[0m" if color else cell for cell, color in zip(padded, paint)]
            yield f"{name:<3}  {' '.join(painted)}".rstrip()


def _blocks(columns: list[list[str]], most: float) -> list[list[list[str]]]:
    blocks, used = [[]], 0
    for column in columns:
        room = max(map(width, column)) + 1
        if used + room > most + 1:
            blocks.append([])
            used = 0
        blocks[-1].append(column)
        used += room
    return blocks


@functools.lru_cache(maxsize=100_000)
def width(text: str) -> int:
    """Columns that `text` takes in a terminal: 2 for wide characters, 0 for marks and format characters, else 1."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.category(char) in ("Mn", "Me", "Cf") for char in text)


def shown(unit: str) -> str:
    """A unit for people: a mark alone stands on a dotted circle, and control characters cannot act on a terminal."""
    unit = re.sub(r"[\x00-\x1f\x7f-\x9f]", "\ufffd", unit)
    return f"\u25cc{unit}" if unicodedata.category(unit[:1] or " ")[0] == "M" else unit

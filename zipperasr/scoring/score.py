"""Scores of a decode directory: `hyp` and `ref` in Kaldi text form -> `scores.json`, `per_utt`, `align`.

Every reference is in the denominator: an utterance without a hypothesis counts as deleted, and is named.
"""

import dataclasses
import importlib.metadata
import json
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

import jiwer

import zipperasr
from zipperasr import files, languages
from zipperasr.errors import UserError
from zipperasr.languages import Language
from zipperasr.scoring import normalise

OPS = {"equal": "", "substitute": "S", "insert": "I", "delete": "D"}


@dataclasses.dataclass(frozen=True)
class Counts:
    """Edit operations of a minimal alignment, in words or characters."""

    hits: int = 0
    sub: int = 0
    ins: int = 0
    dele: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))

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


@dataclasses.dataclass(frozen=True)
class Aligned:
    """One scored utterance: its counts and (reference unit, hypothesis unit, operation) columns, "" for a gap."""

    id: str
    counts: Counts
    columns: list[tuple[str, str, str]]
    is_missing: bool = False


def align(utt_id: str, ref: list[str], hyp: list[str] | None) -> Aligned:
    """A minimal alignment of two sequences of units; `hyp` is None where there is no hypothesis."""
    out = jiwer.process_words([ref], [hyp or []], reference_transform=list, hypothesis_transform=list)
    columns = []
    for chunk in out.alignments[0]:
        refs, hyps = ref[chunk.ref_start_idx : chunk.ref_end_idx], (hyp or [])[chunk.hyp_start_idx : chunk.hyp_end_idx]
        length = max(len(refs), len(hyps))
        columns += zip(refs or [""] * length, hyps or [""] * length, [OPS[chunk.type]] * length)
    counts = Counts(out.hits, out.substitutions, out.insertions, out.deletions)
    return Aligned(utt_id, counts, columns, is_missing=hyp is None)


def score(refs: dict[str, str], hyps: dict[str, str], language: Language, profile: str = "whisper") -> list[Aligned]:
    """Every reference, in its order, aligned with its hypothesis after normalisation.

    Raises UserError naming the hypotheses that have no reference.
    """
    if unknown := [utt_id for utt_id in hyps if utt_id not in refs]:
        raise UserError(f"{len(unknown)} hypotheses have no reference: {some(unknown)}; decode this set again")
    split = normalise.splitter(language, profile)
    return [align(i, split(text), split(hyps[i]) if i in hyps else None) for i, text in refs.items()]


def score_directory(directory: Path | str, *, profile: str = "whisper", lang: str | None = None) -> dict:
    """Write `scores.json`, `per_utt` and `align` into a decode directory, and return what is in `scores.json`.

    The language is `lang`, or the one of the directory's `meta.json`. Raises UserError for a missing or malformed file,
    duplicate ids, hypotheses without a reference and directories of mixed languages.
    """
    directory = Path(directory)
    refs, hyps = read_text(directory / "ref"), read_text(directory / "hyp")
    if not refs:
        raise UserError(f"{directory / 'ref'}: holds no utterance; decode this set again")
    meta_path = directory / "meta.json"
    meta = files.read_json(meta_path) if meta_path.is_file() or not lang else {}
    language = languages.get(lang or meta.get("lang", ""))
    _check_language(directory / "utts.jsonl", language.code)
    try:
        utterances = score(refs, hyps, language, profile)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from error
    scores = _summary(utterances, language, profile, meta | {"set": set_name(directory, meta)})
    with files.write(directory / "per_utt") as stream:
        stream.writelines(_per_utt(utterances))
    with files.write(directory / "align") as stream:
        stream.writelines(_alignments(utterances, language))
    files.write_json(directory / "scores.json", scores)
    return scores


def read_text(path: Path) -> dict[str, str]:
    """A Kaldi text file ("id text" lines; an id alone has empty text) as {id: text}, in file order.

    Raises UserError naming the file, and the ids that stand twice in it.
    """
    texts: dict[str, str] = {}
    twice = []
    try:
        with open(path, encoding="utf-8", newline="\n") as stream:
            for number, line in enumerate(stream, 1):
                utt_id, *text = line.split(maxsplit=1) or [None]
                if utt_id is None:
                    raise UserError(f"{path}: line {number} is empty; every line begins with an utterance id")
                twice += [utt_id] if utt_id in texts else []
                texts[utt_id] = text[0].strip() if text else ""
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; give decode directories, made by stages 5 and 7") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}); decode this set again") from error
    if twice:
        raise UserError(f"{path}: {len(twice)} ids stand more than once: {some(twice)}; decode this set again")
    return texts


def set_name(directory: Path, meta: dict) -> str:
    """The set a decode directory belongs to: as described, or by the directory's name."""
    return meta.get("set") or directory.resolve().name.removeprefix("decode_")


def some(ids: list[str], most: int = 5) -> str:
    """The first of `ids`, and how many more there are."""
    return " ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")


def _check_language(path: Path, lang: str) -> None:
    if not path.is_file():
        return
    with open(path, encoding="utf-8", newline="\n") as stream:
        others = {row["lang"]: row["id"] for row in map(json.loads, stream) if row["lang"] != lang}
    if others:
        found = ", ".join(f"{code} ({utt_id})" for code, utt_id in sorted(others.items()))
        raise UserError(f"{path}: scored as {lang} but also holds {found}; a set has one language, so split it")


def _summary(utterances: list[Aligned], language: Language, profile: str, meta: dict) -> dict:
    total = sum((u.counts for u in utterances), Counts())
    missing = [u.id for u in utterances if u.is_missing]
    return {
        "set": meta["set"],
        "lang": language.code,
        "metric": language.metric,
        "unit": language.unit,
        "profile": profile,
        "signature": signature(language, profile, meta.get("unseen_policy")),
        "num_utts": len(utterances),
        "num_missing": len(missing),
        "ref_len": total.ref_len,
        "sub": total.sub,
        "ins": total.ins,
        "del": total.dele,
        "hits": total.hits,
        "error_rate": total.error_rate,
        "missing": missing,
    }


def signature(language: Language, profile: str, unseen_policy: str | None = None) -> str:
    """Everything that the number depends on beside the two texts: two scores compare only if their signatures agree."""
    version = importlib.metadata.version
    parts = [language.metric, f"unit:{language.unit}", f"profile:{profile}", f"lang:{language.code}"]
    parts += [f"zipperasr:{zipperasr.__version__}", f"whisper:{version('openai-whisper')}", f"jiwer:{version('jiwer')}"]
    return "|".join(parts + [f"unseen:{unseen_policy}"] * bool(unseen_policy))


def _per_utt(utterances: Iterable[Aligned]) -> Iterator[str]:
    yield "id\tref_len\thits\tsub\tins\tdel\trate\n"
    for u in utterances:
        counts = (u.counts.ref_len, *dataclasses.astuple(u.counts))
        yield "\t".join([u.id, *map(str, counts), percent(u.counts.error_rate)]) + "\n"


def _alignments(utterances: Iterable[Aligned], language: Language) -> Iterator[str]:
    for u in utterances:
        c = u.counts
        note = "  (no hypothesis)" if u.is_missing else ""
        yield f"{u.id}  {language.metric} {percent(c.error_rate)}  "
        yield f"[{c.errors} / {c.ref_len}, {c.ins} ins, {c.dele} del, {c.sub} sub]{note}\n"
        columns = [[_shown(cell) for cell in column] for column in u.columns]
        widths = [max(map(width, column)) for column in columns]
        for label, gap, cells in zip(("ref", "hyp", "op "), "** ", zip(*columns)):
            padded = [cell + (" " if cell else gap) * (w - width(cell)) for cell, w in zip(cells, widths)]
            yield f"{label}  {' '.join(padded)}".rstrip() + "\n"
        yield "\n"


def percent(rate: float | None) -> str:
    """A rate with two decimals; "-" where it is undefined because the reference is empty."""
    return "-" if rate is None else f"{rate:.2f}"


def width(text: str) -> int:
    """Columns that `text` takes in a terminal: 2 for wide characters, 0 for marks and format characters, else 1."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.category(char) in ("Mn", "Me", "Cf") for char in text)


def _shown(unit: str) -> str:
    """A unit that is only a mark stands on a dotted circle, so that it does not join what is beside it."""
    return f"\u25cc{unit}" if unicodedata.category(unit[:1] or " ")[0] == "M" else unit

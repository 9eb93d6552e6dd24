"""Manifests, `<data-dir>/manifests/<corpus>_<lang>_<split>_cuts.jsonl.gz`: a Lhotse cut per utterance; their validator.

A cut's id is its utterance id; its one supervision has the same id, the transcript and the language code. Cuts are read
as plain dictionaries, which is many times faster than Lhotse's objects; `to_cut` makes the object.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import functools
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zipperasr import files
from zipperasr.data import audio, parallel
from zipperasr.errors import UserError
from zipperasr.languages import LANGUAGES

if TYPE_CHECKING:
    from lhotse.cut import Cut

SUFFIX = "_cuts.jsonl.gz"
MAX_DURATION_S = 30.0  # the encoder's window
MIN_DURATION_S = 0.025  # one window of Whisper's log-mel
USUAL_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
WARNINGS = ("odd sampling rate",)  # defects of every other kind stop the recipe


@dataclass(frozen=True)
class Defect:
    """What is wrong with one utterance; `line` counts from 1 in the manifest of `set`."""

    set: str
    line: int
    utt_id: str
    kind: str
    detail: str

    @property
    def is_fatal(self) -> bool:
        """Whether the recipe must not go on with it."""
        return self.kind not in WARNINGS


@dataclass(frozen=True)
class Report:
    """The outcome of validation: seconds of each utterance per set, and every defect."""

    durations_s: dict[str, list[float]]
    defects: list[Defect]

    @property
    def fatal(self) -> list[Defect]:
        """The defects that stop the recipe."""
        return [defect for defect in self.defects if defect.is_fatal]

    def table(self) -> str:
        """Utterances, hours and defects of each set, and the defects counted by kind."""
        fatal = collections.Counter(defect.set for defect in self.fatal)
        warned = collections.Counter(defect.set for defect in self.defects if not defect.is_fatal)
        rows = [f"{'set':<32}{'utts':>9}{'hours':>10}{'fatal':>8}{'warned':>8}"]
        rows += [
            f"{name:<32}{len(seconds):>9}{sum(seconds) / 3600:>10.3f}{fatal[name]:>8}{warned[name]:>8}"
            for name, seconds in self.durations_s.items()
        ]
        kinds = collections.Counter(defect.kind for defect in self.defects)
        return "\n".join(rows + [f"{count:>9} x {kind}" for kind, count in sorted(kinds.items())])


def path_of(data_dir: Path | str, name: str) -> Path:
    """Where the manifest of the set `name` is."""
    return Path(data_dir) / "manifests" / f"{name}{SUFFIX}"


def marker(name: str) -> str:
    """The file, in the directory of manifests, which says that the set `name` is prepared."""
    return f".{name}.done"


def find(data_dir: Path | str, corpora: Mapping[str, Iterable[str]]) -> dict[str, Path]:
    """The manifests of `corpora` ({corpus: languages}) by set name. Raises UserError when a language has none."""
    found = {}
    for corpus, langs in corpora.items():
        for lang in langs:
            paths = sorted(path_of(data_dir, f"{corpus}_{lang}_*").parent.glob(f"{corpus}_{lang}_*{SUFFIX}"))
            if not paths:
                raise UserError(f"{path_of(data_dir, f'{corpus}_{lang}_*')}: there is none; run stage 1")
            found.update({path.name.removesuffix(SUFFIX): path for path in paths})
    return found


def read(path: Path | str) -> Iterator[dict[str, Any]]:
    """The cuts of a manifest as dictionaries, in file order. Raises UserError when it is missing, broken or empty."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            line = None
            for line in stream:
                yield json.loads(line)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such manifest; run stage 1") from error
    except (gzip.BadGzipFile, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{path}: not a whole manifest ({error}); delete it and run stage 1 again") from error
    if line is None:
        raise UserError(f"{path}: the manifest holds no utterance; check the corpus it was prepared from")


def write(path: Path | str, cuts: Iterable[dict[str, Any]]) -> None:
    """Write cuts as JSON lines, gzip-compressed without name and time: the same cuts give the same bytes."""
    with files.write(path, "wb") as raw, gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as stream:
        for cut in cuts:
            stream.write(json.dumps(cut, ensure_ascii=False).encode() + b"\n")


def to_cut(cut: dict[str, Any]) -> Cut:
    """The Lhotse object of a cut's dictionary, which is taken apart."""
    from lhotse.serialization import deserialize_item

    return deserialize_item(cut)


def validate(manifests: Mapping[str, Path], *, nj: int = 1) -> Report:
    """Check every utterance of `manifests` ({set: path}), reading the header and the end of every audio file.

    Sets whose split begins with `train` may share neither ids nor audio with any other set; the training utterance has
    the defect. Raises UserError for a manifest that is missing, broken or empty.
    """
    _check_audio.cache_clear()  # files may have changed since
    ordered = sorted(manifests, key=lambda name: (is_train(name), name))  # held-out sets first
    items = ((name, line, cut) for name in ordered for line, cut in enumerate(read(manifests[name]), start=1))
    durations_s: dict[str, list[float]] = {name: [] for name in sorted(manifests)}
    defects, ids = [], collections.defaultdict(set)
    held_out: dict[tuple, str] = {}
    for (name, line, utt_id, duration_s, span), found in parallel.run(_check, items, nj=nj, desc="validate"):
        durations_s[name].append(duration_s)
        if utt_id in ids[name]:
            found.append(("duplicate id", f"more than one utterance of {name} has it"))
        ids[name].add(utt_id)
        for key in (("id", utt_id), ("audio", *span)):
            if not is_train(name):
                held_out[key] = name
            elif key in held_out:
                found.append((f"train/test overlap by {key[0]}", f"also in {held_out[key]}"))
        defects += [Defect(name, line, utt_id, kind, detail) for kind, detail in found]
    return Report(durations_s, sorted(defects, key=lambda d: (d.set, d.line)))


def drop(manifests: Mapping[str, Path], report: Report) -> None:
    """Write the manifests again without the utterances of fatal defects. Raises UserError if a set would be empty."""
    lines = collections.defaultdict(set)
    for defect in report.fatal:
        lines[defect.set].add(defect.line)
    for name, dropped in lines.items():
        if len(dropped) == len(report.durations_s[name]):
            raise UserError(f"{manifests[name]}: every utterance is defective; check the corpus it was prepared from")
    for name, dropped in lines.items():
        write(manifests[name], [cut for line, cut in enumerate(read(manifests[name]), start=1) if line not in dropped])


def fingerprint(manifests: Mapping[str, Path]) -> str:
    """Stands for manifests and for the sizes and times of the audio files that they name."""
    sources = (source for path in manifests.values() for cut in read(path) for source in _sources(cut))
    audio_files = hashlib.sha256()
    for source in sources:
        with contextlib.suppress(OSError):
            stat = os.stat(source["source"])
            audio_files.update(f"{source['source']} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return files.fingerprint([audio_files.hexdigest(), {name: files.sha256(path) for name, path in manifests.items()}])


def write_defects(path: Path | str, defects: Iterable[Defect]) -> None:
    """Write defects as a table, one a line."""
    with files.write(path) as stream:
        table = csv.writer(stream, delimiter="\t", quoting=csv.QUOTE_NONE, escapechar="\\", lineterminator="\n")
        table.writerow(("set", "id", "severity", "defect", "detail"))
        table.writerows((d.set, d.utt_id, "fatal" if d.is_fatal else "warning", d.kind, d.detail) for d in defects)


def is_train(name: str) -> bool:
    """Whether a set is for training, by its split."""
    return name.split("_", 2)[2].startswith("train")


def _check(item: tuple[str, int, dict]) -> tuple[tuple[str, int, str, float, tuple], list[tuple[str, str]]]:
    """What identifies an utterance, and the defects that can be seen without the others."""
    name, line, cut = item
    duration_s, found = cut.get("duration", 0.0), list(_check_text(name, cut))
    if cut["type"] not in ("MonoCut", "MultiCut") or len(_sources(cut)) != 1:
        found.append(("bad recording", "a cut takes one recording with one source"))
        return (name, line, cut["id"], duration_s, (cut["id"],)), found
    recording, (source,) = cut["recording"], _sources(cut)
    rate = recording["sampling_rate"]
    bad_audio = _check_audio(source["source"], rate, recording["num_samples"]) if source["type"] == "file" else []
    if rate not in USUAL_RATES:
        found.append(("odd sampling rate", f"{rate} Hz"))
    if duration_s < MIN_DURATION_S and not bad_audio:
        found.append(("zero duration", f"{duration_s:.3f} s"))
    if duration_s > MAX_DURATION_S:
        found.append(("over 30 s", f"{duration_s:.3f} s exceed the encoder's window; split it"))
    return (name, line, cut["id"], duration_s, (source["source"], cut["start"])), found + bad_audio


def _sources(cut: dict) -> list[dict]:
    return (cut.get("recording") or {}).get("sources", [])


def _check_text(name: str, cut: dict) -> Iterator[tuple[str, str]]:
    supervisions, lang = cut.get("supervisions", []), name.split("_", 2)[1]
    if not cut["id"] or "/" in cut["id"] or cut["id"].split() != [cut["id"]]:
        yield "bad id", "ids hold neither white space nor '/'"
    if len(supervisions) != 1 or supervisions[0]["id"] != cut["id"]:
        yield "bad supervision", f"{len(supervisions)} of them; it takes one, with the id of the cut"
        return
    if not (supervisions[0].get("text") or "").strip():
        yield "empty text", "no transcript"
    found = supervisions[0].get("language")
    if found not in LANGUAGES:
        yield "unknown language", f"'{found}'; known: {' '.join(LANGUAGES)}"
    elif found != lang:
        yield "wrong language", f"'{found}' in a set of '{lang}'"


@functools.lru_cache(maxsize=1024)
def _check_audio(path: str, rate: int, num_samples: int) -> list[tuple[str, str]]:
    """Cached, for corpora whose utterances are pieces of long files."""
    try:
        info = audio.probe(path)
    except audio.BadAudio as bad:
        return [(bad.kind, bad.detail)]
    if abs(info.num_samples / info.sampling_rate - num_samples / rate) <= audio.TOLERANCE_S:
        return []
    found, said = info.num_samples / info.sampling_rate, num_samples / rate
    return [("wrong duration", f"{path}: {found:.3f} s, the manifest says {said:.3f} s; prepare it again")]

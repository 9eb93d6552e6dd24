"""The validator of manifests: every utterance by itself, and the sets against each other.

Stage 1 has read every audio file when it wrote a manifest, so those are read again on request only. Manifests that were
brought from elsewhere, which have no tally beside them, are always checked with their audio.
"""

from __future__ import annotations

import collections
import functools
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zipperasr import files
from zipperasr.data import audio, manifests, parallel
from zipperasr.data.defects import Defect, Tally, read_tally, write_tally
from zipperasr.data.manifests import is_held_out
from zipperasr.errors import UserError
from zipperasr.languages import LANGUAGES

MAX_DURATION_S = 30.0  # the encoder's window
MIN_DURATION_S = 0.025  # one window of Whisper's log-mel
USUAL_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)

Kinds = list[tuple[str, str]]  # kind and detail


@dataclass(frozen=True)
class Found:
    """A defect of the utterance in a line of a manifest, counted from 1."""

    defect: Defect
    line: int

    @property
    def is_fatal(self) -> bool:
        """Whether the recipe must not go on with that line in the manifest."""
        return self.defect.rule in ("dropped", "fatal")


@dataclass(frozen=True)
class Checked:
    """What identifies an utterance, its length, and the defects that can be seen without the others."""

    utt_id: str
    duration_s: float
    span: tuple
    kinds: Kinds


def validate(
    paths: Mapping[str, Path], *, nj: int = 1, read_audio: bool = False
) -> tuple[dict[str, Tally], list[Found]]:
    """The tally of each set of `paths` ({set: manifest}), and the defects found now, by set and line.

    Training material may share neither ids nor audio with a held-out set; the training utterance has the defect.
    Raises UserError for a manifest that is missing, broken, empty or not as stage 1 wrote it.
    """
    _check_audio.cache_clear()  # files may have changed since
    held_out: dict[tuple, str] = {}
    tallies, found = {}, []
    for name in sorted(paths, key=lambda name: (not is_held_out(name), name)):  # held-out sets first
        tallies[name] = _validate_set(name, paths[name], held_out, found, nj=nj, read_audio=read_audio)
    return {name: tallies[name] for name in sorted(paths)}, sorted(found, key=lambda f: (f.defect.set, f.line))


def fatal(tallies: Mapping[str, Tally], found: Iterable[Found]) -> list[Defect]:
    """What the recipe must not go on with: of preparation one of a kind, of validation each."""
    of_preparation = [defect for name, tally in tallies.items() for defect in tally.fatal(name)]
    return of_preparation + [one.defect for one in found if one.is_fatal]


def drop(paths: Mapping[str, Path], tallies: Mapping[str, Tally], found: Iterable[Found]) -> None:
    """Write the manifests again without the utterances `found` unusable, and accept what preparation left out.

    Raises UserError, and changes nothing, if a set would be empty.
    """
    lines = collections.defaultdict(dict)
    for one in found:
        if one.is_fatal:
            lines[one.defect.set].setdefault(one.line, one.defect)
    for name, dropped in lines.items():
        if len(dropped) >= tallies[name].num_kept:
            raise UserError(f"{paths[name]}: every utterance is defective; check the corpus it was prepared from")
    for name, tally in tallies.items():
        if lines[name]:
            _rewrite(paths[name], tally, lines[name])
        if lines[name] or tally.fatal(name):
            tally.is_accepted = True
            write_tally(manifests.tally_path(paths[name]), tally)


def _rewrite(path: Path, tally: Tally, dropped: Mapping[int, Defect]) -> None:
    with manifests.writer(path) as write:
        for line, cut in enumerate(manifests.read(path), start=1):
            if line not in dropped:
                write(cut)
                continue
            tally.num_kept -= 1
            tally.duration_s -= cut["duration"]
            tally.add(dropped[line].kind, cut["id"])


def fingerprint(paths: Mapping[str, Path]) -> str:
    """Stands for the contents of manifests and their tallies."""
    every = [path for manifest in paths.values() for path in (manifest, manifests.tally_path(manifest))]
    return files.fingerprint({str(path): files.sha256(path) for path in every if path.is_file()})


def duration_defects(duration_s: float) -> Kinds:
    """The defects of an utterance that lasts `duration_s`."""
    if duration_s < MIN_DURATION_S:
        return [("too short", f"{duration_s:.3f} s")]
    return [("over 30 s", f"{duration_s:.3f} s exceed the encoder's window")] if duration_s > MAX_DURATION_S else []


def rate_defects(sampling_rate: int) -> Kinds:
    """The defects of audio with this sampling rate, in Hz."""
    if sampling_rate not in USUAL_RATES:
        return [("odd sampling rate", f"{sampling_rate} Hz")]
    return [("below 16 kHz", f"{sampling_rate} Hz")] if sampling_rate < audio.SAMPLE_RATE else []


def repeated(hashes: array) -> set[int]:
    """The hashes of 8 bytes that occur more than once: in them are those of all repeated ids, and hardly any others."""
    values, times = np.unique(np.frombuffer(hashes, np.int64), return_counts=True)
    return set(values[times > 1].tolist())


def _validate_set(
    name: str, path: Path, held_out: dict[tuple, str], found: list[Found], *, nj: int, read_audio: bool
) -> Tally:
    prepared = manifests.tally_path(path)
    seen, hashes = Tally(), array("q")  # a hash an utterance, not its id: sets may hold millions
    for line, checked in enumerate(_check_all(name, path, nj, read_audio or not prepared.is_file()), start=1):
        seen.num_in, seen.num_kept, seen.duration_s = line, line, seen.duration_s + checked.duration_s
        hashes.append(hash(checked.utt_id))
        kinds = checked.kinds + _overlaps(name, checked, held_out)
        here = [Found(Defect(name, checked.utt_id, *kind), line) for kind in kinds]
        found += [one for one in here if one.is_fatal or not prepared.is_file()]  # preparation has counted the others
    found += _repeated(name, path, hashes)
    if not prepared.is_file():
        return seen
    tally = read_tally(prepared)
    if seen.num_kept != tally.num_kept:
        raise UserError(
            f"{path}: holds {seen.num_kept} utterances, not {tally.num_kept} as when it was prepared; delete "
            f"{prepared} if the manifest is your own, else run stage 1 again"
        )
    return tally


def _check_all(name: str, path: Path, nj: int, read_audio: bool) -> Iterable[Checked]:
    items = ((name, cut) for cut in manifests.read(path))
    check = functools.partial(_check, read_audio=read_audio)
    return parallel.run(check, items, nj=nj, desc=name) if read_audio else map(check, items)


def _overlaps(name: str, checked: Checked, held_out: dict[tuple, str]) -> Kinds:
    """Enters a held-out utterance; the defects of one that is trained on and held out."""
    keys = [("id", checked.utt_id), ("audio", *checked.span)]
    if is_held_out(name):
        held_out.update(dict.fromkeys(keys, name))
        return []
    return [(f"train/test overlap by {key[0]}", f"also in {held_out[key]}") for key in keys if key in held_out]


def _repeated(name: str, path: Path, hashes: array) -> Iterator[Found]:
    """The lines whose id has stood above; reads the manifest again only if there are any."""
    suspects, ids = repeated(hashes), set()
    for line, cut in enumerate(manifests.read(path) if suspects else (), start=1):
        if hash(cut["id"]) in suspects:
            if cut["id"] in ids:
                detail = f"more than one utterance of {name} has it"
                yield Found(Defect(name, cut["id"], "duplicate id", detail), line)
            ids.add(cut["id"])


def _check(item: tuple[str, dict], *, read_audio: bool) -> Checked:
    name, cut = item
    duration_s, kinds = cut.get("duration", 0.0), _text_defects(name, cut)
    sources = (cut.get("recording") or {}).get("sources", [])
    if cut["type"] not in ("MonoCut", "MultiCut") or len(sources) != 1 or sources[0]["type"] != "file":
        kinds.append(("bad recording", "a cut takes one recording with one source, a file"))
        return Checked(cut["id"], duration_s, (cut["id"],), kinds)
    recording, path = cut["recording"], sources[0]["source"]
    kinds += duration_defects(duration_s)
    if read_audio:
        kinds += rate_defects(recording["sampling_rate"])
        kinds += _check_audio(path, recording["sampling_rate"], recording["num_samples"])
    return Checked(cut["id"], duration_s, (path, cut["start"]), kinds)


def _text_defects(name: str, cut: Mapping[str, Any]) -> Kinds:
    supervisions, lang = cut.get("supervisions", []), name.split("_", 2)[1]
    if len(supervisions) != 1 or supervisions[0]["id"] != cut["id"]:
        return [("bad supervision", f"{len(supervisions)} of them; it takes one, with the id of the cut")]
    kinds, found = [], supervisions[0].get("language")
    if not cut["id"] or "/" in cut["id"] or cut["id"].split() != [cut["id"]]:
        kinds.append(("bad id", "ids hold neither white space nor '/'"))
    if not (supervisions[0].get("text") or "").strip():
        kinds.append(("empty text", "no transcript"))
    if found not in LANGUAGES:
        kinds.append(("unknown language", f"'{found}'; known: {' '.join(LANGUAGES)}"))
    elif found != lang:
        kinds.append(("wrong language", f"'{found}' in a set of '{lang}'"))
    return kinds


@functools.lru_cache(maxsize=1024)
def _check_audio(path: str, rate: int, num_samples: int) -> Sequence[tuple[str, str]]:
    """Cached, for corpora whose utterances are pieces of long files."""
    try:
        info = audio.probe(path)
    except audio.BadAudio as bad:
        return [(bad.kind, bad.detail)]
    said_s = num_samples / rate
    if abs(info.duration_s - said_s) <= audio.TOLERANCE_S:
        return []
    return [("wrong duration", f"{path}: {info.duration_s:.3f} s, the manifest says {said_s:.3f} s; prepare it again")]

"""Kaldi data directories, which ESPnet uses too, read and written. One directory is one split:

    wav.scp    recording, and where its audio is (data/kaldi_audio.py)
    segments   utterance, recording, start and end in seconds (end -1: the file's); without it recordings are utterances
    text       utterance, transcript
    utt2spk    utterance, speaker; one that is its own speaker has none that is known
    utt2lang   utterance, language: its code, ISO 639-3 code or English name
    feats.scp  utterance, and where its features are

A line is an id, blanks or tabs, and the rest. Lines may stand in any order, so a directory is held in memory, about
1 kB an utterance.

F frames (100 Hz).
"""

from __future__ import annotations

import bisect
import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zipperasr import files, languages
from zipperasr.data import features, manifests, parallel, prepare
from zipperasr.data.audio import BadAudio, load_audio
from zipperasr.data.kaldi_audio import Locator
from zipperasr.data.prepare import Clip, Rejected
from zipperasr.errors import UserError

if TYPE_CHECKING:
    import numpy as np

WRITTEN = ("wav.scp", "segments", "text", "utt2spk", "spk2utt", "utt2lang", "utt2dur", "reco2dur")
FEATURES = ("feats.ark", "feats.scp", "utt2num_frames")


@dataclass(frozen=True)
class DataDir:
    """The tables of a data directory, each {id: rest of the line}; `segments` and `utt2lang` are None if not there."""

    path: Path
    wav_scp: dict[str, str]
    text: dict[str, str]
    utt2spk: dict[str, str]
    segments: dict[str, str] | None
    utt2lang: dict[str, str] | None

    @property
    def sources(self) -> list[Path]:
        """The files that this was read from."""
        paths = (self.path / name for name in ("wav.scp", "text", "utt2spk", "segments", "utt2lang"))
        return [path for path in paths if path.is_file()]

    @property
    def ids(self) -> list[str]:
        """Every utterance that has audio or text, in the order of the tables."""
        return [*dict.fromkeys([*(self.wav_scp if self.segments is None else self.segments), *self.text])]

    def langs(self, default: str | None) -> dict[str, str]:
        """The language code of every utterance: that of utt2lang or, without that file, `default`.

        Raises UserError for an utterance of no known language, as there is no set that it belongs to.
        """
        if self.utt2lang is not None:
            return {utt_id: self._lang(utt_id) for utt_id in self.ids}
        if default is None:
            raise UserError(f"{self.path}: no utt2lang there; add it, or name with --langs the one language of all")
        return dict.fromkeys(self.ids, default)

    def _lang(self, utt_id: str) -> str:
        where = f"{self.path / 'utt2lang'}: utterance '{utt_id}'"
        if utt_id not in self.utt2lang:
            raise UserError(f"{where} has no line; add it, or take the utterance out of the other files")
        try:
            return lang_code(self.utt2lang[utt_id])
        except UserError as error:
            raise UserError(f"{where}: {error}") from error

    def rows(
        self, sets: Mapping[str, str], langs: Mapping[str, str], locator: Locator
    ) -> Iterator[tuple[str, Clip | Rejected]]:
        """Each utterance whose language (`langs` has that of each) is in `sets` ({language: set}), with its set.

        Raises UserError for a command in wav.scp that is not to be run.
        """
        wanted = [utt_id for utt_id in self.ids if langs[utt_id] in sets]
        needed = dict.fromkeys(self._segment(utt_id)[0] for utt_id in wanted if self._lacks(utt_id) is None)
        located = locator.locate({key: self.wav_scp[key] for key in needed if key in self.wav_scp})
        for utt_id in wanted:
            yield sets[langs[utt_id]], self._row(utt_id, langs[utt_id], located)

    def _lacks(self, utt_id: str) -> Path | None:
        """The file that an utterance should have a line in, but has not."""
        spans = ("wav.scp", self.wav_scp) if self.segments is None else ("segments", self.segments)
        return next((self.path / name for name, table in (spans, ("text", self.text)) if utt_id not in table), None)

    def _segment(self, utt_id: str) -> list[str]:
        """Recording, start and end of an utterance, as written."""
        return [utt_id, "0", "-1"] if self.segments is None else self.segments[utt_id].split() or [""]

    def _row(self, utt_id: str, lang: str, located: Mapping[str, Path | BadAudio]) -> Clip | Rejected:
        if lacking := self._lacks(utt_id):
            return Rejected(utt_id, "bad row", f"it has no line in {lacking}")
        recording, *times = self._segment(utt_id)
        if not (len(times) == 2 and all(map(_is_number, times))):
            fields = " ".join([recording, *times])
            return Rejected(utt_id, "bad row", f"{self.path / 'segments'}: '{fields}' is not recording, start, end")
        path = located.get(recording) or BadAudio("bad row", f"recording '{recording}' has no line in wav.scp")
        if isinstance(path, BadAudio):
            return Rejected(utt_id, path.kind, f"{self.path}: {path.detail}")
        speaker = self.utt2spk.get(utt_id)
        start_s, end_s = map(float, times)
        return Clip(
            utt_id, path, lang, self.text[utt_id], None if speaker == utt_id else speaker,
            start_s=start_s, end_s=None if end_s == -1 else end_s,
        )  # fmt: skip


def read(path: Path) -> DataDir:
    """The data directory `path`. Raises UserError when wav.scp or text is missing, or an id stands twice in a table."""
    wav_scp, text = (read_table(path / name) for name in ("wav.scp", "text"))
    rest = (
        read_table(path / name) if (path / name).is_file() else None for name in ("utt2spk", "segments", "utt2lang")
    )
    utt2spk, segments, utt2lang = rest
    return DataDir(path, wav_scp, text, utt2spk or {}, segments, utt2lang)


def read_table(path: Path) -> dict[str, str]:
    """The lines of a table as {id: rest}, without empty ones. Raises UserError when it is missing or repeats an id."""
    if not path.is_file():
        raise UserError(f"{path}: no such file, and a Kaldi data directory needs it")
    table: dict[str, str] = {}
    for number, line in enumerate(prepare.read_lines(path), start=1):
        if line := line.strip(" \t\r"):
            key, *rest = re.split(r"[ \t]+", line, maxsplit=1)
            if key in table:
                raise UserError(f"{path}:{number}: '{key}' stands there twice; keep one (utils/fix_data_dir.sh does)")
            table[key] = rest[0] if rest else ""
    return table


def lang_code(value: str) -> str:
    """The code of a language given as code, ISO 639-3 code or English name. Raises UserError naming the known codes."""
    names = {name: row.code for row in languages.LANGUAGES.values() for name in (row.name.lower(), row.iso639_3)}
    names |= {"cmn": "zh"}  # Mandarin, of the macrolanguage zho
    return languages.get(names.get(value.lower(), value)).code


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def read_features(feats_scp: Path | str) -> Iterator[tuple[str, np.ndarray]]:
    """Each utterance of a feats.scp with its features [F, bins], in the order of the file.

    Raises UserError for a command, which is not run, and for an ark that cannot be read or holds a pickle.
    """
    import kaldiio

    for utt_id, entry in read_table(Path(feats_scp)).items():
        where = f"{feats_scp}: '{utt_id}'"
        match = re.fullmatch(r"(.+?)(?::(\d+))?(?:\[[^\[\]]*\])?", entry)
        if not match or entry == "-" or "|" in (entry[0], entry.rstrip()[-1]):
            raise UserError(f"{where}: '{entry}' is not <ark>:<offset>; commands are not run here: copy-feats first")
        try:
            if _is_pickle(match[1], int(match[2] or 0)):
                raise UserError(f"{where}: {entry} holds a pickle, which could run anything; write it as a matrix")
            yield utt_id, kaldiio.load_mat(entry)
        except (OSError, ValueError, AssertionError) as error:
            raise UserError(f"{where}: {entry} cannot be read ({error}); make the features again") from error


def _is_pickle(ark: str, offset: int) -> bool:
    """Whether kaldiio would unpickle what the ark holds there."""
    with open(ark, "rb") as stream:
        stream.seek(offset)
        return stream.read(3) == b"PKL"


@dataclass(frozen=True)
class _Utterance:
    """What the tables say about an utterance."""

    recording_id: str
    path: str
    recording_s: float
    start_s: float
    end_s: float
    is_piece: bool
    text: str
    lang: str
    speaker: str | None


def write(directory: Path, cuts: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Write the data directory of cuts; return the numbers of its utterances, recordings and speakers.

    segments is written where any cut is a piece of its recording. Paths are absolute. Kaldi sorts utterances and wants
    their speakers in order by that, so a speaker is written only if the ids of its utterances, and no others, begin
    with it; any other utterance is its own speaker.
    Raises UserError for what Kaldi's tables cannot say.
    """
    utterances: dict[str, _Utterance] = {}
    for cut in cuts:
        if cut["id"] in utterances:
            raise UserError(f"cut '{cut['id']}' is there twice; run `zipperasr validate`")
        utterances[cut["id"]] = _utterance(cut)
    tables = _tables(utterances)
    for name in {*WRITTEN, *FEATURES} - tables.keys():
        (directory / name).unlink(missing_ok=True)  # of an earlier export
    for name, table in tables.items():
        _write_table(directory / name, table)
    counts = {"utterances": "text", "recordings": "wav.scp", "speakers": "spk2utt"}
    return {what: len(tables[name]) for what, name in counts.items()}


def write_features(directory: Path, cuts: Iterable[Mapping[str, Any]], *, num_mel_bins: int, nj: int = 1) -> None:
    """Write Whisper's log-mel features of cuts, at true length: feats.ark (float32), feats.scp and utt2num_frames."""
    import kaldiio
    import lhotse  # noqa: F401  before the processes fork, so that they need not
    import whisper  # noqa: F401

    ark, offsets, num_frames = directory.absolute() / "feats.ark", {}, {}
    compute = functools.partial(_log_mel, num_mel_bins=num_mel_bins)
    with files.write(ark, "wb") as stream:
        for utt_id, log_mel in parallel.run(compute, cuts, nj=nj, desc=str(directory)):
            offsets[utt_id] = f"{ark}:{stream.tell() + len(f'{utt_id} '.encode())}"
            num_frames[utt_id] = len(log_mel)
            kaldiio.save_ark(stream, {utt_id: log_mel})
    _write_table(directory / "feats.scp", offsets)
    _write_table(directory / "utt2num_frames", num_frames)


def _log_mel(cut: dict[str, Any], *, num_mel_bins: int) -> tuple[str, np.ndarray]:
    return cut["id"], features.log_mel(load_audio(manifests.to_cut(cut)), num_mel_bins).numpy()


def _utterance(cut: Mapping[str, Any]) -> _Utterance:
    """Raises UserError for a cut that Kaldi's tables cannot say."""
    recording, (supervision,) = cut["recording"], cut["supervisions"]
    (source,) = recording["sources"]
    start_s, end_s = cut["start"], round(cut["start"] + cut["duration"], 9)
    path, text = str(Path(source["source"]).absolute()), supervision.get("text") or ""
    channels = cut["channel"] if isinstance(cut["channel"], list) else [cut["channel"]]
    for is_bad, what in (
        (re.search(r"\s", cut["id"]), "white space in its id"),
        ("\n" in text, "a line break in its text"),
        (source["type"] != "file" or re.search(r"\n|\s$|\|$|:\d+$", path), f"audio that is not a plain file: {path}"),
        (channels != source["channels"], f"channels {channels} of {source['channels']}"),
    ):
        if is_bad:
            raise UserError(f"cut '{cut['id']}' has {what}, which a Kaldi directory cannot say; leave it out")
    is_piece = start_s > 0 or recording["duration"] - end_s > 1 / recording["sampling_rate"]
    return _Utterance(
        recording["id"], path, recording["duration"], start_s, end_s, is_piece,
        text, supervision["language"], supervision.get("speaker"),
    )  # fmt: skip


def _tables(utterances: Mapping[str, _Utterance]) -> dict[str, dict[str, Any]]:
    """The content of each file to write."""
    has_segments = any(utt.is_piece for utt in utterances.values())
    names = _recording_ids(utterances.values())
    recording = {utt_id: names[utt.path] if has_segments else utt_id for utt_id, utt in utterances.items()}
    speakers = _speakers({utt_id: utt.speaker for utt_id, utt in utterances.items()})
    spk2utt: dict[str, list[str]] = {}
    for utt_id in sorted(speakers):
        spk2utt.setdefault(speakers[utt_id], []).append(utt_id)
    segments = {key: f"{recording[key]} {utt.start_s} {utt.end_s}" for key, utt in utterances.items()}
    return ({"segments": segments} if has_segments else {}) | {
        "wav.scp": {recording[key]: utt.path for key, utt in utterances.items()},
        "reco2dur": {recording[key]: utt.recording_s for key, utt in utterances.items()},
        "text": {key: utt.text for key, utt in utterances.items()},
        "utt2lang": {key: utt.lang for key, utt in utterances.items()},
        "utt2dur": {key: round(utt.end_s - utt.start_s, 9) for key, utt in utterances.items()},
        "utt2spk": speakers,
        "spk2utt": {speaker: " ".join(ids) for speaker, ids in spk2utt.items()},
    }


def _recording_ids(utterances: Iterable[_Utterance]) -> dict[str, str]:
    """An id for each path: that of its recording, with a fingerprint of the path where another path has it already."""
    names: dict[str, str] = {}
    taken = set()
    for utt in utterances:
        if utt.path not in names:
            name = re.sub(r"\s+", "_", utt.recording_id)
            names[utt.path] = f"{name}-{files.fingerprint(utt.path)}" if name in taken else name
            taken.add(names[utt.path])
    return names


def _speakers(known: Mapping[str, str | None]) -> dict[str, str]:
    """The speaker of each utterance, the known one or itself, such that utterances in order have speakers in order."""
    ids, times = sorted(known), Counter(known.values())
    stays = set()
    for speaker in times.keys() - {None, ""}:
        begin, end = bisect.bisect_left(ids, speaker), bisect.bisect_left(ids, speaker + chr(0x10FFFF))
        if end - begin == times[speaker] and all(known[utt_id] == speaker for utt_id in ids[begin:end]):
            stays.add(speaker)
    return {utt_id: speaker if speaker in stays else utt_id for utt_id, speaker in known.items()}


def _write_table(path: Path, table: Mapping[str, Any]) -> None:
    """Write a table sorted as LC_ALL=C does: the order of code points is that of UTF-8's bytes."""
    with files.write(path) as stream:
        stream.writelines(f"{key} {table[key]}".rstrip(" ") + "\n" for key in sorted(table))

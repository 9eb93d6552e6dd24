"""Transcripts as plain text, JSON, subtitles (SRT and WebVTT) and CTM.

Subtitles are cut into cues of at most two lines of 42 columns and 7 s. Where the times of words are not
known, a segment's duration is shared out over its characters in proportion, as if they were spoken evenly: a cue then
begins and ends near its words, not at them.
"""

import json
import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import regex

from zipperasr import languages
from zipperasr.alignment.words import Word, boundaries, ctm_line
from zipperasr.decoding.transcript import Segment, Transcript
from zipperasr.errors import UserError

LINE_COLUMNS = 42
CUE_S = 7.0


@dataclass(frozen=True)
class Cue:
    """A subtitle: when it is shown, and its lines."""

    start_s: float
    end_s: float
    lines: tuple[str, ...]


def txt(transcript: Transcript) -> str:
    """A line for each segment that says something."""
    return "".join(f"{segment.text}\n" for segment in transcript.segments if segment.text)


def one_line(transcript: Transcript) -> str:
    """All of the text in one line."""
    space = " " if _is_spaced(transcript) else ""
    return space.join(segment.text for segment in transcript.segments if segment.text)


def to_json(transcript: Transcript) -> str:
    """Indented JSON; its keys are those of transcript.py."""
    return json.dumps(transcript.to_dict(), ensure_ascii=False, indent=2) + "\n"


def srt(transcript: Transcript) -> str:
    """SubRip. It has no escapes, so the one thing that its readers could take for a line of times is written →."""
    return "".join(
        f"{i}\n{_clock(cue.start_s, ',')} --> {_clock(cue.end_s, ',')}\n"
        + "".join(line.replace("-->", "→") + "\n" for line in cue.lines)
        + "\n"
        for i, cue in enumerate(cues(transcript), start=1)
    )


def vtt(transcript: Transcript) -> str:
    """WebVTT (W3C), with its three escapes."""
    return "WEBVTT\n" + "".join(
        f"\n{_clock(cue.start_s, '.')} --> {_clock(cue.end_s, '.')}\n"
        + "".join(line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") + "\n" for line in cue.lines)
        for cue in cues(transcript)
    )


def ctm(transcript: Transcript) -> str:
    """NIST's CTM. Raises UserError where a segment's words have no times."""
    name, lines = "_".join(transcript.file.split()), []
    for segment in transcript.segments:
        if segment.text and segment.words is None:
            raise UserError(f"{transcript.file}: CTM holds the times of words, which are not known; take json or srt")
        lines += [ctm_line(name, word) for word in segment.words or ()]
    return "".join(lines)


FORMATS: dict[str, Callable[[Transcript], str]] = {"txt": txt, "json": to_json, "srt": srt, "vtt": vtt, "ctm": ctm}


def cues(transcript: Transcript) -> Iterator[Cue]:
    """The subtitles of a transcript, in order; none overlap, as segments do not."""
    is_spaced = _is_spaced(transcript)
    for segment in transcript.segments:
        groups = list(_groups(_atoms(segment, is_spaced))) if segment.text else []
        if any(words[-1].end_s <= words[0].start_s for words in groups):  # of characters that the aligner doesn't know
            groups = _groups(_atoms(replace(segment, words=None), is_spaced))
        for words in groups:
            yield Cue(words[0].start_s, words[-1].end_s, tuple(_lines(words)))


def _is_spaced(transcript: Transcript) -> bool:
    return transcript.language is None or languages.get(transcript.language).is_spaced


def _atoms(segment: Segment, is_spaced: bool) -> list[Word]:
    """What a cue is not to be cut within, each with the space before it: words or, without spaces, characters."""
    if segment.words:
        apart = boundaries(segment.text)
        return [replace(word, text=" " * gap + word.text) for word, gap in zip(segment.words, apart, strict=True)]
    unit = r"\s*\S+" if is_spaced else r"\s*(?:[\p{Latin}\p{N}]+|\X)"
    units = [unit for unit in regex.findall(unit, segment.text) if unit.strip()]
    texts = [t for unit in units for t in ([unit] if _columns(unit) <= LINE_COLUMNS else regex.findall(r"\X", unit))]
    per_letter_s, said, atoms = (segment.end_s - segment.start_s) / sum(map(len, texts)), 0, []
    for text in texts:
        times = (segment.start_s + per_letter_s * n for n in (said, said + len(text)))
        atoms.append(Word(text, *times, confidence=1.0))
        said += len(text)
    return atoms


def _groups(atoms: Sequence[Word]) -> Iterator[list[Word]]:
    """As few cues as the limits allow, about as full as each other."""
    total, duration_s = sum(_columns(a.text) for a in atoms), atoms[-1].end_s - atoms[0].start_s
    fair_share = total / max(math.ceil(total / (2 * LINE_COLUMNS)), math.ceil(duration_s / CUE_S))
    group: list[Word] = []
    for atom in atoms:
        is_full = sum(_columns(a.text) for a in group) >= fair_share
        if group and (is_full or atom.end_s - group[0].start_s > CUE_S or len(_lines([*group, atom])) > 2):
            yield group
            group = []
        group.append(atom)
    yield group


def _lines(atoms: Sequence[Word]) -> list[str]:
    lines = [""]
    for atom in atoms:
        if lines[-1] and _columns((lines[-1] + atom.text).strip()) > LINE_COLUMNS:
            lines.append("")
        lines[-1] += atom.text
    return [line.strip() for line in lines]


def _columns(text: str) -> int:
    """The width of a text where marks take none and the wide letters of East Asia take two."""
    shown = (c for c in text if unicodedata.category(c)[0] not in "MC")
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in shown)


def _clock(time_s: float, point: str) -> str:
    """hh:mm:ss and milliseconds."""
    minutes, ms = divmod(round(1000 * time_s), 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{ms // 1000:02}{point}{ms % 1000:03}"

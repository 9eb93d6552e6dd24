"""Words and their times: how a text is cut into words, and the files that hold them (CTM, TextGrid)."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import regex

from zipperasr import files

OUTPUTS = {"ctm": "ctm", "textgrid": "textgrid", "json": "words.jsonl", "nbest": "nbest.jsonl"}
"""What word times are called in a decode directory, by format."""
_ALONE = r"[\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}]"
_WORD = regex.compile(rf"(?={_ALONE})\X|(?:(?!{_ALONE})\S)+")


@dataclass(frozen=True)
class Word:
    """A word of a text, when it is said, and how sure that is: the mean posterior of its frames, from 0 to 1."""

    text: str
    start_s: float
    end_s: float
    confidence: float


def split(text: str) -> list[str]:
    """The words of a text: what white space separates.

    Of scripts without spaces between words (Chinese characters, kana, Thai) each character is a word of its own, with
    the marks above and below it.
    """
    return _WORD.findall(text)


def boundaries(text: str) -> list[bool]:
    """For each word of `split(text)`, whether white space stands before it, as between words of one line."""
    return [match.start() > 0 and text[match.start() - 1].isspace() for match in _WORD.finditer(text)]


def ctm_line(name: str, word: Word) -> str:
    """A line of NIST's CTM, of a recording with one channel: `name channel start duration word confidence`."""
    times = f"{word.start_s:.3f} {word.end_s - word.start_s:.3f}"
    return f"{name} 1 {times} {word.text} {word.confidence:.3f}\n"


def write_ctm(path: Path, words_by_id: Iterable[tuple[str, Iterable[Word]]]) -> None:
    """Write CTM, times in seconds."""
    with files.write(path) as stream:
        stream.writelines(ctm_line(utt_id, word) for utt_id, words in words_by_id for word in words)


def write_textgrid(path: Path, words: Iterable[Word], duration_s: float) -> None:
    """Praat's TextGrid in its long form: one tier, `words`, with empty intervals where nothing is said."""
    intervals, at = [], 0.0
    for w in words:
        if w.start_s > at:
            intervals.append((at, w.start_s, ""))
        if w.end_s > (start_s := max(w.start_s, at)):  # Praat takes no interval of no length
            intervals.append((start_s, w.end_s, w.text))
            at = w.end_s
    end_s = max(round(duration_s, 3), at)  # what is written; less than a millisecond is no interval
    if end_s > at or not intervals:
        intervals.append((at, end_s, ""))
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "xmin = 0", f"xmax = {end_s:.3f}"]
    lines += ["tiers? <exists>", "size = 1", "item []:", "    item [1]:", '        class = "IntervalTier"']
    lines += ['        name = "words"', "        xmin = 0", f"        xmax = {end_s:.3f}"]
    lines.append(f"        intervals: size = {len(intervals)}")
    for number, (start_s, stop_s, text) in enumerate(intervals, 1):
        lines.append(f"        intervals [{number}]:")
        lines += [f"            xmin = {start_s:.3f}", f"            xmax = {stop_s:.3f}"]
        lines.append('            text = "{}"'.format(text.replace('"', '""')))
    with files.write(path) as stream:
        stream.write("\n".join(lines) + "\n")

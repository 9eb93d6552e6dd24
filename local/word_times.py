#!/usr/bin/env python
"""How far word times are from those that eSpeak NG tells of its own speech.

    python local/word_times.py --run-dir exp/mini/zipper_soft_full   # after zipperasr train-aligner

Speaks phrases of the test part in voices of the test part, aligns them, and prints the distances in milliseconds by
language. Every word has two boundaries: its start and its end, which is where the next one starts. Japanese and Thai
are left out: eSpeak NG tells of no words within what is written without spaces.
"""

import argparse
import ctypes
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mini_phrases
import mini_speech
import numpy as np
import soxr
from mini_speech import SAMPLE_RATE, Utterance, seed_of

from zipperasr import files
from zipperasr.alignment.words import Word, split
from zipperasr.errors import UserError

LANGS = "ar de en es fr it ko pt ru vi zh".split()
WORD = 1  # a type of event


@dataclass(frozen=True)
class Spoken:
    """An utterance, its audio (int16 [T] at 16 kHz), and start and end in seconds of each of its words."""

    utterance: Utterance
    audio: np.ndarray
    times: list[tuple[float, float]]


class _Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h."""

    _fields_ = [("type", ctypes.c_int), ("identifier", ctypes.c_uint), ("text_position", ctypes.c_int),
                ("length", ctypes.c_int), ("audio_position", ctypes.c_int), ("sample", ctypes.c_int),
                ("user_data", ctypes.c_void_p), ("id", ctypes.c_char * 8)]  # fmt: skip


class _Espeak(mini_speech._Espeak):
    """Notes at which character a word begins, and after how many milliseconds."""

    def __init__(self) -> None:
        super().__init__()
        self.starts: dict[int, int] = {}
        of = [ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)]
        self.callback = ctypes.CFUNCTYPE(ctypes.c_int, *of)(self._note)
        self.library.espeak_SetSynthCallback(self.callback)

    def _note(self, samples, num_samples: int, events) -> int:
        at = 0
        while events[at].type:  # 0 ends the list
            if events[at].type == WORD:
                self.starts.setdefault(events[at].text_position - 1, events[at].audio_position)
            at += 1
        return self._collect(samples, num_samples, events)


def speak(utterances: Sequence[Utterance]) -> list[Spoken]:
    """Utterances as the mini corpora have them, with the times of their words; those whose words are not told, not."""
    chunks = [utterances[start : start + mini_speech.CHUNK] for start in range(0, len(utterances), mini_speech.CHUNK)]
    return [one for some in mini_speech.in_fresh_processes(_speak, chunks) for one in some]


def _speak(utterances: Sequence[Utterance]) -> list[Spoken]:
    espeak, spoken = _Espeak(), []
    for utterance in utterances:
        espeak.starts.clear()
        clean = espeak.say(utterance)
        audio = soxr.resample(clean, mini_speech.ESPEAK_SAMPLE_RATE, SAMPLE_RATE)
        loud = np.flatnonzero(np.abs(audio) > 0.01 * np.abs(audio).max())  # as mini_speech cuts it
        cut_s = loud[0] / SAMPLE_RATE - 0.05
        starts = _starts(utterance.text, espeak.starts)
        if starts:
            edges = [0.05, *(ms / 1000 - cut_s for ms in starts[1:]), loud[-1] / SAMPLE_RATE - cut_s]
            audio = mini_speech._record(clean, utterance)
            spoken.append(Spoken(utterance, audio, list(itertools.pairwise(edges))))
    return spoken


def _starts(text: str, told: dict[int, int]) -> list[int]:
    """Milliseconds at which each word starts; none if one is not told."""
    at, starts = 0, []
    for word in split(text):
        at = text.index(word, at)
        if at not in told:
            return []
        starts.append(told[at])
        at += len(word)
    return starts


def phrases(lang: str, part: str, number: int) -> list[Utterance]:
    """Things to say, from a part of the data (mini_speech.PARTS), each in a voice of it."""
    texts = [text for text in mini_phrases.phrases(lang) if mini_phrases.part(lang, text) == part]
    texts.sort(key=lambda text: seed_of("times", text))
    return [
        Utterance(lang, text, mini_speech.speaker(i, part, "read"), "read", seed_of("times", lang, i))
        for i, text in enumerate(texts[:number])
    ]


def distances_ms(spoken: Spoken, words: Sequence[Word]) -> np.ndarray:
    """[W, 2]: how late each word starts and ends in `words`, in milliseconds (early is negative)."""
    found = np.array([(word.start_s, word.end_s) for word in words])
    return 1000 * (found - np.array(spoken.times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument(
        "--langs", nargs="+", choices=LANGS, help="(default: those of them that the aligner was trained on)"
    )
    parser.add_argument("--number", type=int, default=50, help="phrases of each language (default: %(default)s)")
    args = parser.parse_args()

    from zipperasr.data.features import log_mel
    from zipperasr.model import ALIGNER, ALIGNER_SETTINGS
    from zipperasr.model.aligner import Aligner
    from zipperasr.model.checkpoint import load_run

    aligner = Aligner.load(args.run_dir)
    model, every = load_run(args.run_dir, [aligner.step]), []
    print("       words  median of |distance|  median of distance at start, end  within 40 ms")
    trained_on = files.read_json(args.run_dir / ALIGNER / ALIGNER_SETTINGS)["langs"]
    for lang in args.langs or [lang for lang in LANGS if lang in trained_on]:
        merged, rows = model.merged(lang), []
        for spoken in speak(phrases(lang, "test", args.number)):
            features = log_mel(spoken.audio.astype(np.float32) / 2**15, merged.encoder.conv1.in_channels)
            frames, _ = merged.encoder([features], [lang])
            if words := aligner.words(frames.detach(), lang, spoken.utterance.text):
                rows.append(distances_ms(spoken, words))
        every += rows
        if rows:
            print(_row(lang, np.concatenate(rows)))
    if not every:
        raise UserError(f"{args.run_dir}: its aligner knows no word to measure; train it on one of {', '.join(LANGS)}")
    print(_row("all", np.concatenate(every)))


def _row(name: str, found: np.ndarray) -> str:
    distance, bias, near = np.median(np.abs(found)), np.median(found, axis=0), np.mean(np.abs(found) <= 40)
    return f"{name:<5} {len(found):>6}  {distance:>20.1f}  {bias[0]:>26.1f}, {bias[1]:>4.1f}  {100 * near:>11.0f}%"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"word_times.py: error: {error}")

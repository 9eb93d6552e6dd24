#!/usr/bin/env python
"""Stage 0 of the mini configuration: two corpora of synthetic speech, laid out like Multilingual LibriSpeech.

    python local/make_mini.py --out data/corpora --nj 2

`read` holds the 12 target languages (numbers and names); `talk` is the source domain: other phrases, faster and
livelier speech, more room and noise. It writes `<out>/<corpus>/<lang>/<split>/transcripts.txt`, below it
`audio/<speaker>/<book>/<id>.flac` (16 kHz), and `<out>/<corpus>/speakers.tsv`. A complete split is left as it is; a
partial one is made anew.
"""

import argparse
import dataclasses
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import mini_speech
import soundfile
from mini_speech import SAMPLE_RATE, Utterance, seed_of
from tqdm import tqdm

from zipperasr import files
from zipperasr.errors import UserError

# Utterances of each split. Four target languages have a small fraction of the others' training speech, as in the paper.
WELL_RESOURCED = ("de", "en", "es", "fr", "it", "ru", "th", "vi")
LOW_RESOURCED = ("ar", "ja", "ko", "pt")
SIZES = {
    "read": {lang: {"train": 900, "dev": 24, "test": 60} for lang in WELL_RESOURCED}
    | {lang: {"train": 60, "dev": 24, "test": 60} for lang in LOW_RESOURCED},
    "talk": {lang: {"train": 700, "dev": 24, "test": 60} for lang in ("en", "fr", "th")}
    | {"zh": {"train": 700, "dev": 24, "test_meeting": 60, "test_net": 60}},
}
SETS = [(corpus, lang, split) for corpus in SIZES for lang in SIZES[corpus] for split in SIZES[corpus][lang]]
STYLES = {"test_meeting": "meeting", "test_net": "net"}  # by split; other splits have the style of their corpus
UTTERANCES_PER_SPEAKER = 3


@dataclass(frozen=True)
class Item:
    """One line of a split: utterance id, number of its speaker, and what is said."""

    id: str
    speaker: int
    utterance: Utterance

    @property
    def audio(self) -> Path:
        """Where its audio lies below the split's directory."""
        return Path("audio", *self.id.split("_")[:2], f"{self.id}.flac")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the corpora")
    parser.add_argument("--corpora", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--scale", type=float, default=1.0, help="part of each split to make (default: 1.0)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nj", type=int, default=1, help="number of parallel jobs; does not change a byte")
    args = parser.parse_args()
    try:
        make(args.out, corpora=args.corpora, scale=args.scale, seed=args.seed, nj=args.nj)
    except UserError as error:
        sys.exit(f"make_mini.py: error: {error}")


def make(out: Path, *, corpora: list[str], scale: float, seed: int, nj: int) -> None:
    """Write the corpora below `out`. Raises UserError when a package is missing, or `out` is full or in use."""
    with files.lock(out):
        sets = {key: plan(*key, scale=scale, seed=seed) for key in SETS if key[0] in corpora}
        with tqdm(total=sum(map(len, sets.values())), desc="synthesise", unit="utt", disable=None) as bar:
            for (corpus, lang, split), items in sets.items():
                write_split(out / corpus / lang / split, items, nj=nj, bar=bar)
        for corpus in corpora:
            write_speakers(out / corpus / "speakers.tsv", {key: sets[key] for key in sets if key[0] == corpus})


def plan(corpus: str, lang: str, split: str, *, scale: float = 1.0, seed: int = 0) -> list[Item]:
    """What a split holds. A smaller scale gives the first utterances of a larger one."""
    try:
        import mini_phrases
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; run pip install 'zipperasr[mini]'") from error
    number, part, style = 1 + SETS.index((corpus, lang, split)), split.split("_")[0], STYLES.get(split, corpus)
    texts = [text for text in mini_phrases.phrases(lang, corpus) if mini_phrases.part(lang, text) == part]
    texts.sort(key=lambda text: seed_of(seed, split, text))
    size = math.ceil(SIZES[corpus][lang][split] * scale)
    if not 0 < size <= len(texts):
        raise UserError(f"--scale {scale}: {corpus} {lang} {split} can have 1 to {len(texts)} utterances, not {size}")
    items = []
    for index, text in enumerate(texts[:size]):
        speaker = 1000 * number + index // UTTERANCES_PER_SPEAKER
        voice = mini_speech.speaker(speaker, part, style, seed=seed)
        utterance = Utterance(lang, text, voice, style, seed=seed_of(seed, corpus, lang, split, index))
        items.append(Item(f"{speaker}_{number}_{index:06d}", speaker, utterance))
    return items


def write_split(directory: Path, items: list[Item], *, nj: int, bar: tqdm) -> None:
    """Write one split: beside first, then renamed, so that `directory` is never partial. Skips what is complete."""
    key = files.fingerprint([files.sha256(mini_speech.__file__), *map(dataclasses.asdict, items)])
    if files.is_done(directory, key):
        bar.update(len(items))
        return
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    jobs = [(partial, items[start : start + mini_speech.CHUNK]) for start in range(0, len(items), mini_speech.CHUNK)]
    for num_written in mini_speech.in_fresh_processes(write_audio, jobs, nj=nj):
        bar.update(num_written)
    with files.write(partial / "transcripts.txt") as stream:
        stream.writelines(f"{item.id}\t{item.utterance.text}\n" for item in items)
    files.mark_done(partial, key)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)


def write_audio(job: tuple[Path, list[Item]]) -> int:
    """Synthesise utterances into a directory; returns their number. Raises UserError when one cannot be written."""
    directory, items = job
    for item, audio in zip(items, mini_speech.synthesise([item.utterance for item in items])):
        path = directory / item.audio
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, audio, SAMPLE_RATE)
        except (OSError, soundfile.SoundFileError) as error:
            raise UserError(f"{path}: cannot be written ({error}); is the disk full?") from error
    return len(items)


def write_speakers(path: Path, sets: dict[tuple[str, str, str], list[Item]]) -> None:
    """Write a table of a corpus's speakers."""
    with files.write(path) as stream:
        stream.write("speaker\tlang\tsplit\tvariant\tpitch\trate\n")
        for (_, lang, split), items in sets.items():
            for number, voice in {item.speaker: item.utterance.speaker for item in items}.items():
                stream.write(f"{number}\t{lang}\t{split}\t{voice.variant}\t{voice.pitch}\t{voice.rate}\n")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Manifests of MSR-86K (arXiv:2406.18301): sets <corpus>_<lang>_{train,dev}. Lhotse has no recipe for it.

Its lists are JSON like WenetSpeech's, {"audios": [{aid, segments: [{sid, begin_time, end_time, text_tn}]}]}. Copies of
the corpus are not all laid out alike, so where things lie and how ids look are patterns. In them {lang} is the code
(en), {LANG} the same in capitals, {language} and {Language} the name (english, English), {split} train or dev, and
{folder} the folder of the list itself. Patterns are relative to --corpus-dir.

A recording is the file <aid>.<ext> in one of the audio folders, and its utterances are pieces of it. Where there is no
such file, each utterance is a file of its own: <sid>.<ext> or <aid>/<sid>.<ext>. If the list names the `path` of a
recording, that is looked for first.
"""

import argparse
import dataclasses
import functools
import glob
import itertools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from zipperasr import languages
from zipperasr.data import prepare, sources
from zipperasr.data.prepare import Clip, Rejected
from zipperasr.errors import UserError

LISTS = (
    "{Language}/*{split}*.json",
    "{LANG}/*{split}*.json",
    "{lang}/*{split}*.json",
    "{Language}_{split}*.json",
    "{LANG}_{split}*.json",
)
FOLDERS = ("{folder}/audio/{split}", "{folder}/audio", "{folder}/{split}", "{folder}", ".")
IDS = r"(?:{Language}-)?({LANG}_\S+)"
SUFFIXES = (".wav", ".opus", ".flac", ".ogg", ".mp3")


def run(args: argparse.Namespace) -> None:
    prepare.check_corpus(args.corpus)
    for lang, split in itertools.product(args.langs, args.splits):
        name, values = f"{args.corpus}_{lang}_{split}", placeholders(lang, split)
        lists = find_lists(args.corpus_dir, [fill(pattern, values) for pattern in args.lists])
        folders = {path: find_folders(args.corpus_dir, args.audio, values, path.parent) for path in lists}
        stream = functools.partial(rows, name, folders, lang, ids=compile_ids(args.ids, values))
        prepare.write_manifests(args, [name], stream, sources=lists, options=[args.ids, *args.audio])


def placeholders(lang: str, split: str) -> dict[str, str]:
    """What stands for each name in a pattern."""
    name = languages.get(lang).name
    return {"lang": lang, "LANG": lang.upper(), "language": name.lower(), "Language": name, "split": split}


def fill(pattern: str, values: dict[str, str]) -> str:
    """The pattern with names in braces replaced; other braces stay, as regular expressions have them."""
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), pattern)


def find_lists(corpus_dir: Path, patterns: Sequence[str]) -> list[Path]:
    """The files of the first pattern that fits any. Raises UserError when none does."""
    for pattern in patterns:
        if found := sorted(glob.glob(pattern, root_dir=corpus_dir)):
            return [corpus_dir / path for path in found]
    raise UserError(
        f"{corpus_dir}: no list of MSR-86K; looked for {', '.join(patterns)}; say with --lists what to look for"
    )


def find_folders(corpus_dir: Path, patterns: Sequence[str], values: dict[str, str], folder: Path) -> list[Path]:
    """The folders of audio that are there. Raises UserError when none is."""
    folders = [corpus_dir / fill(pattern, values | {"folder": str(folder.absolute())}) for pattern in patterns]
    there = [folder for folder in folders if folder.is_dir()]
    if not there:
        looked = ", ".join(map(str, folders))
        raise UserError(f"{corpus_dir}: no audio; looked for the folders {looked}; say with --audio where it is")
    return there


def compile_ids(pattern: str, values: dict[str, str]) -> re.Pattern[str]:
    """The pattern of ids, whose first group is the id. Raises UserError when it is none."""
    try:
        ids = re.compile(fill(pattern, values))
    except re.error as error:
        raise UserError(f"--ids '{pattern}': not a regular expression ({error})") from error
    if not ids.groups:
        raise UserError(f"--ids '{pattern}': put the part that is the id in parentheses")
    return ids


def rows(
    name: str, folders: dict[Path, list[Path]], lang: str, *, ids: re.Pattern[str]
) -> Iterator[tuple[str, Clip | Rejected]]:
    """The utterances of the lists in `folders`, which says where the audio of each may be."""
    suffixes = [*SUFFIXES]
    for path, places in folders.items():
        print(f"{path}: looks for audio in {', '.join(map(str, places))}", flush=True)
        for audio in sources.read_audios(path):
            yield from ((name, with_id(row, ids)) for row in utterances(audio, places, lang, suffixes))


def utterances(audio: dict[str, Any], places: list[Path], lang: str, suffixes: list[str]) -> Iterator[Clip | Rejected]:
    """The utterances of one recording: pieces of its file or, where there is none, files of their own."""
    aid = str(audio.get("aid"))
    given = (place / audio["path"] for place in places if audio.get("path"))
    recording = next((path for path in given if path.is_file()), None) or find_audio(places, [aid], suffixes)
    for segment in audio.get("segments") or ():
        row = sources.clip(segment, recording or places[0] / f"{aid}{suffixes[0]}", lang, text="text_tn")
        if recording is None and isinstance(row, Clip):
            own = find_audio(places, [row.id, f"{aid}/{row.id}"], suffixes)
            row = dataclasses.replace(row, path=own, start_s=0.0, end_s=None) if own else row
        yield row


def find_audio(places: Sequence[Path], stems: Sequence[str], suffixes: list[str]) -> Path | None:
    """The file of the first stem and suffix that is there; its suffix becomes the first to try."""
    for place, suffix, stem in itertools.product(places, suffixes, stems):
        path = f"{place}/{stem}{suffix}"
        if os.path.isfile(path):  # much faster than a Path for each that is not there
            suffixes.sort(key=suffix.__ne__)
            return Path(path)
    return None


def with_id(row: Clip | Rejected, ids: re.Pattern[str]) -> Clip | Rejected:
    """The row with its id as the corpus has it; a row whose id is unlike the pattern is rejected."""
    if isinstance(row, Rejected):
        return row
    if match := ids.fullmatch(row.id):
        return dataclasses.replace(row, id=match[1])
    return Rejected(row.id, "bad row", f"the id is not like {ids.pattern}; see --ids")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus-dir", type=Path, required=True, help="holds lists and audio")
    parser.add_argument("--langs", nargs="+", required=True, help="language codes")
    parser.add_argument("--splits", nargs="+", choices=("train", "dev"), default=["train", "dev"], help="(%(default)s)")
    parser.add_argument("--lists", nargs="+", default=LISTS, help="patterns of lists; the first that fits any is taken")
    parser.add_argument("--audio", nargs="+", default=FOLDERS, help="folders of audio, tried in this order")
    parser.add_argument("--ids", default=IDS, help="pattern of ids; its first group is the id: %(default)s")
    prepare.add_arguments(parser)
    sys.exit(prepare.main(parser, run))

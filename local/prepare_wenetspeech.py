#!/usr/bin/env python3
"""Manifests of WenetSpeech (openslr.org/121): sets <corpus>_zh_{train,dev,test_net,test_meeting}.

    <corpus-dir>/WenetSpeech.json     {"audios": [{aid, path, duration, segments: [{sid, begin_time, end_time, text,
    <corpus-dir>/<path>                                                             subsets: ["L", ...]}]}]}

Utterances are pieces of long opus files; `train` is the subset L, or a part of it. The file of several gigabytes is
read once, as a stream. The durations that it gives are not believed: every recording is opened. Lhotse's own recipe
holds all of it in memory, believes the durations, takes every file for 16 kHz, and calls the language "Chinese"; so it
is not used.
"""

import argparse
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

from zipperasr.data import prepare, sources
from zipperasr.data.prepare import Clip, Rejected
from zipperasr.errors import UserError

HELD_OUT = {"DEV": "dev", "TEST_NET": "test_net", "TEST_MEETING": "test_meeting"}


def run(args: argparse.Namespace) -> None:
    prepare.check_corpus(args.corpus)
    if args.langs != ["zh"]:
        raise UserError(f"--langs {' '.join(args.langs)}: WenetSpeech is Chinese; say --langs zh")
    path = args.corpus_dir / "WenetSpeech.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the folder of WenetSpeech.json and audio as --corpus-dir")
    names = {subset: f"{args.corpus}_zh_{split}" for subset, split in {args.subset: "train", **HELD_OUT}.items()}
    stream = functools.partial(rows, path, names)
    prepare.write_manifests(args, [*names.values()], stream, sources=[path], options=[args.subset])


def rows(path: Path, names: dict[str, str]) -> Iterator[tuple[str, Clip | Rejected]]:
    """Each utterance of the subsets in `names` ({subset: set}) with its set; says how many are of no such subset."""
    num_others = 0
    for audio in sources.read_audios(path):
        recording = path.parent / str(audio.get("path"))
        for segment in audio.get("segments") or ():
            wanted = [name for subset, name in names.items() if subset in (segment.get("subsets") or ())]
            num_others += not wanted
            yield from ((name, sources.clip(segment, recording, "zh", text="text")) for name in wanted)
    print(f"{path}: {num_others} utterances are in none of {', '.join(names)}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus-dir", type=Path, required=True, help="holds WenetSpeech.json and audio")
    parser.add_argument("--langs", nargs="+", default=["zh"], help="zh, the only one there is")
    parser.add_argument("--subset", choices=("L", "M", "S"), default="L", help="what train is made of (%(default)s)")
    prepare.add_arguments(parser)
    sys.exit(prepare.main(parser, run))

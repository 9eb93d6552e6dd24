"""Write sets as Kaldi data directories, for Kaldi, ESPnet and others: <out>/<set>/{wav.scp,text,utt2spk,...}.

Paths are plain, whatever the codec: ESPnet reads all that libsndfile reads, Kaldi's own programs only WAV. An utterance
is its own speaker where Kaldi's order leaves no other choice.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", type=Path, required=True, help="holds manifests/")
    parser.add_argument("--sets", nargs="+", required=True, help="names of sets, <corpus>_<lang>_<split>")
    parser.add_argument("--out", type=Path, required=True, help="a folder; each set gets one in it")
    parser.add_argument(
        "--features", type=int, choices=(80, 128), metavar="BINS",
        help="write Whisper's log-mel features of 80 or 128 bins too: feats.scp, utt2num_frames",
    )  # fmt: skip
    parser.add_argument("--nj", type=int, default=1, help="number of processes for features (%(default)s)")


def run(args: argparse.Namespace) -> None:
    """Write the directories and print what is in them."""
    from zipperasr.data import kaldi, manifests

    for name in args.sets:
        manifest, directory = manifests.path_of(args.data_dir, name), args.out / name
        counts = kaldi.write(directory, manifests.read(manifest))
        if args.features:
            kaldi.write_features(directory, manifests.read(manifest), num_mel_bins=args.features, nj=args.nj)
        print(f"{directory}: " + ", ".join(f"{count} {what}" for what, count in counts.items()), flush=True)

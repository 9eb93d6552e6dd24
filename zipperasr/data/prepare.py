"""What the scripts `local/prepare_<corpus>.py` share: a manifest from a stream of clips, and a script's exit status."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from zipperasr import files
from zipperasr.data import audio, manifests, parallel
from zipperasr.errors import UserError


@dataclass(frozen=True)
class Clip:
    """One utterance in a file of its own."""

    id: str
    path: Path
    lang: str
    text: str
    speaker: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every preparation."""
    parser.add_argument("--corpus", required=True, help="its name in sets, <corpus>_<lang>_<split>; no underscore")
    parser.add_argument("--out", type=Path, default=Path("data/manifests"), help="directory of manifests (%(default)s)")
    parser.add_argument("--nj", type=int, default=os.cpu_count(), help="number of processes (%(default)s)")


def write_manifest(clips: Iterable[Clip], name: str, *, out: Path, nj: int, key: str) -> None:
    """Write the manifest of the set `name` to `out`, one cut per clip, in order, and say how it went.

    A file that cannot be read gets a cut of no duration, so that the validator names the utterance and its defect.
    Raises UserError when there is no clip.
    """
    import lhotse  # noqa: F401  before the processes fork, so that they need not

    path = out / f"{name}{manifests.SUFFIX}"
    counts = {"utterances": 0, "bad": 0, "seconds": 0.0}

    def counted() -> Iterator[dict]:
        for cut in parallel.run(_cut, clips, nj=nj, desc=name):
            counts["utterances"] += 1
            counts["bad"] += not cut["duration"]
            counts["seconds"] += cut["duration"]
            yield cut
        if not counts["utterances"]:
            raise UserError(f"{name}: the corpus holds no utterance of it; check its folder")

    manifests.write(path, counted())
    files.mark_done(out, key, name=manifests.marker(name))
    bad = f"; {counts['bad']} without usable audio, `zipperasr validate` names them" if counts["bad"] else ""
    print(f"{path}: {counts['utterances']} utterances, {counts['seconds'] / 3600:.3f} h{bad}", flush=True)


def is_prepared(name: str, *, out: Path, key: str) -> bool:
    """Whether the set `name` has been prepared from the inputs that `key` stands for; says so."""
    done = (out / f"{name}{manifests.SUFFIX}").is_file() and files.is_done(out, key, name=manifests.marker(name))
    if done:
        print(f"{out / name}{manifests.SUFFIX}: complete", flush=True)
    return done


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, their ends kept. Raises UserError when it is of another encoding."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            yield from stream
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); convert it") from error


def key_of(transcripts: Path) -> str:
    """Stands for a file of transcripts and for where and when it was written, as audio is rewritten with it."""
    return files.fingerprint([str(transcripts), transcripts.stat().st_mtime_ns, files.sha256(transcripts)])


def check_corpus(corpus: str) -> None:
    """Raises UserError for a corpus name that would make names of sets ambiguous."""
    if "_" in corpus or not corpus:
        raise UserError(f"--corpus '{corpus}': sets are named <corpus>_<lang>_<split>; take a name without underscore")


def main(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None]) -> int:
    """Run a script; return its exit status. UserError becomes one line on standard error and status 1."""
    try:
        run(parser.parse_args())
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return 1
    return 0


def _cut(clip: Clip) -> dict:
    """The cut of a clip as a dictionary: a MonoCut, or a MultiCut over all channels."""
    from lhotse import AudioSource, Recording, SupervisionSegment

    try:
        info = audio.probe(str(clip.path))
    except audio.BadAudio:
        info = audio.AudioInfo(audio.SAMPLE_RATE, 0, 1)
    duration_s = info.num_samples / info.sampling_rate
    sources = [AudioSource("file", list(range(info.num_channels)), str(clip.path))]
    cut = Recording(clip.id, sources, info.sampling_rate, info.num_samples, duration_s).to_cut()
    supervision = SupervisionSegment(
        id=clip.id,
        recording_id=clip.id,
        start=0.0,
        duration=duration_s,
        channel=cut.channel,
        text=clip.text,
        language=clip.lang,
        speaker=clip.speaker,
    )
    cut.supervisions = [supervision]
    return cut.to_dict()

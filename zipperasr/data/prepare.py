"""What the scripts `local/prepare_<layout>.py` share: manifests from a stream of clips, and a script's exit status.

A script says which clips there are and what is written for them. Everything else is done here, by the rules of
data/defects.py, for one utterance after the other: what a corpus holds is never in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import os
import re
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zipperasr import files
from zipperasr.data import audio, defects, manifests, parallel, validation
from zipperasr.data.text import train_text
from zipperasr.errors import UserError

OVERRUN_S = 0.5
"""Segments that reach at most this far beyond their audio are shortened; others have lost words, and are dropped."""
FORMATS = {
    ".wav": ("WAV", "WAVEX", "RF64"),
    ".flac": ("FLAC",),
    ".mp3": ("MP3",),
    ".ogg": ("OGG",),
    ".opus": ("OGG",),
    ".aiff": ("AIFF",),
}


@dataclass(frozen=True)
class Clip:
    """One utterance: a file of its own, or the seconds `start_s` to `end_s` (None: its end) of a longer one."""

    id: str
    path: Path
    lang: str
    text: str
    speaker: str | None = None
    start_s: float = 0.0
    end_s: float | None = None


@dataclass(frozen=True)
class Rejected:
    """A row of a corpus that is left out, and why: a kind of data/defects.py."""

    id: str
    kind: str
    detail: str


Row = Clip | Rejected


@dataclass(frozen=True)
class Examined:
    """What became of a row: its cut, unless it is left out, and the defects (kind, detail) found on the way."""

    set: str
    utt_id: str
    cut: dict[str, Any] | None
    found: list[tuple[str, str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every preparation."""
    parser.add_argument("--corpus", required=True, help="its name in sets, <corpus>_<lang>_<split>; no underscore")
    parser.add_argument("--out", type=Path, default=Path("data/manifests"), help="directory of manifests (%(default)s)")
    parser.add_argument("--nj", type=int, default=os.cpu_count(), help="number of processes (%(default)s)")


def write_manifests(
    args: argparse.Namespace,
    names: Sequence[str],
    rows: Callable[[], Iterable[tuple[str, Row]]],
    *,
    sources: Sequence[Path],
    options: Sequence[str] = (),
) -> None:
    """Write the manifests of the sets `names` to `args.out`, one cut per clip of `rows()` (set, clip), in order.

    Does nothing where they are complete for the same `sources`, the files of transcripts, and the same `options`, those
    that change what is made of them. Beside each manifest stand its tally (`<set>_tally.json`) and its defects
    (`<set>_defects.tsv`).
    Raises UserError when a source or every row of a set is missing.
    """
    import lhotse  # noqa: F401  before the processes fork, so that they need not

    _probe.cache_clear()  # files may have changed since
    key, notes = _inspect(sources)
    key = files.fingerprint([key, *options]) if options else key
    if all(_is_prepared(name, out=args.out, key=key) for name in names):
        return
    with contextlib.ExitStack() as stack:
        books = {name: stack.enter_context(_Book.open(args.out, name)) for name in names}
        for examined in parallel.run(_examine, rows(), nj=args.nj, desc=args.corpus):
            books[examined.set].add(examined)
        for name, book in books.items():
            if not book.tally.num_in:
                raise UserError(f"{name}: the corpus holds no utterance of it; check its folder")
            for kind, path in notes:
                book.note(kind, "*", path)
    for name, book in books.items():
        files.mark_done(args.out, key, name=manifests.marker(name))
        print(f"{name}: {book.tally}", flush=True)


class _Book:
    """The manifest, tally and table of defects of one set, while they are being written."""

    def __init__(self, name: str, write: Callable[[dict], None], log: Callable[[defects.Defect], None]):
        self.name, self._write, self._log = name, write, log
        self.tally, self._hashes = defects.Tally(), array("q")

    @classmethod
    @contextlib.contextmanager
    def open(cls, out: Path, name: str) -> Iterator[_Book]:
        """A book whose files are there, whole, when the block has ended."""
        path = out / f"{name}{manifests.SUFFIX}"
        with defects.log(out / f"{name}_defects.tsv") as log:
            with manifests.writer(path) as write:
                yield (book := cls(name, write, log))
            book._drop_repeated(path)
        defects.write_tally(manifests.tally_path(path), book.tally)

    def add(self, examined: Examined) -> None:
        """Count a row, and write its cut if there is one."""
        self.tally.num_in += 1
        for kind, detail in examined.found:
            self.note(kind, examined.utt_id, detail)
        if examined.cut:
            self.tally.num_kept += 1
            self.tally.duration_s += examined.cut["duration"]
            self._hashes.append(hash(examined.utt_id))
            self._write(examined.cut)

    def note(self, kind: str, utt_id: str, detail: str) -> None:
        """Count a defect, and write it down."""
        self.tally.add(kind, utt_id)
        self._log(defects.Defect(self.name, utt_id, kind, detail))

    def _drop_repeated(self, path: Path) -> None:
        """Write the manifest again if an id is repeated: the first cut of each stays."""
        suspects, firsts = validation.repeated(self._hashes), {}
        if not suspects:
            return
        with manifests.writer(path) as write:
            for cut in manifests.read(path):
                first = firsts.setdefault(cut["id"], cut) if hash(cut["id"]) in suspects else cut
                if first is cut:
                    write(cut)
                    continue
                self.tally.num_kept -= 1
                self.tally.duration_s -= cut["duration"]
                kind = "duplicate row" if first == cut else "duplicate id"
                self.note(kind, cut["id"], cut["recording"]["sources"][0]["source"])


def _is_prepared(name: str, *, out: Path, key: str) -> bool:
    """Whether the set `name` has been prepared from the inputs that `key` stands for; says so."""
    path = out / f"{name}{manifests.SUFFIX}"
    done = path.is_file() and files.is_done(out, key, name=manifests.marker(name))
    if done:
        print(f"{path}: complete", flush=True)
    return done


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file without their line feed; bytes of another encoding become surrogates (PEP 383)."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as stream:
        for line in stream:
            yield line.removesuffix("\n")


def _inspect(sources: Sequence[Path]) -> tuple[str, list[tuple[str, str]]]:
    """What stands for files, where they lie and when they were written; and how they depart from plain UTF-8 text."""
    parts, notes = [], []
    for path in sources:
        sha, start, has_returns = hashlib.sha256(), b"", False
        try:
            with open(path, "rb") as stream:
                while block := stream.read(2**20):
                    sha.update(block)
                    start, has_returns = start or block[:3], has_returns or b"\r\n" in block
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); mend the corpus") from error
        parts.append([str(path), path.stat().st_mtime_ns, sha.hexdigest()])
        notes += [("byte order mark", str(path))] * start.startswith(b"\xef\xbb\xbf")
        notes += [("carriage returns", str(path))] * has_returns
    return files.fingerprint(parts), notes


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


def _examine(item: tuple[str, Row]) -> Examined:
    """The cut of a row, or why it has none."""
    name, row = item
    if isinstance(row, Rejected):
        return Examined(name, row.id, None, [(row.kind, row.detail)])
    found: list[tuple[str, str]] = []
    utt_id = re.sub(r"[\s/]+", "_", row.id.strip())
    if utt_id and utt_id != row.id:
        found.append(("unsafe id", f"'{row.id}' became '{utt_id}'"))
    text = " ".join(row.text.split())
    try:
        f"{utt_id}{row.path}{text}{row.speaker}".encode()
        written = train_text(text, row.lang)
        span = _span(row, found)
    except UnicodeEncodeError:
        return Examined(name, utt_id, None, [*found, ("not UTF-8", text or str(row.path))])
    except audio.BadAudio as bad:
        return Examined(name, utt_id, None, [*found, (bad.kind, bad.detail)])
    if not utt_id:
        found.append(("bad row", f"no id: {row.path}"))
    if not written:
        found.append(("empty text", f"'{text}'"))
    if text.count('"') % 2:
        found.append(("unbalanced quote", text))
    if any(defects.rule(kind, name) in ("dropped", "fatal") for kind, _ in found):
        return Examined(name, utt_id, None, found)
    return Examined(name, utt_id, _cut(row, utt_id, span, text, written), found)


@dataclass(frozen=True)
class _Span:
    info: audio.AudioInfo
    start_s: float
    duration_s: float


def _span(clip: Clip, found: list[tuple[str, str]]) -> _Span:
    """Where the clip lies in its file; adds the defects of both to `found`. Raises audio.BadAudio."""
    info = _probe(str(clip.path))
    if info.format not in FORMATS.get(clip.path.suffix.lower(), (info.format,)):
        found.append(("wrong extension", f"{clip.path}: holds {info.format}"))
    found += validation.rate_defects(info.sampling_rate)
    if info.num_channels > 1:
        found.append(("several channels", f"{clip.path}: {info.num_channels}, averaged"))
    end_s = info.duration_s if clip.end_s is None else clip.end_s
    where = f"{clip.path}: {clip.start_s:.3f} to {end_s:.3f} s of {info.duration_s:.3f} s"
    duration_s = round(min(end_s, info.duration_s) - clip.start_s, 6)
    if clip.start_s < 0 or clip.start_s >= info.duration_s > 0 or end_s > info.duration_s + OVERRUN_S:
        found.append(("segment outside its audio", where))
        return _Span(info, clip.start_s, duration_s)  # its duration says nothing
    if end_s > info.duration_s + audio.TOLERANCE_S:
        found.append(("segment shortened to its audio", where))
    found += validation.duration_defects(duration_s)
    return _Span(info, clip.start_s, duration_s)


@functools.lru_cache(maxsize=256)
def _probe(path: str) -> audio.AudioInfo:
    """Cached, for corpora whose utterances are pieces of long files."""
    return audio.probe(path)


def _cut(clip: Clip, utt_id: str, span: _Span, text: str, written: str) -> dict:
    """The cut of a clip as a dictionary: a MonoCut, or a MultiCut over all channels."""
    from lhotse import AudioSource, Recording, SupervisionSegment

    info = span.info
    recording_id = utt_id if clip.end_s is None else clip.path.stem
    sources = [AudioSource("file", list(range(info.num_channels)), str(clip.path))]
    cut = Recording(recording_id, sources, info.sampling_rate, info.num_samples, info.duration_s).to_cut()
    cut.id, cut.start, cut.duration = utt_id, span.start_s, span.duration_s
    supervision = SupervisionSegment(
        id=utt_id,
        recording_id=recording_id,
        start=0.0,
        duration=span.duration_s,
        channel=cut.channel,
        text=text,
        language=clip.lang,
        speaker=clip.speaker,
        custom={"train_text": written},
    )
    cut.supervisions = [supervision]
    return cut.to_dict()

"""What there is to transcribe: audio files, folders of them, Kaldi data directories and Lhotse manifests."""

import contextlib
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zipperasr import files
from zipperasr.data import kaldi, stream
from zipperasr.data.audio import Span
from zipperasr.errors import UserError

MANIFESTS = (".jsonl", ".jsonl.gz")
AUDIO = frozenset(
    ".aac .ac3 .aif .aiff .amr .ape .au .caf .flac .flv .m4a .m4b .mka .mkv .mov .mp2 .mp3 .mp4 .mpg .oga .ogg .opus "
    ".ts .w64 .wav .webm .wma .wmv .wv".split()
)
"""What is taken from a folder; of a file that is named itself, the content decides."""


@dataclass(frozen=True)
class Source:
    """A recording, or a piece of one: the mean of its `channels`, or of all. `language`: what the input says it is."""

    name: str
    path: Path
    start_s: float = 0.0
    end_s: float | None = None
    channels: tuple[int, ...] = ()
    language: str | None = None
    stem: str | None = None

    @property
    def lang(self) -> str | None:
        """The code of the language that the input says. Raises UserError where that is none that is known."""
        try:
            return self.language and kaldi.lang_code(self.language)
        except UserError as error:
            raise UserError(f"{self.name}: {error}; or give --language") from None

    @property
    def output(self) -> str:
        """What output files are called, without suffix; those of a folder in a folder lie in such a one too."""
        return self.stem or self.name.replace("%", "%25").replace("/", "%2F")

    @property
    def duration_s(self) -> float:
        """How long it is as far as its header tells, and 0 where it does not."""
        if self.end_s is None:
            with contextlib.suppress(UserError):
                info = stream.describe(self.path)
                return max(0.0, info.duration_s - self.start_s) if info else 0.0
            return 0.0
        return self.end_s - self.start_s

    @property
    def digest(self) -> str:
        """Stands for the audio, as long as its file is not written anew. Raises UserError where there is none."""
        try:
            f"{self.name} {self.path}".encode()
            found = self.path.stat()
        except UnicodeEncodeError as error:
            raise UserError(f"{self.path}: not a name in UTF-8; mend it") from error
        except OSError as error:
            raise UserError(f"{self.path}: {(error.strerror or str(error)).lower()}; mend its name") from error
        span = [self.start_s, self.end_s, self.channels]
        return files.fingerprint([str(self.path.absolute()), found.st_size, found.st_mtime_ns, *span])


def find(inputs: Iterable[str]) -> tuple[list[Source], dict[str, UserError]]:
    """The sources of all inputs, in order, and what is wrong with those that have none."""
    sources, failed = [], {}
    for name in inputs:
        try:
            sources += _find(Path(name))
        except UserError as error:
            failed[name] = error
        except OSError as error:
            what = (error.strerror or str(error)).lower()
            failed[name] = UserError(f"{error.filename or name}: {what}; mend its name or permissions")
    return sources, failed


def _find(path: Path) -> list[Source]:
    if path.name.endswith(MANIFESTS):
        return list(_from_manifest(path))
    if not path.is_dir():
        return [_from_file(path)]
    if (path / "wav.scp").exists():
        return list(_from_kaldi(path))
    found = list(_audio_in(path))
    if not found:
        raise UserError(f"{path}: neither a Kaldi data directory (it has no wav.scp) nor a folder with audio files")
    return [_from_file(p, stem=str(p.relative_to(path).with_suffix(""))) for p in found]


def _audio_in(folder: Path) -> Iterator[Path]:
    """The audio files in a folder and in its folders; links to folders are not followed."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from () if path.is_symlink() else _audio_in(path)
        elif path.suffix.lower() in AUDIO:
            yield path


def _from_file(path: Path, *, stem: str | None = None) -> Source:
    return Source(str(path), path, stem=stem or path.stem)


def _from_kaldi(folder: Path) -> Iterator[Source]:
    """Each utterance of segments, or else of wav.scp; only plain files are read, and no commands run."""
    wav_scp = kaldi.read_table(folder / "wav.scp")
    tables = (kaldi.read_table(p) if (p := folder / name).is_file() else None for name in ("segments", "utt2lang"))
    segments, utt2lang = tables
    spans = {key: f"{key} 0 -1" for key in wav_scp} if segments is None else segments
    if not spans:
        raise UserError(f"{folder}: an empty {'wav.scp' if segments is None else 'segments'}; write it again")
    for utt_id, span in spans.items():
        where = f"{folder}: utterance '{utt_id}'"
        match = re.fullmatch(r"(\S+)\s+(\d+(?:\.\d*)?)\s+(-1|\d+(?:\.\d*)?)", span)
        if not match or match[1] not in wav_scp:
            raise UserError(f"{where}: '{span}' is no recording of wav.scp with start and end; mend segments")
        recording, start_s, end_s = match[1], float(match[2]), float(match[3])
        if not end_s == -1 and end_s <= start_s:
            raise UserError(f"{where}: it ends at {end_s:g} s, before it begins; mend segments")
        entry = wav_scp[recording]
        if entry in ("", "-") or "|" in (entry[0], entry[-1]) or re.search(r":\d+$", entry):
            mend = "stage 1 (local/prepare_kaldi.py) stores such audio as files"
            raise UserError(f"{folder}: recording '{recording}' is '{entry}', not a file; {mend}")
        language = (utt2lang or {}).get(utt_id)
        yield Source(utt_id, Path(entry), start_s, None if end_s == -1 else end_s, language=language)


def _from_manifest(path: Path) -> Iterator[Source]:
    """Each cut or recording of a manifest of Lhotse."""
    row = None
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as lines:
            for line in lines:
                if line.strip():
                    row = json.loads(line)
                    yield _from_row(row)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; give a manifest of Lhotse") from error
    except (ValueError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole manifest ({error}); write it again") from error
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: a line that is neither a cut nor a recording of Lhotse: {str(row)[:80]}") from error
    if row is None:
        raise UserError(f"{path}: an empty manifest; write it again")


def _from_row(row: dict[str, Any]) -> Source:
    if "sources" in row:
        channels = row["sources"][0]["channels"]
        row = {"id": row["id"], "recording": row, "channel": channels, "start": 0, "duration": row["duration"]}
    span = Span.of(row)
    said = {supervision.get("language") for supervision in row.get("supervisions", ())}
    language = said.pop() if len(said) == 1 else None
    return Source(str(row["id"]), Path(span.path), span.start_s, span.start_s + span.duration_s, span.picked, language)

"""The audio that Kaldi's wav.scp names, as plain files.

An entry is a path, an entry of an ark (`x.ark:12`) or a command (`sox ... |`). What is not a file of its own is stored
as FLAC, without loss up to 24 bits, so that manifests name files only and nothing after stage 1 runs a command.

Arks of audio are read here, not by kaldiio: it takes a truncated entry for a whole one, refuses 24 bits, unpickles what
an ark holds, and runs what ends in `|`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import soundfile

from zipperasr import files
from zipperasr.data import parallel
from zipperasr.data.audio import BadAudio, probe
from zipperasr.errors import UserError

_ARK_ENTRY = re.compile(r"(.+):(\d+)")
_FLOATS = ("FLOAT", "DOUBLE")
_MAX_CHANNELS = 8  # of FLAC
_BLOCK = 2**20


@dataclass(frozen=True)
class Locator:
    """Finds the files of recordings. Relative paths and commands start in the folder `root`; FLAC goes to `store`."""

    root: Path
    store: Path
    run_commands: bool = False
    nj: int = 1

    def locate(self, wav_scp: Mapping[str, str]) -> dict[str, Path | BadAudio]:
        """The file of each recording of {recording: entry}, or why it has none; not every path is a file that is there.

        Raises UserError for a command where they are not to be run.
        """
        commands = {recording: entry for recording, entry in wav_scp.items() if _is_command(entry)}
        if commands and not self.run_commands:
            recording, entry = next(iter(commands.items()))
            raise UserError(
                f"recording '{recording}' is what a command prints: {entry}; such commands (there are {len(commands)}) "
                "are run only with --run-commands, as they may do anything: read wav.scp first"
            )
        found = {recording: self._file(entry) for recording, entry in wav_scp.items()}
        to_store = [(recording, wav_scp[recording]) for recording, path in found.items() if path is None]
        if to_store:
            self.store.mkdir(parents=True, exist_ok=True)
            found |= parallel.run(self._stored, to_store, nj=self.nj, desc=f"{self.store}", total=len(to_store))
        return found

    def _file(self, entry: str) -> Path | BadAudio | None:
        """The file that an entry names; None for one that is to be stored."""
        if entry in ("", "-") or entry.startswith("|"):
            return BadAudio("bad row", f"'{entry}' in wav.scp is nothing to read audio from")
        return None if _is_command(entry) or _ARK_ENTRY.fullmatch(entry) else self.root / entry

    def _stored(self, item: tuple[str, str]) -> tuple[str, Path | BadAudio]:
        """The FLAC file of a recording. A comment in it says what it was made of, so that it is made once."""
        recording, entry = item
        path = self.store / f"{recording.replace('%', '%25').replace('/', '%2F')}.flac"
        try:
            made_of = self._fingerprint(entry)
            if not _is_made_of(path, made_of):
                with files.beside(path) as flac, tempfile.NamedTemporaryFile(dir=self.store, prefix=".") as source:
                    self._fetch(entry, source)
                    _to_flac(source.name, flac, comment=made_of)
        except BadAudio as bad:
            what = f"the command of '{recording}'" if _is_command(entry) else entry
            return recording, BadAudio(bad.kind, f"{what}: {bad.detail}")
        return recording, path

    def _fingerprint(self, entry: str) -> str:
        """Stands for an entry and, if it is of an ark, for when that was written."""
        if _is_command(entry):
            return files.fingerprint([entry, str(self.root.absolute())])
        ark, offset = self._ark(entry)
        return files.fingerprint([str(ark.absolute()), offset, ark.stat().st_mtime_ns])

    def _ark(self, entry: str) -> tuple[Path, int]:
        name, offset = _ARK_ENTRY.fullmatch(entry).groups()
        if not (self.root / name).is_file():
            raise BadAudio("missing audio", "no such file")
        return self.root / name, int(offset)

    def _fetch(self, entry: str, target: IO[bytes]) -> None:
        """Write the audio file that an entry stands for to `target`. Raises BadAudio when there is none."""
        if _is_command(entry):
            _run(entry.rstrip().removesuffix("|"), self.root, target)
        else:
            _copy(*self._ark(entry), target)
        target.flush()


def _is_command(entry: str) -> bool:
    return entry.rstrip().endswith("|")


def _is_made_of(path: Path, made_of: str) -> bool:
    try:
        with soundfile.SoundFile(path) as flac:
            return flac.comment == made_of
    except soundfile.SoundFileError:
        return False


def _run(command: str, folder: Path, target: IO[bytes]) -> None:
    """Write what a command prints to `target`. Raises BadAudio when any part of its pipeline fails."""
    shell = ["bash", "-o", "pipefail", "-c", command]
    with tempfile.TemporaryFile() as errors:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": errors}
        with subprocess.Popen(shell, cwd=folder, **pipes) as process:
            shutil.copyfileobj(process.stdout, target)  # so that a full disk is seen here, not as the command's failure
        errors.seek(0)
        last = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
    if process.returncode:
        raise BadAudio("unreadable audio", f"exit status {process.returncode}: {last}")


def _copy(ark: Path, offset: int, target: IO[bytes]) -> None:
    """Write the audio file that an ark holds at `offset` to `target`: WAV, or any after `AUDIO` and its length."""
    with open(ark, "rb") as stream:
        stream.seek(offset)
        head = stream.read(8)
        if head.startswith(b"RIFF"):
            stream.seek(offset)
            size = 8 + int.from_bytes(head[4:], "little")
        elif head.startswith(b"AUDIO") and len(head) > 5:
            stream.seek(offset + 6)
            size = int.from_bytes(stream.read(head[5]), "little")
        else:
            raise BadAudio("unreadable audio", "an ark holds WAV or AUDIO there, and this is neither")
        while size > 0 and (block := stream.read(min(size, _BLOCK))):
            size -= target.write(block)


def _to_flac(source: str, flac: Path, *, comment: str) -> None:
    """Write an audio file as FLAC. Raises BadAudio when it is not whole, UserError when FLAC cannot be written."""
    try:
        probe(source)
    except BadAudio as bad:
        raise BadAudio(bad.kind, bad.detail.removeprefix(f"{source}: ")) from bad
    with soundfile.SoundFile(source) as read:
        if read.channels > _MAX_CHANNELS:
            raise BadAudio("unreadable audio", f"{read.channels} channels, and FLAC holds {_MAX_CHANNELS}")
        subtype = "PCM_24" if read.subtype in ("PCM_24", "PCM_32", *_FLOATS) else "PCM_16"
        try:
            with soundfile.SoundFile(flac, "w", read.samplerate, read.channels, subtype) as written:
                written.comment = comment
                for block in _blocks(read):
                    written.write(block)
        except (soundfile.SoundFileError, AssertionError) as error:  # soundfile asserts that all was written
            raise UserError(f"{flac.parent}: cannot write FLAC there ({error}); is the disk full?") from error


def _blocks(stream: soundfile.SoundFile) -> Iterator:
    try:
        yield from stream.blocks(_BLOCK, dtype="float64" if stream.subtype in _FLOATS else "int32")
    except soundfile.SoundFileError as error:
        raise BadAudio("unreadable audio", error.error_string) from error

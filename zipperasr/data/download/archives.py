"""Archives: checked against what was published, and unpacked so that nothing lands outside of their folder."""

import contextlib
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from zipperasr import files
from zipperasr.data.download.fetch import CHUNK, Progress
from zipperasr.errors import UserError

if sys.version_info >= (3, 12):
    import tarfile
else:
    from backports import tarfile  # its filter against hostile archives came in the middle of 3.11


@dataclass(frozen=True)
class Archive:
    """A file to fetch, and what is known of it.

    name: where it goes, below the folder of archives. size: in bytes. digest: "md5:<hex>" or "sha256:<hex>".
    password: the environment variable of its password, where OpenSSL has encrypted it (AES-256-CBC, PBKDF2).
    local: a copy that the user has; it is taken instead of a download, and stays.
    """

    name: str
    url: str = ""
    size: int | None = None
    digest: str = ""
    password: str = ""
    local: Path | None = None


class Mismatch(UserError):
    """A file is not what was published."""


def verify(path: Path, archive: Archive) -> None:
    """Raises Mismatch, naming what was expected and what was found, unless a file has its published size and digest."""
    size = path.stat().st_size
    if archive.size not in (None, size):
        raise Mismatch(f"{path}: expected {archive.size} bytes, found {size}; get it anew from its source")
    kind, _, expected = archive.digest.partition(":")
    if not kind:
        return
    with open(path, "rb") as stream:
        found = hashlib.file_digest(stream, kind).hexdigest()
    if found != expected.lower():
        raise Mismatch(f"{path}: expected {kind} {expected}, found {found}; get it anew from its source")


def check_room(needs: Iterable[tuple[Path, int]]) -> None:
    """Raises UserError naming need and free where a disk has less room than (folder, bytes) together need."""
    folders, totals = {}, {}
    for folder, need in needs:
        there = existing(folder)
        folders.setdefault(there.stat().st_dev, there)
        totals[there.stat().st_dev] = totals.get(there.stat().st_dev, 0) + need
    for device, need in totals.items():
        free = shutil.disk_usage(folders[device]).free
        if need > free:
            mend = "free some, or choose another disk"
            raise UserError(f"{folders[device]}: needs {in_bytes(need)} of room, has {in_bytes(free)} free; {mend}")


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def in_bytes(number: float) -> str:
    """A number of bytes for people: 6.39GB."""
    return f"{tqdm.format_sizeof(number)}B"


def unpack(path: Path, folder: Path, *, password: str = "", progress: Progress) -> None:
    """Unpack a tar, plain or gzip, into `folder`, which is made anew, and removed when that fails.

    password: the environment variable that decrypts it, if OpenSSL has encrypted it. Links, paths and devices that
    would reach outside of `folder` are refused. Raises UserError naming an archive that is refused, Mismatch for one
    that is damaged.
    """
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.ExitStack() as failure:
        failure.callback(shutil.rmtree, folder, ignore_errors=True)
        try:
            with files.writing(folder), _plain(path, password, progress) as stream:
                folder.mkdir(parents=True)
                with tarfile.open(fileobj=stream, mode="r|", bufsize=CHUNK) as tar:
                    tar.extractall(folder, filter="data")
                while stream.read(CHUNK):  # to the end, where gzip keeps its checksum
                    pass
        except tarfile.FilterError as error:
            raise UserError(f"{path}: refused, as it would write outside of its folder ({error})") from error
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise Mismatch(f"{path}: damaged ({error}); get it anew from its source") from error
        failure.pop_all()


def merge(source: Path, target: Path) -> None:
    """Move everything in `source` into `target`; a folder that is new there appears whole."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        there = target / path.name
        if path.is_dir() and there.is_dir() and not path.is_symlink():
            merge(path, there)
        else:
            os.replace(path, there)
    source.rmdir()


class _Counted:
    """A stream whose reading advances a bar."""

    def __init__(self, stream: BinaryIO, progress: Progress):
        self.stream, self.progress = stream, progress

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.progress(len(data))
        return data


@contextlib.contextmanager
def _plain(path: Path, password: str, progress: Progress) -> Iterator[BinaryIO]:
    """The tar in an archive, as a stream."""
    with open(path, "rb") as raw, _decrypted(raw, password) if password else contextlib.nullcontext(raw) as stream:
        is_gzip = stream.peek(2)[:2] == b"\x1f\x8b"
        if password and not is_gzip:
            raise UserError(f"{path}: cannot be decrypted; is {password} right?")
        counted = _Counted(stream, progress)
        yield gzip.GzipFile(fileobj=counted) if is_gzip else counted


@contextlib.contextmanager
def _decrypted(raw: BinaryIO, password: str) -> Iterator[BinaryIO]:
    """What OpenSSL has encrypted in `raw`. The password goes from the environment to openssl, and is seen nowhere."""
    command = ["openssl", "enc", "-d", "-aes-256-cbc", "-pbkdf2", "-pass", f"env:{password}"]
    try:
        process = subprocess.Popen(command, stdin=raw, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise UserError("openssl is not installed; on Debian or Ubuntu: sudo apt-get install openssl") from error
    with process:
        try:
            yield process.stdout
        finally:
            process.kill()

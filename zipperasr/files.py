"""Writing files so that a reader never sees half of one, and so that two runs never share a directory."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from zipperasr.errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Raises UserError when the block fails because the disk is full, or `path` cannot be written."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise UserError(f"{path}: the disk is full; free some space and run the same command again") from error
        if getattr(error, "errno", None) in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENAMETOOLONG):
            raise UserError(f"{path}: cannot be written ({error.strerror}); mend its name or permissions") from error
        raise


def is_disk_full(error: BaseException) -> bool:
    """Whether that is what an exception says, be it only in words, as those of safetensors do."""
    return getattr(error, "errno", None) in DISK_FULL or os.strerror(errno.ENOSPC) in str(error)


@contextlib.contextmanager
def beside(path: Path | str) -> Iterator[Path]:
    """A temporary path in the same directory (same suffixes), renamed to `path` when the block ends well.

    On any exception the temporary file is removed and `path` stays as it was.
    Raises UserError when the disk is full or the directory cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def write(path: Path | str, mode: str = "w") -> Iterator[IO]:
    """An open file that becomes `path` only when the block ends well; text is UTF-8 with LF."""
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    with beside(path) as temporary, open(temporary, mode, **text) as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())


def flush(path: Path) -> None:
    """Have the disk hold what has been written to `path`."""
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def write_json(path: Path | str, value: object) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with write(path) as stream:
        json.dump(value, stream, ensure_ascii=False, indent=2)
        stream.write("\n")


def read_json(path: Path | str) -> dict:
    """The object in a JSON file. Raises UserError naming the file when it is missing or broken."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}, not an object")
        return value
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; run the stage that writes it") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); delete it and run its stage again") from error


def sha256(path: Path | str) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(value: object) -> str:
    """A short digest of any JSON-serialisable value: settings and inputs a result depends on."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def is_done(directory: Path | str, key: str, *, name: str = ".done") -> bool:
    """Whether `directory` was finished (`mark_done`) with the same `key`; `name` tells what is done."""
    marker = Path(directory) / name
    return marker.is_file() and marker.read_text() == key


def mark_done(directory: Path | str, key: str, *, name: str = ".done") -> None:
    """Record that everything in `directory` is complete for `key`."""
    with write(Path(directory) / name) as stream:
        stream.write(key)


@contextlib.contextmanager
def lock(directory: Path | str, *, wait: bool = False) -> Iterator[None]:
    """Hold `directory` for this process. Raises UserError when another process holds it, or waits for that.

    The kernel drops the lock when the process ends, however it ends.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            mend = "wait for it or choose another directory"
            raise UserError(f"{directory}: another run is writing here; {mend}") from error
        yield

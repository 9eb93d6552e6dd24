"""Files from the web, over HTTP: gone on with where they were cut off, never glued from two versions."""

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import requests
import urllib3
from tqdm import tqdm

from zipperasr import files
from zipperasr.errors import UserError

T = TypeVar("T")
Wait = Callable[[float], object]

TRIES = 8
"""Failures in a row, without a byte gained between them, after which a file is given up."""
BACKOFF_S = 1.0
"""Pause after the first failure; it doubles up to a minute."""
TIMEOUT_S = (10, 60)
"""To connect, and between two pieces of a body."""
CHUNK = 1 << 18
AS_IT_LIES = {"Accept-Encoding": "identity"}
"""Asks for the bytes of the file itself, not compressed on the way."""


class Stopped(Exception):
    """The run is ending."""


class Progress:
    """A bar of bytes that several threads advance by calling it. Once `stop` is set, a call raises Stopped."""

    def __init__(self, desc: str, *, total: int, initial: int = 0, position: int = 0):
        settings = {"unit": "B", "unit_scale": True, "dynamic_ncols": True, "mininterval": 0.5, "disable": None}
        self.bar = tqdm(desc=desc, total=total, initial=initial, position=position, **settings)
        self.stop = threading.Event()
        self._lock = threading.Lock()

    def __call__(self, num_bytes: int) -> None:
        if self.stop.is_set():
            raise Stopped
        with self._lock:
            self.bar.update(num_bytes)

    def wait(self, seconds: float) -> None:
        """Pause, but not beyond the end of the run."""
        self.stop.wait(seconds)


def fetch(url: str, path: Path, *, progress: Progress) -> None:
    """Fetch a file to `path`, going on with `<path>.part` where there is one; a broken connection is taken up again.

    `<path>.part.json` says which version of the file was begun. Raises UserError when the server refuses or stays out
    of reach, and when the disk is full.
    """
    part = _part(path)
    with files.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        insist(url, lambda: _fetch_rest(url, part, progress=progress), so_far=lambda: _size(part), wait=progress.wait)
        os.replace(part, path)
        _state(part).unlink()


def num_fetched(path: Path) -> int:
    """Bytes of a file that are here and need not be fetched again."""
    return _size(path) or _begun(_part(path))[0]


def size_on_server(url: str) -> int | None:
    """Bytes of a file, if the server says. Raises UserError as `fetch` does."""

    def attempt() -> str:
        with requests.head(url, headers=AS_IT_LIES, allow_redirects=True, timeout=TIMEOUT_S) as response:
            _check(response)
            return response.headers.get("Content-Length", "")

    length = insist(url, attempt)
    return int(length) if length else None


def text(url: str) -> str:
    """The text of a small file. Raises UserError as `fetch` does."""

    def attempt() -> str:
        with requests.get(url, timeout=TIMEOUT_S) as response:
            _check(response)
            return response.content.decode("utf-8")

    return insist(url, attempt)


def insist(
    url: str, attempt: Callable[[], T | None], *, so_far: Callable[[], int] = lambda: 0, wait: Wait = time.sleep
) -> T:
    """What `attempt` returns, once that is not None; tries again, ever more slowly, while the network fails.

    so_far: bytes that are there; at each new height failures are counted anew. Raises UserError after TRIES in a row.
    """
    failures, reason, most = 0, "", so_far()
    while failures < TRIES:
        try:
            if (result := attempt()) is not None:
                return result
            reason = "the connection was cut"
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            reason = _reason(error)
        failures = 1 if so_far() > most else failures + 1
        most = max(most, so_far())
        if failures < TRIES:
            pause_s = min(BACKOFF_S * 2 ** (failures - 1), 60)
            tqdm.write(f"{shown(url)}: {reason}; tries again in {pause_s:.0f} s", file=sys.stderr)
            wait(pause_s)
    raise UserError(f"{shown(url)}: {reason}, {TRIES} times in a row; check the network and run the same command again")


def shown(url: str) -> str:
    """A URL for messages: without a query, which may hold a signature."""
    return url.partition("?")[0]


def _fetch_rest(url: str, part: Path, *, progress: Progress) -> bool | None:
    """Append to `part` what it lacks, over one connection. True when it is complete."""
    have, begun = _begun(part)
    if have and have == begun["size"]:
        return True
    headers = AS_IT_LIES | ({"Range": f"bytes={have}-"} if have else {})
    if have and begun["validator"]:
        headers["If-Range"] = begun["validator"]
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        _check(response)
        start, now = _body(response)
        if start not in (0, have) or (start and now != begun):
            _forget(part, have, progress)  # the file has changed, and must not be glued to its former self
            return None
        if not start:  # from the beginning, asked for or not
            _forget(part, have, progress)
            files.write_json(_state(part), now)
        with open(part, "ab") as stream:
            for chunk in response.raw.stream(CHUNK, decode_content=False):
                stream.write(chunk)
                progress(len(chunk))
    return True if now["size"] in (None, _size(part)) else None


def _body(response: requests.Response) -> tuple[int | None, dict]:
    """Where a body starts in its file (None if nowhere), and what tells the file from its other versions."""
    headers = response.headers
    start, total = 0, headers.get("Content-Length", "*")
    if response.status_code != 200:
        first, _, total = headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        start = int(first.partition("-")[0]) if first[:1].isdigit() else None
    etag = headers.get("ETag", "")
    validator = etag if etag.startswith('"') else headers.get("Last-Modified")  # a weak ETag does not say "same bytes"
    return start, {"size": int(total) if total.isdigit() else None, "validator": validator}


def _check(response: requests.Response) -> None:
    """Raises UserError for an answer that stays the same however often one asks, and HTTPError for others."""
    status = response.status_code
    if status in (408, 429) or status >= 500:
        response.raise_for_status()
    if status >= 400 and status != 416:
        raise UserError(f"{shown(response.url)}: the server answers {status} {response.reason}; has the file moved?")


def _reason(error: Exception) -> str:
    """Why an attempt failed, in a few words; the message of the error may hold the whole URL."""
    response = getattr(error, "response", None)
    return type(error).__name__ if response is None else f"the server answers {response.status_code}"


def _begun(part: Path) -> tuple[int, dict]:
    """Bytes of a file that were fetched before, and of which version of the file."""
    if not _state(part).exists():
        return 0, {"size": None, "validator": None}
    return _size(part), files.read_json(_state(part))


def _forget(part: Path, have: int, progress: Progress) -> None:
    _state(part).unlink(missing_ok=True)
    part.unlink(missing_ok=True)
    progress(-have)


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _state(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0

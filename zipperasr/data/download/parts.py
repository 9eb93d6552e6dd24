"""Corpora from the web: archives are fetched, verified, unpacked beside, and moved into place when a part is complete.

A corpus of root `root` keeps what is under way in `<root>/.download`: the archives, the trees being unpacked
(`<part>/`), and `<part>.done` for what is complete.
"""

import contextlib
import dataclasses
import heapq
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from zipperasr import files
from zipperasr.data.download import archives, fetch
from zipperasr.data.download.archives import Archive, Mismatch
from zipperasr.data.download.fetch import Progress
from zipperasr.errors import UserError

FOLDER = ".download"
"""Holds what is under way, below the root of a corpus."""
UNPACKED = 1.1
"""Bytes of a tree for a byte of its archive: audio is compressed already, but a file system fills whole blocks."""


@dataclass(frozen=True)
class Part:
    """A part of a corpus. It lies in the first of `places` that is there; all of `needs` (patterns) must be in it."""

    name: str
    places: tuple[str, ...]
    needs: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What its `.done` says."""
        return self.name

    def work(self, root: Path) -> Path:
        """Holds what is unpacked of it so far."""
        return root / FOLDER / self.name

    def is_done(self, root: Path) -> bool:
        """Whether it was fetched and verified here."""
        return files.is_done(root / FOLDER, self.key, name=f"{self.name}.done")

    def is_there(self, root: Path) -> bool:
        """Whether it is complete, be it fetched here or a tree of the user's own that has all it needs."""
        return self.lacks(root) == [] and not self.is_moving(root)

    def is_moving(self, root: Path) -> bool:
        """Whether moving it into place was broken off."""
        return (self.work(root) / "moving").exists()

    def lacks(self, root: Path) -> list[str] | None:
        """What its tree misses; None where there is no tree at all."""
        place = next((root / place for place in self.places if (root / place).exists()), None)
        return None if place is None else self.misses(place)

    def misses(self, tree: Path) -> list[str]:
        """What it needs and a folder has not."""
        return [str(tree / need) for need in self.needs if next(tree.glob(need), None) is None]

    def finish(self, root: Path) -> None:
        """Move the tree that was made of it into place, and mark it done. May be broken off and called again."""
        work = self.work(root)
        (work / "moving").touch()
        if (work / "tree").exists():
            archives.merge(work / "tree", root)
        self.mark_done(root)
        (work / "moving").unlink()
        shutil.rmtree(work)

    def mark_done(self, root: Path) -> None:
        """Record that it was fetched and verified."""
        files.mark_done(root / FOLDER, self.key, name=f"{self.name}.done")


Fetcher = Callable[..., None]
"""Brings a URL to a path as `fetch.fetch` does: (url, path, *, progress)."""


def fetch_verified(archive: Archive, path: Path, *, progress: Progress, fetcher: Fetcher = fetch.fetch) -> None:
    """Fetch a file unless it is there, and verify it; one that is wrong is deleted and fetched once more.

    Raises Mismatch when the second is wrong too, and UserError as `fetch.fetch` does.
    """
    for is_last in (False, True):
        if not path.exists():
            fetcher(archive.url, path, progress=progress)
        try:
            return archives.verify(path, archive)
        except Mismatch:
            progress(-path.stat().st_size)
            path.unlink()
            if is_last:
                raise


@dataclass(frozen=True)
class Download:
    """A part of a corpus, the corpus's root, and the archives that make the part."""

    part: Part
    root: Path
    archives: tuple[Archive, ...]

    @property
    def work(self) -> Path:
        """Holds `tree`, where archives are unpacked until all of them are, and a marker for each."""
        return self.part.work(self.root)

    def path(self, archive: Archive) -> Path:
        """Where an archive lies, or will."""
        return archive.local or self.root / FOLDER / archive.name

    def is_unpacked(self, archive: Archive) -> bool:
        """Whether an archive has been verified and unpacked."""
        return files.is_done(self.work, archive.name, name=_flat(archive.name, "done"))

    def unpack(self, archive: Archive, *, progress: Progress, merging: threading.Lock) -> None:
        """Unpack a verified archive into the tree of the part. Raises as `archives.unpack` does."""
        partial = self.work / _flat(archive.name, "partial")
        archives.unpack(self.path(archive), partial, password=archive.password, progress=progress)
        with merging:
            archives.merge(partial, self.work / "tree")
        files.mark_done(self.work, archive.name, name=_flat(archive.name, "done"))

    def finish(self) -> None:
        """Move the part into place, once every archive is unpacked."""
        if self.work.exists() and all(map(self.is_unpacked, self.archives)):
            self.part.finish(self.root)


class Transfer:
    """Fetches, verifies and unpacks the archives of several parts of corpora, `nj` at once.

    keep: leave archives where they are after unpacking.
    """

    def __init__(self, downloads: Sequence[Download], *, nj: int, keep: bool = False):
        self.downloads, self.nj, self.keep = downloads, nj, keep
        self.waiting = [(d, archive) for d in downloads for archive in d.archives if not d.is_unpacked(archive)]
        self.folder = downloads[0].root

    def measure(self) -> None:
        """Ask the servers for sizes that are not known."""
        with ThreadPoolExecutor(self.nj) as executor:
            self.waiting = list(executor.map(_measured, self.waiting))

    def room(self) -> int:
        """Bytes of disk that are needed: every tree, and the largest archives that are there at the same time."""
        left = [(archive.size or 0) - fetch.num_fetched(d.path(archive)) for d, archive in self.waiting]
        together = sum(left) if self.keep else sum(heapq.nlargest(self.nj, left))
        return together + int(UNPACKED * sum(archive.size or 0 for _, archive in self.waiting))

    def describe(self) -> list[str]:
        """A line for each file that is to be fetched."""
        return [
            f"{d.root.name} {d.part.name}: {archive.local or fetch.shown(archive.url)}, {size_of(archive)}"
            f"{', ' if archive.digest else ''}{archive.digest}"
            for d, archive in self.waiting
        ]

    def run(self) -> None:
        """Fetch all. A file that fails does not stop the others. Raises UserError naming those that failed."""
        with contextlib.ExitStack() as locks:
            for root in {download.root for download in self.downloads}:
                locks.enter_context(files.lock(root / FOLDER))
            self.bring()
            self._run()

    def bring(self) -> None:
        """Fetch what is not fetched over HTTP."""

    def _run(self) -> None:
        total = sum(archive.size or 0 for _, archive in self.waiting)
        have = sum(fetch.num_fetched(d.path(archive)) for d, archive in self.waiting)
        fetched, unpacked = Progress("fetch", total=total, initial=have), Progress("unpack", total=total, position=1)
        with fetched.bar, unpacked.bar:
            errors = self._run_all(fetched, unpacked)
        for download in self.downloads:
            download.finish()
        if errors:
            more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
            raise UserError("; ".join(map(str, errors[:3])) + more)

    def _run_all(self, fetched: Progress, unpacked: Progress) -> list[UserError]:
        errors, merging = [], threading.Lock()
        with ThreadPoolExecutor(self.nj) as executor:
            try:
                started = [executor.submit(self._get, *item, fetched, unpacked, merging) for item in self.waiting]
                for future in as_completed(started):
                    if isinstance(error := future.exception(), UserError):
                        errors.append(error)
                    elif error:
                        raise error
            except BaseException:  # Ctrl-C too: what is under way ends now, not in hours
                fetched.stop.set()
                unpacked.stop.set()
                executor.shutdown(cancel_futures=True)
                raise
        return errors

    def _get(self, download: Download, archive: Archive, fetched: Progress, unpacked: Progress, merging) -> None:
        path = download.path(archive)
        if archive.local:
            archives.verify(path, archive)
        else:
            fetch_verified(archive, path, progress=fetched)
        try:
            download.unpack(archive, progress=unpacked, merging=merging)
        except Mismatch:
            if not archive.local:
                path.unlink()  # so that the next run fetches it anew
            raise
        if not (archive.local or self.keep):
            path.unlink()
        with merging:
            download.finish()
        tqdm.write(f"{archive.name}: verified and unpacked")


def size_of(archive: Archive) -> str:
    """The size of an archive for people."""
    return "size unknown" if archive.size is None else archives.in_bytes(archive.size)


def _measured(item: tuple[Download, Archive]) -> tuple[Download, Archive]:
    download, archive = item
    if archive.size is None:
        path = download.path(archive)
        size = path.stat().st_size if path.exists() else fetch.size_on_server(archive.url)
        archive = dataclasses.replace(archive, size=size)
    return download, archive


def _flat(name: str, suffix: str) -> str:
    return f"{name.replace('/', '_')}.{suffix}"

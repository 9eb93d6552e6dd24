"""What is fetched beside plain archives: datasets of Mozilla Data Collective by its client, and Whisper's models.

Each class is a task, as are `parts.Transfer` and those of hub.py: `measure` asks for sizes, `room` says how many
bytes the disk of `folder` must have free, `describe` says what would be fetched, `run` fetches it.
"""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from zipperasr import files
from zipperasr.data.download import fetch, parts
from zipperasr.data.download.archives import Archive
from zipperasr.data.download.fetch import Progress
from zipperasr.data.download.parts import FOLDER, Transfer
from zipperasr.errors import UserError

MOZILLA_WORDS = {
    "AuthenticationError": "MDC_API_KEY is not accepted; make another key",
    "PermissionError": "no access; agree to the terms on the page of the dataset, or ask for it",
    "FileNotFoundError": "no such dataset",
    "RateLimitError": "too many requests; wait and run the same command again",
}


@contextlib.contextmanager
def in_our_words(what: str, words: Mapping[str, str]) -> Iterator[None]:
    """Any failure of a client in the block as a UserError; its own messages may hold signed URLs, so none is shown.

    words: what to say, by the name of an exception or of its cause.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if _is_disk_full(error):
            raise UserError(f"{what}: the disk is full; free some space and run the same command again") from error
        names = [type(cause).__name__ for cause in _causes(error)]
        known = next((words[name] for name in names if name in words), f"{names[0]}; run the same command again")
        raise UserError(f"{what}: {known}") from error


def _is_disk_full(error: BaseException) -> bool:
    return any(getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for cause in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


class Collective(Transfer):
    """Archives that Mozilla's client fetches, one after another. The URL of each is the id of its dataset."""

    def measure(self) -> None:
        """Also raises UserError for a dataset that is not the release that is wanted, or not to be had."""
        self.waiting = [(d, self._published(archive)) for d, archive in self.waiting]

    def _published(self, archive: Archive) -> Archive:
        import datacollective

        with in_our_words(f"dataset {archive.url}", MOZILLA_WORDS):
            details = datacollective.get_dataset_details(archive.url)
            size, checksum = details.get("sizeBytes"), details.get("checksum") or ""
        size = archive.size if size is None else int(size)
        if archive.size not in (None, size):
            mend = f"{archive.name} has {archive.size}; get the dataset of that release"
            raise UserError(f"dataset {archive.url}: has {size} bytes, but {mend}")
        digest = f"sha256:{checksum}" if re.fullmatch("[0-9a-f]{64}", checksum) else ""
        return replace(archive, size=size, digest=digest)

    def room(self) -> int:
        total = sum(archive.size or 0 for _, archive in self.waiting)
        return int((1 + parts.UNPACKED) * total) - sum(fetch.num_fetched(d.path(a)) for d, a in self.waiting)

    def bring(self) -> None:
        for d, archive in self.waiting:
            parts.fetch_verified(archive, d.path(archive), progress=lambda num_bytes: None, fetcher=self._fetch)

    def _fetch(self, dataset: str, path: Path, *, progress: Progress) -> None:
        import datacollective

        print(f"{path.name}: dataset {dataset} of Mozilla Data Collective", flush=True)
        folder = path.parent / f"{path.name}.client"  # holds what the client goes on with
        with files.writing(path):
            folder.mkdir(parents=True, exist_ok=True)
        with in_our_words(f"dataset {dataset}", MOZILLA_WORDS):
            found = fetch.insist(
                dataset,
                lambda: self._attempt(datacollective, dataset, folder),
                so_far=lambda: sum(path.stat().st_size for path in folder.iterdir()),
            )
        os.replace(found, path)
        shutil.rmtree(folder)

    @staticmethod
    def _attempt(client, dataset: str, folder: Path) -> Path | None:
        try:
            return client.download_dataset(dataset, download_directory=str(folder))
        except Exception as error:
            if type(error).__name__ != "DownloadError" or _is_disk_full(error):
                raise
            return None  # cut off; the client goes on with what it has


class WhisperModel:
    """A model of openai-whisper, in the cache where that looks for it. Raises UserError for a name that it has not."""

    def __init__(self, name: str):
        import whisper

        if name not in whisper.available_models():
            raise UserError(f"{name}: no model of openai-whisper; known: {', '.join(whisper.available_models())}")
        url = whisper._MODELS[name]  # its last folder is the file's SHA-256
        self.folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "whisper"
        self.archive = Archive(url.rpartition("/")[2], url, digest=f"sha256:{url.split('/')[-2]}")
        self.path = self.folder / self.archive.name

    def is_there(self) -> bool:
        """Whether it was fetched and verified."""
        return self.path.exists() and files.is_done(self.folder, self.archive.digest, name=self._marker)

    def measure(self) -> None:
        if not self.path.exists():
            self.archive = replace(self.archive, size=fetch.size_on_server(self.archive.url))

    def room(self) -> int:
        return (self.archive.size or 0) - (fetch.num_fetched(self.path) if self.archive.size else 0)

    def describe(self) -> list[str]:
        return [f"{self.archive.name}: {self.archive.url}, {parts.size_of(self.archive)}, {self.archive.digest}"]

    def run(self) -> None:
        progress = Progress("fetch", total=self.archive.size or 0, initial=fetch.num_fetched(self.path))
        with progress.bar, files.lock(self.folder / FOLDER, wait=True):  # all ranks of a training may want it
            parts.fetch_verified(self.archive, self.path, progress=progress)
        files.mark_done(self.folder, self.archive.digest, name=self._marker)
        print(f"{self.path}: complete")

    @property
    def _marker(self) -> str:
        return f".{self.archive.name}.done"

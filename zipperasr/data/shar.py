"""Lhotse Shar: a directory of shards that Lhotse reads from end to end, and that training reads here and there.

    cuts.000000.jsonl.gz    the cuts of a shard
    features.000000.tar     one field of each of them, in the same order: `<cut id>.npy` and Lhotse's `<cut id>.json`
    recording.000000.tar    (or this, with `<cut id>.flac`)

Training shuffles over all shards. So each cut says, as custom `offset` and `size`, where its bytes lie in the archive.
Nothing else may lie in such a directory: Lhotse takes every file for a field.
"""

from __future__ import annotations

import functools
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from zipperasr import files
from zipperasr.data import manifests
from zipperasr.errors import UserError

SHARD_SIZE = 1000
"""Utterances of a shard: some hundred megabytes of features. All shards but the last are full."""
MAX_OPEN = 64
"""Archives that a process keeps open."""


@dataclass(frozen=True, slots=True)
class Member:
    """Where a field of a cut lies: `size` bytes of the archive `path`, from `offset` on."""

    path: str
    offset: int
    size: int

    @property
    def field(self) -> str:
        """`features` or `recording`."""
        return os.path.basename(self.path).partition(".")[0]

    def read(self, utt_id: str) -> bytes:
        """The bytes. Raises UserError naming `utt_id` when they are not there."""
        try:
            data = os.pread(_open(self.path).fileno(), self.size, self.offset)
        except OSError as error:
            raise self.broken(utt_id) from error
        if len(data) != self.size:
            raise self.broken(utt_id)
        return data

    def broken(self, utt_id: str) -> UserError:
        """The error that says how to mend the shard."""
        return UserError(f"cut '{utt_id}': {self.path} cannot be read; delete that file and run stage 3 again")


@dataclass(frozen=True)
class Item:
    """A cut's dictionary, and its field: Lhotse's manifest of it, the suffix of its name, and its bytes."""

    cut: dict[str, Any]
    manifest: dict[str, Any]
    suffix: str
    data: bytes


def write(directory: Path, number: int, field: str, items: Iterable[Item]) -> int:
    """Write a shard; returns how many cuts it has. The same items give the same bytes.

    The cuts come last: where they are, the shard is whole.
    """
    archive, cuts = _archive(directory, number, field), []
    with files.write(archive, "wb") as stream, tarfile.open(fileobj=stream, mode="w") as tar:
        for item in items:
            _add(tar, f"{item.cut['id']}{item.suffix}", item.data)
            _add(tar, f"{item.cut['id']}.json", json.dumps(item.manifest).encode())
            cuts.append(item.cut | {field: item.manifest})
    with tarfile.open(archive, "r:") as tar:
        places = [member for member in tar if not member.name.endswith(".json")]
    for cut, at in zip(cuts, places, strict=True):
        cut["custom"] = {**cut.get("custom", {}), "offset": at.offset_data, "size": at.size}
    manifests.write(_cuts(directory, number), cuts)
    return len(cuts)


def shards(directory: Path, field: str) -> set[int]:
    """The numbers of the whole shards in a directory."""
    there = {path.name for path in directory.glob("*")}
    numbers = {int(name.split(".")[1]) for name in there if name.startswith("cuts.")}
    return {number for number in numbers if _archive(directory, number, field).name in there}


def read(directory: Path, field: str) -> Iterator[tuple[Member, dict[str, Any]]]:
    """The cuts of a directory as dictionaries, each with the place of its field. Raises UserError for a broken one."""
    for path in sorted(directory.glob("cuts.*.jsonl.gz")):
        archive = str(_archive(directory, int(path.name.split(".")[1]), field))
        try:
            for cut in manifests.read(path):
                yield Member(archive, cut["custom"]["offset"], cut["custom"]["size"]), cut
        except UserError as error:
            raise UserError(f"{path}: cannot be read; delete that file and run stage 3 again") from error


def lookup(root: Path, name: str, ids: Iterable[str], field: str) -> Iterator[tuple[Member, dict[str, Any]]]:
    """As `manifests.lookup`, in the directories of sets in `root`."""
    missing, own = set(ids), root / name
    corpus, lang, _ = name.split("_", 2)
    others = {path for path in root.glob(f"{corpus}_{lang}_*") if path.is_dir()} - {own}
    for directory in [own, *sorted(others)]:
        if not missing:
            return
        for member, cut in read(directory, field):
            if cut["id"] in missing:
                missing.remove(cut["id"])
                yield member, cut


def forget() -> None:
    """Close the archives, which may have been replaced."""
    _open.cache_clear()


@functools.lru_cache(maxsize=MAX_OPEN)
def _open(path: str) -> BinaryIO:
    return open(path, "rb", buffering=0)


def _cuts(directory: Path, number: int) -> Path:
    return directory / f"cuts.{number:06}.jsonl.gz"


def _archive(directory: Path, number: int, field: str) -> Path:
    return directory / f"{field}.{number:06}.tar"


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))

"""Manifests, `<data-dir>/manifests/<corpus>_<lang>_<split>_cuts.jsonl.gz`: a Lhotse cut per utterance.

A cut's id is its utterance id; its one supervision has the same id, the transcript and the language code, and as custom
`train_text` the text that is trained on (data/text.py). Cuts are read as plain dictionaries, which is many times faster
than Lhotse's objects; `to_cut` makes the object.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from zipperasr import files
from zipperasr.errors import UserError

if TYPE_CHECKING:
    from lhotse.cut import Cut

SUFFIX = "_cuts.jsonl.gz"
READ_BYTES = 2**20


def path_of(data_dir: Path | str, name: str) -> Path:
    """Where the manifest of the set `name` is."""
    return Path(data_dir) / "manifests" / f"{name}{SUFFIX}"


def marker(name: str) -> str:
    """The file, in the directory of manifests, which says that the set `name` is prepared."""
    return f".{name}.done"


def is_held_out(name: str) -> bool:
    """Whether a set is for validation or testing, by its split; every other set is training material."""
    return name.split("_", 2)[2].startswith(("dev", "test"))


def tally_path(manifest: Path) -> Path:
    """Where the tally of a manifest is that stage 1 has prepared."""
    return manifest.with_name(f"{manifest.name.removesuffix(SUFFIX)}_tally.json")


def find(data_dir: Path | str, corpora: Mapping[str, Iterable[str]]) -> dict[str, Path]:
    """The manifests of `corpora` ({corpus: languages}) by set name. Raises UserError when a language has none."""
    found = {}
    for corpus, langs in corpora.items():
        for lang in langs:
            paths = sorted(path_of(data_dir, f"{corpus}_{lang}_*").parent.glob(f"{corpus}_{lang}_*{SUFFIX}"))
            if not paths:
                raise UserError(f"{path_of(data_dir, f'{corpus}_{lang}_*')}: there is none; run stage 1")
            found.update({path.name.removesuffix(SUFFIX): path for path in paths})
    return found


def read(path: Path | str) -> Iterator[dict[str, Any]]:
    """The cuts of a manifest as dictionaries, in file order. Raises UserError when it is missing, broken or empty."""
    try:
        with gzip.open(path, "rb") as packed, io.BufferedReader(packed, READ_BYTES) as stream:
            line = None
            for line in stream:
                yield orjson.loads(line)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such manifest; run stage 1") from error
    except (gzip.BadGzipFile, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{path}: not a whole manifest ({error}); delete it and run stage 1 again") from error
    if line is None:
        raise UserError(f"{path}: the manifest holds no utterance; check the corpus it was prepared from")


def lookup(data_dir: Path | str, name: str, ids: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The cut of each id, with the set that it lies in; ids that are nowhere are left out.

    The set `name` is searched first, then the other sets of its corpus and language, by name, as lists may mix splits.
    """
    missing, own = set(ids), path_of(data_dir, name)
    corpus, lang, _ = name.split("_", 2)
    others = set(own.parent.glob(f"{corpus}_{lang}_*{SUFFIX}")) - {own}
    for path in [own] * own.is_file() + sorted(others):
        if not missing:
            return
        where = path.name.removesuffix(SUFFIX)
        for cut in read(path):
            if cut["id"] in missing:
                missing.remove(cut["id"])
                yield where, cut


@contextlib.contextmanager
def writer(path: Path | str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that adds a cut to the manifest `path`, which is there, whole, when the block has ended.

    Lines of JSON, gzip-compressed without name and time: the same cuts give the same bytes.
    """
    with files.write(path, "wb") as raw, gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as stream:
        yield lambda cut: stream.write(json.dumps(cut, ensure_ascii=False).encode() + b"\n")


def write(path: Path | str, cuts: Iterable[dict[str, Any]]) -> None:
    """Write cuts as a manifest."""
    with writer(path) as add:
        for cut in cuts:
            add(cut)


def to_cut(cut: dict[str, Any]) -> Cut:
    """The Lhotse object of a cut's dictionary, which is taken apart."""
    from lhotse.serialization import deserialize_item

    return deserialize_item(cut)

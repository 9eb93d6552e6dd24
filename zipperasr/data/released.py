"""The utterance lists that the paper's authors released: found, read, and looked up in the manifests.

They are ordered multisets of ids, `<train|test>/<folder>/<corpus>/<file>.txt`, somewhere in a folder or a repository.
The folder stands for a setting. The file of a set is the one in its corpus's folder with the language code among the
words of its name: `train_com_voice_ar_ids.txt` and `ar_test.txt` are both `ar`.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

from pydantic import model_validator

from zipperasr import files
from zipperasr.config import Settings
from zipperasr.data import manifests
from zipperasr.errors import UserError

CORPUS_FOLDERS = {"commonvoice": "commo*-voice"}  # both commo-voice and common-voice; others have the corpus's name
MAX_MISSING = 0.5
"""A list that lacks more than this share of its ids was made for another corpus, release or scheme of ids."""


class ReleasedSettings(Settings):
    """Where released lists are, and the folder of each setting that uses them. A set without a list is drawn."""

    dir: Path | None = None
    """A folder that holds them at any depth; None: `repository`, cloned once to `<data-dir>/released_lists`."""

    repository: str | None = None
    """The URL that git clones."""

    folders: dict[str, str] = {}
    """{setting: folder below train/ and test/}."""

    overlap: Literal["keep", "drop"] = "keep"
    """What becomes of ids of a released training list that are also held out: they stay, or leave the training list."""

    @model_validator(mode="after")
    def _check(self) -> "ReleasedSettings":
        if not (self.dir or self.repository):
            raise ValueError("give dir, a folder with the lists, or repository, from which they are cloned")
        return self


@dataclass(frozen=True)
class ReleasedFile:
    """A released list as its file has it; `slips` counts what was mended in reading."""

    path: Path
    sha256: str
    ids: list[str]
    slips: Counter[str]


@dataclass(frozen=True)
class Match:
    """A released list against the manifests: lines of its file, and distinct ids.

    `found_in` counts the ids in each set, `overlapping` says for ids which list holds them out.
    """

    name: str
    sha256: str
    num_lines: int
    num_unique: int
    slips: Counter[str]
    found_in: Counter[str] = field(default_factory=Counter)
    missing: list[str] = field(default_factory=list)
    overlapping: dict[str, str] = field(default_factory=dict)


def locate(data_dir: Path, settings: ReleasedSettings, folder: str) -> Path:
    """The directory that holds train/<folder> and test/<folder>; the repository is cloned if need be.

    Raises UserError when there is no such directory or more than one, and when the repository cannot be cloned.
    """
    top = settings.dir or data_dir / "released_lists"
    if not settings.dir and not top.is_dir():
        _clone(settings.repository, top)
    roots = sorted({path.parents[1] for part in ("train", "test") for path in top.glob(f"**/{part}/{folder}")})
    if len(roots) == 1:
        return roots[0]
    found = ", ".join(map(str, roots)) or f"no folder train/{folder} or test/{folder}"
    raise UserError(f"released lists: {top} holds {found}; set data.lists.released.dir to the folder to take")


def find(root: Path, folder: str, *, part: str, names: Iterable[str]) -> dict[str, Path]:
    """The files of those sets of a part that have one. Raises UserError when a set has several, or shares one."""
    found: dict[str, Path] = {}
    for name in names:
        corpus, lang, _ = name.split("_", 2)
        texts = sorted(root.glob(f"{part}/{folder}/{CORPUS_FOLDERS.get(corpus, corpus)}/*.txt"))
        paths = [path for path in texts if lang in re.split("[^a-z]+", path.stem.lower())]
        if len(paths) > 1 or set(paths) & set(found.values()):
            raise UserError(f"released lists: {', '.join(map(str, paths))}: which is of {name}? Keep one for each set")
        if paths:
            found[name] = paths[0]
    return found


def read(path: Path) -> ReleasedFile:
    """The ids of a released list in order, repeats included. Raises UserError where it is not UTF-8 or holds no id."""
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}); get the file again") from error
    lines = text.removeprefix("\ufeff").removesuffix("\n").split("\n")
    ids = [line.removesuffix("\r") for line in lines if line.strip()]
    if not ids:
        raise UserError(f"{path}: holds no id; get the file again, or delete it to have the set drawn")
    marks, returns, blanks = int(text.startswith("\ufeff")), text.count("\r\n"), len(lines) - len(ids)
    slips = +Counter({"byte order mark": marks, "carriage returns": returns, "blank lines": blanks})
    return ReleasedFile(path, files.sha256(path), ids, slips)


def match(data_dir: Path, name: str, file: ReleasedFile) -> tuple[Match, dict[str, float]]:
    """How a released list agrees with the manifests of the corpus and language of `name`; seconds of the ids found.

    Raises UserError when more than half of the ids are missing.
    """
    found_in, durations_s = Counter(), {}
    for where, cut in manifests.lookup(data_dir, name, file.ids):
        durations_s[cut["id"]] = cut["duration"]
        found_in[where] += 1
    unique = dict.fromkeys(file.ids)
    missing = [utt_id for utt_id in unique if utt_id not in durations_s]
    if len(missing) > MAX_MISSING * len(unique):
        raise UserError(
            f"{file.path}: {len(missing)} of its {len(unique)} ids are in no manifest of {name}'s language, such as "
            f"{', '.join(missing[:3])}; the manifests have {', '.join(_examples(data_dir, name))}. Prepare the corpus "
            "and release that the list was made from, or delete the file to have the set drawn"
        )
    name = "/".join(file.path.parts[-4:])
    return Match(name, file.sha256, len(file.ids), len(unique), file.slips, found_in, missing), durations_s


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A path for a new directory, which takes the place of `directory` when the block ends well.

    What a killed process leaves lies two levels below the parent, where nobody looks for it.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as beside:
            new = Path(beside) / directory.name
            yield new
            if directory.exists():
                shutil.rmtree(directory)
            os.replace(new, directory)
    except PermissionError as error:
        raise UserError(f"{error.filename or directory}: {error.strerror}; mend its permissions") from error


def _clone(repository: str, into: Path) -> None:
    """Raises UserError when git is not installed or fails."""
    mend = "or set data.lists.released.dir to a folder that has the lists, or draw all here: data.lists.released=null"
    with replacing(into) as new:
        command = ["git", "clone", "--quiet", "--depth", "1", "--", repository, str(new)]
        environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}  # a wrong URL fails rather than asks for a password
        try:
            subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise UserError(f"{repository}: git is not here to clone it; install git, {mend}") from error
        except subprocess.CalledProcessError as error:
            why = " ".join(error.stderr.split())
            raise UserError(f"{repository}: cannot be cloned ({why}); try again, {mend}") from error


def _examples(data_dir: Path, name: str) -> list[str]:
    """The first ids of the set `name`, or of another of its language."""
    corpus, lang, _ = name.split("_", 2)
    paths = manifests.find(data_dir, {corpus: [lang]})
    path = paths.get(name) or next(iter(paths.values()))
    return [cut["id"] for cut in islice(manifests.read(path), 3)]

"""Fixed utterance lists: `<data-dir>/lists/<setting>/{train,dev,test}/<corpus>_<lang>_<split>.txt` and SHA256SUMS.

A list is a prefix of an endless sequence that only the seed, the set's name and its utterance ids determine: all ids in
the order of a keyed hash, again and again. So lists do not depend on the order of the manifest, on the platform or on a
random number generator, the list of one hour begins the list of thirty, and a list longer than the corpus repeats it.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from zipperasr import files
from zipperasr.config import Settings
from zipperasr.data import manifests
from zipperasr.errors import UserError

Hours = Annotated[float, Field(gt=0)] | None  # None: the whole set, once
PARTS = ("train", "dev", "test")


class SettingLists(Settings):
    """Hours of each set in each part of a setting."""

    train: dict[str, Hours] = {}
    dev: dict[str, Hours] = {}
    test: dict[str, Hours] = {}


class ListsSettings(Settings):
    """The lists of every setting: a setting is what one training run trains, validates and tests on."""

    seed: int = 0
    settings: dict[str, SettingLists] = {}


@dataclass(frozen=True)
class UtteranceList:
    """The drawn ids of one set in one part of a setting, in order."""

    part: str
    set: str
    ids: list[str]
    duration_s: float

    @property
    def num_repeats(self) -> int:
        """Lines whose id has stood above."""
        return len(self.ids) - len(set(self.ids))

    @property
    def path(self) -> str:
        """The file of the list inside its setting's directory."""
        return f"{self.part}/{self.set}.txt"

    def __str__(self) -> str:
        repeats = f", {self.num_repeats} of them repeats: the set is smaller than asked" if self.num_repeats else ""
        return f"{self.path}: {len(self.ids)} utterances, {self.duration_s / 3600:.3f} h{repeats}"


def draw(durations_s: Mapping[str, float], *, seed: int, name: str, hours: float | None) -> list[str]:
    """The first ids of the sequence of set `name` that together last at least `hours`; all of them, once, for None.

    `durations_s` maps each candidate id to its seconds.
    """
    cycle = sorted(sorted(durations_s, key=str.encode), key=lambda utt_id: _digest(f"{seed} {name} {utt_id}"))
    if hours is None:
        return cycle
    if sum(durations_s.values()) <= 0:
        raise UserError(f"{name}: its utterances last 0 s, so no list of {hours} h can be drawn; run stage 1 again")
    ids, left_s = [], hours * 3600
    while left_s > 1e-6:
        utt_id = cycle[len(ids) % len(cycle)]
        ids.append(utt_id)
        left_s -= durations_s[utt_id]
    return ids


def write(data_dir: Path | str, settings: ListsSettings) -> dict[str, list[UtteranceList] | None]:
    """Draw and write the lists of every setting, with SHA256SUMS; a setting that is complete and unchanged gives None.

    Raises UserError when a manifest is missing or a setting trains on utterances that it also validates or tests on.
    """
    return {setting: _write_setting(Path(data_dir), setting, settings) for setting in settings.settings}


def read(path: Path | str) -> list[str]:
    """The ids of a list, repeats included. Raises UserError when there is no such list."""
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such list; run stage 2") from error


def find(data_dir: Path | str, setting: str, part: str) -> dict[str, Path]:
    """The lists of one part of a setting, by set name. Raises UserError when the setting has not been drawn."""
    root = Path(data_dir) / "lists"
    if not (root / setting / "SHA256SUMS").is_file():
        there = sorted(path.parent.name for path in root.glob("*/SHA256SUMS"))
        raise UserError(f"{root / setting}: no such lists; there are {', '.join(there) or 'none'}; run stage 2")
    return {path.stem: path for path in sorted((root / setting / part).glob("*.txt"))}


def _write_setting(data_dir: Path, setting: str, settings: ListsSettings) -> list[UtteranceList] | None:
    wanted, directory = settings.settings[setting], data_dir / "lists" / setting
    paths = {name: manifests.path_of(data_dir, name) for part in PARTS for name in getattr(wanted, part)}
    for path in paths.values():
        if not path.is_file():
            raise UserError(f"data.lists.settings.{setting}: no manifest {path}; run stage 1, or mend the set's name")
    shas = {name: files.sha256(path) for name, path in paths.items()}
    key = files.fingerprint([settings.seed, wanted.model_dump(), shas])
    if files.is_done(directory, key) and _is_whole(directory):
        return None
    durations_s = {name: {cut["id"]: cut["duration"] for cut in manifests.read(path)} for name, path in paths.items()}
    drawn = [
        _draw(durations_s[name], part=part, seed=settings.seed, name=name, hours=hours)
        for part in PARTS
        for name, hours in sorted(getattr(wanted, part).items())
    ]
    _check_overlap(setting, drawn)
    for stale in set(directory.glob("*/*.txt")) - {directory / one.path for one in drawn}:
        stale.unlink()
    for one in drawn:
        _write_lines(directory / one.path, one.ids)
    _write_lines(directory / "SHA256SUMS", (f"{files.sha256(directory / one.path)}  {one.path}" for one in drawn))
    files.mark_done(directory, key)
    return drawn


def _draw(durations_s: Mapping[str, float], *, part: str, seed: int, name: str, hours: float | None) -> UtteranceList:
    ids = draw(durations_s, seed=seed, name=name, hours=hours)
    return UtteranceList(part, name, ids, sum(durations_s[utt_id] for utt_id in ids))


def _check_overlap(setting: str, drawn: Iterable[UtteranceList]) -> None:
    held_out = {utt_id: one.path for one in drawn if one.part != "train" for utt_id in one.ids}
    shared = sorted({utt_id for one in drawn if one.part == "train" for utt_id in one.ids if utt_id in held_out})
    if shared:
        named = ", ".join(f"{utt_id} ({held_out[utt_id]})" for utt_id in shared[:5])
        raise UserError(
            f"data.lists.settings.{setting}: {len(shared)} utterances are both trained and tested on: {named}"
            f"{' ...' if len(shared) > 5 else ''}; take them out of one of the manifests"
        )


def _is_whole(directory: Path) -> bool:
    """Whether SHA256SUMS agrees with the files it names."""
    sums = directory / "SHA256SUMS"
    lines = [line.split("  ", 1) for line in sums.read_text().splitlines()] if sums.is_file() else []
    paths = [(directory / name, sha) for sha, name in lines]
    return bool(paths) and all(path.is_file() and files.sha256(path) == sha for path, sha in paths)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with files.write(path) as stream:
        stream.writelines(f"{line}\n" for line in lines)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()

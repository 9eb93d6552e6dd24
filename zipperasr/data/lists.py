"""Fixed utterance lists: `<data-dir>/lists/<setting>/{train,dev,test}/<corpus>_<lang>_<split>.txt` and SHA256SUMS.

A list is what the paper's authors released, in settings that use that (released.py), or else our own draw (draw.py).
Beside the lists, REPORT.md says where each comes from and how far a released one agrees with the manifests, and
REPORT.tsv names each of its ids that is missing there, or held out though it is trained on.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import PositiveFloat

from zipperasr import files
from zipperasr.config import Settings
from zipperasr.data import list_report, manifests, released
from zipperasr.data.draw import Draw, draw
from zipperasr.data.list_report import UtteranceList
from zipperasr.data.released import ReleasedSettings
from zipperasr.errors import UserError

PARTS = ("train", "dev", "test")
Key = tuple[str, str]  # part and set: one list of a setting


class SettingLists(Settings):
    """What each list of each part of a setting takes, by set."""

    train: dict[str, Draw] = {}
    dev: dict[str, Draw] = {}
    test: dict[str, Draw] = {}

    @property
    def draws(self) -> dict[Key, Draw]:
        """Every list in order."""
        return {(part, name): wanted for part in PARTS for name, wanted in sorted(getattr(self, part).items())}


class ListsSettings(Settings):
    """The lists of every setting: a setting is what one training run trains, validates and tests on."""

    seed: int = 0
    settings: dict[str, SettingLists] = {}
    released: ReleasedSettings | None = None
    """Lists to take in place of our draw; None: everything is drawn."""

    paper_hours: dict[str, PositiveFloat] = {}
    """{set: hours of its list in the paper}, for `zipperasr data table`."""

    paper_notes: dict[str, str] = {}
    """{set: footnote to these hours}."""


@dataclass(frozen=True)
class Size:
    """Lines of a list, distinct ids among them, seconds of all lines, and how many ids no manifest has."""

    num_utts: int
    num_unique: int
    duration_s: float
    num_missing: int


def write(data_dir: Path | str, settings: ListsSettings) -> dict[str, list[UtteranceList] | None]:
    """Write the lists of every setting, with checksums and report; a setting that is complete and unchanged gives None.

    Raises UserError when a manifest is missing, when a released list is not of this corpus, and when a drawn list
    trains on utterances that the setting also validates or tests on.
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


def measure(data_dir: Path | str, name: str, ids: Iterable[str]) -> Size:
    """The size of a list of the set `name`, by one pass over the manifests of its corpus and language."""
    times = Counter(ids)
    num_utts, num_unique, duration_s = times.total(), len(times), 0.0
    for _, cut in manifests.lookup(data_dir, name, times):
        duration_s += times.pop(cut["id"]) * cut["duration"]
    return Size(num_utts, num_unique, duration_s, num_missing=len(times))


def _write_setting(data_dir: Path, setting: str, settings: ListsSettings) -> list[UtteranceList] | None:
    directory, draws = data_dir / "lists" / setting, settings.settings[setting].draws
    given = _released_files(data_dir, setting, settings)
    inputs = {"/".join(key): path for key, path in given.items()} | _manifests(data_dir, setting, draws, given)
    shas = {name: files.sha256(path) for name, path in inputs.items()}
    overlap = settings.released.overlap if given else None
    key = files.fingerprint([settings.seed, settings.settings[setting].model_dump(), overlap, shas])
    if files.is_done(directory, key) and _is_whole(directory):
        return None
    with released.replacing(directory) as new:
        written = _Writer(data_dir, setting, settings, given, new).write()
        _write_lines(new / "SHA256SUMS", (f"{files.sha256(new / one.path)}  {one.path}" for one in written))
        list_report.write(new, written, draws)
        files.mark_done(new, key)
    return written


def _released_files(data_dir: Path, setting: str, settings: ListsSettings) -> dict[Key, Path]:
    """The files of those lists of a setting that were released."""
    if not settings.released or setting not in settings.released.folders:
        return {}
    folder = settings.released.folders[setting]
    root = released.locate(data_dir, settings.released, folder)
    parts = {part: getattr(settings.settings[setting], part) for part in PARTS}
    found = {part: released.find(root, folder, part=part, names=names) for part, names in parts.items()}
    return {(part, name): path for part, paths in found.items() for name, path in paths.items()}


def _manifests(data_dir: Path, setting: str, draws: Mapping[Key, Draw], given: Mapping[Key, Path]) -> dict[str, Path]:
    """Every manifest that the lists of a setting depend on, by set."""
    paths: dict[str, Path] = {}
    for key, wanted in draws.items():
        corpus, lang, _ = key[1].split("_", 2)
        if key in given:
            paths |= manifests.find(data_dir, {corpus: [lang]})
        else:
            paths |= {name: manifests.path_of(data_dir, name) for name in wanted.sets(key[1])}
    absent = ", ".join(str(path) for path in paths.values() if not path.is_file())
    if absent:
        raise UserError(f"data.lists.settings.{setting}: no manifest {absent}; run stage 1, or mend the set's name")
    return paths


@dataclass
class _Writer:
    """Writes the lists of one setting into a directory."""

    data_dir: Path
    setting: str
    settings: ListsSettings
    given: Mapping[Key, Path]
    directory: Path
    held_out: dict[str, str] = field(default_factory=dict)  # ids, and the list that holds each out
    taken: set[str] = field(default_factory=set)  # held-out ids that may lie in training material: draws avoid them
    shared: set[str] = field(default_factory=set)  # held-out ids drawn for training though nothing took them from there

    def write(self) -> list[UtteranceList]:
        """Write every list. Raises UserError when a drawn one trains on what is held out."""
        draws = self.settings.settings[self.setting].draws
        held_out_first = sorted(draws, key=lambda key: key[0] == "train")
        written = {key: self._write(key, draws[key]) for key in held_out_first}
        self._check_shared()
        return [written[key] for key in draws]

    def _write(self, key: Key, wanted: Draw) -> UtteranceList:
        one, ids = self._take(key, self.given[key]) if key in self.given else self._draw(key, wanted)
        _write_lines(self.directory / one.path, ids)
        if one.part != "train":
            self.held_out.update(dict.fromkeys(ids, one.path))
            if one.match or wanted.splits:
                self.taken.update(ids)
        return one

    def _take(self, key: Key, path: Path) -> tuple[UtteranceList, list[str]]:
        """A released list, without the ids that no manifest has."""
        file, is_dropped = released.read(path), self.settings.released.overlap == "drop"
        match, durations_s = released.match(self.data_dir, key[1], file)
        shared = {i: self.held_out[i] for i in durations_s if i in self.held_out} if key[0] == "train" else {}
        ids = [i for i in file.ids if i in durations_s and not (is_dropped and i in shared)]
        note = f"{len(shared)} ids are held out as well: {'dropped' if is_dropped else 'kept'}" if shared else ""
        duration_s = sum(durations_s[i] for i in ids)
        match = replace(match, overlapping=shared)
        return UtteranceList(*key, len(ids), len(set(ids)), duration_s, match=match, note=note), ids

    def _draw(self, key: Key, wanted: Draw) -> tuple[UtteranceList, Iterable[str]]:
        """Our own draw, without the ids that a list of the other side claims."""
        part, name = key
        avoided, left_out = self._avoided(key, wanted), set()
        candidates = self._candidates(wanted.sets(name), avoided, left_out)
        drawn = draw(candidates, seed=self.settings.seed, name=name, hours=wanted.hours)
        if part == "train":
            self.shared.update(utt_id for utt_id in drawn if utt_id in self.held_out)
        has_released = self.settings.released and self.setting in self.settings.released.folders and part != "dev"
        note = f"no released list: {'drawn here' if wanted.hours else 'the whole set'}" if has_released else ""
        size = len(drawn), drawn.num_unique, drawn.duration_s
        return UtteranceList(*key, *size, origins=wanted.sets(name), num_left_out=len(left_out), note=note), drawn

    def _avoided(self, key: Key, wanted: Draw) -> set[str]:
        """Ids that a draw leaves out: for training, those taken out of its material to be held out.

        Those that a released list trains on are left out for validation, and for a test where it is taken out of named
        splits; an official test set stays whole.
        """
        part, name = key
        if part == "train":
            return self.taken
        if part == "test" and not wanted.splits:
            return set()
        trained = [of for other, of in self.given if other == "train" and _language(of) == _language(name)]
        return {utt_id for of in trained for utt_id in released.read(self.given["train", of]).ids}

    def _candidates(self, names: Iterable[str], avoided: set[str], left_out: set[str]) -> Iterator[tuple[str, float]]:
        """The ids of the sets `names` with their seconds; those that are avoided are added to `left_out`."""
        for name in names:
            for cut in manifests.read(manifests.path_of(self.data_dir, name)):
                if cut["id"] in avoided:
                    left_out.add(cut["id"])
                else:
                    yield cut["id"], cut["duration"]

    def _check_shared(self) -> None:
        if self.shared:
            named = ", ".join(f"{utt_id} ({self.held_out[utt_id]})" for utt_id in sorted(self.shared)[:5])
            raise UserError(
                f"data.lists.settings.{self.setting}: {len(self.shared)} utterances are both trained and tested on: "
                f"{named}{' ...' if len(self.shared) > 5 else ''}; take them out of one of the manifests"
            )


def _language(name: str) -> list[str]:
    """The corpus and the language of a set."""
    return name.split("_", 2)[:2]


def _is_whole(directory: Path) -> bool:
    """Whether the report is there and SHA256SUMS agrees with the files it names."""
    sums = directory / "SHA256SUMS"
    lines = [line.split("  ", 1) for line in sums.read_text().splitlines()] if sums.is_file() else []
    paths = [(directory / name, sha) for sha, name in lines]
    is_whole = all(path.is_file() and files.sha256(path) == sha for path, sha in paths)
    return bool(paths) and is_whole and (directory / list_report.REPORT).is_file()


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with files.write(path) as stream:
        stream.writelines(f"{line}\n" for line in lines)

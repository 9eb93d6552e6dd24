"""The data and the disks: which manifests, lists and features are there, and whether what is to come has room."""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from zipperasr.data import DataSettings, list_report, manifests, store
from zipperasr.data.download.archives import existing
from zipperasr.data.features import FeatureSettings
from zipperasr.data.lists import PARTS
from zipperasr.training import StageSettings
from zipperasr.training.preflight import Finding, gib

FLAC_BYTES_PER_S = 16_000
"""Of 16 kHz audio, about half of what it takes uncompressed."""

ok, warning = (partial(Finding, "data", level) for level in ("ok", "warning"))
roomy, full = (partial(Finding, "disk", level) for level in ("ok", "error"))


@dataclass(frozen=True)
class Size:
    """Of a list: its utterances and their seconds."""

    num_utts: int
    duration_s: float

    def __add__(self, other: "Size") -> "Size":
        return Size(self.num_utts + other.num_utts, self.duration_s + other.duration_s)


NOTHING = Size(0, 0.0)
Sizes = dict[tuple[str, str], Size]  # of a setting's lists, by part and set


@dataclass(frozen=True)
class Need:
    """Bytes that will be written below a folder."""

    folder: Path
    num_bytes: float
    what: str


def measure(data_dir: Path, setting: str) -> Sizes | None:
    """The sizes of a setting's lists, as stage 2 reported them; None where there is no report."""
    report = data_dir / "lists" / setting / list_report.REPORT
    if not report.is_file():
        return None
    lines = [line for line in report.read_text(encoding="utf-8").split("\n\n")[1].splitlines() if line]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    path, num_utts, hours = (header.index(name) for name in ("list", "lines", "hours"))
    return {
        (row[path].partition("/")[0], Path(row[path]).stem): Size(int(row[num_utts]), float(row[hours]) * 3600)
        for row in rows
    }


def asked(data: DataSettings, setting: str) -> Sizes:
    """What the configuration asks of a setting's lists, where it says hours; the paper's hours where it does not."""
    draws = data.lists.settings[setting].draws
    hours = {key: draw.hours or data.lists.paper_hours.get(key[1], 0.0) for key, draw in draws.items()}
    return {key: Size(0, 3600 * h) for key, h in hours.items()}


def langs(data: DataSettings, setting: str) -> list[str]:
    """The languages that a setting trains on."""
    return [name.split("_")[1] for name in data.lists.settings[setting].train]


def train_size(sizes: Sizes, features: FeatureSettings) -> Size:
    """All that is trained on, copies at other speeds among it."""
    size = sum((size for (part, _), size in sizes.items() if part == "train"), NOTHING)
    speeds = [1.0, *features.speed_perturb]
    return Size(size.num_utts * len(speeds), sum(size.duration_s / speed for speed in speeds))


def check(data: DataSettings, setting: str, data_dir: Path, sizes: Sizes | None) -> Iterator[Finding]:
    """What of a setting is there, by part and language, and which stage makes what is not."""
    draws = data.lists.settings[setting].draws
    if sizes is None:
        report = data_dir / "lists" / setting / list_report.REPORT
        yield warning(f"{setting}: no {report}; stage 2 writes the lists and it")
    else:
        for part in PARTS:
            yield from _check_part(setting, part, {name: size for (of, name), size in sizes.items() if of == part})
        if lacking := sorted(name for part, name in draws.keys() - sizes.keys()):
            yield warning(f"{setting}: no list {_some(lacking)}; run stage 2 again")
    wanted = {one for (_, name), draw in draws.items() for one in draw.sets(name)}
    if absent := sorted(name for name in wanted if not manifests.path_of(data_dir, name).is_file()):
        yield warning(f"{setting}: no manifest {_some(absent)}; stages 0 and 1 make them")
    elif absent := [name for _, name in draws if not is_stored(data_dir, data.features, name)]:
        stored = f"data.features.storage={data.features.storage}"
        yield warning(f"{setting}: {stored}, but nothing is stored of {_some(absent)}; run stage 3")


def is_stored(data_dir: Path, settings: FeatureSettings, name: str) -> bool:
    """Whether a set has what stage 3 stores, if that stores anything."""
    return settings.storage == "on_the_fly" or (store.root_of(data_dir, settings) / name).is_dir()


def features_need(data: DataSettings, data_dir: Path, of_settings: Iterable[Sizes]) -> Need:
    """The room for what stage 3 is yet to store: log-mel features in fp32 at 100 Hz, with copies at other speeds.

    A set that several settings name is taken at its largest.
    """
    settings, num_bytes = data.features, 0.0
    largest: Sizes = {}
    for key, size in (item for sizes in of_settings for item in sizes.items()):
        largest[key] = max(size, largest.get(key, NOTHING), key=lambda one: one.duration_s)
    for (part, name), size in largest.items():
        if not is_stored(data_dir, settings, name):
            speeds = [1.0, *(settings.speed_perturb if part == "train" else ())]
            seconds = sum(size.duration_s / speed for speed in speeds)
            is_audio = settings.storage == "audio"
            num_bytes += FLAC_BYTES_PER_S * size.duration_s if is_audio else 400 * settings.num_mel_bins * seconds
    return Need(data_dir, num_bytes, f"{settings.storage} features")


def checkpoints_need(exp_dir: Path, stage: int, settings: StageSettings, *, trained: int) -> Need:
    """The room for the checkpoints of a run that trains so many parameters, at its fullest: while one is written.

    Weights in fp32 of those kept and of one more; AdamW's two moments, which the newest alone keeps, twice.
    """
    num_weights = settings.keep_last + settings.keep_best + 1
    return Need(exp_dir, trained * 4 * (num_weights + 2 * 2), f"checkpoints of stage {stage}")


def check_disks(needs: Iterable[Need], *, free: Mapping[int, int] | None = None) -> Iterator[Finding]:
    """Whether each disk has room for all that will be written on it; `free` bytes by device, measured if None."""
    by_disk: dict[int, list[Need]] = {}
    for need in needs:
        by_disk.setdefault(existing(need.folder).stat().st_dev, []).append(need)
    for device, mine in by_disk.items():
        there = free[device] if free else shutil.disk_usage(existing(mine[0].folder)).free
        total = sum(need.num_bytes for need in mine)
        parts = ", ".join(f"{need.what} {gib(need.num_bytes)}" for need in mine if need.num_bytes) or "nothing"
        where = " and ".join(dict.fromkeys(str(need.folder) for need in mine))
        said = f"{where}: {gib(there)} free, {gib(total)} needed ({parts})"
        yield roomy(said) if total <= there else full(f"{said}; free some, or choose another disk")


def _check_part(setting: str, part: str, sizes: Mapping[str, Size]) -> Iterator[Finding]:
    by_lang: dict[str, Size] = {}
    for name, size in sizes.items():
        lang = name.split("_")[1]
        by_lang[lang] = by_lang.get(lang, NOTHING) + size
    if not by_lang:
        return
    total = sum(by_lang.values(), NOTHING)
    langs = ", ".join(f"{lang} {size.duration_s / 3600:,.2f} h ({size.num_utts:,})" for lang, size in by_lang.items())
    yield ok(f"{setting} {part}: {total.duration_s / 3600:,.2f} h, {total.num_utts:,} utterances: {langs}")
    if empty := [name for name, size in sizes.items() if not size.num_utts]:
        yield warning(f"{setting} {part}: nothing in {_some(empty)}; see lists/{setting}/REPORT.md")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

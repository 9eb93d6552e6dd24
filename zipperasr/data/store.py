"""Stage 3: features, or audio to compute them from, stored as Lhotse Shar. What is whole is never stored again.

    <data-dir>/features/<set>          log-mel features (storage: precomputed)
    <data-dir>/features/sp0.9/<set>    those of copies at another speed, of what is trained on
    <data-dir>/audio/<set>             16 kHz FLAC (storage: audio)

An utterance is stored once, under the set that it lies in, whatever lists name it. Shards are written into a hidden
directory beside, whose name holds a key of all that they depend on; it becomes the set's when all of them are whole.

F frames (100 Hz), T samples.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import math
import multiprocessing
import shutil
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from zipperasr import files
from zipperasr.data import audio, augment, lists, manifests, shar, workers
from zipperasr.data.features import HOP, FeatureSettings, log_mel
from zipperasr.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

FORMAT = 1
"""Of what is stored: with another number, everything is stored anew."""
FIELDS = {"precomputed": "features", "audio": "recording"}
"""The field that Lhotse has for what is stored."""


def root_of(data_dir: Path | str, settings: FeatureSettings, speed: float = 1) -> Path:
    """Where the directories of sets are."""
    root = Path(data_dir) / ("audio" if settings.storage == "audio" else "features")
    return root if speed == 1 else root / f"sp{speed:g}"


def precompute(
    data_dir: Path | str, settings: FeatureSettings, *, nj: int = 1, job: tuple[int, int] | None = None
) -> dict[str, int]:
    """Store what every utterance in any list needs; return the number of utterances stored now, by directory.

    A set is complete when it has been stored from the same manifest, lists and settings; otherwise its shards are
    stored that are not whole. Job (I, N) does every N-th shard, from the I-th on (counted from 1), beside other jobs;
    the call without a job does what they have left and completes the sets.
    """
    import lhotse  # noqa: F401  before the processes fork, so that they need not
    import whisper  # noqa: F401

    root, stored = root_of(data_dir, settings), Counter()
    first, step = (job[0] - 1, job[1]) if job else (0, 1)
    with contextlib.nullcontext() if job else files.lock(root):
        todo = [store for store in _plan(data_dir, settings) if not store.is_done()]
        shards = islice((shard for store in todo for shard in store.shards()), first, None, step)
        total = sum(len(store.ids) for store in todo) // step
        with tqdm(total=total, desc="features", unit="utt", mininterval=0.5, disable=None) as bar:
            for directory, num_new, num_cuts in _spread(functools.partial(_write, settings=settings), shards, nj):
                stored[str(directory.relative_to(root))] += num_new
                bar.update(num_cuts)
        for store in [] if job else todo:
            store.complete()
    return dict(+stored)


def require(missing: Iterable[str], where: str, mend: str) -> None:
    """Raise UserError if there are ids that are not `where` they should be."""
    if missing := sorted(missing):
        some = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise UserError(f"{len(missing)} listed utterances are not {where}: {some}; {mend}")


def read_features(member: shar.Member, utt_id: str) -> Tensor:
    """The stored features [F, num_mel_bins] of an utterance. Raises UserError naming it when they cannot be read."""
    import numpy as np
    import torch

    try:
        return torch.from_numpy(np.load(io.BytesIO(member.read(utt_id)), allow_pickle=False))
    except ValueError as error:
        raise member.broken(utt_id) from error


def read_audio(member: shar.Member, utt_id: str) -> np.ndarray:
    """The stored 16 kHz samples [T] of an utterance. Raises UserError naming it when they cannot be read."""
    try:
        return audio.decode_flac(member.read(utt_id))
    except RuntimeError as error:
        raise member.broken(utt_id) from error


@dataclass(frozen=True)
class Shard:
    """Cuts to be stored at a speed as shard `number` of what will be `directory`."""

    directory: Path
    working: Path
    number: int
    speed: float
    cuts: list[dict[str, Any]]
    is_whole: bool


@dataclass(frozen=True)
class Store:
    """The listed utterances of one set, at one speed."""

    directory: Path
    manifest: Path
    field: str
    speed: float
    ids: set[str]
    key: str

    @property
    def working(self) -> Path:
        """Where the shards are until all of them are whole."""
        return self.directory.with_name(f".{self.directory.name}.{self.key}")

    @property
    def num_shards(self) -> int:
        return math.ceil(len(self.ids) / shar.SHARD_SIZE)

    def is_done(self) -> bool:
        """Whether all shards are there; if some have gone since, those that remain are taken up again."""
        marker = f".{self.directory.name}.done"
        if not files.is_done(self.directory.parent, self.key, name=marker):
            return False
        if len(shar.shards(self.directory, self.field)) == self.num_shards:
            return True
        (self.directory.parent / marker).unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):  # the directory has gone too, or another job was first
            self.directory.rename(self.working)
        return False

    def shards(self) -> Iterator[Shard]:
        """All shards, in the order of the manifest."""
        whole, cuts = shar.shards(self.working, self.field), self._cuts()
        for number in range(self.num_shards):
            chosen = list(islice(cuts, shar.SHARD_SIZE))
            yield Shard(self.directory, self.working, number, self.speed, chosen, number in whole)

    def complete(self) -> None:
        """Let the whole shards take the place of what was there; killed at any point, it can be called again."""
        for left_by_killed in self.working.glob(".*"):
            left_by_killed.unlink()
        shutil.rmtree(self.directory, ignore_errors=True)
        files.mark_done(self.directory.parent, self.key, name=f".{self.directory.name}.done")
        self.working.rename(self.directory)
        for stale in self.directory.parent.glob(f".{self.directory.name}.{'[0-9a-f]' * len(self.key)}"):
            shutil.rmtree(stale)
        shar.forget()

    def _cuts(self) -> Iterator[dict[str, Any]]:
        left = set(self.ids)
        for cut in manifests.read(self.manifest):
            if cut["id"] in left:
                left.remove(cut["id"])
                yield cut


def _plan(data_dir: Path | str, settings: FeatureSettings) -> list[Store]:
    """What is to be stored for the lists of all settings."""
    speeds = settings.speed_perturb if settings.storage == "precomputed" else ()  # else copies are made on reading
    ids: defaultdict[tuple[str, float], set[str]] = defaultdict(set)
    for name, (listed, trained) in _listed(data_dir).items():
        missing = set(listed)
        for where, cut in manifests.lookup(data_dir, name, listed):
            missing.remove(cut["id"])
            ids[where, 1].add(cut["id"])
            for speed in speeds if cut["id"] in trained else ():
                if augment.has_copy(cut["duration"], speed):
                    ids[where, speed].add(cut["id"])
        where = f"in {manifests.path_of(data_dir, name)} or another manifest of its corpus and language"
        require(missing, where, "run stages 1 and 2 again")
    return [_store(data_dir, settings, *key, chosen) for key, chosen in sorted(ids.items())]


def _listed(data_dir: Path | str) -> dict[str, tuple[set[str], set[str]]]:
    """The ids in the lists of each set: all, and those that are trained on."""
    listed: dict[str, tuple[set[str], set[str]]] = {}
    for path in sorted((Path(data_dir) / "lists").glob("*/*/*.txt")):
        ids, trained = listed.setdefault(path.stem, (set(), set()))
        ids.update(lists.read(path))
        if path.parent.name == "train":
            trained.update(lists.read(path))
    if not listed:
        raise UserError(f"{Path(data_dir) / 'lists'}: no lists there; run stage 2")
    return listed


def _store(data_dir: Path | str, settings: FeatureSettings, name: str, speed: float, ids: set[str]) -> Store:
    manifest, digest = manifests.path_of(data_dir, name), hashlib.sha256()
    for utt_id in sorted(ids):
        digest.update(f"{utt_id}\n".encode())
    bins = settings.num_mel_bins if settings.storage == "precomputed" else None
    key = files.fingerprint([FORMAT, shar.SHARD_SIZE, bins, speed, files.sha256(manifest), digest.hexdigest()])
    return Store(root_of(data_dir, settings, speed) / name, manifest, FIELDS[settings.storage], speed, ids, key)


def _spread(function: Callable[[Shard], Any], shards: Iterable[Shard], nj: int) -> Iterator[Any]:
    """`function` of each shard, in order, by `nj` processes; few shards wait at a time, whatever their number."""
    if nj == 1:
        yield from map(function, shards)
        return
    waiting: deque = deque()
    with ProcessPoolExecutor(nj, multiprocessing.get_context("fork"), workers.begin) as pool:
        try:
            for shard in shards:
                waiting.append(pool.submit(function, shard))
                if len(waiting) > 2 * nj:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            mend = "lower --nj if memory is short, and run the same command again to go on"
            raise UserError(f"stage 3: a process was killed; {mend}") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _write(shard: Shard, *, settings: FeatureSettings) -> tuple[Path, int, int]:
    """Store a shard, unless it is whole: its directory, how many utterances are new, and how many it has."""
    num_new = 0
    if not shard.is_whole:
        item = _features if settings.storage == "precomputed" else _audio
        items = (item(cut, settings, shard.speed) for cut in shard.cuts)
        num_new = shar.write(shard.working, shard.number, FIELDS[settings.storage], items)
    return shard.directory, num_new, len(shard.cuts)


def _features(cut: dict[str, Any], settings: FeatureSettings, speed: float) -> shar.Item:
    """An utterance and its features at a speed."""
    import numpy as np

    samples = augment.perturb_speed(audio.Span.of(cut).load(cut["id"]), speed)
    features = log_mel(samples, settings.num_mel_bins)  # [F, num_mel_bins]
    stored = _mono(cut, augment.copy_id(cut["id"], speed), augment.copy_duration_s(cut["duration"], speed))
    manifest = {
        "type": "whisper-log-mel",
        "num_frames": len(features),
        "num_features": settings.num_mel_bins,
        "frame_shift": HOP / audio.SAMPLE_RATE,
        "sampling_rate": audio.SAMPLE_RATE,
        "start": 0.0,
        "duration": stored["duration"],
        "storage_type": "shar",
        "storage_path": "",
        "storage_key": "",
        "channels": 0,
    }
    stream = io.BytesIO()
    np.save(stream, features.numpy(), allow_pickle=False)
    return shar.Item(stored, manifest, ".npy", stream.getvalue())


def _audio(cut: dict[str, Any], settings: FeatureSettings, speed: float) -> shar.Item:
    """An utterance and its audio."""
    samples = audio.Span.of(cut).load(cut["id"])
    stored = _mono(cut, cut["id"], len(samples) / audio.SAMPLE_RATE)
    manifest = {
        "id": cut["id"],
        "sources": [{"type": "shar", "channels": [0], "source": ""}],
        "sampling_rate": audio.SAMPLE_RATE,
        "num_samples": len(samples),
        "duration": stored["duration"],
        "channel_ids": [0],
    }
    return shar.Item(stored, manifest, ".flac", audio.encode_flac(samples))


def _mono(cut: dict[str, Any], utt_id: str, duration_s: float) -> dict[str, Any]:
    """The cut of what is stored: it begins at 0, and has one channel and nothing of the original recording."""
    (supervision,) = cut["supervisions"]
    here = {"id": utt_id, "start": 0.0, "duration": duration_s, "channel": 0}
    return {**here, "supervisions": [supervision | here | {"recording_id": utt_id}], "type": "MonoCut"}

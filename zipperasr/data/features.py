"""Whisper's log-mel features at true length, computed on the fly or stored through Lhotse.

Whisper lifts everything to at most 8 (log10 units, before scaling) below the loudest bin of what it is given. So the
features of an utterance depend on the whole of it: they are computed once and cut into chunks afterwards.

F frames (100 Hz).
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zipperasr import files
from zipperasr.config import Settings
from zipperasr.data import audio, lists, manifests, parallel
from zipperasr.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from lhotse.cut import Cut
    from torch import Tensor

HOP = 160  # samples at 16 kHz


class FeatureSettings(Settings):
    """Whether features are stored by stage 3 or computed on reading, and their width (128 for Whisper large-v3)."""

    storage: Literal["precomputed", "on_the_fly"] = "precomputed"
    num_mel_bins: Literal[80, 128] = 80


def num_frames(duration_s: float) -> int:
    """Frames of an utterance: one for each whole 10 ms."""
    return audio.num_samples(duration_s) // HOP


def log_mel(samples: np.ndarray | Tensor, num_mel_bins: int) -> Tensor:
    """The log-mel features [samples // 160, num_mel_bins] of 16 kHz mono float32 samples [T], without padding to 30 s.

    Whisper's own function, so equal to it by construction; more than 200 samples are needed.
    """
    import whisper

    return whisper.log_mel_spectrogram(samples, num_mel_bins).T.contiguous()


def load(cut: Cut) -> Tensor:
    """The stored features [F, num_mel_bins] of a cut. Raises UserError naming the cut when they cannot be read."""
    import torch

    try:
        return torch.from_numpy(cut.features.load())
    except (OSError, ValueError, EOFError) as error:
        where = f"{cut.features.storage_path}/{cut.features.storage_key}"
        mend = f"delete {Path(cut.features.storage_path).parent} and run stage 3 again"
        raise UserError(f"cut '{cut.id}': features {where} cannot be read; {mend}") from error


def directory_of(data_dir: Path | str, name: str) -> Path:
    """Where the features of the set `name` are stored."""
    return Path(data_dir) / "features" / name


def precompute(data_dir: Path | str, settings: FeatureSettings, *, nj: int = 1) -> dict[str, int]:
    """Store the features of every utterance in any list; return the number of utterances of each set computed now.

    A set is complete when it is marked so for the same manifest, lists and settings; otherwise it is computed anew.
    """
    import lhotse  # noqa: F401  before the processes fork, so that they need not
    import whisper  # noqa: F401

    wanted = _listed(data_dir)
    keys = {name: _key(data_dir, name, ids, settings) for name, ids in wanted.items()}
    with files.lock(Path(data_dir) / "features"):
        directories = {name: directory_of(data_dir, name) for name in wanted}
        todo = {name: ids for name, ids in wanted.items() if not files.is_done(directories[name], keys[name])}
        for name in todo:
            shutil.rmtree(directories[name], ignore_errors=True)
        store = functools.partial(_store, num_mel_bins=settings.num_mel_bins)
        total = sum(map(len, todo.values()))
        stored = parallel.run(store, _items(data_dir, todo), nj=nj, desc="features", total=total)
        for name, ids in todo.items():
            manifests.write(directories[name] / f"{name}{manifests.SUFFIX}", (next(stored) for _ in ids))
            files.mark_done(directories[name], keys[name])
        stored.close()
    return {name: len(ids) for name, ids in todo.items()}


def _listed(data_dir: Path | str) -> dict[str, set[str]]:
    """The ids of each set in the lists of all settings."""
    wanted: dict[str, set[str]] = {}
    for path in sorted((Path(data_dir) / "lists").glob("*/*/*.txt")):
        wanted.setdefault(path.stem, set()).update(lists.read(path))
    if not wanted:
        raise UserError(f"{Path(data_dir) / 'lists'}: no lists there; run stage 2")
    return wanted


def _key(data_dir: Path | str, name: str, ids: set[str], settings: FeatureSettings) -> str:
    manifest = manifests.path_of(data_dir, name)
    if not manifest.is_file():
        raise UserError(f"{manifest}: no such manifest, though lists name its utterances; run stages 1 and 2 again")
    return files.fingerprint([settings.num_mel_bins, files.sha256(manifest), sorted(ids)])


def _items(data_dir: Path | str, todo: dict[str, set[str]]) -> Iterator[tuple[str, dict]]:
    for name, ids in todo.items():
        storage, left = str(directory_of(data_dir, name) / "storage"), set(ids)
        for cut in manifests.read(manifests.path_of(data_dir, name)):
            if cut["id"] in left:
                left.remove(cut["id"])
                yield storage, cut
        require(left, f"in {manifests.path_of(data_dir, name)}", "run stages 1 and 2 again")


def require(missing: Iterable[str], where: str, mend: str) -> None:
    """Raise UserError if there are ids that are not `where` they should be."""
    if missing := sorted(missing):
        some = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise UserError(f"{len(missing)} listed utterances are not {where}: {some}; {mend}")


def _store(item: tuple[str, dict[str, Any]], *, num_mel_bins: int) -> dict[str, Any]:
    """The cut with its features attached, after storing them."""
    from lhotse import Features, NumpyFilesWriter

    storage, plain = item
    cut = manifests.to_cut(plain)
    features = log_mel(audio.load_audio(cut), num_mel_bins)  # [F, num_mel_bins]
    try:
        key = NumpyFilesWriter(storage).write(cut.id, features.numpy())
    except OSError as error:
        raise UserError(f"cut '{cut.id}': cannot write its features to {storage} ({error}); free some space") from error
    cut.features = Features(
        type="whisper-log-mel",
        num_frames=len(features),
        num_features=num_mel_bins,
        frame_shift=HOP / audio.SAMPLE_RATE,
        sampling_rate=audio.SAMPLE_RATE,
        start=cut.start,
        duration=cut.duration,
        storage_type=NumpyFilesWriter.name,
        storage_path=storage,
        storage_key=key,
        channels=cut.channel,
    )
    return cut.to_dict()

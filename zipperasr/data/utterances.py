"""The utterances of a setting's lists, as training and decoding take them.

F frames (100 Hz).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zipperasr.data import audio, lists, manifests
from zipperasr.data.features import FeatureSettings, directory_of, load, log_mel, num_frames, require
from zipperasr.errors import UserError

if TYPE_CHECKING:
    from lhotse.cut import Cut
    from torch import Tensor


@dataclass(frozen=True)
class Utterance:
    """One line of a list. A repeated line has the id with `#2`, `#3` and so on behind it.

    The cut is kept as a line of JSON, for corpora of millions of utterances; `cut` makes the object.
    """

    id: str
    lang: str
    text: str
    duration_s: float
    num_frames: int
    num_mel_bins: int
    line: str = field(repr=False, compare=False)

    @property
    def cut(self) -> Cut:
        """The Lhotse cut."""
        return manifests.to_cut(json.loads(self.line))

    def features(self) -> Tensor:
        """Log-mel features [num_frames, num_mel_bins], float32: read if they are stored, else computed."""
        cut = self.cut
        if cut.features is not None:
            return load(cut)
        return log_mel(audio.load_audio(cut), self.num_mel_bins)


def load_utterances(
    data_dir: Path | str, setting: str, part: str, sets: Iterable[str] | None, features: FeatureSettings
) -> list[Utterance]:
    """The utterances of the lists of `part` (train, dev or test) of a setting, in the order of the lists.

    `sets` picks some of the lists, in its order; None takes all, by name. Audio is not read.
    Raises UserError for a set without a list, and for listed ids that are missing from the manifest or the features.
    """
    found = lists.find(data_dir, setting, part)
    utterances = []
    for name in found if sets is None else sets:
        if name not in found:
            known = ", ".join(found) or "none"
            raise UserError(f"'{name}' has no list in {Path(data_dir) / 'lists' / setting / part}; there are {known}")
        utterances += _load_set(data_dir, name, lists.read(found[name]), features)
    return utterances


def _load_set(data_dir: Path | str, name: str, ids: list[str], settings: FeatureSettings) -> list[Utterance]:
    wanted, is_stored = set(ids), settings.storage == "precomputed"
    path = manifests.path_of(data_dir, name)
    if is_stored:
        path = directory_of(data_dir, name) / path.name
        if not path.is_file():
            raise UserError(f"{path}: no such features; run stage 3, or set data.features.storage=on_the_fly")
    found = {}
    for cut in manifests.read(path):
        if cut["id"] in wanted:
            if is_stored and cut["features"]["num_features"] != settings.num_mel_bins:
                raise UserError(f"{path}: not of data.features.num_mel_bins={settings.num_mel_bins}; run stage 3 again")
            found[cut["id"]] = _utterance(cut, settings.num_mel_bins)
    require(wanted - found.keys(), f"in {path}", f"run stages 1 {'to 3' if is_stored else 'and 2'} again")
    utterances, times = [], Counter()
    for utt_id in ids:
        times[utt_id] += 1
        repeat = f"#{times[utt_id]}" if times[utt_id] > 1 else ""
        utterances.append(replace(found[utt_id], id=utt_id + repeat) if repeat else found[utt_id])
    return utterances


def _utterance(cut: dict[str, Any], num_mel_bins: int) -> Utterance:
    (supervision,) = cut["supervisions"]
    return Utterance(
        id=cut["id"],
        lang=supervision["language"],
        text=supervision["text"],
        duration_s=cut["duration"],
        num_frames=num_frames(cut["duration"]),
        num_mel_bins=num_mel_bins,
        line=json.dumps(cut),
    )

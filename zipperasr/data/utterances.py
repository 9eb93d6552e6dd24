"""The utterances of a setting's lists, as training and decoding take them.

F frames (100 Hz).
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zipperasr.data import audio, augment, lists, manifests, shar, store
from zipperasr.data.features import N_FFT, FeatureSettings, log_mel, num_frames
from zipperasr.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


Find = Callable[..., "dict[str, Utterance]"]


@dataclass(slots=True)
class Utterance:
    """One line of a list. A repeated line has the id with `#2`, `#3` and so on behind it.

    `text` is trained on, `reference` is the transcript as the corpus has it. There are millions of these: they hold
    what reading takes and nothing else of the cut, and are not frozen, as freezing takes most of the time to make one.
    """

    id: str
    lang: str
    text: str
    reference: str
    duration_s: float
    num_frames: int
    num_mel_bins: int
    source: audio.Span | shar.Member = field(repr=False, compare=False)
    speed: float = 1
    """At which the audio of `source` is played; stored features are of this speed already."""
    speaker: str | None = None

    def features(self) -> Tensor:
        """Log-mel features [num_frames, num_mel_bins], float32: read if they are stored, else computed.

        Raises UserError naming the utterance when its source cannot be read, or is shorter than 13 ms.
        """
        if isinstance(self.source, shar.Member) and self.source.field == "features":
            return store.read_features(self.source, self.id)
        samples = augment.perturb_speed(self._samples(), self.speed)
        if len(samples) <= N_FFT // 2:
            raise UserError(f"cut '{self.id}': {self.duration_s:g} s is too short for features; drop it at stage 1")
        return log_mel(samples, self.num_mel_bins)

    def _samples(self) -> np.ndarray:
        if isinstance(self.source, shar.Member):
            return store.read_audio(self.source, self.id)
        return self.source.load(self.id)


def load_utterances(
    data_dir: Path | str,
    setting: str,
    part: str,
    sets: Iterable[str] | None,
    features: FeatureSettings,
    *,
    on_text: Callable[[str], object] = lambda text: None,
) -> list[Utterance]:
    """The utterances of the lists of `part` (train, dev or test) of a setting, in the order of the lists.

    `sets` picks some of the lists, in its order; None takes all, by name. Where the speed of training audio is
    perturbed, copies follow each list of `train`. Audio is not read. `on_text` is called with every text when it is
    found, so that it can be tokenised meanwhile.
    Raises UserError for a set without a list, and for listed ids that are missing from the manifests or what is stored.
    """
    there = lists.find(data_dir, setting, part)
    utterances = []
    for name in there if sets is None else sets:
        if name not in there:
            known = ", ".join(there) or "none"
            raise UserError(f"'{name}' has no list in {Path(data_dir) / 'lists' / setting / part}; there are {known}")
        ids = lists.read(there[name])
        find = partial(_find, data_dir, name, settings=features, on_text=on_text)
        utterances += _in_order(ids, found := find(ids))
        for speed in features.speed_perturb if part == "train" else ():
            copies = _copies(found, name, speed, find if features.storage == "precomputed" else None)
            utterances += _in_order([utt_id for utt_id in ids if utt_id in copies], copies)
    return utterances


def _find(
    data_dir: Path | str,
    name: str,
    ids: Iterable[str],
    *,
    settings: FeatureSettings,
    on_text: Callable[[str], object],
    speed: float = 1,
) -> dict[str, Utterance]:
    """The utterances that the list of a set names, by id."""
    wanted, found = set(ids), {}
    if settings.storage == "on_the_fly":
        cuts = ((audio.Span.of(cut), cut) for _, cut in manifests.lookup(data_dir, name, wanted))
        where, stages = manifests.path_of(data_dir, name), "1 and 2"
    else:
        where, stages = store.root_of(data_dir, settings, speed) / name, "1 to 3"
        cuts = _stored(where, wanted, settings)
    for source, cut in cuts:
        utterance = found[cut["id"]] = _utterance(cut, source, settings.num_mel_bins)
        on_text(utterance.text)
    store.require(wanted - found.keys(), f"in {where}", f"run stages {stages} again")
    return found


def _stored(
    directory: Path, wanted: set[str], settings: FeatureSettings
) -> Iterator[tuple[shar.Member, dict[str, Any]]]:
    """The cuts of what stage 3 has stored for a set, with the place of each."""
    root, bins = directory.parent, settings.num_mel_bins
    if wanted and not root.is_dir():
        raise UserError(f"{root}: nothing is stored there; run stage 3, or set data.features.storage=on_the_fly")
    for member, cut in shar.lookup(root, directory.name, wanted, store.FIELDS[settings.storage]):
        if settings.storage == "precomputed" and cut["features"]["num_features"] != bins:
            raise UserError(f"{member.path}: not of data.features.num_mel_bins={bins}; run stage 3 again")
        yield member, cut


def _copies(base: dict[str, Utterance], name: str, speed: float, stored: Find | None) -> dict[str, Utterance]:
    """The copies at a speed, by the id of the base, but for those that would be too long, which are counted."""
    chosen = {i: augment.copy_id(i, speed) for i, u in base.items() if augment.has_copy(u.duration_s, speed)}
    if num_long := len(base) - len(chosen):
        logging.warning("%s: %d of %d utterances have no copy at speed %g: over 30 s", name, num_long, len(base), speed)
    if stored:
        found = stored(chosen.values(), speed=speed)
        return {i: found[utt_id] for i, utt_id in chosen.items()}
    return {i: _copy(base[i], utt_id, speed) for i, utt_id in chosen.items()}


def _copy(utterance: Utterance, utt_id: str, speed: float) -> Utterance:
    duration_s = augment.copy_duration_s(utterance.duration_s, speed)
    return replace(utterance, id=utt_id, duration_s=duration_s, num_frames=num_frames(duration_s), speed=speed)


def _in_order(ids: Sequence[str], found: dict[str, Utterance]) -> list[Utterance]:
    """An utterance for each line of a list."""
    if len(ids) == len(found):
        return [found[utt_id] for utt_id in ids]
    utterances, times = [], Counter()
    for utt_id in ids:
        utterance, times[utt_id] = found[utt_id], times[utt_id] + 1
        number = times[utt_id]
        utterances.append(replace(utterance, id=f"{utterance.id}#{number}") if number > 1 else utterance)
    return utterances


def _utterance(cut: dict[str, Any], source: audio.Span | shar.Member, num_mel_bins: int) -> Utterance:
    (supervision,) = cut["supervisions"]
    reference, duration_s = supervision["text"], cut["duration"]
    text = (supervision.get("custom") or {}).get("train_text", reference)
    text = reference if text == reference else text  # one string then
    lang = sys.intern(supervision["language"])
    frames, speaker = num_frames(duration_s), supervision.get("speaker")
    speaker = speaker and sys.intern(speaker)  # one string for all that one speaker says
    return Utterance(cut["id"], lang, text, reference, duration_s, frames, num_mel_bins, source, speaker=speaker)

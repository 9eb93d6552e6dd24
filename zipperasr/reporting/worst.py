"""The utterances that a run got most wrong: alignments, what decoding said of them, and their audio as MP3.

Nothing here imports torch, so that audio is read by soundfile and not by Lhotse.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from zipperasr.data import audio, manifests, stream
from zipperasr.errors import UserError
from zipperasr.languages import Language
from zipperasr.reporting.cross_check import Checked
from zipperasr.reporting.results import Run
from zipperasr.scoring import normalise
from zipperasr.scoring.score import Aligned, align, read, read_per_utt

MAX_CLIP_S = 30.0
MAX_CLIPS_BYTES = 2_000_000
"""Of all clips of a page together: a third more in base64."""
MP3 = {"format": "MP3", "subtype": "MPEG_LAYER_III", "bitrate_mode": "AVERAGE", "compression_level": 0.9}  # 28 kbit/s


@dataclasses.dataclass(frozen=True)
class Utterance:
    """One aligned utterance of the set `set_name`, its row of `utts.jsonl` ({} without one), and what CTC hears."""

    set_name: str
    language: Language
    aligned: Aligned
    row: dict[str, Any]
    check: Checked | None = None

    @property
    def key(self) -> str:
        """The name of its audio: the set, a slash, and the id without the number of a line's repetition."""
        return f"{self.set_name}/" + re.sub(r"#\d+$", "", self.aligned.id)


def of_run(run: Run, *, num: int) -> list[Utterance]:
    """At most `num` utterances of a run: from every set in turn, the worst first, the one with the most errors left.

    In turn, because a set that is scored by character has more errors than one by word and would fill the list.
    Raises UserError when a file of a decode directory is missing or broken.
    """
    sets = sorted(run.scores, key=lambda name: -(run.scores[name]["error_rate"] or 0))
    ranked = [[(name, utt_id) for utt_id in _ranked(run.decode_dir(name))[:num]] for name in sets]
    chosen = [place for turn in zip_longest(*ranked) for place in turn if place][:num]
    return [utt for name in sets for utt in _read(run, name, [utt_id for other, utt_id in chosen if other == name])]


def _ranked(directory: Path) -> list[str]:
    """The ids of the utterances with errors, most errors first."""
    counts = read_per_utt(directory / "per_utt")
    return sorted((i for i in counts if counts[i].errors), key=lambda i: (-counts[i].errors, i))


def _read(run: Run, name: str, ids: list[str]) -> list[Utterance]:
    decoded = read(run.decode_dir(name), lang=run.scores[name]["lang"])
    if stale := [i for i in ids if i not in decoded.refs]:
        raise UserError(f"{decoded.directory / 'per_utt'}: '{stale[0]}' is not in ref; score this directory again")
    split = normalise.splitter(decoded.language, run.scores[name]["headline"])
    hyps = {i: split(decoded.hyps[i]) for i in ids if i in decoded.hyps}
    aligned = (align(i, split(decoded.refs[i]), hyps.get(i)) for i in ids)
    checks = run.checks[name].utts if name in run.checks else {}
    return [Utterance(name, decoded.language, a, decoded.utts.get(a.id, {}), checks.get(a.id)) for a in aligned]


def clips(utterances: Sequence[Utterance], data_dir: Path | str) -> dict[str, bytes | str]:
    """The MP3 of each utterance (mono, 16 kHz, the first 30 s) by its `key`, or why there is none, in words.

    Raises UserError when `data_dir` has no manifests at all.
    """
    where = manifests.path_of(data_dir, "").parent
    if not where.is_dir():
        raise UserError(f"{where}: no such directory; give the recipe's --data-dir, or none for a page without audio")
    found: dict[str, dict | str] = {}
    for name in dict.fromkeys(utt.set_name for utt in utterances):
        keys = {utt.key for utt in utterances if utt.set_name == name}
        try:
            ids = {key.removeprefix(f"{name}/") for key in keys}
            found |= {f"{name}/{cut['id']}": cut for _, cut in manifests.lookup(data_dir, name, ids)}
        except UserError as error:
            found |= dict.fromkeys(keys, str(error))
    made, left = {}, MAX_CLIPS_BYTES
    for key in dict.fromkeys(utt.key for utt in utterances):
        clip = _clip(found.get(key, f"it is in no manifest of {where}"))
        made[key] = clip if len(clip) <= left else "left out to keep this page small"
        left -= len(clip) if made[key] is clip and isinstance(clip, bytes) else 0
    return made


def _clip(cut: dict | str) -> bytes | str:
    try:
        return cut if isinstance(cut, str) else _mp3(audio.Span.of(cut))
    except (UserError, OSError, RuntimeError, ValueError) as error:
        return f"the audio cannot be read ({error})"


def _mp3(span: audio.Span) -> bytes:
    import numpy as np
    import soundfile

    path, end_s = Path(span.path), span.start_s + min(span.duration_s, MAX_CLIP_S)
    channels = [span.channels.index(c) for c in span.picked]
    read = stream.read(path, stream.describe(path), start_s=span.start_s, end_s=end_s, channels=channels)
    if not (blocks := list(read)):
        raise ValueError(f"{span.path} ends before {span.start_s} s")
    made = io.BytesIO()
    soundfile.write(made, np.concatenate(blocks), audio.SAMPLE_RATE, **MP3)
    return made.getvalue()

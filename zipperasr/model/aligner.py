"""When each word of a text is said: the aligner of a run, which `zipperasr train-aligner` has trained.

    aligner = Aligner.load(run_dir)
    frames, lengths = model.encoder(features, [lang] * len(features), chunk_s)
    words = aligner.words(frames, lang, text)  # of one utterance

Legend: T encoder frames (50 Hz) of an utterance, D encoder width.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from zipperasr import alignment, files, languages
from zipperasr.alignment.words import Word, boundaries, split
from zipperasr.data.text import train_text
from zipperasr.errors import UserError
from zipperasr.model import ALIGNER, ALIGNER_SETTINGS, WEIGHTS, find_checkpoint
from zipperasr.model.ctc import CtcHead, Units, load_head

FRAME_S = 0.02
PAUSE_S = 0.2
"""Less between two words is no pause but the end of one and the beginning of the other, in equal parts."""


@dataclass(frozen=True)
class Heard:
    """The words of a text, and what the CTC head alone has heard.

    `words` is empty where the audio is too short for the text, or the head knows none of its characters.
    `disagreement`: the edit distance between text and `ctc_text` over the length of the longer one, in characters as
    for training, without spaces: from 0 to 1; None where the head knows none of the text's characters.
    `n_best`: the most probable texts by the head alone, with the log-probabilities of all their paths, if asked for.
    """

    words: list[Word]
    ctc_text: str
    disagreement: float | None
    n_best: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Aligner:
    """A CTC head with its units. `early_s`: how long before its first unit's frame a word begins, and `late_s`: how
    long behind its last one's it ends, as estimated when the head was trained (training/aligner.py)."""

    head: CtcHead
    units: Units
    early_s: float = 0.0
    late_s: float = 0.0
    step: int | None = None
    """The checkpoint of the run whose encoder it was trained on."""
    engine: str | None = None
    num_best: int = 0
    """How many of the most probable texts are searched for, which takes much longer than all else."""

    @classmethod
    def load(cls, run_dir: Path | str, *, device: torch.device | str = "cpu", engine: str | None = None) -> "Aligner":
        """The aligner of a run, for frames on `device`.

        Raises UserError where it has none that fits its weights, and for an engine that cannot be used.
        """
        folder = Path(run_dir) / ALIGNER
        head, units = load_head(folder)
        saved = files.read_json(folder / ALIGNER_SETTINGS)
        if files.sha256(find_checkpoint(run_dir, saved["step"]) / WEIGHTS) != saved["weights"]:
            raise UserError(f"{folder}: the run has been trained anew since; run zipperasr train-aligner again")
        alignment.choose(engine, "align")
        return cls(head.to(device), units, saved["early_s"], saved["late_s"], saved["step"], engine)

    def words(self, frames: Tensor, lang: str, text: str) -> list[Word]:
        """The words of what is said in one utterance, from its encoder frames [T, D]; none if it is too short."""
        return self([frames], [lang], [text])[0].words

    @torch.inference_mode()
    def __call__(
        self,
        frames: Sequence[Tensor],
        langs: Sequence[str],
        texts: Sequence[str],
        durations_s: Sequence[float] | None = None,
    ) -> list[Heard]:
        """The words of each utterance, from its encoder frames [T, D]: starts rise, and no two words overlap.

        None ends behind its audio, which lasts `durations_s` (default: as long as the frames, of which the last may
        reach beyond).
        """
        durations_s = durations_s or [len(x) * FRAME_S for x in frames]
        log_probs = list(self.head(torch.cat(list(frames))).split([len(x) for x in frames])) if frames else []
        targets = list(map(self._targets, texts, langs))
        found = alignment.forced_align(log_probs, [ids for ids, _ in targets], engine=self.engine)
        return [self._heard(*one) for one in zip(log_probs, texts, langs, targets, found, durations_s, strict=True)]

    def _targets(self, text: str, lang: str) -> tuple[list[int], list[int | None]]:
        """The units of a text, and the number of the word that each belongs to; None between words."""
        ids: list[int] = []
        owners: list[int | None] = []
        is_spaced = languages.get(lang).is_spaced
        for number, (word, is_apart) in enumerate(zip(split(text), boundaries(text), strict=True)):
            own = self.units.encode(train_text(word, lang))
            between = self.units.encode(" ") if own and ids and is_apart and is_spaced else []
            ids += between + own
            owners += [None] * len(between) + [number] * len(own)
        return ids, owners

    def _heard(self, log_probs, text, lang, targets, found: alignment.Alignment | None, duration_s) -> Heard:
        ctc_text = self.units.decode(alignment.greedy(log_probs))
        ours, theirs = (train_text(t, lang).replace(" ", "") for t in (text, ctc_text))
        ids, owners = targets
        words = self._timed(split(text), owners, found, duration_s) if found and ids else []
        disagreement = Levenshtein.normalized_distance(ours, theirs) if ids or not ours else None
        best = alignment.n_best(log_probs, self.num_best, engine=self.engine) if self.num_best else []
        return Heard(words, ctc_text, disagreement, tuple((self.units.decode(some), score) for some, score in best))

    def _timed(
        self, words: list[str], owners: list[int | None], found: alignment.Alignment, duration_s: float
    ) -> list[Word]:
        """Words with their times; one without any known character has no duration, and no confidence."""
        first: dict[int | None, int] = {}
        last: dict[int | None, int] = {}
        for owner, (start, end) in zip(owners, found.spans, strict=True):
            first.setdefault(owner, start)
            last[owner] = end
        known = [number for number in range(len(words)) if number in first]
        starts = {n: first[n] * FRAME_S - self.early_s for n in known}
        ends = {n: last[n] * FRAME_S + self.late_s for n in known}
        for one, other in itertools.pairwise(known):
            if starts[other] - ends[one] < PAUSE_S:
                ends[one] = starts[other] = (ends[one] + starts[other]) / 2
        at, timed = 0.0, []
        for number, word in enumerate(words):
            if number in first:
                start_s = min(max(starts[number], at), duration_s)
                at = min(max(ends[number], start_s), duration_s)
                confidence = found.posteriors[first[number] : last[number]].mean().item()
                timed.append(Word(word, round(start_s, 3), round(at, 3), round(confidence, 4)))
            else:
                timed.append(Word(word, round(at, 3), round(at, 3), 0.0))
        return timed

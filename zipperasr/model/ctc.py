"""A CTC head on the encoder's frames: which character is being said. For word times, and to check the LLM's text.

It is trained with the run (training.stage<N>.ctc_weight), whose checkpoints then hold it as `ctc.*` and whose directory
its units, or afterwards (training/aligner.py).
Legend: T encoder frames (50 Hz) of all utterances, D encoder width, V units.
"""

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import regex
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zipperasr import alignment, files
from zipperasr.data.utterances import Utterance
from zipperasr.model.tensors import check_fit, read_tensors, write_tensors

_HANGUL = regex.compile(r"\p{Hangul}+")
WEIGHTS, UNITS = "aligner.safetensors", "units.json"
BLANK = 0
PREFIX = "ctc."
"""How the names of a head's tensors begin in a run's checkpoints."""


@dataclass(frozen=True)
class Units:
    """What a head tells apart: the blank, which is unit 0, and characters; the space is the boundary of words.

    Hangul is taken apart into its letters, of which there are few, so that no syllable is unknown.
    """

    characters: tuple[str, ...]

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Units":
        """The characters of training texts (data/text.py), sorted."""
        return cls(tuple(sorted(set().union(*map(_letters, texts)))))

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ids", {character: i for i, character in enumerate(self.characters, BLANK + 1)})

    def __len__(self) -> int:
        """V."""
        return len(self.characters) + 1

    def encode(self, text: str) -> list[int]:
        """The units of a text, without the characters that are none of them."""
        return [self._ids[character] for character in _letters(text) if character in self._ids]

    def targets(self, utterance: Utterance) -> list[int]:
        """The units of an utterance's text; none if its audio is too short for their path."""
        ids = self.encode(utterance.text)
        return ids if alignment.min_frames(ids) <= (utterance.num_frames + 1) // 2 else []

    def save(self, folder: Path) -> None:
        """Write `units.json`."""
        files.write_json(folder / UNITS, {"characters": self.characters})

    @classmethod
    def load(cls, folder: Path) -> "Units":
        """What `save` has written. Raises UserError where it is not there, or broken."""
        return cls(tuple(files.read_json(folder / UNITS).get("characters", ())))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of units; single spaces between words."""
        text = "".join(self.characters[i - 1] for i in ids)
        return " ".join(unicodedata.normalize("NFC", text).split())


def _letters(text: str) -> str:
    return _HANGUL.sub(lambda syllables: unicodedata.normalize("NFD", syllables[0]), text)


class CtcHead(nn.Module):
    """LayerNorm and a linear layer."""

    def __init__(self, width: int, num_units: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, num_units)

    def forward(self, frames: Tensor) -> Tensor:
        """Encoder frames [T, D] -> log-posteriors [T, V], in fp32."""
        return F.log_softmax(self.linear(self.norm(frames.to(self.norm.weight.dtype))).float(), dim=-1)

    @torch.no_grad()
    def begin_as(self, other: "CtcHead", *, mine: Units, theirs: Units) -> None:
        """Take over the norm of another head, and its rows for the blank and the characters that both know."""
        shared = sorted(set(mine.characters) & set(theirs.characters))
        rows, their_rows = ([BLANK] + [units.encode(c)[0] for c in shared] for units in (mine, theirs))
        self.norm.load_state_dict(other.norm.state_dict())
        for own, their in zip(self.linear.parameters(), other.linear.parameters(), strict=True):
            own[rows] = their[their_rows]


def save_head(folder: Path, head: CtcHead, units: Units) -> None:
    """Write `aligner.safetensors` and, beside it, `units.json` with the characters."""
    units.save(folder)
    with files.beside(folder / WEIGHTS) as temporary:
        write_tensors(temporary, head.state_dict())


def load_head(folder: Path) -> tuple[CtcHead, Units]:
    """What `save_head` has written. Raises UserError where it is not there, or not whole."""
    mend = "train it with zipperasr train-aligner"
    tensors = read_tensors(folder / WEIGHTS, lacking=mend, broken="delete it and train it again")
    units = Units.load(folder)
    return _filled(folder / WEIGHTS, tensors, units, mend), units


def load_trained_head(run_dir: Path, checkpoint: Path) -> tuple[CtcHead, Units]:
    """The head that a run was trained with, as in the file `checkpoint`. Raises UserError where it has none."""
    mend = "train the run anew with its ctc_weight above 0"
    stored = read_tensors(checkpoint, lacking=mend, broken=mend)
    tensors = {name.removeprefix(PREFIX): t for name, t in stored.items() if name.startswith(PREFIX)}
    units = Units.load(run_dir)
    return _filled(checkpoint, tensors, units, mend), units


def _filled(path: Path, tensors: Mapping[str, Tensor], units: Units, mend: str) -> CtcHead:
    head = CtcHead(len(tensors.get("norm.weight", ())), len(units))
    check_fit(path, tensors, head.state_dict(), mend=mend, spoilt=mend)
    head.load_state_dict(tensors)
    return head.eval()

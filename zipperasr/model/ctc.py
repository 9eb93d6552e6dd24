"""A CTC head on the encoder's frames: which character is being said. For word times, and to check the LLM's text.

Legend: T encoder frames (50 Hz) of all utterances, D encoder width, V units.
"""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import regex
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from zipperasr import files
from zipperasr.model.tensors import check_fit, read_tensors

_HANGUL = regex.compile(r"\p{Hangul}+")
WEIGHTS, UNITS = "aligner.safetensors", "units.json"
BLANK = 0


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


def save_head(folder: Path, head: CtcHead, units: Units) -> None:
    """Write `aligner.safetensors` and, beside it, `units.json` with the characters."""
    files.write_json(folder / UNITS, {"characters": units.characters})
    with files.beside(folder / WEIGHTS) as temporary:
        save_file({name: t.detach().cpu().contiguous() for name, t in head.state_dict().items()}, temporary)


def load_head(folder: Path) -> tuple[CtcHead, Units]:
    """What `save_head` has written. Raises UserError where it is not there, or not whole."""
    mend = "train it with zipperasr train-aligner"
    tensors = read_tensors(folder / WEIGHTS, lacking=mend, broken="delete it and train it again")
    units = Units(tuple(files.read_json(folder / UNITS).get("characters", ())))
    width = len(tensors.get("norm.weight", ()))
    head = CtcHead(width, len(units))
    check_fit(folder / WEIGHTS, tensors, head.state_dict(), mend=mend, spoilt=mend)
    head.load_state_dict(tensors)
    return head.eval(), units

"""What a router knows of a language. To add a signal (the paper names others as future work), add a class and a line.

Legend: G languages asked for, E size of the signal.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from zipperasr.errors import UserError


class Signal(nn.Module):
    """A vector per language. `size` is E; `extensible` says whether another language may join without changing it."""

    size: int
    extensible = True

    def forward(self, langs: Sequence[str]) -> Tensor:
        """[G, E] for languages that have a bank."""
        raise NotImplementedError


class WhisperEmbedding(Signal):
    """The language token's row of Whisper's decoder embedding, frozen (section IV-E, arXiv:2603.17558).

    It comes with the pretrained model and stays out of checkpoints.
    """

    def __init__(self, langs: Sequence[str], embeddings: Mapping[str, Tensor], like: Tensor):
        super().__init__()
        missing = [lang for lang in langs if lang not in embeddings]
        if missing:
            raise UserError(f"no language embedding of {', '.join(missing)}; give it, or set zipper.signal: learned")
        self.rows = {lang: i for i, lang in enumerate(langs)}
        self.register_buffer("embeddings", torch.stack([embeddings[lang].to(like) for lang in langs]), persistent=False)
        self.size = self.embeddings.shape[1]

    def forward(self, langs: Sequence[str]) -> Tensor:
        return self.embeddings[[self.rows[lang] for lang in langs]]


class LearnedEmbedding(Signal):
    """A trained vector per language, one for all layers; starts at random, so that languages differ."""

    size = 64

    def __init__(self, langs: Sequence[str], embeddings: Mapping[str, Tensor], like: Tensor):
        super().__init__()
        self.embeddings = nn.ParameterDict({lang: nn.Parameter(torch.randn(self.size).to(like)) for lang in langs})

    def forward(self, langs: Sequence[str]) -> Tensor:
        return torch.stack([self.embeddings[lang] for lang in langs])


class OneHot(Signal):
    """Languages that have nothing in common: the router learns each one's mixture by itself."""

    extensible = False  # a further place would change every other language's LayerNorm

    def __init__(self, langs: Sequence[str], embeddings: Mapping[str, Tensor], like: Tensor):
        super().__init__()
        self.rows = {lang: i for i, lang in enumerate(langs)}
        self.size = len(langs)
        self.register_buffer("identity", torch.eye(self.size).to(like), persistent=False)

    def forward(self, langs: Sequence[str]) -> Tensor:
        return self.identity[[self.rows[lang] for lang in langs]]


SIGNALS: dict[str, type[Signal]] = {"whisper": WhisperEmbedding, "learned": LearnedEmbedding, "onehot": OneHot}

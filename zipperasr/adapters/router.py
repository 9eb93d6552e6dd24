"""The router: how much of each rank is the language's own (Eq. 16 to 18, arXiv:2603.17558).

Legend: G languages asked for, E size of the signal, R rank.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from zipperasr.adapters import AdapterSettings
from zipperasr.adapters.signals import SIGNALS, Signal
from zipperasr.errors import UserError


class Router(nn.Module):
    """p_l = sigmoid(W_r LayerNorm(e_l) + b_r), e_l the routing signal of language l.

    is_random: W_r and b_r start as PyTorch starts a linear layer, which gives each language about half of the ranks
    for its own, and like languages like ones. Otherwise they start at zero, so that p = 0.5 for every language and
    rank: no language starts with a random preference, and p moves as soon as the two banks differ.
    """

    def __init__(self, signal: Signal, rank: int, like: Tensor, *, is_random: bool):
        super().__init__()
        where = {"dtype": like.dtype, "device": like.device}
        self.signal = signal
        self.norm = nn.LayerNorm(signal.size, **where)
        self.linear = nn.Linear(signal.size, rank, **where)
        if not is_random:
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    def forward(self, langs: Sequence[str]) -> Tensor:
        """Mixing weights p [G, R]. Raises UserError when they are not numbers (a GPU is not asked: it would wait)."""
        p = torch.sigmoid(self.linear(self.norm(self.signal(langs))))
        if not p.is_cuda and not torch.isfinite(p).all():
            bad = ", ".join(lang for lang, row in zip(langs, p, strict=True) if not torch.isfinite(row).all())
            raise UserError(
                f"the router's weights for {bad} are not numbers (NaN); training has diverged: go back to an earlier "
                "checkpoint or lower the learning rate"
            )
        return p


class Routers:
    """Hands each layer its router: one of its own, or the same to all (`zipper.router`); the signal is one for all."""

    def __init__(self, settings: AdapterSettings, embeddings: Mapping[str, Tensor]):
        self._settings, self._embeddings = settings, embeddings
        self._signal: Signal | None = None
        self._shared: Router | None = None

    def next(self, like: Tensor, *, is_random: bool = False) -> Router:
        """The router of the next layer, in the dtype and on the device of `like`."""
        settings = self._settings
        if self._signal is None:
            self._signal = SIGNALS[settings.zipper.signal](settings.langs, self._embeddings, like)
        if self._shared is not None:
            return self._shared
        router = Router(self._signal, settings.rank, like, is_random=is_random)
        if settings.zipper.router == "shared":
            self._shared = router
        return router

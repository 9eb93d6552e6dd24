"""The router: how much of each rank is the language's own (Eq. 16 to 18, arXiv:2603.17558)."""

import torch
from torch import Tensor, nn


class Router(nn.Module):
    """p_l = sigmoid(W_r LayerNorm(e_l) + b_r).

    W_r and b_r start at zero, so p = 0.5 for every language and rank: no language starts with a random preference,
    and p moves as soon as the two banks differ. The embeddings e_l [L, E] are frozen and stay out of checkpoints.
    """

    def __init__(self, language_embeddings: Tensor, rank: int):
        super().__init__()
        self.register_buffer("language_embeddings", language_embeddings, persistent=False)
        self.norm = nn.LayerNorm(language_embeddings.shape[1], dtype=language_embeddings.dtype)
        self.linear = nn.Linear(language_embeddings.shape[1], rank, dtype=language_embeddings.dtype)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, rows: list[int]) -> Tensor:
        """Mixing weights p [len(rows), R] for languages given by their rows of e."""
        return torch.sigmoid(self.linear(self.norm(self.language_embeddings[rows])))

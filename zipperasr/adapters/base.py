"""What all adapters share: a frozen linear layer, a low-rank update per language, and the fused pass over a batch.

    y = W0 x + b + B_l A x

Legend: T tokens of all utterances laid end to end, I input width, O output width, R rank, L languages, G distinct
languages in a batch. A is [R, I], B is [O, R]; scaling = alpha / rank is folded into B.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zipperasr.adapters import AdapterSettings

Groups = Sequence[tuple[str | None, int, int]]  # runs (lang, start, stop) over the tokens of a batch


class AdaptedLinear(nn.Module):
    """A frozen linear layer plus a low-rank update; the base of every method.

    `weight` and `bias` are the frozen layer's own tensors under their old names, so that a checkpoint of the
    unadapted model fits. A method adds its parameters and says in `factors` what they amount to per language.
    """

    by_language = True  # whether the update depends on the language

    def __init__(self, linear: nn.Linear, settings: AdapterSettings, language_embeddings: Tensor | None = None):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.scaling = settings.alpha / settings.rank
        self.langs = settings.langs

    def factors(self, langs: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """A [R, I] and, for each of `langs`, B [G, O, R] with the scaling in it."""
        raise NotImplementedError

    def forward(self, x: Tensor, groups: Groups | None = None) -> Tensor:
        """x [T, I] -> [T, O] with the update of each run's language; without languages x may be [..., I].

        Raises ValueError when `groups` are missing or do not cover x.
        """
        if not self.by_language:
            A, B = self.factors([None])
            tokens = x.reshape(-1, self.in_features)
            y = LowRankLinear.apply(tokens, self.weight, self.bias, A, B, [(0, 0, len(tokens))])
            return y.view(*x.shape[:-1], self.out_features)
        langs = _languages(groups, len(x), type(self).__name__)
        A, B = self.factors(langs)
        runs = [(langs.index(lang), start, stop) for lang, start, stop in groups]
        return LowRankLinear.apply(x, self.weight, self.bias, A, B, runs)

    @torch.no_grad()
    def merged(self, lang: str | None = None) -> nn.Linear:
        """A plain linear layer equal to this one for `lang`: summed in fp32, then cast to the weight's dtype."""
        A, (B,) = self.factors([lang])
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        weight = self.weight.to(dtype) + B.to(dtype) @ A.to(dtype)
        linear.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=False)
        linear.bias = self.bias
        return linear


def new_A(linear: nn.Linear, rank: int) -> nn.Parameter:
    """A down-projection [R, I] drawn as in LoRA (Kaiming uniform)."""
    A = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
    nn.init.kaiming_uniform_(A, a=5**0.5)
    return A


def new_B(linear: nn.Linear, rank: int) -> nn.Parameter:
    """An up-projection [O, R] of zeros, so that a fresh adapter changes nothing."""
    return nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))


class LowRankLinear(torch.autograd.Function):
    """x W^T + b + (x A^T) B_g^T, where each run of tokens has its own B.

    Written out because it saves only x and x A^T, adds into the layer's output in place, and never forms a
    gradient of the frozen weight. Checked against autograd in tests/test_adapters.py.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, runs):
        """x [T, I], weight [O, I], bias [O] or None, A [R, I], B [G, O, R], runs of (g, start, stop) -> [T, O]."""
        weight, A, B = (t.to(x.dtype) for t in (weight, A, B))
        y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
        h = x @ A.T  # [T, R]
        for g, start, stop in runs:
            y[start:stop].addmm_(h[start:stop], B[g].T)
        ctx.save_for_backward(x, h, weight, A, B)
        ctx.runs = runs
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, h, weight, A, B = ctx.saved_tensors
        dh, dB = torch.empty_like(h), torch.zeros_like(B)
        for g, start, stop in ctx.runs:
            dh[start:stop] = dy[start:stop] @ B[g]
            dB[g].addmm_(dy[start:stop].T, h[start:stop])
        dx = (dy @ weight).addmm_(dh, A) if ctx.needs_input_grad[0] else None
        return dx, None, None, dh.T @ x, dB, None


def _languages(groups: Groups | None, num_tokens: int, method: str) -> list[str | None]:
    """The distinct languages of `groups`, checked to cover `num_tokens` tokens without gap or overlap."""
    if groups is None:
        raise ValueError(f"{method} depends on the language: pass groups=[(lang, start, stop), ...]")
    edges = [0]
    for _, start, stop in groups:
        if start != edges[-1] or stop < start:
            raise ValueError(f"groups {list(groups)} are not contiguous")
        edges.append(stop)
    if edges[-1] != num_tokens:
        raise ValueError(f"groups {list(groups)} end at {edges[-1]}, but there are {num_tokens} tokens")
    return list(dict.fromkeys(lang for lang, _, _ in groups))

"""FlyLoRA: each token uses the few ranks that score highest (Eq. 9, arXiv:2603.17558; Zou et al., arXiv:2510.08396).

Legend: T tokens, I input width, O output width, R rank, k active ranks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from zipperasr.adapters.base import AdaptedLinear, compute_dtype, new_B
from zipperasr.adapters.batch import Runs, current_is_real
from zipperasr.errors import UserError


class FlyLoRA(AdaptedLinear):
    """y = A x, A sparse and frozen; dW = s sum over i in the top k of y + d of b_i a_i^T, s = alpha / r.

    Each row of A has exactly max(1, int(I * sparsity)) entries, drawn from N(0, 1 / r^2); checkpoints hold A.
    d only chooses and gets no gradient: once per optimizer step, in training only and over real frames only, it moves
    by `bias_rate` towards the ranks that served fewer tokens (`balance`). It is kept as a whole number of such moves,
    so that no dtype loses them.

    The authors' two codes disagree, and settings choose: `score` signed (their fork of PEFT, and Eq. 9 as written) or
    absolute (their standalone layer: top k of |y + d|, where a d far below zero is chosen as often as one far above);
    `x_gradient` through A (standalone) or not (fork); `bias_rule` mean: u sign(mean(c) - c), or share:
    u sign(k / r - c) with raw counts c, which moves all ranks alike and balances nothing.
    The default is Eq. 9 as written, its own gradient, and the rule that balances.
    """

    by_language = False
    can_merge = False
    balances = True

    def __init__(self, linear, settings, banks, routers):
        super().__init__(linear, settings, banks, routers)
        self.rank, self.settings = settings.rank, settings.flylora
        per_row = max(1, int(self.in_features * (self.settings.sparsity or self.settings.top_k / self.rank)))
        A = torch.zeros(self.rank, self.in_features)
        for row in A:
            row[torch.randperm(self.in_features)[:per_row]] = torch.randn(per_row) / self.rank
        self.register_buffer("A", A.to(linear.weight))
        self.B = new_B(linear, self.rank)
        like = {"dtype": torch.long, "device": linear.weight.device}
        self.register_buffer("bias_moves", torch.zeros(self.rank, **like))
        self.register_buffer("load", torch.zeros(self.rank, **like), persistent=False)

    def forward(self, x: Tensor, runs: Runs | None = None) -> Tensor:
        """x [..., I] -> [..., O]; of `runs`, only which tokens are real is of interest."""
        tokens = x.reshape(-1, self.in_features)
        is_real = current_is_real(x) if runs is None else runs.is_real
        y = _TopK.apply(tokens, self.weight, self.bias, self.A, self.B, self, is_real)
        return y.view(*x.shape[:-1], self.out_features)

    def active(self, h: Tensor) -> Tensor:
        """Which ranks [T, R] act on tokens with h = A x [T, R]."""
        score = h.float() + self.settings.bias_rate * self.bias_moves
        top = (score.abs() if self.settings.score == "absolute" else score).topk(self.settings.top_k, dim=-1).indices
        return torch.zeros_like(h, dtype=torch.bool).scatter_(-1, top, True)

    def balance(self, load: Tensor) -> None:
        """Move d after an optimizer step by the `load` [R] of all ranks' real tokens, and count anew."""
        target = load.double().mean() if self.settings.bias_rule == "mean" else self.settings.top_k / self.rank
        self.bias_moves += torch.sign(target - load).long()
        self.load.zero_()

    def factors(self, langs):
        raise UserError(
            "FlyLoRA chooses its ranks anew for every frame, so no fixed weight or LoRA equals it; "
            "decode with the run itself, or export another method"
        )


class _TopK(torch.autograd.Function):
    """x W^T + b + s (m * x A^T) B^T, m the active ranks. Keeps m and m * x A^T for the backward pass, and not x.

    The load is counted in the backward pass, which runs once whether or not activations are checkpointed.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, layer, is_real):
        dtype = compute_dtype(x)
        x_, weight, A, B = (t.to(dtype) for t in (x, weight, A, B))
        y = F.linear(x_, weight, None if bias is None else bias.to(dtype))
        h = x_ @ A.T  # [T, R]
        is_active = layer.active(h)
        h = h * is_active
        y.addmm_(h, B.T, alpha=layer.scaling)
        ctx.save_for_backward(h, is_active, weight, A, B, is_real)
        ctx.layer, ctx.counts, ctx.dtype = layer, layer.training, x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        h, is_active, weight, A, B, is_real = ctx.saved_tensors
        layer = ctx.layer
        if ctx.counts:
            layer.load += (is_active if is_real is None else is_active[is_real]).sum(0)
        dx = dB = None
        if ctx.needs_input_grad[4]:
            dB = (dy.T @ h).mul_(layer.scaling)
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
            if layer.settings.x_gradient:
                dx.addmm_((dy @ B).mul_(is_active), A, alpha=layer.scaling)
            dx = dx.to(ctx.dtype)
        return dx, None, None, None, dB, None, None

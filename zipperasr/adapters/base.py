"""What all adapters share: a frozen linear layer, a low-rank update per language, and the fused pass over a batch.

    y = W0 x + b + s B_l A_l x

Legend: T tokens of all utterances laid end to end, I input width, O output width, R rank, G distinct languages of a
batch. A is [R, I], B is [O, R]; s = alpha / rank is the scaling.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zipperasr.adapters import AdapterSettings
from zipperasr.adapters.batch import Banks, Runs, current_runs
from zipperasr.adapters.router import Routers
from zipperasr.errors import UserError


class AdaptedLinear(nn.Module):
    """A frozen linear layer plus a low-rank update; the base of every method.

    `weight` and `bias` are the frozen layer's own tensors under their old names, so that a checkpoint of the
    unadapted model fits. A method adds its parameters and says in `factors` what they amount to per language; what
    belongs to one language alone is in an nn.ParameterDict by language.
    """

    by_language = True  # whether the update depends on the language
    can_merge = True  # whether it is the same for all tokens of a language, and so a plain LoRA
    balances = False  # whether it counts in `load` [R] what each rank serves, for `balance` after an optimizer step

    def __init__(self, linear: nn.Linear, settings: AdapterSettings, banks: Banks | None, routers: Routers):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scaling = settings.alpha / settings.rank
        self.banks = banks

    def factors(self, langs: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """A [R, I] or [G, R, I], and B [G, O, R], for each of `langs`."""
        raise NotImplementedError

    def forward(self, x: Tensor, runs: Runs | None = None) -> Tensor:
        """x [..., I] -> [..., O] with the update of each run's language.

        runs: languages over the tokens of x; if not given, those of the enclosing `batch_languages`.
        Raises UserError when the languages are not known and ValueError when `runs` do not cover x.
        """
        tokens = x.reshape(-1, self.in_features)  # [T, I]
        if not self.by_language:
            runs = Runs((None,), ((0, 0, len(tokens)),), len(tokens))
        elif runs is None:
            runs = current_runs(x, type(self).__name__)
        if runs.num_tokens != len(tokens):
            raise ValueError(f"languages are given for {runs.num_tokens} tokens, but there are {len(tokens)}")
        parameters = self.parameters_for(runs.langs)
        y = LowRankLinear.apply(tokens, self.weight, self.bias, self, runs.langs, runs.runs, *parameters)
        return y.view(*x.shape[:-1], self.out_features)

    def own(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters, without the frozen layer's."""
        return {name: p for name, p in self.named_parameters() if name not in ("weight", "bias")}

    def by_lang(self) -> dict[str, list[nn.Parameter]]:
        """The parameters that belong to one language alone, by language."""
        found: dict[str, list[nn.Parameter]] = {}
        for module in self.modules():
            for lang, parameter in module.items() if isinstance(module, nn.ParameterDict) else ():
                found.setdefault(lang, []).append(parameter)
        return found

    def parameters_for(self, langs: Sequence[str | None]) -> list[nn.Parameter]:
        """The adapter's parameters less those of languages that `langs` do not use."""
        by_lang = self.by_lang()
        used = {self.banks.of(lang) for lang in langs} if by_lang else set()
        idle = {id(p) for lang, parameters in by_lang.items() if lang not in used for p in parameters}
        return [p for p in self.own().values() if id(p) not in idle]

    def specific_share(self, lang: str) -> Tensor | None:
        """How much of each rank [R] is the language's own, from 0 to 1; None where the method does not route."""
        return None

    def warm_start(self, source: dict[str, Tensor], *, init_A: bool, init_router: bool) -> None:
        """Initial-B: take over the banks of a trained zipper layer; for the methods that have such banks."""
        raise UserError(f"{type(self).__name__} has no shared and specific banks to start from another run's")

    @torch.no_grad()
    def merged(self, lang: str | None = None) -> nn.Linear:
        """A plain linear layer equal to this one for `lang`: summed in fp32, then cast to the weight's dtype.

        Raises UserError where no linear layer equals it.
        """
        A, B = self.low_rank(lang)
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        weight = self.weight.to(A.dtype) + B @ A
        linear.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=False)
        linear.bias = self.bias
        return linear

    @torch.no_grad()
    def low_rank(self, lang: str | None = None) -> tuple[Tensor, Tensor]:
        """The plain LoRA that this layer is for `lang`: A [R, I] and B [O, R] with the scaling in it, at least fp32.

        Raises UserError where no fixed pair of factors equals the layer.
        """
        A, (B,) = self.factors([lang])
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return (A[0] if A.dim() == 3 else A).to(dtype), self.scaling * B.to(dtype)


def new_A(linear: nn.Linear, rank: int) -> nn.Parameter:
    """A down-projection [R, I] drawn as in LoRA (Kaiming uniform)."""
    A = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
    nn.init.kaiming_uniform_(A, a=5**0.5)
    return A


def new_B(linear: nn.Linear, rank: int) -> nn.Parameter:
    """An up-projection [O, R] of zeros, so that a fresh adapter changes nothing."""
    return nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))


class LowRankLinear(torch.autograd.Function):
    """x W^T + b + s (x A^T) B_g^T, where each run of tokens has its own B (and perhaps A).

    Written out because it keeps only x and x A^T for the backward pass, which composes A and B from the layer's
    parameters again, adds into the layer's output in place, and never forms a gradient of the frozen weight.
    Checked against autograd in tests/test_adapters.py.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, layer, langs, runs, *parameters):
        """x [T, I], weight [O, I], bias [O] or None, runs of (g, start, stop), parameters of the factors -> [T, O]."""
        dtype = compute_dtype(x)
        A, B = (t.to(dtype) for t in _compose(layer, langs))
        x_, weight = x.to(dtype), weight.to(dtype)
        y = F.linear(x_, weight, None if bias is None else bias.to(dtype))
        h = down(x_, A, runs)  # [T, R]
        for g, start, stop in runs:
            y[start:stop].addmm_(h[start:stop], B[g].T, alpha=layer.scaling)
        ctx.save_for_backward(x_, h, weight, *parameters)
        ctx.layer, ctx.langs, ctx.runs, ctx.dtype = layer, langs, runs, x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, h, weight, *parameters = ctx.saved_tensors  # torch checks that none has changed since
        with torch.enable_grad():
            A_, B_ = _compose(ctx.layer, ctx.langs)
        A, B = A_.detach().to(dy.dtype), B_.detach().to(dy.dtype)
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        dA = torch.zeros_like(A) if A_.requires_grad else None
        dB = torch.zeros_like(B) if B_.requires_grad else None
        dh, s = torch.empty_like(h), ctx.layer.scaling
        for g, start, stop in ctx.runs:
            dy_g, dh_g = dy[start:stop], dh[start:stop]
            torch.addmm(dh_g, dy_g, B[g], beta=0, alpha=s, out=dh_g)
            if dB is not None:
                dB[g].addmm_(dy_g.T, h[start:stop], alpha=s)
            if A.dim() == 3:
                if dA is not None:
                    dA[g].addmm_(dh_g.T, x[start:stop])
                if dx is not None:
                    dx[start:stop].addmm_(dh_g, A[g])
        if A.dim() == 2:
            if dA is not None:
                torch.mm(dh.T, x, out=dA)
            if dx is not None:
                dx.addmm_(dh, A)
        gradients = _pull_back((A_, B_), (dA, dB), parameters)
        return None if dx is None else dx.to(ctx.dtype), None, None, None, None, None, *gradients


def down(x: Tensor, A: Tensor, runs: Sequence[tuple[int, int, int]]) -> Tensor:
    """x A^T [T, R] for A [R, I], or for A [G, R, I] with each run's own."""
    if A.dim() == 2:
        return x @ A.T
    h = x.new_empty(len(x), A.shape[1])
    for g, start, stop in runs:
        torch.mm(x[start:stop], A[g].T, out=h[start:stop])
    return h


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer computes in: autocast's where it is on, else that of x."""
    is_auto = torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if is_auto else x.dtype


def _compose(layer: AdaptedLinear, langs: Sequence[str | None]) -> tuple[Tensor, Tensor]:
    """The layer's factors in the dtype of its parameters, whatever autocast says."""
    with torch.autocast(layer.weight.device.type, enabled=False):
        return layer.factors(langs)


def _pull_back(
    outputs: Sequence[Tensor], gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients of `parameters`, from those of what was composed of them."""
    pairs = [(y, dy.to(y.dtype)) for y, dy in zip(outputs, gradients, strict=True) if dy is not None]
    wanted = [p for p in parameters if p.requires_grad]
    if not pairs or not wanted:
        return [None] * len(parameters)
    ys, dys = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(ys, wanted, dys, allow_unused=True))
    return [next(found) if p.requires_grad else None for p in parameters]

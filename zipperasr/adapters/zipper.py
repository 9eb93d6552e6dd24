"""What the zipper variants share: one A, a shared bank, and a bank per language (Eq. 10, arXiv:2603.17558)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zipperasr.adapters import AdapterSettings
from zipperasr.adapters.base import AdaptedLinear, new_A, new_B
from zipperasr.errors import UserError


class Zipper(AdaptedLinear):
    """dW_l = s B_l A; a variant says in `zip` how B_l comes of B_shared and B_spec_l.

    B_spec holds one parameter per language, not a stack: a language absent from a batch gets no gradient, and the
    optimizer leaves it alone. A language without a bank has the shared one alone, or the nearest language's (`unseen`).
    """

    def __init__(self, linear, settings, banks, routers):
        super().__init__(linear, settings, banks, routers)
        self.rank = settings.rank
        num_shared, num_specific = self.bank_ranks(settings)
        self.A, self.B_shared = new_A(linear, settings.rank), new_B(linear, num_shared)
        self.B_spec = nn.ParameterDict({lang: new_B(linear, num_specific) for lang in settings.langs})

    def bank_ranks(self, settings: AdapterSettings) -> tuple[int, int]:
        """The ranks of the shared bank and of each specific one."""
        return settings.rank, settings.rank

    def zip(self, served: Sequence[str | None]) -> Tensor:
        """B_l [G, O, R] for languages by whose bank serves them; None has the shared bank alone."""
        raise NotImplementedError

    def factors(self, langs):
        return self.A, self.zip([self.banks.of(lang) for lang in langs])

    def warm_start(self, source, *, init_A, init_router):
        names = ["B_shared", *(f"B_spec.{lang}" for lang in self.B_spec)]
        names += ["A"] if init_A else []
        names += [name for name in self.own() if name.startswith("router.")] if init_router else []
        missing = [name for name in names if name not in source]
        if missing:
            raise UserError(f"has no {missing[0]}; it must come from a zipper run with the same languages and router")
        own = self.own()
        with torch.no_grad():
            for name in names:
                own[name].copy_(self._columns_of(name, source[name], own[name].shape))

    def _columns_of(self, name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
        """`tensor` where it fits `shape`; of a wider bank, the columns of the ranks that this bank serves."""
        if name.startswith("B_") and tensor.shape[1] == self.rank:  # a bank of all ranks
            tensor = tensor[:, : shape[1]] if name == "B_shared" else tensor[:, -shape[1] :]
        if tensor.shape != shape:
            raise UserError(f"has {name} of shape {list(tensor.shape)}, but {list(shape)} is wanted; use its rank")
        return tensor


class Routed(Zipper):
    """A zipper whose router says how much of each rank is the language's own."""

    starts_random = False

    def __init__(self, linear, settings, banks, routers):
        super().__init__(linear, settings, banks, routers)
        self.router = routers.next(linear.weight, is_random=self.starts_random)

    def gates(self, langs: Sequence[str]) -> Tensor:
        """The share [G, R] of the specific bank in each rank."""
        raise NotImplementedError

    def zip(self, served):
        known = [lang for lang in dict.fromkeys(served) if lang]
        gates = dict(zip(known, self.gates(known), strict=True)) if known else {}
        shared_alone = self.B_shared.new_zeros(self.rank)
        p = torch.stack([gates.get(lang, shared_alone) for lang in served])[:, None]  # [G, 1, R]
        B_spec = torch.stack([self.B_spec[lang] if lang else self.B_shared for lang in served])
        return torch.lerp(self.B_shared, B_spec, p)

    def specific_share(self, lang):
        served = self.banks.of(lang)
        return self.gates([served])[0] if served else self.B_shared.new_zeros(self.rank)

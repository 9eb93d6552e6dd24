"""Independent LoRA: an update of its own for every language (Eq. 8, arXiv:2603.17558)."""

import torch
from torch import nn

from zipperasr.adapters.base import AdaptedLinear, new_A, new_B


class Independent(AdaptedLinear):
    """dW_l = s B_l A_l. A language without a bank has no update."""

    def __init__(self, linear, settings, banks, routers):
        super().__init__(linear, settings, banks, routers)
        self.A_spec = nn.ParameterDict({lang: new_A(linear, settings.rank) for lang in settings.langs})
        self.B_spec = nn.ParameterDict({lang: new_B(linear, settings.rank) for lang in settings.langs})

    def factors(self, langs):
        served = [self.banks.of(lang) for lang in langs]
        nothing = {bank: next(iter(bank.values())).new_zeros(()) for bank in (self.A_spec, self.B_spec)}
        A, B = (
            torch.stack([bank[lang] if lang else nothing[bank].expand_as(next(iter(bank.values()))) for lang in served])
            for bank in (self.A_spec, self.B_spec)
        )
        return A, B

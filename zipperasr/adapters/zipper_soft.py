"""Zipper-LoRA-Soft: shared and language-specific columns mixed by a router (Eq. 14 and 15, arXiv:2603.17558)."""

import torch
from torch import nn

from zipperasr.adapters.base import AdaptedLinear, new_A, new_B
from zipperasr.adapters.router import Router


class ZipperSoft(AdaptedLinear):
    """B_l = B_shared diag(1 - p_l) + B_spec_l diag(p_l); dW_l = s B_l A.

    B_spec holds one parameter per language, not a stack: a language absent from a batch gets no gradient, and plain
    AdamW then leaves it alone. (DeepSpeed's flat buffers fill in zeros, so there momentum and decay still act.)
    A language outside `langs` has the shared bank in place of its own, which is p = 0: the shared bank alone.
    """

    def __init__(self, linear, settings, language_embeddings):
        super().__init__(linear, settings)
        self.A, self.B_shared = new_A(linear, settings.rank), new_B(linear, settings.rank)
        self.B_spec = nn.ParameterDict({lang: new_B(linear, settings.rank) for lang in settings.langs})
        self.router = Router(language_embeddings, settings.rank)

    def factors(self, langs):
        rows = [self.langs.index(lang) if lang in self.B_spec else 0 for lang in langs]
        B_spec = torch.stack([self.B_spec.get(lang, self.B_shared) for lang in langs])
        p = self.router(rows)[:, None]  # [G, 1, R]
        return self.A, self.scaling * torch.lerp(self.B_shared, B_spec, p)

"""Zipper-LoRA-Static: some ranks shared, the others the language's own (Eq. 11, arXiv:2603.17558)."""

import torch

from zipperasr.adapters.zipper import Zipper


class ZipperStatic(Zipper):
    """B_l = [B_shared, B_spec_l]: the first `zipper.num_shared` ranks (half of them by default) are shared."""

    def bank_ranks(self, settings):
        num_shared = settings.zipper.num_shared or settings.rank // 2
        return num_shared, settings.rank - num_shared

    def zip(self, served):
        nothing = self.B_shared.new_zeros(self.out_features, self.rank - self.B_shared.shape[1])
        B_spec = torch.stack([self.B_spec[lang] if lang else nothing for lang in served])
        return torch.cat([self.B_shared.expand(len(served), -1, -1), B_spec], dim=2)

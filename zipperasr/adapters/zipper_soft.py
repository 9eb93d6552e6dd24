"""Zipper-LoRA-Soft: shared and language-specific columns mixed by a router (Eq. 14 and 15, arXiv:2603.17558)."""

from zipperasr.adapters.zipper import Routed


class ZipperSoft(Routed):
    """B_l = B_shared diag(1 - p_l) + B_spec_l diag(p_l)."""

    def gates(self, langs):
        return self.router(langs)

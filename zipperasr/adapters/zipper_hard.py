"""Zipper-LoRA-Hard: each rank shared or the language's own, as a router decides (Eq. 12, 13, arXiv:2603.17558)."""

from zipperasr.adapters.zipper import Routed


class ZipperHard(Routed):
    """s_l = [p_l >= tau]; column i of B_l is that of B_spec_l where s_i = 1, else that of B_shared.

    The sentence under Eq. 13 says it the other way round, against Eq. 14 and the text: `zipper.specific_where: 0` is
    that reading. Gradients pass the threshold as if s were p (straight-through estimator).
    The router starts at random: from p = 0.5 everywhere the threshold would give all ranks to the specific banks, and
    the shared bank, never used, would stay at zero for good.
    """

    starts_random = True

    def __init__(self, linear, settings, banks, routers):
        super().__init__(linear, settings, banks, routers)
        self.tau, self.specific_where = settings.zipper.tau, settings.zipper.specific_where

    def gates(self, langs):
        p = self.router(langs)
        s = (p >= self.tau).to(p.dtype) + (p - p.detach())  # the bracket is zero and carries the gradient
        return s if self.specific_where == 1 else 1 - s

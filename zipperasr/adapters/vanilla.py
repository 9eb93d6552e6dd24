"""Vanilla LoRA: one update shared by all languages (Eq. 7, arXiv:2603.17558)."""

from zipperasr.adapters.base import AdaptedLinear, new_A, new_B


class Vanilla(AdaptedLinear):
    """dW = s B A."""

    by_language = False

    def __init__(self, linear, settings, banks, routers):
        super().__init__(linear, settings, banks, routers)
        self.A, self.B = new_A(linear, settings.rank), new_B(linear, settings.rank)

    def factors(self, langs):
        return self.A, self.B.expand(len(langs), -1, -1)

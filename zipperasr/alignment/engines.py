"""The engines: torch's CTC loss with a Viterbi search written here, k2, and torchaudio.

k2 and torchaudio are built for one PyTorch each. Whether they fit is read from their versions, as a torchaudio that
does not fit breaks what imports it: nothing is imported before it is used. Legend: as in __init__.py.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Literal, Protocol

import regex

from zipperasr.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

ENGINES = ("k2", "torchaudio", "torch")  # the first that is there is used
Job = Literal["align", "loss", "texts"]
PATH_BEAM, LOSS_BEAM = 10.0, 30.0  # nats below the best path that k2's lattices keep; e^-30 is below what fp32 adds up


class Engine(Protocol):
    """What an engine does with [T, V] and S tokens of each utterance."""

    def paths(self, log_probs: Sequence[Tensor], targets: Sequence[Sequence[int]], blank: int) -> list[Tensor]:
        """The best path of each utterance: units [T]."""

    def losses(self, log_probs: Sequence[Tensor], targets: Sequence[Sequence[int]], blank: int) -> Tensor:
        """The CTC loss of each utterance: [N]."""

    def texts(self, log_probs: Tensor, num: int, blank: int) -> list[list[int]]:
        """Likely texts of an utterance: `num` or more, if there are."""


def available() -> dict[str, str | None]:
    """Why each engine cannot be used, or None where it can; in the order in which they are preferred."""
    import torch

    return {name: _OBSTACLES[name](torch.__version__, torch.version.cuda) for name in ENGINES}


def choose(name: str | None, job: Job) -> Engine:
    """The engine of that name, by default the first that can be used; torchaudio only aligns.

    Raises UserError for an engine that is unknown or cannot be used.
    """
    obstacles = available()
    name = name or _first(obstacles, job)
    if name not in ENGINES:
        raise UserError(f"alignment engine '{name}' is unknown; there are {', '.join(ENGINES)}")
    if obstacles[name]:
        raise UserError(f"alignment engine '{name}': {obstacles[name]}; install the one for your PyTorch, or use torch")
    return {"k2": K2, "torchaudio": Torchaudio, "torch": Torch}[name]()


def describe() -> str:
    """Which engines are used, and why others are not, in a line."""
    obstacles = available()
    reasons = "; ".join(f"{name}: {obstacle}" for name, obstacle in obstacles.items() if obstacle)
    used = f"alignment by {_first(obstacles, 'align')}, CTC loss by {_first(obstacles, 'loss')}"
    return f"{used} ({reasons})" if reasons else used


def _first(obstacles: dict[str, str | None], job: Job) -> str:
    return next(n for n in ENGINES if obstacles[n] is None and (job == "align" or n != "torchaudio"))


class Torch:
    """Always there, on CPU and GPU."""

    def paths(self, log_probs: Sequence[Tensor], targets: Sequence[Sequence[int]], blank: int) -> list[Tensor]:
        from zipperasr.alignment.viterbi import best_paths

        return best_paths(log_probs, targets, blank)

    def losses(self, log_probs: Sequence[Tensor], targets: Sequence[Sequence[int]], blank: int) -> Tensor:
        import torch
        import torch.nn.functional as F
        from torch.nn.utils.rnn import pad_sequence

        lengths, sizes = [len(x) for x in log_probs], [len(ids) for ids in targets]
        flat = torch.tensor([i for ids in targets for i in ids], device=log_probs[0].device)
        return F.ctc_loss(pad_sequence(log_probs), flat, lengths, sizes, blank=blank, reduction="none")

    def texts(self, log_probs: Tensor, num: int, blank: int) -> list[list[int]]:
        from zipperasr.alignment.beam import prefixes

        return prefixes(log_probs, 4 * num, blank, PATH_BEAM)


class Torchaudio(Torch):
    """torchaudio's forced_align, an utterance at a time; all else is torch's."""

    def paths(self, log_probs: Sequence[Tensor], targets: Sequence[Sequence[int]], blank: int) -> list[Tensor]:
        import torch
        from torchaudio.functional import forced_align

        ids = [torch.tensor([some], dtype=torch.int32, device=x.device) for x, some in zip(log_probs, targets)]
        blanks = [torch.full((len(x),), blank) for x in log_probs]  # it takes no empty text
        return [
            forced_align(x[None].contiguous(), some, blank=blank)[0][0].long() if some.numel() else nothing
            for x, some, nothing in zip(log_probs, ids, blanks)
        ]


class K2:
    """k2's graphs of the CTC topology, intersected with the posteriors. Its blank is unit 0."""

    def paths(self, log_probs: Sequence[Tensor], targets: Sequence[Sequence[int]], blank: int) -> list[Tensor]:
        import k2
        import torch

        graphs, dense, order = self._prepared(log_probs, targets, blank)
        lattices = k2.intersect_dense(graphs, dense, output_beam=PATH_BEAM)
        best = k2.shortest_path(lattices, use_double_scores=True)
        found = [best[i].labels[:-1].long() for i in range(len(order))]  # the last label, -1, is the end
        return [found[i] for i in torch.argsort(torch.tensor(order)).tolist()]

    def losses(self, log_probs: Sequence[Tensor], targets: Sequence[Sequence[int]], blank: int) -> Tensor:
        import k2
        import torch

        graphs, dense, order = self._prepared(log_probs, targets, blank)
        losses = k2.ctc_loss(graphs, dense, output_beam=LOSS_BEAM, reduction="none", use_double_scores=True)
        return losses[torch.argsort(torch.tensor(order)).to(losses.device)]

    def texts(self, log_probs: Tensor, num: int, blank: int) -> list[list[int]]:
        """Of paths drawn from the lattice of the CTC topology, whose graph has V^2 arcs."""
        import k2

        _, dense, _ = self._prepared([log_probs], [[]], blank)
        topology = k2.ctc_topo(log_probs.shape[1] - 1, device=log_probs.device)
        lattice = k2.intersect_dense_pruned(
            topology, dense, search_beam=20, output_beam=PATH_BEAM, min_active_states=30, max_active_states=10_000
        )
        paths = k2.random_paths(lattice, use_double_scores=True, num_paths=100 * num)
        (texts,) = k2.ragged.index(lattice.aux_labels, paths).remove_values_leq(0).tolist()
        return [list(text) for text in dict.fromkeys(map(tuple, texts))]

    @staticmethod
    def _prepared(log_probs: Sequence[Tensor], targets: Sequence[Sequence[int]], blank: int):
        """Graphs and posteriors from the longest utterance to the shortest, as k2 wants them, and that order."""
        import k2
        import torch
        from torch.nn.utils.rnn import pad_sequence

        if blank:
            raise UserError(
                f"alignment engine 'k2': its blank is unit 0, not {blank}; renumber the units, or use torch"
            )
        order = sorted(range(len(log_probs)), key=lambda i: -len(log_probs[i]))
        segments = torch.tensor([[row, 0, len(log_probs[i])] for row, i in enumerate(order)], dtype=torch.int32)
        dense = k2.DenseFsaVec(pad_sequence([log_probs[i] for i in order], batch_first=True), segments)
        graphs = k2.ctc_graph([list(targets[i]) for i in order], device=log_probs[0].device)
        return graphs, dense, order


def _k2_obstacle(torch_version: str, cuda: str | None) -> str | None:
    version = _version("k2")
    built = version and regex.search(r"torch(\d+(\.\d+)+)", version)
    if built and built[1] != torch_version.partition("+")[0]:
        return f"k2 {version} is built for PyTorch {built[1]}, and this is {torch_version}"
    return None if version else "not installed"


def _torchaudio_obstacle(torch_version: str, cuda: str | None) -> str | None:
    version = _version("torchaudio")
    if version and not cuda and "+cpu" not in version and platform.system() == "Linux":
        return f"torchaudio {version} is built with CUDA, and PyTorch {torch_version} is not"
    return None if version else "not installed"


_OBSTACLES = {"k2": _k2_obstacle, "torchaudio": _torchaudio_obstacle, "torch": lambda torch_version, cuda: None}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

"""The modality projector: encoder frames (50 Hz) -> speech embeddings of the LLM (12.5 Hz)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 4  # encoder frames per speech embedding


class Projector(nn.Module):
    """h = SiLU(gate) * up from two convolutions; y = LayerNorm(h + Linear(h)); out = Linear(y).

    Section V-B of arXiv:2603.17558. D encoder width, P hidden size, H LLM width.
    """

    def __init__(self, width: int, hidden_size: int, llm_width: int):
        super().__init__()
        self.gate = nn.Conv1d(width, hidden_size, kernel_size=STRIDE, stride=STRIDE)
        self.up = nn.Conv1d(width, hidden_size, kernel_size=STRIDE, stride=STRIDE)
        self.linear = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.out = nn.Linear(hidden_size, llm_width)

    def forward(self, x: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """Frames x [T, D] of utterances with `lengths` laid end to end -> [ceil(T_u / 4), H] for each utterance.

        Each utterance is padded with zeros to a multiple of 4 frames, so no window reaches into a neighbour.
        """
        x = torch.cat([F.pad(u, (0, 0, 0, -len(u) % STRIDE)) for u in x.split(list(lengths))])
        x = x.T.unsqueeze(0)  # [1, D, sum of padded T_u]
        h = (F.silu(self.gate(x)) * self.up(x))[0].T  # [S, P]
        y = self.norm(h + self.linear(h))
        return list(self.out(y).split([-(-n // STRIDE) for n in lengths]))

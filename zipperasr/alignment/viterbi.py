"""The best CTC path of every utterance of a batch.

Legend: N utterances, T frames of the longest, V units, S tokens, L = 2 S + 1 states of the longest text: its tokens
with a blank before, between and behind them.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def best_paths(log_probs: Sequence[Tensor], targets: Sequence[Sequence[int]], blank: int) -> list[Tensor]:
    """Units [T_n] of the most probable path that reads as an utterance's targets. Sums are in float64.

    log_probs: [T_n, V] each, T_n enough for the targets. A path stays in its state, goes on to the next, or skips a
    blank between two unlike tokens; it begins in one of the first two states and ends in one of the last two.
    """
    device, lengths = log_probs[0].device, [len(x) for x in log_probs]
    rows = [torch.tensor([unit for i in ids for unit in (blank, i)] + [blank], device=device) for ids in targets]
    states = pad_sequence(rows, batch_first=True, padding_value=blank)  # [N, L]
    emitted = torch.zeros(max(lengths), *states.shape, dtype=torch.float64, device=device)  # [T, N, L]
    for n, (x, row) in enumerate(zip(log_probs, rows, strict=True)):
        emitted[: len(x), n, : len(row)] = x[:, row]
    skips = torch.full_like(emitted[0], -torch.inf)
    skips[:, 2:][(states[:, 2:] != blank) & (states[:, 2:] != states[:, :-2])] = 0

    scores = F.pad(torch.full_like(skips, -torch.inf), (2, 0), value=-torch.inf)  # two columns more: none is the first
    scores[:, 2:4] = emitted[0, :, :2]
    moves = torch.zeros(emitted.shape, dtype=torch.int8, device=device)  # states moved on by, on the way to each
    ends = scores[:, 2:].clone()
    for t in range(1, len(emitted)):
        best, moves[t] = torch.stack([scores[:, 2:], scores[:, 1:-1], scores[:, :-2] + skips]).max(0)
        torch.add(best, emitted[t], out=scores[:, 2:])
        for n in (n for n, length in enumerate(lengths) if length == t + 1):
            ends[n] = scores[n, 2:]
    path = _trace(moves.cpu().numpy(), ends.cpu().numpy(), np.array(lengths), np.array([len(r) - 1 for r in rows]))
    return [row.cpu()[torch.from_numpy(path[:length, n])] for n, (row, length) in enumerate(zip(rows, lengths))]


def _trace(moves: np.ndarray, ends: np.ndarray, lengths: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The states [T, N] of each path, from the better of its two last ones back to the first frame."""
    every, path = np.arange(len(ends)), np.zeros(moves.shape[:2], np.int64)
    at = last - ((last > 0) & (ends[every, last - 1] > ends[every, last]))
    for t in range(len(moves) - 1, -1, -1):
        path[t] = at
        at = np.where(t < lengths, at - moves[t, every, at], at)
    return path

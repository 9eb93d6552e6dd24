"""Attention within segments that lie end to end on one axis: the encoder's pieces of speech, the LLM's utterances.

No mask of all pairs is made. Legend: N segments, T positions of all, G heads, K key-value heads, C their width.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_PADDING = 1.15  # padded over true positions in one bucket of CPU attention


class Layout:
    """Where each segment lies on the flat axis; made once per forward pass."""

    def __init__(self, lengths: list[int], device: torch.device):
        self.lengths, self.device = lengths, device
        self.positions = ranges(lengths).to(device)  # [T], restarting at each segment
        self.offsets = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)  # [N + 1]

    @cached_property
    def buckets(self) -> list[tuple[Tensor, Tensor | None]]:
        """Segments of similar lengths: index [n, T_max] into the flat axis and key mask [n, 1, 1, T_max].

        The mask is None where all are equally long. Padding repeats a segment's own last frame, never a neighbour's.
        """
        ordered = sorted(range(len(self.lengths)), key=self.lengths.__getitem__)
        buckets: list[list[int]] = []
        total = 0
        for i in ordered:
            total += self.lengths[i]
            if not buckets or self.lengths[i] * (len(buckets[-1]) + 1) > MAX_PADDING * total:
                buckets.append([])
                total = self.lengths[i]
            buckets[-1].append(i)
        return [self._bucket(torch.tensor(bucket, device=self.device)) for bucket in buckets]

    def _bucket(self, segments: Tensor) -> tuple[Tensor, Tensor | None]:
        starts, stops = self.offsets[segments, None].long(), self.offsets[segments + 1, None].long()
        index = starts + torch.arange(int((stops - starts).max()), device=self.device)
        is_frame = index < stops
        return torch.minimum(index, stops - 1), None if is_frame.all() else is_frame[:, None, None]

    @cached_property
    def unbucket(self) -> Tensor:
        """[T]: where each frame lies among the padded frames of all buckets, end to end."""
        where = torch.empty(sum(self.lengths), dtype=torch.long, device=self.device)
        offset = 0
        for index, mask in self.buckets:
            is_frame = torch.ones_like(index, dtype=torch.bool) if mask is None else mask[:, 0, 0]
            where[index[is_frame]] = offset + is_frame.flatten().nonzero()[:, 0]
            offset += index.numel()
        return where


def attend(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """Attention within each segment: q [T, G, C], k and v [T, K, C] -> [T, G, C]; G / K heads share keys and values.

    On a GPU in half precision this is one variable-length kernel, elsewhere one padded call per bucket.
    """
    is_grouped = q.shape[1] != k.shape[1]
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.varlen import varlen_attn

        longest = max(layout.lengths)
        return varlen_attn(
            q, k, v, layout.offsets, layout.offsets, longest, longest,
            scale=scale, window_size=(-1, 0 if is_causal else -1), enable_gqa=is_grouped,
        )  # fmt: skip
    if is_grouped:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    padded = []
    for index, mask in layout.buckets:
        q_, k_, v_ = (t.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2) for t in (q, k, v))
        mask = None if is_causal else mask  # what is behind an utterance is hidden from it anyway
        y = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=mask, is_causal=is_causal, scale=scale)
        padded.append(y.transpose(1, 2).flatten(0, 1))  # [n * T_max, G, C]
    return torch.cat(padded).index_select(0, layout.unbucket)


def ranges(lengths: Sequence[int]) -> Tensor:
    """0, 1, ... for each segment, laid end to end [T]."""
    return torch.cat([torch.arange(n) for n in lengths])

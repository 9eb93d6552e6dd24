"""Whisper's encoder at true lengths: all segments of a batch lie on one time axis, and nothing is padded to 30 s.

A segment is an utterance (full context) or a piece of one (chunked). Legend: N segments, F feature frames (100 Hz),
T encoder frames (50 Hz) of all segments, D width. Modules and weights are openai-whisper's; only `forward` is ours.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from whisper.model import AudioEncoder, ResidualAttentionBlock

from zipperasr.adapters.base import AdaptedLinear
from zipperasr.adapters.batch import Runs, language_runs
from zipperasr.errors import UserError
from zipperasr.model.attention import Layout, attend, ranges
from zipperasr.model.recompute import recomputed

FRAMES_PER_S = 100
ADAPTED = ("attn.query", "attn.key", "attn.value", "attn.out", "mlp.0", "mlp.2")  # all linear layers


class SpeechEncoder(nn.Module):
    """Log-mel features of utterances -> encoder frames, each utterance as if it were alone."""

    def __init__(self, encoder: AudioEncoder, *, pad_to_30s: bool = False):
        super().__init__()
        self.conv1, self.conv2 = encoder.conv1, encoder.conv2
        self.blocks, self.ln_post = encoder.blocks, encoder.ln_post
        self.register_buffer("positional_embedding", encoder.positional_embedding, persistent=False)
        self.max_frames = 2 * len(encoder.positional_embedding)
        self.pad_to_30s = pad_to_30s
        self.recomputed: frozenset[int] = frozenset()  # blocks that the backward pass runs again

    @property
    def width(self) -> int:
        """D."""
        return self.ln_post.normalized_shape[0]

    def forward(
        self, features: Sequence[Tensor], langs: Sequence[str], chunk_s: float | None = None
    ) -> tuple[Tensor, list[int]]:
        """Features [F_u, bins] of each utterance -> frames [T, D] laid end to end, and the number of each utterance.

        chunk_s: the length of a segment; None is full context. Utterances of one language should be neighbours
        (adapters run once per run of a language). Raises UserError for a segment longer than the 30 s window.
        """
        pieces = [self._cut(utterance, chunk_s) for utterance in features]
        segments = [piece for utterance in pieces for piece in utterance]
        true_lengths = [_half(len(piece)) for piece in segments]
        if self.pad_to_30s:
            segments = [F.pad(s, (0, 0, 0, self.max_frames - len(s)), value=_silence(s)) for s in segments]
        layout = Layout([_half(len(piece)) for piece in segments], self.conv1.weight.device)
        x = self._convolve(segments)  # [T, D]
        x = (x + self.positional_embedding[layout.positions]).to(x.dtype)
        lengths = [sum(_half(len(piece)) for piece in utterance) for utterance in pieces]
        padded, is_real = lengths, None
        if self.pad_to_30s:
            padded = [len(utterance) * self.max_frames // 2 for utterance in pieces]
            is_real = layout.positions < _repeat(true_lengths, layout.lengths).to(x.device)
        runs = language_runs(langs, padded, is_real)
        for i, block in enumerate(self.blocks):
            x = recomputed(_block, block, x, layout, runs) if i in self.recomputed else _block(block, x, layout, runs)
        x = _layer_norm(x, self.ln_post)
        return x if is_real is None else x[is_real], lengths

    def _cut(self, features: Tensor, chunk_s: float | None) -> Sequence[Tensor]:
        """The segments of an utterance; an even number of frames each, so that they add up to ceil(F / 2)."""
        size = len(features) if chunk_s is None else 2 * round(chunk_s * FRAMES_PER_S / 2)
        longest = min(len(features), size)
        if not 0 < longest <= self.max_frames:
            duration_s, segment_s, most_s = (n / FRAMES_PER_S for n in (len(features), longest, self.max_frames))
            raise UserError(
                f"an utterance of {duration_s:g} s in segments of {segment_s:g} s: the encoder takes more than 0 and "
                f"at most {most_s:g} s; split it at stage 1 or use model.encoder.context=chunked"
            )
        return features.split(size)

    def _convolve(self, segments: Sequence[Tensor]) -> Tensor:
        """Whisper's two convolutions over one axis: each segment starts at an even frame and is followed by zeros.

        One zero frame or two between segments is what padding=1 gives each segment alone, provided that what conv1
        makes of these gaps is set to zero again.
        """
        num_frames = [len(s) for s in segments]
        slots = [n // 2 * 2 + 2 for n in num_frames]
        x = torch.cat([F.pad(s, (0, 0, 0, slot - len(s))) for s, slot in zip(segments, slots, strict=True)])
        x = x.to(self.conv1.weight).T.unsqueeze(0)  # [1, bins, sum of slots]
        is_frame = ranges(slots) < _repeat(num_frames, slots)
        x = F.gelu(self.conv1(x)) * is_frame.to(x)
        x = F.gelu(self.conv2(x))[0].T  # [sum of slots / 2, D]
        halves = [slot // 2 for slot in slots]
        keep = (ranges(halves) < _repeat([_half(n) for n in num_frames], halves)).nonzero()[:, 0]
        return x[keep.to(x.device)]


def _block(block: ResidualAttentionBlock, x: Tensor, layout: Layout, runs: Runs) -> Tensor:
    """One residual block on flat frames x [T, D]."""
    h, attn = _layer_norm(x, block.attn_ln), block.attn
    q, k, v = (_linear(m, h, runs).unflatten(-1, (attn.n_head, -1)) for m in (attn.query, attn.key, attn.value))
    x = x + _linear(attn.out, attend(q, k, v, layout).flatten(-2), runs)
    h = F.gelu(_linear(block.mlp[0], _layer_norm(x, block.mlp_ln), runs))
    return x + _linear(block.mlp[2], h, runs)


def _linear(layer: nn.Module, x: Tensor, runs: Runs) -> Tensor:
    return layer(x, runs) if isinstance(layer, AdaptedLinear) else layer(x)


def _layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Whisper's own LayerNorm fails on half-precision weights, because it casts only x to fp32."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


def _silence(features: Tensor) -> float:
    """The log-mel value of digital silence behind these features: Whisper clamps at 8 decades below their maximum."""
    return max(features.max().item() - 2.0, -1.5)


def _half(num_frames: int) -> int:
    return (num_frames + 1) // 2


def _repeat(values: Sequence[int], counts: Sequence[int]) -> Tensor:
    return torch.tensor(values).repeat_interleave(torch.tensor(counts))

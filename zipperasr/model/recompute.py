"""Activation checkpointing: blocks whose activations are not kept, but made again in the backward pass."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
"""recomputed(function, *inputs): its result; the backward pass calls it again. Nothing here draws random numbers."""


def recompute(model: nn.Module, *, encoder: float, llm: float) -> None:
    """From now on, do so with these shares (0 to 1) of the blocks of a SpeechLLM's encoder and LLM, evenly spread. It
    costs a forward pass of each, and changes no number."""
    model.encoder.recomputed = chosen(len(model.encoder.blocks), encoder)
    layers = model.llm.model.layers
    wanted = chosen(len(layers), llm)
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = i in wanted
        layer._gradient_checkpointing_func = recomputed


def chosen(num_blocks: int, share: float) -> frozenset[int]:
    """Evenly spread blocks, `share` of all."""
    return frozenset(i for i in range(num_blocks) if int((i + 1) * share + 1e-9) > int(i * share + 1e-9))

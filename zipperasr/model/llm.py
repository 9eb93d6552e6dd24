"""The decoder-only LLM: loading, standard LoRA, packed rows and the loss on target tokens.

Legend: U utterances, S tokens of a row, H width, P target tokens of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from zipperasr.adapters import AdapterSettings, adapt
from zipperasr.errors import UserError
from zipperasr.model import LLMSettings

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # all linear layers
MAX_LOGITS = 2**26  # logits held at a time: 256 MiB in fp32


def load_llm(settings: LLMSettings) -> PreTrainedModel:
    """The LLM in fp32 with a fresh LoRA on all its linear layers. Raises UserError when there is no such model."""
    disable_progress_bar()  # a bar for a second's work, in every process and every log
    try:
        llm = AutoModelForCausalLM.from_pretrained(
            settings.pretrained,
            dtype=torch.float32,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"LLM '{settings.pretrained}': {str(error).splitlines()[0]}; check model.llm.pretrained"
        ) from error
    adapt(llm, ADAPTED, AdapterSettings(method="vanilla", **settings.lora.model_dump()))
    return llm


@dataclass(frozen=True)
class Rows:
    """Where the utterances of a batch lie in its rows."""

    index: Tensor  # [num_rows, S] into the utterances' tokens laid end to end; their number where a row is padded
    position_ids: Tensor  # [num_rows, S], restarting at each utterance; 0 on padding, where each token stands alone
    starts: list[int]  # [U] first token of each utterance, counted over all rows' S tokens


def lay_out(lengths: Sequence[int], rows: Sequence[int], num_rows: int) -> Rows:
    """Put utterances of `lengths` tokens into their `rows`, one after another."""
    ends, starts = [0] * num_rows, []
    for length, row in zip(lengths, rows, strict=True):
        starts.append((row, ends[row]))
        ends[row] += length
    index = torch.full((num_rows, max(ends)), sum(lengths))
    position_ids = torch.zeros_like(index)
    offset = 0
    for length, (row, start) in zip(lengths, starts, strict=True):
        index[row, start : start + length] = torch.arange(offset, offset + length)
        position_ids[row, start : start + length] = torch.arange(length)
        offset += length
    return Rows(index, position_ids, [row * max(ends) + start for row, start in starts])


def packed_hidden_states(llm: PreTrainedModel, inputs: Sequence[Tensor], layout: Rows) -> Tensor:
    """Last hidden states [num_rows * S, H] of utterances' embeddings [S_u, H], each attending to itself alone.

    transformers makes the block-diagonal mask from the restarting positions only if there is neither a mask nor a
    cache; otherwise utterances of a row silently see each other.
    """
    flat = F.pad(torch.cat(list(inputs)), (0, 0, 0, 1))  # a row of zeros at the end is the padding
    x = flat[layout.index.to(flat.device)]  # [num_rows, S, H]
    positions = layout.position_ids.to(flat.device)
    return llm.model(inputs_embeds=x, position_ids=positions, attention_mask=None, use_cache=False)[0].flatten(0, 1)


def token_losses(lm_head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy [P] in fp32 of `targets` [P] given the hidden states [P, H] that predict them.

    Logits that would exceed MAX_LOGITS are made chunk by chunk, and once more in the backward pass.
    """

    def losses(h: Tensor, t: Tensor) -> Tensor:
        logits = lm_head(h)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), t, reduction="none")

    size = max(1, MAX_LOGITS // lm_head.out_features)
    if len(targets) <= size:
        return losses(hidden, targets)
    chunks = zip(hidden.split(size), targets.split(size), strict=True)
    return torch.cat([checkpoint(losses, h, t, use_reentrant=False) for h, t in chunks])

"""The decoder-only LLM on packed utterances, and the loss on target tokens.

All utterances of a batch lie end to end in one row without padding, and each attends to itself alone.
Legend: T tokens of all utterances, H width, P target tokens of a batch.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from zipperasr.model.attention import Layout, attend
from zipperasr.model.recompute import recomputed

ATTENTION = "zipperasr"
"""The name by which transformers knows the attention below."""
MAX_LOGITS = 2**26  # logits held at a time: 256 MiB in fp32


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more
) -> tuple[Tensor, None]:
    """Within the utterances of `layout` if there is one, in transformers' form: [1, heads, T, C] -> [1, T, heads, C].

    Otherwise it is transformers' own for sdpa, as in decoding.
    """
    layout = more.pop("layout", None)
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    return attend(q, k, v, layout, is_causal=True, scale=more.get("scaling")).unsqueeze(0), None


AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def packed_hidden_states(llm: PreTrainedModel, inputs: Sequence[Tensor]) -> Tensor:
    """Last hidden states [T, H] of utterances' embeddings [T_u, H], each with positions from 0, as if it were alone."""
    x = torch.cat(list(inputs))
    layout = Layout([len(utterance) for utterance in inputs], x.device)
    no_mask = x.new_empty(1, 1, 1, 1)  # of four dimensions, so that transformers takes it for one made already
    where = {"position_ids": layout.positions[None], "attention_mask": no_mask, "layout": layout}
    return llm.model(inputs_embeds=x[None], use_cache=False, **where)[0][0]


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
    return torch.cat([recomputed(losses, h, t) for h, t in chunks])

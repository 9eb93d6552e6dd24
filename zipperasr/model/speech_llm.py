"""The whole model: speech -> encoder -> projector -> LLM -> text (Eq. 1 to 5, arXiv:2603.17558).

Legend: U utterances, F feature frames, S speech tokens, H LLM width.
"""

import copy
import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zipperasr import alignment
from zipperasr.adapters import adapted_layers, adapter_state
from zipperasr.model.ctc import CtcHead, Units
from zipperasr.model.encoder import SpeechEncoder
from zipperasr.model.llm import packed_hidden_states, token_losses
from zipperasr.model.projector import Projector
from zipperasr.prompts import Tokenizer


class Batch(Protocol):
    """What the forward pass reads of a batch; `zipperasr.data.packing.Batch` is one."""

    features: list[Tensor]  # [F_u, bins]
    langs: list[str]  # utterances of one language are neighbours
    prompts: list[list[int]]
    targets: list[list[int]]  # transcript and end-of-text
    ctc_targets: list[list[int]]  # units of the CTC head, if there is one; none of an utterance that it leaves out


class LossOutput(NamedTuple):
    """Token sums, so that a global batch is the plain sum of its parts."""

    loss_sum: Tensor  # scalar with gradient
    num_tokens: int
    utt_loss: Tensor  # [U], detached
    utt_tokens: Tensor  # [U]
    utt_ctc: Tensor | None = None  # [U] with gradient: the CTC loss of each utterance, if there is a head

    def total(self, ctc_scale: float) -> Tensor:
        """`loss_sum`, and `ctc_scale` times the sum of the CTC losses."""
        return self.loss_sum if self.utt_ctc is None else self.loss_sum + ctc_scale * self.utt_ctc.sum()

    def detached(self) -> "LossOutput":
        """The same without gradients."""
        ctc = self.utt_ctc if self.utt_ctc is None else self.utt_ctc.detach()
        return self._replace(loss_sum=self.loss_sum.detach(), utt_ctc=ctc)


class SpeechLLM(nn.Module):
    """A Whisper encoder, a projector and a decoder-only LLM. `stage` is the one that it is trained in."""

    stage: int

    def __init__(
        self,
        encoder: SpeechEncoder,
        projector: Projector,
        llm: PreTrainedModel,
        tokenizer: Tokenizer,
        language_embeddings: dict[str, Tensor],
    ):
        super().__init__()
        self.encoder, self.projector, self.llm = encoder, projector, llm
        self.tokenizer = tokenizer
        self.language_embeddings = language_embeddings  # rows of Whisper's token embedding, frozen
        self.ctc: CtcHead | None = None  # in training alone (checkpoint.add_ctc)
        self.units: Units | None = None

    def speech_embeddings(
        self, features: Sequence[Tensor], langs: Sequence[str], chunk_s: float | None = None
    ) -> list[Tensor]:
        """Features [F_u, bins] -> speech embeddings [S_u, H] of each utterance; S_u = ceil(ceil(F_u / 2) / 4)."""
        return self.projector(*self.encoder(features, langs, chunk_s))

    def embed(self, ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """Token embeddings [n, H] of each sequence of n token ids."""
        table = self.llm.get_input_embeddings()
        flat = torch.tensor(list(itertools.chain.from_iterable(ids)), dtype=torch.long, device=table.weight.device)
        return list(table(flat).split([len(sequence) for sequence in ids]))

    def decoder_inputs(
        self, prompts: Sequence[Sequence[int]], speech: Sequence[Tensor], targets: Sequence[Sequence[int]] | None = None
    ) -> list[Tensor]:
        """What the LLM reads for each utterance: prompt, speech and, in training, the targets (Eq. 4)."""
        parts = [self.embed(prompts), speech] + ([self.embed(targets)] if targets is not None else [])
        return [torch.cat(utterance) for utterance in zip(*parts, strict=True)]

    def forward(self, batch: Batch, chunk_s: float | None = None) -> LossOutput:
        """The loss on each utterance's targets, as sums over tokens. Independent of packing and neighbours."""
        frames, lengths = self.encoder(batch.features, batch.langs, chunk_s)
        speech = self.projector(frames, lengths)
        inputs = self.decoder_inputs(batch.prompts, speech, batch.targets)
        hidden = packed_hidden_states(self.llm, inputs)  # [T, H]

        num_targets = [len(ids) for ids in batch.targets]
        ends = itertools.accumulate(map(len, inputs))
        predicting = torch.cat([torch.arange(end - n - 1, end - 1) for end, n in zip(ends, num_targets, strict=True)])
        targets = torch.tensor(list(itertools.chain.from_iterable(batch.targets)), device=hidden.device)
        losses = token_losses(self.llm.lm_head, hidden[predicting.to(hidden.device)], targets)  # [P]

        utt_tokens = torch.tensor(num_targets, device=losses.device)
        utterance = torch.arange(len(num_targets), device=losses.device).repeat_interleave(utt_tokens)
        utt_loss = losses.new_zeros(len(num_targets)).index_add(0, utterance, losses.detach())
        utt_ctc = self._ctc_losses(frames, lengths, batch.ctc_targets) if self.ctc else None
        return LossOutput(losses.sum(), sum(num_targets), utt_loss, utt_tokens, utt_ctc)

    def _ctc_losses(self, frames: Tensor, lengths: Sequence[int], targets: Sequence[Sequence[int]]) -> Tensor:
        """[U]: the CTC loss of each utterance, from the frames [T, D] of all; 0 without targets."""
        said = [u for u, ids in enumerate(targets) if ids]
        losses = torch.zeros(len(targets), device=frames.device)
        if not said:
            return losses
        log_probs = self.ctc(frames).split(list(lengths))
        some = alignment.ctc_loss([log_probs[u] for u in said], [targets[u] for u in said])
        return losses.index_add(0, torch.tensor(said, device=frames.device), some)

    def merged(self, lang: str | None = None) -> "SpeechLLM":
        """This model for one language, with plain linear layers where the method has them (not FlyLoRA).

        Without a language it remains one for all: only what does not depend on the language is merged. All tensors
        without an adapter are shared.
        """
        shared = [*self.parameters(), *self.buffers(), *self.language_embeddings.values(), self.tokenizer]
        layers = adapted_layers(self).values()
        adapted = [layer for layer in layers if layer.can_merge and (lang or not layer.by_language)]
        memo = {id(thing): thing for thing in shared} | {id(layer): layer.merged(lang) for layer in adapted}
        return copy.deepcopy(self, memo)


def stage_tensors(model: SpeechLLM, stage: int) -> dict[str, Tensor]:
    """What a stage trains and a checkpoint of it holds, by name (section IV-F of arXiv:2603.17558).

    Stage 1: encoder, projector, LLM LoRA. Stage 2: encoder adapters, projector, LLM LoRA. Both: the CTC head, where
    there is one. Buffers of adapters are among them: FlyLoRA's frozen A decides what its B means.
    """
    adapters = adapter_state(model)
    belongs = {
        "encoder": lambda name: (name in adapters) == (stage == 2),
        "projector": lambda name: True,
        "llm": lambda name: name in adapters,
        "ctc": lambda name: True,
    }
    tensors = dict(model.named_parameters()) | adapters
    return {name: t for name, t in tensors.items() if belongs[name.partition(".")[0]](name)}


def set_trainable(model: SpeechLLM, stage: int) -> list[str]:
    """Freeze everything but what the stage trains, and return the names of that."""
    names = [name for name, t in stage_tensors(model, stage).items() if isinstance(t, nn.Parameter)]
    parts = {name.partition(".")[0] for name in names}
    assert parts == {"encoder", "projector", "llm"}, f"stage {stage} would train only {sorted(parts)}"
    model.requires_grad_(False)
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    model.stage = stage
    return names

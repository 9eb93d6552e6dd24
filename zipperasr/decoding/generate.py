"""Hypotheses of a batch of utterances: encode, put the speech behind the prompt, let the LLM write.

Legend: N utterances, T positions of the longest input, S new tokens, H LLM width, V vocabulary.

A hypothesis depends on nothing but its utterance: inputs are padded on the left and masked, positions count from an
input's own first token, and each utterance has its own cap on new tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import LogitsProcessor, StoppingCriteria

from zipperasr import prompts
from zipperasr.decoding import DecodingSettings
from zipperasr.model.speech_llm import SpeechLLM


@dataclass(frozen=True)
class Hypothesis:
    """What the LLM wrote. `logprob` is the mean over its `num_tokens` tokens, end-of-text included."""

    text: str
    logprob: float
    num_tokens: int
    is_capped: bool


@torch.inference_mode()
def transcribe(
    model: SpeechLLM, speech: Sequence[Tensor], lang: str, caps: Sequence[int], settings: DecodingSettings
) -> list[Hypothesis]:
    """The best hypothesis of each utterance.

    `speech` holds the projector's embeddings [S_u, H] of utterances in `lang`, `caps` the most tokens each may take.
    """
    end_of_text = model.tokenizer.end_of_text
    prompt = prompts.prompt_ids(model.tokenizer, lang)
    inputs, mask = _pad_left(model.decoder_inputs([prompt] * len(speech), speech))
    best = _BestLogprobs()
    out = model.llm.generate(
        inputs_embeds=inputs,
        attention_mask=mask,
        generation_config=_generation_config(settings, max(caps), end_of_text),
        stopping_criteria=[_Caps(torch.tensor(caps, device=inputs.device))],
        logits_processor=[best] if settings.beam == 1 else [],
    )
    rows = [_until(row[:cap], end_of_text) for row, cap in zip(out.sequences.tolist(), caps, strict=True)]
    if settings.beam == 1:
        means = [scores[: len(row)].mean() for scores, row in zip(best.logprobs(), rows, strict=True)]
    else:  # ranked by sum / S ** length_penalty
        scores = out.sequences_scores.tolist()
        means = [score * len(row) ** (settings.length_penalty - 1) for score, row in zip(scores, rows, strict=True)]
    return [_hypothesis(model.tokenizer, row, float(mean)) for row, mean in zip(rows, means, strict=True)]


def _pad_left(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Inputs [T_u, H] as one tensor [N, T, H] with zeros before the shorter ones, and its mask [N, T] of 0 and 1."""
    missing = [max(map(len, inputs)) - len(x) for x in inputs]
    padded = torch.stack([F.pad(x, (0, 0, n, 0)) for x, n in zip(inputs, missing, strict=True)])
    mask = torch.arange(padded.shape[1]) >= torch.tensor(missing)[:, None]
    return padded, mask.long().to(padded.device)


def _generation_config(settings: DecodingSettings, max_new_tokens: int, end_of_text: int) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=settings.beam,
        length_penalty=settings.length_penalty,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
        return_dict_in_generate=True,
        output_scores=settings.beam > 1,
    )


def _until(row: list[int], end_of_text: int) -> list[int]:
    """`row` up to and with its first end-of-text, where it has one."""
    return row[: row.index(end_of_text) + 1] if end_of_text in row else row


def _hypothesis(tokenizer: prompts.Tokenizer, row: list[int], logprob: float) -> Hypothesis:
    is_capped = row[-1] != tokenizer.end_of_text
    text = tokenizer.decode(row if is_capped else row[:-1])
    return Hypothesis(" ".join(text.split()), logprob, len(row), is_capped)


class _Caps(StoppingCriteria):
    """Stops each utterance at its own number of new tokens, whatever its neighbours do."""

    def __init__(self, caps: Tensor) -> None:
        self.caps = caps  # [N]

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        per_utterance = len(input_ids) // len(self.caps)  # candidates of a beam search stand side by side
        return input_ids.shape[1] >= self.caps.repeat_interleave(per_utterance)


class _BestLogprobs(LogitsProcessor):
    """Keeps the log-probability of the token that greedy search takes, and not the [N, V] logits of every step."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores.log_softmax(-1).amax(-1))  # [N]
        return scores

    def logprobs(self) -> Tensor:
        """[N, S]"""
        return torch.stack(self.steps, dim=1).cpu()

"""Hypotheses of a batch of utterances: put the speech behind the prompt, let the LLM write, mend what it made up.

Legend: N utterances, T positions of the longest input, S new tokens, P tokens of the prompt, H LLM width, V vocabulary,
F_u feature frames, T_u encoder frames and S_u speech tokens of an utterance, D encoder width.

A hypothesis depends on nothing but its utterance: speech is padded on the left and masked, positions count without
the padding, each utterance has its own cap on new tokens, and is mended alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.generation import LogitsProcessor, StoppingCriteria

from zipperasr import languages, prompts
from zipperasr.decoding import DecodingSettings
from zipperasr.decoding.guards import NoLoops, OwnScript, foreign_tokens, is_foreign, loop_start
from zipperasr.model.clock import clock
from zipperasr.model.speech_llm import SpeechLLM

MAX_UNIT = 50  # tokens of what the second search may not say three times in a row
POSITIONS = 64  # a batch's positions are a multiple of this, so that few shapes have to be compiled


@dataclass(frozen=True)
class Hypothesis:
    """What the LLM wrote: its tokens with their mean log-probability, end-of-text included, and their text.

    `flags` say which guard has acted: `capped`, `loop`, `script`, `redecoded`, `cut` (zipperasr/decoding/decode.py).
    """

    ids: list[int]
    text: str
    logprob: float
    flags: tuple[str, ...] = ()
    first_text: str | None = None


@dataclass
class Seconds:
    """What was spent on encoder and projector, on reading the speech, on the steps that followed, and on the text."""

    encoder_s: float = 0.0
    prefill_s: float = 0.0
    step_s: float = 0.0
    detokenise_s: float = 0.0


@dataclass
class Transcriber:
    """A model that transcribes one language; the LLM reads its prompt once for all utterances."""

    model: SpeechLLM
    lang: str
    settings: DecodingSettings
    seconds: Seconds = field(default_factory=Seconds)

    @torch.inference_mode()
    def __post_init__(self) -> None:
        self.language, self.end_of_text = languages.get(self.lang), self.model.tokenizer.end_of_text
        (self.prompt,) = self.model.embed([prompts.prompt_ids(self.model.tokenizer, self.lang)])  # [P, H]
        cache = DynamicCache(config=self.model.llm.config)
        self.model.llm.model(inputs_embeds=self.prompt[None], past_key_values=cache, use_cache=True)
        self.read_prompt = [(layer.keys, layer.values) for layer in cache.layers]
        self.foreign: Tensor | None = None

    @torch.inference_mode()
    def encode(self, features: Sequence[Tensor], chunk_s: float) -> tuple[list[Tensor], list[Tensor]]:
        """Features [F_u, bins] -> the projector's embeddings [S_u, H] and the encoder's frames [T_u, D] of each."""
        started, device = clock(), self.prompt.device
        frames, lengths = self.model.encoder([x.to(device) for x in features], [self.lang] * len(features), chunk_s)
        speech = self.model.projector(frames, lengths)
        self.seconds.encoder_s += clock() - started
        return speech, list(frames.split(lengths))

    @torch.inference_mode()
    def __call__(self, speech: Sequence[Tensor], caps: Sequence[int]) -> list[Hypothesis]:
        """The hypothesis of each utterance, from the projector's embeddings [S_u, H], in at most `caps` tokens.

        A loop, and a text in another script, is searched for once more without; if that does not end, a loop is cut.
        """
        found = [self._read(*said) for said in self._search(speech, caps)]
        again = [i for i, first in enumerate(found) if {"loop", "script"} & set(first.flags)]
        if again:
            constraints = self._constraints()
            second = self._search([speech[i] for i in again], [caps[i] for i in again], constraints)
            for i, said in zip(again, second, strict=True):
                found[i] = self._mended(found[i], self._read(*said))
        return found

    def _search(
        self, speech: Sequence[Tensor], caps: Sequence[int], constraints: Sequence[LogitsProcessor] = ()
    ) -> list[tuple[list[int], float]]:
        """The tokens of each utterance, and the mean of their log-probabilities."""
        settings, started = self.settings, clock()
        inputs, mask = self._inputs(speech)
        watch = _Watch(constraints if settings.beam == 1 else ())
        out = self.model.llm.generate(
            inputs_embeds=inputs,
            attention_mask=mask,
            past_key_values=self._cache(len(speech) * settings.beam, inputs.shape[1] + max(caps)),
            generation_config=self._config(max(caps)),
            stopping_criteria=[_Caps(torch.tensor(caps, device=inputs.device))],
            logits_processor=[watch] if settings.beam == 1 else [*constraints, watch],
        )
        rows = [_until(row[:cap], self.end_of_text) for row, cap in zip(out.sequences.tolist(), caps, strict=True)]
        if settings.beam == 1:
            scores = watch.logprobs()
            means = [row_scores[: len(row)].mean().item() for row_scores, row in zip(scores, rows, strict=True)]
        else:  # ranked by sum / S ** length_penalty
            scores = out.sequences_scores.tolist()
            means = [score * len(row) ** (settings.length_penalty - 1) for score, row in zip(scores, rows, strict=True)]
        self.seconds.prefill_s += watch.first_step - started
        self.seconds.step_s += clock() - watch.first_step
        return list(zip(rows, means, strict=True))

    def _inputs(self, speech: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Prompt, padding and speech [N, T, H], and the mask [N, T] that is 0 where the padding is."""
        missing = torch.tensor([max(map(len, speech)) - len(x) for x in speech])
        prompt = self.prompt.to(speech[0].dtype)
        rows = [torch.cat([prompt, F.pad(x, (0, 0, n, 0))]) for x, n in zip(speech, missing.tolist(), strict=True)]
        inputs, place = torch.stack(rows), torch.arange(len(rows[0])) - len(prompt)
        return inputs, ((place < 0) | (place >= missing[:, None])).long().to(inputs.device)

    def _cache(self, num_rows: int, length: int) -> DynamicCache | StaticCache:
        """A cache that holds the prompt in each of its rows; on a GPU of a fixed size, for which steps are compiled."""
        config, device = self.model.llm.config, self.prompt.device
        if self.settings.static_cache or (self.settings.static_cache is None and device.type == "cuda"):
            cache = StaticCache(config=config, max_cache_len=-(-length // POSITIONS) * POSITIONS)
        else:
            cache = DynamicCache(config=config)
        for i, states in enumerate(self.read_prompt):
            cache.update(*(x.expand(num_rows, -1, -1, -1) for x in states), i)
        return cache

    def _config(self, max_new_tokens: int) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=self.settings.beam,
            length_penalty=self.settings.length_penalty,
            eos_token_id=self.end_of_text,
            pad_token_id=self.end_of_text,
            return_dict_in_generate=True,
            output_scores=self.settings.beam > 1,
        )

    def _read(self, ids: list[int], logprob: float) -> Hypothesis:
        """What tokens say, and what is wrong with it."""
        started = clock()
        text = self._text(ids)
        flags = {
            "capped": ids[-1] != self.end_of_text,
            "loop": loop_start(ids, self.settings.loop_repeats) is not None,
            "script": is_foreign(text, self.language, self.settings.max_foreign_share),
        }
        self.seconds.detokenise_s += clock() - started
        raised = tuple(flag for flag, is_raised in flags.items() if is_raised)
        return Hypothesis(ids, text, logprob, raised)

    def _mended(self, first: Hypothesis, second: Hypothesis) -> Hypothesis:
        """The second hypothesis, if it is whole, or else the first without the rounds of its loop."""
        if not second.flags:
            return replace(second, flags=(*first.flags, "redecoded"), first_text=first.text)
        if "loop" not in first.flags:
            return first
        cut = self._text(first.ids[: loop_start(first.ids, self.settings.loop_repeats)])
        return replace(first, text=cut, flags=(*first.flags, "cut"), first_text=first.text)

    def _constraints(self) -> list[LogitsProcessor]:
        if self.foreign is None:
            tokenizer, table = self.model.tokenizer, self.model.llm.get_input_embeddings()
            self.foreign = foreign_tokens(tokenizer, table.num_embeddings, self.language).to(self.prompt.device)
        return [OwnScript(self.foreign), NoLoops(MAX_UNIT)]

    def _text(self, ids: list[int]) -> str:
        return " ".join(self.model.tokenizer.decode([i for i in ids if i != self.end_of_text]).split())


def _until(row: list[int], end_of_text: int) -> list[int]:
    """`row` up to and with its first end-of-text, where it has one."""
    return row[: row.index(end_of_text) + 1] if end_of_text in row else row


class _Caps(StoppingCriteria):
    """Stops each utterance at its own number of new tokens, whatever its neighbours do."""

    def __init__(self, caps: Tensor) -> None:
        self.caps = caps  # [N]

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        per_utterance = len(input_ids) // len(self.caps)  # candidates of a beam search stand side by side
        return input_ids.shape[1] >= self.caps.repeat_interleave(per_utterance)


class _Watch(LogitsProcessor):
    """Keeps when the first step began, and the log-probability of each token that greedy search takes.

    The [N, V] logits of every step are not kept. What `constraints` forbid has no part in the choice, but does in the
    log-probability, which is the model's.
    """

    def __init__(self, constraints: Sequence[LogitsProcessor]) -> None:
        self.constraints, self.steps, self.first_step = constraints, [], 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.first_step = self.first_step or clock()
        allowed = scores
        for constraint in self.constraints:
            allowed = constraint(input_ids, allowed)
        self.steps.append(scores.log_softmax(-1).gather(1, allowed.argmax(-1, keepdim=True))[:, 0])
        return allowed

    def logprobs(self) -> Tensor:
        """[N, S]"""
        return torch.stack(self.steps, dim=1).cpu()

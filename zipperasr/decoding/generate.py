"""Hypotheses of a batch of utterances: put the speech behind the prompt, let the LLM write, mend what it made up.

Legend: N utterances, T positions of the longest input, S new tokens, P tokens of the longest prompt, H LLM width, V
vocabulary, F_u feature frames, T_u encoder frames and S_u speech tokens of an utterance, P_l tokens of a language's
prompt, D encoder width.

A hypothesis depends on nothing but its utterance: prompt and speech are padded on the left and masked, positions count
without the padding, each utterance has its own language and its own cap on new tokens, and is mended alone.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

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


class Prompt(NamedTuple):
    """A language's prompt: its embeddings [P_l, H], and the LLM's keys and values [1, heads, P_l, width] by layer."""

    embeddings: Tensor
    states: list[tuple[Tensor, Tensor]]


@dataclass
class Transcriber:
    """A model that transcribes utterances of any languages together; the LLM reads each language's prompt once."""

    model: SpeechLLM
    settings: DecodingSettings
    seconds: Seconds = field(default_factory=Seconds)

    def __post_init__(self) -> None:
        self.device, self.end_of_text = self.model.llm.device, self.model.tokenizer.end_of_text
        self.prompts: dict[str, Prompt] = {}
        self.foreign: dict[str, Tensor] = {}

    @torch.inference_mode()
    def prompt(self, lang: str) -> Prompt:
        """The prompt of a language. Raises UserError for one that is not known."""
        if lang not in self.prompts:
            (embeddings,) = self.model.embed([prompts.prompt_ids(self.model.tokenizer, lang)])
            cache = DynamicCache(config=self.model.llm.config)
            self.model.llm.model(inputs_embeds=embeddings[None], past_key_values=cache, use_cache=True)
            self.prompts[lang] = Prompt(embeddings, [(layer.keys, layer.values) for layer in cache.layers])
        return self.prompts[lang]

    def prompt_tokens(self, langs: Iterable[str]) -> int:
        """P of these languages."""
        return max(len(self.prompt(lang).embeddings) for lang in langs)

    @torch.inference_mode()
    def encode(
        self, features: Sequence[Tensor], langs: Sequence[str], chunk_s: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Features [F_u, bins] -> the projector's embeddings [S_u, H] and the encoder's frames [T_u, D] of each.

        Utterances of one language should be neighbours. Raises UserError for a segment longer than the encoder takes.
        """
        started = clock()
        frames, lengths = self.model.encoder([x.to(self.device) for x in features], langs, chunk_s)
        speech = self.model.projector(frames, lengths)
        self.seconds.encoder_s += clock() - started
        return speech, list(frames.split(lengths))

    @torch.inference_mode()
    def __call__(self, speech: Sequence[Tensor], langs: Sequence[str], caps: Sequence[int]) -> list[Hypothesis]:
        """The hypothesis of each utterance, from the projector's embeddings [S_u, H], in at most `caps` tokens.

        A loop, and a text in another script, is searched for once more without; if that does not end, a loop is cut.
        """
        found = [self._read(*said, lang) for said, lang in zip(self._search(speech, langs, caps), langs, strict=True)]
        again = [i for i, first in enumerate(found) if {"loop", "script"} & set(first.flags)]
        if again:
            some, some_langs, some_caps = ([values[i] for i in again] for values in (speech, langs, caps))
            second = self._search(some, some_langs, some_caps, self._constraints(some_langs))
            for i, lang, said in zip(again, some_langs, second, strict=True):
                found[i] = self._mended(found[i], self._read(*said, lang))
        return found

    def _search(
        self,
        speech: Sequence[Tensor],
        langs: Sequence[str],
        caps: Sequence[int],
        constraints: Sequence[LogitsProcessor] = (),
    ) -> list[tuple[list[int], float]]:
        """The tokens of each utterance, and the mean of their log-probabilities."""
        settings, started = self.settings, clock()
        inputs, mask = self._inputs(speech, langs)
        watch = _Watch(constraints if settings.beam == 1 else ())
        out = self.model.llm.generate(
            inputs_embeds=inputs,
            attention_mask=mask,
            past_key_values=self._cache(langs, inputs.shape[1] + max(caps)),
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

    def _inputs(self, speech: Sequence[Tensor], langs: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Padding, prompt, padding and speech [N, T, H], and the mask [N, T] that is 0 where the padding is."""
        parts = [self.prompt(lang).embeddings.to(x.dtype) for lang, x in zip(langs, speech, strict=True)], speech
        padded, masks = zip(*(_padded(part) for part in parts), strict=True)
        return torch.cat(padded, 1), torch.cat(masks, 1)

    def _cache(self, langs: Sequence[str], length: int) -> DynamicCache | StaticCache:
        """A cache that holds each row's prompt; on a GPU of a fixed size, for which steps are compiled."""
        config = self.model.llm.config
        if self.settings.static_cache or (self.settings.static_cache is None and self.device.type == "cuda"):
            cache = StaticCache(config=config, max_cache_len=-(-length // POSITIONS) * POSITIONS)
        else:
            cache = DynamicCache(config=config)
        distinct, longest = list(dict.fromkeys(langs)), self.prompt_tokens(langs)
        rows = torch.tensor([distinct.index(lang) for lang in langs], device=self.device)
        rows = rows.repeat_interleave(self.settings.beam)
        for i, layers in enumerate(zip(*(self.prompt(lang).states for lang in distinct), strict=True)):
            states = (torch.cat([F.pad(x, (0, 0, longest - x.shape[2], 0)) for x in xs]) for xs in zip(*layers))
            cache.update(*(x[rows] for x in states), i)
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

    def _read(self, ids: list[int], logprob: float, lang: str) -> Hypothesis:
        """What tokens say, and what is wrong with it."""
        started = clock()
        text = self._text(ids)
        flags = {
            "capped": ids[-1] != self.end_of_text,
            "loop": loop_start(ids, self.settings.loop_repeats) is not None,
            "script": is_foreign(text, languages.get(lang), self.settings.max_foreign_share),
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

    def _constraints(self, langs: Sequence[str]) -> list[LogitsProcessor]:
        for lang in dict.fromkeys(langs):
            if lang not in self.foreign:
                size = self.model.llm.get_input_embeddings().num_embeddings
                self.foreign[lang] = foreign_tokens(self.model.tokenizer, size, languages.get(lang)).to(self.device)
        foreign = torch.stack([self.foreign[lang] for lang in langs]).repeat_interleave(self.settings.beam, 0)
        return [OwnScript(foreign), NoLoops(MAX_UNIT)]

    def _text(self, ids: list[int]) -> str:
        return " ".join(self.model.tokenizer.decode([i for i in ids if i != self.end_of_text]).split())


def _padded(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences [n, H] padded on the left to the longest, [N, n, H], and the mask [N, n] of what is not padding."""
    missing = torch.tensor([max(map(len, parts)) - len(x) for x in parts])
    padded = torch.stack([F.pad(x, (0, 0, n, 0)) for x, n in zip(parts, missing.tolist(), strict=True)])
    return padded, (torch.arange(padded.shape[1]) >= missing[:, None]).long().to(padded.device)


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

"""Transcribing sets with a trained run. This module holds the settings only, so that it is instant to import."""

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from zipperasr.config import Settings


class DecodingSettings(Settings):
    """How hypotheses are searched, and when a search is cut off.

    `beam` 1 is greedy; a hypothesis of S tokens is ranked by its log-probability / S ** `length_penalty`.
    An utterance may take `max_tokens_per_s` tokens for each second of its audio, or `min_max_tokens` if that is more: a
    cap that depends on nothing but the utterance. `max_tokens_per_batch` bounds a batch's positions (prompt, speech and
    cap of its longest utterance, times utterances, times beams) and so its memory; results do not depend on it.
    """

    beam: PositiveInt = 1
    length_penalty: NonNegativeFloat = 1.0
    max_tokens_per_s: PositiveFloat = 20.0
    min_max_tokens: PositiveInt = 20
    max_tokens_per_batch: PositiveInt = 16384

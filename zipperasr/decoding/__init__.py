"""Transcribing sets with a trained run. This module holds the settings only, so that it is instant to import."""

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from zipperasr.config import Settings


class DecodingSettings(Settings):
    """How hypotheses are searched, and when a search is cut off.

    `beam` 1 is greedy; a hypothesis of S tokens is ranked by its log-probability / S ** `length_penalty`.
    An utterance may take `max_tokens_per_s` tokens for each second of its audio, or `min_max_tokens` if that is more: a
    cap that depends on nothing but the utterance. `max_tokens_per_batch` bounds a batch's positions (prompt, speech and
    cap of its longest utterance, times utterances, times beams) and so its memory; results do not depend on it. With a
    `static_cache` (None: on a GPU) keys and values have a fixed size, and the step is compiled.

    Guards, each of which raises flags (zipperasr/decoding/decode.py). Nothing is decoded where the features are below
    `min_level_db`, or their level varies by less than `min_modulation_db` (guards.has_speech): silence, noise and hum
    have empty text. A unit of tokens `loop_repeats` times in a row, or more than `max_foreign_share` of the letters in
    another language's script, and the utterance is decoded once more without loops and such letters.
    """

    beam: PositiveInt = 1
    length_penalty: NonNegativeFloat = 1.0
    max_tokens_per_s: PositiveFloat = 20.0
    min_max_tokens: PositiveInt = 20
    max_tokens_per_batch: PositiveInt = 16384
    static_cache: bool | None = None
    min_level_db: float = -80.0
    min_modulation_db: NonNegativeFloat = 1.0
    loop_repeats: int = Field(6, ge=3)
    max_foreign_share: float = Field(0.5, ge=0, le=1)


class TranscriptionSettings(Settings):
    """How audio of any length is cut (decoding/segments.py), and when a given language is doubted.

    A segment is at most `max_segment_s` long, or as long as the encoder takes if that is less, and is cut in a pause of
    `min_pause_s` or more where there is one, `margin_s` before speech and behind it. A model does best on what is about
    as long, and begins about as soon, as what it was trained on.
    A language that was given is doubted where Whisper gives another one a probability of at least `doubt`.
    """

    max_segment_s: float = Field(25.0, ge=1, le=30)
    min_pause_s: PositiveFloat = 0.2
    margin_s: float = Field(0.2, ge=0.01, le=1)
    doubt: float = Field(0.8, gt=0.5, le=1)

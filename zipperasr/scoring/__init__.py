"""Word and character error rates of decode directories. Nothing here imports torch."""

from typing import Literal

from zipperasr.config import Settings


class ScoringSettings(Settings):
    """How hypotheses and references are compared; `profile` is a key of `normalise.PROFILES`."""

    profile: Literal["whisper", "marks"] = "whisper"

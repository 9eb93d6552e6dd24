"""A trained run as an HTTP service. This module holds the settings only, so that it is instant to import."""

from pydantic import PositiveFloat, PositiveInt

from zipperasr.config import Settings


class ServingSettings(Settings):
    """What the service accepts, and how long it takes for it.

    A request that finds `max_requests` others, which are being uploaded, wait or are being transcribed, is told to come
    again later (429). An upload may have `max_upload_mb`, of audio of `max_audio_s`; nothing may come for `idle_s`, and
    it must be there after `upload_s`. A transcript that is not there after `answer_s` is given up. After a signal to
    end, what is in flight has `drain_s`.
    With `check_language` the language that a request names is doubted where Whisper is sure of another one, as by
    zipperasr transcribe; its encoder then runs too, which costs about as much as the transcript.
    """

    max_requests: PositiveInt = 64
    max_upload_mb: PositiveFloat = 200.0
    max_audio_s: PositiveFloat = 4 * 3600.0
    idle_s: PositiveFloat = 10.0
    upload_s: PositiveFloat = 120.0
    answer_s: PositiveFloat = 600.0
    drain_s: PositiveFloat = 60.0
    check_language: bool = False

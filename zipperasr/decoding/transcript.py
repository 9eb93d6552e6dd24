"""What transcribing gives: segments with text and, where there is an aligner, words with times.

Times are seconds from where the input begins: of an utterance or a cut, not of its recording.
"""

from dataclasses import asdict, dataclass
from typing import Any

from zipperasr.alignment.words import Word


@dataclass(frozen=True)
class Segment:
    """A piece of audio and what was said in it. `logprob` is the mean over tokens, None where nothing was decoded.

    `flags`: those of zipperasr/decoding/decode.py, and `unaligned` (it has text, and no word could be timed). `words`
    is None where there is no aligner.
    """

    start_s: float
    end_s: float
    text: str
    logprob: float | None = None
    flags: tuple[str, ...] = ()
    words: tuple[Word, ...] | None = None


@dataclass(frozen=True)
class Transcript:
    """All that is known about one input.

    Of `num_channels` the mean was transcribed; None where ffmpeg has mixed them, or the input has picked some.
    `language_probability` is that of `language`, and `detected_language` the most probable one; both are None where
    nothing could be detected, and `language` too where nothing was said. Flags: `no_speech` (no segment has any), and
    `language_doubt` (the language was given, and Whisper is sure that it is another).
    """

    file: str
    duration_s: float
    num_channels: int | None
    language: str | None
    language_probability: float | None
    detected_language: str | None
    flags: tuple[str, ...]
    segments: tuple[Segment, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `words` is there only where they are known."""
        tree = asdict(self)
        for segment in tree["segments"]:
            if segment["words"] is None:
                del segment["words"]
        return tree

"""Transcripts in the shapes of OpenAI's API, and what more is known under further keys."""

import json
import zlib
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

from fastapi.responses import JSONResponse, PlainTextResponse, Response

from zipperasr import languages
from zipperasr.alignment.words import Word
from zipperasr.decoding.formats import FORMATS, one_line
from zipperasr.decoding.transcript import Segment, Transcript
from zipperasr.serving.fields import Wanted

MEDIA_TYPES = {"text": "text/plain", "srt": "application/x-subrip; charset=utf-8", "vtt": "text/vtt"}


def response(transcript: Transcript, wanted: Wanted) -> Response:
    """The answer in the format that is wanted. Where that has no place for warnings, they are in X-Warnings."""
    if wanted.format not in MEDIA_TYPES:
        return JSONResponse((verbose if wanted.format == "verbose_json" else brief)(transcript, wanted))
    text = f"{one_line(transcript)}\n" if wanted.format == "text" else FORMATS[wanted.format](transcript)
    said = "; ".join(wanted.warnings).encode("ascii", "backslashreplace").decode()
    headers = {"X-Warnings": said} if said else None
    return PlainTextResponse(text, headers=headers, media_type=MEDIA_TYPES[wanted.format])


def brief(transcript: Transcript, wanted: Wanted) -> dict[str, Any]:
    """`json`: text, usage, and warnings if there are any."""
    usage = {"type": "duration", "seconds": transcript.duration_s}
    warnings = {"warnings": list(wanted.warnings)} if wanted.warnings else {}
    return {"text": one_line(transcript), "usage": usage} | warnings


def verbose(transcript: Transcript, wanted: Wanted) -> dict[str, Any]:
    """`verbose_json`: segments, words if they are wanted, and what is known of the language."""
    words = [word for segment in transcript.segments for word in segment.words or ()]
    return {
        "task": "transcribe",
        "language": transcript.language,
        "duration": transcript.duration_s,
        **({"words": [_word(word) for word in words]} if wanted.has_words else {}),
        "segments": [_segment(i, segment) for i, segment in enumerate(transcript.segments)],
        "language_probability": transcript.language_probability,
        "detected_language": transcript.detected_language,
        "flags": list(transcript.flags),
    } | brief(transcript, wanted)


async def events(items: AsyncIterable[str | Segment | Transcript], wanted: Wanted) -> AsyncIterator[dict[str, Any]]:
    """Each segment and its text as they come, and the whole at the end. The deltas together are the text."""
    lang, num_segments, is_first = wanted.lang, 0, True
    async for item in items:
        if isinstance(item, str):
            lang = item
        elif isinstance(item, Transcript):
            yield _done(item, wanted)
        else:
            if item.text:
                space = " " if not is_first and (lang is None or languages.get(lang).is_spaced) else ""
                yield {"type": "transcript.text.delta", "delta": space + item.text}
                is_first = False
            yield {"type": "transcript.text.segment", **_segment(num_segments, item), "language": lang}
            num_segments += 1


def event(value: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _done(transcript: Transcript, wanted: Wanted) -> dict[str, Any]:
    subtitles = {name: FORMATS[name](transcript) for name in ("srt", "vtt")}
    whole = {"transcription": verbose(transcript, wanted)} if wanted.format == "verbose_json" else {}
    return {"type": "transcript.text.done", **brief(transcript, wanted), **subtitles, **whole}


def _segment(number: int, segment: Segment) -> dict[str, Any]:
    """OpenAI's keys, which are Whisper's; `avg_logprob` is 0 where nothing was decoded."""
    text = segment.text.encode()
    return {
        "id": number,
        "seek": round(100 * segment.start_s),
        "start": segment.start_s,
        "end": segment.end_s,
        "text": segment.text,
        "tokens": [],
        "temperature": 0.0,
        "avg_logprob": segment.logprob or 0.0,
        "compression_ratio": round(len(text) / len(zlib.compress(text)), 3),
        "no_speech_prob": 1.0 if "no_speech" in segment.flags else 0.0,
        "flags": list(segment.flags),
    } | ({} if segment.words is None else {"words": [_word(word) for word in segment.words]})


def _word(word: Word) -> dict[str, Any]:
    return {"word": word.text, "start": word.start_s, "end": word.end_s, "confidence": word.confidence}

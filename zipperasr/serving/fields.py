"""What a transcription request asks for."""

import reprlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from zipperasr import languages
from zipperasr.serving.refusal import Refusal

FORMATS = ("json", "text", "srt", "vtt", "verbose_json")
GRANULARITIES = ("word", "segment")
AUTO = "auto"
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class Wanted:
    """`lang` is None where it is to be detected; `warnings` say what is obeyed with doubts, and what is ignored."""

    lang: str | None
    format: str
    has_words: bool
    is_stream: bool
    warnings: tuple[str, ...]


def parse(
    fields: Iterable[tuple[str, str]], *, model: str, langs: Collection[str], can_detect: bool, has_words: bool
) -> Wanted:
    """What the fields of a form ask of the model, which was trained on `langs`.

    Raises Refusal (404 for another model, else 400) naming the field, its value and what is known.
    """
    values: dict[str, list[str]] = {}
    for name, value in fields:
        values.setdefault(name.removesuffix("[]"), []).append(value)

    def one(name: str, default: str) -> str:
        given = values.pop(name, [default])
        if len(given) > 1:
            raise Refusal(400, f"{name}: given {len(given)} times; give it once", param=name)
        return given[0] or default

    if (asked := one("model", model)) != model:
        raise Refusal(
            404, f"model: there is no {_shown(asked)}; this is '{model}'", param="model", code="model_not_found"
        )
    lang, warnings = _language(one("language", AUTO), langs, can_detect), []
    if lang and lang not in langs:
        warnings.append(f"language: the model was not trained on '{lang}', only on {', '.join(langs)}")
    format_ = _among(FORMATS, one("response_format", "json"), "response_format")
    granularities = [
        _among(GRANULARITIES, g, "timestamp_granularities[]") for g in values.pop("timestamp_granularities", [])
    ]
    if "word" in granularities:
        _check_words(format_, has_words)
    is_stream = BOOLEANS[_among(BOOLEANS, one("stream", "false").lower(), "stream")]
    if (temperature := one("temperature", "0")).strip("0.") != "":
        warnings.append(f"temperature: {_shown(temperature)} is ignored; decoding is deterministic")
    warnings += [f"{name[:40]!a}: ignored, the model has no use for it" for name, given in values.items() if any(given)]
    return Wanted(lang, format_, "word" in granularities, is_stream, tuple(warnings))


def _language(asked: str, langs: Collection[str], can_detect: bool) -> str | None:
    by_name = {row.name.lower(): row.code for row in languages.LANGUAGES.values()}
    code = by_name.get(asked.lower(), asked.lower())
    if code != AUTO and code not in languages.LANGUAGES:
        known = ", ".join(f"{row.code} ({row.name})" for row in languages.LANGUAGES.values())
        raise Refusal(400, f"language: {_shown(asked)} is unknown; known: auto, {known}", param="language")
    if code == AUTO and not can_detect:
        raise Refusal(400, f"language: this model cannot detect it; name one of {', '.join(langs)}", param="language")
    return None if code == AUTO else code


def _check_words(format_: str, has_words: bool) -> None:
    param = "timestamp_granularities[]"
    if format_ != "verbose_json":
        mend = "ask for response_format=verbose_json"
        raise Refusal(400, f"{param}: response_format '{format_}' has no words; {mend}", param=param)
    if not has_words:
        mend = "leave 'word' out, or have its owner run zipperasr train-aligner"
        raise Refusal(400, f"{param}: this model knows no times of words; {mend}", param=param)


def _among(known: Collection[str], value: str, param: str) -> str:
    if value not in known:
        raise Refusal(400, f"{param}: {_shown(value)} is unknown; known: {', '.join(known)}", param=param)
    return value


def _shown(value: str) -> str:
    """In quotes and escapes, and not too long."""
    return reprlib.repr(value)

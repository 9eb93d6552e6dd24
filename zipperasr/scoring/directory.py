"""Scores of a decode directory: `hyp` and `ref` in Kaldi text form -> `scores.json`, `per_utt`, `per_spk`, `align`."""

import importlib.metadata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rapidfuzz

import zipperasr
from zipperasr import files
from zipperasr.scoring import analysis, bootstrap, normalise
from zipperasr.scoring.score import Aligned, Counts, Decoded, grid, percent, read, read_per_utt, score


def score_directory(directory: Path | str, *, profile: str = "whisper", lang: str | None = None) -> dict[str, Any]:
    """Write `scores.json`, `per_utt`, `per_spk` and `align` into a decode directory; return what is in `scores.json`.

    That has both profiles; the other files, and its analysis, are of `profile`. Raises UserError as `read`, and for
    an unknown profile.
    """
    decoded = read(directory, lang=lang)
    refs, hyps, language = decoded.refs, decoded.hyps, decoded.language
    utterances = score(refs, hyps, language, profile)
    others = [name for name in normalise.PROFILES if name != profile and language.normaliser != "english"]  # all alike
    by_profile = {name: score(refs, hyps, language, name) for name in others}
    missing = [u.id for u in utterances if u.hyp is None]
    scores = {
        "set": decoded.set,
        "lang": language.code,
        "metric": language.metric,
        "unit": language.unit,
        "profile": profile,
        "num_utts": len(utterances),
        "num_missing": len(missing),
        "missing": missing,
        "num_empty_refs": num_empty(utterances),
        "flags": Counter(flag for row in decoded.utts.values() for flag in row.get("flags", [])),
        "profiles": {name: _summary(decoded, by_profile.get(name, utterances), name) for name in normalise.PROFILES},
        "analysis": analysis.analyse(utterances, refs.values(), hyps.values(), language, decoded.utts),
    }
    speakers = {utt_id: row["speaker"] for utt_id, row in decoded.utts.items() if row.get("speaker")}
    _write(decoded.directory / "per_utt", _per_utt(utterances))
    _write(decoded.directory / "align", (line for u in utterances for line in _alignment(u, language.metric)))
    (decoded.directory / "per_spk").unlink(missing_ok=True)
    if speakers:
        _write(decoded.directory / "per_spk", _per_spk(utterances, speakers))
    files.write_json(decoded.directory / "scores.json", scores)
    return scores


def averages(directories: Iterable[Path]) -> dict[str, Any]:
    """Averages over scored directories, of their headline profiles: `macro`, its `interval`, `num_langs`, and `micro`.

    Macro is the mean over languages of the mean over each one's sets; None where a set has no rate. Micro is the Counts
    of all languages scored by word, and of all scored by character, by metric: not of both, because a sum of words and
    characters weighs a language by how finely it is cut.
    """
    rates, drawn, micro = [], [], {}
    for directory in directories:
        scores, counts = files.read_json(directory / "scores.json"), read_per_utt(directory / "per_utt")
        total = sum(counts.values(), Counts())
        micro[scores["metric"]] = micro.get(scores["metric"], Counts()) + total
        rates.append((scores["lang"], total.error_rate))
        drawn.append((scores["lang"], resample(counts, scores["set"])))
    found = {"macro": None, "interval": None, "num_langs": len(dict(rates)), "micro": micro}
    if all(rate is not None for _, rate in rates):
        found |= {"macro": bootstrap.macro(rates), "interval": bootstrap.interval(bootstrap.macro(drawn))}
    return found


def signature(decoded: Decoded, profile: str, utterances: Sequence[Aligned]) -> str:
    """Everything that a number depends on beside the two texts: two scores compare only if their signatures agree."""
    versions = {"zipperasr": zipperasr.__version__}
    versions |= {"whisper": importlib.metadata.version("openai-whisper"), "rapidfuzz": rapidfuzz.__version__}
    lang, meta = decoded.language, decoded.meta
    parts = {"unit": lang.unit, "profile": profile, "lang": lang.code, **versions, "unseen": meta.get("unseen_policy")}
    parts |= {"as": meta.get("as"), "first": meta.get("first"), "utts": len(utterances), "empty": num_empty(utterances)}
    return "|".join([lang.metric, *(f"{key}:{value}" for key, value in parts.items() if value is not None)])


def num_empty(utterances: Iterable[Aligned]) -> int:
    """How many references have no unit after normalisation."""
    return sum(not u.ref for u in utterances)


def resample(counts: dict[str, Counts], set_name: str) -> np.ndarray:
    """`bootstrap.distribution` of a set's error rate, from its utterances' counts by id, in whatever order."""
    in_order = [counts[utt_id] for utt_id in sorted(counts)]
    errors, lengths = [c.errors for c in in_order], [c.ref_len for c in in_order]
    return bootstrap.distribution(errors, lengths, seed=bootstrap.seed_of(set_name))


def _summary(decoded: Decoded, utterances: Sequence[Aligned], profile: str) -> dict[str, Any]:
    counts = {u.id: u.counts for u in utterances}
    total = sum(counts.values(), Counts())
    return {
        **total.as_dict(),
        "error_rate": total.error_rate,
        "interval": bootstrap.interval(resample(counts, decoded.set)) if total.ref_len else None,
        "signature": signature(decoded, profile, utterances),
    }


def _per_utt(utterances: Iterable[Aligned]) -> Iterator[str]:
    yield _header("id")
    yield from (_row(u.counts, u.id) for u in utterances)


def _per_spk(utterances: Iterable[Aligned], speakers: dict[str, str]) -> Iterator[str]:
    """Rows of speakers, sorted; utterances without a speaker are those of "-"."""
    by_speaker: dict[str, list[Counts]] = {}
    for u in utterances:
        by_speaker.setdefault(speakers.get(u.id, "-"), []).append(u.counts)
    yield _header("speaker", "num_utts")
    yield from (_row(sum(by_speaker[name], Counts()), name, len(by_speaker[name])) for name in sorted(by_speaker))


def _header(*first: str) -> str:
    return "\t".join((*first, *Counts().as_dict(), "rate")) + "\n"


def _row(counts: Counts, *first: str | int) -> str:
    return "\t".join(map(str, (*first, *counts.as_dict().values(), percent(counts.error_rate)))) + "\n"


def _alignment(u: Aligned, metric: str) -> Iterator[str]:
    c, note = u.counts, "  (no hypothesis)" if u.hyp is None else ""
    yield f"{u.id}  {metric} {percent(c.error_rate)}  "
    yield f"[{c.errors} / {c.ref_len}, {c.ins} ins, {c.dele} del, {c.sub} sub]{note}\n"
    yield from (f"{line}\n" for line in grid(u))
    yield "\n"


def _write(path: Path, lines: Iterable[str]) -> None:
    with files.write(path) as stream:
        stream.writelines(lines)

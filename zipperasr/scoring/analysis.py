"""What kind of errors a set has: words nobody said, utterances left out, the wrong script or language, long speech.

Script and language are told from the texts as they are; the references are judged too, as a yardstick: what is found
in them is the judge's own error, or speech that does switch.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from zipperasr.languages import LANGUAGES, Language, foreign_share
from zipperasr.scoring.score import Aligned, Counts

BURST = {"word": 5, "char": 10}  # insertions in a row: two seconds of speech (of Thai, one), more than a slip
DURATIONS_S = (0, 2, 5, 10, 20, 30, None)
MIN_LETTERS = 20  # of a text whose language can be told


def analyse(
    utterances: Sequence[Aligned], refs: Iterable[str], hyps: Iterable[str], language: Language, utts: dict[str, dict]
) -> dict[str, Any]:
    """The part `analysis` of scores.json: numbers of utterances, and counts by duration where `utts` has durations."""
    burst = BURST[language.unit]
    found = {
        "insertion_bursts": sum(u.counts.ins >= burst and longest_insertion(u) >= burst for u in utterances),
        "whole_deletions": sum(bool(u.ref) and not u.hyp for u in utterances),
        "script_mismatch": _script_mismatch(refs, hyps, language),
        "language_mismatch": _language_mismatch(refs, hyps, language.code),
    }
    durations = {utt_id: row["duration_s"] for utt_id, row in utts.items() if row.get("duration_s") is not None}
    return found | ({"by_duration": _by_duration(utterances, durations)} if durations else {})


def longest_insertion(utterance: Aligned) -> int:
    """The most words or characters that were inserted in a row."""
    groups = itertools.groupby(op for *_, op in utterance.columns)
    return max((len(list(group)) for op, group in groups if op == "I"), default=0)


def _script_mismatch(refs: Iterable[str], hyps: Iterable[str], language: Language) -> dict[str, int]:
    """Texts most of whose letters are foreign, of those that have letters."""
    in_refs, in_hyps = ([foreign_share(text, language) for text in texts] for texts in (refs, hyps))
    mostly = [sum(share is not None and share > 0.5 for share in shares) for shares in (in_hyps, in_refs)]
    return {"num": mostly[0], "of": len(in_hyps) - in_hyps.count(None), "num_in_refs": mostly[1]}


def _language_mismatch(refs: Iterable[str], hyps: Iterable[str], lang: str) -> dict[str, Any]:
    """Texts of another language, of those long enough to tell; none is where the identifier does not know `lang`."""
    in_refs, in_hyps = (Counter(_told(texts, lang)) for texts in (refs, hyps))
    others = {code: num for code, num in in_hyps.most_common() if code != lang}
    num_in_refs = in_refs.total() - in_refs[lang]
    return {"num": sum(others.values()), "of": in_hyps.total(), "num_in_refs": num_in_refs, "langs": others}


def _told(texts: Iterable[str], lang: str) -> list[str]:
    long = [text for text in texts if sum(map(str.isalpha, text)) >= MIN_LETTERS]
    return [_identifier().classify(text)[0] for text in long] if long and lang in _identifier().labels else []


@functools.cache
def _identifier() -> Any:
    """py3langid restricted to our languages; loading it takes most of a second."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    identifier.set_languages([code for code in LANGUAGES if code in identifier.labels])
    return identifier


def _by_duration(utterances: Sequence[Aligned], durations: dict[str, float]) -> list[dict[str, Any]]:
    rows = []
    for start, end in itertools.pairwise(DURATIONS_S):
        seconds = ((u.counts, durations.get(u.id, -1)) for u in utterances)
        inside = [counts for counts, s in seconds if start <= s and (end is None or s < end)]
        total = sum(inside, Counts())
        row = {"from_s": start, "to_s": end, "num_utts": len(inside), "ref_len": total.ref_len, "errors": total.errors}
        rows += [row] if inside else []
    return rows

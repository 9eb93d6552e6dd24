"""What the CTC head alone hears in a decoded set: where the LLM's text is another, it may be what nobody has said.

`zipperasr align` has left it in words.jsonl, with the texts that it was given.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

from zipperasr.alignment.words import OUTPUTS
from zipperasr.errors import UserError
from zipperasr.scoring import normalise
from zipperasr.scoring.score import Counts, align, read, read_rows

WORDS = OUTPUTS["json"]
BAD = 50
"""Errors in percent of the reference above which an utterance is bad; one with an empty reference is with any."""
CAUGHT = 90
"""Percent of the bad utterances that are to be found."""
AGAIN = "run zipperasr align again"


@dataclasses.dataclass(frozen=True)
class Checked:
    """One utterance that was heard: the errors of its hypothesis and of `ctc_text`, and the LLM's log-probability.

    `disagreement` of the two texts is from 0 to 1, or None where the head knows no character of the hypothesis.
    """

    hyp: Counts
    ctc: Counts
    ctc_text: str
    disagreement: float | None
    logprob: float | None

    @property
    def is_bad(self) -> bool:
        """Whether more of it is wrong than BAD percent."""
        return 100 * self.hyp.errors > BAD * self.hyp.ref_len


@dataclasses.dataclass(frozen=True)
class Check:
    """A set's utterances by id; none where `num_stale` of its texts are not what the present hypotheses say."""

    utts: dict[str, Checked]
    num_stale: int = 0


@dataclasses.dataclass(frozen=True)
class Detection:
    """How well a signal tells bad utterances: `auc` is the chance that it is higher for a bad one than for a good one.

    To find CAUGHT percent of the bad ones, all from `threshold` on are to be looked at, `share` percent of the set.
    """

    auc: float
    threshold: float
    share: float


def read_check(directory: Path, *, lang: str, profile: str) -> Check:
    """What `directory`/words.jsonl says, with errors counted after normalisation by `profile`.

    Raises UserError for a broken file.
    """
    decoded, path = read(directory, lang=lang), directory / WORDS
    rows = read_rows(path, again=AGAIN)
    try:
        ids = decoded.refs.keys() | rows.keys()
        texts = {utt_id: row["text"] for utt_id, row in rows.items()}
        if num_stale := sum(texts.get(utt_id) != decoded.hyps.get(utt_id, "") for utt_id in ids):
            return Check({}, num_stale)
        heard = {i: (row["ctc_text"], row["disagreement"]) for i, row in rows.items() if row["ctc_text"] is not None}
    except KeyError as error:
        raise UserError(f"{path}: a line has no {error}; {AGAIN}") from None
    split, utts = normalise.splitter(decoded.language, profile), {}
    for utt_id, (ctc_text, disagreement) in heard.items():
        ref = split(decoded.refs[utt_id])
        hyp, ctc = (align(utt_id, ref, split(text)).counts for text in (decoded.hyps[utt_id], ctc_text))
        logprob = decoded.utts.get(utt_id, {}).get("logprob")
        utts[utt_id] = Checked(hyp, ctc, ctc_text, disagreement, logprob)
    return Check(utts)


def detect(is_bad: Sequence[bool], signal: Sequence[float | None]) -> Detection | None:
    """How well a signal tells bad utterances from good ones; None where one kind is absent, or the signal of one."""
    from sklearn.metrics import roc_auc_score

    if len(set(is_bad)) < 2 or None in signal:
        return None
    of_bad = sorted(itertools.compress(signal, is_bad), reverse=True)
    threshold = of_bad[-(-CAUGHT * len(of_bad) // 100) - 1]
    share = 100 * sum(value >= threshold for value in signal) / len(signal)
    return Detection(float(roc_auc_score(is_bad, signal)), threshold, share)

"""What can be wrong with an utterance, and the rule for each kind: dropped, fixed, kept as it is, or fatal.

Training material may lose an utterance, if it is counted. A test set may not: fewer utterances are another test, so
what would drop one there is fatal, until the corpus is mended or the loss is accepted with `zipperasr validate --drop`.
"""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from zipperasr import files, markdown
from zipperasr.data.manifests import is_held_out

Rule = Literal["dropped", "fixed", "kept", "fatal"]
RULES: dict[str, tuple[Rule, Rule]] = {  # kind: in training material, in held-out sets
    "missing audio": ("dropped", "fatal"),
    "unreadable audio": ("dropped", "fatal"),
    "truncated audio": ("dropped", "fatal"),
    "too short": ("dropped", "fatal"),
    "over 30 s": ("dropped", "kept"),  # decoded in pieces
    "segment outside its audio": ("dropped", "fatal"),
    "segment shortened to its audio": ("fixed", "fixed"),
    "several channels": ("kept", "kept"),  # averaged
    "below 16 kHz": ("kept", "kept"),  # resampled, but nothing comes back above half the rate
    "odd sampling rate": ("kept", "kept"),
    "wrong extension": ("kept", "kept"),  # files are read by content
    "bad row": ("dropped", "fatal"),
    "not UTF-8": ("dropped", "fatal"),
    "empty text": ("dropped", "dropped"),  # nothing to learn, nothing to score
    "unbalanced quote": ("kept", "kept"),  # quotes have no special meaning
    "unsafe id": ("fixed", "fixed"),  # white space and slashes become underscores
    "duplicate row": ("dropped", "dropped"),  # the same utterance again
    "duplicate id": ("dropped", "fatal"),  # another utterance of the same name: the first stays
    "in another split": ("dropped", "dropped"),
    "byte order mark": ("fixed", "fixed"),
    "carriage returns": ("fixed", "fixed"),
    # found across manifests, and in those that were not prepared here
    "bad recording": ("fatal", "fatal"),
    "bad supervision": ("fatal", "fatal"),
    "bad id": ("fatal", "fatal"),
    "unknown language": ("fatal", "fatal"),
    "wrong language": ("fatal", "fatal"),
    "wrong duration": ("fatal", "fatal"),
    "train/test overlap by id": ("fatal", "fatal"),
    "train/test overlap by audio": ("fatal", "fatal"),
    "incomplete corpus": ("fatal", "fatal"),
}
NUM_EXAMPLES = 5
MAX_LOST = 0.05
"""Training material of which more than this share has no usable audio was not copied whole."""


@dataclass(frozen=True)
class Defect:
    """What is wrong with one utterance; `utt_id` is `*` where it concerns the whole set."""

    set: str
    utt_id: str
    kind: str
    detail: str

    @property
    def rule(self) -> Rule:
        """What is done about it."""
        return rule(self.kind, self.set)


def rule(kind: str, name: str) -> Rule:
    """What is done about a defect of this kind in the set `name`."""
    return RULES[kind][is_held_out(name)]


@dataclass
class Tally:
    """The book-keeping of one set: every utterance that came in was kept, or left out for one reason.

    `kinds` counts defects, of which an utterance that was kept may have several; `examples` has the first ids of each.
    `is_accepted` says that its fatal ones were left out on request.
    """

    num_in: int = 0
    num_kept: int = 0
    duration_s: float = 0.0
    kinds: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    is_accepted: bool = False

    def add(self, kind: str, utt_id: str) -> None:
        """Count a defect."""
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        named = self.examples.setdefault(kind, [])
        if len(named) < NUM_EXAMPLES:
            named.append(_printable(utt_id))

    def fatal(self, name: str) -> list[Defect]:
        """The kinds of defects that stop the set `name`, one each, with its first ids."""
        if self.is_accepted:
            return []
        found = [Defect(name, ids[0], kind, self.named(kind)) for kind, ids in self.examples.items()]
        num_lost = sum(self.kinds.get(kind, 0) for kind in ("missing audio", "unreadable audio", "truncated audio"))
        if not is_held_out(name) and num_lost > MAX_LOST * self.num_in:
            lost = f"{num_lost} of {self.num_in} utterances have no usable audio"
            found.append(Defect(name, "*", "incomplete corpus", lost))
        return [defect for defect in found if defect.rule == "fatal"]

    def __str__(self) -> str:
        counts = f"{self.num_in} utterances, {self.num_kept} kept, {self.num_in - self.num_kept} left out"
        return f"{counts}, {self.duration_s / 3600:.3f} h"

    def named(self, kind: str) -> str:
        """The first ids with a defect of this kind, and how many more there are."""
        ids = self.examples[kind]
        more = self.kinds[kind] - len(ids)
        return ", ".join(ids) + (f" and {more} more" if more else "")


def write_tally(path: Path, tally: Tally) -> None:
    """Write a tally as JSON."""
    files.write_json(path, asdict(tally))


def read_tally(path: Path) -> Tally:
    """A tally that `write_tally` wrote. Raises UserError when it is missing or broken."""
    return Tally(**files.read_json(path))


def report(tallies: Mapping[str, Tally]) -> str:
    """REPORT.md: utterances in, kept and left out of each set, and each kind of defect with its rule and first ids."""
    sets = markdown.table(SETS_HEADER, (_set_row(n, t) for n, t in tallies.items()), align="<>>>>>")
    parts = ["# Utterances of each set\n", sets]
    if kinds := [(name, kind, tally) for name, tally in tallies.items() for kind in sorted(tally.kinds)]:
        parts += ["# Defects\n", markdown.table(KINDS_HEADER, (_kind_row(*row) for row in kinds), align="<<<><")]
    return "\n".join(parts)


SETS_HEADER = ("set", "in", "kept", "dropped", "of them fatal", "hours kept")
KINDS_HEADER = ("set", "defect", "rule", "count", "ids")


def _set_row(name: str, tally: Tally) -> tuple[str, ...]:
    num_fatal = sum(count for kind, count in tally.kinds.items() if rule(kind, name) == "fatal")
    num_dropped = tally.num_in - tally.num_kept
    accepted = " (accepted)" if num_fatal and tally.is_accepted else ""
    hours = f"{tally.duration_s / 3600:.3f}"
    return name, str(tally.num_in), str(tally.num_kept), str(num_dropped), f"{num_fatal}{accepted}", hours


def _kind_row(name: str, kind: str, tally: Tally) -> tuple[str, ...]:
    return name, kind, rule(kind, name), str(tally.kinds[kind]), tally.named(kind).replace("|", "\\|")


@contextlib.contextmanager
def log(path: Path) -> Iterator[Callable[[Defect], None]]:
    """A function that adds a line to the table of defects `path`, which is there, whole, when the block has ended."""
    with files.write(path) as stream:
        table = csv.writer(stream, delimiter="\t", quoting=csv.QUOTE_NONE, escapechar="\\", lineterminator="\n")
        table.writerow(("set", "id", "rule", "defect", "detail"))
        yield lambda d: table.writerow(_printable(x) for x in (d.set, d.utt_id, d.rule, d.kind, d.detail))


def _printable(text: str) -> str:
    """The text with bytes that are not UTF-8 written as \\xNN."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

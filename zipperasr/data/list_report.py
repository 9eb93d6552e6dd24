"""What a setting's lists are made of: a record of each, and REPORT.md and REPORT.tsv beside them."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from zipperasr import files, markdown
from zipperasr.data.draw import Draw
from zipperasr.data.released import Match

REPORT = "REPORT.md"
LISTS_HEADER = ("list", "from", "asked (h)", "hours", "lines", "ids", "remarks")
RELEASED_HEADER = ("list", "lines", "ids", "repeats", "found", "missing", "held out", "hours", "lies in", "mended",
                   "sha256")  # fmt: skip


@dataclass(frozen=True)
class UtteranceList:
    """A list of a setting as it was written: its lines, and the distinct ids among them.

    A drawn list has its `origins`, the sets it was drawn from, and `num_left_out`, candidates that it could not take
    because a list of the other side claims them. A released one has its `match`.
    """

    part: str
    set: str
    num_utts: int
    num_unique: int
    duration_s: float
    origins: Sequence[str] = ()
    num_left_out: int = 0
    match: Match | None = None
    note: str = ""

    @property
    def num_repeats(self) -> int:
        """Lines whose id has stood above."""
        return self.num_utts - self.num_unique

    @property
    def path(self) -> str:
        """The file of the list inside its setting's directory."""
        return f"{self.part}/{self.set}.txt"

    @property
    def remarks(self) -> list[str]:
        """What a reader must know besides the size."""
        return list(self._remarks())

    def __str__(self) -> str:
        return ", ".join([f"{self.path}: {self.num_utts} utterances, {self.duration_s / 3600:.3f} h", *self.remarks])

    def _remarks(self) -> Iterator[str]:
        if self.match:
            yield f"released, {self.match.num_unique - len(self.match.missing)} of {self.match.num_unique} ids found"
        if self.num_repeats:
            yield f"{self.num_repeats} of them repeats" + ("" if self.match else ": the set is smaller than asked")
        if self.num_left_out:
            yield f"{self.num_left_out} candidates left out: {'held out' if self.part == 'train' else 'trained on'}"
        if self.note:
            yield self.note


def write(directory: Path, lists: Sequence[UtteranceList], draws: Mapping[tuple[str, str], Draw]) -> None:
    """Write the report on `lists` to their directory; `draws` is their configuration by part and set."""
    parts = ["# Lists\n", markdown.table(LISTS_HEADER, (_row(one, draws) for one in lists), align="<<>>>><")]
    matched = [one for one in lists if one.match]
    if matched:
        rows = (_match_row(one, one.match) for one in matched)
        parts += [
            "# Released lists against the manifests\n",
            markdown.table(RELEASED_HEADER, rows, align="<>>>>>>><<<"),
        ]
    with files.write(directory / REPORT) as stream:
        stream.write("\n".join(parts))
    with files.write(directory / "REPORT.tsv") as stream:
        table = csv.writer(stream, delimiter="\t", lineterminator="\n")
        table.writerow(("list", "id", "what"))
        for one in matched:
            table.writerows((one.path, utt_id, "missing") for utt_id in one.match.missing)
            table.writerows((one.path, utt_id, f"also in {where}") for utt_id, where in one.match.overlapping.items())


def _row(one: UtteranceList, draws: Mapping[tuple[str, str], Draw]) -> tuple[str, ...]:
    source = f"released {one.match.name}" if one.match else " + ".join(one.origins)
    asked = draws[one.part, one.set].hours
    hours = ("all" if asked is None else f"{asked:g}", f"{one.duration_s / 3600:.3f}")
    return one.path, source, *hours, str(one.num_utts), str(one.num_unique), "; ".join(one.remarks)


def _match_row(one: UtteranceList, match: Match) -> tuple[str, ...]:
    num_found = match.num_unique - len(match.missing)
    repeated = match.num_lines - match.num_unique
    numbers = (match.num_lines, match.num_unique, repeated, num_found, len(match.missing), len(match.overlapping))
    hours = f"{one.duration_s / 3600:.3f}"
    return one.path, *map(str, numbers), hours, _counts(match.found_in), _counts(match.slips), match.sha256


def _counts(counter: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counter.items()) or "–"

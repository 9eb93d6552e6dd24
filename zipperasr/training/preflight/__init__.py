"""What `zipperasr doctor` looks at before anything is run: machine, models, data, disk, memory and time.

Each module has functions that yield findings; what they look at is given to them, and nothing is written.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

GIB = 2**30

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of the report. The text of a warning or an error says its mend too."""

    section: str
    level: Level
    text: str


def report(findings: Iterable[Finding]) -> str:
    """All findings below the names of their sections, and how many of them are errors and warnings."""
    findings, lines, section = list(findings), [], None
    for finding in findings:
        if finding.section != section:
            section = finding.section
            lines.append(section)
        lines.append(f"  {finding.level:<9}{finding.text}")
    counts = [sum(finding.level == level for finding in findings) for level in ("error", "warning")]
    return "\n".join([*lines, "{} errors, {} warnings".format(*counts)])


def gib(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes < 10 * GIB else f"{num_bytes / GIB:,.0f} GiB"

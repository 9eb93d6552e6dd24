"""Tables in Markdown that read well as plain text too."""

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, align: str | None = None) -> str:
    """A table with columns as wide as their content; `align` has `<` or `>` for each (default: all to the left)."""
    rows = [header, *rows]
    align = align or "<" * len(header)
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width if side == "<" else "-" * (width - 1) + ":" for width, side in zip(widths, align)])
    lines = ([f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths)] for row in rows)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

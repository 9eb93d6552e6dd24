"""The report of an experiment directory: the page `index.html`, and beside it README.md, tables and figures."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from zipperasr import files
from zipperasr.errors import UserError
from zipperasr.reporting import figures, page, tables
from zipperasr.reporting.results import Results


def write(results: Results, out: Path | str, *, data_dir: Path | None = None, beside: Results | None = None) -> Path:
    """Write the report under `out`; returns the path of the README.

    `data_dir` has the audio of the worst utterances; `beside` is the same on more data, for the figure of both.
    All is made elsewhere and then put in place, the page last: what ends early leaves the old report as it was.
    Raises UserError for a broken file of a run.
    """
    out = Path(out)
    if out.is_file():
        raise UserError(f"{out}: a file is there; give another --out")
    with files.writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".report", dir=out) as temporary:
        new = Path(temporary)
        made = tables.all_tables(results)
        for table in made:
            table.write(new / "tables")
        captions = figures.draw_all(results, new / "figures", beside)
        with files.write(new / "README.md") as stream:
            stream.writelines(_readme(results, made, captions))
        with files.write(new / "index.html") as stream:
            stream.write(page.render(results, made, captions, new, data_dir))
        for path in sorted(filter(Path.is_file, new.rglob("*")), key=lambda path: path.name == "index.html"):
            place = out / path.relative_to(new)
            place.parent.mkdir(exist_ok=True)
            path.replace(place)
    return out / "README.md"


def _readme(results: Results, made: list[tables.Table], captions: dict[str, str]) -> Iterator[str]:
    yield f"# Results of {results.directory.resolve().name}\n\n"
    yield "Error rates in percent: CER where a set's metric says so, WER elsewhere; "
    yield f"{tables.MISSING} stands for what has not been run. {page.conditions(results)}\n\n"
    yield from (f"- {remark}\n" for remark in page.remarks(results))
    yield "\nThe whole report, with the worst utterances: [index.html](index.html).\n"
    for table in made:
        if table.name.startswith("overview") or table.name == "runs":
            yield f"\n## {table.title}\n\n{table.markdown()}"
    yield "\n## Tables\n\n"
    for table in made:
        yield f"- {table.title}: [Markdown](tables/{table.name}.md), [CSV](tables/{table.name}.csv)\n"
    yield "\n## Figures\n"
    for name, caption in captions.items():
        yield f"\n{caption} ([SVG](figures/{name}.svg)):\n\n![{caption}](figures/{name}.png)\n"

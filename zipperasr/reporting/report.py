"""The report of an experiment directory: `README.md` with the overview on top, tables and figures beside it."""

from collections.abc import Iterator
from pathlib import Path

from zipperasr import files
from zipperasr.reporting import figures, tables
from zipperasr.reporting.results import Results


def write(results: Results, out: Path | str) -> Path:
    """Write every table and figure under `out`; returns the path of the README that shows them."""
    out = Path(out)
    made = tables.all_tables(results)
    for table in made:
        table.write(out / "tables")
    captions = figures.draw_all(results, out / "figures")
    with files.write(out / "README.md") as stream:
        stream.writelines(_readme(results, made, captions))
    return out / "README.md"


def _readme(results: Results, made: list[tables.Table], captions: dict[str, str]) -> Iterator[str]:
    yield f"# Results of {results.directory.resolve().name}\n\n"
    yield "Error rates in percent: CER where a set's metric says so, WER elsewhere; "
    yield f"{tables.MISSING} stands for what has not been run. {_conditions(results)}\n"
    for table in made:
        if table.name.startswith("overview") or table.name == "runs":
            yield f"\n## {table.title}\n\n{table.markdown()}"
    yield "\n## Tables\n\n"
    for table in made:
        yield f"- {table.title}: [Markdown](tables/{table.name}.md), [CSV](tables/{table.name}.csv)\n"
    yield "\n## Figures\n"
    for name, caption in captions.items():
        yield f"\n{caption} ([SVG](figures/{name}.svg)):\n\n![{caption}](figures/{name}.png)\n"


def _conditions(results: Results) -> str:
    """What the numbers depend on, and what they lack."""
    scores = [(f"{run.directory.name}/{name}", score) for run in results.runs for name, score in run.scores.items()]
    profiles = ", ".join(sorted({score["profile"] for _, score in scores})) or "none"
    missing = ", ".join(f"{where} ({score['num_missing']})" for where, score in scores if score["num_missing"])
    text = f"Text normalisation: {profiles}. Low-resource: {', '.join(results.low_resource) or 'none'}."
    return text + (f" Utterances without a hypothesis, counted as deleted: {missing}." if missing else "")

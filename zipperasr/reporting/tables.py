"""Tables II to VI of arXiv:2603.17558, an overview per encoder context, and the runs with their cost."""

import csv
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from zipperasr import files, languages
from zipperasr.reporting.results import ENCODERS, Results, Run, by_language, lang_of

CORPORA = {
    "commonvoice": "Common Voice",
    "librispeech": "LibriSpeech",
    "mls": "MLS",
    "msr86k": "MSR-86K",
    "wenetspeech": "WenetSpeech",
}
MISSING = "–"
Cell = str | float | int | None


@dataclasses.dataclass(frozen=True)
class Column:
    """Error rates under one heading: the mean over languages of each language's mean over its sets."""

    group: str
    label: str
    sets: list[list[str]]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table with two header lines (group, label); the first `num_text` columns are text. None is a missing cell."""

    name: str
    title: str
    header: list[tuple[str, str]]
    rows: list[list[Cell]]
    num_text: int = 1

    def markdown(self) -> str:
        """GitHub's Markdown; the header's groups, if any, stand above its labels."""
        groups = [group if i == 0 or group != self.header[i - 1][0] else "" for i, (group, _) in enumerate(self.header)]
        labels = [label for _, label in self.header]
        lines = [[f"**{label}**" if label else "" for label in labels]] if any(groups) else []
        lines += [[_text(cell) for cell in row] for row in self.rows]
        rule = [":--"] * self.num_text + ["--:"] * (len(labels) - self.num_text)
        return "".join(f"| {' | '.join(line)} |\n" for line in [groups if any(groups) else labels, rule, *lines])

    def write(self, folder: Path) -> None:
        """Write `<name>.md` and `<name>.csv`; in the latter a missing cell is empty and rates are unrounded."""
        with files.write(folder / f"{self.name}.md") as stream:
            stream.write(f"# {self.title}\n\n{self.markdown()}")
        with files.write(folder / f"{self.name}.csv") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow([f"{group} {label}".strip() for group, label in self.header])
            writer.writerows(self.rows)


def all_tables(results: Results) -> list[Table]:
    """Every table for which there is at least one run, overviews first."""
    tables = [overview(results, encoder) for encoder in results.encoders]
    tables += [
        source_before(results),
        source_after(results),
        well_resourced(results, "chunked", number="IV"),
        well_resourced(results, "full", number="V"),
        low_resource(results),
        cost(results),
    ]
    return [table for table in tables if table.rows]


def overview(results: Results, encoder: str) -> Table:
    """Rows: sets and macro averages; columns: Stage 1 and every Stage-2 method of one encoder context."""
    runs = [run for run in results.of(encoder) if run.scores]
    groups = (
        (results.targets(low_resource=False), "well-resourced target languages"),
        (results.targets(low_resource=True), "low-resource target languages"),
        (results.targets(), "target languages"),
        (results.source_sets, "source-domain languages"),
    )
    rows: list[list[Cell]] = []
    for sets, what in groups:
        if what != "target languages":
            for column in _columns(sets):
                language = languages.get(lang_of(column.sets[0][0]))
                label = [f"{column.group} {column.label}", language.name, language.metric.upper()]
                rows.append([*label, *(run.error_rate(column.sets) for run in runs)])
        grouped = by_language(sets)
        if grouped:
            rows.append([f"**Mean, {len(grouped)} {what}**", "", "", *(run.error_rate(grouped) for run in runs)])
    header = [("", text) for text in ("Set", "Language", "Metric", *(run.label for run in runs))]
    title = f"Overview, {ENCODERS[encoder].lower()} encoder: WER/CER (%)"
    return Table(f"overview_{encoder}", title, header, rows if runs else [], num_text=3)


def source_before(results: Results) -> Table:
    """Table II: Stage 1 on the source-domain sets."""
    runs = [run for run in results.runs if run.stage == 1]
    title = "Table II. Foundation baseline (Stage 1) on source-domain sets: WER/CER (%)"
    return _table("table2_source_stage1", title, runs, _columns(results.source_sets), [("", "Encoder")])


def source_after(results: Results) -> Table:
    """Table III: every Stage-2 method on the source-domain sets, per encoder context."""
    runs = [run for encoder in results.encoders for run in results.of(encoder) if run.stage == 2]
    title = "Table III. Source-domain sets after Stage 2: WER/CER (%)"
    return _table("table3_source_stage2", title, runs, _columns(results.source_sets), [("", "Encoder"), ("", "Method")])


def well_resourced(results: Results, encoder: str, *, number: str) -> Table:
    """Tables IV (chunked) and V (non-chunked): Stage-2 methods on the high-resource target sets."""
    runs = [run for run in results.of(encoder) if run.stage == 2]
    title = f"Table {number}. High-resource target languages, {ENCODERS[encoder].lower()} encoder: WER/CER (%)"
    columns = _columns(results.targets(low_resource=False), averages=True)
    name = {"IV": "table4", "V": "table5"}[number]
    return _table(f"{name}_high_resource_{encoder}", title, runs, columns, [("", "Method")])


def low_resource(results: Results) -> Table:
    """Table VI: Stage-2 methods on the low-resource target sets, both encoder contexts side by side."""
    columns = _columns(results.targets(low_resource=True))
    systems = {run.system: run.label for run in results.runs if run.stage == 2}
    runs = {(run.system, run.encoder): run for run in results.runs}
    corpora = {column.group for column in columns}
    header, rows = [("", "Method")], [[label] for label in systems.values()]
    for encoder in results.encoders if columns else ():
        for column in columns:
            label = column.label if len(corpora) == 1 else f"{column.label} ({column.group})"
            header.append((ENCODERS[encoder], label))
            for row, system in zip(rows, systems):
                run = runs.get((system, encoder))
                row.append(run.error_rate(column.sets) if run else None)
    title = "Table VI. Low-resource target languages: WER/CER (%)"
    return Table("table6_low_resource", title, header, rows if columns else [])


def cost(results: Results) -> Table:
    """Every run with its size, training time, and decoding speed (audio seconds per wall second).

    The training of the run that an Initial-B run begins from is not in the latter's own.
    """
    names = ("Run", "Trainable (M)", "of which encoder (M)", "Steps", "Training (min)", "ms per step", "Audio (h)",
             "Test utterances", "No hypothesis", "RTFx")  # fmt: skip
    return Table("runs", "Runs and their cost", [("", name) for name in names], [_cost(run) for run in results.runs])


def _cost(run: Run) -> list[Cell]:
    def scaled(key: str, unit: float) -> float | None:
        return run.train[key] / unit if key in run.train else None

    timings = [t for t in run.timing.values() if t.get("wall_s")]
    rtfx = sum(t["audio_s"] for t in timings) / sum(t["wall_s"] for t in timings) if timings else None
    utts, missing = (sum(s[key] for s in run.scores.values()) for key in ("num_utts", "num_missing"))
    sizes = [scaled("num_trainable", 1e6), scaled("num_trainable_encoder", 1e6)]
    steps = run.train.get("steps")
    step_ms = scaled("wall_s", steps / 1e3) if steps else None
    times = [steps, scaled("wall_s", 60), step_ms, scaled("audio_s", 3600)]
    return [run.directory.name, *sizes, *times, utts, missing, rtfx]


def _table(name: str, title: str, runs: list[Run], columns: list[Column], heads: list[tuple[str, str]]) -> Table:
    """One row a run, one column a heading; no rows unless there is something to show."""
    texts = {"Encoder": lambda run: ENCODERS.get(run.encoder, run.encoder), "Method": lambda run: run.label}
    header = [*heads, *((column.group, column.label) for column in columns)]
    rows = [
        [*(texts[head](run) for _, head in heads), *(run.error_rate(column.sets) for column in columns)]
        for run in runs
        if run.scores
    ]
    return Table(name, title, header, rows if columns else [], num_text=len(heads))


def _columns(sets: list[str], *, averages: bool = False) -> list[Column]:
    """A column a set, grouped by corpus; with `averages` one more for a language with several sets in a corpus."""
    return list(_each_column(sets, averages))


def _each_column(sets: list[str], averages: bool) -> Iterator[Column]:
    splits: dict[tuple[str, str], list[str]] = {}
    for name in sets:
        corpus, lang, split = name.split("_", 2)
        splits.setdefault((corpus, lang), []).append(split)
    for (corpus, lang), names in splits.items():
        group = CORPORA.get(corpus, corpus)
        for split in names:
            short = split.removeprefix("test").strip("_-") or split
            yield Column(group, f"{lang} {short}" if len(names) > 1 else lang, [[f"{corpus}_{lang}_{split}"]])
        if averages and len(names) > 1:
            yield Column(group, f"{lang} avg", [[f"{corpus}_{lang}_{split}" for split in names]])


def _text(cell: Cell) -> str:
    if cell is None:
        return MISSING
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)

"""The report as one page of HTML that needs nothing else: `page.html` filled with tables, figures, audio and settings.

The same inputs give the same bytes. The page's Content-Security-Policy forbids every request, and every script and
style but its own.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import itertools
import json
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

import zipperasr
from zipperasr import config
from zipperasr.reporting import tables, worst
from zipperasr.reporting.results import ENCODERS, Results, Run, by_language
from zipperasr.reporting.tables import Table
from zipperasr.scoring.score import shown

SECTIONS = {
    "Error rates": ("overview", "table", "significance", "profiles"),
    "What goes wrong": ("guards", "confusion", "stress"),
    "Cross-check by CTC": ("cross_check",),
    "Cost": ("",),
}
"""Titles of sections, and how the names of their tables begin; a table belongs to the first that fits."""
NUM_WORST = 20  # utterances of a run
MAX_SVG_BYTES = 600_000
"""A larger figure, as of very long training curves, is shown as PNG."""


def render(results: Results, made: list[Table], captions: dict[str, str], folder: Path, data_dir: Path | None) -> str:
    """The page. `made` and `captions` are tables and figures that lie in `tables` and `figures` of `folder`.

    Without `data_dir` there is no audio. Raises UserError for a broken file of a run.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"sha256": _sha256, "cell": tables.text, "unit": shown, "spans": _spans}
    runs, sections = _ranked(results), {title: [] for title in SECTIONS}
    for table in made:
        sections[next(title for title, begins in SECTIONS.items() if table.name.startswith(begins))].append(table)
    csv = {table.name: _uri("text/csv", (folder / "tables" / f"{table.name}.csv").read_bytes()) for table in made}
    utterances = [(run, worst.of_run(run, num=NUM_WORST)) for run in runs]
    clips = worst.clips([utt for _, those in utterances for utt in those], data_dir) if data_dir else {}
    paths = {run.directory.name: run.directory / "config.yaml" for run in results.runs}
    configs = {run: path.read_text(encoding="utf-8") for run, path in paths.items() if path.is_file()}
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        name=results.directory.resolve().name,
        conditions=conditions(results),
        remarks=list(remarks(results)),
        summary=_summary(results, runs, made),
        profiles=results.headlines,
        encoders=ENCODERS,
        sections={title: those for title, those in sections.items() if those},
        csv=csv,
        figures=[_figure(folder / "figures" / name, caption) for name, caption in captions.items()],
        worst=utterances,
        has_checks=any(utt.check for _, those in utterances for utt in those),
        clips={key: clip if isinstance(clip, str) else _uri("audio/mpeg", clip) for key, clip in clips.items()},
        configs=configs,
        records=[table for table in (_settings(configs), _commands(results.directory)) if table.rows],
        versions=f"zipperasr {zipperasr.__version__}, Python {platform.python_version()}",
    )


def conditions(results: Results) -> str:
    """When the newest hypotheses were made (scores may be made again), and what all scores have in common."""
    paths = [run.decode_dir(name) / "hyp" for run in results.runs for name in run.scores]
    if not paths:
        return "Nothing is scored yet."
    newest = datetime.datetime.fromtimestamp(max(path.stat().st_mtime for path in paths), datetime.UTC)
    signatures = [score["signature"].split("|") for run in results.runs for score in run.scores.values()]
    common = [part for part in signatures[0] if all(part in signature for signature in signatures)]
    low = ", ".join(results.low_resource) or "none"
    signed = ", ".join(common)
    return f"Newest hypotheses: {newest:%Y-%m-%d %H:%M} UTC. Common to all signatures: {signed}. Low-resource: {low}."


def remarks(results: Results) -> Iterator[str]:
    """What a reader must know before comparing: what is missing, partial or of another signature."""
    sets = sorted({*results.source_sets, *results.target_sets})
    pairs = [(run, name) for run in results.runs for name in run.scores]
    for what, counts in {
        "Utterances without a hypothesis, counted as deleted": [run.scores[name]["num_missing"] for run, name in pairs],
        "Utterances with an empty reference": [run.scores[name]["num_empty_refs"] for run, name in pairs],
        "Only the first utterances are decoded": [run.meta[name].get("first") for run, name in pairs],
        "Not cross-checked, since zipperasr align was given other texts (so many differ); run it again": [
            name in run.checks and run.checks[name].num_stale for run, name in pairs
        ],
    }.items():
        if some := [f"{run.directory.name}/{name} ({count})" for (run, name), count in zip(pairs, counts) if count]:
            yield f"{what}: {', '.join(some)}."
    for run in results.runs:
        if absent := [name for name in sets if name not in run.scores]:
            yield f"{run.directory.name}: {len(absent)} of {len(sets)} sets not scored: {', '.join(absent)}."
    differing: dict[tuple, list[str]] = {}
    for name in sets:
        scores = {run.directory.name: run.scores[name]["signature"] for run in results.runs if name in run.scores}
        parts = {run: set(signature.split("|")) for run, signature in scores.items()}
        for part in sorted(set.union(*parts.values()) - set.intersection(*parts.values())):
            differing.setdefault((part, *(run for run in parts if part in parts[run])), []).append(name)
    for (part, *runs), names in differing.items():
        yield f"Rates on {', '.join(names)} may not compare: only the signatures of {', '.join(runs)} have {part}."


def _ranked(results: Results) -> list[Run]:
    """The scored runs of Stage 2, or else all scored ones: the lowest macro error rate first, unfinished ones last."""
    sets = by_language(results.targets()) or by_language(results.source_sets)
    scored = [run for run in results.runs if run.scores]
    rates = {run.directory: run.error_rate(sets, headline=True) for run in scored}
    runs = [run for run in scored if run.stage == 2] or scored
    return sorted(runs, key=lambda run: (rates[run.directory] is None, rates[run.directory] or 0))


def _summary(results: Results, runs: list[Run], made: list[Table]) -> list[dict[str, Any]]:
    """A row a run, the ranked ones first: its macro error rate over target languages, and what `significance` says."""
    known = {tuple(row[:2]): row[2:] for table in made if table.name == "significance" for row in table.rows}
    keys = ("rate", "low", "high", "gap", "gap_low", "gap_high", "p")
    rows = []
    for run in runs + [run for run in results.runs if run.scores and run not in runs]:
        cells = known.get((ENCODERS.get(run.encoder), run.label), [None] * len(keys))
        of_encoder = [other for other in runs if other.encoder == run.encoder]
        is_best = len(of_encoder) > 1 and run is of_encoder[0] and cells[0] is not None
        rows.append({"run": run, "is_best": is_best} | dict(zip(keys, cells)))
    return rows


def _figure(path: Path, caption: str) -> dict[str, Any]:
    """A figure as an image of its own, since the ids inside SVGs of one document would clash; its size in pixels."""
    svg = path.with_suffix(".svg").read_bytes()
    width, height = (
        round(float(size) * 4 / 3) for size in re.search(rb'width="(.*?)pt" height="(.*?)pt"', svg).groups()
    )
    is_small = len(svg) <= MAX_SVG_BYTES
    uri = _uri("image/svg+xml", svg) if is_small else _uri("image/png", path.with_suffix(".png").read_bytes())
    return {"name": path.name, "caption": caption, "uri": uri, "width": width, "height": height}


def _settings(configs: dict[str, str]) -> Table:
    """What differs between the runs' configurations {run: YAML}: a row a run, a column a setting."""
    flat = {run: config.flat(yaml.safe_load(text) or {}) for run, text in configs.items()}
    flat = {run: {name: _said(value) for name, value in settings.items()} for run, settings in flat.items()}
    names = list(dict.fromkeys(itertools.chain.from_iterable(flat.values())))
    names = [name for name in names if len({one.get(name) for one in flat.values()}) > 1]
    header = [("", "Run"), *((name.rpartition(".")[0], name.rpartition(".")[2]) for name in names)]
    rows = [[run, *(one.get(name) for name in names)] for run, one in flat.items()] if names else []
    return Table("settings", "Settings that differ between runs", header, rows, num_text=len(header))


def _said(value: Any) -> str:
    """A setting as text."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _commands(exp_dir: Path) -> Table:
    """The commands that the recipe has written down."""
    path = exp_dir / "log" / "commands.txt"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return Table("commands", "Commands", [("", "Command")], [[line] for line in lines])


def _spans(table: Table) -> list[tuple[str, int]]:
    """The groups of a table's header with the number of their columns; none where all are empty."""
    groups = [(text, len(list(same))) for text, same in itertools.groupby(group for group, _ in table.header)]
    return groups if any(text for text, _ in groups) else []


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"

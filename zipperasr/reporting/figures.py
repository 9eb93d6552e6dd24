"""Figures of arXiv:2603.17558 and more, as PNG and SVG; those of languages against each other are in maps.py."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from zipperasr import languages
from zipperasr.reporting import maps
from zipperasr.reporting.results import Results, Run, by_language, context, lang_of, language_embeddings, read_log
from zipperasr.reporting.style import GRID, RC, Drawn, language, legend_below, new_figure, save, styled
from zipperasr.scoring import bootstrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEW = 50
"""Utterances of a bin below which its error rate says little."""


def draw_all(results: Results, folder: Path, more_data: Results | None = None) -> dict[str, str]:
    """Draw every figure that the results allow into `<folder>/<name>.{png,svg}`; returns {name: caption}.

    `more_data` is the same experiment with more data for the low-resource languages (the 30 hours of Figure 6).
    """
    import matplotlib

    captions = {}
    with matplotlib.rc_context(RC):
        for name, drawn in _figures(results, more_data):
            if drawn:
                captions[name], figure = drawn
                save(figure, folder / name)
    return captions


def _figures(results: Results, more_data: Results | None) -> Iterator[tuple[str, Drawn | None]]:
    for encoder in results.encoders:
        yield f"radar_{encoder}", radar(results, encoder)
        yield f"relative_gap_{encoder}", relative_gap(results, encoder)
        if more_data:
            yield f"relative_gap_more_data_{encoder}", relative_gap(results, encoder, more_data)
        yield f"durations_{encoder}", durations(results, encoder)
        yield f"encodings_{encoder}", maps.encodings(results, encoder)
        yield f"router_shares_{encoder}", maps.router_shares(results, encoder)
    yield "parameters", parameters(results)
    yield from ((f"stress_{run.directory.name}", maps.stress(run)) for run in results.runs if run.stress)
    yield "language_similarity", maps.similarity(language_embeddings(results))
    yield "training_curves", training_curves(results)
    yield "dev_error", dev_curves(results)


def radar(results: Results, encoder: str) -> Drawn | None:
    """Figure 5: one polygon a run over the target languages; None with fewer than three languages."""
    groups, runs = _scored(results, encoder)
    if len(groups) < 3 or not runs:
        return None
    figure = new_figure(7.2, 6.6)
    axes = figure.add_subplot(projection="polar", theta_offset=math.pi / 2, theta_direction=-1)
    angles = [2 * math.pi * i / len(groups) for i in range(len(groups))]
    lowest = 100.0
    for run, (color, marker) in styled(runs):
        values = [_accuracy(run, group) for group in groups]
        lowest = min(lowest, *(value for value in values if not math.isnan(value)))
        style = {"color": color, "marker": marker, "markersize": 5, "linestyle": "--" if run.stage == 1 else "-"}
        axes.plot([*angles, angles[0]], [*values, values[0]], linewidth=1.6, label=run.label, **style)
        if len(runs) < 3:
            axes.fill(angles, values, color=color, alpha=0.06)
    bottom = max(0, 10 * math.floor(lowest / 10) - 10)
    axes.set_ylim(bottom, 100)
    step = 20 if bottom < 40 else 10
    axes.set_yticks(range(bottom + step, 101, step), [])
    paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8}
    for tick in range(bottom + step, 101, step):
        axes.text(math.pi / len(groups), tick, str(tick), ha="center", va="center", fontsize=8, bbox=paper, zorder=5)
    axes.set_xticks(angles, [language(lang_of(group[0])) for group in groups])
    axes.tick_params(axis="x", pad=3)
    for label, angle in zip(axes.get_xticklabels(), angles):
        side = math.sin(angle)
        label.set_ha("center" if abs(side) < 0.01 else "left" if side > 0 else "right")
    axes.grid(**GRID)
    axes.spines["polar"].set_color("#bfbfbf")
    axes.set_title(f"100 − WER/CER (%), {context(encoder)}", pad=16)
    legend_below(figure, ncols=4)
    return f"100 − WER/CER (%) on the target languages (as Fig. 5; outward is better), {context(encoder)}", figure


def relative_gap(results: Results, encoder: str, more_data: Results | None = None) -> Drawn | None:
    """Figure 6: relative error reduction against vanilla LoRA, or against Stage 1 where nothing else can be compared.

    With `more_data` a second panel shows that experiment, and both the low-resource languages only. None where there
    are not two runs to compare. Bars beyond -100% are cut and say so.
    """
    panels = [_compared(one, encoder, only_low=bool(more_data)) for one in (results, more_data) if one]
    panels = [panel for panel in panels if panel]
    if len(panels) < (2 if more_data else 1):
        return None
    widths = [len(groups) * max(0.82, 0.16 * len(others)) for groups, _, others in panels]
    figure = new_figure(1.4 + sum(widths), 4.2)
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True, width_ratios=widths)[0]
    for axes, (groups, baseline, others) in zip(grid, panels):
        num_well = sum(lang_of(group[0]) not in results.low_resource for group in groups)
        centres = [i + (0.6 if i >= num_well > 0 else 0) for i in range(len(groups))]
        bar = min(0.5, 0.8 / len(others))
        for i, (run, (color, _)) in enumerate(styled(others)):
            gaps = [_gap(baseline, run, group) for group in groups]
            places = [centre + (i - (len(others) - 1) / 2) * bar for centre in centres]
            axes.bar(places, [max(gap, -100) for gap in gaps], width=0.92 * bar, color=color, label=run.label)
            for place, gap in zip(places, gaps):
                if gap < -100:
                    axes.text(place, -97, f"−{-gap:.0f}%", rotation=90, ha="center", fontsize=7, color="white")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(centres, [language(lang_of(group[0]), sep="\n") for group in groups])
        axes.tick_params(axis="x", length=0, labelsize=9)
        axes.grid(axis="y", **GRID)
        if 0 < num_well < len(groups):
            axes.axvline(num_well - 0.2, color="#8c8c8c", linewidth=0.8, linestyle=":")
            axes.text(num_well - 0.12, 1.01, "low-resource", transform=axes.get_xaxis_transform(), fontsize=9)
        where = f"{baseline.directory.resolve().parent.name} ({baseline.setting})" if more_data else context(encoder)
        axes.set_title(f"{where}, against {baseline.label}", loc="left", pad=20)
    grid[0].set_ylabel("relative error reduction (%)")
    legend_below(figure, ncols=4)
    caption = f"Relative change of WER/CER against {panels[0][1].label} (as Fig. 6; up is better)"
    caption += ", low-resource languages with less and with more training data" if more_data else ""
    return f"{caption}, {context(encoder)}", figure


def training_curves(results: Results) -> Drawn | None:
    """Loss by step, a panel a stage and a line a run: a running mean over steps, dots for the dev loss."""
    from matplotlib.ticker import LogLocator

    def draw(axes: Axes, log: list[dict], style: dict) -> None:
        steps, losses = zip(*((row["step"], row["loss"]) for row in log))
        dev = [(row["step"], row["dev_loss"]) for row in log if "dev_loss" in row]
        axes.plot(*zip(*dev) if dev else (), "o", color=style["color"], markeredgecolor="white", markersize=6, zorder=3)
        sparse = slice(None, None, max(1, len(steps) // 500))
        axes.plot(steps[sparse], _smooth(losses)[sparse], linewidth=1.4, **style)

    figure = _curves(results, "loss", draw)
    for axes in figure.axes if figure else ():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set_ylabel("loss per token (nats)")
    caption = "Loss per target token in nats by optimizer step: running mean over a fiftieth of the steps"
    return (f"{caption} (dots: on the dev sets)", figure) if figure else None


def dev_curves(results: Results) -> Drawn | None:
    """Error rate on the dev sets by step, for runs that measured it more than once."""

    def draw(axes: Axes, log: list[dict], style: dict) -> None:
        axes.plot(*zip(*((row["step"], row["dev_error"]) for row in log)), marker="o", markersize=4, **style)

    figure = _curves(results, "dev_error", draw)
    for axes in figure.axes if figure else ():
        axes.set_ylim(bottom=0)
        axes.set_ylabel("mean WER/CER of the dev sets (%)")
    return ("Mean error rate over the languages of the dev sets, by optimizer step", figure) if figure else None


def _curves(results: Results, key: str, draw: Callable[[Axes, list[dict], dict], None]) -> Figure | None:
    """A panel a stage, where `draw` puts the rows with `key` of every run that has two; None if none has."""
    runs = [run for run in results.runs if run.is_known]
    logs = {run.directory: [row for row in read_log(run) if key in row] for run in runs}
    runs = [run for run in runs if len(logs[run.directory]) > 1]
    stages = sorted({run.stage for run in runs})
    if not stages:
        return None
    figure = new_figure(5.2 * len(stages) + 0.6, 4.2)
    for axes, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages):
        for run, (color, _) in styled([run for run in runs if run.stage == stage]):
            dashes = "--" if run.encoder == "chunked" else "-"
            draw(axes, logs[run.directory], {"color": color, "linestyle": dashes, "label": run.label})
        axes.grid(**GRID)
        axes.set_xlabel("step")
        encoders = {run.encoder for run in runs if run.stage == stage}
        axes.set_title(f"Stage {stage}{' (dashed: chunked encoder)' if len(encoders) > 1 else ''}", loc="left")
    legend_below(figure, ncols=4 if len(stages) > 1 else 2)
    return figure


def durations(results: Results, encoder: str) -> Drawn | None:
    """Error rate by length, all errors over all units of the target sets of one unit, a panel each; None with one bin.

    Words and characters are not pooled. A run that lacks a set is left out: its mix of languages would be another.
    """
    panels = []
    for unit in ("word", "char"):
        sets = [name for name in results.target_sets if languages.get(lang_of(name)).unit == unit]
        runs = [run for run in results.of(encoder, known=True) if all(name in run.scores for name in sets)]
        drawn = [(run, bins) for run in runs if len(bins := _bins(run, sets)) > 1]
        panels += [(unit, drawn)] if drawn else []
    if not panels:
        return None
    figure = new_figure(0.8 + 4.6 * len(panels), 4.4)
    for axes, (unit, drawn) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        edges = sorted({edge for _, bins in drawn for edge in bins})
        counts = [max(bins[edge][0] for _, bins in drawn if edge in bins) for edge in edges]
        few = [i for i, count in enumerate(counts) if count < FEW]
        for (run, (color, marker)), (_, bins) in zip(styled([run for run, _ in drawn]), drawn):
            rates = [100 * bins[edge][1] / bins[edge][2] if edge in bins else math.nan for edge in edges]
            style = {"color": color, "marker": marker, "markersize": 6}
            axes.plot(range(len(edges)), rates, linewidth=1.4, label=run.label, **style)
            axes.plot(few, [rates[i] for i in few], linestyle="", markerfacecolor="white", **style)
        names = [f"≥ {start:g}" if end == math.inf else f"{start:g}–{end:g}" for start, end in edges]
        axes.set_xticks(range(len(edges)), [f"{name} s\n{count:,} utts" for name, count in zip(names, counts)])
        axes.set_ylim(bottom=0)
        axes.margins(x=0.1)
        axes.grid(axis="y", **GRID)
        axes.set_ylabel(f"{'WER' if unit == 'word' else 'CER'} (%)")
        axes.set_title(f"Languages scored by {'word' if unit == 'word' else 'character'}", loc="left")
    legend_below(figure, ncols=4)
    caption = f"Error rate by length of the utterance, all target languages of a unit together, {context(encoder)}"
    how = f"compare the methods of a bin: another bin has another mix of languages; hollow: under {FEW} utterances"
    return f"{caption} ({how}; text profile: {results.headlines})", figure


def _bins(run: Run, sets: list[str]) -> dict[tuple[float, float], np.ndarray]:
    """{(from, to) in seconds: numbers of utterances, errors and reference units} over the sets."""
    bins: dict[tuple[float, float], np.ndarray] = {}
    for row in (row for name in sets for row in run.scores[name]["analysis"].get("by_duration", [])):
        edge = row["from_s"], math.inf if row["to_s"] is None else row["to_s"]
        bins[edge] = bins.get(edge, 0) + np.array([row["num_utts"], row["errors"], row["ref_len"]])
    return {edge: total for edge, total in bins.items() if total[2]}


def parameters(results: Results) -> Drawn | None:
    """Macro error rate over the target languages by trainable encoder parameters; None with fewer than two runs."""
    from matplotlib.ticker import LogLocator

    sets = by_language(results.targets())
    runs = [run for run in results.runs if run.is_known and run.stage == 2 and run.directory in results.macros]
    runs = [run for run in runs if run.train.get("num_trainable_encoder")]
    if len(runs) < 2:
        return None
    figure = new_figure(7, 4.6)
    axes = figure.add_subplot()
    seen: Counter[int] = Counter()
    for run, (color, marker) in styled(runs):
        size = run.train["num_trainable_encoder"]
        rate = run.error_rate(sets, headline=True)
        low, high = bootstrap.interval(results.macros[run.directory])
        fill = "white" if run.encoder == "chunked" else color
        place = size / 1e6 * 1.05 ** seen[size]  # side by side where the size is the same
        axes.errorbar(place, rate, [[rate - low], [high - rate]], color=color, marker=marker, markersize=8, capsize=3,
                      markerfacecolor=fill, linestyle="", label=run.label)  # fmt: skip
        seen[size] += 1
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.margins(x=0.1)
    axes.grid(**GRID)
    axes.set_xlabel("trainable encoder parameters (million)")
    axes.set_ylabel(f"mean WER/CER of {len(sets)} target languages (%)")
    if len({run.encoder for run in runs}) > 1:
        axes.set_title("hollow: chunked encoder", loc="left")
    legend_below(figure, ncols=3)
    caption = "Trainable encoder parameters and mean error rate over the target languages, with 95% intervals"
    return f"{caption} (left and below is better; text profile: {results.headlines})", figure


def _compared(results: Results, encoder: str, *, only_low: bool) -> tuple[list[list[str]], Run, list[Run]] | None:
    """What a panel of Figure 6 shows: language groups, the baseline, and the runs beside it."""
    groups, runs = _scored(results, encoder, only_low=only_low)
    stage2 = [run for run in runs if run.stage == 2]
    vanilla = [run for run in stage2 if run.system == "vanilla" and len(stage2) > 1]
    baseline = next(iter(vanilla + [run for run in runs if run.stage == 1]), None)
    others = [run for run in stage2 if run is not baseline]
    return (groups, baseline, others) if baseline and others else None


def _scored(results: Results, encoder: str, *, only_low: bool = False) -> tuple[list[list[str]], list[Run]]:
    """The target sets grouped by language, low-resource ones last, and the runs; only those with at least one score."""
    parts = [results.targets(low_resource=low) for low in ((True,) if only_low else (False, True))]
    groups = by_language(name for sets in parts for name in sorted(sets, key=lang_of))

    def has(run: Run, group: list[str]) -> bool:
        return run.error_rate([group]) is not None

    runs = [run for run in results.of(encoder, known=True) if any(has(run, group) for group in groups)]
    return [group for group in groups if any(has(run, group) for run in runs)], runs


def _accuracy(run: Run, group: list[str]) -> float:
    rate = run.error_rate([group])
    return math.nan if rate is None else max(0.0, 100 - rate)


def _gap(baseline: Run, run: Run, group: list[str]) -> float:
    before, after = baseline.error_rate([group]), run.error_rate([group])
    return math.nan if before is None or after is None or not before else 100 * (before - after) / before


def _smooth(values: Sequence[float]) -> np.ndarray:
    """The running mean over the last fiftieth of the steps."""
    window = max(1, len(values) // 50)
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)

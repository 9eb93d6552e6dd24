"""Figures 5 to 7 of arXiv:2603.17558 and training curves, as PNG and SVG that are the same bytes for the same numbers.

matplotlib is imported inside the functions, and only as objects: no pyplot, no global state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from zipperasr import files, languages
from zipperasr.reporting.results import ENCODERS, Results, Run, by_language, lang_of, language_embeddings, read_log

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart; a marker each, for print in grey.
STYLES = {
    "stage1": ("#7f7f7f", "x"),
    "vanilla": ("#0072B2", "o"),
    "flylora": ("#56B4E9", "v"),
    "independent": ("#009E73", "s"),
    "zipper_static": ("#E69F00", "^"),
    "zipper_hard": ("#CC79A7", "P"),
    "zipper_soft": ("#D55E00", "D"),
    "zipper_soft_initial_b": ("#000000", "*"),
}
OTHERS = (("#8B6914", "<"), ("#5D3A9B", ">"), ("#40B0A6", "h"))
GRID = {"color": "#d9d9d9", "linewidth": 0.6}
RC = {"svg.hashsalt": "zipperasr", "font.family": "DejaVu Sans", "font.size": 10, "axes.spines.top": False}
RC |= {"axes.spines.right": False, "axes.axisbelow": True, "axes.titlesize": 11, "legend.frameon": False}


def draw_all(results: Results, folder: Path) -> dict[str, str]:
    """Draw every figure that the results allow into `<folder>/<name>.{png,svg}`; returns {name: caption}."""
    import matplotlib

    captions = {}
    with matplotlib.rc_context(RC):
        for name, caption, figure in _figures(results):
            _save(figure, folder / name)
            captions[name] = caption
    return captions


def _figures(results: Results) -> Iterator[tuple[str, str, Figure]]:
    for encoder in results.encoders:
        if figure := radar(results, encoder):
            caption = "100 − WER/CER (%) on the target languages (as Fig. 5; outward is better)"
            yield f"radar_{encoder}", f"{caption}, {ENCODERS[encoder].lower()} encoder", figure
        if drawn := relative_gap(results, encoder):
            yield f"relative_gap_{encoder}", *drawn
    if embeddings := language_embeddings(results):
        caption = "Cosine similarity of Whisper's language embeddings (as Fig. 7)"
        yield "language_similarity", caption, similarity(embeddings)
    if figure := training_curves(results):
        yield "training_curves", "Loss per target token in nats, by optimizer step (dots: on the dev sets)", figure


def radar(results: Results, encoder: str) -> Figure | None:
    """Figure 5: one polygon a run over the target languages; None with fewer than three languages."""
    groups, runs = _scored(results, encoder)
    if len(groups) < 3 or not runs:
        return None
    figure = _figure(7.2, 6.6)
    axes = figure.add_subplot(projection="polar", theta_offset=math.pi / 2, theta_direction=-1)
    angles = [2 * math.pi * i / len(groups) for i in range(len(groups))]
    lowest = 100.0
    for run, (color, marker) in _styled(runs):
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
    axes.set_xticks(angles, [_language(lang_of(group[0])) for group in groups])
    axes.tick_params(axis="x", pad=3)
    for label, angle in zip(axes.get_xticklabels(), angles):
        side = math.sin(angle)
        label.set_ha("center" if abs(side) < 0.01 else "left" if side > 0 else "right")
    axes.grid(**GRID)
    axes.spines["polar"].set_color("#bfbfbf")
    axes.set_title(f"100 − WER/CER (%), {ENCODERS[encoder].lower()} encoder", pad=16)
    figure.legend(loc="outside lower center", ncols=min(4, len(runs)))
    return figure


def relative_gap(results: Results, encoder: str) -> tuple[str, Figure] | None:
    """Figure 6: relative error reduction against vanilla LoRA, or against Stage 1 where nothing else can be compared.

    Returns (caption, figure), or None where there are not two runs to compare. Bars beyond -100% are cut and say so.
    """
    groups, runs = _scored(results, encoder)
    stage2 = [run for run in runs if run.stage == 2]
    baselines = [run for run in stage2 if run.system == "vanilla" and len(stage2) > 1] + [
        r for r in runs if r.stage == 1
    ]
    others = [run for run in stage2 if run not in baselines[:1]]
    if not baselines or not others:
        return None
    figure = _figure(1.4 + len(groups) * max(0.82, 0.16 * len(others)), 4.2)
    axes = figure.add_subplot()
    num_well = sum(lang_of(group[0]) not in results.low_resource for group in groups)
    centres = [i + (0.6 if i >= num_well > 0 else 0) for i in range(len(groups))]
    bar = min(0.5, 0.8 / len(others))
    for i, (run, (color, _)) in enumerate(_styled(others)):
        gaps = [_gap(baselines[0], run, group) for group in groups]
        places = [centre + (i - (len(others) - 1) / 2) * bar for centre in centres]
        axes.bar(places, [max(gap, -100) for gap in gaps], width=0.92 * bar, color=color, label=run.label)
        for place, gap in zip(places, gaps):
            if gap < -100:
                axes.text(place, -97, f"−{-gap:.0f}%", rotation=90, ha="center", fontsize=7, color="white")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(centres, [_language(lang_of(group[0]), sep="\n") for group in groups])
    axes.tick_params(axis="x", length=0, labelsize=9)
    axes.set_ylabel("relative error reduction (%)")
    axes.grid(axis="y", **GRID)
    if 0 < num_well < len(groups):
        axes.axvline(num_well - 0.2, color="#8c8c8c", linewidth=0.8, linestyle=":")
        axes.text(num_well - 0.12, 1.01, "low-resource", transform=axes.get_xaxis_transform(), fontsize=9)
    axes.set_title(f"Against {baselines[0].label}, {ENCODERS[encoder].lower()} encoder", loc="left", pad=20)
    figure.legend(loc="outside lower center", ncols=min(4, len(others)))
    caption = f"Relative change of WER/CER against {baselines[0].label} (as Fig. 6; up is better)"
    return f"{caption}, {ENCODERS[encoder].lower()} encoder", figure


def similarity(embeddings: dict[str, list[float]]) -> Figure:
    """Figure 7: cosine similarity of language embeddings {lang: vector}."""
    langs = sorted(embeddings)
    cosines = [[_cosine(embeddings[a], embeddings[b]) if a != b else math.nan for b in langs] for a in langs]
    known = [value for row in cosines for value in row if not math.isnan(value)] or [0.0]
    size = 1.6 + 0.48 * len(langs)
    figure = _figure(size + 1.5, size)
    axes = figure.add_subplot(facecolor="#ececec")
    image = axes.imshow(cosines, cmap="cividis", vmin=min(known), vmax=max(known))
    for i, row in enumerate(cosines):
        for j, value in enumerate(row):
            text = "1" if i == j else f"{round(value, 2) + 0.0:.2f}".replace("-", "−")
            color = "white" if value < (min(known) + max(known)) / 2 else "black"
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(langs)), langs)
    axes.set_yticks(range(len(langs)), [_language(lang) for lang in langs])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("Cosine similarity of language embeddings", loc="left")
    figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03).outline.set_visible(False)
    return figure


def training_curves(results: Results) -> Figure | None:
    """Loss by step, a panel a stage and a line a run: each step faint, a running mean bold, dots for the dev loss."""
    from matplotlib.ticker import LogLocator

    logs = {run.directory: log for run in results.runs if (log := read_log(run))}
    stages = sorted({run.stage for run in results.runs if run.directory in logs})
    if not stages:
        return None
    figure = _figure(5.2 * len(stages) + 0.6, 4.2)
    for axes, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages):
        for run, (color, _) in _styled([run for run in results.runs if run.stage == stage and run.directory in logs]):
            steps, losses = zip(*((row["step"], row["loss"]) for row in logs[run.directory]))
            dashes = "--" if run.encoder == "chunked" and len(results.encoders) > 1 else "-"
            label = f"{run.label}, {ENCODERS.get(run.encoder, run.encoder).lower()}"
            dev = [(row["step"], row["dev_loss"]) for row in logs[run.directory] if "dev_loss" in row]
            axes.plot(steps, losses, color=color, alpha=0.2, linewidth=0.7)
            axes.plot(*zip(*dev) if dev else (), "o", color=color, markeredgecolor="white", markersize=6, zorder=3)
            axes.plot(steps, _smooth(losses), color=color, linewidth=1.6, linestyle=dashes, label=label)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.grid(**GRID)
        axes.set_xlabel("step")
        axes.set_ylabel("loss per token (nats)")
        axes.set_title(f"Stage {stage}", loc="left")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=9)
    return figure


def _scored(results: Results, encoder: str) -> tuple[list[list[str]], list[Run]]:
    """The target sets grouped by language, low-resource ones last, and the runs; only those with at least one score."""
    parts = (results.targets(low_resource=False), results.targets(low_resource=True))
    groups = by_language(name for sets in parts for name in sorted(sets, key=lang_of))

    def has(run: Run, group: list[str]) -> bool:
        return run.error_rate([group]) is not None

    runs = [run for run in results.of(encoder) if any(has(run, group) for group in groups)]
    return [group for group in groups if any(has(run, group) for run in runs)], runs


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _save(figure: Figure, path: Path) -> None:
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
        with files.beside(path.with_suffix(suffix)) as temporary:
            figure.savefig(temporary, dpi=160, bbox_inches="tight", pad_inches=0.15, metadata=metadata)


def _styled(runs: list[Run]) -> Iterator[tuple[Run, tuple[str, str]]]:
    """Each run with its system's colour and marker; systems that are not in the paper take further ones in turn."""
    others = list(dict.fromkeys(run.system for run in runs if run.system not in STYLES))
    styles = STYLES | {system: OTHERS[i % len(OTHERS)] for i, system in enumerate(others)}
    for run in runs:
        yield run, styles[run.system]


def _accuracy(run: Run, group: list[str]) -> float:
    rate = run.error_rate([group])
    return math.nan if rate is None else max(0.0, 100 - rate)


def _gap(baseline: Run, run: Run, group: list[str]) -> float:
    before, after = baseline.error_rate([group]), run.error_rate([group])
    return math.nan if before is None or after is None or not before else 100 * (before - after) / before


def _cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b)) / math.hypot(*a) / math.hypot(*b)


def _smooth(values: Sequence[float]) -> list[float]:
    """The running mean over the last fiftieth of the steps."""
    window = max(1, len(values) // 50)
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def _language(lang: str, sep: str = " ") -> str:
    return f"{languages.get(lang).name}{sep}({lang})"

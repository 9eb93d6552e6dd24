"""How every figure looks: a colour and a marker for each method and language, and files that are stable to the byte.

matplotlib is imported inside the functions, and only as objects: no pyplot, no global state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zipperasr import files, languages
from zipperasr.reporting.results import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart; a marker each, for print in grey.
GREY, BLUE, SKY, GREEN, ORANGE, PINK, RED = "#7f7f7f", "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#D55E00"
STYLES = {
    "stage1": (GREY, "x"),
    "vanilla": (BLUE, "o"),
    "flylora": (SKY, "v"),
    "independent": (GREEN, "s"),
    "zipper_static": (ORANGE, "^"),
    "zipper_hard": (PINK, "P"),
    "zipper_soft": (RED, "D"),
    "zipper_soft_initial_b": ("#000000", "*"),
}
OTHERS = (("#8B6914", "<"), ("#5D3A9B", ">"), ("#40B0A6", "h"))
COLORS, MARKERS = (BLUE, RED, GREEN, ORANGE, PINK, SKY, "#000000"), "osD^vP*X<>hdp"  # neither length divides the other
Drawn = tuple[str, "Figure"]
"""A caption, and what it stands under."""
GRID = {"color": "#d9d9d9", "linewidth": 0.6}
RC = {"svg.hashsalt": "zipperasr", "font.family": "DejaVu Sans", "font.size": 10, "axes.spines.top": False}
RC |= {"axes.spines.right": False, "axes.axisbelow": True, "axes.titlesize": 11, "legend.frameon": False}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def save(figure: Figure, path: Path) -> None:
    """Write `<path>.png` and `<path>.svg`, the same bytes for the same numbers."""
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
        with files.beside(path.with_suffix(suffix)) as temporary:
            figure.savefig(temporary, dpi=160, bbox_inches="tight", pad_inches=0.15, metadata=metadata)


def styled(runs: Sequence[Run]) -> Iterator[tuple[Run, tuple[str, str]]]:
    """Each run with its method's colour and marker; methods that are not in the paper take further ones in turn."""
    others = list(dict.fromkeys(run.system for run in runs if run.system not in STYLES))
    styles = STYLES | {system: OTHERS[i % len(OTHERS)] for i, system in enumerate(others)}
    for run in runs:
        yield run, styles[run.system]


def language(lang: str, sep: str = " ") -> str:
    """A language's name and code."""
    return f"{languages.get(lang).name}{sep}({lang})"


def number(value: float) -> str:
    """Two decimals, with a proper minus sign and no negative zero."""
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")


def legend_below(figure: Figure, *, ncols: int) -> None:
    """One legend under all panels, each label once."""
    handles = {label: handle for one in figure.axes for handle, label in zip(*one.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(ncols, len(handles)))


def heat_map(axes: Axes, values: Sequence[Sequence[float]], texts: Sequence[Sequence[str]] | None, **scale: Any) -> Any:
    """Draw `values` (nan: grey) with `texts` in the cells; `scale` has vmin and vmax. Returns the image, for a bar."""
    image = axes.imshow(values, cmap="cividis", aspect="auto", **scale)
    axes.set_facecolor("#ececec")
    for i, row in enumerate(texts or ()):
        for j, text in enumerate(row):
            is_dark = values[i][j] < (scale["vmin"] + scale["vmax"]) / 2
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if is_dark else "black")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image

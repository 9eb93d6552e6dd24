"""Figures of languages against each other: similarity, router, wrong-language decoding, and the encoder's outputs."""

from __future__ import annotations

import math
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from zipperasr import files
from zipperasr.errors import UserError
from zipperasr.reporting.results import Results, Run, context, lang_of
from zipperasr.reporting.style import COLORS, MARKERS, Drawn, heat_map, language, legend_below, new_figure, number
from zipperasr.reporting.tables import stress_rates

MOST_PER_LANGUAGE = 50
COMPARED = ("vanilla", "zipper_soft")
"""Systems whose encoder outputs are drawn beside each other, as in Figure 8."""


def similarity(embeddings: dict[str, list[float]]) -> Drawn | None:
    """Figure 7: cosine similarity of language embeddings {lang: vector}; None where there is none."""
    if not embeddings:
        return None
    langs = sorted(embeddings)
    vectors = np.array([embeddings[lang] for lang in langs])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ vectors.T
    others = cosines[~np.eye(len(langs), dtype=bool)]
    np.fill_diagonal(cosines, math.nan)
    texts = [["1" if math.isnan(value) else number(value) for value in row] for row in cosines]
    size = 1.6 + 0.48 * len(langs)
    figure = new_figure(size + 1.5, size)
    axes = figure.add_subplot()
    image = heat_map(axes, cosines, texts, vmin=min(others, default=0), vmax=max(others, default=1))
    axes.set_xticks(range(len(langs)), langs)
    axes.set_yticks(range(len(langs)), [language(lang) for lang in langs])
    axes.set_title("Cosine similarity of language embeddings", loc="left")
    figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03).outline.set_visible(False)
    return "Cosine similarity of Whisper's language embeddings (as Fig. 7)", figure


def router_shares(results: Results, encoder: str) -> Drawn | None:
    """The share of specific ranks by language and encoder block, a panel a routed method; None if none is routed."""
    runs = results.of(encoder, known=True)
    paths = [run.directory / "inspect.json" for run in runs]
    found = [(run, files.read_json(path)) for run, path in zip(runs, paths) if path.is_file()]
    shares = [(run, figures["specific_share"]) for run, figures in found if "specific_share" in figures]
    if not shares:
        return None
    known = [share for _, by_lang in shares for row in by_lang.values() for share in row]
    num_blocks = len(next(iter(shares[0][1].values())))
    langs = sorted(shares[0][1])
    width = max(2.6, 0.42 * num_blocks if num_blocks <= 12 else 0.13 * num_blocks)
    figure = new_figure(1.9 + width * len(shares), 1.2 + 0.3 * len(langs))
    panels = figure.subplots(1, len(shares), squeeze=False, sharey=True)[0]
    for axes, (run, by_lang) in zip(panels, shares):
        rows = [by_lang[lang] for lang in langs]
        texts = [[f"{share:.2f}" for share in row] for row in rows] if num_blocks <= 12 else None
        image = heat_map(axes, rows, texts, vmin=min(known), vmax=max(known))
        axes.set_title(run.label, loc="left")
        axes.set_xlabel("encoder block")
        axes.set_xticks(range(0, num_blocks, 1 if num_blocks <= 12 else 4))
    panels[0].set_yticks(range(len(langs)), [language(lang) for lang in langs])
    bar = figure.colorbar(image, ax=list(panels), fraction=0.046, pad=0.02, label="share of specific ranks")
    bar.outline.set_visible(False)
    caption = "Share of ranks that the router takes from a language's own bank, by encoder block (1: nothing is shared)"
    return f"{caption}, {context(encoder)}", figure


def stress(run: Run) -> Drawn:
    """A run's wrong-language stress test: the sets, by the language whose prompt and adapter decoded them."""
    from matplotlib.patches import Rectangle

    rates = stress_rates(run)
    values = np.array(list(rates.values()), dtype=float)
    texts = [["" if math.isnan(value) else f"{value:.0f}" for value in row] for row in values]
    figure = new_figure(2.6 + 0.5 * len(run.stress), 1.3 + 0.42 * len(rates))
    axes = figure.add_subplot()
    image = heat_map(axes, values, texts, vmin=0, vmax=100)
    others = list(run.stress)
    for i, lang in enumerate(map(lang_of, rates)):
        if lang in others:
            place = (others.index(lang) - 0.5, i - 0.5)
            axes.add_patch(Rectangle(place, 1, 1, fill=False, edgecolor="white", linewidth=2))
    axes.set_xticks(range(len(others)), others)
    axes.set_yticks(range(len(rates)), rates)
    axes.set_xlabel("language of prompt and adapter")
    axes.set_title(f"WER/CER (%), {run.label}, {context(run.encoder)}", loc="left")
    figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03, extend="max").outline.set_visible(False)
    caption = f"Wrong-language stress test of {run.label}, {context(run.encoder)}: WER/CER (%)"
    return f"{caption} (framed: the right language; a row dark elsewhere too hardly needs its own adapter)", figure


def encodings(results: Results, encoder: str) -> Drawn | None:
    """Figure 8: t-SNE of the encoder's outputs averaged over time, a point an utterance.

    Each dimension is scaled to unit variance first. The silhouette score is of those vectors and not of the map.
    """
    from matplotlib.patheffects import withStroke

    runs = [run for run in results.of(encoder) if run.system in COMPARED]
    halo = [withStroke(linewidth=3, foreground="white")]
    found = [(run, *read) for run in runs if (read := _read_encodings(results, run))]
    if not found:
        return None
    figure = new_figure(0.6 + 4.6 * len(found), 5.4)
    scores = []
    for axes, (run, langs, vectors) in zip(figure.subplots(1, len(found), squeeze=False)[0], found):
        places, silhouettes = _embed(vectors, langs)
        for i, lang in enumerate(sorted({*map(lang_of, results.target_sets)})):
            style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "linestyle": ""}
            own = places[langs == lang]
            if len(own):
                axes.plot(*own.T, alpha=0.8, markersize=6, markeredgewidth=0, label=language(lang), **style)
                axes.annotate(lang, np.median(own, axis=0), ha="center", va="center", weight="bold", path_effects=halo)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(f"{run.label}: silhouette {number(silhouettes.mean())}", loc="left")
        few = np.isin(langs, results.low_resource)
        low = f", of low-resource ones {number(silhouettes[few].mean())}" if few.any() else ""
        scores.append(f"{run.label} {number(silhouettes.mean())}{low}")
    legend_below(figure, ncols=6)
    caption = f"t-SNE of encoder outputs (as Fig. 8), {context(encoder)}; silhouette score of the languages"
    return f"{caption} (1: apart, 0: mixed): {'; '.join(scores)}", figure


def _read_encodings(results: Results, run: Run) -> tuple[np.ndarray, np.ndarray] | None:
    """The languages [N] and standardised vectors [N, D] of a run's target sets; None where fewer than two have any."""
    langs: list[str] = []
    vectors: list[np.ndarray] = []
    for name in results.target_sets:
        path = run.decode_dir(name) / "encodings.npz"
        if path.is_file():
            vectors += [*_load(path)][: MOST_PER_LANGUAGE - langs.count(lang_of(name))]
            langs += [lang_of(name)] * (len(vectors) - len(langs))
    if not 1 < len(set(langs)) < len(langs):
        return None
    stacked = np.stack(vectors).astype(np.float64)
    return np.array(langs), (stacked - stacked.mean(axis=0)) / (stacked.std(axis=0) + 1e-12)


def _load(path: Path) -> np.ndarray:
    try:
        with np.load(path) as stored:
            return stored["vectors"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise UserError(f"{path}: not the outputs of an encoder ({error}); decode this set again") from error


def _embed(vectors: np.ndarray, langs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places in the plane [N, 2] and silhouettes [N]. One thread, because sums by several end in other digits."""
    from sklearn.manifold import TSNE
    from sklearn.metrics import silhouette_samples
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        perplexity = min(30, (len(vectors) - 1) / 3)
        places = TSNE(perplexity=perplexity, init="pca", max_iter=500, random_state=0).fit_transform(vectors)
        return places, silhouette_samples(vectors, langs)

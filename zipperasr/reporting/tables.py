"""Tables II to VI of arXiv:2603.17558 beside the paper's own figures, overviews, and what went into the numbers."""

import csv
import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from zipperasr import files, languages
from zipperasr.reporting import cross_check as check
from zipperasr.reporting import paper
from zipperasr.reporting.results import ENCODERS, Results, Run, by_language, context, lang_of, mean_rate
from zipperasr.scoring import bootstrap
from zipperasr.scoring.score import Counts

CORPORA = {
    "commonvoice": "Common Voice",
    "librispeech": "LibriSpeech",
    "mls": "MLS",
    "msr86k": "MSR-86K",
    "wenetspeech": "WenetSpeech",
}
MISSING = "–"
FLAGS = ("capped", "loop", "script", "redecoded", "cut", "no_speech", "unreadable", "split", "empty")
SIGNS = ("insertion_bursts", "whole_deletions", "script_mismatch", "language_mismatch")
SHARES = {"encoder_s": "encoder", "prefill_s": "prefill", "step_s": "steps", "detokenise_s": "detokenise"}
SIGNALS = ("by CTC", "by LLM")
Cell = str | float | int | None
Line = tuple[list[str], list[Run | None]]
"""A row to be: its texts, and the run whose rate each column shows."""


class Difference(float):
    """A number that is shown with its sign."""


@dataclasses.dataclass(frozen=True)
class Column:
    """Error rates under one heading: the mean over languages of each language's mean over its sets."""

    group: str
    label: str
    sets: list[list[str]]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table with two header lines (group, label); the first `num_text` columns are text. None is a missing cell.

    `bold` are the (row, column) of cells that stand out, the best ones as a rule; `note` says how to read the table.
    """

    name: str
    title: str
    header: list[tuple[str, str]]
    rows: list[list[Cell]]
    num_text: int = 1
    bold: frozenset[tuple[int, int]] = frozenset()
    note: str = ""

    def markdown(self) -> str:
        """GitHub's Markdown; the header's groups, if any, stand above its labels."""
        groups = [group if i == 0 or group != self.header[i - 1][0] else "" for i, (group, _) in enumerate(self.header)]
        labels = [label for _, label in self.header]
        lines = [[f"**{label}**" if label else "" for label in labels]] if any(groups) else []
        for i, row in enumerate(self.rows):
            lines.append([f"**{text(cell)}**" if (i, j) in self.bold else text(cell) for j, cell in enumerate(row)])
        rule = [":--"] * self.num_text + ["--:"] * (len(labels) - self.num_text)
        return "".join(f"| {' | '.join(line)} |\n" for line in [groups if any(groups) else labels, rule, *lines])

    def write(self, folder: Path) -> None:
        """Write `<name>.md` and `<name>.csv`; in the latter a missing cell is empty and rates are unrounded."""
        with files.write(folder / f"{self.name}.md") as stream:
            stream.write(f"# {self.title}\n\n{self.markdown()}" + f"\n{self.note}\n" * bool(self.note))
        with files.write(folder / f"{self.name}.csv") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow([f"{group} {label}".strip() for group, label in self.header])
            writer.writerows(self.rows)


def text(cell: Cell) -> str:
    """A cell as people read it."""
    if cell is None:
        return MISSING
    if isinstance(cell, Difference):
        return f"{cell:+.2f}".replace("-", "−")
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)


def all_tables(results: Results) -> list[Table]:
    """Every table for which there is at least one run, overviews first."""
    tables = [overview(results, encoder) for encoder in results.encoders]
    tables += [
        significance(results),
        source_before(results),
        source_after(results),
        well_resourced(results, "chunked", number="IV"),
        well_resourced(results, "full", number="V"),
        low_resource(results),
        profiles(results),
        guards(results),
        *(confusion(results, encoder) for encoder in results.encoders),
        *(stress(run) for run in results.runs if run.stress),
        *(cross_check(run) for run in results.runs if run.checks),
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
    header = [("", label) for label in ("Set", "Language", "Metric", *(run.label for run in runs))]
    title = f"Overview, {context(encoder)}: WER/CER (%)"
    rows = rows if runs else []
    bold = frozenset((i, 3 + j) for i, row in enumerate(rows) for j in _lowest(row[3:]))
    note = "Bold: the lowest of a row."
    return Table(f"overview_{encoder}", title, header, rows, num_text=3, bold=bold, note=note)


def source_before(results: Results) -> Table:
    """Table II: Stage 1 on the source-domain sets."""
    title = "Table II. Foundation baseline (Stage 1) on source-domain sets: WER/CER (%)"
    columns = _columns(results.source_sets)
    lines = [([ENCODERS[run.encoder]], [run] * len(columns)) for run in _compared(results, 1)]
    return _table("table2_source_stage1", title, ["Encoder"], columns, lines)


def source_after(results: Results) -> Table:
    """Table III: every Stage-2 method on the source-domain sets, per encoder context."""
    title = "Table III. Source-domain sets after Stage 2: WER/CER (%)"
    columns = _columns(results.source_sets)
    lines = [(_named(run), [run] * len(columns)) for run in _compared(results, 2)]
    return _table("table3_source_stage2", title, ["Encoder", "Method"], columns, lines)


def well_resourced(results: Results, encoder: str, *, number: str) -> Table:
    """Tables IV (chunked) and V (non-chunked): Stage-2 methods on the high-resource target sets."""
    title = f"Table {number}. High-resource target languages, {context(encoder)}: WER/CER (%)"
    columns = _columns(results.targets(low_resource=False), averages=True)
    lines = [([run.label], [run] * len(columns)) for run in _compared(results, 2) if run.encoder == encoder]
    name = {"IV": "table4", "V": "table5"}[number]
    return _table(f"{name}_high_resource_{encoder}", title, ["Method"], columns, lines)


def low_resource(results: Results) -> Table:
    """Table VI: Stage-2 methods on the low-resource target sets, both encoder contexts side by side."""
    own = _columns(results.targets(low_resource=True))
    several = len({column.group for column in own}) > 1
    encoders = [encoder for encoder in results.encoders for _ in own]
    columns = [
        Column(ENCODERS[encoder], f"{column.label} ({column.group})" if several else column.label, column.sets)
        for encoder in results.encoders
        for column in own
    ]
    runs = {(run.system, run.encoder): run for run in _compared(results, 2)}
    systems = {run.system: run.label for run in sorted(runs.values(), key=lambda run: results.runs.index(run))}
    lines = [([label], [runs.get((system, encoder)) for encoder in encoders]) for system, label in systems.items()]
    title = "Table VI. Low-resource target languages: WER/CER (%)"
    return _table("table6_low_resource", title, ["Method"], columns, lines)


def significance(results: Results) -> Table:
    """Macro error rates with 95% intervals, and paired differences to vanilla LoRA of the same encoder with their p."""
    sets = by_language(results.targets())
    vanilla = {run.encoder: run for run in results.runs if run.system == "vanilla"}
    rows: list[list[Cell]] = []
    bold = set()
    for run in (run for encoder in results.encoders for run in results.of(encoder)):
        drawn = results.macros.get(run.directory)
        if drawn is None:
            continue
        rate = run.error_rate(sets, headline=True)
        row = [ENCODERS[run.encoder], run.label, rate, *bootstrap.interval(drawn), None, None, None, None]
        baseline = vanilla.get(run.encoder)
        if baseline and baseline is not run and _same_lists(run, baseline, sets):
            differences = drawn - results.macros[baseline.directory]
            gap = rate - baseline.error_rate(sets, headline=True)
            p = bootstrap.p_value(gap, differences)
            row[5:] = [*map(Difference, (gap, *bootstrap.interval(differences))), f"{p:.3f}"]
            bold |= {(len(rows), 5)} if p < 0.05 else set()
        rows.append(row)
    header = [("", "Encoder"), ("", "Method"), *(("Macro error rate", label) for label in ("%", "from", "to"))]
    header += [("Difference to Vanilla-LoRA", label) for label in ("points", "from", "to", "p")]
    title = f"Macro error rate over {len(sets)} target languages (%): intervals and significance"
    note = (
        "From–to: 95% of 1000 paired bootstrap resamples of the test utterances; p: two-sided, of no difference. "
        f"Bold: p < 0.05. The chance of a training (its seed) is not in them. Text profile: {results.headlines}."
    )
    return Table("significance", title, header, rows, num_text=2, bold=frozenset(bold), note=note)


def profiles(results: Results) -> Table:
    """Every run under both text profiles, on the sets whose references they divide differently."""

    def lengths_differ(run: Run, name: str) -> bool:
        return name in run.scores and len({p["ref_len"] for p in run.scores[name]["profiles"].values()}) > 1

    def rates(run: Run, name: str) -> list[Cell]:
        if name not in run.scores:
            return [None] * len(names)
        return [run.scores[name]["profiles"].get(profile, {}).get("error_rate") for profile in names]

    names = list(dict.fromkeys(p for run in results.runs for score in run.scores.values() for p in score["profiles"]))
    runs = [run for encoder in results.encoders for run in results.of(encoder) if run.scores]
    sets = (*results.target_sets, *results.source_sets)
    differing = [column for column in _columns(sets) if any(lengths_differ(run, column.sets[0][0]) for run in runs)]
    header = [("", "Encoder"), ("", "Method")]
    header += [(f"{column.group} {column.label}", profile) for column in differing for profile in names]
    rows = [[*_named(run), *(cell for c in differing for cell in rates(run, c.sets[0][0]))] for run in runs]
    rows = [row for row in rows if any(cell is not None for cell in row[2:])]
    note = "`whisper` strips the vowel marks of Thai and Arabic, as in the paper; `marks` keeps them."
    title = "Both text profiles, where they differ: WER/CER (%)"
    return Table("profiles", title, header, rows if differing else [], num_text=2, note=note)


def guards(results: Results) -> Table:
    """By run how many utterances each guard of decoding marked, over all its sets."""
    rows: list[list[Cell]] = []
    for run in results.runs:
        if run.scores:
            counts = [sum(score["flags"].get(flag, 0) for score in run.scores.values()) for flag in FLAGS]
            rows.append([run.directory.name, *_utterances(run), *counts])
    labels = ("Run", "Utterances", "No hypothesis", *FLAGS)
    note = (
        "Of all utterances of a run: *capped* stopped at the cap of tokens; *loop* repeated itself, *script* was in a "
        "foreign one: both are *redecoded*, or *cut* where the loop began; *no_speech*: silence or noise, not decoded."
    )
    return Table("guards", "What the guards of decoding did", [("", label) for label in labels], rows, note=note)


def confusion(results: Results, encoder: str) -> Table:
    """Utterances of each set with a sign of hallucination or of a wrong language, beside the references' own."""
    runs = [run for run in results.of(encoder) if run.scores]
    rows: list[list[Cell]] = []
    for sign in SIGNS:
        for name in sorted({name for run in runs for name in run.scores}):
            found = [_sign(run.scores[name], sign) if name in run.scores else {} for run in runs]
            if any(f.get("num") for f in found):
                known = [f for f in found if f]
                langs = sum((Counter(f.get("langs")) for f in known), Counter())
                taken_for = ", ".join(f"{lang} {-num}" for num, lang in sorted((-n, lang) for lang, n in langs.items()))
                judged, own = max(f["of"] for f in known), known[0].get("num_in_refs")
                label = sign.capitalize().replace("_", " ")
                rows.append([label, name, judged, *(f.get("num") for f in found), own, taken_for or None])
    labels = ("Sign", "Set", "Judged", *(run.label for run in runs), "References", "Taken for")
    title = f"Hallucination and confusion of languages, {context(encoder)}: utterances"
    note = (
        "Rows of zeros are left out. *Judged*: of how many it could be said. *References*: in how many of these the "
        "same test finds the sign, be it by mistake or because speech does switch. *Taken for*: by all runs."
    )
    return Table(f"confusion_{encoder}", title, [("", label) for label in labels], rows, num_text=2, note=note)


def _sign(score: dict, sign: str) -> dict:
    found = score["analysis"][sign]
    return {"num": found, "of": score["num_utts"]} if isinstance(found, int) else found


def stress(run: Run) -> Table:
    """A run's wrong-language stress test: rows are sets, columns the language whose prompt and adapter decoded them."""
    rates = stress_rates(run)
    bold = frozenset((i, 1 + j) for i, row in enumerate(rates.values()) for j in _lowest(row))
    header = [("", "Set"), *(("Prompt and adapter", lang) for lang in run.stress)]
    title = f"Wrong-language stress test, {run.label}, {context(run.encoder)}: WER/CER (%)"
    most = max(score["num_utts"] for scores in run.stress.values() for score in scores.values())
    note = f"Bold: the lowest of a row. At most {most} utterances a set."
    rows = [[name, *row] for name, row in rates.items()]
    return Table(f"stress_{run.directory.name}", title, header, rows, bold=bold, note=note)


def stress_rates(run: Run) -> dict[str, list[float | None]]:
    """The error rates of each set of a stress test, in the order of `run.stress`."""
    sets = sorted({name for scores in run.stress.values() for name in scores}, key=lambda name: (lang_of(name), name))
    return {name: [scores.get(name, {}).get("error_rate") for scores in run.stress.values()] for name in sets}


def cross_check(run: Run) -> Table:
    """How far a run's hypotheses are from what its CTC head alone hears, by set, and whether that tells bad ones."""
    checks = {name: list(found.utts.values()) for name, found in run.checks.items() if found.utts}
    means = {name: _means(utts) for name, utts in checks.items()}
    rows: list[list[Cell]] = [[name, *means[name], *_detections(utts)] for name, utts in checks.items()]
    if len(rows) > 1:
        columns = [dict(zip(means, column)) for column in zip(*means.values())]
        macros = [mean_rate(by_language(checks), column.get) for column in columns]
        rows.append([f"**All {len(rows)} sets**", *macros, *_detections([u for utts in checks.values() for u in utts])])
    bold = {(i, 6 + j) for i, row in enumerate(rows) for j in _lowest([cell and -cell for cell in row[6:8]])}
    bold |= {(i, 8 + j) for i, row in enumerate(rows) for j in _lowest(row[8:10])}
    header = [("", "Set"), *(("Error rate (%)", label) for label in ("LLM", "CTC alone")), ("", "Disagreement")]
    header += [("", "Checked"), ("", f"Over {check.BAD}% wrong"), *(("AUC", label) for label in SIGNALS)]
    header += [(f"To find {check.CAUGHT}%, look at (%)", label) for label in SIGNALS] + [("", "Threshold")]
    note = (
        "*Disagreement* (0 to 1): by how many characters the hypothesis is not what the CTC head alone hears; compare "
        "it within a language. *Checked*: the head knows the characters. *AUC*: the chance that an utterance over "
        f"{check.BAD}% wrong has more disagreement (by CTC), or a lower log-probability (by LLM), than another; 0.5 is "
        "luck. *To find*: the most suspicious first; *Threshold*: the disagreement of the last. Bold: the better of "
        "the two. Error rates and disagreement of all sets: means over languages; the rest is of all utterances."
    )
    title = f"Cross-check by CTC, {run.label}, {context(run.encoder)}"
    return Table(f"cross_check_{run.directory.name}", title, header, rows, bold=frozenset(bold), note=note)


def _means(utts: list[check.Checked]) -> list[float | None]:
    """The error rates of the hypotheses and of what CTC hears, and the mean disagreement."""
    known = [u.disagreement for u in utts if u.disagreement is not None]
    totals = (sum(counts, Counts()) for counts in ((u.hyp for u in utts), (u.ctc for u in utts)))
    return [*(total.error_rate for total in totals), fmean(known) if known else None]


def _detections(utts: list[check.Checked]) -> list[Cell]:
    """How many utterances are checked, and how many bad; AUC, and share to look at, of disagreement and of the LLM."""
    known = [u for u in utts if u.disagreement is not None]
    is_bad = [u.is_bad for u in known]
    signals = [u.disagreement for u in known], [None if u.logprob is None else -u.logprob for u in known]
    found = [check.detect(is_bad, signal) for signal in signals]
    cells = [one and getattr(one, key) for key in ("auc", "share") for one in found]
    return [len(known), sum(is_bad), *cells, found[0] and found[0].threshold]


def cost(results: Results) -> Table:
    """Every run with its size, training time, and decoding speed (audio seconds per wall second)."""
    names = ["Run", "Trainable (M)", "of which encoder (M)", "Steps", "Training (min)", "ms per step", "Audio (h)"]
    names += ["Test utterances", "No hypothesis", "RTFx", *(f"{share} (%)" for share in SHARES.values())]
    note = (
        "RTFx: seconds of audio decoded in a second; the shares are of that time. "
        "The training of the run that an Initial-B run begins from is not in the latter's own."
    )
    return Table("runs", "Runs and their cost", [("", name) for name in names], [*map(_cost, results.runs)], note=note)


def _cost(run: Run) -> list[Cell]:
    def scaled(key: str, unit: float) -> float | None:
        return run.train[key] / unit if key in run.train else None

    timings = [t for t in run.timing.values() if t.get("wall_s")]
    wall_s = sum(t["wall_s"] for t in timings)
    rtfx = sum(t["audio_s"] for t in timings) / wall_s if timings else None
    shares = [100 * sum(t.get(key, 0) for t in timings) / wall_s if timings else None for key in SHARES]
    steps = run.train.get("steps")
    sizes = [scaled("num_trainable", 1e6), scaled("num_trainable_encoder", 1e6)]
    times = [steps, scaled("wall_s", 60), scaled("wall_s", steps / 1e3) if steps else None, scaled("audio_s", 3600)]
    return [run.directory.name, *sizes, *times, *_utterances(run), rtfx, *shares]


def _utterances(run: Run) -> list[int]:
    """How many utterances are scored, and how many of them have no hypothesis."""
    return [sum(score[key] for score in run.scores.values()) for key in ("num_utts", "num_missing")]


def _named(run: Run) -> list[str]:
    return [ENCODERS[run.encoder], run.label]


def _compared(results: Results, stage: int) -> list[Run]:
    """The runs of the methods that are compared, by encoder."""
    runs = (run for encoder in results.encoders for run in results.of(encoder, known=True))
    return [run for run in runs if run.stage == stage and run.scores]


def _table(name: str, title: str, heads: list[str], columns: list[Column], lines: list[Line]) -> Table:
    """Our rates, the lowest of a column and encoder bold; where they compare, the paper's and the differences below."""
    rows: list[list[Cell]] = []
    places: dict[tuple[int, str], list[int]] = {}  # the rows with a rate of ours by column and encoder
    for texts, runs in lines if columns else ():
        pairs = list(zip(runs, columns, strict=True))
        for j, (run, _) in enumerate(pairs, len(heads)):
            places.setdefault((j, run.encoder if run else ""), []).append(len(rows))
        rates = [run.error_rate(column.sets) if run else None for run, column in pairs]
        theirs = [_paper_rate(run, column.sets) if run else None for run, column in pairs]
        rows.append([*texts, *rates])
        if any(rate is not None for rate in theirs):
            gaps = [None if None in pair else Difference(pair[0] - pair[1]) for pair in zip(rates, theirs)]
            for what, cells in (("paper", theirs), ("difference", gaps)):
                rows.append([*texts[:-1], f"{texts[-1]}, {what}", *cells])
    bold = frozenset((own[k], j) for (j, _), own in places.items() for k in _lowest([rows[i][j] for i in own]))
    header = [*(("", head) for head in heads), *((column.group, column.label) for column in columns)]
    note = "Bold: our lowest of a column" + (" and encoder." if "Encoder" in heads else ".")
    note += " Paper: arXiv:2603.17558, for sets and training data of the same names." if len(rows) > len(lines) else ""
    return Table(name, title, header, rows, num_text=len(heads), bold=bold, note=note)


def _paper_rate(run: Run, sets: list[list[str]]) -> float | None:
    """The paper's error rate, if the run had such training data, and whole lists are scored by the same profile."""
    scores = [run.scores.get(name, {}) for group in sets for name in group]
    if run.setting != paper.SETTINGS[run.stage] or any(score.get("profile") != paper.PROFILE for score in scores):
        return None
    if any(run.meta[name].get("first") for group in sets for name in group):
        return None
    return mean_rate(sets, paper.RATES.get(run.encoder, {}).get(run.system, {}).get)


def _same_lists(run: Run, other: Run, sets: list[list[str]]) -> bool:
    keys = ("num_utts", "ref_len")
    return other.directory != run.directory and all(
        name in other.scores and all(run.scores[name][key] == other.scores[name][key] for key in keys)
        for group in sets
        for name in group
    )


def _lowest(cells: list[Cell]) -> list[int]:
    """Where the lowest of the cells stands, if there are two to compare."""
    known = [cell for cell in cells if cell is not None]
    return [i for i, cell in enumerate(cells) if cell == min(known)] if len(known) > 1 else []


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

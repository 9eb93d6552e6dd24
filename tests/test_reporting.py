"""Claims about reports, on fabricated experiment directories with known numbers."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy
import yaml

from zipperasr import languages
from zipperasr.errors import UserError
from zipperasr.reporting import figures, maps, paper, report, results, tables

TARGET = [f"read_{lang}_test" for lang in ["ar", "de", "en", "es", "fr", "it", "ja", "ko", "pt", "ru", "th", "vi"]]
SOURCE = ["talk_en_test", "talk_zh_test_meeting", "talk_zh_test_net"]
CONFIG = {
    "training": {"stage1": {"setting": "source"}, "stage2": {"setting": "target"}},
    "data": {
        "lists": {"settings": {"source": {"test": dict.fromkeys(SOURCE)}, "target": {"test": dict.fromkeys(TARGET)}}}
    },
}


def make_run(exp, name, rates, *, config=CONFIG, **decode):
    """A run directory with the error rates {set: percent}, a log and everything that a report reads."""
    system, _, encoder = name.rpartition("_")
    run = exp / name
    run.mkdir(parents=True, exist_ok=True)
    for set_name, rate in rates.items():
        errors = [int(rate) // 10 + (i < rate % 10) for i in range(10)]
        make_decode(run / f"decode_{set_name}", errors, encoder=encoder, stage=1 if system == "stage1" else 2, **decode)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [{"step": step, "loss": 5 / step} for step in (1, 2, 3, 2, 3, 4)]
    (run / "log.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"step": 5, "lo')
    (run / "train.json").write_text(
        '{"steps": 4, "wall_s": 90.0, "num_trainable": 2500000, "num_trainable_encoder": 500000,"audio_s": 7200.0}'
    )
    embeddings = {lang: [1.0, i, i * i] for i, lang in enumerate(["de", "en", "th"])}
    (run / "language_embeddings.json").write_text(json.dumps(embeddings))
    if system.startswith("zipper_soft"):
        (run / "inspect.json").write_text(json.dumps({"specific_share": {"de": [0.25, 0.5], "th": [0.5, 1.0]}}))


def make_decode(folder, errors, *, encoder="full", stage=2, missing=0, marks=(), meta=(), flags=(), analysis=()):
    """A scored decode directory: utterances of ten words or characters, of which so many of each are substituted."""
    folder.mkdir(parents=True)
    set_name = folder.name.removeprefix("decode_")
    lang = set_name.split("_")[1]
    space = " " if languages.get(lang).unit == "word" else ""
    total, ref_len = sum(errors), 10 * len(errors)
    ids = [f"{set_name}-{i}" for i in range(len(errors))]
    for name, texts in (("ref", ["abcdefghij"] * len(errors)), ("hyp", ["z" * n + "abcdefghij"[n:] for n in errors])):
        (folder / name).write_text("".join(f"{i} {space.join(text)}\n" for i, text in zip(ids, texts)))
    rows = (f"{i}\t10\t{10 - n}\t{n}\t0\t0\t{10 * n:.2f}\n" for i, n in zip(ids, errors))
    (folder / "per_utt").write_text("id\tref_len\thits\tsub\tins\tdel\trate\n" + "".join(rows))
    whisper = {
        "ref_len": ref_len,
        "hits": ref_len - total,
        "sub": total,
        "ins": 0,
        "del": 0,
        "signature": "wer|unit:word",
    }
    whisper |= {"error_rate": 100 * total / ref_len, "interval": [0.0, 100.0]}
    found = {"insertion_bursts": 0, "whole_deletions": 0, "script_mismatch": {"num": 0, "of": 10, "num_in_refs": 0}}
    found |= {"language_mismatch": {"num": 0, "of": 9, "num_in_refs": 0, "langs": {}}} | dict(analysis)
    scores = {"set": set_name, "lang": lang, "metric": languages.get(lang).metric, "unit": languages.get(lang).unit}
    scores |= {"profile": "whisper", "num_utts": len(errors), "num_missing": missing, "missing": ids[:missing]}
    scores |= {"num_empty_refs": 0, "flags": dict(flags), "analysis": found}
    profiles = {"whisper": whisper, "marks": whisper | dict(marks)}
    (folder / "scores.json").write_text(json.dumps(scores | {"profiles": profiles}))
    described = {"set": set_name, "lang": lang, "encoder": encoder, "stage": stage, "first": None} | dict(meta)
    (folder / "meta.json").write_text(json.dumps(described))
    parts = {"encoder_s": 5.0, "prefill_s": 2.0, "step_s": 12.0, "detokenise_s": 1.0}
    (folder / "timing.json").write_text(json.dumps({"audio_s": 300.0, "wall_s": 20.0, **parts}))


def bold_of(table):
    return {(table.rows[i][0], "".join(table.header[j]), table.rows[i][j]) for i, j in table.bold}


@pytest.fixture
def exp(tmp_path):
    return make_experiment(tmp_path / "exp" / "mini")


@pytest.fixture(scope="module")
def whole_report(tmp_path_factory):
    exp = make_experiment(tmp_path_factory.mktemp("exp"))
    for i, lang in enumerate(("de", "ja", "th")):
        vectors = np.random.default_rng(i).normal(i, size=(8, 5)).astype(np.float32)
        np.savez(
            exp / "vanilla_full" / f"decode_read_{lang}_test" / "encodings.npz",
            ids=np.arange(8).astype(str),
            vectors=vectors,
        )
    return report.write(results.collect(exp), exp / "report").parent


def make_experiment(exp):
    make_run(exp, "stage1_full", dict.fromkeys(TARGET, 40.0) | dict.fromkeys(SOURCE, 8.0))
    make_run(exp, "vanilla_full", dict.fromkeys(TARGET, 20.0) | dict.fromkeys(SOURCE, 10.0))
    rates = {name: float(i + 1) for i, name in enumerate(TARGET)}
    make_run(exp, "zipper_soft_full", rates | {"talk_en_test": 9.0, "talk_zh_test_meeting": 6.0}, missing=1)
    make_run(exp, "zipper_soft_chunked", {"read_ja_test": 33.0, "read_de_test": 11.0})
    return exp


def rows_of(table):
    return [dict(zip([f"{group} {label}".strip() for group, label in table.header], row)) for row in table.rows]


def test_the_overview_holds_every_rate_and_the_macro_averages(exp):
    overview = tables.overview(results.collect(exp), "full")
    rows = {row["Set"]: row for row in rows_of(overview)}
    assert rows["read ja"] == {
        "Set": "read ja",
        "Language": "Japanese",
        "Metric": "CER",
        "Stage 1": 40.0,
        "Vanilla-LoRA": 20.0,
        "Zipper-LoRA-Soft": 7.0,
    }
    assert rows["**Mean, 12 target languages**"]["Zipper-LoRA-Soft"] == pytest.approx(sum(range(1, 13)) / 12)
    assert rows["**Mean, 4 low-resource target languages**"]["Zipper-LoRA-Soft"] == pytest.approx((1 + 7 + 8 + 9) / 4)
    assert rows["**Mean, 8 well-resourced target languages**"]["Stage 1"] == 40.0
    assert rows["**Mean, 2 source-domain languages**"]["Vanilla-LoRA"] == 10.0


def test_a_mean_over_languages_does_not_favour_one_with_two_sets(exp):
    make_run(exp, "flylora_full", {"talk_en_test": 30.0, "talk_zh_test_meeting": 4.0, "talk_zh_test_net": 6.0})
    rows = {row["Set"]: row for row in rows_of(tables.overview(results.collect(exp), "full"))}
    assert rows["**Mean, 2 source-domain languages**"]["FlyLoRA"] == 17.5


def test_what_was_not_run_is_missing_and_averages_over_it_too(exp):
    rows = {row["Set"]: row for row in rows_of(tables.overview(results.collect(exp), "full"))}
    assert rows["talk zh net"]["Zipper-LoRA-Soft"] is None
    assert rows["**Mean, 2 source-domain languages**"]["Zipper-LoRA-Soft"] is None
    line = next(row for row in tables.source_after(results.collect(exp)).markdown().splitlines() if "Soft" in row)
    assert line == "| Chunked | Zipper-LoRA-Soft | – | – | – |"


def test_tables_have_the_papers_shape(exp):
    made = {table.name: table for table in tables.all_tables(results.collect(exp))}
    assert made["table2_source_stage1"].markdown() == (
        "|  | talk |  |  |\n"
        "| :-- | --: | --: | --: |\n"
        "| **Encoder** | **en** | **zh meeting** | **zh net** |\n"
        "| Non-chunked | 8.00 | 8.00 | 8.00 |\n"
    )
    third = rows_of(made["table3_source_stage2"])
    assert [(row["Encoder"], row["Method"]) for row in third][1:] == [
        ("Non-chunked", "Vanilla-LoRA"),
        ("Non-chunked", "Zipper-LoRA-Soft"),
    ]
    assert [row["read de"] for row in rows_of(made["table4_high_resource_chunked"])] == [11.0]
    assert [row["read vi"] for row in rows_of(made["table5_high_resource_full"])] == [20.0, 12.0]
    sixth = {row["Method"]: row for row in rows_of(made["table6_low_resource"])}
    assert sixth["Zipper-LoRA-Soft"]["Chunked ja"] == 33.0 and sixth["Zipper-LoRA-Soft"]["Non-chunked ja"] == 7.0
    assert sixth["Vanilla-LoRA"]["Chunked ja"] is None and sixth["Vanilla-LoRA"]["Non-chunked pt"] == 20.0


def test_a_language_with_two_sets_in_a_corpus_gets_an_average(exp):
    made = tables._columns(["librispeech_en_test-clean", "librispeech_en_test-other"], averages=True)
    assert [(column.group, column.label) for column in made] == [
        ("LibriSpeech", "en clean"),
        ("LibriSpeech", "en other"),
        ("LibriSpeech", "en avg"),
    ]


def test_which_languages_are_low_resource_can_be_said(exp):
    (exp / "vanilla_full" / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"report": {"low_resource": ["th"]}}))
    (exp / "unfinished").mkdir()
    assert results.collect(exp).targets(low_resource=True) == ["read_th_test"]
    assert results.collect(exp, low_resource=["de"]).targets(low_resource=True) == ["read_de_test"]


def test_runs_carry_their_cost(exp):
    row = next(row for row in rows_of(tables.cost(results.collect(exp))) if row["Run"] == "zipper_soft_full")
    assert (row["Trainable (M)"], row["Training (min)"], row["Audio (h)"], row["RTFx"]) == (2.5, 1.5, 2.0, 15.0)
    assert (row["of which encoder (M)"], row["ms per step"]) == (0.5, 22500.0)
    assert (row["Test utterances"], row["No hypothesis"]) == (140, 14)
    shares = [row[f"{part} (%)"] for part in ("encoder", "prefill", "steps", "detokenise")]
    assert shares == [25.0, 10.0, 60.0, 5.0]


def test_initial_b_stands_behind_the_method_that_it_starts(exp):
    make_run(exp, "zipper_soft_initial_b_full", {"read_de_test": 1.0})
    make_run(exp, "zipper_static_full", {"read_de_test": 3.0})
    made = {table.name: table for table in tables.all_tables(results.collect(exp))}
    assert [row["Method"] for row in rows_of(made["table5_high_resource_full"])] == [
        "Vanilla-LoRA",
        "Zipper-LoRA-Static",
        "Zipper-LoRA-Soft",
        "Zipper-LoRA-Soft + Initial-B",
    ]


def test_a_report_is_whole_and_its_links_lead_somewhere(whole_report):
    text = (whole_report / "README.md").read_text(encoding="utf-8")
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    assert links and all((whole_report / link).is_file() for link in links)
    assert text.index("Overview") < text.index("## Tables") < text.index("## Figures")
    assert "zipper_soft_full/read_de_test (1)" in text
    pictures = {path.stem: path.read_bytes() for path in (whole_report / "figures").glob("*.png")}
    assert set(pictures) == {
        "radar_full",
        "relative_gap_full",
        "encodings_full",
        "router_shares_chunked",
        "router_shares_full",
        "parameters",
        "language_similarity",
        "training_curves",
    }
    assert all(data.startswith(b"\x89PNG") and len(data) > 10_000 for data in pictures.values())
    with open(whole_report / "tables" / "overview_full.csv", encoding="utf-8") as stream:
        cells = {row["Set"]: row for row in csv.DictReader(stream)}
    assert cells["talk zh net"]["Zipper-LoRA-Soft"] == "" and float(cells["read vi"]["Zipper-LoRA-Soft"]) == 12.0


def test_another_process_without_torch_makes_the_same_bytes(whole_report):
    program = (
        "import sys; from zipperasr.cli import main; "
        "assert main.main(['report', '--exp-dir', sys.argv[1], '--out', sys.argv[2]]) == 0; "
        "assert 'torch' not in sys.modules"
    )
    again = whole_report.with_name("again")
    command = [sys.executable, "-c", program, whole_report.parent, again]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert f"results: {again / 'README.md'}" in done.stdout
    for path in filter(Path.is_file, whole_report.rglob("*")):
        assert path.read_bytes() == (again / path.relative_to(whole_report)).read_bytes(), path


def test_relative_gaps_are_against_vanilla_or_else_stage_1(exp):
    caption, figure = figures.relative_gap(results.collect(exp), "full")
    heights = {bar.get_label(): [patch.get_height() for patch in bar] for bar in figure.axes[0].containers}
    assert "against Vanilla-LoRA" in caption and list(heights) == ["Zipper-LoRA-Soft"]
    assert heights["Zipper-LoRA-Soft"][0] == pytest.approx(
        100 * (20 - 2) / 20
    )  # German is the first well-resourced one
    for path in (exp / "vanilla_full").rglob("scores.json"):
        path.unlink()
    assert "against Stage 1" in figures.relative_gap(results.collect(exp), "full")[0]


def test_a_report_after_stage_5_alone_works(tmp_path):
    make_run(tmp_path, "stage1_chunked", {"talk_en_test": 8.0})
    readme = report.write(results.collect(tmp_path), tmp_path / "report").read_text(encoding="utf-8")
    assert "| talk en | English | WER | 8.00 |" in readme and "Table II." in readme and "Table IV" not in readme


def test_a_report_while_training_shows_the_whole_lines_of_the_log(exp):
    run = next(run for run in results.collect(exp).runs if run.system == "vanilla")
    assert [(row["step"], row["loss"]) for row in results.read_log(run)] == [(1, 5.0), (2, 2.5), (3, 5 / 3), (4, 1.25)]


def test_an_empty_experiment_is_an_error_that_names_it(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: no run here"):
        results.collect(tmp_path)


def test_a_score_of_the_old_form_is_an_error_that_says_what_to_run(exp):
    path = exp / "vanilla_full" / "decode_read_de_test" / "scores.json"
    path.write_text('{"set": "read_de_test", "profile": "whisper", "error_rate": 3.0}')
    with pytest.raises(UserError, match=f"{path}: scored by an older version; run local/score.sh on it again"):
        results.collect(exp)


def test_rates_are_of_the_profile_that_is_asked_for(tmp_path):
    make_run(tmp_path, "vanilla_full", {"read_th_test": 20.0}, marks={"error_rate": 25.0, "ref_len": 120})
    assert rows_of(tables.overview(results.collect(tmp_path), "full"))[0]["Vanilla-LoRA"] == 20.0
    assert rows_of(tables.overview(results.collect(tmp_path, profile="marks"), "full"))[0]["Vanilla-LoRA"] == 25.0
    (row,) = rows_of(tables.significance(results.collect(tmp_path, profile="marks")))
    assert row["Macro error rate %"] == 20.0  # with an interval from per_utt, which is of the headline profile
    with pytest.raises(UserError, match="has no text profile 'wisper'; known: whisper, marks"):
        results.collect(tmp_path, profile="wisper")


def test_the_profiles_stand_side_by_side_where_they_cut_the_references_differently(tmp_path):
    make_run(tmp_path, "vanilla_full", {"read_th_test": 20.0}, marks={"error_rate": 25.0, "ref_len": 120})
    make_run(tmp_path, "zipper_soft_full", {"read_de_test": 10.0}, marks={"error_rate": 11.0})  # a hypothesis in Thai
    (row,) = rows_of(tables.profiles(results.collect(tmp_path)))
    assert row == {"Encoder": "Non-chunked", "Method": "Vanilla-LoRA", "read th whisper": 20.0, "read th marks": 25.0}


def test_further_runs_are_not_drawn_or_ranked_among_the_methods(exp):
    make_run(exp, "zipper_soft_zh_full", {"talk_zh_test_net": 5.0, "read_ja_test": 1.0, "read_de_test": 0.0})
    collected = results.collect(exp)
    _, figure = figures.radar(collected, "full")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["Stage 1", "Vanilla-LoRA", "Zipper-LoRA-Soft"]
    made = {table.name: table for table in tables.all_tables(collected)}
    for name in ("table3_source_stage2", "table5_high_resource_full", "table6_low_resource"):
        assert "zh_full" not in made[name].markdown() and "zipper_soft_zh" not in made[name].markdown()
    assert rows_of(made["overview_full"])[0]["zipper_soft_zh"] == 0.0
    assert "zipper_soft_zh_full" in [row["Run"] for row in rows_of(made["runs"])]


def test_the_lowest_of_a_row_and_of_a_method_table_is_bold(exp):
    make_run(exp, "flylora_full", {"read_de_test": 2.0, "read_en_test": 50.0})
    made = {table.name: table for table in tables.all_tables(results.collect(exp))}
    bold = {cell for cell in bold_of(made["overview_full"]) if cell[0] in ("read de", "talk en")}
    assert bold == {("read de", "FlyLoRA", 2.0), ("read de", "Zipper-LoRA-Soft", 2.0), ("talk en", "Stage 1", 8.0)}
    assert "| read de | German | WER | 40.00 | 20.00 | **2.00** | **2.00** |" in made["overview_full"].markdown()
    assert ("Zipper-LoRA-Soft", "readen", 3.0) in bold_of(made["table5_high_resource_full"])
    alone = {cell for cell in bold_of(made["table6_low_resource"]) if cell[1].startswith("Chunked")}
    assert not alone  # nothing to compare with


def test_significance_agrees_with_scipys_paired_bootstrap(tmp_path):
    draw = np.random.default_rng(1)
    worse = {lang: draw.integers(0, 8, 40) for lang in ("de", "ja")}
    better = {lang: np.maximum(0, errors - draw.integers(0, 3, 40)) for lang, errors in worse.items()}
    for system, errors in (("vanilla", worse), ("flylora", worse), ("zipper_soft", better)):
        make_run(tmp_path, f"{system}_full", {})
        for lang, counts in errors.items():
            make_decode(tmp_path / f"{system}_full" / f"decode_read_{lang}_test", counts.tolist())
    rows = {row["Method"]: row for row in rows_of(tables.significance(results.collect(tmp_path)))}

    def of(samples):
        statistic = lambda *counts, axis: sum(10 * c.mean(axis=axis) for c in counts) / 2  # noqa: E731
        done = scipy.stats.bootstrap(samples, statistic, n_resamples=4000, method="percentile", rng=draw)
        return sum(10 * s.mean() for s in samples) / 2, *done.confidence_interval

    soft = rows["Zipper-LoRA-Soft"]
    own = [soft[f"Macro error rate {label}"] for label in ("%", "from", "to")]
    difference = [soft[f"Difference to Vanilla-LoRA {label}"] for label in ("points", "from", "to")]
    assert own == pytest.approx(of(list(better.values())), abs=0.6) and own[0] == pytest.approx(
        of(list(better.values()))[0]
    )
    assert difference == pytest.approx(of([better[lang] - worse[lang] for lang in worse]), abs=0.4)
    assert (
        float(soft["Difference to Vanilla-LoRA p"]) < 0.01
        and rows["Vanilla-LoRA"]["Difference to Vanilla-LoRA p"] is None
    )
    same = rows["FlyLoRA"]
    assert same["Difference to Vanilla-LoRA points"] == 0 and float(same["Difference to Vanilla-LoRA p"]) == 1
    assert bold_of(tables.significance(results.collect(tmp_path))) == {
        ("Non-chunked", "Difference to Vanilla-LoRApoints", difference[0])
    }


def test_lists_that_differ_are_not_compared_as_if_they_were_paired(tmp_path):
    for system, count in (("vanilla", 10), ("zipper_soft", 9)):
        make_run(tmp_path, f"{system}_full", {})
        make_decode(tmp_path / f"{system}_full" / "decode_read_de_test", [1] * count)
    rows = rows_of(tables.significance(results.collect(tmp_path)))
    assert [row["Difference to Vanilla-LoRA points"] for row in rows] == [None, None]


def test_guards_are_counted_by_run(tmp_path):
    make_run(tmp_path, "vanilla_full", {"read_de_test": 1.0}, flags={"loop": 2, "redecoded": 3}, missing=1)
    make_run(tmp_path, "vanilla_full", {"read_en_test": 1.0}, flags={"loop": 1})
    (row,) = rows_of(tables.guards(results.collect(tmp_path)))
    assert (row["Utterances"], row["No hypothesis"], row["loop"], row["redecoded"], row["capped"]) == (20, 1, 3, 3, 0)


def test_confusion_stands_beside_what_the_references_show(tmp_path):
    language = {"num": 3, "of": 8, "num_in_refs": 1, "langs": {"nl": 1, "en": 2}}
    make_run(tmp_path, "vanilla_full", {"read_de_test": 1.0}, analysis={"language_mismatch": language})
    make_run(tmp_path, "zipper_soft_full", {"read_de_test": 1.0}, analysis={"whole_deletions": 4})
    rows = [list(row.values()) for row in rows_of(tables.confusion(results.collect(tmp_path), "full"))]
    assert rows == [
        ["Whole deletions", "read_de_test", 10, 0, 4, None, None],
        ["Language mismatch", "read_de_test", 9, 3, 0, 1, "en 2, nl 1"],
    ]


def test_the_stress_test_is_a_matrix_of_sets_by_the_language_that_decoded_them(exp):
    run = exp / "zipper_soft_full"
    for lang, errors in (("de", [1, 1]), ("th", [9, 9])):
        make_decode(run / f"as_{lang}" / "decode_read_de_test", errors)
    make_decode(run / "as_th" / "decode_read_th_test", [2, 2])
    collected = results.collect(exp)
    made = {table.name: table for table in tables.all_tables(collected)}["stress_zipper_soft_full"]
    assert made.rows == [["read_de_test", 10.0, 90.0], ["read_th_test", None, 20.0]]
    assert bold_of(made) == {("read_de_test", "Prompt and adapterde", 10.0)}
    _, figure = maps.stress(next(run for run in collected.runs if run.stress))
    assert figure.axes[0].images[0].get_array().filled(np.nan).tolist()[0] == [10.0, 90.0]
    assert rows_of(tables.overview(collected, "full"))[0]["Zipper-LoRA-Soft"] == 2.0  # not among the run's own scores


PAPER_TEXT = Path(__file__).parents[2] / "shared" / "docs" / "zipper-lora-paper.txt"


@pytest.mark.skipif(not PAPER_TEXT.is_file(), reason="the paper's text is not here")
def test_the_papers_figures_are_the_papers():
    found = {}  # {(label, how many figures): rows in the order of the tables}
    for line in PAPER_TEXT.read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"(\S.*?)((?: \d+\.\d\d){5,10})", line.strip()):
            figures_of_row = [float(figure) for figure in match[2].split()]
            label = match[1].replace("initail", "initial")
            found.setdefault((label, len(figures_of_row)), []).append(figures_of_row)
    labels = {"stage1": None, **results.SYSTEMS, "zipper_soft_initial_b": "+ initial-B"}
    for i, encoder in enumerate(("chunked", "full")):
        assert set(paper.RATES[encoder]) == set(labels)
        for system, rates in paper.RATES[encoder].items():
            rates = list(rates.values())
            if system == "stage1":
                assert found["Non-chunked" if i else "Chunked", 5] == [rates]
                continue
            label = labels[system]
            high = found[label, 10][i]
            assert rates[:5] == found[label, 5][i], (encoder, system)
            assert rates[5:14] == high[:3] + high[4:], (encoder, system)  # without the average of LibriSpeech
            assert rates[14:] == found[label, 8][0][4 * i : 4 * i + 4], (encoder, system)


def paper_config(setting):
    test = dict.fromkeys(
        ["librispeech_en_test_clean", "librispeech_en_test_other", "commonvoice_ar_test", "read_de_test"]
    )
    lists = {"settings": {"source": {"test": {"msr86k_th_dev": None}}, setting: {"test": test}}}
    training = {"stage1": {"setting": "source"}, "stage2": {"setting": setting}}
    return {"training": training, "data": {"lists": lists}}


def test_the_papers_figures_and_the_differences_stand_below_ours(tmp_path):
    rates = {
        "librispeech_en_test_clean": 3.0,
        "librispeech_en_test_other": 5.0,
        "commonvoice_ar_test": 40.0,
        "read_de_test": 1.0,
    }
    make_run(tmp_path, "stage1_full", {"msr86k_th_dev": 4.0}, config=paper_config("target_1h"))
    make_run(tmp_path, "vanilla_full", rates, config=paper_config("target_1h"))
    made = {table.name: table for table in tables.all_tables(results.collect(tmp_path))}
    assert made["table2_source_stage1"].rows[1:] == [
        ["Non-chunked, paper", 4.05],
        ["Non-chunked, difference", pytest.approx(-0.05)],
    ]
    header = [label for _, label in made["table5_high_resource_full"].header]
    ours, theirs, gaps = (dict(zip(header, row)) for row in made["table5_high_resource_full"].rows)
    assert theirs == {
        "Method": "Vanilla-LoRA, paper",
        "en clean": 2.66,
        "en other": 5.65,
        "en avg": pytest.approx(4.155),
        "de": None,
    }
    assert gaps["en clean"] == pytest.approx(3 - 2.66) and gaps["de"] is None and ours["de"] == 1.0
    assert "| Vanilla-LoRA, difference | −13.08 |" in made["table6_low_resource"].markdown()
    assert "+0.34" in made["table5_high_resource_full"].markdown()


@pytest.mark.parametrize(
    ("setting", "meta", "profile"),
    [("target_30h", {}, None), ("target_1h", {"first": 10}, None), ("target_1h", {}, "marks")],
    ids=["other training data", "a part of the list", "another text profile"],
)
def test_the_papers_figures_stay_away_from_what_does_not_compare(tmp_path, setting, meta, profile):
    make_run(tmp_path, "vanilla_full", {"commonvoice_ar_test": 40.0}, config=paper_config(setting), meta=meta)
    assert len(tables.low_resource(results.collect(tmp_path, profile=profile)).rows) == 1


def test_figure_6_shows_both_amounts_of_data_on_one_scale(exp, tmp_path):
    more = tmp_path / "exp" / "mini_30h"
    make_run(more, "vanilla_full", dict.fromkeys(TARGET, 20.0))
    make_run(more, "zipper_soft_full", dict.fromkeys(TARGET, 19.0))
    collected = results.collect(exp)
    caption, figure = figures.relative_gap(collected, "full", results.collect(more))
    first, second = figure.axes
    assert first.get_ylim() == second.get_ylim() and "more training data" in caption
    assert [text.get_text()[-3:-1] for text in first.get_xticklabels()] == ["ar", "ja", "ko", "pt"]
    assert first.get_title(loc="left") == "mini (target), against Vanilla-LoRA"
    assert second.get_title(loc="left") == "mini_30h (target), against Vanilla-LoRA"
    assert figures.relative_gap(collected, "chunked", results.collect(more)) is None


def test_error_by_length_pools_errors_and_units_and_not_rates(tmp_path):
    def bins(*rows):
        keys = ("from_s", "to_s", "num_utts", "ref_len", "errors")
        return {"by_duration": [dict(zip(keys, row)) for row in rows]}

    make_run(tmp_path, "vanilla_full", {"read_de_test": 1.0}, analysis=bins((0, 2, 60, 100, 10), (2, None, 5, 50, 20)))
    make_run(tmp_path, "vanilla_full", {"read_en_test": 1.0}, analysis=bins((0, 2, 40, 300, 50), (2, None, 4, 50, 30)))
    make_run(tmp_path, "vanilla_full", {"read_th_test": 1.0}, analysis=bins((0, 2, 9, 9, 9)))
    make_run(
        tmp_path, "zipper_soft_full", {"read_de_test": 1.0}, analysis=bins((0, 2, 60, 100, 1), (2, None, 5, 50, 2))
    )
    caption, figure = figures.durations(results.collect(tmp_path), "full")
    (axes,) = figure.axes  # no panel for Thai's one bin
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines if not line.get_label().startswith("_")}
    assert lines == {"Vanilla-LoRA": [15.0, 50.0]}  # the other run has no English
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0–2 s\n100 utts", "≥ 2 s\n9 utts"]
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert [list(line.get_xdata()) for line in hollow] == [[1]] and "profile: whisper" in caption


def test_the_parameter_figure_has_the_intervals_of_the_significance_table(tmp_path):
    for system, errors in (("vanilla", [0] * 9 + [10]), ("zipper_soft", [0] * 8 + [9, 3])):
        make_run(tmp_path, f"{system}_full", {})
        make_decode(tmp_path / f"{system}_full" / "decode_read_de_test", errors)
    collected = results.collect(tmp_path)
    rows = {row["Method"]: row for row in rows_of(tables.significance(collected))}
    _, figure = figures.parameters(collected)
    (axes,) = figure.axes
    for bars in axes.containers:
        row = rows[bars.get_label()]
        ((_, low), (_, high)) = bars.lines[2][0].get_segments()[0]
        middle = bars.lines[0].get_ydata()[0]
        assert (middle, low, high) == pytest.approx([row[f"Macro error rate {label}"] for label in ("%", "from", "to")])
    assert {bars.get_label() for bars in axes.containers} == {"Vanilla-LoRA", "Zipper-LoRA-Soft"}


def test_dev_errors_are_drawn_where_they_were_measured_more_than_once(exp):
    assert figures.dev_curves(results.collect(exp)) is None
    rows = [{"step": step, "loss": 1.0} | ({"dev_error": 90 / step} if step % 2 else {}) for step in range(1, 6)]
    (exp / "vanilla_full" / "log.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    _, figure = figures.dev_curves(results.collect(exp))
    (line,) = figure.axes[0].lines
    assert line.get_xydata().tolist() == [[1, 90], [3, 30], [5, 18]]


def test_router_shares_are_drawn_by_language_and_block(exp):
    _, figure = maps.router_shares(results.collect(exp), "full")
    assert figure.axes[0].images[0].get_array().tolist() == [[0.25, 0.5], [0.5, 1.0]]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["German (de)", "Thai (th)"]
    assert maps.router_shares(results.collect(exp, low_resource=[]), "chunked") is not None


def test_similarity_is_the_cosine(tmp_path):
    _, figure = maps.similarity({"de": [1.0, 0.0], "en": [3.0, 4.0], "th": [0.0, -2.0]})
    shown = {(text.get_position(), text.get_text()) for text in figure.axes[0].texts}
    assert {((1, 0), "0.60"), ((2, 0), "0.00"), ((2, 1), "−0.80"), ((0, 0), "1")} <= shown
    assert maps.similarity({}) is None


@pytest.fixture
def encoded(exp):
    """Outputs of two dimensions: German and Thai lie apart for zipper_soft and on each other for vanilla."""
    draw = np.random.default_rng(0)
    for system, distance in (("vanilla", 0.0), ("zipper_soft", 8.0)):
        for lang, place in (("de", 0.0), ("th", distance)):
            vectors = draw.normal([place, 0], size=(60, 2)).astype(np.float32)
            folder = exp / f"{system}_full" / f"decode_read_{lang}_test"
            np.savez(folder / "encodings.npz", ids=np.array([str(i) for i in range(60)]), vectors=vectors)
    return exp


def test_the_silhouette_in_figure_8_is_that_of_the_standardised_vectors(encoded):
    caption, figure = maps.encodings(results.collect(encoded, low_resource=["th"]), "full")
    folder = encoded / "zipper_soft_full"
    german, thai = (
        np.load(folder / f"decode_read_{lang}_test" / "encodings.npz")["vectors"][:50] for lang in ("de", "th")
    )
    both = np.concatenate([german, thai])
    apart = scipy.spatial.distance.cdist(both / both.std(axis=0), both / both.std(axis=0))
    scores = []
    for i in range(100):
        own, other = (apart[i, :50], apart[i, 50:]) if i < 50 else (apart[i, 50:], apart[i, :50])
        a, b = own.sum() / 49, other.mean()
        scores.append((b - a) / max(a, b))
    assert f"Zipper-LoRA-Soft {np.mean(scores):.2f}, of low-resource ones {np.mean(scores[50:]):.2f}" in caption
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[1] == f"Zipper-LoRA-Soft: silhouette {np.mean(scores):.2f}"
    assert abs(float(titles[0].rpartition(" ")[2].replace("−", "-"))) < 0.05
    marks = {
        line.get_label(): (line.get_color(), line.get_marker(), len(line.get_xdata())) for line in figure.axes[1].lines
    }
    assert len({color for color, *_ in marks.values()}) == len({marker for _, marker, _ in marks.values()}) == 2
    assert [count for *_, count in marks.values()] == [50, 50]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half", b"\x93NUMPY"])
def test_broken_encodings_are_an_error_that_names_the_file(encoded, content):
    path = encoded / "vanilla_full" / "decode_read_de_test" / "encodings.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}: not the outputs of an encoder .*; decode this set again"):
        maps.encodings(results.collect(encoded), "full")


def test_one_utterance_a_language_is_no_map(exp):
    for lang in ("de", "th"):
        path = exp / "vanilla_full" / f"decode_read_{lang}_test" / "encodings.npz"
        np.savez(path, ids=np.array(["a"]), vectors=np.ones((1, 3), dtype=np.float32))
    assert maps.encodings(results.collect(exp), "full") is None

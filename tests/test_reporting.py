"""Claims about reports, on fabricated experiment directories with known numbers."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from zipperasr.errors import UserError
from zipperasr.reporting import report, results, tables

TARGET = [f"read_{lang}_test" for lang in ["ar", "de", "en", "es", "fr", "it", "ja", "ko", "pt", "ru", "th", "vi"]]
SOURCE = ["talk_en_test", "talk_zh_test_meeting", "talk_zh_test_net"]
CONFIG = {
    "training": {"stage1": {"setting": "source"}, "stage2": {"setting": "target"}},
    "data": {
        "lists": {"settings": {"source": {"test": dict.fromkeys(SOURCE)}, "target": {"test": dict.fromkeys(TARGET)}}}
    },
}


def make_run(exp, name, rates, *, missing=0):
    """A run directory with the error rates {set: percent}, a log and everything that a report reads."""
    system, _, encoder = name.rpartition("_")
    run = exp / name
    for set_name, rate in rates.items():
        decode = run / f"decode_{set_name}"
        decode.mkdir(parents=True)
        lang = set_name.split("_")[1]
        scores = {"set": set_name, "lang": lang, "profile": "whisper", "num_utts": 10, "num_missing": missing}
        (decode / "scores.json").write_text(json.dumps(scores | {"error_rate": rate}))
        meta = {"set": set_name, "lang": lang, "encoder": encoder, "stage": 1 if system == "stage1" else 2}
        (decode / "meta.json").write_text(json.dumps(meta))
        (decode / "timing.json").write_text('{"audio_s": 300.0, "wall_s": 20.0}')
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    rows = [{"step": step, "loss": 5 / step} for step in (1, 2, 3, 2, 3, 4)]
    (run / "log.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"step": 5, "lo')
    (run / "train.json").write_text(
        '{"steps": 4, "wall_s": 90.0, "num_trainable": 2500000, "num_trainable_encoder": 500000,"audio_s": 7200.0}'
    )
    embeddings = {lang: [1.0, i, i * i] for i, lang in enumerate(["de", "en", "th"])}
    (run / "language_embeddings.json").write_text(json.dumps(embeddings))


@pytest.fixture
def exp(tmp_path):
    return make_experiment(tmp_path / "exp" / "mini")


@pytest.fixture(scope="module")
def whole_report(tmp_path_factory):
    exp = make_experiment(tmp_path_factory.mktemp("exp"))
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
    assert set(pictures) == {"radar_full", "relative_gap_full", "language_similarity", "training_curves"}
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
    from zipperasr.reporting import figures

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

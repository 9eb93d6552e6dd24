"""Claims about the report's cross-check by CTC, on fabricated decode directories."""

import itertools
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml
from test_page import browser  # noqa: F401

from zipperasr.errors import UserError
from zipperasr.reporting import cross_check, page, report, results, tables
from zipperasr.scoring.directory import score_directory

EVIL = "<script>window.evil = 1</script>"
SETS = {  # {set: [(reference, hypothesis, what CTC hears, disagreement, log-probability)]}
    "read_en_test": [
        ("the cat sat down", "the cat sat down", "the cat sad down", 0.1, -0.1),  # CTC: 1 of 4
        ("a bird sings", "something else", "abird sings", 0.9, -0.2),  # LLM: 3 of 3, CTC: 2 of 3
        ("good day", "good night", "god day", 0.4, -0.3),  # LLM: 1 of 2, which is not over 50%; CTC: 1 of 2
        ("never written", "", None, None, None),  # an empty hypothesis is not listened to
        ("one", "1", "wun too", None, -0.4),  # the head knows no digit; to the normaliser the LLM is right
    ],
    "read_th_test": [("ปีนี้", "ปูนี", "ปีนี้", 0.5, -0.5)],  # two of five with marks; none of two without
}


def make_run(exp, name="zipper_soft_full", sets=SETS):
    """A scored and aligned run."""
    for set_name, rows in sets.items():
        folder, lang = exp / name / f"decode_{set_name}", set_name.split("_")[1]
        folder.mkdir(parents=True)
        rows = [(f"{lang}-{number}", *row) for number, row in enumerate(rows)]
        (folder / "ref").write_text("".join(f"{i} {ref}\n" for i, ref, *_ in rows))
        (folder / "hyp").write_text("".join(f"{i} {hyp}\n" for i, _, hyp, *_ in rows))
        write_rows(folder / "utts.jsonl", [{"id": i, "logprob": logprob} for i, *_, logprob in rows])
        words = [
            {"id": i, "text": hyp, "words": [], "confidence": None, "ctc_text": ctc_text, "disagreement": disagreement}
            for i, _, hyp, ctc_text, disagreement, _ in rows
        ]
        write_rows(folder / "words.jsonl", words)
        (folder / "meta.json").write_text(json.dumps({"set": set_name, "lang": lang, "encoder": "full", "stage": 2}))
        score_directory(folder)
    settings = {"target": {"test": dict.fromkeys(sets)}}
    config = {"training": {"stage2": {"setting": "target"}}, "data": {"lists": {"settings": settings}}}
    (exp / name / "config.yaml").write_text(yaml.safe_dump(config))
    return exp / name


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(exp, **options):
    """The rows of the table by their first cells, its other cells by (group, label)."""
    (run,) = results.collect(exp, **options).runs
    made = tables.cross_check(run)
    return {row[0]: dict(zip(made.header[1:], row[1:], strict=True)) for row in made.rows}


def pairs_won(is_bad, signal):
    """The share of pairs of a bad and a good utterance in which the bad one's signal is higher, a tie counting half."""
    kinds = [[value for value, bad in zip(signal, is_bad) if bad == kind] for kind in (True, False)]
    return np.mean([(bad > good) + (bad == good) / 2 for bad, good in itertools.product(*kinds)])


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_the_share_of_pairs_told_apart_and_the_threshold_the_highest_that_finds_enough(seed):
    generator = np.random.default_rng(seed)
    is_bad = (generator.random(40) < 0.4).tolist()
    signal = (generator.integers(6, size=40) / 10).tolist()  # with ties
    found = cross_check.detect(is_bad, signal)
    assert found.auc == pytest.approx(pairs_won(is_bad, signal))
    enough = {
        value: np.mean([one >= value for one in signal])
        for value in signal
        if sum(one >= value for one, bad in zip(signal, is_bad) if bad) >= 0.9 * sum(is_bad)
    }
    assert (found.threshold, found.share) == (max(enough), pytest.approx(100 * enough[max(enough)]))


def test_ten_bad_ones_are_found_by_nine_and_eleven_by_ten():
    for num, needed in ((10, 9), (11, 10), (1, 1)):
        found = cross_check.detect([True] * num + [False], [*range(num, 0, -1), 0])
        assert found.share == pytest.approx(100 * needed / (num + 1))


def test_nothing_is_said_where_all_are_good_or_all_bad_or_the_signal_is_not_there():
    assert cross_check.detect([False, False], [0.1, 0.9]) is cross_check.detect([True], [0.1]) is None
    assert cross_check.detect([], []) is None
    assert cross_check.detect([True, False], [None, 0.3]) is None


def test_the_table_has_error_rates_of_what_was_heard_and_finds_only_among_what_is_checked(tmp_path):
    make_run(tmp_path)
    row = rows_of(tmp_path)["read_en_test"]
    assert row["Error rate (%)", "LLM"] == pytest.approx(100 * 4 / 10)
    assert row["Error rate (%)", "CTC alone"] == pytest.approx(100 * 6 / 10)
    assert row["", "Disagreement"] == pytest.approx((0.1 + 0.9 + 0.4) / 3)
    assert (row["", "Checked"], row["", "Over 50% wrong"]) == (3, 1)
    assert (row["AUC", "by CTC"], row["AUC", "by LLM"]) == (1.0, 0.5)
    assert row["To find 90%, look at (%)", "by CTC"] == pytest.approx(100 / 3)
    assert row["To find 90%, look at (%)", "by LLM"] == pytest.approx(200 / 3)
    assert row["", "Threshold"] == 0.9


def test_all_sets_together_have_means_over_languages_and_one_ranking(tmp_path):
    make_run(tmp_path)
    rows = rows_of(tmp_path, profile="marks")
    thai, english, whole = rows["read_th_test"], rows["read_en_test"], rows["**All 2 sets**"]
    for column in (("Error rate (%)", "LLM"), ("Error rate (%)", "CTC alone"), ("", "Disagreement")):
        assert whole[column] == pytest.approx((thai[column] + english[column]) / 2)
    assert (whole["", "Checked"], whole["", "Over 50% wrong"]) == (4, 1)
    assert whole["AUC", "by LLM"] == pytest.approx(pairs_won([0, 1, 0, 0], [0.1, 0.2, 0.3, 0.5]))
    assert thai["AUC", "by CTC"] is None and thai["", "Threshold"] is None


def test_errors_are_of_the_profile_that_is_shown(tmp_path):
    make_run(tmp_path)
    rates = {p: rows_of(tmp_path, profile=p)["read_th_test"]["Error rate (%)", "LLM"] for p in ("whisper", "marks")}
    assert rates == {"whisper": 0.0, "marks": pytest.approx(100 * 2 / 5)}


def test_words_where_there_should_be_silence_are_bad(tmp_path):
    make_run(tmp_path, sets={"read_en_test": [("", "thank you", "a", 0.9, -0.1), ("yes", "yes", "yes", 0.0, -0.1)]})
    assert rows_of(tmp_path)["read_en_test"]["", "Over 50% wrong"] == 1


def test_the_better_signal_is_bold(tmp_path):
    make_run(tmp_path)
    (run,) = results.collect(tmp_path).runs
    made = tables.cross_check(run)
    bold = {made.header[j] for i, j in made.bold if made.rows[i][0] == "read_en_test"}
    assert bold == {("AUC", "by CTC"), ("To find 90%, look at (%)", "by CTC")}


@pytest.mark.parametrize("what", ["another hypothesis", "references", "an utterance less", "one more"])
def test_what_was_aligned_with_other_texts_is_named_and_not_shown(tmp_path, what):
    run_dir = make_run(tmp_path)
    path = run_dir / "decode_read_en_test" / "words.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if what == "another hypothesis":
        rows[2]["text"], num = "good evening", 1
    elif what == "references":
        rows, num = [row | {"text": ref} for row, (ref, *_) in zip(rows, SETS["read_en_test"])], 4
    elif what == "an utterance less":
        rows, num = rows[1:], 1
    else:
        rows, num = [*rows, rows[0] | {"id": "en-9"}], 1
    write_rows(path, rows)
    collected = results.collect(tmp_path)
    assert list(rows_of(tmp_path)) == ["read_th_test"]
    (remark,) = [text for text in page.remarks(collected) if "zipperasr align" in text]
    assert remark.endswith(f": zipper_soft_full/read_en_test ({num}).")
    report.write(collected, tmp_path / "report")
    shown = (tmp_path / "report" / "index.html").read_text()
    assert "abird" not in shown and "CTC alone:" not in shown and remark in shown


@pytest.mark.parametrize("broken", ["{", '{"id": "en-0"}', '{"id": "en-0", "text": "the cat sat down"}'])
def test_a_broken_file_is_named_with_the_mend(tmp_path, broken):
    path = make_run(tmp_path) / "decode_read_en_test" / "words.jsonl"
    path.write_text(broken + "\n" + "\n".join(path.read_text().splitlines()[1:]) + "\n")
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: .*run zipperasr align again"):
        report.write(results.collect(tmp_path), tmp_path / "report")


def test_a_run_that_was_not_aligned_is_reported_as_if_there_were_no_ctc(tmp_path):
    for path in make_run(tmp_path).rglob("words.jsonl"):
        path.unlink()
    report.write(results.collect(tmp_path), tmp_path / "report")
    texts = [path.read_text() for path in (tmp_path / "report").rglob("*") if path.suffix in (".md", ".html")]
    assert texts and not [text for text in texts if re.search("CTC|disagree|checkbox|words.jsonl", text)]


def test_the_page_shows_what_ctc_hears_and_sorts_by_disagreement_and_back(tmp_path, browser):  # noqa: F811
    make_run(tmp_path)
    report.write(results.collect(tmp_path), tmp_path / "report")
    tab = browser.new_page()
    said = []
    tab.on("console", lambda message: said.append(message.text))
    tab.goto((tmp_path / "report" / "index.html").as_uri())

    def listed():
        return tab.locator("article h4").all_inner_texts()

    before = listed()
    assert before == ["en-1", "en-3", "en-2"]
    articles = dict(zip(before, tab.locator("article").all_inner_texts()))
    assert "disagreement with CTC 0.90" in articles["en-1"] and "CTC alone: abird sings" in articles["en-1"]
    assert "CTC" not in articles["en-3"]
    tab.locator("input.sort").check()
    assert listed() == ["en-1", "en-2", "en-3"]
    tab.locator("input.sort").uncheck()
    assert listed() == before and tab.locator("#cross-check-by-ctc").count() == 1
    assert not said
    tab.close()


def test_what_ctc_hears_stays_text(tmp_path):
    make_run(tmp_path, sets={"read_en_test": [("one two", "three", EVIL, 0.9, -0.1)]})
    report.write(results.collect(tmp_path), tmp_path / "report")
    shown = (tmp_path / "report" / "index.html").read_text()
    assert EVIL not in shown and "&lt;script&gt;window.evil" in shown


def test_it_is_made_without_torch(tmp_path):
    make_run(tmp_path)
    program = "import sys; from zipperasr.cli import main; assert main.main(sys.argv[1:]) == 0; print(*sys.modules)"
    command = [sys.executable, "-c", program, "report", "--exp-dir", str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "torch" not in done.stdout.split() and "sklearn" in done.stdout.split()
    assert (tmp_path / "report" / "tables" / "cross_check_zipper_soft_full.md").is_file()

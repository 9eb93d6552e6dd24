"""Claims about the report's page, in a real browser, on a fabricated experiment with real audio."""

import contextlib
import html.parser
import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import yaml
from contrast import FAINT

from zipperasr.data import manifests
from zipperasr.errors import UserError
from zipperasr.reporting import report, results, worst
from zipperasr.scoring.directory import score_directory

EVIL = "<script>window.evil = 1</script>\"'><img src=x onerror='window.evil=1'></pre><b id=evil>"
OPEN_ALL = "document.querySelectorAll('details').forEach(one => { one.name = ''; one.open = true; })"
TEXTS = {  # {set: [(id, reference, hypothesis or None)]}
    "read_en_test": [
        ("en-1", "the cat sat on the mat", "the cat sat on the mat"),
        ("en-2", "a bird sings", "a big bird sang"),
        ("en-2#2", "a bird sings", "bird"),
        ("en-3", "nobody heard this", None),
    ],
    "read_ar_test": [("ar-1", "كتاب جديد هنا", "hello كتاب قديم هنا"), ("ar-2", "شمس", "شمس")],
    "read_th_test": [("th-1", "ปีนี้", "ปูนี"), ("th-2", "กา", "กา")],  # the same to the profile `whisper`
}
CONFIG = {
    "training": {"stage1": {"setting": "source"}, "stage2": {"setting": "target", "note": EVIL}},
    "data": {"lists": {"settings": {"source": {"test": {}}, "target": {"test": dict.fromkeys(TEXTS)}}}},
}


def make_run(exp, name, texts, *, method):
    """A run with the hypotheses of `texts`, Thai scored with its marks; `method` is that of its configuration."""
    for set_name, rows in texts.items():
        decode = exp / name / f"decode_{set_name}"
        decode.mkdir(parents=True)
        (decode / "ref").write_text("".join(f"{i} {ref}\n" for i, ref, _ in rows))
        (decode / "hyp").write_text("".join(f"{i} {hyp}\n" for i, _, hyp in rows if hyp is not None))
        lang = set_name.split("_")[1]
        utts = [
            {"id": i, "lang": lang, "speaker": f"s{i}{EVIL}", "text": hyp, "logprob": -0.25, "num_tokens": 3,
             "flags": ["loop", "redecoded"], "duration_s": 1.5, "first_text": EVIL}
            for i, _, hyp in rows if hyp is not None
        ]  # fmt: skip
        (decode / "utts.jsonl").write_text("".join(json.dumps(utt) + "\n" for utt in utts))
        meta = {"set": set_name, "lang": lang, "encoder": "full", "stage": 2, "first": None}
        (decode / "meta.json").write_text(json.dumps(meta))
        score_directory(decode, profile="marks" if lang == "th" else "whisper")
    config = CONFIG | {"model": {"adapter": {"method": method}}}
    (exp / name / "config.yaml").write_text(yaml.safe_dump(config))
    (exp / name / "train.json").write_text('{"num_trainable": 1500000}')


def make_data(root):
    """A data directory: English cuts are of one stereo file, that of Thai ones is not there, ar-1 is in no manifest."""
    time = np.arange(3 * 44100) / 44100
    left = np.sin(2 * np.pi * 440 * time)
    right = np.sin(2 * np.pi * np.where((time >= 1) & (time < 2.5), 1000, 700) * time)  # 1000 Hz within the cuts
    (root / "audio").mkdir(parents=True)
    soundfile.write(root / "audio" / "en.wav", 0.4 * np.stack([left, right], axis=1), 44100)
    for set_name, rows in TEXTS.items():
        lang = set_name.split("_")[1]
        source = {"type": "file", "channels": [0, 1], "source": f"{root}/audio/{lang}.wav"}
        recording = {"id": lang, "sampling_rate": 44100, "num_samples": len(time), "duration": 3.0, "sources": [source]}
        ids = sorted({utt_id.split("#")[0] for utt_id, _, _ in rows} - {"ar-1"})
        cut = {"start": 1.0, "duration": 1.5, "channel": 1, "recording": recording, "type": "MonoCut"}
        cuts = [cut | {"id": i, "supervisions": [{"id": i, "text": "", "language": lang}]} for i in ids]
        manifests.write(manifests.path_of(root, set_name), cuts)
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(experiment, data directory) with a report."""
    root = tmp_path_factory.mktemp("page")
    exp, data = root / "mini<b>", make_data(root / "data")
    better = {name: [(i, ref, ref) for i, ref, _ in rows] for name, rows in TEXTS.items()}
    make_run(exp, "vanilla_full", TEXTS, method="vanilla")
    make_run(exp, "zipper_soft_full", better | {"read_th_test": TEXTS["read_th_test"]}, method="zipper_soft")
    make_run(exp, "independent_full", {"read_en_test": TEXTS["read_en_test"]}, method=EVIL)
    for path in exp.rglob("hyp"):
        os.utime(path, (1e9, 1e9))
    (exp / "log").mkdir()
    (exp / "log" / "commands.txt").write_text(f"./run.sh --method '{EVIL}'\n")
    report.write(results.collect(exp), exp / "report", data_dir=data)
    return exp, data


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"no browser here: none of {', '.join(names)}")
    with sync_api.sync_playwright() as play:
        args = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        yield play.chromium.launch(executable_path=path, args=args)


@pytest.fixture
def opened(made, browser):
    """A function that opens the report in a window of a width; in the end nothing may have been requested or said."""
    said, urls, where = [], [], (made[0] / "report" / "index.html").as_uri()
    with contextlib.ExitStack() as stack:

        def open_page(width=1280, **options):
            tab = browser.new_page(viewport={"width": width, "height": 800}, **options)
            stack.callback(tab.close)
            for event in ("console", "pageerror", "dialog"):
                tab.on(event, lambda what: said.append(str(getattr(what, "text", what))))
            tab.on("request", lambda request: urls.append(request.url))
            tab.goto(where)
            return tab

        open_page.said, open_page.urls = said, urls
        yield open_page
        assert not said
        assert [url for url in urls if not url.startswith("data:")] == [where] * urls.count(where)


def texts_of(tab, table, column):
    return tab.eval_on_selector_all(f"{table} tbody tr", f"rows => rows.map(row => row.cells[{column}].textContent)")


def test_it_loads_and_forbids_every_request_and_foreign_script(opened):
    tab = opened()
    assert tab.title().startswith("mini<b>") and tab.locator("h1").inner_text() == "mini<b>"
    assert tab.locator("figure img").count() and all(
        tab.eval_on_selector_all("figure img", "all => all.map(one => one.complete && one.naturalWidth > 100)")
    )
    policy = tab.get_attribute("meta[http-equiv]", "content")
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy


def test_a_hostile_hypothesis_speaker_setting_or_command_stays_text(opened):
    tab = opened()
    assert tab.evaluate("window.evil === undefined && !document.getElementById('evil')")
    assert tab.locator("img[src=x]").count() == 0 and tab.locator("script").count() == 2
    for part in ("article .pale", "article bdi", "td", "pre"):
        texts = tab.locator(part).evaluate_all("all => all.map(one => one.textContent)")
        assert any("<script>window.evil" in text for text in texts), part


def test_the_policy_stops_what_would_get_in_all_the_same(opened):
    tab = opened()
    tab.evaluate("html => document.body.insertAdjacentHTML('beforeend', html)", EVIL)
    tab.evaluate("document.head.append(Object.assign(document.createElement('script'), {text: 'window.evil = 1'}))")
    assert tab.evaluate("fetch('https://example.invalid').then(() => 'sent', () => 'stopped')") == "stopped"
    tab.wait_for_timeout(100)
    assert tab.locator("#evil").count() and tab.evaluate("window.evil !== 1")
    assert len(opened.said) >= 4 and all("Content Security Policy" in text for text in opened.said)
    opened.said.clear()
    opened.urls.clear()


def test_a_header_sorts_by_numbers_with_missing_ones_last_by_mouse_and_keyboard(opened):
    tab = opened()
    before = texts_of(tab, "#glance", 1)
    numbers = sorted(float(text) for text in before if text != "–")
    missing = ["–"] * (len(before) - len(numbers))
    assert len(numbers) == 2 and missing
    button = tab.locator("#glance th button").nth(1)
    button.click()
    assert texts_of(tab, "#glance", 1) == [f"{number:.2f}" for number in numbers] + missing
    assert tab.get_attribute("#glance th:nth-child(2)", "aria-sort") == "ascending"
    button.focus()
    tab.keyboard.press("Enter")
    assert texts_of(tab, "#glance", 1) == [f"{number:.2f}" for number in reversed(numbers)] + missing
    assert tab.get_attribute("#glance th:nth-child(2)", "aria-sort") == "descending"
    overview = "h3#overview_full ~ .scroll table"
    names = texts_of(tab, overview, 0)
    for header in (1, 0):
        tab.locator(f"{overview} th button").nth(header).click()
    assert texts_of(tab, overview, 0) == sorted(names, key=str.casefold) != names
    assert tab.locator(f"{overview} th[aria-sort=ascending]").count() == 1


def test_the_audio_of_an_utterance_plays_to_its_end(opened):
    tab = opened()
    player = tab.locator("audio[data-clip='read_en_test/en-2']").first
    assert player.evaluate(
        "audio => new Promise((done, fail) => { audio.ontimeupdate = () => audio.currentTime > 0.2 && done(true);"
        " audio.onerror = () => fail(audio.error.message); audio.play(); })"
    )
    assert player.evaluate("audio => audio.duration") == pytest.approx(1.5, abs=0.1)
    assert player.evaluate(
        "async one => { const other = document.querySelector('audio[data-clip$=en-3]'); one.currentTime = 0;"
        " await one.play(); await other.play(); return one.paused && !one.ended && !other.paused; }"
    )  # one at a time


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window(opened, width, scheme):
    tab = opened(width, color_scheme=scheme)
    tab.evaluate(OPEN_ALL)
    assert tab.evaluate("document.scrollingElement.scrollWidth") <= width
    faint = tab.locator("body, .pale, .same, a, .S, .I, .D, .best > *").evaluate_all(FAINT)
    assert not faint  # the contrast that WCAG 2.2 asks of text


def test_print_clips_nothing_and_leaves_out_what_paper_cannot_do(opened):
    tab = opened(1000)
    tab.emulate_media(media="print")
    flows = tab.eval_on_selector_all(".scroll, pre", "all => all.map(one => getComputedStyle(one).overflowX)")
    assert set(flows) == {"visible"}
    for part in ("nav", "audio", "details:not([open])"):
        shown = tab.locator(part).evaluate_all("all => all.filter(one => one.checkVisibility()).length")
        assert tab.locator(part).count() and not shown, part
    assert tab.locator("article").first.is_visible()
    assert tab.pdf().startswith(b"%PDF")


def article(tab, utt_id):
    """The utterance, in the first run that has it, with the details of every run opened."""
    tab.evaluate(OPEN_ALL)
    return tab.locator(f"article:has(code:text-is('{utt_id}'))").first


def columns_of(tab, utt_id):
    columns = article(tab, utt_id).locator(".align > span")
    return columns.evaluate_all("all => all.map(one => [...one.children].map(child => child.textContent))")


def test_alignments_show_each_operation_by_letter_in_the_order_of_the_script(opened):
    tab = opened()
    assert columns_of(tab, "en-2") == [["a", "a"], ["big", "I"], ["bird", "bird"], ["sings", "sang", "S"]]
    assert columns_of(tab, "en-3") == [["nobody", "D"], ["heard", "D"], ["this", "D"]]
    assert "no hypothesis" in article(tab, "en-3").inner_text()
    thai = [["ป", "ป"], ["◌ี", "◌ู", "S"], ["น", "น"], ["◌ี", "◌ี"], ["◌้", "D"]]
    assert columns_of(tab, "th-1") == thai
    arabic = article(tab, "ar-1").locator(".align")
    assert arabic.get_attribute("dir") == "rtl" and arabic.get_attribute("lang") == "ar"
    places = arabic.locator("> span").evaluate_all("all => all.map(one => one.getBoundingClientRect().left)")
    assert places == sorted(places, reverse=True) and len(places) == 4


def test_audio_that_cannot_be_had_is_said_in_place_of_the_player(opened):
    tab = opened()
    notes = {i: article(tab, i).inner_text() for i in ("th-1", "ar-1", "en-2#2")}
    assert "audio cannot be read" in notes["th-1"] and "th.wav" in notes["th-1"]
    assert "in no manifest" in notes["ar-1"] and "No player" not in notes["en-2#2"]


def test_the_head_tells_the_newest_hypotheses_time_and_remarks_name_what_is_missing(opened):
    tab = opened()
    assert "Newest hypotheses: 2001-09-09 01:46 UTC" in tab.locator("header").inner_text()
    remarks = tab.locator(".remarks").inner_text()
    assert "counted as deleted: vanilla_full/read_en_test (1), independent_full/read_en_test (1)" in remarks
    assert "independent_full: 2 of 3 sets not scored: read_ar_test, read_th_test" in remarks


def test_a_table_downloads_as_the_csv_beside_the_page(opened, made):
    tab = opened()
    with tab.expect_download() as download:
        tab.locator("a[download='overview_full.csv']").click()
    saved = download.value.path().read_bytes()
    assert saved == (made[0] / "report" / "tables" / "overview_full.csv").read_bytes()


class Checker(html.parser.HTMLParser):
    """Fails unless every element that needs one has its end tag in place."""

    VOID = {"meta", "link", "img", "br", "hr", "input"}

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.headings = [], [], [], []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        assert len(values) == len(attributes), (tag, "an attribute twice")
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"][1:]] if values.get("href", "").startswith("#") else []
        self.links += values.get("aria-labelledby", "").split()
        self.headings += [int(tag[1])] if re.fullmatch("h[1-6]", tag) else []
        self.open += [] if tag in self.VOID else [tag]

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())


def test_the_html_is_balanced_with_unique_ids_links_that_lead_somewhere_and_headings_in_order(made):
    checker = Checker()
    checker.feed((made[0] / "report" / "index.html").read_text(encoding="utf-8"))
    checker.close()
    assert not checker.open and len(checker.ids) == len(set(checker.ids))
    assert checker.links and set(checker.links) <= set(checker.ids)
    assert checker.headings[0] == 1 and checker.headings.count(1) == 1
    assert all(next_ - this <= 1 for this, next_ in zip(checker.headings, checker.headings[1:]))


def test_another_process_makes_the_same_bytes_without_torch(made, tmp_path):
    exp, data = made
    program = "import sys; from zipperasr.cli import main; assert main.main(sys.argv[1:]) == 0; print(*sys.modules)"
    command = [sys.executable, "-c", program, "report", "--exp-dir", exp, "--data-dir", data, "--out", tmp_path]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    assert "torch" not in done.stdout.split() and "soundfile" in done.stdout.split()
    old, new = ((folder / "index.html").read_bytes() for folder in (exp / "report", tmp_path))
    assert old == new and old.count(b"data:audio/mpeg") == 2


@pytest.mark.parametrize("broken", ["scores.json", "utts.jsonl", "per_utt", "config.yaml"])
def test_a_broken_file_is_named_and_leaves_the_old_report_whole(made, tmp_path, broken):
    exp = tmp_path / "exp"
    shutil.copytree(made[0], exp)
    before = {path: path.read_bytes() for path in (exp / "report").rglob("*") if path.is_file()}
    path = next((exp / "vanilla_full").rglob(broken))
    path.write_text("id\n{broken: [\n")
    with pytest.raises(UserError, match=re.escape(str(path))):
        report.write(results.collect(exp), exp / "report")
    assert {path: path.read_bytes() for path in (exp / "report").rglob("*") if path.is_file()} == before


def test_a_data_directory_without_manifests_is_an_error(made):
    with pytest.raises(UserError, match="no such directory; give the recipe's --data-dir"):
        report.write(results.collect(made[0]), made[0] / "report", data_dir=made[0])


def test_a_clip_is_the_cuts_span_and_channel_of_the_file_in_mp3(made):
    run = next(run for run in results.collect(made[0]).runs if run.system == "vanilla")
    clips = worst.clips([utt for utt in worst.of_run(run, num=9) if utt.set_name == "read_en_test"], made[1])
    samples, rate = soundfile.read(io.BytesIO(clips["read_en_test/en-2"]))
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    assert rate == 16000 and samples.ndim == 1 and len(samples) / rate == pytest.approx(1.5, abs=0.1)
    frequencies = np.fft.rfftfreq(len(samples), 1 / rate)
    assert spectrum[abs(frequencies - 1000) < 20].sum() > 0.8 * spectrum.sum()
    assert set(clips) == {"read_en_test/en-2", "read_en_test/en-3"}


def test_every_set_is_heard_before_one_is_heard_twice(made):
    run = next(run for run in results.collect(made[0]).runs if run.system == "vanilla")
    chosen = [utt.aligned.id for utt in worst.of_run(run, num=4)]
    assert sorted(chosen) == ["ar-1", "en-2", "en-3", "th-1"]  # en-3 has three errors, en-2 and en-2#2 two each
    (one,) = worst.of_run(run, num=1)
    assert one.set_name == max(run.scores, key=lambda name: run.scores[name]["error_rate"])

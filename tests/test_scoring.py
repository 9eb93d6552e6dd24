"""Claims about scoring; oracles: jiwer, openai-whisper's normalisers, scipy's bootstrap, cases worked by hand."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import jiwer
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from zipperasr import languages
from zipperasr.cli import main
from zipperasr.errors import UserError
from zipperasr.scoring import ScoringSettings, analysis, bootstrap, normalise
from zipperasr.scoring.directory import averages, score_directory
from zipperasr.scoring.score import Counts, align, grid, read_per_utt, width

REPOSITORY = Path(__file__).resolve().parents[1]
SENTENCES = {
    "ar": "مَرْحَبًا، كيف حالُك؟",
    "de": "Straßenbahn, 3½ Äpfel (Lachen)!",
    "en": "Mr. Smith's colour isn't twenty-two [noise] dollars, is it?",
    "fr": "L’œuvre d'Éric : déjà-vu…",
    "ja": "ガラスの 音声、テスト。",
    "ko": "안녕하세요, 여러분!",
    "th": "ปีใหม่ น้ำใจ ๑๒",
    "vi": "Tiếng Việt rất hay, phải không?",
    "zh": "请将音频,转写为 文本。",
}


def decode_directory(folder, lang, ref, hyp, name=None, utts=()):
    """A decode directory as another system may leave it; `ref` and `hyp` are {id: text}, or lines."""
    name = name or f"read_{lang}_test"
    directory = folder / f"decode_{name}"
    directory.mkdir(parents=True)
    for file, texts in (("ref", ref), ("hyp", hyp)):
        lines = texts if isinstance(texts, list) else [f"{key} {text}" for key, text in texts.items()]
        (directory / file).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    (directory / "meta.json").write_text(json.dumps({"set": name, "lang": lang, "unseen_policy": None}))
    if utts:
        rows = (json.dumps({"lang": lang, "speaker": None, "flags": []} | row) + "\n" for row in utts)
        (directory / "utts.jsonl").write_text("".join(rows))
    return directory


@pytest.mark.parametrize("lang", SENTENCES)
def test_the_whisper_profile_is_openai_whispers_normaliser(lang):
    from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer

    split = normalise.splitter(languages.get(lang), "whisper")
    by_char = lang in ("ja", "ko", "th", "zh")
    oracle = EnglishTextNormalizer() if lang == "en" else BasicTextNormalizer(split_letters=by_char)
    assert split(SENTENCES[lang]) == oracle(SENTENCES[lang]).split()


def test_the_marks_profile_keeps_what_whispers_destroys():
    thai = languages.get("th")
    whisper, marks = (normalise.splitter(thai, profile) for profile in ("whisper", "marks"))
    assert whisper("ปี") == whisper("ปู") == ["ป"]
    assert marks("ปี") != marks("ปู") and marks("ปี!") == ["ป", "ี"]


def test_the_profiles_of_english_are_one():
    split = [normalise.splitter(languages.get("en"), profile) for profile in normalise.PROFILES]
    text = "Mr. Smith's naïve café, e\u0301t\u0301e 3½ [noise] isn't twenty-two"
    assert split[0](text) == split[1](text) and split[0](text)


def test_every_configurable_profile_exists():
    for profile in ScoringSettings.model_json_schema()["properties"]["profile"]["enum"]:
        assert profile in normalise.PROFILES


@given(st.lists(st.tuples(*[st.lists(st.sampled_from(["a", "b", "ab", "น", "的"]), max_size=12)] * 2), min_size=1))
def test_counts_and_alignments_equal_jiwers(pairs):
    ours = [align(str(i), ref, hyp) for i, (ref, hyp) in enumerate(pairs)]
    refs, hyps = zip(*pairs)
    oracle = jiwer.process_words(list(refs), list(hyps), reference_transform=list, hypothesis_transform=list)
    total = sum((u.counts for u in ours), Counts())
    assert total == Counts(oracle.hits, oracle.substitutions, oracle.insertions, oracle.deletions)
    for u, chunks in zip(ours, oracle.alignments):
        assert [ref for ref, _, _ in u.columns if ref] == u.ref and [hyp for _, hyp, _ in u.columns if hyp] == u.hyp
        names = {"equal": "", "substitute": "S", "insert": "I", "delete": "D"}
        sizes = [max(c.ref_end_idx - c.ref_start_idx, c.hyp_end_idx - c.hyp_start_idx) for c in chunks]
        assert [op for *_, op in u.columns] == [names[c.type] for c, size in zip(chunks, sizes) for _ in range(size)]


@pytest.mark.parametrize("lang", ["en", "fr", "ja", "ko", "th", "zh"])
def test_scores_of_a_directory_equal_jiwers(lang, tmp_path):
    refs = {"a": SENTENCES[lang], "b": SENTENCES[lang] * 2, "c": SENTENCES[lang][::-1], "d": "Ünited"}
    hyps = {"a": SENTENCES[lang][:-5], "b": SENTENCES[lang], "c": "x y " + SENTENCES[lang][::-1], "d": ""}
    scores = score_directory(decode_directory(tmp_path, lang, refs, hyps))
    assert scores["metric"] == ("cer" if lang in ("ja", "ko", "th", "zh") else "wer")
    for profile, found in scores["profiles"].items():
        split = normalise.splitter(languages.get(lang), profile)
        oracle = jiwer.process_words(*([" ".join(split(text)) for text in texts.values()] for texts in (refs, hyps)))
        assert found["error_rate"] == pytest.approx(100 * oracle.wer)
        counts = [found[key] for key in ("hits", "sub", "ins", "del")]
        assert counts == [oracle.hits, oracle.substitutions, oracle.insertions, oracle.deletions]


def test_scoring_is_at_least_as_fast_as_jiwer():
    draw = random.Random(0)
    vocabulary = [f"word{i}" for i in range(5000)]
    refs = [draw.choices(vocabulary, k=20) for _ in range(2000)]
    hyps = [[w if draw.random() > 0.1 else draw.choice(vocabulary) for w in ref] for ref in refs]
    texts = [[" ".join(words) for words in side] for side in (refs, hyps)]

    def ours():
        return sum((align("", ref.split(), hyp.split()).counts for ref, hyp in zip(*texts)), Counts()).errors

    def theirs():
        out = jiwer.process_words(*texts)
        return out.substitutions + out.insertions + out.deletions

    seconds = {ours: [], theirs: []}
    for _ in range(5):
        for function, taken in seconds.items():
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    assert ours() == theirs() > 0
    assert min(seconds[ours]) <= min(seconds[theirs])


def test_an_alignment_worked_by_hand(tmp_path):
    directory = decode_directory(tmp_path, "fr", {"u1": "le chat est assis ici"}, {"u1": "chat est as si là"})
    found = score_directory(directory)["profiles"]["whisper"]
    assert [found[key] for key in ("ref_len", "hits", "sub", "ins", "del")] == [5, 2, 2, 1, 1]
    assert found["error_rate"] == 80.0
    header, row = (directory / "per_utt").read_text().splitlines()
    assert dict(zip(header.split("\t"), row.split("\t")))["rate"] == "80.00"
    assert read_per_utt(directory / "per_utt") == {"u1": Counts(hits=2, sub=2, ins=1, dele=1)}
    (directory / "per_utt").write_text("garbage\n")
    with pytest.raises(UserError, match="per_utt: not a table of counts"):
        read_per_utt(directory / "per_utt")
    lines = (directory / "align").read_text().splitlines()
    assert lines[0] == "u1  wer 80.00  [4 / 5, 1 ins, 1 del, 2 sub]"
    assert lines[1].split() == ["ref", "le", "chat", "est", "**", "assis", "ici"]
    assert lines[2].split() == ["hyp", "**", "chat", "est", "as", "si", "là"]
    assert lines[3].split() == ["op", "D", "I", "S", "S"]
    assert lines[3].index("I") == lines[2].index("as") == lines[1].index("**")


def test_wide_characters_stand_in_columns():
    ours = align("j", list("音声の内容"), list("音楽の内テ容"))
    assert list(grid(ours)) == ["ref  音 声 の 内 ** 容", "hyp  音 楽 の 内 テ 容", "op      S        I"]
    narrow = list(grid(ours, most=14))
    assert narrow[:3] == ["ref  音 声 の", "hyp  音 楽 の", "op      S"] and len(narrow) == 6
    assert max(map(width, narrow)) <= 14
    assert list(grid(ours, in_color=True))[1] == "hyp  音 \x1b[33m楽\x1b[0m の 内 \x1b[36mテ\x1b[0m 容"


def test_a_hypothesis_cannot_command_the_terminal():
    assert "\x1b" not in "".join(grid(align("u", ["a"], ["\x1b]0;title\x07"])))


def test_a_missing_hypothesis_counts_as_deleted_and_is_named(tmp_path, capsys):
    directory = decode_directory(tmp_path, "de", {"u1": "eins zwei", "u2": "drei vier fünf"}, {"u1": "eins zwei"})
    assert main.main(["score", str(directory)]) == 0
    scores = json.loads((directory / "scores.json").read_text())
    assert (scores["num_missing"], scores["missing"]) == (1, ["u2"])
    assert (scores["profiles"]["whisper"]["del"], scores["profiles"]["whisper"]["error_rate"]) == (3, 60.0)
    assert scores["analysis"]["whole_deletions"] == 1
    assert "1 missing: u2" in capsys.readouterr().out
    assert "(no hypothesis)" in (directory / "align").read_text()


def test_insertions_into_an_empty_reference_count(tmp_path, capsys):
    directory = decode_directory(tmp_path, "de", {"u1": "eins", "u2": "(Musik)"}, {"u1": "eins", "u2": "ja ja"})
    scores = score_directory(directory)
    found = scores["profiles"]["whisper"]
    assert (found["ref_len"], found["ins"], found["error_rate"], scores["num_empty_refs"]) == (1, 2, 200.0, 1)
    assert (directory / "per_utt").read_text().splitlines()[2] == "u2\t0\t0\t0\t2\t0\t-"
    assert scores["analysis"]["whole_deletions"] == 0


def test_a_set_of_empty_references_has_no_rate_and_says_so(tmp_path, capsys):
    directory = decode_directory(tmp_path, "it", {"u": "(x)"}, {"u": "no"})
    some = decode_directory(tmp_path, "de", {"u": "ja"}, {"u": "ja"})
    assert main.main(["score", str(directory), str(some)]) == 0
    found = json.loads((directory / "scores.json").read_text())["profiles"]["marks"]
    assert (found["ref_len"], found["ins"], found["error_rate"], found["interval"]) == (0, 1, None, None)
    out = capsys.readouterr().out
    assert "every reference is empty: no error rate" in out and "macro - over 2 languages" in out


def test_the_signature_says_what_a_number_depends_on(tmp_path):
    directory = decode_directory(tmp_path, "zh", {"u": "好", "v": "(x)"}, {"u": "好"})
    meta = {"set": "talk_zh_test", "lang": "zh", "unseen_policy": "shared", "as": "ja", "first": 2}
    (directory / "meta.json").write_text(json.dumps(meta))
    signature = score_directory(directory)["profiles"]["marks"]["signature"]
    assert signature.startswith("cer|unit:char|profile:marks|lang:zh|zipperasr:")
    assert "|rapidfuzz:" in signature and signature.endswith("|unseen:shared|as:ja|first:2|utts:2|empty:1")


@pytest.mark.parametrize(
    "ref, hyp, message",
    [
        (["u1 a", "u2 b", "u1 c"], [], "ref: 1 ids stand more than once: u1"),
        (["u1 a"], ["u1 a", "u1 b"], "hyp: 1 ids stand more than once: u1"),
        (["u1 a"], ["u9 a"], "1 hypotheses have no reference: u9"),
        ([], [], "ref: holds no utterance"),
        (["u1 a", ""], [], "ref: line 2 is empty"),
        (["\ufeffu1 a"], ["u1 a"], "ref: begins with a byte order mark"),
        (["u1 a", "u2 b"], ["u1 a", "u2 b\0"], "hyp: line 2 has a NUL character"),
    ],
)
def test_a_malformed_directory_is_an_error_of_one_line_that_names_it(ref, hyp, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        score_directory(decode_directory(tmp_path, "de", ref, hyp))
    assert "\n" not in str(caught.value)


def test_what_is_not_text_is_an_error_of_one_line(tmp_path, capsys):
    directory = decode_directory(tmp_path, "de", {"u1": "a"}, {"u1": "a"})
    (directory / "hyp").write_bytes(b"u1 gut\nu2 f\xfcnf\n")
    (directory / "utts.jsonl").write_text('{"id": "u1"}\n{"id"')
    assert main.main(["score", str(directory)]) == 1
    (directory / "hyp").write_text("u1 gut\n")
    assert main.main(["score", str(directory)]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "of 1 directories" not in line]
    assert len(errors) == 2 and "hyp: line 2 is not UTF-8" in errors[0] and "utts.jsonl: not a JSON" in errors[1]


@pytest.mark.parametrize("lang, message", [("xx", "unknown language 'xx'"), (None, "give it by --lang")])
def test_a_directory_needs_a_known_language(lang, message, tmp_path):
    with pytest.raises(UserError, match=message):
        score_directory(decode_directory(tmp_path, lang, {"u": "a"}, {"u": "a"}))


def test_languages_do_not_mix_in_a_set(tmp_path):
    directory = decode_directory(
        tmp_path, "de", {"u1": "a"}, {"u1": "a"}, utts=[{"id": "u1"}, {"id": "u2", "lang": "th"}]
    )
    with pytest.raises(UserError, match=r"th \(u2\)"):
        score_directory(directory)


def test_a_directory_that_is_being_decoded_is_not_scored(tmp_path):
    directory = decode_directory(tmp_path, "de", {"u1": "a", "u2": "b"}, {"u1": "a"})
    (directory / "part.old.1.jsonl").write_text('{"id": "u2"}\n')
    os.utime(directory / "part.old.1.jsonl", (0, 0))
    (directory / "part.new.1.jsonl").write_text('{"id": "u1"}\n{"id": "u2"}\n{"id": "u')
    (directory / "part.new.2.jsonl").write_text('{"id": "u3"}\n')
    with pytest.raises(UserError, match="has not ended, 3 utterances are decoded; run its stage again"):
        score_directory(directory)
    for part in directory.glob("part.*"):
        part.unlink()
    (directory / ".lock").touch()
    with pytest.raises(UserError, match="has not ended, 0 utterances are decoded"):
        score_directory(directory)
    (directory / ".done").touch()
    assert score_directory(directory)["num_utts"] == 2


def test_a_bad_directory_fails_the_command_but_not_the_others(tmp_path, capsys):
    good = decode_directory(tmp_path, "de", {"u1": "a"}, {"u1": "a"})
    assert main.main(["score", str(tmp_path / "decode_none"), str(good)]) == 1
    out, err = capsys.readouterr()
    assert "read_de_test" in out and (good / "scores.json").is_file()
    assert "decode_none/ref: No such file" in err and "1 of 2" in err


def test_scoring_again_writes_the_same_bytes(tmp_path):
    utts = [{"id": f"u{i}", "speaker": f"s{i % 2}", "duration_s": i, "flags": ["capped"]} for i in range(40)]
    refs = {row["id"]: SENTENCES["de"] for row in utts}
    hyps = {utt_id: text[: 40 - i] for i, (utt_id, text) in enumerate(refs.items())}
    directory = decode_directory(tmp_path, "de", refs, hyps, utts=utts)
    written = []
    for _ in range(2):
        score_directory(directory)
        written.append({path.name: path.read_bytes() for path in directory.iterdir()})
    assert written[0] == written[1] and {"scores.json", "per_utt", "per_spk", "align"} < set(written[0])


def test_intervals_agree_with_scipys_bootstrap():
    draw = np.random.default_rng(0)
    lengths = draw.integers(5, 30, size=300)
    errors = draw.binomial(lengths, 0.2)
    ours = bootstrap.interval(bootstrap.distribution(errors, lengths, num=4000))
    rate = lambda e, n, axis: 100 * e.sum(axis) / n.sum(axis)  # noqa: E731
    theirs = scipy.stats.bootstrap(
        (errors, lengths), rate, paired=True, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert ours == pytest.approx(theirs, abs=0.1 * (theirs.high - theirs.low))


def test_intervals_of_single_words_are_binomial():
    wrong = np.arange(1000) < 100
    low, high = bootstrap.interval(bootstrap.distribution(wrong, np.ones(1000), num=4000, seed=3))
    exact = [scipy.stats.binom.ppf(q, 1000, 0.1) / 10 for q in (0.025, 0.975)]
    assert [low, high] == pytest.approx(exact, abs=0.15)


def test_a_seed_draws_the_same_utterances_of_two_systems():
    lengths = np.full(50, 10)
    a, b = (bootstrap.distribution(np.arange(50) % 3 + extra, lengths, seed=5) for extra in (0, 1))
    assert b - a == pytest.approx(np.full(1000, 10.0))


def test_resamples_without_a_reference_are_left_out_of_the_interval():
    drawn = bootstrap.distribution([1, 2], [2, 0], num=2000)
    assert 0.2 < np.isnan(drawn).mean() < 0.3
    assert bootstrap.interval(drawn) == pytest.approx((50.0, 150.0))


def test_averages_worked_by_hand(tmp_path, capsys):
    run = tmp_path / "run"
    sets = [
        decode_directory(run, "de", {"u": "a b c d"}, {"u": "a b c x"}, name="read_de_test"),  # 25%
        decode_directory(run, "de", {"u": "a b"}, {"u": "x b c d"}, name="talk_de_test"),  # 150%
        decode_directory(run, "fr", {"u": "a"}, {"u": "a"}, name="read_fr_test"),  # 0%
        decode_directory(run, "zh", {"u": "好好好好好"}, {"u": "好好好好"}, name="read_zh_test"),  # 20%
    ]
    assert main.main(["score", *map(str, sets)]) == 0
    found = averages(sets)
    assert found["macro"] == pytest.approx((87.5 + 0 + 20) / 3) and found["num_langs"] == 3
    assert found["interval"] == pytest.approx([found["macro"]] * 2)  # one utterance a set: nothing to vary
    assert found["micro"]["wer"].error_rate == pytest.approx(100 * 4 / 7)
    assert found["micro"]["cer"].error_rate == 20.0
    out = capsys.readouterr().out
    assert f"{run}: macro 35.83 [35.83, 35.83] over 3 languages; micro WER 57.14, CER 20.00" in out


def test_lines_of_the_table_fit_120_columns(tmp_path, capsys):
    refs = {f"utterance_with_a_long_id_{i}": "eins zwei drei vier fünf" for i in range(9)}
    hyps = {next(iter(refs)): "सात आठ नौ दस ग्यारह बारह " * 5}
    utts = [{"id": utt_id, "flags": ["capped", "loop", "redecoded"]} for utt_id in refs]
    assert main.main(["score", str(decode_directory(tmp_path, "de", refs, hyps, utts=utts))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    text = " ".join(" ".join(lines).split())
    for note in ("8 missing: utterance_with_a_long_id_1", "9 capped", "1 insertion bursts", "8 whole deletions"):
        assert note in text
    assert "1 of 1 in a foreign script (references: 0)" in text


def test_errors_are_counted_by_speaker_and_by_duration(tmp_path):
    utts = [{"id": "u1", "duration_s": 1.99, "speaker": "anna"}, {"id": "u2", "duration_s": 2.0, "speaker": "anna"}]
    utts += [{"id": "u3", "duration_s": 31, "speaker": None}, {"id": "u4", "duration_s": 4, "speaker": "bert"}]
    refs = {"u1": "a b", "u2": "c", "u3": "d e", "u4": "f"}
    directory = decode_directory(tmp_path, "de", refs, {"u1": "a x", "u2": "c", "u3": "d", "u4": "f g h"}, utts=utts)
    scores = score_directory(directory)
    rows = [tuple(row.values()) for row in scores["analysis"]["by_duration"]]
    assert rows == [(0, 2, 1, 2, 1), (2, 5, 2, 2, 2), (30, None, 1, 2, 1)]
    assert (directory / "per_spk").read_text().splitlines() == [
        "speaker\tnum_utts\tref_len\thits\tsub\tins\tdel\trate",
        "-\t1\t2\t1\t0\t0\t1\t50.00",
        "anna\t2\t3\t2\t1\t0\t0\t33.33",
        "bert\t1\t1\t1\t0\t2\t0\t200.00",
    ]
    (directory / "utts.jsonl").unlink()
    assert "by_duration" not in score_directory(directory)["analysis"] and not (directory / "per_spk").exists()


@pytest.mark.parametrize("lang, inserted", [("de", 5), ("zh", 10)])
def test_a_burst_is_a_number_of_insertions_in_a_row(lang, inserted):
    unit = languages.get(lang).unit
    for num, is_burst in ((inserted, True), (inserted - 1, False)):
        together = align("u", list("ab"), [*"a", *"x" * num, *"b"])
        apart = align("u", list("a" * 30), [*("ax" * num), *"a" * (30 - num)])
        assert apart.counts.ins == together.counts.ins == num and analysis.longest_insertion(apart) == 1
        found = analysis.analyse([together, apart], [], [], languages.get(lang), {})
        assert (analysis.BURST[unit], found["insertion_bursts"]) == (inserted, is_burst)


def test_whole_deletions_are_of_references_with_words(tmp_path):
    refs = {"said": "a b", "unheard": "a", "silence": "(x)", "lost": "c"}
    directory = decode_directory(tmp_path, "de", refs, {"said": "a", "unheard": "...", "silence": ""})
    assert score_directory(directory)["analysis"]["whole_deletions"] == 2


def test_foreign_scripts_and_languages_are_found(tmp_path):
    german = "Heute scheint die Sonne, und wir gehen gemeinsam in den Garten."
    french = "Aujourd'hui il fait beau et nous allons ensemble dans le jardin."
    greek = "Σήμερα ο ήλιος λάμπει και πηγαίνουμε μαζί στον κήπο"
    refs = {f"u{i}": german for i in range(5)} | {"short": "ja", "borrowed": french}
    hyps = {
        "u0": f"{german} ο ήλιος",
        "u1": french,
        "u2": french,
        "u3": f"{greek} Sonne",
        "u4": "123",
        "short": "oui",
        "borrowed": french,
    }
    found = score_directory(decode_directory(tmp_path, "de", refs, hyps))["analysis"]
    assert found["script_mismatch"] == {"num": 1, "of": 6, "num_in_refs": 0}
    told = found["language_mismatch"]
    assert (told["of"], told["num_in_refs"], told["langs"]["fr"]) == (5, 1, 3)
    assert told["num"] == sum(told["langs"].values()) == 4  # Greek is none of our languages, but it is not German


def test_the_shell_script_scores_in_a_batch(tmp_path):
    directory = decode_directory(tmp_path, "de", {"u1": "a b"}, {"u1": "a"})
    command = tmp_path / "bin" / "zipperasr"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m zipperasr.cli "$@"\n')
    command.chmod(0o755)
    environment = os.environ | {"PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    for arguments, status in (([directory], 0), ([directory, tmp_path], 1), ([], 1)):
        done = subprocess.run([REPOSITORY / "local" / "score.sh", *arguments], cwd=tmp_path, env=environment)
        assert done.returncode == status
    assert json.loads((directory / "scores.json").read_text())["profiles"]["whisper"]["error_rate"] == 50.0


def test_the_runs_configuration_chooses_the_headline(tmp_path, capsys):
    run = tmp_path / "run"
    directories = [decode_directory(folder, "th", {"u": "ปี"}, {"u": "ปู"}) for folder in (run, run / "as_zh")]
    (run / "config.yaml").write_text("stage: 1\nscoring: {profile: marks}\n")
    for directory in directories:
        assert main.main(["score", str(directory)]) == 0
        scores = json.loads((directory / "scores.json").read_text())
        assert scores["profile"] == "marks" and read_per_utt(directory / "per_utt")["u"].sub == 1
        assert [found["error_rate"] for found in scores["profiles"].values()] == [0.0, 50.0]
        assert " 0.00 " in capsys.readouterr().out.splitlines()[1].replace("50.00*", "")
    assert main.main(["score", "--profile", "whisper", str(directories[0])]) == 0
    assert read_per_utt(directories[0] / "per_utt")["u"].sub == 0
    assert main.main(["score", "--profile", "none", str(directories[0])]) == 1
    assert "unknown scoring profile 'none'; known: whisper, marks" in capsys.readouterr().err


def test_scoring_never_imports_torch(tmp_path):
    text = "ein ganzer Satz, dessen Sprache man erkennt"
    directory = decode_directory(tmp_path, "de", {"u1": text}, {"u1": text})
    program = (
        "import sys; from zipperasr.cli import main; "
        f"assert main.main(['score', {str(directory)!r}]) == 0; assert 'py3langid' in sys.modules; "
        f"assert main.main(['compare', {str(directory)!r}, {str(directory)!r}]) == 0; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)

"""Claims about scoring; oracles: jiwer on strings, openai-whisper's own normalisers, alignments worked by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jiwer
import pytest

from zipperasr import languages
from zipperasr.cli import main
from zipperasr.errors import UserError
from zipperasr.scoring import ScoringSettings, normalise, score

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


def decode_directory(folder, lang, ref, hyp, name=None):
    directory = folder / f"decode_{name or f'read_{lang}_test'}"
    directory.mkdir(parents=True)
    for file, texts in (("ref", ref), ("hyp", hyp)):
        lines = texts if isinstance(texts, list) else [f"{key} {text}" for key, text in texts.items()]
        (directory / file).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    (directory / "meta.json").write_text(json.dumps({"set": f"read_{lang}_test", "lang": lang, "unseen_policy": None}))
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


def test_every_configurable_profile_exists():
    for profile in ScoringSettings.model_json_schema()["properties"]["profile"]["enum"]:
        assert profile in normalise.PROFILES


@pytest.mark.parametrize("lang", ["en", "fr", "ja", "ko", "th", "zh"])
def test_counts_equal_jiwers(lang, tmp_path):
    refs = {"a": SENTENCES[lang], "b": SENTENCES[lang] * 2, "c": SENTENCES[lang][::-1], "d": "Ünited"}
    hyps = {"a": SENTENCES[lang][:-5], "b": SENTENCES[lang], "c": "x y " + SENTENCES[lang][::-1], "d": ""}
    scores = score.score_directory(decode_directory(tmp_path, lang, refs, hyps))
    split = normalise.splitter(languages.get(lang), "whisper")
    joined = [[" ".join(split(text)) for text in texts.values()] for texts in (refs, hyps)]
    oracle = jiwer.process_words(*joined)
    assert scores["error_rate"] == pytest.approx(100 * oracle.wer)
    counts = [scores[key] for key in ("hits", "sub", "ins", "del")]
    assert counts == [oracle.hits, oracle.substitutions, oracle.insertions, oracle.deletions]
    assert scores["metric"] == ("cer" if lang in ("ja", "ko", "th", "zh") else "wer")


def test_an_alignment_worked_by_hand(tmp_path):
    directory = decode_directory(tmp_path, "fr", {"u1": "le chat est assis ici"}, {"u1": "chat est as si là"})
    scores = score.score_directory(directory)
    assert [scores[key] for key in ("ref_len", "hits", "sub", "ins", "del")] == [5, 2, 2, 1, 1]
    assert scores["error_rate"] == 80.0
    header, row = (directory / "per_utt").read_text().splitlines()
    assert dict(zip(header.split("\t"), row.split("\t")))["rate"] == "80.00"
    lines = (directory / "align").read_text().splitlines()
    assert lines[0] == "u1  wer 80.00  [4 / 5, 1 ins, 1 del, 2 sub]"
    assert lines[1].split() == ["ref", "le", "chat", "est", "**", "assis", "ici"]
    assert lines[2].split() == ["hyp", "**", "chat", "est", "as", "si", "là"]
    assert lines[3].split() == ["op", "D", "I", "S", "S"]
    assert lines[3].index("I") == lines[2].index("as") == lines[1].index("**")


def test_wide_characters_stand_in_columns(tmp_path):
    directory = decode_directory(tmp_path, "ja", {"j": "音声の内容"}, {"j": "音楽の内テ容"})
    score.score_directory(directory)
    assert (directory / "align").read_text().splitlines()[1:4] == [
        "ref  音 声 の 内 ** 容",
        "hyp  音 楽 の 内 テ 容",
        "op      S        I",
    ]


def test_a_missing_hypothesis_counts_as_deleted_and_is_named(tmp_path, capsys):
    directory = decode_directory(tmp_path, "de", {"u1": "eins zwei", "u2": "drei vier fünf"}, {"u1": "eins zwei"})
    assert main.main(["score", str(directory)]) == 0
    scores = json.loads((directory / "scores.json").read_text())
    assert (scores["num_missing"], scores["missing"], scores["del"], scores["error_rate"]) == (1, ["u2"], 3, 60.0)
    assert "1: u2" in capsys.readouterr().out
    assert "(no hypothesis)" in (directory / "align").read_text()


def test_insertions_into_an_empty_reference_count(tmp_path):
    directory = decode_directory(tmp_path, "de", {"u1": "eins", "u2": "(Musik)"}, {"u1": "eins", "u2": "ja ja"})
    scores = score.score_directory(directory)
    assert (scores["ref_len"], scores["ins"], scores["error_rate"]) == (1, 2, 200.0)
    assert (directory / "per_utt").read_text().splitlines()[2] == "u2\t0\t0\t0\t2\t0\t-"
    nothing = score.score_directory(decode_directory(tmp_path, "it", {"u": "(x)"}, {"u": "no"}))
    assert (nothing["ref_len"], nothing["error_rate"]) == (0, None)


def test_the_signature_says_what_a_number_depends_on(tmp_path):
    directory = decode_directory(tmp_path, "zh", {"u": "好"}, {"u": "好"})
    (directory / "meta.json").write_text(json.dumps({"set": "talk_zh_test", "lang": "zh", "unseen_policy": "shared"}))
    signature = score.score_directory(directory, profile="marks")["signature"]
    assert signature.startswith("cer|unit:char|profile:marks|lang:zh|zipperasr:")
    assert signature.endswith("|unseen:shared") and "|jiwer:" in signature


@pytest.mark.parametrize(
    "ref, hyp, message",
    [
        (["u1 a", "u2 b", "u1 c"], [], r"ref: 1 ids stand more than once: u1"),
        (["u1 a"], ["u1 a", "u1 b"], r"hyp: 1 ids stand more than once: u1"),
        (["u1 a"], ["u9 a"], r"1 hypotheses have no reference: u9"),
        ([], [], r"ref: holds no utterance"),
        (["u1 a", ""], [], r"ref: line 2 is empty"),
    ],
)
def test_a_malformed_directory_is_an_error_that_names_it(ref, hyp, message, tmp_path):
    with pytest.raises(UserError, match=message):
        score.score_directory(decode_directory(tmp_path, "de", ref, hyp))


def test_languages_do_not_mix_in_a_set(tmp_path):
    directory = decode_directory(tmp_path, "de", {"u1": "a"}, {"u1": "a"})
    (directory / "utts.jsonl").write_text('{"id": "u1", "lang": "de"}\n{"id": "u2", "lang": "th"}\n')
    with pytest.raises(UserError, match=r"th \(u2\)"):
        score.score_directory(directory)


def test_a_bad_directory_fails_the_command_but_not_the_others(tmp_path, capsys):
    good = decode_directory(tmp_path, "de", {"u1": "a"}, {"u1": "a"})
    assert main.main(["score", str(tmp_path / "decode_none"), str(good)]) == 1
    out, err = capsys.readouterr()
    assert "read_de_test" in out and (good / "scores.json").is_file()
    assert "decode_none/ref: no such file" in err and "1 of 2" in err


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
    assert json.loads((directory / "scores.json").read_text())["error_rate"] == 50.0


def test_the_runs_configuration_chooses_the_profile(tmp_path):
    directory = decode_directory(tmp_path / "run", "th", {"u": "ปี"}, {"u": "ปู"})
    (tmp_path / "run" / "config.yaml").write_text("stage: 1\nscoring: {profile: marks}\n")
    assert main.main(["score", str(directory)]) == 0
    assert json.loads((directory / "scores.json").read_text())["error_rate"] == 50.0
    assert main.main(["score", "--profile", "whisper", str(directory)]) == 0
    assert json.loads((directory / "scores.json").read_text())["error_rate"] == 0.0


def test_scoring_never_imports_torch(tmp_path):
    directory = decode_directory(tmp_path, "en", {"u1": "a"}, {"u1": "a"})
    program = (
        "import sys; from zipperasr.cli import main; "
        f"assert main.main(['score', {str(directory)!r}]) == 0; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)

"""The synthetic corpora of the mini configuration: same bytes whatever the run, nothing shared between parts."""

import csv
import hashlib
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile

pytest.importorskip("espeakng_loader", reason="the mini extra is not installed")
LOCAL = Path(__file__).resolve().parents[1] / "local"
sys.path.insert(0, str(LOCAL))

import make_mini  # noqa: E402
import mini_phrases  # noqa: E402
import mini_speech  # noqa: E402

from zipperasr.errors import UserError  # noqa: E402

LETTERS = {"ar": "ARABIC", "ja": ("HIRAGANA", "KATAKANA"), "ko": "HANGUL", "ru": "CYRILLIC", "th": "THAI", "zh": "CJK"}


@pytest.fixture(scope="module")
def plans() -> dict[tuple[str, str, str], list[make_mini.Item]]:
    return {key: make_mini.plan(*key) for key in make_mini.SETS}


def digests(audio) -> list[str]:
    return [hashlib.sha256(samples.tobytes()).hexdigest() for samples in audio]


def tree(directory: Path) -> dict[str, str]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def make_tiny(out: Path, nj: int = 2) -> subprocess.Popen:
    options = ["--out", out, "--corpora", "talk", "--scale", "0.05", "--nj", str(nj)]
    return subprocess.Popen([sys.executable, LOCAL / "make_mini.py", *options], stderr=subprocess.PIPE, text=True)


def test_bytes_do_not_depend_on_jobs_or_order(plans):
    items = [item for plan in plans.values() for item in plan[:2]][: 3 * mini_speech.CHUNK]
    utterances = [item.utterance for item in items]
    one = digests(mini_speech.synthesise_all(utterances, nj=1))
    assert len(set(one)) == len(utterances)
    assert digests(mini_speech.synthesise_all(utterances, nj=2)) == one
    chunks = [utterances[start : start + mini_speech.CHUNK] for start in range(0, len(utterances), mini_speech.CHUNK)]
    backwards = list(mini_speech.in_fresh_processes(mini_speech.synthesise, chunks[::-1], nj=2))
    assert digests(samples for chunk in backwards[::-1] for samples in chunk) == one


def test_a_smaller_scale_is_the_beginning_of_a_larger_one(plans):
    items = plans["read", "vi", "train"]
    assert make_mini.plan("read", "vi", "train", scale=0.02) == items[:18]
    few = digests(mini_speech.synthesise_all([item.utterance for item in items[:5]]))
    more = digests(mini_speech.synthesise_all([item.utterance for item in items[:40]]))
    assert few == more[:5]


def test_no_speaker_and_no_voice_is_in_two_parts(plans):
    voices, numbers = {}, {}
    for key, items in plans.items():
        for item in items:
            numbers.setdefault(item.speaker, set()).add(key)
            who = item.utterance.speaker
            voices.setdefault((who.variant, who.pitch, who.rate), set()).add(key[2].split("_")[0])
    for number in range(2000):
        who = mini_speech.speaker(number, "pretrain", "read")
        voices.setdefault((who.variant, who.pitch, who.rate), set()).add("pretrain")
    assert all(len(sets) == 1 for sets in numbers.values())
    assert all(len(parts) == 1 for parts in voices.values())


def test_held_out_variants_are_only_heard_in_tests(plans):
    heard = {part: set() for part in mini_speech.PARTS}
    for key, items in plans.items():
        heard[key[2].split("_")[0]] |= {item.utterance.speaker.variant for item in items}
    assert not heard["train"] & set(mini_speech.HELD_OUT_VARIANTS)
    assert heard["test"] >= set(mini_speech.HELD_OUT_VARIANTS)
    assert heard["test"] & heard["train"]


def test_no_phrase_is_in_two_parts(plans):
    parts = {}
    for (_, lang, split), items in plans.items():
        for item in items:
            parts.setdefault((lang, item.utterance.text), set()).add(split.split("_")[0])
    assert all(len(found) == 1 for found in parts.values())
    assert all({mini_phrases.part(*key)} == found for key, found in parts.items())


def test_every_tested_word_is_in_the_training_text(plans):
    for lang in make_mini.WELL_RESOURCED:
        train, test = plans["read", lang, "train"], plans["read", lang, "test"]
        train, test = ({word for item in items for word in item.utterance.text.split()} for items in (train, test))
        if lang not in mini_phrases.UNSPACED:
            assert test <= train


@pytest.mark.parametrize("lang", mini_speech.LANGS)
def test_phrases_are_lower_case_letters_of_one_script(lang):
    phrases = mini_phrases.phrases(lang) + (mini_phrases.phrases(lang, "talk") if lang in mini_phrases.JOINS else [])
    assert len(set(mini_phrases.phrases(lang))) == len(mini_phrases.phrases(lang)) > 10_000
    assert len(mini_phrases.names(lang)) == mini_phrases.NUM_NAMES
    for letter in set("".join(phrases)) - {" ", "ー"}:
        assert unicodedata.name(letter).startswith(LETTERS.get(lang, "LATIN")), letter
        assert unicodedata.category(letter)[0] in "LM" and letter == letter.lower()
    assert all(phrase == " ".join(phrase.split()) for phrase in phrases)


@pytest.mark.parametrize(
    ("lang", "number", "words"),
    [("ja", 0, "ゼロ"), ("ja", 10, "じゅう"), ("ja", 14, "じゅうよん"), ("ja", 90, "きゅうじゅう"), ("zh", 12, "十二"),
     ("en", 21, "twenty one"), ("ar", 21, "واحد وعشرون"), ("ko", 37, "삼십칠"), ("vi", 21, "hai mươi mốt")],
)  # fmt: skip
def test_numbers_are_spelled(lang, number, words):
    assert mini_phrases.number_words(lang, number) == words


def test_espeak_reads_every_text_in_its_language(plans):
    assert mini_speech.speakable("ja", ["日本"]) == mini_speech.speakable("vi", ["brazil"]) == [False]
    for lang in mini_speech.LANGS:
        texts = sorted({item.utterance.text for key, items in plans.items() if key[1] == lang for item in items})
        spoken = mini_speech.speakable(lang, texts)
        assert all(spoken), [text for text, good in zip(texts, spoken) if not good][:5]


def test_durations_and_levels_are_those_of_speech(plans):
    utterances = [item.utterance for items in plans.values() for item in items[:6]]
    for utterance, audio in zip(utterances, mini_speech.synthesise_all(utterances)):
        assert 0.3 < len(audio) / mini_speech.SAMPLE_RATE < 6
        assert audio.dtype == np.int16
        assert np.abs(audio).max() / 32767 == pytest.approx(utterance.speaker.level, abs=1e-4)
        assert np.sqrt(np.mean((audio / 32768) ** 2)) > 0.01


def test_a_killed_run_is_completed_and_a_complete_one_is_left_alone(tmp_path):
    whole = make_tiny(tmp_path / "whole", nj=1)
    killed = make_tiny(tmp_path / "killed")
    while not list((tmp_path / "killed").rglob("*.flac")):
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert whole.wait() == 0
    assert len(tree(tmp_path / "killed")) < len(tree(tmp_path / "whole"))
    transcripts = tmp_path / "whole" / "talk" / "en" / "train" / "transcripts.txt"
    written = transcripts.stat()
    for _ in range(100):  # until the killed run's last child lets go of the lock
        again = make_tiny(tmp_path / "killed")
        if again.wait() == 0:
            break
        assert "another run is writing here" in again.stderr.read()
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")
    assert make_tiny(tmp_path / "whole").wait() == 0
    assert transcripts.stat() == written


def test_files_agree_with_their_tables(tmp_path, plans):
    out = tmp_path / "corpora"
    make_mini.make(out, corpora=["talk"], scale=0.03, seed=0, nj=2)
    rows = list(csv.DictReader((out / "talk" / "speakers.tsv").open(encoding="utf-8"), delimiter="\t"))
    speakers = {(row["lang"], row["split"], row["speaker"]) for row in rows}
    assert {path.name for path in (out / "talk" / "zh").iterdir()} == {"train", "dev", "test_meeting", "test_net"}
    for transcripts in out.glob("*/*/*/transcripts.txt"):
        lang, split = transcripts.parts[-3:-1]
        lines = [line.split("\t") for line in transcripts.read_text(encoding="utf-8").splitlines()]
        assert len(lines) == len(list(transcripts.parent.rglob("*.flac")))
        for utt_id, text in lines:
            speaker, book, _ = utt_id.split("_")
            info = soundfile.info(transcripts.parent / "audio" / speaker / book / f"{utt_id}.flac")
            assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
            assert (lang, split, speaker) in speakers and text


def test_what_cannot_be_made_is_said_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--scale 0.0: .* not 0"):
        make_mini.plan("read", "de", "train", scale=0.0)
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match="espeakng-loader is not installed; run pip install"):
        mini_speech.speakable("de", ["eins"])
    monkeypatch.setattr(sys, "argv", ["make_mini.py", "--out", str(tmp_path)])
    monkeypatch.setattr(mini_phrases, "phrases", lambda lang, corpus: [])
    with pytest.raises(SystemExit, match=r"make_mini.py: error: --scale 1.0: read de train can have 1 to 0"):
        make_mini.main()

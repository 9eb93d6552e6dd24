"""Preparation: corpora on disk become manifests, and audio of any codec becomes 16 kHz mono."""

import argparse
import copy
import csv
import os
import sys
import wave
from pathlib import Path

import mls
import numpy as np
import pytest
import soundfile
from lhotse import CutSet

from zipperasr.data import audio, defects, features, manifests, prepare, validation
from zipperasr.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "local"))

import prepare_mls
import prepare_tsv

CONTAINERS = {"wav": "WAV", "flac": "FLAC", "mp3": "MP3", "ogg": "OGG", "opus": "OGG", "aiff": "AIFF"}


def mls_manifests(corpus_dir: Path, out: Path, *langs: str, nj: int = 1) -> dict[str, list[dict]]:
    """Prepare and read everything back: {set: cuts}."""
    prepare_mls.run(argparse.Namespace(corpus_dir=corpus_dir, corpus="read", langs=langs, out=out, nj=nj))
    return {path.name.removesuffix(manifests.SUFFIX): list(manifests.read(path)) for path in sorted(out.glob("*.gz"))}


def tsv_manifests(table: Path, out: Path, **more) -> dict[str, list[dict]]:
    given = {"tsv": table, "corpus_dir": None, "split": "test", "langs": None} | more
    prepare_tsv.run(argparse.Namespace(corpus="clips", out=out, nj=1, **given))
    return {path.name.removesuffix(manifests.SUFFIX): list(manifests.read(path)) for path in sorted(out.glob("*.gz"))}


def table(path: Path, *rows: tuple[str, ...], header: tuple[str, ...] = prepare_tsv.COLUMNS) -> Path:
    path.write_text("".join("\t".join(row) + "\n" for row in (header, *rows)), encoding="utf-8")
    return path


def cut_of(path: Path) -> dict:
    cut = prepare._examine(("clips_en_test", prepare.Clip("utt", path, "en", "text"))).cut
    assert cut["recording"]["sampling_rate"] == soundfile.info(path).samplerate
    return cut


def counts(out: Path, name: str) -> dict[str, int]:
    """The defects of a set that has been prepared, by kind."""
    return defects.read_tally(manifests.tally_path(out / f"{name}{manifests.SUFFIX}")).kinds


@pytest.mark.parametrize("folder", ["de", "mls_german", "mls_german_opus"])
def test_every_split_of_an_mls_folder_becomes_a_manifest(tmp_path, folder):
    corpus = mls.make(tmp_path / "corpus", {f"{folder}/train": 3, f"{folder}/dev": 1, f"{folder}/test_other": 2})
    found = mls_manifests(corpus, tmp_path / "out", "de")
    assert {name: len(cuts) for name, cuts in found.items()} == {
        "read_de_dev": 1,
        "read_de_test_other": 2,
        "read_de_train": 3,
    }
    (cut,) = CutSet.from_file(tmp_path / "out" / "read_de_dev_cuts.jsonl.gz")
    (supervision,) = cut.supervisions
    assert (cut.id, supervision.id, supervision.language, supervision.speaker) == (
        "2_1_000000",
        "2_1_000000",
        "de",
        "2",
    )
    assert supervision.text == "words of 2_1_000000"
    assert cut.load_audio().shape == (1, cut.num_samples)


def test_manifests_have_the_same_bytes_each_time_and_for_any_number_of_jobs(tmp_path):
    corpus = mls.make(tmp_path / "corpus", {"de/train": 70})
    mls_manifests(corpus, tmp_path / "one", "de", nj=1)
    mls_manifests(corpus, tmp_path / "two", "de", nj=2)
    one, two = (tmp_path / out / "read_de_train_cuts.jsonl.gz" for out in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_preparation_is_skipped_when_complete_and_done_again_when_transcripts_change(tmp_path, capsys):
    corpus = mls.make(tmp_path / "corpus", {"de/train": 2})
    mls_manifests(corpus, tmp_path / "out", "de")
    manifest, transcripts = (
        tmp_path / "out" / "read_de_train_cuts.jsonl.gz",
        corpus / "de" / "train" / "transcripts.txt",
    )
    before = manifest.stat().st_mtime_ns
    mls_manifests(corpus, tmp_path / "out", "de")
    assert manifest.stat().st_mtime_ns == before
    assert "complete" in capsys.readouterr().out
    transcripts.write_text(transcripts.read_text().replace("words", "letters"))
    (cuts,) = mls_manifests(corpus, tmp_path / "out", "de").values()
    assert cuts[0]["supervisions"][0]["text"] == "letters of 1_1_000000"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda corpus: None, "no language 'de'"),
        (lambda corpus: (corpus / "de").mkdir(parents=True), r"no split there; looked for .*de/\*/transcripts.txt"),
        (lambda corpus: mls.make(corpus, {"de/test": 0}), "read_de_test: the corpus holds no utterance"),
    ],
)
def test_a_corpus_that_is_not_there_is_named(tmp_path, make, message):
    make(tmp_path / "corpus")
    with pytest.raises(UserError, match=message):
        mls_manifests(tmp_path / "corpus", tmp_path / "out", "de")
    assert not list(tmp_path.glob("out/*.gz"))


def test_an_unknown_language_is_named(tmp_path):
    with pytest.raises(UserError, match="unknown language 'xx'; known: ar, de"):
        mls_manifests(mls.make(tmp_path, {"xx/test": 1}), tmp_path / "out", "xx")


def test_a_line_whose_id_is_not_of_mls_is_left_out_and_named_with_its_number(tmp_path):
    corpus = mls.make(tmp_path / "corpus", {"de/train": 1})
    with open(corpus / "de/train/transcripts.txt", "a") as stream:
        stream.write("oddity\tsome text\n\n")
    (cuts,) = mls_manifests(corpus, tmp_path / "out", "de").values()
    assert [cut["id"] for cut in cuts] == ["1_1_000000"]
    assert counts(tmp_path / "out", "read_de_train") == {"bad row": 1}
    assert "transcripts.txt:2: 'oddity'" in (tmp_path / "out" / "read_de_train_defects.tsv").read_text()


def test_a_table_becomes_a_manifest_per_language_whatever_the_order_of_its_columns(tmp_path):
    rows = [("a", "th", "sub/a.wav", 'he said "hi', "x"), ("b", "en", "sub/b.flac", "  two words ", "x")]
    for row in rows:
        mls.noise(tmp_path / row[2])
    clips = table(tmp_path / "clips.tsv", *rows, header=("id", "lang", "path", "transcript", "note"))
    found = tsv_manifests(clips, tmp_path / "out")
    assert {name: [cut["supervisions"][0]["text"] for cut in cuts] for name, cuts in found.items()} == {
        "clips_en_test": ["two words"],
        "clips_th_test": ['he said "hi'],
    }


def test_a_folder_of_tables_has_one_for_each_split(tmp_path):
    mls.noise(tmp_path / "a.wav")
    for split, lang in (("train", "en"), ("train", "fr"), ("test", "en")):
        (tmp_path / f"{split}.tsv").touch()
        old = (tmp_path / f"{split}.tsv").read_text() or "id\tpath\tlang\ttranscript\n"
        (tmp_path / f"{split}.tsv").write_text(f"{old}{split}-{lang}\ta.wav\t{lang}\ttext\n")
    found = tsv_manifests(None, tmp_path / "out", corpus_dir=tmp_path, split=None, langs=["en"])
    assert sorted(found) == ["clips_en_test", "clips_en_train"]
    with pytest.raises(UserError, match="clips_fr_test: the corpus holds no utterance of it"):
        tsv_manifests(None, tmp_path / "out", corpus_dir=tmp_path, split=None, langs=["en", "fr"])


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        ([], prepare_tsv.COLUMNS, "clips.tsv: no rows of any language"),
        (
            [("a", "a.wav", "en", "x")],
            ("id", "file", "lang", "text"),
            "clips.tsv: no column path, transcript; its",
        ),
        ([("a", "a.wav", "xx", "x")], prepare_tsv.COLUMNS, "clips.tsv:2: unknown language 'xx'"),
        ([("a", "a.wav", "en", "x"), ("b",)], prepare_tsv.COLUMNS, "clips.tsv:3: unknown language ''"),
        (
            [("a", "a.wav", "en", "one\ttwo")],
            prepare_tsv.COLUMNS,
            "clips.tsv:2: unknown language ''; has the row",
        ),
    ],
)
def test_a_bad_table_is_named_with_its_line(tmp_path, rows, header, message):
    with pytest.raises(UserError, match=message):
        tsv_manifests(table(tmp_path / "clips.tsv", *rows, header=header), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_row_without_all_its_columns_is_left_out_and_counted(tmp_path):
    mls.noise(tmp_path / "a.wav")
    clips = table(tmp_path / "clips.tsv", ("a", "a.wav", "en", "x"), ("b", "a.wav", "en"))
    assert [cut["id"] for cut in tsv_manifests(clips, tmp_path / "out", split="train")["clips_en_train"]] == ["a"]
    assert counts(tmp_path / "out", "clips_en_train") == {"bad row": 1}
    assert "clips.tsv:3: no transcript" in (tmp_path / "out" / "clips_en_train_defects.tsv").read_text()


def test_a_table_of_windows_is_read_as_any_other(tmp_path):
    mls.noise(tmp_path / "a.wav")
    text = "\ufeffid\tlang\ttranscript\tpath\r\na\ten\tsome words\ta.wav\r\n\r\n"
    (tmp_path / "clips.tsv").write_text(text, encoding="utf-8", newline="")
    (cut,) = tsv_manifests(tmp_path / "clips.tsv", tmp_path / "out")["clips_en_test"]
    assert (cut["id"], cut["supervisions"][0]["text"]) == ("a", "some words")
    assert counts(tmp_path / "out", "clips_en_test") == {"byte order mark": 1, "carriage returns": 1}


def test_scripts_fail_with_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prepare_tsv.py", "--corpus", "my_clips"])
    parser = argparse.ArgumentParser()
    prepare_tsv.prepare.add_arguments(parser)
    assert prepare_tsv.prepare.main(parser, lambda args: prepare_tsv.prepare.check_corpus(args.corpus)) == 1
    assert capsys.readouterr().err == (
        "prepare_tsv.py: error: --corpus 'my_clips': sets are named <corpus>_<lang>_<split>; "
        "take a name without underscore\n"
    )


@pytest.mark.parametrize("suffix", CONTAINERS)
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.95])
def test_a_truncated_file_is_told_from_a_whole_one(tmp_path, suffix, kept):
    kwargs = {"format": "OGG", "subtype": "OPUS"} if suffix == "opus" else {}
    path = mls.noise(tmp_path / f"a.{suffix}", seconds=4, rate=48000, **kwargs)
    assert audio.probe(str(path)) == audio.AudioInfo(48000, 192000, 1, CONTAINERS[suffix])
    os.truncate(path, int(kept * path.stat().st_size))
    with pytest.raises(audio.BadAudio) as caught:
        audio.probe(str(path))
    assert caught.value.kind == ("truncated audio" if kept else "unreadable audio")


def test_a_wav_from_a_pipe_is_whole_though_its_header_promises_four_gigabytes(tmp_path):
    path = mls.noise(tmp_path / "a.wav")
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    data[4:8] = data[at : at + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    assert audio.probe(str(path)).num_samples == 8000


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_any_sampling_rate_becomes_16_khz(tmp_path, rate):
    seconds = np.arange(round(0.7 * rate)) / rate
    soundfile.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 440 * seconds), rate, subtype="FLOAT")
    cut = manifests.to_cut(cut_of(tmp_path / "a.wav"))
    samples = audio.load_audio(cut)
    assert samples.dtype == np.float32
    assert len(samples) == audio.num_samples(cut.duration) == round(cut.duration * 16000)
    inside = slice(200, -200)  # the filter rings at the ends
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(samples)) / 16000)
    assert np.abs(samples - expected)[inside].max() < 2e-3


def test_a_recording_that_lhotse_resamples_is_read_at_its_files_rate_and_another_change_is_named(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).uniform(-0.1, 0.1, 8000), 8000, subtype="FLOAT")
    cut = manifests.to_cut(cut_of(tmp_path / "a.wav"))
    again = cut.resample(44100).resample(16000)
    assert again.recording.transforms and np.array_equal(audio.load_audio(again), audio.load_audio(cut))
    with pytest.raises(UserError, match="its recording is changed by 'Speed'; write its audio to a file"):
        audio.load_audio(cut.perturb_speed(1.1))


def test_channels_are_averaged(tmp_path):
    stereo = np.stack([np.full(1600, 0.5), np.full(1600, -0.25)], axis=1)
    soundfile.write(tmp_path / "a.wav", stereo, 16000, subtype="FLOAT")
    assert np.allclose(audio.load_audio(manifests.to_cut(cut_of(tmp_path / "a.wav"))), 0.125)


def test_a_piece_of_a_long_recording_is_read_from_where_it_begins(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.arange(16000) / 16000, 16000, subtype="FLOAT")
    cut = manifests.to_cut(cut_of(tmp_path / "a.wav") | {"start": 0.5, "duration": 0.25})
    assert np.allclose(audio.load_audio(cut), np.arange(8000, 12000) / 16000)


def test_audio_that_has_gone_since_preparation_is_named_with_its_utterance(tmp_path):
    path = mls.noise(tmp_path / "a.wav")
    cut = cut_of(path)
    with wave.open(str(path), "wb") as shorter:
        shorter.setparams((1, 2, 16000, 0, "NONE", ""))
        shorter.writeframes(bytes(2 * 7000))
    with pytest.raises(UserError, match="cut 'utt': .*a.wav holds 7000 samples, not 8000"):
        audio.load_audio(manifests.to_cut(copy.deepcopy(cut)))
    cut["recording"]["sources"][0]["source"] = str(tmp_path / "gone.wav")
    with pytest.raises(UserError, match="cut 'utt': .*gone.wav cannot be read"):
        audio.load_audio(manifests.to_cut(cut))


def test_the_real_recordings_go_all_the_way_to_features(shared_speech, tmp_path):
    found = tsv_manifests(shared_speech / "manifest.tsv", tmp_path / "out")
    with open(shared_speech / "manifest.tsv", encoding="utf-8", newline="") as stream:
        rows = {row["id"]: row for row in csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)}
    cuts = {cut["id"]: (name, cut) for name, cuts in found.items() for cut in cuts}
    assert cuts.keys() == rows.keys()
    for utt_id, row in rows.items():
        name, plain = cuts[utt_id]
        cut = manifests.to_cut(plain)
        assert name == f"clips_{row['lang']}_test"
        assert cut.supervisions[0].text == row["transcript"].strip()
        assert cut.duration == pytest.approx(float(row["duration_s"]), abs=0.04)
        assert cut.num_channels == int(row["channels"])
        assert cut.sampling_rate == int(row["sampling_rate"]) or row["codec"] == "opus"  # decoded at any rate
        samples = audio.load_audio(cut)
        assert np.isfinite(samples).all() and np.abs(samples).max() > 1e-3
        if cut.duration <= validation.MAX_DURATION_S:
            assert features.log_mel(samples, 80).shape == (features.num_frames(cut.duration), 80)

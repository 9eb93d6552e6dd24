"""Kaldi data directories: hand-written ones are read, and what is written is read by kaldiio and back again."""

import argparse
import pickle
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import kaldiio
import mls
import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from zipperasr.cli import to_kaldi
from zipperasr.data import audio, defects, features, kaldi, manifests
from zipperasr.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "local"))

import prepare_kaldi

NOISE = np.random.default_rng(0).integers(-(2**15), 2**15, 8000).astype(np.int16)  # half a second


def data_dir(path: Path, **tables: str) -> Path:
    """Write tables by name: `wav.scp` is called wav."""
    path.mkdir(parents=True, exist_ok=True)
    for name, content in tables.items():
        (path / {"wav": "wav.scp"}.get(name, name)).write_bytes(content.encode("utf-8", "surrogateescape"))
    return path


def prepared(tmp_path: Path, *langs: str, out: str = "manifests", **more) -> dict[str, dict[str, dict]]:
    """Prepare the data directories below `tmp_path / "data"` and read what comes of it: {set: {id: cut}}."""
    given = {"splits": None, "root": Path(), "run_commands": False, "nj": 1, "corpus_dir": tmp_path / "data"} | more
    prepare_kaldi.run(argparse.Namespace(corpus="kal", langs=langs, out=tmp_path / out, **given))
    found = sorted((tmp_path / out).glob(f"*{manifests.SUFFIX}"))
    return {path.name.removesuffix(manifests.SUFFIX): cuts_of(path) for path in found}


def cuts_of(path: Path) -> dict[str, dict]:
    return {cut["id"]: cut for cut in manifests.read(path)}


def facts(cut: dict) -> tuple:
    """What a data directory says about an utterance."""
    (supervision,), (source,) = cut["supervisions"], cut["recording"]["sources"]
    who = (supervision["text"], supervision["language"], supervision.get("speaker"))
    return (cut["id"], *who, source["source"], cut["start"], cut["duration"])


def tally(tmp_path: Path, name: str, out: str = "manifests") -> defects.Tally:
    return defects.read_tally(manifests.tally_path(tmp_path / out / f"{name}{manifests.SUFFIX}"))


def details(tmp_path: Path, name: str) -> str:
    return (tmp_path / "manifests" / f"{name}_defects.tsv").read_text()


def samples_of(cut: dict) -> np.ndarray:
    """The file of a cut as 16-bit integers."""
    samples, _ = soundfile.read(cut["recording"]["sources"][0]["source"], dtype="int16")
    return samples


def test_an_espnet_directory_becomes_one_set_a_language(tmp_path):
    wav = {
        key: mls.noise(tmp_path / f"{key}.{suffix}") for key, suffix in (("a-1", "flac"), ("a-2", "wav"), ("b", "ogg"))
    }
    data_dir(
        tmp_path / "data" / "train_nodev",
        wav="".join(f"{key} {path}\n" for key, path in wav.items()),
        text="a-1 Guten  Tag\na-2 le chat\nb bonjour\n",
        utt2spk="a-1 a\na-2 a\nb b\n",
        spk2utt="a a-1 a-2\nb b\n",
        utt2lang="a-1 deu\na-2 French\nb fr\n",
        utt2num_samples="a-1 8000\na-2 8000\nb 8000\n",
        feats_type="raw\n",
        audio_format="flac\n",
    )
    found = prepared(tmp_path, "de", "fr")
    assert {name: [facts(cut) for cut in cuts.values()] for name, cuts in found.items()} == {
        "kal_de_train_nodev": [("a-1", "Guten Tag", "de", "a", str(wav["a-1"]), 0.0, 0.5)],
        "kal_fr_train_nodev": [
            ("a-2", "le chat", "fr", "a", str(wav["a-2"]), 0.0, 0.5),
            ("b", "bonjour", "fr", None, str(wav["b"]), 0.0, 0.5),  # its own speaker: not known
        ],
    }


def test_segments_cut_recordings_into_utterances(tmp_path):
    wav = mls.noise(tmp_path / "call.wav", seconds=2.0)
    data_dir(
        tmp_path / "data" / "test",
        wav=f"call {wav}\n",
        segments="u2 call 1.25 -1\nu1 call 0.1 0.85\n",
        text="u1 first words\nu2 last words\n",
        utt2spk="u1 spk\nu2 spk\n",
    )
    (cuts,) = prepared(tmp_path, "en").values()
    assert [facts(cut)[-2:] for cut in cuts.values()] == [(1.25, 0.75), (0.1, 0.75)]
    whole, _ = soundfile.read(wav, dtype="float32")
    heard = audio.load_audio(manifests.to_cut(cuts["u1"]))
    np.testing.assert_array_equal(heard, whole[1600:13600])


def test_line_ends_blank_lines_tabs_and_spaces_in_paths_do_no_harm(tmp_path):
    wav = mls.noise(tmp_path / "my recordings" / "one two.wav")
    data_dir(
        tmp_path / "data" / "train",
        wav=f"\ufeffu\t{wav}\r\n\r\n",
        text=" \nu  hello\tthere \r\n",
        utt2lang="u\tENG\r\n",
    )
    (cuts,) = prepared(tmp_path, "en").values()
    assert facts(cuts["u"])[1:5] == ("hello there", "en", None, str(wav))
    assert tally(tmp_path, "kal_en_train").kinds == {"byte order mark": 1, "carriage returns": 3}


def test_every_utterance_that_cannot_be_one_is_counted_with_its_reason(tmp_path):
    wav = mls.noise(tmp_path / "r.wav")
    segments = {
        "good": "r 0 -1",
        "toolong": "r 0 9",
        "notext": "r 0 -1",
        "norecording": "other 0 -1",
        "nonumber": "r 0 end",
        "channel": "r 0 -1 1",
        "notanumber": "r nan -1",
        "noaudio": "gone 0 -1",
        "nothing": "empty 0 -1",
    }
    data_dir(
        tmp_path / "data" / "train",
        wav=f"r {wav}\ngone {tmp_path}/gone.wav\nempty\n",
        segments="".join(f"{key} {rest}\n" for key, rest in segments.items()),
        text="nosegment x\n" + "".join(f"{key} some text\n" for key in segments if key != "notext"),
    )
    (cuts,) = prepared(tmp_path, "en").values()
    assert list(cuts) == ["good"]
    found = tally(tmp_path, "kal_en_train")
    assert (found.num_in, found.num_kept) == (10, 1)
    assert found.kinds == {"segment outside its audio": 1, "bad row": 7, "missing audio": 1}
    lines = {line.split("\t")[1]: line for line in details(tmp_path, "kal_en_train").splitlines()}
    assert "no line in" in lines["notext"] and lines["notext"].endswith("/text")
    assert lines["nosegment"].endswith("/segments")
    assert "recording 'other' has no line in wav.scp" in lines["norecording"]
    assert "'r 0 -1 1' is not recording, start, end" in lines["channel"]
    assert "gone.wav: no such file" in lines["noaudio"]


def test_text_without_audio_and_audio_without_text_are_counted_where_there_are_no_segments(tmp_path):
    wav = mls.noise(tmp_path / "a.wav")
    data_dir(tmp_path / "data" / "train", wav=f"a {wav}\nb {wav}\n", text="a hello\nc hello\n")
    (cuts,) = prepared(tmp_path, "en").values()
    assert list(cuts) == ["a"] and tally(tmp_path, "kal_en_train").kinds == {"bad row": 2}
    assert "train/wav.scp" in details(tmp_path, "kal_en_train") and "train/text" in details(tmp_path, "kal_en_train")


@pytest.mark.parametrize(
    ("langs", "tables", "message"),
    [
        (["en"], {"wav": "a a.wav\n"}, "train/text: no such file"),
        (["en"], {"wav": "a a.wav\n", "text": "a x\nb y\na z\n"}, "train/text:3: 'a' stands there twice"),
        (["en", "de"], {"wav": "a a.wav\n", "text": "a x\n"}, "no utt2lang there"),
        (
            ["en"],
            {"wav": "a a.wav\n", "text": "a x\n", "utt2lang": "a swahili\n"},
            "'a': unknown language 'swahili'; known",
        ),
        (["en"], {"wav": "a a.wav\nb b.wav\n", "text": "a x\n", "utt2lang": "a en\n"}, "'b' has no line"),
        (["en", "de"], {"wav": "a a.wav\n", "text": "a x\n", "utt2lang": "a fr\n"}, "--langs de en: no utterance"),
        (["xx"], {"wav": "a a.wav\n", "text": "a x\n"}, "unknown language 'xx'"),
        (["en"], {}, r"no data directory; looked for .*/data/<split>/wav.scp"),
    ],
)
def test_a_directory_that_cannot_be_read_is_named(tmp_path, langs, tables, message):
    data_dir(tmp_path / "data" / "train", **tables)
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, *langs)
    assert not list(tmp_path.glob("manifests/*.gz"))


def test_utterances_of_languages_that_are_not_asked_for_are_said(tmp_path, capsys):
    wav = mls.noise(tmp_path / "a.wav")
    data_dir(tmp_path / "data" / "train", wav=f"a {wav}\nb {wav}\n", text="a x\nb y\n", utt2lang="a en\nb fra\n")
    assert list(prepared(tmp_path, "en")) == ["kal_en_train"]
    assert "1 utterances of fr are not taken" in capsys.readouterr().out


def test_splits_can_be_named_one_by_one(tmp_path):
    wav = mls.noise(tmp_path / "a.wav")
    data_dir(tmp_path / "dump" / "train_dev", wav=f"a {wav}\n", text="a x\n")
    split = prepare_kaldi.split_of(f"dev={tmp_path / 'dump' / 'train_dev'}")
    assert list(prepared(tmp_path, "en", splits=[split], corpus_dir=None)) == ["kal_en_dev"]
    with pytest.raises(UserError, match="dev dev: each takes a name of its own"):
        prepared(tmp_path, "en", splits=[split, split], corpus_dir=None)
    with pytest.raises(argparse.ArgumentTypeError, match="'dev' is not <split>=<data directory>"):
        prepare_kaldi.split_of("dev")


def test_relative_paths_start_where_one_stands_or_in_the_root(tmp_path, monkeypatch):
    mls.noise(tmp_path / "recipe" / "wav" / "a.wav")
    data_dir(tmp_path / "data" / "train", wav="a wav/a.wav\n", text="a x\n")
    (cuts,) = prepared(tmp_path, "en", root=tmp_path / "recipe").values()
    assert facts(cuts["a"])[4] == str(tmp_path / "recipe" / "wav" / "a.wav")
    with pytest.raises(UserError, match="--root .*none: no such folder"):
        prepared(tmp_path, "en", root=tmp_path / "none")
    monkeypatch.chdir(tmp_path / "recipe")
    (cuts,) = prepared(tmp_path, "en", out="again").values()
    assert facts(cuts["a"])[4] == "wav/a.wav"


def test_nothing_runs_without_the_switch(tmp_path):
    proof = tmp_path / "it ran"
    touch = f"touch {shlex.quote(str(proof))}"
    data_dir(tmp_path / "data" / "train", wav=f"b b.wav\na {touch} | \n", text="a x\n")
    with pytest.raises(UserError, match=r"'a' is what a command prints: touch .*\|; .*--run-commands"):
        prepared(tmp_path, "en")
    for entry in (f"| {touch}", f"{touch}; x.ark:1", f"$({touch})", f"x.ark:1[{touch} |]", "-"):
        data_dir(tmp_path / "data" / "train", wav=f"a {entry}\n", text="a x\n")
        with pytest.raises(UserError, match="holds no utterance"):  # it is a file that is not there
            prepared(tmp_path, "en", run_commands=True)
    for entry in (f"{touch} |", f"{touch} | ", f"| {touch}", "-"):
        scp = data_dir(tmp_path / "feats", **{"feats.scp": f"a {entry}\n"}) / "feats.scp"
        with pytest.raises(UserError, match="commands are not run here"):
            list(kaldi.read_features(scp))
    assert not proof.exists()
    data_dir(tmp_path / "data" / "train", wav=f"a {touch} |\n", text="a x\n")
    with pytest.raises(UserError, match="holds no utterance"):
        prepared(tmp_path, "en", run_commands=True)
    assert proof.exists()  # so that the test can fail


def test_what_a_command_prints_is_kept_and_the_command_runs_once(tmp_path, monkeypatch):
    wav = tmp_path / "my wav" / "a.wav"
    wav.parent.mkdir()
    soundfile.write(wav, NOISE, 16000)
    command = "echo ran >> log; cat 'my wav/a.wav' | cat"
    data_dir(tmp_path / "data" / "train", wav=f"rec/a {command} |\n", segments="u rec/a 0.1 0.3\n", text="u hello\n")
    (cuts,) = prepared(tmp_path, "en", run_commands=True, root=tmp_path).values()
    stored = tmp_path / "audio" / "kal" / "train" / "rec%2Fa.flac"
    assert facts(cuts["u"])[4:] == (str(stored), 0.1, 0.2)
    np.testing.assert_array_equal(samples_of(cuts["u"]), NOISE)
    prepared(tmp_path, "en", root=tmp_path)  # complete: needs no switch
    prepared(tmp_path, "en", out="again", run_commands=True, root=tmp_path)
    assert (tmp_path / "log").read_text() == "ran\n"
    data_dir(tmp_path / "data" / "train", wav="rec/a cat 'my wav/a.wav' | tail -c +1 |\n")  # another command: run again
    prepared(tmp_path, "en", run_commands=True, root=tmp_path)
    assert [path.name for path in stored.parent.iterdir()] == [stored.name]


@pytest.mark.parametrize(("length", "name"), [(0xFFFFFFFF, "ffmpeg's"), (0x7FFFFFFF, "sox's")])
def test_a_length_that_a_pipe_could_not_know_is_no_defect(tmp_path, length, name):
    soundfile.write(tmp_path / "a.wav", NOISE, 16000)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[4:8] = data[40:44] = struct.pack("<I", length)
    (tmp_path / "a.wav").write_bytes(data)
    data_dir(tmp_path / "data" / "test", wav=f"a cat {tmp_path}/a.wav |\n", text="a x\n")
    (cuts,) = prepared(tmp_path, "en", run_commands=True).values()
    np.testing.assert_array_equal(samples_of(cuts["a"]), NOISE)


def test_a_command_that_fails_costs_its_utterances_and_says_why(tmp_path):
    soundfile.write(tmp_path / "a.wav", NOISE, 16000)
    commands = {
        "good": f"cat {tmp_path}/a.wav",
        "missing": f"cat {tmp_path}/none.wav",
        "failing": f"(cat {tmp_path}/a.wav; exit 3) | cat",
        "cut": f"head -c 5000 {tmp_path}/a.wav",
        "silent": "true",
        "text": "echo hello",
    }
    wav = "".join(f"{key} {command} |\n" for key, command in commands.items())
    data_dir(tmp_path / "data" / "train", wav=wav, text="".join(f"{key} words\n" for key in commands))
    (cuts,) = prepared(tmp_path, "en", run_commands=True).values()
    assert list(cuts) == ["good"]
    assert tally(tmp_path, "kal_en_train").kinds == {"unreadable audio": 4, "truncated audio": 1}
    log = details(tmp_path, "kal_en_train")
    assert "the command of 'missing': exit status 1: cat:" in log and "'failing': exit status 3" in log
    assert "the command of 'cut': ends before the audio that its header declares" in log
    assert [path.name for path in (tmp_path / "audio" / "kal" / "train").iterdir()] == ["good.flac"]


def arks(folder: Path, recordings: dict[str, np.ndarray], **how) -> str:
    """Write recordings at 16 kHz with kaldiio; return wav.scp."""
    data = {key: (16000, samples) for key, samples in recordings.items()}
    kaldiio.save_ark(str(folder / "wav.ark"), data, scp=str(folder / "wav.scp"), **how)
    return (folder / "wav.scp").read_text()


@pytest.mark.parametrize("how", [{}, {"write_function": "soundfile", "write_kwargs": {"format": "flac"}}], ids=str)
def test_arks_of_audio_that_kaldiio_wrote_are_kept_as_flac(tmp_path, how):
    stereo = np.stack([NOISE, NOISE[::-1]], axis=1)
    scp = arks(tmp_path, {"a": NOISE, "b": stereo}, **how)
    data_dir(tmp_path / "data" / "train", wav=scp, text="a x\nb y\n")
    (cuts,) = prepared(tmp_path, "en").values()
    np.testing.assert_array_equal(samples_of(cuts["a"]), NOISE)
    np.testing.assert_array_equal(samples_of(cuts["b"]), stereo)


def test_an_ark_that_was_written_again_is_read_again(tmp_path):
    for samples, out in ((NOISE, "one"), (NOISE[::-1].copy(), "two")):
        data_dir(tmp_path / "data" / "train", wav=arks(tmp_path, {"a": samples}), text="a x\n")
        (cuts,) = prepared(tmp_path, "en", out=out).values()
        np.testing.assert_array_equal(samples_of(cuts["a"]), samples)


def test_an_ark_entry_that_is_not_whole_audio_is_named(tmp_path):
    scp = arks(tmp_path, {"a": NOISE, "b": NOISE})
    ark = tmp_path / "wav.ark"
    ark.write_bytes(ark.read_bytes()[:-4000])
    (tmp_path / "pickle.ark").write_bytes(b"x PKL" + pickle.dumps(NOISE))
    others = f"c {ark}:7\nd {tmp_path}/none.ark:2\ne {tmp_path}/pickle.ark:2\nf {ark}:99999999\n"
    data_dir(tmp_path / "data" / "train", wav=scp + others, text="".join(f"{key} x\n" for key in "abcdef"))
    (cuts,) = prepared(tmp_path, "en").values()
    assert list(cuts) == ["a"]
    found = tally(tmp_path, "kal_en_train").kinds
    assert found == {"truncated audio": 1, "unreadable audio": 3, "missing audio": 1}
    assert f"{scp.split()[-1]}: ends before the audio" in details(tmp_path, "kal_en_train")


def test_many_recordings_are_stored_by_several_processes(tmp_path):
    recordings = {f"r{number:03}": np.roll(NOISE, number)[:1000] for number in range(70)}
    text = "".join(f"{key} words\n" for key in recordings)
    data_dir(tmp_path / "data" / "train", wav=arks(tmp_path, recordings), text=text)
    (cuts,) = prepared(tmp_path, "en", nj=2).values()
    assert list(cuts) == list(recordings)
    for key, samples in recordings.items():
        np.testing.assert_array_equal(samples_of(cuts[key]), samples)


def test_the_script_says_what_it_does_not_run_in_one_line(tmp_path):
    data_dir(tmp_path / "data" / "train", wav="a sox a.sph -t wav - |\n", text="a x\n")
    given = ["--corpus", "kal", "--langs", "en", "--corpus-dir", tmp_path / "data", "--out", tmp_path / "manifests"]
    done = subprocess.run([sys.executable, prepare_kaldi.__file__, *given], capture_output=True, text=True)
    assert done.returncode == 1 and "a sox a.sph" not in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("prepare_kaldi.py: error: recording 'a' is what a command prints: sox a.sph -t wav - |")


def test_bytes_that_are_not_utf8_cost_their_utterance_only(tmp_path):
    wav = mls.noise(tmp_path / "a.wav")
    data_dir(tmp_path / "data" / "train", wav=f"a {wav}\nb {wav}\n", text="a caf\udce9\nb café\n")
    (cuts,) = prepared(tmp_path, "fr").values()
    assert list(cuts) == ["b"] and tally(tmp_path, "kal_fr_train").kinds == {"not UTF-8": 1}


def test_more_channels_than_flac_holds_are_named(tmp_path):
    mls.noise(tmp_path / "array.wav", channels=9)
    soundfile.write(tmp_path / "a.wav", NOISE, 16000)
    wav = "".join(f"{key} cat {tmp_path}/{key}.wav |\n" for key in ("a", "array"))
    data_dir(tmp_path / "data" / "train", wav=wav, text="a x\narray y\n")
    (cuts,) = prepared(tmp_path, "en", run_commands=True).values()
    assert list(cuts) == ["a"] and "'array': 9 channels" in details(tmp_path, "kal_en_train")


def test_samples_of_24_bits_and_floats_are_kept_to_24_bits(tmp_path):
    deep = (NOISE.astype(np.int32) << 16) + (7 << 8)
    soundfile.write(tmp_path / "deep.wav", deep, 16000, subtype="PCM_24")
    soundfile.write(tmp_path / "float.wav", NOISE / 2**15, 16000, subtype="FLOAT")
    wav = "".join(f"{key} cat {tmp_path}/{key}.wav |\n" for key in ("deep", "float"))
    data_dir(tmp_path / "data" / "train", wav=wav, text="deep x\nfloat y\n")
    (cuts,) = prepared(tmp_path, "en", run_commands=True).values()
    stored = [soundfile.read(facts(cut)[4], dtype="int32")[0] for cut in cuts.values()]
    np.testing.assert_array_equal(stored[0], deep)
    np.testing.assert_allclose(stored[1] / 2**31, NOISE / 2**15, atol=2**-22)


def export(tmp_path: Path, *names: str, out: str = "exported", **options) -> Path:
    more = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    arguments = ["--data-dir", str(tmp_path), "--sets", *names, "--out", str(tmp_path / out), *more]
    parser = argparse.ArgumentParser()
    to_kaldi.add_arguments(parser)
    to_kaldi.run(parser.parse_args(arguments))
    return tmp_path / out


def lines_of(directory: Path) -> dict[str, list[str]]:
    return {path.name: path.read_text().splitlines() for path in sorted(directory.iterdir()) if path.suffix != ".ark"}


def long_recordings(tmp_path: Path) -> dict[str, dict[str, dict]]:
    """Two sets of pieces of recordings of the same name; the speakers `s1` and `s10` have prefixes in common."""
    for number, folder in enumerate(("x", "y")):
        mls.noise(tmp_path / folder / "tape one.flac", seconds=3.0, seed=number)
    wav = "".join(f"{key} {tmp_path}/{key}/tape one.flac\n" for key in "yx")
    segments = "s1_b x 0.5 1.125\ns1_a y 0 2.3\ns10_a x 1.000125 -1\nz x 0.1 0.9\nq y 0.3 0.7\n"
    text = "s1_b zwei\ns1_a eins\ns10_a drei  Wörter\nz vier\nq cinq\n"
    speakers = "s1_b s1\ns1_a s1\ns10_a s10\nz other\nq q\n"
    utt2lang = "s1_b de\ns1_a de\ns10_a de\nz de\nq fr\n"
    data_dir(
        tmp_path / "data" / "train", wav=wav, segments=segments, text=text, utt2spk=speakers, utt2lang=utt2lang
    )  # fmt: skip
    return prepared(tmp_path, "de", "fr")


def test_pieces_of_recordings_are_written_with_segments_in_kaldis_order(tmp_path):
    long_recordings(tmp_path)
    found = lines_of(export(tmp_path, "kal_de_train") / "kal_de_train")
    (second,) = (line.split()[0] for line in found["wav.scp"] if line.split()[0] != "tape_one")
    assert second.startswith("tape_one-")
    assert found == {
        "reco2dur": ["tape_one 3.0", f"{second} 3.0"],
        "segments": [
            "s10_a tape_one 1.000125 3.0",
            f"s1_a {second} 0.0 2.3",
            "s1_b tape_one 0.5 1.125",
            "z tape_one 0.1 0.9",
        ],
        "spk2utt": ["s10 s10_a", "s1_a s1_a", "s1_b s1_b", "z z"],  # ids of s10 begin with s1 too
        "text": ["s10_a drei Wörter", "s1_a eins", "s1_b zwei", "z vier"],
        "utt2dur": ["s10_a 1.999875", "s1_a 2.3", "s1_b 0.625", "z 0.8"],
        "utt2lang": ["s10_a de", "s1_a de", "s1_b de", "z de"],
        "utt2spk": ["s10_a s10", "s1_a s1_a", "s1_b s1_b", "z z"],
        "wav.scp": [f"tape_one {tmp_path}/x/tape one.flac", f"{second} {tmp_path}/y/tape one.flac"],
    }


def test_files_of_one_utterance_each_need_no_segments(tmp_path, capsys):
    for key in ("ö", "b", "a"):
        mls.noise(tmp_path / f"{key}.ogg", seconds=0.5, channels=2)
    wav = "".join(f"{key} {tmp_path}/{key}.ogg\n" for key in "öba")
    data_dir(tmp_path / "data" / "dev", wav=wav, text="a A\nb B\nö O\n")
    prepared(tmp_path, "ja")
    found = lines_of(export(tmp_path, "kal_ja_dev") / "kal_ja_dev")
    assert sorted(found) == ["reco2dur", "spk2utt", "text", "utt2dur", "utt2lang", "utt2spk", "wav.scp"]
    assert found["wav.scp"] == [f"{key} {tmp_path}/{key}.ogg" for key in "abö"]
    assert found["utt2spk"] == found["spk2utt"] == ["a a", "b b", "ö ö"]
    assert found["utt2dur"] == found["reco2dur"] == ["a 0.5", "b 0.5", "ö 0.5"]
    assert "kal_ja_dev: 3 utterances, 3 recordings, 3 speakers" in capsys.readouterr().out


def test_what_is_written_and_read_again_gives_the_same_cuts(tmp_path):
    long_recordings(tmp_path)
    files = mls.make(tmp_path / "corpus" / "mls", {"de/dev": 12})
    wav = {path.stem: path for path in files.glob("de/dev/audio/*/*/*.flac")}
    tables = {"wav": "".join(f"{key} {path}\n" for key, path in wav.items())}
    tables |= {"text": "".join(f"{key} Wort, {key}!\n" for key in wav), "utt2spk": "".join(f"{key} 1\n" for key in wav)}
    data_dir(tmp_path / "data" / "dev", **tables, utt2lang="".join(f"{key} german\n" for key in wav))
    before = prepared(tmp_path, "de", "fr")
    exported = export(tmp_path, *before)
    splits = [("again" + name, exported / name) for name in before]
    after = prepared(tmp_path, "de", "fr", out="again", corpus_dir=None, splits=splits)
    cuts = {key: facts(cut) for found in after.values() for key, cut in found.items()}
    expected = {key: facts(cut) for found in before.values() for key, cut in found.items()}
    unsaid = {key for key in expected if expected[key][3] != cuts[key][3]}
    assert unsaid == {"s1_a", "s1_b", "z"} and all(cuts[key][3] is None for key in unsaid)  # Kaldi's order forbids them
    assert {key: row[:3] + row[4:] for key, row in cuts.items()} == {
        key: row[:3] + row[4:] for key, row in expected.items()
    }
    assert {cuts[key][3] for key in wav} == {"1"}


def test_files_of_an_earlier_export_do_not_stay(tmp_path):
    long_recordings(tmp_path)
    out = export(tmp_path, "kal_de_train", features=80) / "kal_de_train"
    assert {"segments", "feats.ark", "feats.scp", "utt2num_frames"} <= {path.name for path in out.iterdir()}
    cut = manifests.path_of(tmp_path, "kal_de_train")
    (whole,) = (c for c in manifests.read(manifests.path_of(tmp_path, "kal_fr_train")))
    manifests.write(cut, [whole | {"start": 0.0, "duration": whole["recording"]["duration"]}])
    export(tmp_path, "kal_de_train")
    assert sorted(path.name for path in out.iterdir()) == sorted({*kaldi.WRITTEN} - {"segments"})


IDS = st.text("ab-_1", min_size=1, max_size=4)


@given(st.dictionaries(IDS, st.none() | IDS))
def test_sorting_utterances_sorts_their_speakers(known):
    found = kaldi._speakers(known)
    ids = sorted(known)
    assert [found[key] for key in ids] == sorted(found.values())
    for speaker in set(known.values()) - {None}:
        mine = [key for key in ids if known[key] == speaker]
        stays = mine == [key for key in ids if key.startswith(speaker)]
        assert [found[key] for key in mine] == ([speaker] * len(mine) if stays else mine)


def test_every_file_is_in_the_order_that_kaldi_checks(tmp_path):
    ids = ["a-1", "a_1", "B", "é1", "ー", "\U00020000", "\uff5e", "a1", "a"]
    wav = mls.noise(tmp_path / "a.wav")
    lines = {"wav": f"r {wav}\n", "segments": "".join(f"{key} r 0.0 0.4\n" for key in ids)}
    data_dir(tmp_path / "data" / "test", **lines, text="".join(f"{key} x\n" for key in ids))
    prepared(tmp_path, "en")
    exported = export(tmp_path, "kal_en_test") / "kal_en_test"
    for path in exported.iterdir():
        for keys in (("-k1,1", "-u"), *[("-k2",)] * (path.name == "utt2spk")):  # utils/validate_data_dir.sh
            assert subprocess.run(["sort", "-c", *keys, path], env={"LC_ALL": "C"}).returncode == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cut: cut.update(id="q 1"), "'q 1' has white space in its id"),
        (lambda cut: cut["supervisions"][0].update(text="a\nb"), "a line break in its text"),
        (lambda cut: cut["recording"]["sources"][0].update(type="url"), "audio that is not a plain file"),
        (lambda cut: cut["recording"]["sources"][0].update(source="touch x |"), "not a plain file: .*touch x |"),
        (lambda cut: cut["recording"]["sources"][0].update(source="x.ark:12"), "not a plain file: .*x.ark:12"),
        (lambda cut: cut["recording"]["sources"][0].update(channels=[0, 1]), r"channels \[0\] of \[0, 1\]"),
    ],
)
def test_what_kaldi_cannot_say_is_named(tmp_path, change, message):
    (cut,) = long_recordings(tmp_path)["kal_fr_train"].values()
    change(cut)
    manifests.write(manifests.path_of(tmp_path, "kal_fr_train"), [cut])
    with pytest.raises(UserError, match=message):
        export(tmp_path, "kal_fr_train")
    assert not (tmp_path / "exported").exists()


def test_an_id_that_stands_twice_is_named(tmp_path):
    (cut,) = long_recordings(tmp_path)["kal_fr_train"].values()
    manifests.write(manifests.path_of(tmp_path, "kal_fr_train"), [cut, cut])
    with pytest.raises(UserError, match="'q' is there twice"):
        export(tmp_path, "kal_fr_train")


@pytest.mark.parametrize("num_mel_bins", [80, 128])
def test_features_are_those_that_training_hears_for_every_reader(tmp_path, num_mel_bins):
    cuts = long_recordings(tmp_path)["kal_de_train"]
    exported = export(tmp_path, "kal_de_train", features=num_mel_bins) / "kal_de_train"
    own, theirs = dict(kaldi.read_features(exported / "feats.scp")), kaldiio.load_scp(str(exported / "feats.scp"))
    by_ark = dict(kaldiio.load_ark(str(exported / "feats.ark")))
    assert list(own) == list(theirs) == sorted(cuts) and set(by_ark) == set(cuts)
    frames = dict(line.split() for line in (exported / "utt2num_frames").read_text().splitlines())
    for key, cut in cuts.items():
        expected = features.log_mel(audio.load_audio(manifests.to_cut(cut)), num_mel_bins).numpy()
        assert frames[key] == str(len(expected)) and expected.shape[1] == num_mel_bins
        for found in (own[key], theirs[key], by_ark[key]):
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, expected)


def test_features_that_kaldi_made_are_read_but_no_pickle_and_no_broken_ark(tmp_path):
    matrix = np.random.default_rng(0).normal(size=(7, 83)).astype(np.float32)
    ark, scp = tmp_path / "my feats.ark", tmp_path / "feats.scp"
    kaldiio.save_ark(str(ark), {"a": matrix, "b": matrix * 2}, scp=str(scp))
    at = scp.read_text().split()[-1].rpartition(":")[2]
    scp.write_text(f"a {ark}:2\npart {ark}:2[1:3]\nb {ark}:{at}\n")
    found = dict(kaldi.read_features(scp))
    np.testing.assert_array_equal(found["a"], matrix)
    np.testing.assert_array_equal(found["part"], matrix[1:4])  # Kaldi's ranges hold their last
    np.testing.assert_array_equal(found["b"], matrix * 2)
    kaldiio.save_ark(str(tmp_path / "p.ark"), {"a": matrix}, scp=str(scp), write_function="pickle")
    with pytest.raises(UserError, match="'a': .*p.ark:2 holds a pickle"):
        list(kaldi.read_features(scp))
    ark.write_bytes(ark.read_bytes()[:-100])
    scp.write_text(f"b {ark}:{at}\n")
    with pytest.raises(UserError, match=r"'b': .*ark:\d+ cannot be read"):
        list(kaldi.read_features(scp))
    scp.write_text(f"c {tmp_path}/none.ark:3\n")
    with pytest.raises(UserError, match=r"'c': .*none.ark:3 cannot be read"):
        list(kaldi.read_features(scp))

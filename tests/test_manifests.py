"""The validator: every defect of an utterance is found, named and counted, and the fatal ones stop the recipe."""

import argparse
import copy
import json
import os
import re

import mls
import pytest
import yaml

from zipperasr.cli.main import main
from zipperasr.data import manifests, prepare, validation
from zipperasr.errors import UserError


def make(data_dir, name: str, num_utts: int = 3) -> list[dict]:
    """Prepare a set of noise and return its cuts."""
    _, lang, _ = name.split("_", 2)
    paths = [mls.noise(data_dir / "audio" / f"{name}-{i}.flac") for i in range(num_utts)]
    clips = [prepare.Clip(path.stem, path, lang, f"text {i}") for i, path in enumerate(paths)]
    prepare_clips(data_dir, name, clips)
    return list(manifests.read(manifests.path_of(data_dir, name)))


def prepare_clips(data_dir, name: str, rows: list[prepare.Row], *, sources=(), nj: int = 1) -> None:
    args = argparse.Namespace(corpus=name.split("_")[0], out=data_dir / "manifests", nj=nj)
    prepare.write_manifests(args, [name], lambda: ((name, row) for row in rows), sources=sources)


def rewrite(data_dir, name: str, cuts: list[dict]) -> None:
    """Bring a manifest from elsewhere, which has no tally."""
    path = manifests.path_of(data_dir, name)
    manifests.write(path, cuts)
    manifests.tally_path(path).unlink(missing_ok=True)


def paths(data_dir, *names: str) -> dict:
    return {name: manifests.path_of(data_dir, name) for name in names}


def found(data_dir, *names: str, nj: int = 1) -> list[tuple[str, str]]:
    """The defects of some sets as (utterance id, kind)."""
    _, defects = validation.validate(paths(data_dir, *names), nj=nj)
    return [(one.defect.utt_id, one.defect.kind) for one in defects]


def squeezed(table: str) -> str:
    """A table whose columns are not padded."""
    return re.sub(" +", " ", table)


def put(cut: dict, key: str, value: object) -> None:
    """Set `a.b.c` of a cut; numbers are indices."""
    *path, last = key.split(".")
    for step in path:
        cut = cut[int(step) if step.isdigit() else step]
    cut[last] = value


@pytest.fixture
def conf(tmp_path):
    """A configuration whose corpora are `a` in de, with lists of its two sets."""
    parts = {"train": {"a_de_train": None}, "test": {"a_de_test": None}}
    settings = {
        "corpora": {"a": {"prepare": "tsv", "langs": ["de"]}},
        "data": {"lists": {"settings": {"here": parts}}, "features": {"storage": "precomputed"}},
        "model": {"encoder": {"pretrained": "whisper"}, "llm": {"pretrained": "lm"}},
        "training": {"stage1": {"setting": "here"}, "stage2": {"setting": "here"}},
    }
    (tmp_path / "conf.yaml").write_text(yaml.safe_dump(settings))
    make(tmp_path, "a_de_train")
    make(tmp_path, "a_de_test")
    return tmp_path / "conf.yaml"


def zipperasr(verb: str, conf, *more: str) -> int:
    return main([verb, "--conf", str(conf), "--data-dir", str(conf.parent), *more])


def test_a_sound_set_has_no_defect(tmp_path):
    make(tmp_path, "a_de_train", num_utts=70)
    make(tmp_path, "a_de_test")
    rewrite(tmp_path, "a_de_train", list(manifests.read(manifests.path_of(tmp_path, "a_de_train"))))
    tallies, defects = validation.validate(paths(tmp_path, "a_de_train", "a_de_test"), nj=2)
    assert defects == []
    assert [(name, tally.num_in, tally.num_kept, tally.duration_s) for name, tally in tallies.items()] == [
        ("a_de_test", 3, 3, 1.5),
        ("a_de_train", 70, 70, 35.0),
    ]


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("duration", 30.01, "over 30 s"),
        ("duration", 0.0, "too short"),
        ("supervisions.0.text", "", "empty text"),
        ("supervisions.0.text", " \t\u3000", "empty text"),
        ("supervisions.0.text", None, "empty text"),
        ("supervisions.0.language", "xx", "unknown language"),
        ("supervisions.0.language", None, "unknown language"),
        ("supervisions.0.language", "fr", "wrong language"),
        ("supervisions.0.id", "another", "bad supervision"),
        ("supervisions", [], "bad supervision"),
        ("recording.num_samples", 9000, "wrong duration"),
        ("recording.sources", [], "bad recording"),
        ("recording.sources.0.type", "command", "bad recording"),
        ("recording.sources.0.source", "nowhere.flac", "missing audio"),
        ("recording.sources.0.source", "/", "missing audio"),
        ("recording.sources.0.source", __file__, "unreadable audio"),
    ],
)
def test_a_defect_is_named_with_its_utterance(tmp_path, key, value, kind):
    cuts = make(tmp_path, "a_de_test")
    put(cuts[1], key, value)
    rewrite(tmp_path, "a_de_test", cuts)
    assert found(tmp_path, "a_de_test") == [("a_de_test-1", kind)]


@pytest.mark.parametrize("utt_id", ["", "two words", "a/b", " a", "tab\t"])
def test_an_id_that_the_files_of_later_stages_cannot_hold_is_a_defect(tmp_path, utt_id):
    cuts = make(tmp_path, "a_de_test")
    cuts[1]["id"] = cuts[1]["supervisions"][0]["id"] = utt_id
    rewrite(tmp_path, "a_de_test", cuts)
    assert found(tmp_path, "a_de_test") == [(utt_id, "bad id")]


def test_an_id_used_twice_in_a_set_is_a_defect(tmp_path):
    cuts = make(tmp_path, "a_de_test")
    rewrite(tmp_path, "a_de_test", [*cuts, cuts[0]])
    assert found(tmp_path, "a_de_test") == [("a_de_test-0", "duplicate id")]


def test_a_training_utterance_in_a_test_set_is_a_defect_by_id_and_by_audio(tmp_path):
    train, test = make(tmp_path, "a_de_train"), make(tmp_path, "b_de_test")
    same_id = copy.deepcopy(train[0])
    same_id["id"] = same_id["supervisions"][0]["id"] = test[0]["id"]
    same_audio = copy.deepcopy(train[1])
    same_audio["recording"] = test[1]["recording"]
    rewrite(tmp_path, "a_de_train", [same_id, same_audio, train[2]])
    assert found(tmp_path, "a_de_train", "b_de_test") == [
        ("b_de_test-0", "train/test overlap by id"),
        ("a_de_train-1", "train/test overlap by audio"),
    ]


def test_two_pieces_of_one_recording_do_not_overlap(tmp_path):
    train, test = make(tmp_path, "a_de_train"), make(tmp_path, "a_de_test")
    train[0] |= {"recording": test[0]["recording"], "start": 0.25, "duration": 0.25}
    test[0] |= {"duration": 0.25}
    rewrite(tmp_path, "a_de_train", train)
    rewrite(tmp_path, "a_de_test", test)
    assert found(tmp_path, "a_de_train", "a_de_test") == []


def test_a_manifest_that_is_missing_empty_or_cut_is_named(tmp_path):
    path = manifests.path_of(tmp_path, "a_de_test")
    with pytest.raises(UserError, match="a_de_test_cuts.jsonl.gz: no such manifest; run stage 1"):
        found(tmp_path, "a_de_test")
    manifests.write(path, [])
    with pytest.raises(UserError, match="a_de_test_cuts.jsonl.gz: the manifest holds no utterance"):
        found(tmp_path, "a_de_test")
    make(tmp_path, "a_de_test")
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match="a_de_test_cuts.jsonl.gz: not a whole manifest .* delete it"):
        found(tmp_path, "a_de_test")


def test_fatal_defects_stop_the_recipe_until_they_are_mended(conf, capsys):
    audio = conf.parent / "audio" / "a_de_test-1.flac"
    whole = audio.read_bytes()
    os.truncate(audio, 3000)
    (conf.parent / "manifests" / manifests.marker("a_de_test")).unlink()
    make_again = [
        prepare.Clip(f"a_de_test-{i}", conf.parent / "audio" / f"a_de_test-{i}.flac", "de", "x") for i in "01"
    ]
    prepare_clips(conf.parent, "a_de_test", make_again)
    assert zipperasr("validate", conf) == 1
    assert zipperasr("validate", conf) == 1
    err = capsys.readouterr().err
    assert err.startswith("zipperasr: error: 1 fatal defects: a_de_test-1 (truncated audio, a_de_test); ")
    table = (conf.parent / "manifests/a_de_test_defects.tsv").read_text()
    assert "a_de_test\ta_de_test-1\tfatal\ttruncated audio" in table
    assert "| a_de_test | 2 | 1 | 1 | 1 |" in squeezed((conf.parent / "manifests/REPORT.md").read_text())
    audio.write_bytes(whole)
    prepare_clips(conf.parent, "a_de_test", make_again)  # is done again, though no transcript has changed
    assert zipperasr("validate", conf) == 0


def test_a_cut_without_a_recording_is_a_defect_and_no_crash(conf, capsys):
    cuts = list(manifests.read(manifests.path_of(conf.parent, "a_de_test")))
    del cuts[0]["recording"]
    rewrite(conf.parent, "a_de_test", cuts)
    assert zipperasr("validate", conf) == 1
    assert "a_de_test-0 (bad recording, a_de_test)" in capsys.readouterr().err


def test_warnings_do_not_stop_the_recipe(conf, capsys):
    mls.noise(conf.parent / "audio" / "odd.wav", rate=12345)
    (conf.parent / "manifests" / manifests.marker("a_de_test")).unlink()
    prepare_clips(conf.parent, "a_de_test", [prepare.Clip("odd", conf.parent / "audio" / "odd.wav", "de", "text")])
    assert zipperasr("validate", conf) == 0
    assert "| a_de_test | odd sampling rate | kept | 1 | odd |" in squeezed(capsys.readouterr().out)


def test_validation_is_skipped_only_while_manifests_stay_as_they_are(conf, capsys):
    assert zipperasr("validate", conf) == 0
    assert zipperasr("validate", conf) == 0
    assert "complete, 2 valid manifests" in capsys.readouterr().out
    cuts = list(manifests.read(manifests.path_of(conf.parent, "a_de_test")))
    cuts[0]["supervisions"][0]["language"] = "fr"
    manifests.write(manifests.path_of(conf.parent, "a_de_test"), cuts)
    assert zipperasr("validate", conf) == 1


def test_audio_that_was_harmed_after_preparation_is_found_on_request(conf, capsys):
    os.truncate(conf.parent / "audio" / "a_de_test-0.flac", 3000)
    assert zipperasr("validate", conf) == 0
    assert zipperasr("validate", conf, "--audio") == 1
    assert "a_de_test-0 (truncated audio, a_de_test)" in capsys.readouterr().err


def test_a_manifest_that_lost_lines_since_its_preparation_is_named(conf, capsys):
    path = manifests.path_of(conf.parent, "a_de_test")
    manifests.write(path, list(manifests.read(path))[:2])
    assert zipperasr("validate", conf) == 1
    assert "holds 2 utterances, not 3 as when it was prepared" in capsys.readouterr().err


def test_utterances_with_fatal_defects_are_left_out_on_request(conf, capsys):
    cuts = list(manifests.read(manifests.path_of(conf.parent, "a_de_train")))
    rewrite(conf.parent, "a_de_train", cuts)
    (conf.parent / "audio" / "a_de_train-1.flac").unlink()
    assert zipperasr("validate", conf) == 1
    assert zipperasr("validate", conf, "--drop") == 0
    report = squeezed((conf.parent / "manifests" / "REPORT.md").read_text())
    assert "| a_de_train | 3 | 2 | 1 | 0 |" in report and "| missing audio | dropped | 1 | a_de_train-1 |" in report
    assert [cut["id"] for cut in manifests.read(manifests.path_of(conf.parent, "a_de_train"))] == [
        "a_de_train-0",
        "a_de_train-2",
    ]
    assert zipperasr("validate", conf) == 0
    rewrite(conf.parent, "a_de_test", list(manifests.read(manifests.path_of(conf.parent, "a_de_test"))))
    for path in (conf.parent / "audio").glob("a_de_test*"):
        path.unlink()
    capsys.readouterr()
    assert zipperasr("validate", conf, "--drop") == 1
    assert "a_de_test_cuts.jsonl.gz: every utterance is defective" in capsys.readouterr().err


def test_a_loss_that_preparation_found_in_a_test_set_is_accepted_on_request_for_good(conf, capsys):
    (conf.parent / "manifests" / manifests.marker("a_de_test")).unlink()
    lost = prepare.Clip("lost", conf.parent / "lost.flac", "de", "text")
    there = prepare.Clip("there", conf.parent / "audio" / "a_de_test-0.flac", "de", "text")
    prepare_clips(conf.parent, "a_de_test", [lost, there])
    assert zipperasr("validate", conf) == 1
    assert zipperasr("validate", conf, "--drop") == 0
    assert "| a_de_test | 2 | 1 | 1 | 1 (accepted) |" in squeezed(capsys.readouterr().out)
    make(conf.parent, "a_de_dev")  # another set: everything is validated anew
    assert zipperasr("validate", conf) == 0


def test_a_language_without_a_manifest_is_named(conf, capsys):
    assert zipperasr("validate", conf, 'corpora={"b": {"prepare": "tsv", "langs": ["fr"]}}', "data.lists={}") == 1
    capsys.readouterr()
    for path in (conf.parent / "manifests").glob("*.gz"):
        path.unlink()
    assert zipperasr("validate", conf) == 1
    assert capsys.readouterr().err.endswith("manifests/a_de_*_cuts.jsonl.gz: there is none; run stage 1\n")


def test_the_verbs_of_the_data_stages_do_their_work_once(conf, capsys):
    for verb in ("validate", "lists", "features"):
        assert zipperasr(verb, conf) == 0
    out = capsys.readouterr().out
    assert "lists/here/train/a_de_train.txt: 3 utterances, 0.000 h" in out
    assert "features: complete; stored 6 utterances of 2 sets now" in out
    for verb in ("lists", "features"):
        assert zipperasr(verb, conf) == 0
    out = capsys.readouterr().out
    assert "lists/here: complete" in out and "stored 0 utterances" in out
    assert zipperasr("features", conf, "data.features.storage=on_the_fly") == 0
    assert "nothing to do" in capsys.readouterr().out


def test_manifests_are_lines_of_json_in_gzip_without_a_time(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    manifests.write(path, [{"id": "ü"}])
    assert path.read_bytes()[4:8] == bytes(4)
    assert [json.dumps(cut, ensure_ascii=False) for cut in manifests.read(path)] == ['{"id": "ü"}']

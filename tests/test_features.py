"""Features: Whisper's own, at true length, the same from what is stored as from the corpus's own files."""

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import mls
import numpy as np
import pytest
import tiny
import tiny_recipe
import torch
import whisper
from lhotse import CutSet, Recording
from lhotse.utils import compute_num_samples

from zipperasr import files
from zipperasr.cli.main import main
from zipperasr.data import audio, features, lists, manifests, shar, store
from zipperasr.data.features import FeatureSettings
from zipperasr.data.packing import PackingSettings, load_examples, tokenize
from zipperasr.data.tokenizer import load_tokenizer
from zipperasr.data.utterances import load_utterances
from zipperasr.errors import UserError

STORED, AUDIO, ON_THE_FLY = (FeatureSettings(storage=kind) for kind in ("precomputed", "audio", "on_the_fly"))
both = pytest.mark.parametrize("settings", [STORED, AUDIO], ids=lambda settings: settings.storage)
HOUR = 1 / 3600  # a second


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """Shards of 10; three sets of noise, of half a second an utterance, in lists: 100 s of a training set that lasts
    36 s, a test set, and a training list whose ids lie in two sets."""
    monkeypatch.setattr(shar, "SHARD_SIZE", 10)
    for name, num_utts in (("a_de_train", 72), ("a_de_test", 3), ("a_de_other", 15)):
        write_set(tmp_path, name, [(f"{name}-{i}", 0.5) for i in range(num_utts)])
    draw(tmp_path, train={"a_de_train": 100 * HOUR}, test={"a_de_test": None})
    mixed = [f"a_de_other-{i}" for i in range(12)] + ["a_de_train-3"]
    write_list(tmp_path / "lists/mixed/train/a_de_train.txt", mixed)
    return tmp_path


def write_set(data_dir: Path, name: str, utts: list[tuple[str, float]]) -> None:
    clips = [mls.noise(data_dir / f"{utt_id}.wav", seconds=s, seed=i) for i, (utt_id, s) in enumerate(utts)]
    manifests.write(manifests.path_of(data_dir, name), [cut_of(path, path.stem) for path in clips])


def cut_of(path: Path, utt_id: str, *, start_s: float = 0.0, duration_s: float | None = None) -> dict:
    cut = Recording.from_file(path, recording_id=utt_id).to_cut().to_dict()
    duration_s = duration_s or cut["duration"]
    said = {"recording_id": utt_id, "text": f"Text {utt_id}!", "language": "de", "custom": {"train_text": "text"}}
    span = {"id": utt_id, "start": 0.0, "duration": duration_s, "channel": cut["channel"]}
    return cut | {"id": utt_id, "start": start_s, "duration": duration_s, "supervisions": [span | said]}


def write_list(path: Path, ids: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{utt_id}\n" for utt_id in ids))
    (path.parents[1] / "SHA256SUMS").touch()


def draw(data_dir: Path, **parts) -> None:
    lists.write(data_dir, lists.ListsSettings.model_validate({"settings": {"here": parts}}))


def load(data_dir: Path, settings: FeatureSettings, part: str = "test", sets=None, setting: str = "here"):
    return load_utterances(data_dir, setting, part, sets, settings)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Whisper's features


@pytest.mark.parametrize("num_mel_bins", [80, 128])
@pytest.mark.parametrize("num_samples", [201, 400, 16000, 48123, 480000])
def test_features_are_whispers_at_true_length_bit_for_bit(num_mel_bins, num_samples):
    samples = np.random.default_rng(0).normal(0, 0.1, num_samples).astype(np.float32)
    got, expected = features.log_mel(samples, num_mel_bins), whisper.log_mel_spectrogram(samples, num_mel_bins).T
    assert got.shape == (num_samples // 160, num_mel_bins) and got.is_contiguous()
    assert torch.allclose(got, expected, atol=1e-4)
    assert torch.equal(got, expected)


def test_padding_to_30_s_as_whisper_does_changes_only_the_last_frames():
    samples = np.random.default_rng(0).normal(0, 0.1, 32000).astype(np.float32)
    padded = whisper.log_mel_spectrogram(whisper.pad_or_trim(samples)).T
    assert torch.allclose(features.log_mel(samples, 80)[:-2], padded[:198], atol=1e-4)


def test_durations_are_rounded_to_samples_as_lhotse_rounds():
    draws = np.random.default_rng(0)
    for rate in (8000, 16000, 22050, 32000, 44100, 48000):
        for duration_s in draws.integers(0, 40 * rate, 2000) / rate:
            assert audio.num_samples(float(duration_s)) == compute_num_samples(float(duration_s), 16000)
    for duration_s in draws.uniform(0, 40, 2000).round(6):
        assert audio.num_samples(float(duration_s)) == compute_num_samples(float(duration_s), 16000)


# What is stored


@both
def test_what_is_stored_equals_what_is_computed_on_the_fly(data_dir, settings):
    assert store.precompute(data_dir, settings, nj=2) == {"a_de_other": 12, "a_de_test": 3, "a_de_train": 72}
    for setting, part in (("here", "train"), ("here", "test"), ("mixed", "train")):
        stored, computed = (load(data_dir, one, part, setting=setting) for one in (settings, ON_THE_FLY))
        assert stored == computed and isinstance(stored[0].source, shar.Member)
        for one, other in zip(stored, computed, strict=True):
            assert one.num_frames == len(one.features())
            assert torch.equal(one.features(), other.features())


@both
def test_lhotse_reads_the_shards(data_dir, settings):
    store.precompute(data_dir, settings)
    computed = {u.id: u for u in load(data_dir, ON_THE_FLY, "train")}
    cuts = list(CutSet.from_shar(in_dir=store.root_of(data_dir, settings) / "a_de_train"))
    assert [cut.id for cut in cuts] == [f"a_de_train-{i}" for i in range(72)]
    for cut in cuts:
        (said,) = cut.supervisions
        assert (said.id, said.text, said.language, said.train_text) == (cut.id, f"Text {cut.id}!", "de", "text")
        assert cut.duration == said.duration == 0.5
        if settings is STORED:
            assert np.array_equal(cut.load_features(), computed[cut.id].features())
        else:
            assert np.array_equal(cut.load_audio()[0], computed[cut.id].source.load(cut.id))


@both
def test_pieces_of_long_stereo_recordings_are_stored_by_themselves(data_dir, settings):
    """48 kHz, two channels: resampled and averaged, so that 16 bits round by half a step."""
    path = mls.noise(data_dir / "long.flac", seconds=3, rate=48000, channels=2)
    cuts = [cut_of(path, f"piece-{i}", start_s=0.9 * i, duration_s=0.5 + 0.1 * i) for i in range(3)]
    manifests.write(manifests.path_of(data_dir, "b_de_test"), cuts)
    draw(data_dir, test={"b_de_test": None})
    assert store.precompute(data_dir, settings)["b_de_test"] == 3
    for stored, computed in zip(load(data_dir, settings), load(data_dir, ON_THE_FLY), strict=True):
        assert (stored.num_frames, stored.duration_s) == (computed.num_frames, pytest.approx(computed.duration_s))
        if settings is STORED:
            assert torch.equal(stored.features(), computed.features())
        else:
            samples = audio.decode_flac(stored.source.read("piece"))
            np.testing.assert_allclose(samples, computed.source.load("piece"), rtol=0, atol=0.5001 / 2**15)


def test_flac_keeps_every_sample_of_16_bits():
    samples = (np.arange(-(2**15), 2**15) / 2**15).astype(np.float32)
    assert np.array_equal(audio.decode_flac(audio.encode_flac(samples)), samples)


@both
def test_shards_are_full_and_few_and_each_utterance_is_stored_once(data_dir, settings):
    """However many settings and lists name it: a_de_train-3 is in two lists of two settings, others in a third."""
    write_list(data_dir / "lists/again/dev/a_de_other.txt", [f"a_de_other-{i}" for i in range(15)])
    store.precompute(data_dir, settings)
    root, field = store.root_of(data_dir, settings), store.FIELDS[settings.storage]
    assert sorted(os.listdir(root / "a_de_other")) == [
        "cuts.000000.jsonl.gz", "cuts.000001.jsonl.gz", f"{field}.000000.tar", f"{field}.000001.tar"
    ]  # fmt: skip
    read = [
        (path.name, cut["id"]) for path in sorted(root.iterdir()) if path.is_dir() for _, cut in shar.read(path, field)
    ]
    assert len(read) == 72 + 15 + 3 and set(read) == {(utt_id.rpartition("-")[0], utt_id) for _, utt_id in read}
    assert len(list((root / "a_de_train").glob("*.tar"))) == 8


def test_only_what_has_changed_is_stored_again(data_dir):
    store.precompute(data_dir, STORED)
    assert store.precompute(data_dir, STORED) == {}
    draw(data_dir, train={"a_de_train": 5 * HOUR}, test={"a_de_test": None})
    before = [u.features() for u in load(data_dir, STORED)]
    num_listed = len({*lists.read(data_dir / "lists/here/train/a_de_train.txt"), "a_de_train-3"})
    assert store.precompute(data_dir, STORED) == {"a_de_train": num_listed}
    for setting in ("here", "mixed"):  # and what was open before is not read any more
        for stored, computed in zip(*(load(data_dir, s, "train", None, setting) for s in (STORED, ON_THE_FLY))):
            assert torch.equal(stored.features(), computed.features())
    assert all(map(torch.equal, before, [u.features() for u in load(data_dir, STORED)]))
    wide = store.precompute(data_dir, STORED.model_copy(update={"num_mel_bins": 128}))
    assert set(wide) == {"a_de_other", "a_de_test", "a_de_train"}
    assert not [path.name for path in (data_dir / "features").glob(".*") if path.is_dir()]


@both
def test_after_an_interruption_only_unfinished_shards_are_stored(data_dir, settings, monkeypatch):
    done = []

    def interrupted(samples, *more):
        done.append(samples)
        if len(done) == 12 + 3 + 25:  # in the third shard of the last set
            raise KeyboardInterrupt
        return original(samples, *more)

    module, name = (store, "log_mel") if settings is STORED else (audio, "encode_flac")
    original = getattr(module, name)
    monkeypatch.setattr(module, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.precompute(data_dir, settings)
    with pytest.raises(UserError, match="run stages 1 to 3 again"):
        load(data_dir, settings, "train")
    assert store.precompute(data_dir, settings) == {"a_de_train": 72 - 20}
    assert all(torch.isfinite(utterance.features()).all() for utterance in load(data_dir, settings, "train"))


@pytest.mark.parametrize("kill", ["before", "after"])
def test_an_interruption_between_the_last_steps_costs_nothing(data_dir, monkeypatch, kill):
    def interrupted(*args, **kwargs):
        if kill == "after":
            original(*args, **kwargs)
        raise KeyboardInterrupt

    original = files.mark_done
    monkeypatch.setattr(files, "mark_done", interrupted)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            store.precompute(data_dir, STORED)
    monkeypatch.undo()
    monkeypatch.setattr(shar, "SHARD_SIZE", 10)
    assert store.precompute(data_dir, STORED) == {}
    assert len([utterance.features() for utterance in load(data_dir, STORED, "train")]) == 200


def test_a_killed_process_is_an_error_and_costs_its_shards_alone(data_dir, monkeypatch):
    monkeypatch.setattr(store, "_features", killed_at_utterance_45)
    with pytest.raises(UserError, match="a process was killed; lower --nj .* run the same command again"):
        store.precompute(data_dir, STORED, nj=2)
    (working,) = (data_dir / "features").glob(".a_de_train.*")
    whole = {path: path.stat().st_mtime_ns for path in working.glob("cuts.*")}
    num_stored = sum(len(list(manifests.read(path))) for path in whole)
    assert 30 <= num_stored <= 62 and working / "cuts.000004.jsonl.gz" not in whole
    monkeypatch.undo()
    monkeypatch.setattr(shar, "SHARD_SIZE", 10)
    assert store.precompute(data_dir, STORED, nj=2)["a_de_train"] == 72 - num_stored
    now = {working / path.name: path.stat().st_mtime_ns for path in (data_dir / "features/a_de_train").glob("cuts.*")}
    assert now.items() >= whole.items() and not list((data_dir / "features/a_de_train").glob(".*"))


def killed_at_utterance_45(cut, *more, original=store._features):
    if cut["id"] == "a_de_train-45":
        os._exit(9)
    return original(cut, *more)


ORPHANS = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from zipperasr.data import workers
pool = ProcessPoolExecutor(2, multiprocessing.get_context("fork"), workers.begin)
print(*{pool.submit(os.getpid).result() for _ in range(9)}, flush=True)
pool.submit(time.sleep, 60)
time.sleep(0.2)
os.kill(os.getpid(), 9)
"""


def test_workers_end_when_the_process_that_waits_for_them_is_killed():
    killed = subprocess.run([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True)
    pids = killed.stdout.split()
    assert killed.returncode == -9 and pids
    until = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


@pytest.mark.parametrize("num_jobs", [2, 3, 20])
def test_jobs_share_the_shards_and_give_the_same_bytes_as_one(data_dir, num_jobs):
    store.precompute(data_dir, STORED)
    alone = content(data_dir / "features")
    (data_dir / "features").rename(data_dir / "alone")
    shares = [sum(store.precompute(data_dir, STORED, job=(i, num_jobs)).values()) for i in range(1, num_jobs + 1)]
    assert sum(shares) == 72 + 3 + 12 and max(shares) <= -(-11 // num_jobs) * 10
    with pytest.raises(UserError, match="listed utterances are not in"):
        load(data_dir, STORED)
    assert store.precompute(data_dir, STORED) == {}
    assert content(data_dir / "features") == alone


def test_a_shard_that_has_gone_is_named_and_stored_again_alone(data_dir):
    store.precompute(data_dir, AUDIO)
    path = data_dir / "audio/a_de_train/recording.000004.tar"
    os.truncate(path, 3000)
    shar.forget()
    with pytest.raises(UserError, match=rf"cut '.*': {path} cannot be read; delete that file and run stage 3 again"):
        [utterance.features() for utterance in load(data_dir, AUDIO, "train")]
    path.unlink()
    assert store.precompute(data_dir, AUDIO) == {"a_de_train": 10}
    assert len([utterance.features() for utterance in load(data_dir, AUDIO, "train")]) == 200


@both
def test_a_member_that_is_damaged_is_named_with_its_archive(data_dir, settings):
    store.precompute(data_dir, settings)
    one, *others = load(data_dir, settings)
    with open(one.source.path, "r+b") as archive:
        archive.seek(one.source.offset)
        archive.write(bytes(one.source.size))
    with pytest.raises(UserError, match=f"cut '{one.id}': {one.source.path} cannot be read; delete that file"):
        one.features()
    assert all(len(other.features()) == 50 for other in others)


def test_few_archives_stay_open(data_dir, monkeypatch):
    store.precompute(data_dir, STORED)
    utterances = load(data_dir, STORED, "train")
    before = len(os.listdir("/proc/self/fd"))
    for utterance in utterances:
        utterance.features()
    assert len({u.source.path for u in utterances}) == 8 == len(os.listdir("/proc/self/fd")) - before <= shar.MAX_OPEN


def test_the_command_line_stores_by_shares(tmp_path, capsys):
    recipe = tiny_recipe.make(tmp_path, num_utts=2)
    more = ["--conf", str(recipe.conf), "--data-dir", str(recipe.data)]
    assert main(["features", *more]) == 0 and "nothing to do" in capsys.readouterr().out
    for share, state in (
        ("1/2", "share 1 of 2 is done"),
        ("2/2", "share 2 of 2 is done"),
        (None, "complete; stored 0"),
    ):
        share = ["--share", share] if share else []
        assert main(["features", *more, *share, "data.features.storage=audio"]) == 0
        assert state in capsys.readouterr().out


# Utterances


def test_utterances_keep_the_order_and_the_repeats_of_their_list(data_dir):
    listed = lists.read(data_dir / "lists/here/train/a_de_train.txt")
    utterances = load(data_dir, ON_THE_FLY, "train")
    assert [utterance.id.partition("#")[0] for utterance in utterances] == listed
    assert len({utterance.id for utterance in utterances}) == len(listed) == 200
    assert [utterances[i].id for i in (0, 72, 144)] == [listed[0], f"{listed[0]}#2", f"{listed[0]}#3"]
    first = utterances[72]
    assert (first.lang, first.text, first.reference) == ("de", "text", f"Text {listed[0]}!")
    assert (first.duration_s, first.num_frames) == (0.5, 50)


def test_a_manifest_from_elsewhere_without_training_text_is_trained_on_as_it_is(data_dir):
    path = manifests.path_of(data_dir, "a_de_test")
    cuts = list(manifests.read(path))
    for cut in cuts:
        del cut["supervisions"][0]["custom"]
    manifests.write(path, cuts)
    assert {(u.text, u.reference) for u in load(data_dir, ON_THE_FLY)} == {(f"Text {c['id']}!",) * 2 for c in cuts}


def test_examples_are_the_utterances_of_the_lists_tokenised(data_dir, tmp_path):
    tiny.make_tokenizer(tmp_path / "tokenizer.model")
    tokenizer, packing = load_tokenizer(tmp_path), PackingSettings()
    got = load_examples(data_dir, "here", "train", tokenizer=tokenizer, features=ON_THE_FLY, packing=packing)
    expected = tokenize(load(data_dir, ON_THE_FLY, "train"), tokenizer, packing)
    assert [(x.utterance, x.prompt, x.target.tolist()) for x in got] == [
        (x.utterance, x.prompt, x.target.tolist()) for x in expected
    ]


def test_numbers_of_frames_need_no_audio(data_dir):
    for path in data_dir.glob("*.wav"):
        path.unlink()
    assert [utterance.num_frames for utterance in load(data_dir, ON_THE_FLY)] == [50, 50, 50]


STRANGER = "1 listed utterances are not in .*a_de_test_cuts.jsonl.gz.*: stranger; run stages 1 and 2 again"


def list_a_stranger(data_dir):
    (data_dir / "lists/here/test/a_de_test.txt").write_text("stranger\na_de_test-1\n")


@pytest.mark.parametrize(
    ("harm", "ask", "message"),
    [
        (
            lambda d: None,
            lambda d: load(d, STORED),
            "features: nothing is stored there; run stage 3, or set data.features.storage=on_the_fly",
        ),
        (
            lambda d: None,
            lambda d: load(d, ON_THE_FLY, sets=["a_fr_test"]),
            "'a_fr_test' has no list .* there are a_de_test",
        ),
        (lambda d: None, lambda d: load(d, STORED, setting="x"), "x: no such lists; there are here, mixed"),
        (list_a_stranger, lambda d: load(d, ON_THE_FLY), STRANGER),
        (list_a_stranger, lambda d: store.precompute(d, STORED), STRANGER),
        (
            lambda d: store.precompute(d, FeatureSettings(num_mel_bins=128)),
            lambda d: load(d, STORED),
            "not of data.features.num_mel_bins=80; run stage 3 again",
        ),
        (
            lambda d: (store.precompute(d, STORED), (d / "features/a_de_test/cuts.000000.jsonl.gz").write_bytes(b"")),
            lambda d: load(d, STORED),
            "cuts.000000.jsonl.gz: cannot be read; delete that file and run stage 3 again",
        ),
        (
            lambda d: (d / "a_de_train-7.wav").unlink(),
            lambda d: store.precompute(d, STORED, nj=2),
            "cut 'a_de_train-7': .*a_de_train-7.wav cannot be read; run stage 1 again",
        ),
    ],
)
def test_what_is_missing_is_named(data_dir, harm, ask, message):
    harm(data_dir)
    with pytest.raises(UserError, match=message):
        ask(data_dir)


# Copies at other speeds


PERTURBED = {"speed_perturb": [0.9, 1.1]}


@pytest.mark.parametrize("storage", ["precomputed", "audio", "on_the_fly"])
def test_copies_at_other_speeds_follow_each_training_list(data_dir, storage):
    settings = FeatureSettings(storage=storage, **PERTURBED)
    if storage != "on_the_fly":
        stored = store.precompute(data_dir, settings, nj=2)
        assert stored.get("sp0.9/a_de_train") == (72 if storage == "precomputed" else None)
        assert "sp0.9/a_de_test" not in stored
    base, utterances = (load(data_dir, s, "train") for s in (ON_THE_FLY, settings))
    assert utterances[:200] == base and len(utterances) == 600
    computed = load(data_dir, FeatureSettings(storage="on_the_fly", **PERTURBED), "train")
    for at, speed, num_samples in ((200, "0.9", 8889), (400, "1.1", 7273)):  # 8000 / speed, rounded
        for i in (0, 71, 72):
            copy, plain = utterances[at + i], base[i]
            assert (copy.id, copy.text, copy.reference) == (f"sp{speed}-{plain.id}", plain.text, plain.reference)
            assert (copy.duration_s, copy.num_frames) == (num_samples / 16000, num_samples // 160)
            assert copy.features().shape == (copy.num_frames, 80)
            assert torch.equal(copy.features(), computed[at + i].features())
    assert load(data_dir, settings) == load(data_dir, ON_THE_FLY)


def test_copies_over_30_s_are_left_out_and_counted(data_dir, caplog):
    write_set(data_dir, "c_de_train", [("c-short", 1.0), ("c-long", 29.0)])
    draw(data_dir, train={"c_de_train": None})
    settings = FeatureSettings(**PERTURBED)
    assert store.precompute(data_dir, settings)["sp0.9/c_de_train"] == 1
    with caplog.at_level(logging.WARNING):
        utterances = load(data_dir, settings, "train")
    assert {u.id for u in utterances} == {"c-short", "c-long", "sp0.9-c-short", "sp1.1-c-short", "sp1.1-c-long"}
    assert caplog.messages == ["c_de_train: 1 of 2 utterances have no copy at speed 0.9: over 30 s"]


def test_copies_that_are_stored_leave_the_others_as_they_are(data_dir):
    store.precompute(data_dir, STORED)
    assert set(store.precompute(data_dir, FeatureSettings(**PERTURBED))) == {
        f"sp{speed}/a_de_{split}" for speed in (0.9, 1.1) for split in ("other", "train")
    }
    cuts = CutSet.from_shar(in_dir=data_dir / "features/sp1.1/a_de_train")
    assert {cut.load_features().shape for cut in cuts} == {(45, 80)}

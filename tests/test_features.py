"""Features: Whisper's own, at true length, the same whether stored or computed on the fly."""

import os

import mls
import numpy as np
import pytest
import torch
import whisper
from lhotse import CutSet

from zipperasr.data import features, lists, manifests, prepare
from zipperasr.data.features import FeatureSettings
from zipperasr.data.utterances import load_utterances
from zipperasr.errors import UserError

STORED, ON_THE_FLY = FeatureSettings(storage="precomputed"), FeatureSettings(storage="on_the_fly")


@pytest.fixture
def data_dir(tmp_path):
    """Two sets of noise in lists: 100 s of a training set that lasts 36 s, and a test set."""
    for name, num_utts in (("a_de_train", 72), ("a_de_test", 3)):
        clips = (
            prepare.Clip(f"{name}-{i}", mls.noise(tmp_path / f"{name}-{i}.wav", seed=i), "de", f"text {i}")
            for i in range(num_utts)
        )
        prepare.write_manifest(clips, name, out=tmp_path / "manifests", nj=1, key="")
    draw(tmp_path, train={"a_de_train": 100 / 3600}, test={"a_de_test": None})
    return tmp_path


def draw(data_dir, **parts) -> None:
    lists.write(data_dir, lists.ListsSettings.model_validate({"settings": {"here": parts}}))


def load(data_dir, settings: FeatureSettings, part: str = "test", sets=None):
    return load_utterances(data_dir, "here", part, sets, settings)


@pytest.mark.parametrize("num_mel_bins", [80, 128])
@pytest.mark.parametrize("num_samples", [201, 16000, 48123])
def test_features_are_whispers_at_true_length(num_mel_bins, num_samples):
    samples = np.random.default_rng(0).normal(0, 0.1, num_samples).astype(np.float32)
    got = features.log_mel(samples, num_mel_bins)
    assert got.shape == (num_samples // 160, num_mel_bins)
    assert torch.allclose(got, whisper.log_mel_spectrogram(samples, num_mel_bins).T, atol=1e-4)


def test_padding_to_30_s_as_whisper_does_changes_only_the_last_frames():
    samples = np.random.default_rng(0).normal(0, 0.1, 32000).astype(np.float32)
    padded = whisper.log_mel_spectrogram(whisper.pad_or_trim(samples)).T
    assert torch.allclose(features.log_mel(samples, 80)[:-2], padded[:198], atol=1e-4)


def test_stored_features_equal_those_computed_on_the_fly(data_dir):
    assert features.precompute(data_dir, STORED, nj=2) == {"a_de_test": 3, "a_de_train": 72}
    for part in ("train", "test"):
        for stored, computed in zip(load(data_dir, STORED, part), load(data_dir, ON_THE_FLY, part), strict=True):
            assert stored.cut.features is not None and computed.cut.features is None
            assert stored.num_frames == computed.num_frames == len(stored.features())
            assert torch.equal(stored.features(), computed.features())


def test_lhotse_reads_the_stored_features(data_dir):
    features.precompute(data_dir, STORED)
    cuts = CutSet.from_file(data_dir / "features" / "a_de_test" / "a_de_test_cuts.jsonl.gz")
    assert [cut.load_features().shape for cut in cuts] == [(50, 80)] * 3


def test_only_what_has_changed_is_computed_again(data_dir):
    features.precompute(data_dir, STORED)
    assert features.precompute(data_dir, STORED) == {}
    draw(data_dir, train={"a_de_train": 5 / 3600}, test={"a_de_test": None})
    assert features.precompute(data_dir, STORED) == {"a_de_train": 10}
    assert len(list((data_dir / "features" / "a_de_train").rglob("*.npy"))) == 10
    assert set(features.precompute(data_dir, STORED.model_copy(update={"num_mel_bins": 128}))) == {
        "a_de_train",
        "a_de_test",
    }


def test_an_interrupted_set_is_computed_again(data_dir, monkeypatch):
    computed = []

    def interrupted(samples, num_mel_bins):
        computed.append(samples)
        if len(computed) == 10:
            raise KeyboardInterrupt
        return original(samples, num_mel_bins)

    original = features.log_mel
    monkeypatch.setattr(features, "log_mel", interrupted)
    with pytest.raises(KeyboardInterrupt):
        features.precompute(data_dir, STORED)
    assert features.precompute(data_dir, STORED) == {"a_de_train": 72}  # the test set had been completed
    assert all(torch.isfinite(utterance.features()).all() for utterance in load(data_dir, STORED, "train"))


def test_utterances_keep_the_order_and_the_repeats_of_their_list(data_dir):
    listed = lists.read(data_dir / "lists/here/train/a_de_train.txt")
    utterances = load(data_dir, ON_THE_FLY, "train")
    assert [utterance.id.partition("#")[0] for utterance in utterances] == listed
    assert len({utterance.id for utterance in utterances}) == len(listed) == 200
    assert [utterances[i].id for i in (0, 72, 144)] == [listed[0], f"{listed[0]}#2", f"{listed[0]}#3"]
    assert (utterances[72].lang, utterances[72].text) == ("de", f"text {listed[0].rsplit('-')[-1]}")
    assert (utterances[0].duration_s, utterances[0].num_frames) == (0.5, 50)


@pytest.mark.parametrize(
    ("harm", "ask", "message"),
    [
        (lambda d: None, lambda d: load(d, STORED), "a_de_test_cuts.jsonl.gz: no such features; run stage 3, or set"),
        (
            lambda d: None,
            lambda d: load(d, ON_THE_FLY, sets=["a_fr_test"]),
            "'a_fr_test' has no list .* there are a_de_test",
        ),
        (lambda d: None, lambda d: load_utterances(d, "x", "test", None, STORED), "x: no such lists; there are here"),
        (
            lambda d: (d / "lists/here/test/a_de_test.txt").write_text("stranger\na_de_test-1\n"),
            lambda d: load(d, ON_THE_FLY),
            "1 listed utterances are not in .*a_de_test_cuts.jsonl.gz: stranger; run stages 1 and 2 again",
        ),
        (
            lambda d: (d / "lists/here/test/a_de_test.txt").write_text("stranger\na_de_test-1\n"),
            lambda d: features.precompute(d, STORED),
            "1 listed utterances are not in .*a_de_test_cuts.jsonl.gz: stranger",
        ),
        (
            lambda d: features.precompute(d, FeatureSettings(num_mel_bins=128)),
            lambda d: load(d, STORED),
            "not of data.features.num_mel_bins=80; run stage 3 again",
        ),
        (
            lambda d: (features.precompute(d, STORED), os.truncate(next((d / "features").rglob("*test-0.npy")), 200)),
            lambda d: [utterance.features() for utterance in load(d, STORED)],
            "cut 'a_de_test-0': features .* cannot be read; delete .*a_de_test and run stage 3 again",
        ),
        (
            lambda d: (d / "a_de_train-7.wav").unlink(),
            lambda d: features.precompute(d, STORED, nj=2),
            "cut 'a_de_train-7': .*a_de_train-7.wav cannot be read; run stage 1 again",
        ),
    ],
)
def test_what_is_missing_is_named(data_dir, harm, ask, message):
    harm(data_dir)
    with pytest.raises(UserError, match=message):
        ask(data_dir)


def test_numbers_of_frames_need_no_audio(data_dir):
    for path in data_dir.glob("*.wav"):
        path.unlink()
    assert [utterance.num_frames for utterance in load(data_dir, ON_THE_FLY)] == [50, 50, 50]


def test_manifests_of_another_computer_keep_their_bytes(data_dir):
    path = manifests.path_of(data_dir, "a_de_test")
    before = path.read_bytes()
    manifests.write(path, list(manifests.read(path)))
    assert path.read_bytes() == before

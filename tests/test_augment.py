"""Augmentation: off by default, of training alone, and the same again for a run that is resumed."""

import json
import random
from dataclasses import dataclass

import numpy as np
import pytest
import tiny_recipe
import torch

from zipperasr.cli.main import main
from zipperasr.config import parse
from zipperasr.data import augment, loader
from zipperasr.data.augment import SpecAugmentSettings
from zipperasr.data.features import FeatureSettings, log_mel
from zipperasr.data.loader import load_batches
from zipperasr.data.packing import Example, Plan
from zipperasr.errors import UserError

MASKS = SpecAugmentSettings(p=1, time_warp_factor=None)
NUM_FRAMES = (3, 40, 400, 1000, 1600)


@dataclass(frozen=True)
class FakeUtterance:
    id: str
    lang: str
    num_frames: int

    def features(self):
        return torch.randn(self.num_frames, 80, generator=torch.Generator().manual_seed(self.num_frames))


UTTERANCES = [FakeUtterance(f"utt{i}", "de", n) for i, n in enumerate(NUM_FRAMES * 4)]
EXAMPLES = [Example(utterance, [1], np.array([2, 0], np.int32)) for utterance in UTTERANCES]
PLAN = Plan([[i, i + 1] for i in range(0, 20, 2)], rows_per_batch=1, num_slots=2, seed=0)  # five steps an epoch


def batches(spec_augment=MASKS, *, steps=range(10), plan=PLAN, num_workers=0):
    loaded = load_batches(
        EXAMPLES, plan, steps=steps, rank=0, num_ranks=1, num_workers=num_workers, spec_augment=spec_augment
    )
    return [(batch.ids, batch.features) for batch in loaded]


def same(one, other) -> bool:
    return [ids for ids, _ in one] == [ids for ids, _ in other] and all(
        torch.equal(x, y) for (_, a), (_, b) in zip(one, other, strict=True) for x, y in zip(a, b, strict=True)
    )


def test_nothing_is_augmented_by_default():
    settings = FeatureSettings()
    assert (settings.speed_perturb, settings.spec_augment) == ((), None)
    for ids, features in batches(None):
        assert all(torch.equal(x, UTTERANCES[int(i[3:])].features()) for i, x in zip(ids, features, strict=True))


# SpecAugment


@pytest.mark.parametrize("settings", [MASKS, SpecAugmentSettings(p=1), SpecAugmentSettings()])
def test_a_resumed_run_draws_the_same_masks_in_any_worker(settings):
    whole = batches(settings)
    assert same(batches(settings, steps=range(3, 10)), whole[6:])
    assert same(batches(settings, num_workers=2), whole)


def test_masks_differ_between_steps_slots_and_seeds():
    first, second = batches(steps=range(5)), batches(steps=range(5, 10))
    by_id = [{i: x for ids, features in epoch for i, x in zip(ids, features)} for epoch in (first, second)]
    long = [utterance.id for utterance in UTTERANCES if utterance.num_frames > 100]
    assert not any(torch.equal(by_id[0][i], by_id[1][i]) for i in long)
    alike = [utterance for utterance in UTTERANCES if utterance.num_frames == 400]
    masks = [by_id[0][utterance.id] != utterance.features() for utterance in alike]
    assert not any(torch.equal(a, b) for k, a in enumerate(masks) for b in masks[:k])
    other = Plan(PLAN.rows, PLAN.rows_per_batch, PLAN.num_slots, seed=1)
    assert not same(batches(steps=range(1)), batches(steps=range(1), plan=other))


@pytest.mark.parametrize("num_frames", NUM_FRAMES[1:])
def test_masks_are_whole_bands_set_to_the_mean_within_the_true_length(num_frames):
    x = torch.randn(num_frames, 80)
    for seed in range(30):
        (y,) = augment.spec_augment([x], MASKS, seed=str(seed))
        assert y.shape == x.shape
        masked = y != x
        assert (y[masked] == x.mean()).all()
        frames, bins = masked.all(dim=1), masked.all(dim=0)
        assert torch.equal(masked, frames[:, None] | bins)
        assert frames.sum() <= 0.15 * num_frames and bins.sum() <= 2 * 26
        # what masks take away from the deviation from the mean, and nothing else, is missing
        assert (y - x.mean()).square().sum() == pytest.approx((x - x.mean())[~masked].square().sum().item(), rel=1e-4)


def test_masks_of_all_kinds_occur_and_the_input_stays_as_it_is():
    x = torch.randn(1000, 80)
    before, drawn = x.clone(), [augment.spec_augment([x], MASKS, seed=str(seed))[0] != x for seed in range(20)]
    assert torch.equal(x, before)
    assert all(mask.any() for mask in drawn)
    assert any(mask.all(dim=1).any() for mask in drawn) and any(mask.all(dim=0).any() for mask in drawn)


def test_utterances_too_short_for_a_mask_stay_as_they_are():
    for num_frames in range(1, 7):
        x = torch.randn(num_frames, 80)
        assert torch.equal(augment.spec_augment([x], SpecAugmentSettings(p=1), seed="")[0], x)


def test_warping_keeps_the_length_and_moves_the_middle():
    ramp = torch.linspace(0, 1, 1000)[:, None].expand(-1, 80)
    warp = SpecAugmentSettings(p=1, num_feature_masks=0, num_frame_masks=1, frames_mask_size=2)
    warped = [augment.spec_augment([ramp], warp, seed=str(seed))[0] for seed in range(5)]
    assert all(x.shape == ramp.shape for x in warped)
    moved = [(x - ramp).abs().amax(dim=1) for x in warped]
    assert max(m.median() for m in moved) > 0.005
    assert all((m > 0.09).sum() <= 1 for m in moved)  # 80 of 1000 frames at most, but for the frame that is masked


def test_all_other_random_numbers_stay_as_they_are():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    augment.spec_augment([torch.randn(500, 80, generator=torch.Generator())], SpecAugmentSettings(), seed="x")
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_training_is_augmented_at_every_step_and_validation_never(tmp_path, monkeypatch):
    seeds, drawn = [], augment.spec_augment

    def spec_augment(features, settings, *, seed):
        seeds.append((seed, settings))
        return drawn(features, settings, seed=seed)

    monkeypatch.setattr(loader, "spec_augment", spec_augment)
    recipe = tiny_recipe.make(tmp_path, num_utts=3)
    for name, more in (("plain", []), ("augmented", ["data.features.spec_augment={p: 1}"])):
        assert main(recipe.train(1, tmp_path / name, "training.stage1.max_steps=2", *more)) == 0
    assert seeds == [(f"spec augment 0 {step} 0", SpecAugmentSettings(p=1)) for step in range(2)]
    plain, augmented = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("plain", "augmented")
    )
    assert plain[0]["loss"] != augmented[0]["loss"] and "dev_loss" in augmented[-1]


# Speed


@pytest.mark.parametrize("speed", [0.9, 1.1, 1.25])
def test_a_tone_played_faster_is_shorter_and_higher_and_as_loud(speed):
    tone = np.sin(2 * np.pi * 1000 * np.arange(32000) / 16000).astype(np.float32) * 0.3
    played = augment.perturb_speed(tone, speed)
    assert len(played) == round(32000 / speed) == augment.copy_duration_s(2.0, speed) * 16000
    spectrum = np.abs(np.fft.rfft(played * np.hanning(len(played))))
    assert spectrum.argmax() * 16000 / len(played) == pytest.approx(1000 * speed, abs=0.6)
    assert np.square(played[200:-200]).mean() == pytest.approx(np.square(tone).mean(), rel=0.01)


def test_lengths_agree_with_what_is_computed():
    draw = np.random.default_rng(0)
    for num_samples in draw.integers(8000, 9000, 30):
        for speed in (0.9, 1.1):
            played = augment.perturb_speed(np.zeros(num_samples, np.float32), speed)
            assert len(played) == round(16000 * augment.copy_duration_s(num_samples / 16000, speed))
            assert len(log_mel(played + 1e-3, 80)) == len(played) // 160


WRONG = [
    ({"speed_perturb": [0.9, 1]}, "unlike each other and unlike 1"),
    ({"speed_perturb": [0.9, 0.9]}, "unlike each other and unlike 1"),
    ({"speed_perturb": [3]}, "less than or equal to 2"),
    ({"spec_augment": {"num_frame_masks": 0}}, "greater than 0"),
    ({"spec_augment": {"nonsense": 0}}, "unknown key 'spec_augment.nonsense'"),
]


@pytest.mark.parametrize(("tree", "message"), WRONG, ids=str)
def test_wrong_settings_are_named(tree, message):
    with pytest.raises(UserError, match=message):
        parse(tree, FeatureSettings, source="x.yaml")

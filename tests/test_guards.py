"""Claims about what keeps a Speech-LLM from making text up."""

import itertools

import numpy as np
import pytest
import soundfile
import tiny_run
import torch
from hypothesis import given
from hypothesis import strategies as st

from zipperasr import languages
from zipperasr.data.features import log_mel
from zipperasr.decoding import DecodingSettings, guards

SETTINGS = DecodingSettings()


def has_speech(samples):
    return guards.has_speech(log_mel(np.asarray(samples, np.float32), 80), SETTINGS)


@pytest.mark.parametrize("duration_s", [0.7, 2, 9, 29])
def test_silence_noise_and_hum_are_no_speech(duration_s):
    draw, num = np.random.default_rng(0), int(duration_s * 16000)
    white = draw.normal(0, 0.1, num)
    pink = np.fft.irfft(np.fft.rfft(white) / np.sqrt(np.fft.rfftfreq(num) + 1 / num), num)
    hum = 0.1 * np.sin(2 * np.pi * 50 * np.arange(num) / 16000)
    for noise in (np.zeros(num), np.round(draw.normal(0, 0.3, num)) / 32768, white, 0.001 * white, 0.01 * pink, hum):
        assert not has_speech(noise)


def test_noise_that_comes_and_goes_may_be_speech_and_so_may_the_shortest_sounds():
    noise = np.random.default_rng(0).normal(0, 0.1, 32000)
    assert has_speech(noise * np.sin(np.arange(32000) * 4 * np.pi / 16000) ** 2)
    assert has_speech(noise[:1600])
    assert has_speech(1e-3 * np.concatenate([noise, 0.1 * noise]))


@pytest.mark.parametrize("duration_s", [5, 15, 29])
@pytest.mark.parametrize("noise", [0, 1e-4, 3e-3, 0.02])
def test_a_word_in_half_a_minute_of_silence_is_speech(duration_s, noise):
    samples = np.random.default_rng(0).normal(0, noise, duration_s * 16000)
    samples[32000:][:8000] += tiny_run.speech(0.5)
    assert has_speech(samples)


def test_real_speech_is_never_taken_for_silence_even_when_it_is_quiet(shared_speech):
    clips = [soundfile.read(path, dtype="float32") for path in sorted(shared_speech.glob("*/*.*"))]
    clips = [samples if samples.ndim == 1 else samples.mean(1) for samples, rate in clips if rate == 16000]
    assert len(clips) > 10
    assert all(has_speech(gain * samples) for samples in clips for gain in (1, 0.01))


def rounds(ids, start, unit):
    """How often the `unit` tokens at `start` stand there in a row."""
    times = 1
    while ids[start : start + unit] == ids[start + times * unit : start + (times + 1) * unit]:
        times += 1
    return times


@given(st.lists(st.integers(0, 1), max_size=60), st.integers(3, 7))
def test_a_loop_is_found_where_and_only_where_tokens_repeat_themselves(ids, repeats):
    found = guards.loop_start(ids, repeats)
    loops = {
        start + unit
        for unit in range(1, len(ids) // repeats + 1)
        for start in range(len(ids) - unit + 1)
        if rounds(ids, start, unit) >= max(repeats, -(-guards.MIN_LOOP // unit))
    }
    assert found in loops if loops else found is None


@given(st.lists(st.lists(st.integers(0, 2), min_size=11, max_size=11), min_size=1, max_size=4), st.integers(1, 5))
def test_the_second_search_forbids_just_what_would_stand_there_a_third_time(rows, longest):
    allowed = guards.NoLoops(longest)(torch.tensor(rows), torch.zeros(len(rows), 3)) == 0
    for row, (token, is_allowed) in itertools.product(range(len(rows)), enumerate([0, 1, 2])):
        said = [*rows[row], token]
        is_third = any(rounds(said, len(said) - 3 * unit, unit) == 3 for unit in range(1, min(longest, 4) + 1))
        assert allowed[row, is_allowed].item() != is_third


def test_letters_of_other_scripts_are_foreign_and_nothing_else_is():
    cases = {
        "ar": ("مرحبا 12 !", "مرحبا hello all", 8 / 13),
        "ja": ("コーヒー 日本", "カнет", 0.75),
        "zh": ("中文", "中 ab", 2 / 3),
        "vi": ("đường phố", "đ中", 0.5),
    }
    for lang, (own, mixed, share) in cases.items():
        assert languages.foreign_share(own, languages.get(lang)) == 0
        assert languages.foreign_share(mixed, languages.get(lang)) == pytest.approx(share)
    assert languages.foreign_share("12 — !", languages.get("ar")) is None
    tokens = [chr(c) for c in range(0x400)]
    foreign = guards.foreign_tokens(Characters(), len(tokens), languages.get("ru"))
    assert [token for token, is_foreign in zip(tokens, foreign) if is_foreign and ord(token) < 128] == [
        c for c in map(chr, range(128)) if c.isalpha()
    ]


class Characters:
    def decode(self, ids):
        return "".join(map(chr, ids))

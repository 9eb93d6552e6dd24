"""Packing and dealing: every utterance exactly once an epoch, whoever reads it."""

import math
import pickle
import random
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zipperasr import config, files
from zipperasr.bench.data import KINDS, durations_s
from zipperasr.data.loader import load_batches
from zipperasr.data.packing import (
    Example,
    PackingSettings,
    Plan,
    SamplingSettings,
    make_batch,
    num_speech_tokens,
    pack,
    tokenize,
)
from zipperasr.errors import UserError


@dataclass(frozen=True)
class FakeUtterance:
    id: str
    lang: str
    text: str
    num_frames: int

    def features(self):
        return torch.full((self.num_frames, 4), float(self.num_frames))


class FakeTokenizer:
    end_of_text = 0

    def encode(self, text):
        return list(range(1, 1 + len(text) // 5))

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]


def make_examples(count=97, seed=0, langs=("de", "en", "th")):
    draw = random.Random(seed)
    utterances = [
        FakeUtterance(f"utt{i}", draw.choice(langs), "x" * draw.randint(1, 60), draw.randint(20, 700))
        for i in range(count)
    ]
    return tokenize(utterances, FakeTokenizer(), PackingSettings(max_tokens_per_row=256, max_chars_per_s=1000))


def make_plan(examples, *, num_slots=1, rows_per_batch=2, seed=0):
    return Plan(pack(examples, max_tokens=256, seed=seed), rows_per_batch, num_slots, seed)


@pytest.mark.parametrize("num_frames", [1, 2, 3, 8, 9, 100, 101, 799, 3000])
def test_speech_tokens_are_an_eighth_of_the_frames_rounded_up_twice(num_frames):
    assert num_speech_tokens(num_frames) == math.ceil(math.ceil(num_frames / 2) / 4)


def test_rows_hold_one_language_and_fit_and_are_nearly_full():
    examples = make_examples(count=2000)
    rows = pack(examples, max_tokens=256, seed=0)
    assert sorted(index for row in rows for index in row) == list(range(len(examples)))
    assert all(len({examples[i].utterance.lang for i in row}) == 1 for row in rows)
    lengths = [sum(examples[i].num_tokens for i in row) for row in rows]
    assert max(lengths) <= 256
    assert sum(lengths) / (256 * len(rows)) > 0.96


@pytest.mark.parametrize("lookahead", [0, 64])
@pytest.mark.parametrize("like", KINDS)
def test_rows_of_2048_tokens_are_filled_as_promised(like, lookahead):
    """First-fit cannot fill them with utterances of 10 to 20 s, which are as long as what is left over."""
    examples = tokenize(
        [FakeUtterance(str(i), "de", "x" * int(15 * s), int(100 * s)) for i, s in enumerate(durations_s(like, 20_000))],
        FakeTokenizer(), PackingSettings(),
    )  # fmt: skip
    rows = pack(examples, max_tokens=2048, seed=0, lookahead=lookahead)
    assert sorted(index for row in rows for index in row) == list(range(len(examples)))
    lengths = [sum(examples[i].num_tokens for i in row) for row in rows]
    assert max(lengths) <= 2048
    assert (sum(lengths) / (2048 * len(rows)) >= 0.97) is (lookahead > 0 or like != "MLS")


@pytest.mark.parametrize("lookahead", [1, 8, 5000])
def test_rows_packed_ahead_hold_one_language_in_an_order_of_the_seed(lookahead):
    examples = make_examples(count=500)
    rows = pack(examples, max_tokens=256, seed=0, lookahead=lookahead)
    assert sorted(index for row in rows for index in row) == list(range(len(examples)))
    assert all(len({examples[i].utterance.lang for i in row}) == 1 for row in rows)
    assert max(sum(examples[i].num_tokens for i in row) for row in rows) <= 256
    assert rows == pack(make_examples(count=500), max_tokens=256, seed=0, lookahead=lookahead)
    assert rows != pack(examples, max_tokens=256, seed=1, lookahead=lookahead)


def test_first_fit_is_what_it_has_always_been():
    """Recorded runs were packed so: a digest of rows and epochs."""
    plan = make_plan(make_examples(count=2000), num_slots=2)
    assert files.fingerprint([plan.rows, plan.order(0), plan.order(1)]) == "24b04b003d03ae9b"


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_utterance_is_loaded_exactly_once_an_epoch(num_ranks, num_workers, accumulation):
    examples = make_examples()
    plan = make_plan(examples, num_slots=num_ranks * accumulation)
    assert len(plan.rows) % (2 * plan.num_slots), "the last step should be partial"
    for epoch in range(2):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        loaded = [
            list(load_batches(examples, plan, steps=steps, rank=rank, num_ranks=num_ranks, num_workers=num_workers))
            for rank in range(num_ranks)
        ]
        assert {len(batches) for batches in loaded} == {plan.steps_per_epoch * accumulation}
        seen = Counter(utt_id for batches in loaded for batch in batches for utt_id in batch.ids)
        assert seen == {example.utterance.id: 1 for example in examples}


def test_the_last_partial_step_is_dealt_evenly():
    plan = make_plan(make_examples(), num_slots=3)
    sizes = [len(plan.slot_rows(plan.steps_per_epoch - 1, slot)) for slot in range(3)]
    assert max(sizes) - min(sizes) <= 1


def test_one_slot_of_twice_the_rows_trains_on_the_same_rows_at_each_step():
    one, two = (make_plan(make_examples(), num_slots=n, rows_per_batch=4 // n) for n in (1, 2))
    for step in range(one.steps_per_epoch * 2):
        assert sorted(one.slot_rows(step, 0)) == sorted(two.slot_rows(step, 0) + two.slot_rows(step, 1))


def test_epochs_differ_and_a_plan_depends_on_the_seed_alone():
    examples = make_examples()
    plan = make_plan(examples)
    assert plan.order(0) != plan.order(1)
    assert plan == make_plan(make_examples())
    assert plan.rows != make_plan(examples, seed=1).rows


def test_a_resumed_loader_continues_with_the_next_utterance():
    examples = make_examples()
    plan = make_plan(examples, num_slots=2)
    steps = 2 * plan.steps_per_epoch
    whole = [b.ids for b in load_batches(examples, plan, steps=range(steps), rank=1, num_ranks=2, num_workers=0)]
    rest = [b.ids for b in load_batches(examples, plan, steps=range(5, steps), rank=1, num_ranks=2, num_workers=0)]
    assert rest == whole[5:]


def test_languages_of_a_batch_are_contiguous_runs():
    examples = make_examples()
    rows = pack(examples, max_tokens=256, seed=0)
    batch = make_batch([[examples[i] for i in row] for row in rows])
    runs = [lang for i, lang in enumerate(batch.langs) if i == 0 or batch.langs[i - 1] != lang]
    assert runs == sorted(set(batch.langs))
    assert batch.num_tokens == sum(example.num_tokens for example in examples)
    assert batch.audio_s == pytest.approx(sum(example.utterance.num_frames for example in examples) / 100)


@pytest.mark.parametrize("count", [0, 5])
def test_a_batch_survives_the_way_from_a_worker(count):
    examples = make_examples(count=5)[:count]
    batch = make_batch([[example] for example in examples])
    copy = pickle.loads(pickle.dumps(batch))
    assert (copy.ids, copy.langs, copy.targets) == (batch.ids, batch.langs, batch.targets)
    assert all(type(ids) is list for ids in batch.targets)
    assert all(torch.equal(a, b) for a, b in zip(copy.features, batch.features, strict=True))


LEFT_OPEN = """
import sys
import test_packing
from zipperasr.data.loader import load_batches
examples = test_packing.make_examples()
one_rank = {"rank": 0, "num_ranks": 1, "num_workers": 2}
sys.left_open = iter(load_batches(examples, test_packing.make_plan(examples), steps=range(2), **one_rank))
next(sys.left_open)
raise ValueError("what went wrong")
"""


def test_workers_that_an_exception_has_left_open_end_with_their_process():
    command = [sys.executable, "-c", LEFT_OPEN]
    done = subprocess.run(command, cwd=Path(__file__).parent, timeout=60, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.endswith("ValueError: what went wrong\n")


def test_a_text_longer_than_its_audio_can_be_is_left_out_and_named(caplog):
    texts = {"fits": "x" * 70, "too_much": "x" * 71, "another": "x" * 500}
    utterances = [FakeUtterance(utt_id, "de", text, 100) for utt_id, text in texts.items()]
    kept = tokenize(utterances, FakeTokenizer(), PackingSettings(max_tokens_per_row=2048))
    assert [x.utterance.id for x in kept] == ["fits"]
    assert "2 of 3 utterances left out: their texts are longer than their audio can be" in caplog.text
    assert caplog.text.rstrip().endswith("too_much, another")


def test_a_language_without_a_prompt_is_an_error_that_names_it():
    with pytest.raises(UserError, match="xx"):
        tokenize([FakeUtterance("utt", "xx", "ja", 100)], FakeTokenizer(), PackingSettings())


def test_an_utterance_longer_than_a_row_is_an_error_that_names_it():
    utterances = [FakeUtterance("short", "de", "ja", 100), FakeUtterance("long", "de", "ja", 10_000)]
    with pytest.raises(UserError, match=r"1 utterances exceed .*256: long \(1\d\d\d\); raise it, or .*skip_too_long"):
        tokenize(utterances, FakeTokenizer(), PackingSettings(max_tokens_per_row=256))


def test_skipped_utterances_are_counted_and_named(caplog):
    utterances = [FakeUtterance("short", "de", "ja", 100), FakeUtterance("long", "de", "ja", 10_000)]
    kept = tokenize(utterances, FakeTokenizer(), PackingSettings(max_tokens_per_row=256, skip_too_long=True))
    assert [example.utterance.id for example in kept] == ["short"]
    assert "utterance long left out" in caplog.text and "1 of 2 utterances left out" in caplog.text


def test_an_example_is_its_prompt_and_its_target_with_end_of_text():
    (example,) = tokenize([FakeUtterance("a", "de", "x" * 10, 80)], FakeTokenizer(), PackingSettings())
    assert isinstance(example, Example) and example.target.tolist() == [1, 2, 0]
    assert example.num_tokens == len(example.prompt) + 10 + 3


def sampled(num_rows, *, rows_per_batch=2, num_slots=1, seed=0, **sampling):
    """A plan of rows of one utterance, `num_rows` of each language."""
    langs = [lang for lang, n in num_rows.items() for _ in range(n)]
    random.Random(seed).shuffle(langs)
    rows = [[i] for i in range(len(langs))]
    return Plan(rows, rows_per_batch, num_slots, seed, langs, SamplingSettings(**sampling))


LANGS = ("ar", "de", "en", "fr", "th")
NUM_ROWS = st.dictionaries(st.sampled_from(LANGS), st.integers(1, 40), min_size=1)
SAMPLINGS = st.one_of(
    st.builds(dict, temperature=st.floats(1, 100)),
    st.builds(dict, weights=st.fixed_dictionaries({lang: st.floats(0.01, 100) for lang in LANGS})),
)


@st.composite
def plans(draw, samplings=SAMPLINGS):
    num_rows, sampling = draw(NUM_ROWS), dict(draw(samplings))
    if "weights" in sampling:
        sampling["weights"] = {lang: sampling["weights"][lang] for lang in num_rows}
    sizes = {"rows_per_batch": draw(st.integers(1, 4)), "num_slots": draw(st.integers(1, 4))}
    return sampled(num_rows, seed=draw(st.integers(0, 9)), **sizes, **sampling)


def trained_on(plan, steps):
    """The rows of all slots of some steps, in turn; every slot is asked at every step."""
    return [row for step in steps for slot in range(plan.num_slots) for (row,) in plan.slot_rows(step, slot)]


@settings(deadline=None, max_examples=60)
@given(plans(), st.integers(1, 4))
def test_no_row_comes_again_at_any_step_before_the_others_of_its_language(plan, epochs):
    seen = Counter()
    for step in range(epochs * plan.steps_per_epoch):
        seen.update(trained_on(plan, [step]))
        for lang in plan.quotas:
            counts = [seen[i] for i, other in enumerate(plan.langs) if other == lang]
            assert max(counts) - min(counts) <= 1


@settings(deadline=None, max_examples=60)
@given(plans(), st.integers(0, 3))
def test_an_epoch_has_as_many_steps_as_naturally_and_each_language_its_quota(plan, epoch):
    natural = Plan(plan.rows, plan.rows_per_batch, plan.num_slots, plan.seed)
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    assert plan.steps_per_epoch == natural.steps_per_epoch
    assert Counter(plan.langs[i] for i in trained_on(plan, steps)) == plan.quotas
    assert sum(plan.quotas.values()) == len(plan.rows) and min(plan.quotas.values()) >= 1
    for step in steps:
        sizes = [len(plan.slot_rows(step, slot)) for slot in range(plan.num_slots)]
        assert sizes == [len(natural.slot_rows(step, slot)) for slot in range(plan.num_slots)]


@settings(deadline=None, max_examples=60)
@given(plans())
def test_quotas_are_the_shares_of_the_formula_to_a_row(plan):
    num_rows, sampling = Counter(plan.langs), plan.sampling
    shares = sampling.weights or {lang: n ** (1 / sampling.temperature) for lang, n in num_rows.items()}
    exact = {lang: len(plan.rows) * share / sum(shares.values()) for lang, share in shares.items()}
    rare = [lang for lang in exact if plan.quotas[lang] == 1]
    for lang, quota in plan.quotas.items():
        assert quota == 1 or exact[lang] - 1 - len(rare) < quota < exact[lang] + 1
        assert plan.passes_per_epoch[lang] == quota / num_rows[lang]


@settings(deadline=None, max_examples=60)
@given(plans(), st.integers(0, 30), st.integers(0, 30))
def test_a_step_does_not_depend_on_the_steps_before_it(plan, step, other):
    fresh = Plan(plan.rows, plan.rows_per_batch, plan.num_slots, plan.seed, plan.langs, plan.sampling)
    trained_on(fresh, [other])
    assert trained_on(fresh, [step]) == trained_on(plan, [step])


def test_temperature_5_of_a_hundred_to_one():
    plan = sampled({"de": 1000, "ar": 10}, temperature=5)
    assert plan.quotas == {"ar": 288, "de": 722}  # 1010 / (1 + 100^(1/5)) = 287.6
    assert plan.passes_per_epoch == {"ar": 28.8, "de": 0.722}
    assert sampled({"de": 1000, "ar": 10}, temperature=1e6).quotas == {"ar": 505, "de": 505}


def test_fixed_weights_are_in_any_unit():
    assert sampled({"de": 70, "ar": 30}, weights={"de": 1, "ar": 3}).quotas == {"ar": 75, "de": 25}
    assert sampled({"de": 70, "ar": 30}, weights={"de": 100, "ar": 300}).quotas == {"ar": 75, "de": 25}


def test_a_language_that_would_have_no_row_has_one():
    assert sampled({"de": 99, "ar": 1}, weights={"de": 1e9, "ar": 1}).quotas == {"ar": 1, "de": 99}


def test_epochs_of_sampled_rows_differ_and_depend_on_the_seed():
    numbers = {"de": 30, "ar": 10}
    plan = sampled(numbers, temperature=3)
    assert plan.order(0) != plan.order(1)
    other = Plan(plan.rows, 2, 1, 1, plan.langs, plan.sampling)
    assert plan.order(0) != other.order(0)


def test_languages_of_a_sampled_epoch_are_mixed():
    plan = sampled({"de": 500, "ar": 5}, weights={"de": 1, "ar": 1})
    langs = [plan.langs[row] for row in plan.order(0)]
    fifths = [langs[i : i + 101].count("ar") for i in range(0, 505, 101)]
    assert min(fifths) > 35 and max(fifths) < 66


def test_natural_sampling_needs_no_languages_and_is_each_row_once():
    rows = [[i] for i in range(10)]
    assert Plan(rows, 2, 1, 0).order(3) == Plan(rows, 2, 1, 0, ["de"] * 5 + ["ar"] * 5).order(3)
    plan = Plan(rows, 2, 1, 0, ["de"] * 5 + ["ar"] * 5)
    assert plan.passes_per_epoch == {"ar": 1, "de": 1}


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"de": 1}, "none for ar, th, which the training data has"),
        ({"de": 1, "ar": 1, "th": 1, "fr": 2}, "no training data for fr"),
    ],
)
def test_weights_name_exactly_the_languages_of_the_data(weights, message):
    with pytest.raises(UserError, match=message):
        sampled({"de": 3, "ar": 2, "th": 1}, weights=weights)


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"temperature": 2, "weights": {"de": 1}}, "temperature and weights exclude each other"),
        ({"temperature": 0.5}, "temperature: .*greater than or equal to 1"),
        ({"temperature": float("inf")}, "temperature: .*finite"),
        ({"weights": {"de": 0}}, "weights.de: .*greater than 0"),
        ({"weights": {"de": float("inf")}}, "weights.de: .*finite"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused(tree, message):
    with pytest.raises(UserError, match=message):
        config.parse(tree, SamplingSettings, source="conf.yaml")

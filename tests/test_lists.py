"""Fixed lists: the same everywhere, nested, complete, and never both trained and tested on."""

import hashlib
import subprocess
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from zipperasr.data import lists, manifests
from zipperasr.data.draw import draw
from zipperasr.data.lists import ListsSettings
from zipperasr.errors import UserError

DURATIONS = st.dictionaries(st.text(min_size=1, max_size=8), st.floats(0.1, 30), min_size=1, max_size=20)
HOURS = st.floats(1e-4, 0.1)


def manifest(data_dir, name: str, num_utts: int = 20, prefix: str = "", start: int = 0) -> None:
    cuts = [{"id": f"{prefix or name}-{i}", "duration": 1 + i % 7} for i in range(start, start + num_utts)]
    manifests.write(manifests.path_of(data_dir, name), cuts)


def settings(**parts) -> ListsSettings:
    return ListsSettings.model_validate({"settings": {"here": parts}})


def tree(data_dir) -> dict[str, bytes]:
    return {str(p.relative_to(data_dir)): p.read_bytes() for p in (data_dir / "lists").rglob("*") if p.is_file()}


def drawn(durations_s: dict[str, float], **how) -> list[str]:
    return list(draw(durations_s.items(), **how))


def drawn_plainly(durations_s: dict[str, float], *, seed: int, name: str, hours: float | None) -> list[str]:
    """The same without any packing: ids sorted by bytes, then by the whole digest, taken until time is up."""

    def digest(utt_id: str) -> bytes:
        return hashlib.sha256(f"{seed} {name} {utt_id}".encode()).digest()

    cycle = sorted(sorted(durations_s, key=str.encode), key=digest)
    if hours is None:
        return cycle
    ids, left_s = [], hours * 3600
    while left_s > 1e-6:
        ids.append(cycle[len(ids) % len(cycle)])
        left_s -= durations_s[ids[-1]]
    return ids


def test_a_draw_is_what_it_has_always_been():
    # The oracle is coreutils: printf '0 read_de_train utt7' | sha256sum, for each id, sorted.
    durations_s = {f"utt{i}": 1.0 for i in range(8)} | {"ü": 1.0}
    assert drawn(durations_s, seed=0, name="read_de_train", hours=4.5 / 3600) == [
        "utt1",
        "utt7",
        "utt3",
        "utt2",
        "utt4",
    ]


@limits(deadline=None, max_examples=100)
@given(DURATIONS, HOURS | st.none(), st.integers(0, 3))
def test_a_packed_draw_is_a_plain_one(durations_s, hours, seed):
    how = {"seed": seed, "name": "a_de_train", "hours": hours}
    packed, plain = draw(durations_s.items(), **how), drawn_plainly(durations_s, **how)
    assert list(packed) == plain
    assert (len(packed), packed.num_unique) == (len(plain), len(set(plain)))
    assert packed.duration_s == pytest.approx(sum(durations_s[utt_id] for utt_id in plain))


def test_hours_that_are_a_sum_of_durations_are_met_without_one_utterance_more():
    durations_s = {f"utt{i}": 0.1 for i in range(1000)}
    for num_utts in (1, 3, 7, 777, 1000, 2001):
        how = {"seed": 0, "name": "a_de_train", "hours": num_utts / 36000}
        assert drawn(durations_s, **how) == drawn_plainly(durations_s, **how)
        assert len(drawn(durations_s, **how)) == num_utts


def test_an_id_that_comes_again_is_the_same_utterance():
    how = {"seed": 0, "name": "a_de_train", "hours": None}
    again = draw([("a", 1.0), ("b", 2.0), ("a", 5.0)], **how)
    assert list(again) == drawn({"a": 1.0, "b": 2.0}, **how) and again.duration_s == 3


def test_a_draw_takes_less_memory_than_a_python_object_an_utterance():
    num_utts = 200_000
    tracemalloc.start()
    try:
        candidates = ((f"common_voice_th_{i:08}", 3.0 + i % 5) for i in range(num_utts))
        ids = draw(candidates, seed=0, name="commonvoice_th_train", hours=num_utts * 7 / 3600)
        assert len(ids) > num_utts and sum(1 for _ in ids) == len(ids)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak / num_utts < 200  # bytes: 2 million utterances need less than 0.4 GB


@limits(deadline=None, max_examples=30)
@given(DURATIONS, HOURS, HOURS, st.randoms())
def test_less_hours_begin_more_hours_in_any_order_of_the_manifest(durations_s, less, more, random):
    less, more = sorted((less, more))
    shuffled = list(durations_s.items())
    random.shuffle(shuffled)
    short = drawn(durations_s, seed=1, name="a_de_train", hours=less)
    long = drawn(dict(shuffled), seed=1, name="a_de_train", hours=more)
    assert long[: len(short)] == short


@limits(deadline=None, max_examples=30)
@given(DURATIONS, HOURS)
def test_hours_are_reached_to_within_one_utterance_going_round_again_where_the_set_is_small(durations_s, hours):
    ids = drawn(durations_s, seed=0, name="a_de_train", hours=hours)
    total_s = sum(durations_s[utt_id] for utt_id in ids)
    assert total_s - durations_s[ids[-1]] < hours * 3600 <= total_s + 1e-5
    size = len(durations_s)
    assert len(set(ids[:size])) == min(size, len(ids))
    assert ids[size:] == ids[: max(0, len(ids) - size)]


def test_no_hours_are_the_whole_set_once():
    assert sorted(drawn({"b": 1, "a": 2, "c": 3}, seed=0, name="a_de_test", hours=None)) == ["a", "b", "c"]


def test_seeds_and_sets_draw_differently():
    durations_s = {f"utt{i}": 1.0 for i in range(50)}
    names = ("a_de_train", "b_de_train")
    draws = {tuple(drawn(durations_s, seed=s, name=n, hours=None)) for s in (0, 1) for n in names}
    assert len(draws) == 4


def test_lists_are_written_with_checksums_that_sha256sum_accepts(tmp_path):
    for name in ("a_de_train", "a_de_dev", "a_de_test"):
        manifest(tmp_path, name)
    wanted = settings(train={"a_de_train": 20 / 3600}, dev={"a_de_dev": None}, test={"a_de_test": 5 / 3600})
    train, dev, test = lists.write(tmp_path, wanted)["here"]
    assert (train.path, dev.path, test.path) == ("train/a_de_train.txt", "dev/a_de_dev.txt", "test/a_de_test.txt")
    assert str(dev) == "dev/a_de_dev.txt: 20 utterances, 0.021 h"
    directory = tmp_path / "lists" / "here"
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=directory, check=True, capture_output=True)
    durations_s = {f"a_de_train-{i}": 1 + i % 7 for i in range(20)}
    ids = drawn_plainly(durations_s, seed=0, name="a_de_train", hours=20 / 3600)
    assert (directory / train.path).read_bytes() == "".join(f"{utt_id}\n" for utt_id in ids).encode()
    assert lists.read(directory / train.path) == ids
    assert lists.measure(tmp_path, "a_de_train", ids) == lists.Size(len(ids), len(ids), train.duration_s, 0)


def test_repeats_are_counted_and_said(tmp_path):
    manifest(tmp_path, "a_de_train", num_utts=3)  # 1 + 2 + 3 s
    (one,) = lists.write(tmp_path, settings(train={"a_de_train": 12 / 3600}))["here"]
    assert one.num_repeats == 3
    assert str(one).endswith("6 utterances, 0.003 h, 3 of them repeats: the set is smaller than asked")


def test_a_list_may_be_drawn_from_several_splits(tmp_path):
    manifest(tmp_path, "a_th_train", num_utts=5)
    manifest(tmp_path, "a_th_other", num_utts=20, start=5)
    manifest(tmp_path, "a_th_dev")
    (one,) = lists.write(tmp_path, settings(train={"a_th_train": {"hours": None, "splits": ["train", "other"]}}))[
        "here"
    ]
    ids = lists.read(tmp_path / "lists/here" / one.path)
    durations_s = {f"a_th_{'train' if i < 5 else 'other'}-{i}": 1 + i % 7 for i in range(25)}
    assert ids == drawn_plainly(durations_s, seed=0, name="a_th_train", hours=None)
    assert lists.measure(tmp_path, "a_th_train", [*ids, ids[0], "lost"]) == lists.Size(
        27, 26, sum(durations_s.values()) + durations_s[ids[0]], 1
    )
    assert "| a_th_train + a_th_other |" in (tmp_path / "lists/here/REPORT.md").read_text()


def test_a_bare_number_is_hours_and_comes_back_so():
    parts = settings(train={"a_de_train": 3, "a_th_train": {"hours": 5, "splits": ["other"]}}, test={"a_de_test": None})
    dumped = parts.model_dump()["settings"]["here"]
    splits = {"hours": 5.0, "splits": ["other"]}
    assert dumped == {"train": {"a_de_train": 3.0, "a_th_train": splits}, "dev": {}, "test": {"a_de_test": None}}
    assert settings(**dumped) == parts


def test_a_test_list_taken_from_the_training_split_is_not_trained_on(tmp_path):
    manifest(tmp_path, "a_pt_train", num_utts=20)
    parts = {"train": {"a_pt_train": None}, "test": {"a_pt_test": {"hours": 10 / 3600, "splits": ["train"]}}}
    train, test = lists.write(tmp_path, settings(**parts))["here"]
    trained, tested = (set(lists.read(tmp_path / "lists/here" / one.path)) for one in (train, test))
    assert not trained & tested and len(trained | tested) == 20
    assert train.num_left_out == len(tested) and f"{len(tested)} candidates left out: held out" in str(train)


def test_a_complete_setting_is_left_alone_and_a_changed_or_damaged_one_is_drawn_again(tmp_path):
    manifest(tmp_path, "a_de_train")
    manifest(tmp_path, "a_de_test")
    both = settings(train={"a_de_train": None}, test={"a_de_test": None})
    lists.write(tmp_path, both)
    whole = tree(tmp_path)
    assert lists.write(tmp_path, both) == {"here": None}
    (tmp_path / "lists/here/train/a_de_train.txt").write_text("a_de_train-0\n")
    assert lists.write(tmp_path, both)["here"]
    assert tree(tmp_path) == whole
    lists.write(tmp_path, settings(train={"a_de_train": None}))
    assert not (tmp_path / "lists/here/test/a_de_test.txt").exists()
    assert lists.find(tmp_path, "here", "test") == {}


def test_what_stopped_halfway_leaves_the_lists_as_they_were(tmp_path):
    manifest(tmp_path, "a_de_train")
    lists.write(tmp_path, settings(train={"a_de_train": None}))
    before = tree(tmp_path)
    manifests.path_of(tmp_path, "b_de_train").write_bytes(b"not gzip")
    with pytest.raises(UserError, match="b_de_train.* not a whole manifest"):
        lists.write(tmp_path, settings(train={"a_de_train": 1, "b_de_train": None}))
    assert tree(tmp_path) == before


def test_training_on_a_test_utterance_is_an_error_that_names_it(tmp_path):
    manifest(tmp_path, "a_de_train", prefix="same")
    manifest(tmp_path, "a_de_test", prefix="same", num_utts=2)
    with pytest.raises(UserError, match=r"here: 2 utterances .* tested on: same-0 \(test/a_de_test.txt\), same-1"):
        lists.write(tmp_path, settings(train={"a_de_train": None}, test={"a_de_test": None}))
    assert not list(tmp_path.glob("lists/here/*/*.txt"))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda d: lists.write(d, settings(train={"b_de_train": None})), "here: no manifest .*b_de_train_cuts"),
        (lambda d: lists.read(d / "x.txt"), "x.txt: no such list; run stage 2"),
        (lambda d: lists.find(d, "there", "train"), "there: no such lists; there are here; run stage 2"),
        (lambda d: drawn({"a": 0.0}, seed=0, name="a_de_train", hours=1), "a_de_train: its utterances last 0 s"),
        (lambda d: drawn({}, seed=0, name="a_de_train", hours=1), "a_de_train: no utterance is left to draw from"),
        (
            lambda d: lists.write(
                d, settings(train={"a_de_train": {"hours": 1, "splits": ["train", "other", "more"]}})
            ),
            "here: no manifest .*a_de_other_cuts.*, .*a_de_more_cuts.*; run stage 1",
        ),
    ],
)
def test_what_is_missing_is_named(tmp_path, ask, message):
    manifest(tmp_path, "a_de_train")
    lists.write(tmp_path, settings(train={"a_de_train": None}))
    with pytest.raises(UserError, match=message):
        ask(tmp_path)


def test_hours_must_be_positive():
    with pytest.raises(ValueError, match="greater than 0"):
        settings(train={"a_de_train": 0})

"""Fixed lists: the same everywhere, nested, complete, and never both trained and tested on."""

import subprocess

import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from zipperasr.data import lists, manifests
from zipperasr.data.lists import ListsSettings, draw
from zipperasr.errors import UserError

DURATIONS = st.dictionaries(st.text(min_size=1, max_size=8), st.floats(0.1, 30), min_size=1, max_size=20)
HOURS = st.floats(1e-4, 0.1)


def manifest(data_dir, name: str, num_utts: int = 20, prefix: str = "") -> None:
    cuts = [{"id": f"{prefix or name}-{i}", "duration": 1 + i % 7} for i in range(num_utts)]
    manifests.write(manifests.path_of(data_dir, name), cuts)


def settings(**parts) -> ListsSettings:
    return ListsSettings.model_validate({"settings": {"here": parts}})


def tree(data_dir) -> dict[str, bytes]:
    return {str(p.relative_to(data_dir)): p.read_bytes() for p in (data_dir / "lists").rglob("*") if p.is_file()}


def test_a_draw_is_what_it_has_always_been():
    # The oracle is coreutils: printf '0 read_de_train utt7' | sha256sum, for each id, sorted.
    durations_s = {f"utt{i}": 1.0 for i in range(8)} | {"ü": 1.0}
    assert draw(durations_s, seed=0, name="read_de_train", hours=4.5 / 3600) == ["utt1", "utt7", "utt3", "utt2", "utt4"]


@limits(deadline=None, max_examples=30)
@given(DURATIONS, HOURS, HOURS, st.randoms())
def test_less_hours_begin_more_hours_in_any_order_of_the_manifest(durations_s, less, more, random):
    less, more = sorted((less, more))
    shuffled = list(durations_s.items())
    random.shuffle(shuffled)
    short = draw(durations_s, seed=1, name="a_de_train", hours=less)
    long = draw(dict(shuffled), seed=1, name="a_de_train", hours=more)
    assert long[: len(short)] == short


@limits(deadline=None, max_examples=30)
@given(DURATIONS, HOURS)
def test_hours_are_reached_to_within_one_utterance_going_round_again_where_the_set_is_small(durations_s, hours):
    ids = draw(durations_s, seed=0, name="a_de_train", hours=hours)
    total_s = sum(durations_s[utt_id] for utt_id in ids)
    assert total_s - durations_s[ids[-1]] < hours * 3600 <= total_s + 1e-5
    size = len(durations_s)
    assert len(set(ids[:size])) == min(size, len(ids))
    assert ids[size:] == ids[: max(0, len(ids) - size)]


def test_no_hours_are_the_whole_set_once():
    assert sorted(draw({"b": 1, "a": 2, "c": 3}, seed=0, name="a_de_test", hours=None)) == ["a", "b", "c"]


def test_seeds_and_sets_draw_differently():
    durations_s = {f"utt{i}": 1.0 for i in range(50)}
    draws = {tuple(draw(durations_s, seed=s, name=n, hours=None)) for s in (0, 1) for n in ("a_de_train", "b_de_train")}
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
    assert (directory / train.path).read_bytes() == "".join(f"{utt_id}\n" for utt_id in train.ids).encode()
    assert lists.read(directory / train.path) == train.ids


def test_repeats_are_counted_and_said(tmp_path):
    manifest(tmp_path, "a_de_train", num_utts=3)  # 1 + 2 + 3 s
    (one,) = lists.write(tmp_path, settings(train={"a_de_train": 12 / 3600}))["here"]
    assert one.num_repeats == 3
    assert str(one).endswith("6 utterances, 0.003 h, 3 of them repeats: the set is smaller than asked")


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
        (lambda d: draw({"a": 0.0}, seed=0, name="a_de_train", hours=1), "a_de_train: its utterances last 0 s"),
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

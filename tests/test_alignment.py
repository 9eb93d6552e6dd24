"""Alignments, losses and texts of CTC posteriors against all paths, for every engine that is here."""

import itertools
import math
import re
import sys
import types

import pytest
import torch

from zipperasr import alignment
from zipperasr.alignment import engines, words
from zipperasr.alignment.words import Word
from zipperasr.errors import UserError

V = 4  # units, the blank among them


@pytest.fixture(params=engines.ENGINES)
def engine(request):
    """Each engine that can be used."""
    return usable(request.param)


@pytest.fixture(params=["k2", "torchaudio"])
def other_engine(request):
    """Each that is not torch."""
    return usable(request.param)


def usable(name):
    if obstacle := alignment.available()[name]:
        pytest.skip(f"{name}: {obstacle}")
    return name


def posteriors(seed, num_frames, num_units=V, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(num_frames, num_units, generator=generator)).log_softmax(-1)


def read(path):
    """What a path of units says: runs are one, then blanks go."""
    return [unit for unit, _ in itertools.groupby(path) if unit]


def paths_of(log_probs, target):
    """Every path that says the target, with its log-probability."""
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        if read(path) == target:
            yield sum(log_probs[t, unit].item() for t, unit in enumerate(path)), list(path)


TARGETS = [[1], [1, 2], [1, 1], [3, 2, 3], [2, 2, 1], []]


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_the_path_is_the_best_of_all_that_say_the_text(engine, target):
    for seed in range(4):
        log_probs = posteriors(seed, 6)
        (found,) = alignment.forced_align([log_probs], [target], engine=engine)
        assert found.path == max(paths_of(log_probs, target))[1]
        assert len(found.spans) == len(target)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_the_loss_is_the_sum_over_all_paths_that_say_the_text(engine, target):
    log_probs = posteriors(7, 6)
    every = [score for score, _ in paths_of(log_probs, target)]
    expected = -torch.tensor(every, dtype=torch.float64).logsumexp(0)
    (loss,) = alignment.ctc_loss([log_probs], [target], engine=engine)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def batch_of(seed):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(20, 120, (9,), generator=draw).tolist()
    log_probs = [posteriors(seed + n, n, 30) for n in lengths]
    targets = [torch.randint(1, 30, (n // 4,), generator=draw).tolist() for n in lengths]
    return log_probs, [[*ids, ids[-1]] for ids in targets]  # two alike at the end of each


def test_every_engine_finds_the_same_path_to_a_frame(other_engine):
    log_probs, targets = batch_of(1)
    found, expected = (alignment.forced_align(log_probs, targets, engine=name) for name in (other_engine, "torch"))
    assert [one.path for one in found] == [one.path for one in expected]
    assert [one.spans for one in found] == [one.spans for one in expected]


def test_every_engine_has_the_same_loss_and_gradient(other_engine):
    log_probs, targets = batch_of(2)
    values = []
    for name in (other_engine, "torch"):
        leaves = [x.clone().requires_grad_() for x in log_probs]
        losses = alignment.ctc_loss([x.log_softmax(-1) for x in leaves], targets, engine=name)
        losses.sum().backward()
        values.append((losses.detach(), torch.cat([x.grad for x in leaves])))
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-4)


def test_an_alignment_does_not_depend_on_its_neighbours(engine):
    log_probs, targets = batch_of(3)
    together = alignment.forced_align(log_probs, targets, engine=engine)
    for i in (0, 4, 8):
        (alone,) = alignment.forced_align([log_probs[i]], [targets[i]], engine=engine)
        assert alone.path == together[i].path and alone.spans == together[i].spans
        assert torch.equal(alone.posteriors, together[i].posteriors)


def test_a_path_says_its_text_and_spans_are_its_runs():
    log_probs, targets = batch_of(4)
    for scores, target, found in zip(log_probs, targets, alignment.forced_align(log_probs, targets), strict=True):
        assert read(found.path) == target
        for unit, (start, end) in zip(target, found.spans, strict=True):
            assert set(found.path[start:end]) == {unit} and unit not in found.path[end : end + 1]
        assert found.posteriors.tolist() == pytest.approx([math.exp(scores[t, u]) for t, u in enumerate(found.path)])


def test_text_that_the_frames_are_too_few_for_is_not_aligned(engine):
    short = [posteriors(0, 3), posteriors(1, 3), torch.zeros(0, V)]
    found = alignment.forced_align(short, [[1, 1], [2, 2, 1], [1]], engine=engine)  # three frames, four, one
    assert found[0].path == [1, 0, 1] and found[1:] == [None, None]
    assert alignment.forced_align([], [], engine=engine) == []


def test_torchaudio_s_units_become_those_of_an_index(monkeypatch):
    """It gives them in the type of the targets; to gather posteriors by int32 is an error before PyTorch 2.8."""
    functional = types.SimpleNamespace(forced_align=lambda x, ids, blank: (ids.repeat(1, x.shape[1]), None))
    monkeypatch.setitem(sys.modules, "torchaudio", types.SimpleNamespace(functional=functional))
    monkeypatch.setitem(sys.modules, "torchaudio.functional", functional)
    paths = engines.Torchaudio().paths([posteriors(0, 3), posteriors(1, 2)], [[1], []], 0)
    assert [path.tolist() for path in paths] == [[1, 1, 1], [0, 0]]
    assert {path.dtype for path in paths} == {torch.int64}


def test_greedy_text_is_that_of_the_best_unit_of_each_frame():
    log_probs = torch.eye(V)[[0, 1, 1, 0, 1, 2, 2, 0]].log_softmax(-1)
    assert alignment.greedy(log_probs) == [1, 1, 2]
    assert alignment.greedy(log_probs, blank=2) == [0, 1, 0, 1, 0]
    assert alignment.greedy(torch.zeros(0, V)) == []


def test_the_best_texts_are_those_with_the_most_probable_paths(engine):
    for seed in range(3):
        log_probs, sums = posteriors(seed, 5, scale=3.0), {}
        for path in itertools.product(range(V), repeat=5):
            score = sum(log_probs[t, unit].item() for t, unit in enumerate(path))
            sums[tuple(read(path))] = sums.get(tuple(read(path)), 0.0) + math.exp(score)
        expected = sorted(sums, key=sums.get, reverse=True)[:3]
        found = alignment.n_best(log_probs, 3, engine=engine)
        assert [tuple(ids) for ids, _ in found] == expected
        assert [score for _, score in found] == pytest.approx([math.log(sums[ids]) for ids in expected], abs=1e-4)


def test_another_blank_than_unit_0_is_as_good():
    log_probs = posteriors(5, 30)
    moved = log_probs[:, [1, 2, 3, 0]]  # unit 3 is the blank
    (expected,), (found,) = (
        alignment.forced_align([log_probs], [[1, 2, 2]], engine="torch"),
        alignment.forced_align([moved], [[0, 1, 1]], blank=3, engine="torch"),
    )
    assert found.spans == expected.spans


@pytest.mark.parametrize(
    ("versions", "cuda", "said"),
    [
        ({"k2": "1.24.4.dev20250714+cpu.torch2.7.1"}, None, {"k2": "built for PyTorch 2.7.1, and this is 2.13.0"}),
        ({"k2": "1.24.4.dev20250714+cpu.torch2.13.0"}, None, {"k2": None}),
        ({"torchaudio": "2.11.0"}, None, {"torchaudio": "built with CUDA, and PyTorch 2.13.0+cpu is not"}),
        ({"torchaudio": "2.11.0+cpu"}, None, {"torchaudio": None}),
        ({"torchaudio": "2.11.0"}, "13.0", {"torchaudio": None}),
        ({}, None, {"k2": "not installed", "torchaudio": "not installed", "torch": None}),
    ],
    ids=str,
)  # fmt: skip
def test_an_engine_that_does_not_fit_is_said_and_nothing_is_imported(monkeypatch, versions, cuda, said):
    monkeypatch.setattr(engines, "_version", versions.get)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    before = set(sys.modules)
    found = alignment.available()
    for name, obstacle in said.items():
        assert found[name] is None if obstacle is None else obstacle in found[name]
        if obstacle:
            with pytest.raises(UserError, match=f"alignment engine '{name}': .*use torch"):
                alignment.choose(name, "align")
            assert name in engines.describe()
    assert not {"k2", "torchaudio"} & (set(sys.modules) - before)
    first = next(name for name, obstacle in found.items() if obstacle is None)
    assert type(alignment.choose(None, "align")).__name__.lower() == first
    assert type(alignment.choose(None, "loss")).__name__ in ("K2", "Torch")


def test_an_unknown_engine_is_an_error():
    with pytest.raises(UserError, match="engine 'kaldi' is unknown; there are k2, torchaudio, torch"):
        alignment.choose("kaldi", "align")


@pytest.mark.parametrize(
    ("text", "expected", "apart"),
    [
        ("l'eau est  là", ["l'eau", "est", "là"], [False, True, True]),
        ("挪威和 iPhone15好", ["挪", "威", "和", "iPhone15", "好"], [False, False, False, True, False]),
        ("スーパーへ", ["ス", "ー", "パ", "ー", "へ"], [False] * 5),
        ("ที่นี่ ดี", ["ที่", "นี่", "ดี"], [False, False, True]),
        ("삼십칠 독일", ["삼십칠", "독일"], [False, True]),
        ("  ", [], []),
    ],
)
def test_words_are_apart_where_the_script_has_spaces_and_characters_elsewhere(text, expected, apart):
    assert words.split(text) == expected
    assert words.boundaries(text) == apart


SAID = [Word("hallo", 0.1, 0.42, 0.9), Word('"so"', 0.42, 0.8, 0.5), Word("?", 0.8, 0.8, 0.0)]


def test_a_ctm_has_a_line_a_word(tmp_path):
    words.write_ctm(tmp_path / "ctm", [("u1", SAID), ("u2", [])])
    lines = (tmp_path / "ctm").read_text().splitlines()
    assert lines[0].split() == ["u1", "1", "0.100", "0.320", "hallo", "0.900"]
    assert [line.split()[4] for line in lines] == ["hallo", '"so"', "?"]


@pytest.mark.parametrize("number", [3, 4], ids=["to the last word", "and on"])
def test_the_intervals_of_a_textgrid_cover_the_utterance_without_a_gap(tmp_path, number):
    words.write_textgrid(tmp_path / "u1.TextGrid", SAID, {3: 0.8003, 4: 1.25}[number])
    text = (tmp_path / "u1.TextGrid").read_text(encoding="utf-8")
    assert text.startswith('File type = "ooTextFile"\nObject class = "TextGrid"\n')
    found = re.findall(r'\[(\d+)\]:\n +xmin = (\S+)\n +xmax = (\S+)\n +text = "(.*)"\n', text)
    assert [int(at) for at, *_ in found] == list(range(1, number + 1)) and f"intervals: size = {number}\n" in text
    assert [label for *_, label in found] == ["", "hallo", '""so""', ""][:number]
    times = [(float(start), float(end)) for _, start, end, _ in found]
    assert times[0][0] == 0 and times[-1][1] == {3: 0.8, 4: 1.25}[number]
    assert all(one[1] == other[0] for one, other in itertools.pairwise(times))
    assert all(start < end for start, end in times)

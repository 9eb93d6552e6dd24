"""Claims about comparing two systems; oracles: hand-worked cases, scipy's permutation test, a normal approximation."""

import dataclasses
import json
import re

import numpy as np
import pytest
import scipy.stats

from zipperasr.cli import main
from zipperasr.errors import UserError
from zipperasr.scoring import compare
from zipperasr.scoring.score import Aligned, Counts, width

REFS = {"u1": "a b c d", "u2": "e f", "u3": "g h i j"}


def decode_directory(run, hyps, *, refs=REFS, lang="de", corpus="read", **meta):
    directory = run / f"decode_{corpus}_{lang}_test"
    directory.mkdir(parents=True)
    for name, texts in (("ref", refs), ("hyp", hyps)):
        (directory / name).write_text("".join(f"{utt_id} {text}\n" for utt_id, text in texts.items()))
    meta = {"set": f"{corpus}_{lang}_test", "lang": lang} | meta
    (directory / "meta.json").write_text(json.dumps(meta))
    return directory


def synthetic(*, num, seed, name="s", lang="de", gain=0.0):
    """A pair whose system B errs in one word of five, and A in `gain` more; their errors are independent."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(3, 15, size=num)
    sides = [draw.binomial(lengths, rate) for rate in (0.2 + gain, 0.2)]
    aligned = [
        [Aligned(f"u{i:05d}", Counts(n - e, e), [], []) for i, (e, n) in enumerate(zip(side, lengths.tolist()))]
        for side in (side.tolist() for side in sides)
    ]
    return compare.Pair(name, lang, "wer", *aligned, [])


def test_a_comparison_worked_by_hand(tmp_path):
    a = decode_directory(tmp_path / "a", REFS | {"u1": "a b", "u2": "e f x"})  # 3 errors of 10 words
    b = decode_directory(tmp_path / "b", REFS | {"u1": "a b c", "u3": "g h i"})  # 2 errors
    (row,) = compare.compare([compare.pair(a, b, profile="whisper")])
    assert (row.name, row.rates, row.difference) == ("de", [30.0, 20.0], -10.0)
    assert (row.num_better, row.num_worse, row.num_equal) == (2, 1, 0)
    # the rate of a resample is the sum of -1 / 4, -1 / 2 and 1 / 4 words: its extremes are three times the same
    assert row.interval == pytest.approx((-50.0, 25.0))
    assert row.verdict == "not significant"


def test_identical_systems_do_not_differ(tmp_path):
    a, b = (decode_directory(tmp_path / side, {"u1": "a x", "u2": "e"}) for side in "ab")
    (row,) = compare.compare([compare.pair(a, b, profile="whisper")])
    assert (row.p, row.difference, row.interval, row.num_equal) == (1.0, 0.0, (0.0, 0.0), 3)
    assert compare.changed([compare.pair(a, b, profile="whisper")], 10) == []


@pytest.mark.parametrize("seed", range(3))
def test_p_is_that_of_a_permutation_test_and_of_the_normal_approximation(seed):
    pair = synthetic(num=1500, seed=seed, gain=0.01)
    (row,) = compare.compare([pair])
    errors = [np.array([u.counts.errors for u in side]) for side in (pair.a, pair.b)]
    lengths = np.array([u.counts.ref_len for u in pair.a])
    swapped = scipy.stats.permutation_test(
        errors,
        lambda a, b, axis: (b - a).sum(axis),
        permutation_type="samples",
        n_resamples=4000,
        vectorized=True,
        rng=seed,
    )
    residual = errors[1] - errors[0] - row.difference / 100 * lengths
    error = 100 * np.sqrt(len(lengths)) * residual.std() / lengths.sum()
    normal = 2 * scipy.stats.norm.sf(abs(row.difference) / error)
    assert row.p == pytest.approx(swapped.pvalue, abs=0.02)
    assert row.p == pytest.approx(normal, abs=0.02)
    assert row.interval == pytest.approx(
        (row.difference - 1.96 * error, row.difference + 1.96 * error), abs=0.1 * error
    )


def test_p_is_below_a_tenth_for_a_tenth_of_the_pairs_that_do_not_differ(monkeypatch):
    monkeypatch.setattr(compare, "NUM", 400)
    low = [compare.compare([synthetic(num=150, seed=seed, name=str(seed))])[0].p < 0.1 for seed in range(300)]
    assert 0.05 < np.mean(low) < 0.15


def test_a_clear_difference_is_called_one():
    (row,) = compare.compare([synthetic(num=2000, seed=0, gain=0.05)])
    assert row.verdict == "B better ***" and row.p < 0.001 and row.interval[1] < 0


def test_a_language_is_the_mean_of_its_sets_and_macro_that_of_languages():
    gains = {("s1", "de"): 0.3, ("s2", "de"): 0.1, ("s3", "zh"): 0.0}
    pairs = [
        synthetic(num=50 * seed, seed=seed, name=name, lang=lang, gain=gain)
        for seed, ((name, lang), gain) in enumerate(gains.items(), 1)
    ]
    de, zh, macro = compare.compare(pairs)
    alone = [compare.compare([pair])[0] for pair in pairs]
    assert de.difference == pytest.approx((alone[0].difference + alone[1].difference) / 2)
    assert zh == alone[2]
    assert macro.rates == pytest.approx([(de.rates[i] + zh.rates[i]) / 2 for i in (0, 1)])
    assert (macro.name, macro.num_better) == ("macro (2)", sum(row.num_better for row in alone))
    spans = [row.interval[1] - row.interval[0] for row in (de, zh, macro)]
    assert spans[2] == pytest.approx(np.hypot(spans[0], spans[1]) / 2, rel=0.1)  # sets are drawn independently


def test_sets_are_drawn_independently():
    pairs = [synthetic(num=200, seed=0, name=lang, lang=lang) for lang in ("de", "fr", "it", "es")]
    *rows, macro = compare.compare(pairs)
    spans = [row.interval[1] - row.interval[0] for row in (*rows, macro)]
    assert spans[:4] == pytest.approx([2 * spans[4]] * 4, rel=0.1)


def test_the_order_of_utterances_does_not_matter(tmp_path):
    pair = synthetic(num=50, seed=1, gain=0.05)
    turned = dataclasses.replace(pair, a=pair.a[::-1], b=pair.b[::-1])
    assert compare.compare([turned]) == compare.compare([pair])
    a = decode_directory(tmp_path / "a", {"u1": "a", "u2": "e", "u3": "g h i j"})
    b = decode_directory(tmp_path / "b", {"u3": "g", "u1": "a b c d"}, refs=dict(reversed(REFS.items())))
    found = compare.pair(a, b, profile="whisper")
    assert [u.id for u in found.a] == [u.id for u in found.b] == list(REFS)
    assert found.gained == [-3, 1, 3]


def test_different_references_are_named(tmp_path):
    a = decode_directory(tmp_path / "a", {})
    b = decode_directory(tmp_path / "b", {}, refs={"u1": "A, b c d!", "u2": "e g", "u4": "x"})
    with pytest.raises(UserError, match="3 references differ: u2 u3 u4"):
        compare.pair(a, b, profile="whisper")


@pytest.mark.parametrize(
    "hyps, refs, lang, message",
    [
        ({}, REFS, "fr", "is German, but .* is French"),
        ({}, {"u1": "(x)"}, "de", "every reference is empty"),
        ({"u9": "a"}, REFS, "de", "hypotheses have no reference: u9"),
    ],
)
def test_what_cannot_be_compared_is_an_error_that_says_why(hyps, refs, lang, message, tmp_path):
    a = decode_directory(tmp_path / "a", {}, refs=refs)
    b = decode_directory(tmp_path / "b", hyps, refs=refs, lang=lang)
    with pytest.raises(UserError, match=message):
        compare.pair(a, b, profile="whisper")


def test_runs_are_compared_in_the_sets_that_both_have(tmp_path, capsys):
    for run, hyps in (("a", {"u1": "a x c d"}), ("b", REFS)):
        for lang in ("de", "fr"):
            decode_directory(tmp_path / run, hyps, lang=lang, unseen_policy="shared" if run == lang[0] else None)
    decode_directory(tmp_path / "a", REFS, lang="th")
    decode_directory(tmp_path / "b", REFS, lang="it", corpus="talk", unseen_policy="nearest")
    for run, policy in (("a", None), ("b", "nearest")):
        decode_directory(tmp_path / run, REFS, lang="it", unseen_policy=policy)
    assert main.main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--changed", "1"]) == 0
    out, err = capsys.readouterr()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    assert [row[0] for row in rows[2:]] == ["de WER", "fr WER", "it WER", "macro (3)"]
    assert rows[2][1:4] == ["70.00", "0.00", "-70.00"] and rows[4][5] == "1.0000"
    assert err.splitlines() == [
        f"zipperasr: warning: {tmp_path}/a/decode_read_th_test: the other run has no such set, so it is not compared",
        f"zipperasr: warning: {tmp_path}/b/decode_talk_it_test: the other run has no such set, so it is not compared",
        "zipperasr: warning: read_de_test: utterances without hypothesis, counted as deleted: 2 in A, 0 in B",
        "zipperasr: warning: read_fr_test: utterances without hypothesis, counted as deleted: 2 in A, 0 in B",
        "zipperasr: warning: read_it_test: signatures differ: nothing in A, unseen:nearest in B",
    ]


def test_runs_without_a_common_set_are_an_error(tmp_path, capsys):
    a, b = decode_directory(tmp_path / "a", REFS), decode_directory(tmp_path / "b", REFS, lang="fr")
    for sides, message in (((a.parent, b.parent), "no set in common"), ((a, b.parent), "no decode_<set> here")):
        assert main.main(["compare", *map(str, sides)]) == 1
        assert message in capsys.readouterr().err


def test_directories_of_other_systems_need_hyp_ref_and_a_language(tmp_path, capsys):
    sides = [decode_directory(tmp_path / name, REFS) for name in "ab"]
    for side in sides:
        (side / "meta.json").unlink()
    assert main.main(["compare", *map(str, sides)]) == 1
    assert "give it by --lang" in capsys.readouterr().err
    assert main.main(["compare", *map(str, sides), "--lang", "de"]) == 0


def test_the_profile_is_that_of_as_run_or_the_option(tmp_path, capsys):
    sides = [decode_directory(tmp_path / name, {"u": text}, refs={"u": "ปี"}, lang="th") for name, text in ("aู", "bี")]
    (tmp_path / "a" / "config.yaml").write_text("scoring: {profile: marks}\n")
    for arguments, profile in (([], "marks"), (["--profile", "whisper"], "whisper")):
        assert main.main(["compare", *map(str, sides), *arguments]) == 0
        assert f"profile: {profile}\n" in capsys.readouterr().out


def test_the_utterances_that_changed_most_are_shown_with_both_alignments(tmp_path, capsys):
    refs = {"j1": "音声の内容", "j2": "音声", "j3": "同じ"}
    a = decode_directory(tmp_path / "a", {"j1": "音", "j2": "音楽", "j3": "同"}, refs=refs, lang="ja")
    b = decode_directory(tmp_path / "b", {"j1": "音声の内テ容", "j2": "音声", "j3": "同"}, refs=refs, lang="ja")
    shown = {}
    for color in ("never", "always", "auto"):
        assert main.main(["compare", str(a), str(b), "--changed", "5", "--color", color]) == 0
        shown[color] = capsys.readouterr().out.partition("\n\nread_ja_test")[2].splitlines()
    assert shown["never"] == [
        " j1: 4 errors in A, 1 in B, of 5",
        "ref  音 声 の 内 容",
        "A    音 ** ** ** **",
        "op      D  D  D  D",
        "ref  音 声 の 内 ** 容",
        "B    音 声 の 内 テ 容",
        "op               I",
        "",
        "read_ja_test j2: 1 errors in A, 0 in B, of 2",
        "ref  音 声",
        "A    音 楽",
        "op      S",
        "ref  音 声",
        "B    音 声",
        "op",
    ]
    assert shown["auto"] == shown["never"]  # this is no terminal
    assert "\x1b[36mテ\x1b[0m" in shown["always"][5] and "\x1b[31m**\x1b[0m" in shown["always"][2]
    plain = [re.sub(r"\x1b\[\d+m", "", line).rstrip() for line in shown["always"]]
    assert plain == shown["never"]


def test_long_alignments_go_on_in_further_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    refs = {"u": "音声の内容" * 30}
    sides = [
        decode_directory(tmp_path / name, {"u": text}, refs=refs, lang="ja") for name, text in (("a", ""), ("b", "音"))
    ]
    assert main.main(["compare", *map(str, sides)]) == 0
    lines = capsys.readouterr().out.partition("read_ja_test u")[2].splitlines()[1:]
    assert 50 < max(map(width, lines)) <= 60
    assert sum(line.startswith("ref") for line in lines) == 2 * 9  # 150 characters, 18 a line

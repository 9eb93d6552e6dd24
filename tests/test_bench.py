"""Benchmarks: what is measured is what is printed, and every case does the work that it is compared by."""

import dataclasses
import json
import math
import sys

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from whisper.model import AudioEncoder

from zipperasr.adapters import REGISTRY, batch_languages, language_runs
from zipperasr.bench import SIZES, adapters, data, decode, features, timing, train
from zipperasr.bench.timing import Report, Target
from zipperasr.cli import main as cli
from zipperasr.decoding import generate
from zipperasr.errors import UserError
from zipperasr.model import cost

TINY = ["--sizes", "16x16", "16x32", "--tokens", "24", "--rounds", "1", "--langs", "1", "12", "--threads", "1"]
PEFT_CASES = {adapters.SINGLE, adapters.MIXED, adapters.MIXED + adapters.FORWARD}


@pytest.fixture
def bench(capsys, tmp_path):
    """Runs `zipperasr bench adapters` at a tiny size; gives what it printed and its JSON."""
    threads = torch.get_num_threads()

    def run(*options: str) -> tuple[str, dict]:
        path = tmp_path / "bench.json"
        assert cli.main(["bench", "adapters", *TINY, *options, "--json", str(path)]) == 0
        return capsys.readouterr().out, json.loads(path.read_text())

    yield run
    torch.set_num_threads(threads)


def cells_of(printed: str) -> list[list[str]]:
    """The rows of the printed table."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]


def shown(value: object) -> str:
    """How the table prints what JSON holds."""
    if isinstance(value, float):
        return f"{value:.3f}"
    return "–" if value is None else str(value)


def test_the_table_has_every_method_and_peft_for_every_size_and_number_of_languages(bench):
    pytest.importorskip("peft")
    _, found = bench()
    for where in ("16x16", "16x32"):
        numbers: dict[str, list] = {}
        for row in found["rows"]:
            if row["where"] == where:
                numbers.setdefault(row["case"], []).append(row["languages"])
        once = {adapters.FROZEN, adapters.FROZEN + adapters.FORWARD, "vanilla", "flylora", adapters.SINGLE}
        assert numbers == {case: ["any"] if case in once else [1, 12] for case in (*once, *REGISTRY, *PEFT_CASES)}


def test_json_holds_the_printed_figures(bench):
    printed, found = bench()
    columns, _, *rows = cells_of(printed)
    assert rows == [[shown(row.get(column)) for column in columns] for row in found["rows"]]
    assert [f"{key}: {value}" for key, value in found["header"].items()] == printed.split("\n\n")[0].splitlines()
    targets = printed.strip().split("\n\n")[-1].splitlines()
    assert targets == [
        f"{t['what']}: {shown(t['value'])} {t['relation']} {t['limit']:.2f}, {t['verdict']}" for t in found["targets"]
    ]


def test_the_frozen_layer_is_one_and_keeps_nothing(bench):
    _, found = bench()
    frozen = [row for row in found["rows"] if row["case"] == adapters.FROZEN]
    assert [(row["ratio"], row["saved / x"], row["trainable"]) for row in frozen] == [(1.0, 0.0, 0)] * 2


def test_memory_and_parameters_are_those_of_the_definition(bench):
    """Kept are x and x A^T [tokens, 32], of 16 inputs each token: 1 + 32 / 16. Eq. 7 and 8 count the parameters."""
    _, found = bench()
    rows = {(row["where"], row["case"], row["languages"]): row for row in found["rows"]}
    assert rows["16x32", "zipper_soft", 12]["saved / x"] == rows["16x32", "vanilla", "any"]["saved / x"] == 3.0
    assert rows["16x32", "vanilla", "any"]["trainable"] == 32 * (16 + 32)
    assert rows["16x32", "independent", 1]["trainable"] == 12 * 32 * (16 + 32)


def test_a_missing_peft_is_stated(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    printed, found = bench()
    assert printed.count("PEFT (skipped: peft is not installed)") == 2
    assert not PEFT_CASES & {row["case"] for row in found["rows"]}
    assert {t["verdict"] for t in found["targets"] if adapters.SINGLE in t["what"]} == {"not measured"}


def test_an_encoder_is_timed_by_every_method(bench, monkeypatch):
    tiny = {"n_mels": 80, "n_audio_ctx": 1500, "n_audio_state": 16, "n_audio_head": 2, "n_audio_layer": 1}
    monkeypatch.setitem(adapters.WHISPER, "tiny", tiny)
    _, found = bench("--encoder", "tiny")
    rows = [row for row in found["rows"] if row["where"] == "encoder tiny"]
    assert [row["case"] for row in rows] == list(REGISTRY)
    assert rows[0]["ratio"] == 1.0 and all(row["ratio"] > 0 for row in rows)
    assert found["targets"][-1]["what"] == "encoder tiny: zipper_soft over vanilla"


def test_extraction_is_timed_beside_lhotse_and_transformers(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "UTTERANCES", 1)
    path, threads = tmp_path / "bench.json", torch.get_num_threads()
    try:
        assert cli.main(["bench", "features", "--rounds", "1", "--json", str(path)]) == 0
    finally:
        torch.set_num_threads(threads)
    rows, found = cells_of(capsys.readouterr().out)[2:], json.loads(path.read_text())
    kinds = [f"{kind}, {bins} bins" for kind in data.KINDS for bins in (80, 128)]
    assert [row[:2] for row in rows] == [
        [kind, case] for kind in kinds for case in [*features.cases(80), *features.FILES]
    ]
    assert all(row["ratio"] == 1 for row in found["rows"] if row["case"] == features.OURS)
    limits = {(t["what"].partition(": ")[2], t["relation"], t["limit"]) for t in found["targets"]}
    assert limits == {
        (f"{features.LHOTSE}, over ours", ">=", 1.0),
        (f"{features.TRANSFORMERS}, over ours", ">=", 3.0),
        (f"{features.FLAC}, audio s/s", ">=", 200),
    }
    assert len(found["targets"]) == 3 * len(kinds)


@pytest.mark.parametrize("bins", [80, 128])
def test_what_extraction_is_compared_with_computes_the_same(bins):
    """Transformers pads to 30 s and has filters of its own: what it computes agrees to the rounding of float32."""
    samples = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)
    found = {name: case(samples) for name, case in features.cases(bins).items()}
    ours = found[features.OURS]
    assert torch.equal(found[features.LHOTSE], ours) and torch.equal(found[features.WHISPER].T, ours)
    assert torch.allclose(found[features.TRANSFORMERS]["input_features"][0, :, :98].T, ours[:98], atol=1e-3)
    assert found[features.PADDED].shape == (3000, bins)


def test_features_of_files_are_those_of_what_was_written(tmp_path):
    """FLAC is exact but for 16 bits; MP3 is not."""
    flac, mp3 = (features._file(tmp_path, 3, 1.5, *how, 80).features() for how in features.FILES.values())
    expected = features.log_mel(features._noise(3, 1.5, 16000), 80)
    assert torch.allclose(flac, expected, atol=0.01) and mp3.shape == expected.shape


def test_every_step_on_a_large_corpus_is_measured(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PACKED", 300)
    path = tmp_path / "bench.json"
    assert cli.main(["bench", "data", "--cuts", "90", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    steps = {row["step"]: row for row in found["rows"]}
    alone = [name for name, row in steps.items() if "peak MB" in row]
    assert alone == ["read", "validate", "select 0 h", "select all", "start up"]
    assert 20 < steps["validate"]["peak MB"] < steps["start up"]["peak MB"]
    parts = [row["s"] for name, row in steps.items() if name.startswith("  ")]
    assert len(parts) == 4 and sum(parts) == pytest.approx(steps["start up"]["s"], abs=0.5)
    packed = [row for name, row in steps.items() if name.startswith("pack")]
    assert len(packed) == 6 and all(0.5 < row["fill"] <= 1 and row["rows/s"] > 0 for row in packed)
    assert len(found["targets"]) == 2 * 3 + 1 + 2 * 3
    assert "start up with 90 cuts: s" in capsys.readouterr().out


def test_a_synthetic_corpus_lasts_as_its_models_do():
    means = {kind: data.durations_s(kind, 20_000).mean() for kind in data.KINDS}
    assert means == pytest.approx({"LibriSpeech": 12.3, "MLS": 15.0, "Common Voice": 5.0}, rel=0.02)


WRONG = (
    *(["nonsense"], ["adapters", "--sizes", "16"], ["adapters", "--rounds", "0"], ["data", "--cuts", "0"]),
    *(
        ["train", "--size", "huge"],
        ["train", "--recompute-llm", "2"],
        ["train", "--recompute-llm", "nan"],
        ["train", "--method", "lora"],
    ),
)


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_wrong_usage_is_one_clear_error(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["bench", *arguments])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and f"'{arguments[-1]}'" in error.splitlines()[-1] and error.startswith("usage:")


# Timing


def test_ratios_are_taken_within_rounds():
    """On a machine ten times slower in every round, b takes twice as long as a in each."""
    ticks = [1.0]

    def a():
        ticks.append(10 * ticks[-1])

    def b():
        ticks.append(ticks[-1])
        ticks.append(ticks[-1])

    seconds = timing.interleave({"a": a, "b": b}, rounds=3, title="", clock=lambda: sum(ticks))
    assert seconds["a"] == [10.0**i for i in range(timing.WARM_UP + 1, timing.WARM_UP + 4)]
    assert timing.ratio(seconds["b"], seconds["a"]) == 2.0


def test_steps_run_in_turn():
    order = []
    timing.interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, title="")
    assert order == ["a", "b"] * (2 + timing.WARM_UP)


def test_the_ratio_is_the_median_over_rounds():
    assert timing.ratio([1.0, 6.0, 30.0], [1.0, 2.0, 3.0]) == 3.0


def test_a_target_says_whether_it_is_met():
    cases = [Target("a", 1.2, 1.2), Target("b", 1.21, 1.2), Target("c", 2.9, 3.0, ">="), Target("d", None, 1.0)]
    assert [target.verdict for target in cases] == ["met", "missed", "missed", "not measured"]
    assert Report({}, [], cases).text().splitlines()[-1] == "d: – <= 1.00, not measured"


# What is timed


def test_saved_bytes_counts_each_storage_once_and_not_what_is_known():
    """x * w saves both; (x * w) * (x * w) saves x * w twice; w is known."""
    x, w = torch.ones(6, 4, requires_grad=True), nn.Parameter(torch.ones(6, 4))
    assert adapters.saved_bytes(lambda: x * w, [w]) == 6 * 4 * 4
    assert adapters.saved_bytes(lambda: x * w, []) == 2 * 6 * 4 * 4
    assert adapters.saved_bytes(lambda: (x * w)[:2] * (x * w)[2:4], [w]) == 3 * 6 * 4 * 4
    assert adapters.saved_bytes(lambda: x + w, []) == 0


def test_rows_of_one_language_are_neighbours():
    assert adapters.langs_of_rows(1) == list(adapters.LANGS[:1]) * 12
    assert adapters.langs_of_rows(4) == [lang for lang in adapters.LANGS[:4] for _ in range(3)]
    assert adapters.langs_of_rows(12) == list(adapters.LANGS)


def test_pefts_mixed_adapters_do_the_work_of_independent():
    """With the same A and B: the same output, and the same gradients."""
    pytest.importorskip("peft")
    linear, langs = nn.Linear(16, 8, dtype=torch.float64), adapters.langs_of_rows(4)
    theirs = adapters.peft_layer(linear, adapters.LANGS)
    (ours,) = adapters.adapted(nn.Sequential(linear), "independent", ["0"])
    factors = []
    for lang in dict.fromkeys(langs):
        factors += [(ours.A_spec[lang], theirs.lora_A[lang].weight), (ours.B_spec[lang], theirs.lora_B[lang].weight)]
    with torch.no_grad():
        for own, other in factors:
            other.copy_(own)
    x = torch.randn(12, 3, 16, dtype=torch.float64, requires_grad=True)
    y, expected = ours(x, language_runs(langs, [3] * 12)), theirs(x, adapter_names=langs)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(y.square().sum(), [x, *(own for own, _ in factors)])
    for a, b in zip(gradients, torch.autograd.grad(expected.square().sum(), [x, *(p for _, p in factors)])):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# Training steps


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """Encoder and LLM of a tiny size."""
    return tuple(map(str, tiny.make_pretrained(tmp_path_factory.mktemp("pretrained"))))


@pytest.fixture
def alike(names):
    """Models of one set of weights: ours, with padded rows, and as a user would write it; and a batch for them."""
    model = train.random_model(names, 2, "zipper_soft")
    parts = (model.encoder, model.projector, model.llm, model.tokenizer, model.language_embeddings)
    kinds = (train.Packed, train.PaddedRows, train.AsAUserWouldWriteIt)
    batch = train.synthetic_batch(cost.Shape.of_model(model, 2), "Common Voice", num_rows=3, tokens_per_row=192)
    return [kind(*parts).eval() for kind in kinds], batch


def test_padded_rows_have_the_loss_of_packed_rows(alike):
    (packed, padded, _), batch = alike
    assert len({len(x) for x in batch.features}) > 2
    assert padded(batch).item() == pytest.approx(packed(batch).item(), rel=1e-5)


def test_the_users_loss_is_ours_of_utterances_that_last_30_s(alike):
    (packed, _, users), batch = alike
    longer = [train._to_30s(x, 3000) for x in batch.features]
    expected = packed(dataclasses.replace(batch, features=longer)).item()
    assert users(batch).item() == pytest.approx(expected, rel=1e-5)
    assert users(batch).item() != pytest.approx(packed(batch).item(), rel=1e-4)


def test_the_users_encoder_is_ours_with_padding_to_30_s(alike):
    """Of which ours gives back the frames of speech alone."""
    (model, *_), batch = alike
    model.encoder.pad_to_30s = True
    ours, lengths = model.encoder(batch.features, batch.langs)
    mel = torch.stack([train._to_30s(x, 3000).T for x in batch.features])
    with batch_languages(batch.langs):
        theirs = AudioEncoder.forward(model.encoder, mel)
    torch.testing.assert_close(ours, torch.cat([x[:n] for x, n in zip(theirs, lengths)]), rtol=0, atol=1e-5)


def test_a_synthetic_batch_has_full_rows_of_every_language():
    shape = dataclasses.replace(cost.Shape.of(tiny_settings(), 1), vocab_size=9)
    batch = train.synthetic_batch(shape, "MLS", num_rows=24, tokens_per_row=1024)
    assert len(set(batch.langs)) == 12 and batch.langs == sorted(batch.langs)
    assert 0.9 < batch.num_tokens / (24 * 1024) <= 1
    assert batch.audio_s / len(batch.ids) == pytest.approx(15, rel=0.05)
    assert {x.shape[1] for x in batch.features} == {80}
    with pytest.raises(UserError, match="--tokens-per-row"):
        train.synthetic_batch(shape, "MLS", num_rows=1, tokens_per_row=100)


def tiny_settings():
    return train.settings(("tiny", "Qwen/Qwen3-0.6B"), 1, "vanilla")


def test_time_is_given_to_the_part_that_took_it(names, monkeypatch):
    """By a clock that only these layers move: in the encoder 1 s in each pass, and so on."""
    now = [0.0]

    def takes(seconds):
        def hook(*_):
            now[0] += seconds

        return hook

    monkeypatch.setattr(timing, "clock", lambda: now[0])
    model = train.random_model(names, 2, "vanilla")
    batch = train.synthetic_batch(cost.Shape.of_model(model, 2), "Common Voice", num_rows=1, tokens_per_row=192)
    case = train.Case(train.Packed, model, batch, None)
    model = case.engine.module
    seconds = {model.encoder.blocks[0].mlp[0]: 1, model.projector.linear: 2, model.llm.model.layers[1]: 4}
    for module, duration in {**seconds, model.llm.lm_head: 8}.items():
        module.register_forward_hook(takes(duration))
        module.register_full_backward_hook(takes(duration))
    monkeypatch.setattr(case.engine, "step", takes(10))
    assert case.shares() == {part: round(s / 40, 3) for part, s in zip(train.PARTS, (0, 2, 4, 8, 16, 10), strict=True)}


def test_training_steps_are_measured(names, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "mini", names)
    monkeypatch.setattr(timing, "peak_flops", lambda device, dtype: 1e9)
    path, threads = tmp_path / "bench.json", torch.get_num_threads()
    options = ["--rows", "2", "--rounds", "1", "--threads", "1", "--json", str(path)]
    try:
        assert cli.main(["bench", "train", *options, "--method", "zipper_soft"]) == 0
    finally:
        torch.set_num_threads(threads)
    found = json.loads(path.read_text())
    rows = {row["case"]: row for row in found["rows"]}
    assert list(rows) == [train.PADDED, train.USER, "zipper_soft"] and rows["zipper_soft"]["ratio"] == 1
    assert all(sum(row[part] for part in train.PARTS) == pytest.approx(1, abs=0.01) for row in rows.values())
    ours = rows["zipper_soft"]
    users = rows[train.USER]  # credited with the same useful work
    assert ours["MFU"] / users["MFU"] == pytest.approx(ours["tokens/s"] / users["tokens/s"], rel=0.02)
    assert ours["tokens/s"] / ours["audio s/s"] == pytest.approx(
        18.5, rel=0.2
    )  # 12.5 of speech, 3.5 of text, the prompt
    verdicts = [target["verdict"] for target in found["targets"]]
    assert verdicts[3:] == ["not measured"] * 3 and "not measured" not in verdicts[:3]
    llm = {name: row["ms"] * (row["LLM"] + row["loss"]) for name, row in rows.items()}
    assert found["targets"][2]["value"] == pytest.approx(llm[train.PADDED] / llm["zipper_soft"], rel=1e-2)
    assert f"| {train.USER} |" in capsys.readouterr().out


# Decoding


def transcribed(names, max_tokens_per_batch):
    """Ten utterances of fixed output lengths in batches, and the transcriber."""
    model = train.random_model(names, 2, "zipper_soft").merged("ar")
    transcriber = decode.fixed_length(model, max_tokens_per_batch)
    listed = decode.synthetic(model, "Common Voice", 10)
    return decode.Case(transcriber, listed, 30.0)


def ids_said(case, monkeypatch):
    """The tokens of each utterance, longest first."""
    said, read = [], case.transcriber._read
    monkeypatch.setattr(case.transcriber, "_read", lambda ids, *rest: said.append(ids) or read(ids, *rest))
    case.step()
    return said


def test_each_utterance_takes_its_fixed_number_of_tokens_in_any_batch(names, monkeypatch):
    cases = [transcribed(names, size) for size in (1, 500, 9999)]
    assert len(cases[0].todo) == 10 > len(cases[1].todo) > len(cases[2].todo)
    alone, some, together = (ids_said(case, monkeypatch) for case in cases)
    listed = [utterance for batch in cases[2].todo for utterance in batch]
    assert [len(ids) for ids in together] == [max(1, math.ceil(3.5 * u.duration_s)) for u in listed]
    assert alone == some == together


def test_the_time_of_decoding_is_given_to_the_part_that_took_it(names, monkeypatch):
    """By a clock that only these layers move."""
    now, case = [0.0], transcribed(names, 9999)

    def takes(seconds):
        def hook(*_):
            now[0] += seconds

        return hook

    monkeypatch.setattr(generate, "clock", lambda: now[0])
    model = case.transcriber.model
    model.encoder.blocks[0].mlp[0].register_forward_hook(takes(3))
    model.projector.linear.register_forward_hook(takes(4))
    model.llm.model.layers[1].register_forward_hook(takes(5))
    monkeypatch.setattr(case.transcriber, "_text", lambda ids: takes(1)() or "")
    case.step()
    steps = [max(math.ceil(3.5 * u.duration_s) for u in batch) - 1 for batch in case.todo]
    n = len(steps)
    assert case.seconds == [generate.Seconds(encoder_s=7 * n, prefill_s=5 * n, step_s=5 * sum(steps), detokenise_s=10)]


def test_decoding_is_measured(names, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "mini", names)
    path, threads = tmp_path / "bench.json", torch.get_num_threads()
    options = ["--utterances", "6", "--rounds", "1", "--threads", "1", "--batch-tokens", "16384", "400"]
    try:
        assert cli.main(["bench", "decode", *options, "--json", str(path)]) == 0
    finally:
        torch.set_num_threads(threads)
    found = json.loads(path.read_text())
    ways = [(row["case"], row["batch tokens"]) for row in found["rows"]]
    assert ways == [("merged", 16384), ("merged", 400), ("unmerged", 16384), ("one by one", None)]
    rows = found["rows"]
    batches = [row["batches"] for row in rows]
    assert batches[0] == batches[2] < batches[1] < batches[3] == 6 and rows[0]["ratio"] == 1
    for row in rows:
        assert sum(row[part] for part in ("encoder", "prefill", "step", "detokenise")) == pytest.approx(1, abs=0.01)
        assert row["s"] * row["RTFx"] == pytest.approx(rows[0]["s"] * rows[0]["RTFx"], rel=0.02)  # the same audio
    values = [target["value"] for target in found["targets"]]
    assert values == [rows[2]["ratio"], rows[3]["ratio"], None]
    assert "RTFx" in capsys.readouterr().out


def test_the_peak_is_that_of_the_fastest_product(monkeypatch):
    monkeypatch.setattr(
        timing, "interleave", lambda steps, **_: {"": [(step(), 2.0)[1] for step in steps.values()] + [1.0]}
    )
    assert timing.peak_flops("cpu", torch.float32) == 2 * 2048**3

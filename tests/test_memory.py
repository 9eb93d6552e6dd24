"""Recomputed activations change no number; the heaviest batch is tried first, and tells how many rows fit."""

from types import SimpleNamespace

import pytest
import tiny_recipe
import torch
from torch import distributed, nn

from zipperasr import files
from zipperasr.adapters import adapted_layers
from zipperasr.cli import recipe as recipes
from zipperasr.cli.main import main
from zipperasr.data.packing import PackingSettings, make_batch, pack, tokenize
from zipperasr.data.utterances import load_utterances
from zipperasr.errors import UserError
from zipperasr.model import EncoderSettings, checkpoint
from zipperasr.model import encoder as encoder_module
from zipperasr.model.recompute import chosen, recompute
from zipperasr.training import checkpoints, runs
from zipperasr.training.memory import GIB, Trial, peak_bytes


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny_recipe.make(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def model(recipe):
    torch.manual_seed(0)
    whole = recipes.load(recipe.conf)
    model = checkpoint.build(whole.model, stage=2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model.train()


@pytest.fixture(scope="module")
def examples(recipe, model):
    whole = recipes.load(recipe.conf)
    utterances = load_utterances(recipe.data, "all", "train", None, whole.data.features)
    return tokenize(utterances, model.tokenizer, PackingSettings(max_tokens_per_row=96))


def passes(model, batch):
    """Loss and gradients."""
    model.zero_grad()
    loss = model(batch).loss_sum
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("encoder", "llm"), [(0.5, 0), (1, 0), (0, 0.5), (0, 1), (1, 1)])
def test_recomputed_blocks_run_twice_and_change_no_number(model, examples, monkeypatch, encoder, llm):
    batch, counts = make_batch([examples[:5]]), {"encoder": 0, "llm": 0}
    block, layer = encoder_module._block, type(model.llm.model.layers[0].mlp)

    def counted(*args):
        counts["encoder"] += 1
        return block(*args)

    mlp = layer.forward

    def counted_mlp(self, x):
        counts["llm"] += 1
        return mlp(self, x)

    recompute(model, encoder=0, llm=0)
    loss, gradients = passes(model, batch)
    monkeypatch.setattr(encoder_module, "_block", counted)
    monkeypatch.setattr(layer, "forward", counted_mlp)
    recompute(model, encoder=encoder, llm=llm)
    again, same = passes(model, batch)
    recompute(model, encoder=0, llm=0)
    assert counts == {"encoder": 2 + 2 * encoder, "llm": 2 + 2 * llm}
    assert torch.equal(loss, again) and gradients.keys() == same.keys()
    assert all(torch.equal(gradients[name], same[name]) for name in gradients)


def test_the_recomputed_blocks_are_spread_evenly():
    assert chosen(32, 0) == frozenset() and chosen(32, 1) == frozenset(range(32))
    assert sorted(chosen(8, 0.5)) == [1, 3, 5, 7] and sorted(chosen(28, 0.25)) == [3, 7, 11, 15, 19, 23, 27]
    for share in (0.1, 0.3, 0.6, 0.9):
        assert len(chosen(32, share)) == int(32 * share)


class FakeTrial(Trial):
    """Takes 100 bytes and `per_row` for each row; more than `capacity` rows do not fit at all."""

    def __init__(self, per_row=10.0, capacity=10**9, num_rows=100):
        self.per_row, self.capacity, self.rows, self.tried = per_row, capacity, [[]] * num_rows, []

    def peak(self, num_rows):
        self.tried.append(num_rows)
        return 100 + self.per_row * num_rows if num_rows <= self.capacity else None


@pytest.mark.parametrize(
    ("trial", "limit", "rows"),
    [
        (FakeTrial(), 250, 15),
        (FakeTrial(), 10**9, 100),  # all that there are
        (FakeTrial(), 50, 1),  # what does not fit is said by `check`
        (FakeTrial(capacity=12), 10**9, 12),
        (FakeTrial(capacity=1), 10**9, 1),
        (FakeTrial(num_rows=1), 10**9, 1),
    ],
)
def test_the_most_rows_that_fit_are_found_in_few_trials(trial, limit, rows):
    assert trial.largest(limit) == rows and len(trial.tried) < 30


@pytest.fixture
def alone(monkeypatch):
    """This process is the only rank."""
    monkeypatch.setattr(distributed, "all_reduce", lambda *args: None)


def trial_of(model, examples, context="full"):
    engine = SimpleNamespace(module=model, device=torch.device("cpu"))
    rows = pack(examples, max_tokens=96, seed=0)
    return Trial(engine, examples, rows, EncoderSettings(pretrained="", context=context)), rows


@pytest.mark.parametrize("context", ["full", "chunked"])
def test_the_heaviest_rows_are_tried_and_nothing_is_left_behind(model, examples, alone, context):
    trial, rows = trial_of(model, examples, context)
    model.zero_grad()
    said = trial.check(3)
    frames = sorted((sum(examples[i].utterance.num_frames for i in row) for row in rows), reverse=True)
    assert said.startswith(f"heaviest batch (3 rows, {sum(frames[:3]) / 100:,.0f} s of audio, ")
    assert all(p.grad is None for p in model.parameters())


def test_flylora_counts_no_load_in_a_trial(recipe, examples, alone):
    whole = recipes.load(recipe.conf, overrides=["model.adapter.method=flylora", "model.adapter.flylora.top_k=3"])
    model = checkpoint.build(whole.model, stage=2)
    trial_of(model, examples)[0].peak(2)
    assert not any(layer.load.any() for layer in adapted_layers(model.encoder).values())


def test_a_batch_that_does_not_fit_names_the_settings_to_change(model, examples, alone, monkeypatch):
    trial, _ = trial_of(model, examples, "chunked")

    def out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "forward", out_of_memory)
    said = r"heaviest batch \(4 rows, .*tokens\) does not fit into .* GiB of this GPU; set training.stage2.recom"
    with pytest.raises(UserError, match=rf"{said}.* lower data.packing.rows_per_batch.chunked and raise accumulation"):
        trial.check(4)
    assert trial.largest(10**12) == 1


def test_the_peak_of_a_process_is_that_of_what_it_calls():
    kept = torch.ones(16 * 2**20)  # 64 MiB
    small, large = (peak_bytes(lambda n=n: torch.ones(n * 2**28), kept.device) for n in (0, 1))
    assert (large - small) / GIB == pytest.approx(1, abs=0.1)


def test_automatic_rows_are_kept_for_the_life_of_a_run(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(Trial, "largest", lambda trial: 3)
    args = recipe.train(1, tmp_path, "data.packing.rows_per_batch.full=auto", "training.stage1.max_steps=4")
    assert main(args) == 0
    assert files.read_json(tmp_path / runs.FINISHED)["rows_per_batch"] == 3
    (tmp_path / runs.FINISHED).unlink()
    (tmp_path / "checkpoints/step-4" / checkpoints.OPTIMIZER).write_bytes(b"")
    assert checkpoints.newest(tmp_path).rows_per_batch == 3
    monkeypatch.setattr(Trial, "largest", lambda trial: pytest.fail("a run that goes on keeps its rows"))
    main(args)


def test_recomputation_may_change_when_a_run_goes_on_and_changes_nothing(recipe, tmp_path):
    ends = []
    for name, shares in (("kept", (0, 0)), ("made_again", (1, 0.5))):
        more = [f"training.stage1.recompute_{part}={share}" for part, share in zip(("encoder", "llm"), shares)]
        assert main(recipe.train(1, tmp_path / name, *more, "training.stage1.max_steps=3")) == 0
        ends.append(checkpoint.read_weights(runs.final_weights(tmp_path / name), ""))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    swapped = recipe.train(1, tmp_path / "kept", "training.stage1.recompute_llm=1", "training.stage1.max_steps=3")
    assert main(swapped) == 0

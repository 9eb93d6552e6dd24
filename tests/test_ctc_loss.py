"""CTC as a second loss on the encoder: what it adds, what it leaves alone, and the aligner that a run ends with."""

import json

import pytest
import tiny_recipe
import torch
from safetensors.torch import load_file
from test_resume import ends_alike, train_elsewhere
from torch import nn

from zipperasr import files
from zipperasr.cli import recipe as recipes
from zipperasr.cli.main import main
from zipperasr.data.packing import Batch, PackingSettings, RowsPerBatch, make_batch, tokenize
from zipperasr.data.utterances import load_utterances
from zipperasr.model import checkpoint, checkpoints_by_step
from zipperasr.model.aligner import Aligner
from zipperasr.model.ctc import CtcHead, Units, load_trained_head
from zipperasr.training import StageSettings, aligner, runs
from zipperasr.training.trainer import Trainer

WEIGHT = 0.3


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny_recipe.make(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def whole(recipe):
    return recipes.load(recipe.conf)


def on(stage, *more, weight=WEIGHT):
    """Overrides that switch CTC on, and further ones of the same stage."""
    return [f"training.stage{stage}.{text}" for text in (f"ctc_weight={weight}", *more)]


@pytest.fixture(scope="module")
def stage1(recipe, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("exp") / "stage1_full"
    assert main(recipe.train(1, run_dir, *on(1, "max_steps=3"))) == 0
    return run_dir


def make_trainer(recipe, whole, run_dir, *, rows=2, accumulation=1, weight=WEIGHT, model=None):
    """A trainer of stage 2; some of its utterances are too short for their characters."""
    torch.manual_seed(0)
    model = model or checkpoint.build(whole.model, 2)
    packing = PackingSettings(max_tokens_per_row=96, rows_per_batch=RowsPerBatch(full=rows))
    train, dev = (
        tokenize(load_utterances(recipe.data, "all", part, None, whole.data.features), model.tokenizer, packing)
        for part in ("train", "dev")
    )
    if weight and not model.ctc:
        checkpoint.add_ctc(model, Units.of(x.utterance.text for x in train))
    settings = StageSettings(
        setting="all", num_workers=0, lr=1e-3, max_steps=4, accumulation=accumulation, ctc_weight=weight,
        max_grad_norm=1e9,
    )  # fmt: skip
    return Trainer(
        model, train=train, dev=dev, settings=settings, packing=packing, encoder=whole.model.encoder, run_dir=run_dir
    )


def examples_of(trainer, step=0):
    slots = [trainer.plan.slot_rows(step, slot) for slot in range(trainer.plan.num_slots)]
    return [trainer.train[i] for rows in slots for row in rows for i in row]


def plain_ctc(model, examples):
    """The CTC loss summed over utterances, and the number of their units: torch's own module on one at a time."""
    total, num_units = 0.0, 0
    for x in examples:
        ids = torch.tensor(model.units.encode(x.utterance.text))
        frames, _ = model.encoder([x.utterance.features()], [x.utterance.lang])
        hidden = nn.functional.layer_norm(frames, frames.shape[1:], model.ctc.norm.weight, model.ctc.norm.bias)
        log_probs = (hidden @ model.ctc.linear.weight.T + model.ctc.linear.bias).log_softmax(-1)
        loss = nn.CTCLoss(reduction="sum")(log_probs[:, None], ids[None], [len(log_probs)], [len(ids)])
        if loss.isfinite():  # infinite where there is no path
            total, num_units = total + loss, num_units + len(ids)
    return total, num_units


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("rows", "accumulation"), [(4, 1), (1, 4)])
def test_the_gradient_is_that_of_the_token_mean_and_the_weighted_unit_mean(
    recipe, whole, tmp_path, monkeypatch, rows, accumulation
):
    trainer = make_trainer(recipe, whole, tmp_path, rows=rows, accumulation=accumulation)
    model, examples = trainer.engine.module, examples_of(trainer)
    seen = {}
    scale = trainer._scale_gradients

    def kept(factor, resting):
        scale(factor, resting=resting)
        seen.update(gradients(model))

    monkeypatch.setattr(trainer, "_scale_gradients", kept)
    with torch.no_grad():
        nn.init.normal_(model.ctc.linear.weight, std=0.3)
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    _, row = trainer._step(trainer._batches(range(1)))

    model.load_state_dict(state, strict=False)
    for p in model.parameters():
        p.grad = None
    output = model(make_batch([[x] for x in examples]))
    total, num_units = plain_ctc(model, examples)
    assert 0 < num_units < sum(len(model.units.encode(x.utterance.text)) for x in examples), "some should be too short"
    (output.loss_sum / output.num_tokens + WEIGHT * total / num_units).backward()
    assert row["ctc_loss"] == pytest.approx(total.item() / num_units, rel=1e-5)
    assert row["loss"] == pytest.approx(output.loss_sum.item() / output.num_tokens, rel=1e-5)
    expected = gradients(model)
    assert expected.keys() <= seen.keys() and any(name.startswith("ctc.") for name in expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(seen[name], gradient, rtol=1e-3, atol=2e-5, msg=name)


def test_with_weight_0_there_is_no_head_and_nothing_else_changes(recipe, whole, tmp_path):
    """A head that a run of weight 0 is not given is the only difference that a tiny weight makes."""
    assert main(recipe.train(1, tmp_path / "off", "training.stage1.max_steps=2")) == 0
    assert main(recipe.train(1, tmp_path / "on", *on(1, "max_steps=2", weight=1e-30))) == 0
    off, also = (load_file(runs.final_weights(tmp_path / name)) for name in ("off", "on"))
    assert {name for name in also if name not in off} == {f"ctc.{n}" for n in CtcHead(1, 1).state_dict()}
    assert not any(name.startswith("ctc") for name in off)
    for name in off:
        torch.testing.assert_close(off[name], also[name], rtol=0, atol=1e-6, msg=name)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("off", "on")
    ]
    assert [row["loss"] for row in logs[0]] == pytest.approx([row["loss"] for row in logs[1]], abs=1e-6)
    assert not any("ctc_loss" in key for row in logs[0] for key in row)
    assert all("ctc_loss" in row for row in logs[1]) and "dev_ctc_loss" in logs[1][-1]
    assert not (tmp_path / "off" / "aligner").exists() and not (tmp_path / "off" / "units.json").exists()


def test_an_utterance_s_loss_does_not_depend_on_its_neighbours(recipe, whole, tmp_path):
    trainer = make_trainer(recipe, whole, tmp_path)
    model, units = trainer.engine.module.eval(), trainer.units
    examples = sorted(trainer.train[:12], key=lambda x: x.utterance.lang)
    with torch.no_grad():
        together = model(make_batch([[x] for x in examples], ctc_targets=units.targets)).utt_ctc
        alone = [model(make_batch([[x]], ctc_targets=units.targets)).utt_ctc[0] for x in examples]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-5, atol=1e-5)


def stopped(*_):
    raise KeyboardInterrupt


def test_a_killed_run_ends_as_an_uninterrupted_one_with_an_aligner(recipe, stage1, tmp_path, monkeypatch, capsys):
    more = ["--init", str(stage1), *on(2, "max_steps=6")]
    assert main(recipe.train(2, tmp_path / "whole", *more)) == 0
    step = Trainer._step

    def interrupted(trainer, batches):
        return stopped() if trainer.state.step == 3 else step(trainer, batches)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", interrupted)
        assert main(recipe.train(2, tmp_path / "again", *more)) == 130
    with monkeypatch.context() as patched:  # and once more, when it lacks nothing but its aligner
        patched.setattr(aligner, "save_head", stopped)
        assert main(recipe.train(2, tmp_path / "again", *more)) == 130
    assert (tmp_path / "again" / runs.FINISHED).exists() and not list((tmp_path / "again").glob("aligner/*.json"))
    assert main(recipe.train(2, tmp_path / "again", *more)) == 0
    assert ends_alike(tmp_path / "whole", tmp_path / "again")
    names = {"aligner.safetensors", "units.json", "settings.json"}
    digests = [{name: files.sha256(tmp_path / run / "aligner" / name) for name in names} for run in ("whole", "again")]
    assert digests[0] == digests[1]
    capsys.readouterr()
    assert main(recipe.train(2, tmp_path / "again", *more)) == 0 and "trained already" in capsys.readouterr().out
    (tmp_path / "again" / "aligner" / "settings.json").write_text('{"weights": "of another run"}')
    assert main(recipe.train(2, tmp_path / "again", *more)) == 0
    assert files.sha256(tmp_path / "again" / "aligner" / "settings.json") == digests[0]["settings.json"]


def test_two_ranks_equal_one_that_accumulates(recipe, stage1, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["--init", str(stage1), *on(2, "max_steps=5", "save_every=50")]
    process = train_elsewhere(recipe.train(2, two, *more), num_ranks=2)
    assert main(recipe.train(2, one, *more, "training.stage2.accumulation=2")) == 0
    assert process.wait() == 0
    a, b = (load_file(runs.final_weights(run_dir)) for run_dir in (one, two))
    assert a.keys() == b.keys() and any(name.startswith("ctc.") for name in a)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=0, msg=name)
    settings = [files.read_json(run_dir / "aligner" / "settings.json") for run_dir in (one, two)]
    assert settings[0]["loss"] == pytest.approx(settings[1]["loss"], abs=1e-3)


def test_stage_2_takes_over_what_stage_1_has_learnt_of_the_characters_that_both_know(stage1, whole):
    init = stage1, runs.final_weights(stage1)
    theirs, known = load_trained_head(*init)
    units = Units(("a", "b", "ß", "ж"))
    assert {"a", "b"} <= set(known.characters) and not {"ß", "ж"} & set(known.characters)
    model, fresh = (checkpoint.build(whole.model, 2) for _ in range(2))
    for one, begin in ((model, init), (fresh, None)):
        torch.manual_seed(0)
        checkpoint.add_ctc(one, units, begin)
    at = [0, *(known.encode(c)[0] for c in "ab")]
    for name in ("weight", "bias"):
        own, old, new = (getattr(head.linear, name) for head in (model.ctc, theirs, fresh.ctc))
        assert torch.equal(own[:3], old[at]) and torch.equal(own[3:], new[3:])
    assert torch.equal(model.ctc.norm.weight, theirs.norm.weight) and model.ctc.linear.weight.requires_grad


def test_the_head_is_in_nobody_s_way(stage1, recipe, whole, capsys):
    """Whatever reads a run reads it without its head; only inspect and trainable.txt count it."""
    loaded = checkpoint.load_run(stage1, list(checkpoints_by_step(stage1)))
    assert loaded.ctc is None and not any(name.startswith("ctc") for name in loaded.state_dict())
    assert "ctc." in (stage1 / "trainable.txt").read_text()
    assert files.read_json(stage1 / "inspect.json")["parameters"]["by_part"]["ctc"] > 0
    batch = Batch(["a"], ["de"], [torch.randn(40, 80)], [[3]], [[4, 1]])
    assert loaded(batch).utt_ctc is None
    merged = checkpoint.build(whole.model, 2)
    checkpoint.add_ctc(merged, Units(("a",)))
    assert merged.merged("de").ctc.linear.weight is merged.ctc.linear.weight


def test_the_aligner_of_a_run_is_its_head_calibrated_on_its_data(stage1):
    saved, loaded = files.read_json(stage1 / "aligner" / "settings.json"), Aligner.load(stage1)
    weights = runs.final_weights(stage1)
    stored = load_file(weights)
    assert all(torch.equal(t, stored[f"ctc.{name}"]) for name, t in loaded.head.state_dict().items())
    assert loaded.step == saved["step"] == 3 and saved["weights"] == files.sha256(weights)
    assert saved["trained_on"] == ["all"] and saved["langs"] == ["de", "en", "th"]
    assert saved["settings"]["ctc_weight"] == WEIGHT and loaded.early_s == saved["early_s"] != 0
    logged = [json.loads(line)["ctc_loss"] for line in (stage1 / "log.jsonl").read_text().splitlines()]
    assert saved["loss"] == pytest.approx(logged[-1], abs=1e-4)

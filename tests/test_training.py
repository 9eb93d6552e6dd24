"""The training loop against a plain one, and what it does when something is wrong."""

import json
import math
import multiprocessing
import os
import signal
from collections import Counter

import pytest
import tiny_recipe
import torch
from safetensors.torch import load_file

from zipperasr import config, files, languages
from zipperasr.adapters import REGISTRY, adapted_layers, language_parameters
from zipperasr.cli import recipe as recipes
from zipperasr.cli.main import main
from zipperasr.data.packing import PackingSettings, Plan, RowsPerBatch, SamplingSettings, make_batch, pack, tokenize
from zipperasr.data.utterances import Utterance, load_utterances
from zipperasr.decoding.errors import count_errors
from zipperasr.decoding.generate import Transcriber
from zipperasr.decoding.worker import max_tokens
from zipperasr.errors import UserError
from zipperasr.model.checkpoint import build, load_run
from zipperasr.model.cost import Load, flops
from zipperasr.scoring.score import score
from zipperasr.training import StageSettings, runs
from zipperasr.training.engine import learning_rate, parameter_groups
from zipperasr.training.trainer import Trainer


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny_recipe.make(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def whole(recipe):
    return recipes.load(recipe.conf)


@pytest.fixture(scope="module")
def stage1(recipe, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("exp") / "stage1_full"
    assert main(recipe.train(1, run_dir, "training.stage1.max_steps=3")) == 0
    return run_dir


def make_trainer(
    recipe, whole, run_dir, *, stage=2, rows=2, packing=None, model=None, encoder=None, count_errors=None, **settings
):
    torch.manual_seed(0)
    model = model or build(whole.model, stage)
    packing = packing or PackingSettings(max_tokens_per_row=96, rows_per_batch=RowsPerBatch(full=rows, chunked=rows))
    train, dev = (
        tokenize(load_utterances(recipe.data, "all", part, None, whole.data.features), model.tokenizer, packing)
        for part in ("train", "dev")
    )
    return Trainer(
        model,
        train=train,
        dev=dev,
        settings=StageSettings(**{"setting": "all", "num_workers": 0, "lr": 1e-3, **settings}),
        packing=packing,
        encoder=encoder or whole.model.encoder,
        run_dir=run_dir,
        count_errors=count_errors,
    )


def read_log(run_dir):
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.engine.module.named_parameters() if p.requires_grad}


def assert_close(one, other, atol=1e-5):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def plain_training(trainer, num_steps):
    """AdamW on the mean loss over the tokens of each global batch, in ten lines and without DeepSpeed."""
    torch.manual_seed(0)
    model, settings = build(trainer.whole.model, 2), trainer.settings
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0)
    plan = Plan(pack(trainer.train, max_tokens=96, seed=0), 4, 1, 0)
    for step in range(num_steps):
        output = model(make_batch([[trainer.train[i] for i in row] for row in plan.slot_rows(step, 0)]))
        optimizer.param_groups[0]["lr"] = learning_rate(step, total_steps=num_steps, settings=settings)
        optimizer.zero_grad()
        (output.loss_sum / output.num_tokens).backward()
        own = {id(p) for ps in language_parameters(model).values() for p in ps}
        for p in parameters:  # a flat ZeRO partition has zeros where a parameter was not reached; languages rest
            p.grad = torch.zeros_like(p) if p.grad is None and id(p) not in own else p.grad
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("rows", "accumulation"), [(4, 1), (2, 2)])
def test_training_is_adamw_on_the_token_mean_of_the_global_batch(recipe, whole, tmp_path, rows, accumulation):
    trainer = make_trainer(recipe, whole, tmp_path, rows=rows, accumulation=accumulation, max_steps=7)
    trainer.whole = whole
    assert trainer.plan.steps_per_epoch < 7 and len(trainer.plan.rows) % 4, "it should meet a partial step"
    before = weights(trainer)
    trainer.run()
    after = weights(trainer)
    assert_close(after, plain_training(trainer, 7))
    assert max((after[name] - before[name]).abs().max() for name in before) > 2e-3


def optimizer_state(trainer):
    """{parameter group: copies of its flat weights, step and moments}."""
    optimizer = trainer.engine.optimizer.optimizer
    groups = [(group["lang"], group["params"][0]) for group in optimizer.param_groups]
    return {lang: [p.detach().clone(), *(optimizer.state[p][k].clone() for k in ("step", "exp_avg", "exp_avg_sq"))]
            for lang, p in groups}  # fmt: skip


def test_a_language_absent_from_a_step_is_left_alone_by_momentum_and_decay(recipe, whole, tmp_path):
    trainer = make_trainer(recipe, whole, tmp_path, rows=1, max_steps=9, weight_decay=0.1)
    assert len({group["lr_scale"] for group in trainer.engine.optimizer.param_groups}) == 1
    batches, seen = trainer._batches(range(9)), set()
    for _ in range(9):
        (batch,) = next(batches)
        before = optimizer_state(trainer)
        trainer._step(iter([[batch]]))
        after = optimizer_state(trainer)
        assert set(after) == {None, "de", "th"}
        for lang in after:
            same = [torch.equal(a, b) for a, b in zip(after[lang], before[lang], strict=True)]
            assert all(same) if lang and lang not in batch.langs else not any(same), (lang, batch.langs)
        seen |= set(batch.langs)
    assert seen == {"de", "en", "th"}


@pytest.mark.parametrize("method", REGISTRY)
def test_every_method_learns_and_goes_on_after_an_interruption(recipe, stage1, tmp_path, monkeypatch, method):
    adapter = [f"model.adapter.method={method}", "model.adapter.rank=8", "model.adapter.flylora.top_k=3"]
    more = ["--init", str(stage1), *adapter, "training.stage2.max_steps=6"]
    assert main(recipe.train(2, tmp_path / "whole", *more)) == 0
    step = Trainer._step

    def interrupted(trainer, batches):
        if trainer.state.step == 3:
            raise KeyboardInterrupt
        return step(trainer, batches)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", interrupted)
        assert main(recipe.train(2, tmp_path / "again", *more)) == 130
    assert main(recipe.train(2, tmp_path / "again", *more)) == 0
    ends = [load_file(runs.final_weights(tmp_path / name)) for name in ("whole", "again")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    adapted = {name: t for name, t in ends[0].items() if name.startswith("encoder.") and ".B" in name}
    assert all(t.any() for t in adapted.values())
    assert method != "flylora" or all(t.any() for name, t in ends[0].items() if name.endswith("bias_moves"))


def test_initial_b_begins_from_a_finished_zipper_run(recipe, stage1, tmp_path, capsys):
    source, more = tmp_path / "zipper_soft_full", ["--init", str(stage1), "training.stage2.max_steps=2"]
    begun = [*more, f"model.adapter.init_from={source}", "training.stage2.lr=1e-9"]
    assert main(recipe.train(2, tmp_path / "early", *begun)) == 1
    assert "zipper_soft_full: not a finished run" in capsys.readouterr().err
    assert main(recipe.train(2, source, *more)) == 0
    assert main(recipe.train(2, tmp_path / "initial_b", *begun)) == 0
    theirs, ours = (load_file(runs.final_weights(run)) for run in (source, tmp_path / "initial_b"))
    assert_close(*({n: t for n, t in w.items() if ".B_s" in n} for w in (theirs, ours)), atol=1e-7)
    assert "init_from" in files.read_json(tmp_path / "initial_b" / "inputs.json")


def test_the_rate_warms_up_linearly_and_falls_to_zero_along_a_cosine():
    settings = StageSettings(setting="all", lr=2.0, warmup_ratio=0.1)
    rates = [learning_rate(step, total_steps=100, settings=settings) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0 and rates[55] == pytest.approx(1.0) and 0 < rates[99] < 1e-2
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_longest_prefix_scales_the_rate_and_an_unknown_one_is_an_error(whole):
    model = build(whole.model, 2)
    scales = {"projector": 10, "encoder": 2, "encoder.blocks.1": 3}
    groups = parameter_groups(model, StageSettings(setting="all", lr_scale=scales))
    scale_of = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        expected = [v for k, v in scales.items() if name.startswith(k)][-1:] or [1.0]
        assert scale_of.get(id(parameter)) == (expected[0] if parameter.requires_grad else None), name
    with pytest.raises(
        UserError, match="no trainable parameter begins with 'decoder'; they begin with encoder, llm, proj"
    ):
        parameter_groups(model, StageSettings(setting="all", lr_scale={"decoder": 2}))
    with pytest.raises(UserError, match="begins with 'ctc'; .*leave it out where ctc_weight is 0"):
        parameter_groups(model, StageSettings(setting="all", lr_scale={"ctc": 2}))


def test_every_step_is_logged_with_its_loss_by_language(recipe, whole, tmp_path):
    trainer = make_trainer(recipe, whole, tmp_path, max_steps=5, dev_every=2)
    trainer.run()
    rows = read_log(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in rows if "dev_loss" in row] == [2, 4, 5]
    assert set(rows[1]["dev_loss_per_lang"]) == {"de", "en", "th"}
    for row in rows:
        assert min(row["loss_per_lang"].values()) <= row["loss"] <= max(row["loss_per_lang"].values())
        assert row["grad_norm"] > 0 and row["tokens_per_s"] > 0 and row["audio_s_per_s"] > 0
    assert list((tmp_path / "tensorboard").iterdir())


def test_dev_loss_is_the_token_mean_and_trains_nothing(recipe, whole, tmp_path):
    trainer = make_trainer(recipe, whole, tmp_path, max_steps=1)
    before, logged = weights(trainer), trainer.evaluate()
    assert_close(weights(trainer), before, atol=0)
    with torch.no_grad():
        output = trainer.engine.module(make_batch([[example] for example in trainer.dev]))
    assert logged["dev_loss"] == pytest.approx(output.loss_sum.item() / output.num_tokens, abs=1e-5)


def test_dev_errors_are_those_of_decoding_and_scoring_the_first_utterances(recipe, whole, tmp_path):
    said = {"de": "haus baum", "en": "one two three", "th": "สอง"}
    seen = []

    def count_errors(model, utterances):
        seen.extend(u.id for u in utterances)
        counts = Counter()
        for u in utterances:
            aligned = score({u.id: u.reference}, {u.id: said[u.lang]}, languages.get(u.lang))
            counts[u.lang] += aligned[0].counts.errors
        lengths = Counter({u.lang: 0 for u in utterances})
        for u in utterances:
            lengths[u.lang] += score({u.id: u.reference}, {}, languages.get(u.lang))[0].counts.ref_len
        return {lang: (counts[lang], lengths[lang]) for lang in lengths}

    trainer = make_trainer(recipe, whole, tmp_path, max_steps=2, dev_utts=2, count_errors=count_errors)
    trainer.run()
    of_lang = {lang: [x.utterance.id for x in trainer.dev if x.utterance.lang == lang] for lang in said}
    assert sorted(seen) == sorted(utt_id for ids in of_lang.values() for utt_id in ids[:2])
    row = read_log(tmp_path)[-1]
    assert row["dev_error"] == pytest.approx(sum(row["dev_error_per_lang"].values()) / 3)
    assert set(row["dev_error_per_lang"]) == {"de", "en", "th"}
    newest = files.read_json(tmp_path / "checkpoints/step-2/state.json")
    assert newest["dev"] == row["dev_error"]


def test_error_counts_in_training_are_those_of_the_decoder(recipe, whole, stage1):
    settings = {"encoder": whole.model.encoder, "decoding": whole.decoding, "profile": "whisper"}
    model, dev = load_run(stage1), load_utterances(recipe.data, "all", "dev", None, whole.data.features)
    counts = count_errors(model, dev, **settings)
    for lang, (errors, length) in counts.items():
        mine = [u for u in dev if u.lang == lang]
        hyps = {}
        for u in mine:  # one at a time
            speech = model.speech_embeddings([u.features()], [lang], 30)
            (hypothesis,) = Transcriber(model, whole.decoding)(speech, [lang], [max_tokens(u, whole.decoding)])
            hyps[u.id] = hypothesis.text
        aligned = [a.counts for a in score({u.id: u.reference for u in mine}, hyps, languages.get(lang))]
        assert (errors, length) == (sum(c.errors for c in aligned), sum(c.ref_len for c in aligned))
    assert set(counts) == {"de", "en", "th"}


def test_the_share_of_specific_ranks_is_logged_by_language(recipe, whole, tmp_path):
    trainer = make_trainer(recipe, whole, tmp_path, max_steps=2)
    layers = adapted_layers(trainer.engine.module.encoder).values()
    trainer.run()
    shares = read_log(tmp_path)[-1]["specific_share"]
    assert set(shares) == {"de", "th"}
    for lang, share in shares.items():
        each = torch.stack([layer.specific_share(lang) for layer in layers])
        assert share == pytest.approx(each.mean().item()) and 0.4 < share < 0.6


def test_a_rising_loss_is_said_once(recipe, whole, tmp_path, capsys):
    trainer = make_trainer(recipe, whole, tmp_path, max_steps=4)
    trainer.state.mean_loss, trainer.state.lowest_mean = 6.0, 3.0
    trainer.run()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ALARM")]
    assert len(said) == 1 and "step 1: the loss rises; its running mean is 6.0" in said[0]
    assert "(training.stage2.lr)" in said[0]


def test_languages_are_sampled_as_the_settings_say(recipe, whole, tmp_path, capsys):
    weights = {"de": 6, "en": 1, "th": 1}
    trainer = make_trainer(recipe, whole, tmp_path, rows=1, epochs=1, sampling={"weights": weights})
    steps, langs = trainer.plan.steps_per_epoch, Counter()
    for (batch,) in trainer._batches(range(steps)):
        langs.update(set(batch.langs))
    assert langs == SamplingSettings(weights=weights).quotas(Counter(trainer.plan.langs))
    trainer.run()
    assert "passes an epoch: de 2." in capsys.readouterr().out


def test_a_nan_in_the_features_stops_with_the_utterance(recipe, whole, tmp_path, monkeypatch):
    trainer = make_trainer(recipe, whole, tmp_path, max_steps=20)
    poisoned = trainer.train[trainer.plan.slot_rows(1, 0)[0][0]].utterance.id
    features = Utterance.features

    def with_nan(utterance):
        x = features(utterance).clone()
        x[len(x) // 2, 3] = math.nan if utterance.id == poisoned else x[len(x) // 2, 3]
        return x

    monkeypatch.setattr(Utterance, "features", with_nan)
    with pytest.raises(UserError, match=f"step 2: the loss is nan; its batch begins with {poisoned}"):
        trainer.run()


def test_useful_work_and_waiting_are_logged(recipe, whole, tmp_path):
    trainer = make_trainer(recipe, whole, tmp_path, max_steps=2)
    ((batch,),) = trainer._batches(range(1))
    expected = sum(flops(trainer.shape, Load.of(batch)).values())
    trainer.run()
    row = read_log(tmp_path)[0]
    elapsed_s = batch.num_tokens / row["tokens_per_s"]
    assert row["tflops"] == pytest.approx(expected / elapsed_s / 1e12) and 0 < row["waited_for_data"] < 1


def test_chunk_durations_are_drawn_per_step_from_the_seed(recipe, whole, tmp_path):
    encoder = whole.model.encoder.model_copy(update={"context": "chunked", "chunk_durations_s": (0.1, 0.2, 0.4)})
    drawn = []
    for folder in ("a", "b"):
        make_trainer(recipe, whole, tmp_path / folder, encoder=encoder, max_steps=8).run()
        drawn.append([row["chunk_s"] for row in read_log(tmp_path / folder)])
    assert drawn[0] == drawn[1] and set(drawn[0]) == {0.1, 0.2, 0.4}


def test_the_trainable_list_is_saved(stage1):
    summary, *lines = (stage1 / "trainable.txt").read_text().splitlines()
    saved = load_file(stage1 / "checkpoints/step-3/trainable.safetensors")
    assert [line.partition(" ")[0] for line in lines] and {line.partition(" ")[0] for line in lines} == set(saved)
    assert f"{sum(t.numel() for t in saved.values()):,}" in summary
    assert files.read_json(stage1 / "train.json")["num_trainable"] == sum(t.numel() for t in saved.values())


def test_others_may_read_all_that_a_run_writes(stage1):
    modes = {path.name: path.stat().st_mode & 0o777 for path in stage1.rglob("*") if path.is_file()}
    assert "trainable.safetensors" in modes
    assert set(modes.values()) == {modes["config.yaml"]}


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_with_its_utterances_and_saves_nothing(recipe, whole, tmp_path, poison):
    trainer = make_trainer(recipe, whole, tmp_path, max_steps=20)
    poisoned = trainer.train[trainer.plan.slot_rows(2, 0)[0][0]].utterance.id

    class Poisoned(torch.nn.Module):
        def forward(self, batch, chunk_s):
            factor = torch.tensor([poison if utt_id == poisoned else 1.0 for utt_id in batch.ids])
            output = model(batch, chunk_s)
            return output._replace(loss_sum=output.loss_sum * factor.sum(), utt_loss=output.utt_loss * factor)

    model, trainer.engine.module.forward = trainer.engine.module.forward, None
    trainer.engine.module.forward = Poisoned().forward
    with pytest.raises(UserError, match=rf"step 3: the loss is {poison}; its batch begins with {poisoned}"):
        trainer.run()
    bad = json.loads((tmp_path / "bad_batch.json").read_text())
    assert bad["step"] == 3 and bad["utterances"][0]["id"] == poisoned and len(bad["utterances"]) > 1
    assert not list((tmp_path / "checkpoints").glob("*")) and not (tmp_path / "train.json").exists()


def test_an_exploding_loss_stops(recipe, whole, tmp_path):
    trainer = make_trainer(recipe, whole, tmp_path, max_steps=20, max_loss_ratio=1.02)
    trainer.state.mean_loss = 2.0
    with pytest.raises(UserError, match=r"step 1: the loss is \d\S*, over 1.02 times its running mean 2"):
        trainer.run()


def test_a_gradient_that_is_not_finite_stops(recipe, whole, tmp_path):
    trainer = make_trainer(recipe, whole, tmp_path, max_steps=3)
    trainer.parameters[0].register_hook(lambda grad: grad * math.nan)
    before = weights(trainer)
    with pytest.raises(UserError, match="step 1: a gradient is not finite; its batch begins with"):
        trainer.run()
    assert_close(weights(trainer), before, atol=0)


def test_an_error_in_the_model_is_raised_as_it_is(recipe, whole, tmp_path):
    trainer = make_trainer(recipe, whole, tmp_path, max_steps=3)
    for example in trainer.train:
        example.target[:] = [10**6]
    with pytest.raises(IndexError):
        trainer.run()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_ends_the_workers(recipe, whole, tmp_path, number):
    trainer = make_trainer(recipe, whole, tmp_path, max_steps=6, num_workers=2)
    handler = signal.getsignal(number)
    load = trainer._batches
    trainer._batches = lambda steps: ((i == 2 and os.kill(os.getpid(), number)) or b for i, b in enumerate(load(steps)))
    with pytest.raises(UserError, match="stopped, saved at step"):
        trainer.run()
    assert signal.getsignal(number) is handler and not multiprocessing.active_children()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-3"]


def test_a_finished_run_is_skipped_and_another_configuration_refused(recipe, stage1, capsys):
    before = (stage1 / "train.json").stat().st_mtime_ns
    assert main(recipe.train(1, stage1, "training.stage1.max_steps=3")) == 0
    assert "trained already" in capsys.readouterr().out and (stage1 / "train.json").stat().st_mtime_ns == before
    assert main(recipe.train(1, stage1, "training.stage1.max_steps=3", "training.stage1.lr=0.5")) == 1
    assert "training.stage1.lr (0.001 there, 0.5 asked); choose another --exp-dir" in capsys.readouterr().err


def test_what_is_not_learnt_from_may_change(recipe, stage1):
    free = ["training.stage1.save_every=9", "decoding.beam=1", "training.stage2.lr=0.5"]
    assert main(recipe.train(1, stage1, "training.stage1.max_steps=3", *free)) == 0
    assert config.load(stage1 / "config.yaml", recipes.Config).training.stage2.lr == 0.5


def test_changed_lists_are_refused(recipe, stage1, capsys):
    sums = recipe.data / "lists" / "all" / "SHA256SUMS"
    text = sums.read_text()
    try:
        sums.write_text(text[::-1])
        assert main(recipe.train(1, stage1, "training.stage1.max_steps=3")) == 1
    finally:
        sums.write_text(text)
    assert "what it was trained from has changed since (lists)" in capsys.readouterr().err


def test_stage_2_begins_from_the_weights_of_stage_1(recipe, stage1, tmp_path):
    run_dir = tmp_path / "zipper_soft_full"
    assert main(recipe.train(2, run_dir, "--init", str(stage1), "training.stage2.max_steps=1")) == 0
    link, source = run_dir / "init/trainable.safetensors", stage1 / "checkpoints/step-3/trainable.safetensors"
    assert link.read_bytes() == source.read_bytes() and runs.final_weights(stage1) == source
    stage1_names, stage2_names = set(load_file(source)), set(load_file(runs.final_weights(run_dir)))
    assert "encoder.conv1.weight" in stage1_names - stage2_names


def test_stage_2_needs_a_finished_stage_1(recipe, tmp_path, capsys):
    assert main(recipe.train(2, tmp_path / "run", "--init", str(tmp_path / "nothing"))) == 1
    assert "nothing: not a finished run" in capsys.readouterr().err
    assert main(recipe.train(2, tmp_path / "run")) == 1
    assert "give its directory with --init" in capsys.readouterr().err


def test_what_is_not_trained_is_saved_as_it_was_before_the_engine_rounded_it(recipe, tmp_path):
    whole = recipes.load(recipe.conf, overrides=["model.adapter.method=flylora", "model.adapter.flylora.top_k=3"])
    trainer = make_trainer(recipe, whole, tmp_path, max_steps=2)
    layers = adapted_layers(trainer.engine.module.encoder)
    before = {f"encoder.{name}.A": layer.A.clone() for name, layer in layers.items()}
    for layer in layers.values():
        layer.A.copy_(layer.A.bfloat16())  # as on a GPU
    trainer.run()
    saved = load_file(tmp_path / "checkpoints/step-2/trainable.safetensors")
    assert all(torch.equal(saved[name], A) for name, A in before.items())
    assert all(saved[name.removesuffix("A") + "bias_moves"].any() for name in before)


def test_two_runs_do_not_share_a_directory(recipe, tmp_path, capsys):
    with files.lock(tmp_path):
        assert main(recipe.train(1, tmp_path)) == 1
    assert "another run is writing here" in capsys.readouterr().err

"""A language joins a trained run: its own parameters are trained, and nothing else differs by a bit."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import tiny_recipe
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity

from zipperasr import config, files
from zipperasr.adapters import REGISTRY
from zipperasr.adapters.extend import extended
from zipperasr.cli import recipe as recipes
from zipperasr.cli.main import main
from zipperasr.data import lists
from zipperasr.data.packing import make_batch, tokenize
from zipperasr.data.utterances import load_utterances
from zipperasr.model import checkpoints_by_step
from zipperasr.model.checkpoint import load_run
from zipperasr.training import runs
from zipperasr.training.add_language import build_with_language
from zipperasr.training.process import ALONE

BASES = {
    "zipper_soft": [],
    "zipper_hard": ["training.stage2.seed=1"],  # by chance, every layer's router then gives English a rank of its own
    "zipper_static": [],
    "independent": [],
    "learned": ["model.adapter.zipper.signal=learned"],
    "shared": ["model.adapter.zipper.signal=learned", "model.adapter.zipper.router=shared"],
    "onehot": ["model.adapter.zipper.signal=onehot"],
    "vanilla": [],
    "flylora": ["model.adapter.flylora.top_k=2"],
    "zipper_hard_all_shared": ["model.adapter.zipper.tau=1"],
}
"""Runs on German and Thai: a method, or a name for zipper_soft with other settings."""
BANKED = pytest.mark.parametrize("name", ["zipper_soft", "zipper_hard", "zipper_static", "independent", "learned"])
SHORT = ["training.stage2.max_steps=4", "training.stage2.lr=0.01"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The tiny recipe with settings that train German and Thai, English alone, and English beside German."""
    recipe = tiny_recipe.make(tmp_path_factory.mktemp("recipe"), num_utts=6)
    tree = yaml.safe_load(recipe.conf.read_text(encoding="utf-8"))
    for setting, langs in {"base": ["de", "th"], "add_en": ["en"], "mixed": ["en", "de"]}.items():
        tree["data"]["lists"]["settings"][setting] = {
            part: {f"noise_{lang}_{part}": None for lang in langs} for part in ("train", "dev")
        }
    tree["training"]["stage2"] |= {"setting": "base", "max_steps": 2}
    recipe.conf.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    lists.write(recipe.data, recipes.load(recipe.conf).data.lists)
    return recipe


@pytest.fixture(scope="module")
def base(recipe, tmp_path_factory):
    """base(name) is the finished run of BASES, trained when it is first asked for."""
    exp = tmp_path_factory.mktemp("exp")
    assert main(recipe.train(1, exp / "stage1", "training.stage1.max_steps=1")) == 0

    def train(name):
        method = name.removesuffix("_all_shared")
        method = method if method in REGISTRY else "zipper_soft"
        more = ["--init", str(exp / "stage1"), f"model.adapter.method={method}", *BASES[name]]
        if not (exp / name / runs.FINISHED).is_file():
            assert main(recipe.train(2, exp / name, *more)) == 0
        return exp / name

    return train


@pytest.fixture(scope="module")
def added(recipe, base, tmp_path_factory):
    """zipper_soft with English."""
    run_dir = tmp_path_factory.mktemp("exp") / "zipper_soft_en"
    assert main(add(recipe, base("zipper_soft"), run_dir)) == 0
    return run_dir


def add(recipe, base_dir, run_dir, *more, lang="en", setting="add_en"):
    args = ["add-language", "--run-dir", run_dir, "--base", base_dir, "--lang", lang, "--setting", setting]
    return list(map(str, [*args, "--data-dir", recipe.data, *SHORT, *more]))


def refused(capsys, args):
    """What is said instead, in one line."""
    assert main(args) == 1
    *_, said = capsys.readouterr().err.splitlines()
    assert said.startswith("zipperasr: error: ")
    return said


def load_settings(run_dir):
    return config.load(run_dir / "config.yaml", recipes.Config).model


def tensors_of(run_dir):
    return load_file(runs.final_weights(run_dir))


def examples_of(recipe, model, setting, part):
    whole = recipes.load(recipe.conf)
    utterances = load_utterances(recipe.data, setting, part, None, whole.data.features)
    return tokenize(utterances, model.tokenizer, whole.data.packing)


@torch.no_grad()
def speech_of(model, examples):
    return model.speech_embeddings([x.utterance.features() for x in examples], [x.utterance.lang for x in examples])


@torch.no_grad()
def loss_of(model, examples):
    output = model(make_batch([[example] for example in examples]))
    return output.loss_sum.item() / output.num_tokens


@BANKED
def test_what_is_the_new_languages_own_is_trained_and_nothing_else_differs(recipe, base, tmp_path, capsys, name):
    run_dir = tmp_path / "run"
    assert main(add(recipe, base(name), run_dir)) == 0
    assert "2 other languages: outputs bit-identical (6 utterances, " in capsys.readouterr().out
    before, after = tensors_of(base(name)), tensors_of(run_dir)
    own = after.keys() - before.keys()
    assert all(tensor.equal(after[key]) for key, tensor in before.items())
    assert {key.rpartition(".")[2] for key in own} == {"en"}
    per_layer = 2 if name == "independent" else 1
    assert len(own) == 12 * per_layer + (name == "learned")
    first, _ = build_with_language(load_settings(run_dir), base(name), "en", "nearest")
    moved = {key for key, p in first.named_parameters() if key in own and not p.equal(after[key])}
    assert moved == own and {key for key, p in first.named_parameters() if p.requires_grad} == own
    listed = (run_dir / "trainable.txt").read_text().splitlines()[1:]
    assert {line.partition(" ")[0] for line in listed} == own


def test_it_is_a_run_like_any_other(recipe, base, added):
    whole, was = (config.load(folder / "config.yaml", recipes.Config) for folder in (added, base("zipper_soft")))
    assert whole.model.adapter.langs == ("de", "th", "en") and whole.training.stage2.setting == "add_en"
    same = whole.model.model_copy(update={"adapter": was.model.adapter})
    assert same == was.model and whole.data == was.data and whole.stage == 2
    assert (added / "init/trainable.safetensors").samefile(base("zipper_soft") / "init/trainable.safetensors")
    assert files.read_json(added / "train.json")["step"] == 4 and "en" in files.read_json(
        added / "language_embeddings.json"
    )
    model, old = load_run(added), load_run(base("zipper_soft"))
    for lang in ("de", "th"):
        examples = [x for x in examples_of(recipe, model, "base", "train") if x.utterance.lang == lang]
        assert all(map(torch.equal, speech_of(model, examples), speech_of(old, examples)))
    examples = examples_of(recipe, model, "add_en", "train")
    assert not any(map(torch.equal, speech_of(model, examples), speech_of(old, examples)))
    assert loss_of(model, examples) < loss_of(old, examples)


@BANKED
@pytest.mark.parametrize("begin", ["nearest", "mean", "zero"])
def test_a_language_begins_where_it_is_said_to(base, name, begin):
    settings = load_settings(base(name))
    settings = settings.model_copy(update={"adapter": extended(settings.adapter, "en")})
    model, near = build_with_language(settings, base(name), "en", begin)
    e = model.language_embeddings
    assert near == (
        max(("de", "th"), key=lambda x: cosine_similarity(e["en"], e[x], dim=0)) if begin == "nearest" else None
    )
    before = tensors_of(base(name))
    own = {key: p.detach() for key, p in model.named_parameters() if key.endswith(".en")}
    assert own
    for key, tensor in own.items():
        de, th = (before[f"{key.removesuffix('en')}{lang}"] for lang in ("de", "th"))
        assert not de.equal(th)
        if begin == "zero":  # A and a learned embedding are drawn, as in a fresh adapter
            assert ("B_spec" in key) == (not tensor.any())
        else:
            torch.testing.assert_close(tensor, {"de": de, "th": th}.get(near, (de + th) / 2), rtol=0, atol=1e-8)


def test_a_router_for_all_layers_and_its_signal_are_extended_once(recipe, base, tmp_path):
    assert main(add(recipe, base("shared"), tmp_path)) == 0
    own = tensors_of(tmp_path).keys() - tensors_of(base("shared")).keys()
    assert len([key for key in own if "signal" in key]) == 1 and len(own) == 13


@pytest.mark.parametrize(
    ("name", "more", "reason"),
    [
        ("vanilla", {}, "vanilla has no banks per language.*independent, zipper_static, zipper_hard, zipper_soft"),
        ("flylora", {}, "flylora has no banks per language"),
        ("onehot", {}, "signal onehot has a place for each language.*zipper.signal whisper or learned"),
        ("zipper_soft", {"lang": "th"}, "'th' has a bank already; the languages with one are de, th"),
        ("zipper_soft", {"lang": "xx"}, "unknown language 'xx'"),
        ("zipper_soft", {"setting": "add_xx"}, "no setting 'add_xx' .add_en, all, base, mixed.; add it to.*--conf"),
        (
            "zipper_soft",
            {"setting": "mixed"},
            "'mixed' trains on noise_de_train; give one that trains on .* 'en' alone",
        ),
    ],
)
def test_what_cannot_be_added_is_refused_with_the_reason(recipe, base, tmp_path, capsys, name, more, reason):
    assert re.search(reason, refused(capsys, add(recipe, base(name), tmp_path / "run", **more)))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_language_that_the_routers_give_nothing_is_refused(recipe, base, tmp_path, capsys):
    said = refused(capsys, add(recipe, base("zipper_hard_all_shared"), tmp_path / "run"))
    assert "the routers give 'en' no rank of its own in any layer" in said


def test_overrides_of_the_model_are_refused(recipe, base, tmp_path, capsys):
    said = refused(capsys, add(recipe, base("zipper_soft"), tmp_path, "model.adapter.rank=8"))
    assert "'model.adapter.rank=8': the model is the base's" in said


def test_a_base_that_is_no_finished_stage_2_is_refused(recipe, base, tmp_path, capsys):
    assert "not a finished run" in refused(capsys, add(recipe, tmp_path / "nothing", tmp_path / "run"))
    stage1 = base("zipper_soft").parent / "stage1"
    assert "a stage-1 run has no adapters" in refused(capsys, add(recipe, stage1, tmp_path / "run"))


def test_a_language_that_whisper_does_not_know_needs_another_signal_and_begin(recipe, base, tmp_path, capsys):
    """As if the Whisper had no token for English."""
    config_path = recipe.conf.parent / "whisper" / "config.json"
    whole = files.read_json(config_path)
    tokens = {lang: token for lang, token in whole["language_tokens"].items() if lang != "en"}
    files.write_json(config_path, whole | {"language_tokens": tokens})
    try:
        said = refused(capsys, add(recipe, base("zipper_soft"), tmp_path / "whisper"))
        assert "no language embedding of en" in said
        said = refused(capsys, add(recipe, base("learned"), tmp_path / "learned"))
        assert "Whisper has no embedding of 'en', so none is nearest; begin from mean or zero" in said
        assert main(add(recipe, base("learned"), tmp_path / "mean", "--bank", "mean")) == 0
    finally:
        files.write_json(config_path, whole)


def test_a_setting_may_come_from_another_configuration(recipe, base, tmp_path, capsys):
    conf = tmp_path / "more.yaml"
    parts = {"train": {"noise_en_train": None}}
    conf.write_text(yaml.safe_dump({"base": str(recipe.conf), "data": {"lists": {"settings": {"later": parts}}}}))
    lists.write(recipe.data, recipes.load(conf).data.lists)
    args = add(recipe, base("zipper_soft"), tmp_path / "run", setting="later")
    assert "no setting 'later'" in refused(capsys, args)
    assert main([*args, "--conf", str(conf)]) == 0
    whole = recipes.load(tmp_path / "run" / "config.yaml")
    assert list(whole.data.lists.settings["later"].train) == ["noise_en_train"] and "base" in whole.data.lists.settings


def test_a_finished_run_is_proved_again_and_another_begin_refused(recipe, base, added, capsys):
    before = (added / "train.json").stat().st_mtime_ns
    (added / "identity.json").unlink()
    assert main(add(recipe, base("zipper_soft"), added)) == 0
    said = capsys.readouterr().out
    assert "trained already" in said and "2 other languages: outputs bit-identical (6 utterances, " in said
    assert (added / "train.json").stat().st_mtime_ns == before
    proof = files.read_json(added / "identity.json")
    assert proof["differing"] == [] and proof["languages"] == 2 and set(proof["ids"]) == {"de", "th"}
    assert all(name.endswith(".en") for name in proof["added"]) and len(proof["added"]) == 12
    assert "has changed since (bank)" in refused(capsys, add(recipe, base("zipper_soft"), added, "--bank", "zero"))


def test_a_changed_bit_is_found(recipe, base, tmp_path, capsys):
    args = add(recipe, base("zipper_soft"), tmp_path)
    assert main(args) == 0
    path, tensors = runs.final_weights(tmp_path), tensors_of(tmp_path)
    name = "encoder.blocks.0.attn.query.B_spec.de"
    tensors[name].view(-1)[0] = torch.nextafter(tensors[name].view(-1)[0], torch.tensor(1.0))
    save_file(tensors, path)
    assert f"not what it was in {base('zipper_soft')}: {name}" in refused(capsys, args)
    assert name in files.read_json(tmp_path / "identity.json")["differing"]


def elsewhere(args):
    environment = {name: value for name, value in os.environ.items() if name not in ALONE}
    return subprocess.Popen(
        [sys.executable, "-m", "zipperasr.cli", *args], env=environment, stdout=subprocess.PIPE, text=True
    )


def test_a_killed_run_goes_on_and_ends_as_an_uninterrupted_one(recipe, base, tmp_path):
    more = ["training.stage2.max_steps=30", "training.stage2.save_every=2"]
    killed = add(recipe, base("zipper_soft"), tmp_path / "killed", *more)
    process = elsewhere(killed)
    while not checkpoints_by_step(tmp_path / "killed"):
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "killed" / runs.FINISHED).exists()
    assert main(killed) == 0 and main(add(recipe, base("zipper_soft"), tmp_path / "whole", *more)) == 0
    one, other = tensors_of(tmp_path / "killed"), tensors_of(tmp_path / "whole")
    assert one.keys() == other.keys() and all(tensor.equal(other[name]) for name, tensor in one.items())
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 31))


def test_two_ranks_add_a_language_and_prove_it_once(recipe, base, tmp_path):
    process = elsewhere(add(recipe, base("zipper_soft"), tmp_path, "--ranks", "2"))
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and said.count("outputs bit-identical") == said.count("begins with the bank of") == 1

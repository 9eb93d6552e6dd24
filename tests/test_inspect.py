"""What `inspect` says of a checkpoint is what its tensors say, counted and computed by hand."""

import json
import math
import shutil
from collections import Counter

import pytest
import tiny
import torch
from safetensors.torch import load_file

from zipperasr import files
from zipperasr.adapters import REGISTRY, AdapterSettings
from zipperasr.cli import main as cli
from zipperasr.errors import UserError
from zipperasr.model import WEIGHTS, checkpoint
from zipperasr.model.encoder import ADAPTED
from zipperasr.model.inspect import inspect
from zipperasr.training.runs import write_language_embeddings

LANGS = ("de", "th")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return tiny.make_pretrained(tmp_path_factory.mktemp("pretrained"))


@pytest.fixture(scope="module")
def make(paths, tmp_path_factory):
    """Writes a run with random values as training writes it; the pretrained models are named, but not there."""

    def make(method="zipper_soft", **zipper):
        settings = tiny.settings(paths, method=method, rank=8)
        if method:
            adapter = AdapterSettings.model_validate(settings.adapter.model_dump() | {"zipper": zipper})
            settings = settings.model_copy(update={"adapter": adapter})
        model = tiny.trained(settings, 2 if method else 1)
        gone = {part: getattr(settings, part).model_copy(update={"pretrained": "gone"}) for part in ("encoder", "llm")}
        run_dir = tmp_path_factory.mktemp("run")
        tiny.save_run(run_dir, settings.model_copy(update=gone), 2 if method else 1, model)
        write_language_embeddings(run_dir, model.language_embeddings)
        return run_dir

    return make


def tensors_of(run_dir):
    return load_file(run_dir / "checkpoints" / "step-1" / WEIGHTS)


@pytest.mark.parametrize("method", REGISTRY)
def test_parameters_are_those_of_the_file(make, method):
    run_dir = make(method)
    counts, parts, owners = inspect(run_dir)["parameters"], Counter(), Counter()
    for name, tensor in tensors_of(run_dir).items():
        parts[name.split(".")[0]] += math.prod(tensor.shape)
        if name.startswith("encoder."):
            owners[next((lang for lang in LANGS if name.endswith(f".{lang}")), "shared")] += math.prod(tensor.shape)
    assert counts == {"total": parts.total(), "by_part": parts, "adapter": owners}
    assert (set(owners) > set(LANGS)) == method.startswith("zipper") and owners.total() == parts["encoder"]


def test_a_stage_1_run_has_no_adapter(make):
    run_dir = make(None)
    figures = inspect(run_dir)
    assert figures["stage"] == 1 and figures.keys() == {"checkpoint", "stage", "parameters"}
    assert figures["parameters"]["total"] == sum(t.numel() for t in tensors_of(run_dir).values())


def signal_of(run_dir, tensors, signal, lang):
    if signal == "whisper":
        return torch.tensor(files.read_json(run_dir / "language_embeddings.json")[lang]).double()
    if signal == "onehot":
        return torch.eye(len(LANGS), dtype=torch.float64)[LANGS.index(lang)]
    return tensors[f"encoder.blocks.0.attn.query.router.signal.embeddings.{lang}"].double()


def p_by_hand(tensors, layer, e):
    """sigmoid(W LN(e) + b) in float64, every step written out."""
    norm_w, norm_b, W, b = (
        tensors[f"encoder.{layer}.router.{name}"].double()
        for name in ("norm.weight", "norm.bias", "linear.weight", "linear.bias")
    )
    normed = (e - e.mean()) / ((e - e.mean()).square().mean() + 1e-5).sqrt() * norm_w + norm_b
    return 1 / (1 + torch.exp(-(W @ normed + b)))


@pytest.mark.parametrize("router", ["per_layer", "shared"])
@pytest.mark.parametrize("signal", ["whisper", "learned", "onehot"])
@pytest.mark.parametrize("method", ["zipper_soft", "zipper_hard"])
def test_shares_are_those_of_the_equation(make, method, signal, router):
    torch.manual_seed(1)
    run_dir = make(method, signal=signal, router=router)
    tensors, share = tensors_of(run_dir), inspect(run_dir)["specific_share"]
    assert share.keys() == set(LANGS)
    for lang in LANGS:
        e = signal_of(run_dir, tensors, signal, lang)
        for block in range(2):
            layers = [f"blocks.{block}.{name}" if router == "per_layer" else "blocks.0.attn.query" for name in ADAPTED]
            p = torch.stack([p_by_hand(tensors, layer, e) for layer in layers])
            expected = p.mean() if method == "zipper_soft" else (p >= 0.5).double().mean()
            assert share[lang][block] == pytest.approx(expected.item(), abs=1e-6)
    if method == "zipper_soft":  # of a few ranks as many may be chosen for both
        assert share["de"] != share["th"]


def test_the_literal_reading_of_hard_is_the_other_side(make):
    torch.manual_seed(1)
    run_dir = make("zipper_hard", specific_where=0)
    tensors, share = tensors_of(run_dir), inspect(run_dir)["specific_share"]
    e = signal_of(run_dir, tensors, "whisper", "th")
    p = torch.stack([p_by_hand(tensors, f"blocks.1.{name}", e) for name in ADAPTED])
    assert share["th"][1] == pytest.approx((p < 0.5).double().mean().item(), abs=1e-6)


def test_the_run_itself_says_the_same(make, paths):
    run_dir = make()
    model = checkpoint.build(tiny.settings(paths, rank=8), 2)
    checkpoint.load_trainable(model, run_dir / "checkpoints" / "step-1", stage=2)
    share = inspect(run_dir)["specific_share"]["de"]
    for block, layers in enumerate(model.encoder.blocks):
        own = torch.stack([layers.get_submodule(name).specific_share("de") for name in ADAPTED])
        assert share[block] == pytest.approx(own.mean().item(), abs=1e-6)


@pytest.mark.parametrize("method", [m for m in REGISTRY if m not in ("zipper_soft", "zipper_hard")])
def test_methods_without_router_have_no_shares(make, method):
    assert "specific_share" not in inspect(make(method))


def test_the_command_prints_the_figures_and_writes_them(make, tmp_path, capsys):
    run_dir = make()
    folder = run_dir / "checkpoints" / "step-1"
    assert cli.main(["inspect", str(folder), "--json", str(tmp_path / "figures.json")]) == 0
    figures, printed = json.loads((tmp_path / "figures.json").read_text()), capsys.readouterr().out
    assert figures == inspect(run_dir) | {"checkpoint": str(folder)} == inspect(folder)
    share = figures["specific_share"]["th"]
    row = next(line.split() for line in printed.splitlines() if line.startswith("th "))
    assert row == ["th", *(f"{value:.2f}" for value in [sum(share) / 2, *share])]
    for text in ("stage 2", "zipper_soft, rank 8, alpha 16", "de th", f"{figures['parameters']['total']:,}"):
        assert text in printed


def test_what_is_not_there_or_broken_is_named(make, tmp_path):
    with pytest.raises(UserError, match="no complete checkpoint"):
        inspect(tmp_path)
    run_dir = make()
    shutil.copytree(run_dir, tmp_path / "run")
    (tmp_path / "run" / "language_embeddings.json").unlink()
    with pytest.raises(UserError, match=r"language_embeddings.json: no such file"):
        inspect(tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-1" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"trainable.safetensors: broken"):
        inspect(tmp_path / "run")

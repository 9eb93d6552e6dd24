"""Exported runs are what transformers and PEFT, which know nothing of this project, make of their folders."""

import json
import sys

import peft
import pytest
import soundfile
import tiny
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from zipperasr import files
from zipperasr.adapters import REGISTRY, method_class
from zipperasr.cli import main as cli
from zipperasr.errors import UserError
from zipperasr.model import checkpoint
from zipperasr.model.export import export
from zipperasr.model.projector import Projector
from zipperasr.model.whisper_io import HF_NAMES, hf_name

MERGEABLE = [method for method in REGISTRY if method_class(method).can_merge]
LANGS = ("de", "th")
WINDOW = 200  # feature frames


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return tiny.make_pretrained(tmp_path_factory.mktemp("pretrained"), n_audio_ctx=WINDOW // 2)


@pytest.fixture(scope="module")
def run_of(paths, tmp_path_factory):
    """Makes the run of a method (None: a stage-1 run), once: its directory and its model, all trained values random."""
    made = {}

    def make(method):
        if method not in made:
            made[method] = _run(paths, method, tmp_path_factory.mktemp(str(method)))
        return made[method]

    return make


def _run(paths, method, run_dir):
    torch.manual_seed(0)
    rank = 8 if method == "flylora" else 4
    settings = tiny.settings(paths, method=method, rank=rank)
    if method is None:
        model = _trained(settings, 1)
    else:
        checkpoint.save_trainable(_trained(tiny.settings(paths, method=None, rank=rank), 1), run_dir / "init")
        model = _trained(settings, 2, init=run_dir / "init")
    tiny.save_run(run_dir, settings, model.stage, model)
    return run_dir, model


def _trained(settings, stage, init=None):
    """Random values of the size that training leaves."""
    model = checkpoint.build(settings, stage)
    if init:
        checkpoint.load_trainable(model, init, stage=1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def exported(run_of, tmp_path_factory):
    """Exports a method's run for all its languages, once for each format and dtype: the folder and the report."""
    made = {}

    def make(method, format, dtype=torch.float32):
        key = (method, format, dtype)
        if key not in made:
            out = tmp_path_factory.mktemp("out") / "export"
            langs = LANGS if method is None else ["all"]
            made[key] = out, export(run_of(method)[0], out, langs, format=format, dtype=dtype)
        return made[key]

    return make


def features(seed=5):
    return torch.randn(WINDOW, 80, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def ours(model, lang):
    """The run's encoder frames of a whole window [T, D], and its logits on embeddings [1, 7, H]."""
    return model.encoder([features()], [lang])[0], model.llm(inputs_embeds=embeddings(model.llm)).logits


def embeddings(llm):
    return torch.randn(1, 7, llm.config.hidden_size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def frames_of(encoder):
    return encoder(features().T[None]).last_hidden_state[0]


@torch.no_grad()
def logits_of(llm):
    return llm(inputs_embeds=embeddings(llm)).logits


def assert_near(a, b, atol=1e-5):
    assert a.abs().max() > 0.1
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("method", MERGEABLE)
def test_peft_on_the_exported_base_is_the_run(run_of, exported, paths, method):
    folder, model = exported(method, "peft")[0], run_of(method)[1]
    base = WhisperEncoder.from_pretrained(folder / "encoder" / "base")
    encoder = peft.PeftModel.from_pretrained(base, folder / "encoder" / "de", adapter_name="de")
    encoder.load_adapter(folder / "encoder" / "th", adapter_name="th")
    for lang in LANGS:
        encoder.set_adapter(lang)
        assert_near(frames_of(encoder), ours(model, lang)[0])
    llm = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(paths.lm), folder / "llm")
    assert_near(logits_of(llm), ours(model, "de")[1])


@pytest.mark.parametrize("method", MERGEABLE)
def test_a_merged_export_is_the_run(run_of, exported, paths, method):
    folder, model = exported(method, "merged")[0], run_of(method)[1]
    for lang in LANGS:
        assert_near(frames_of(WhisperEncoder.from_pretrained(folder / "encoder" / lang)), ours(model, lang)[0])
    assert_near(logits_of(AutoModelForCausalLM.from_pretrained(folder / "llm")), ours(model, "de")[1])
    assert (folder / "llm" / "tokenizer.model").read_bytes() == (paths.lm / "tokenizer.model").read_bytes()


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_others_may_read_all_that_is_exported(exported, format):
    modes = {
        path.name: path.stat().st_mode & 0o777
        for path in exported("zipper_soft", format)[0].rglob("*")
        if path.is_file()
    }
    assert sum(name.endswith(".safetensors") for name in modes) >= 1
    assert set(modes.values()) == {modes["config.json"]}


@pytest.mark.parametrize("method", [m for m in MERGEABLE if m != "vanilla"])
def test_languages_differ(exported, method):
    de, th = (load_file(exported(method, "merged")[0] / "encoder" / lang / "model.safetensors") for lang in LANGS)
    assert (de["layers.0.fc1.weight"] - th["layers.0.fc1.weight"]).abs().max() > 0.01


def test_the_base_is_the_encoder_of_stage_1(run_of, exported):
    stage1 = load_file(run_of("zipper_soft")[0] / "init" / checkpoint.WEIGHTS)
    base = load_file(exported("zipper_soft", "peft")[0] / "encoder" / "base" / "model.safetensors")
    assert torch.equal(base["layers.1.self_attn.q_proj.weight"], stage1["encoder.blocks.1.attn.query.weight"])


def test_a_stage_1_run_has_encoders_without_adapters(run_of, exported):
    model = run_of(None)[1]
    folder, report = exported(None, "peft")
    assert sorted(p.name for p in (folder / "encoder").iterdir()) == ["base"]
    assert_near(frames_of(WhisperEncoder.from_pretrained(folder / "encoder" / "base")), ours(model, "th")[0])
    assert report["largest_difference"].keys() == set(LANGS)
    folder = exported(None, "merged")[0]
    assert_near(frames_of(WhisperEncoder.from_pretrained(folder / "encoder" / "th")), ours(model, "th")[0])


@pytest.mark.parametrize("part, first", [("encoder/th", "layers"), ("llm", "model.layers")])
def test_keys_and_configuration_are_pefts_own(exported, part, first):
    folder = exported("zipper_static", "peft")[0] / part
    names = load_file(folder / "adapter_model.safetensors").keys()
    assert f"base_model.model.{first}.0.self_attn.q_proj.lora_A.weight" in names
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in names)
    lora = peft.PeftConfig.from_pretrained(folder)
    assert (lora.peft_type, lora.r, lora.lora_alpha) == ("LORA", 4, 8)
    layer = "self_attn.k_proj fc2" if part != "llm" else "self_attn.k_proj mlp.down_proj"
    assert {name.rpartition(".")[2] for name in layer.split()} <= set(lora.target_modules)
    assert len(names) == 2 * len(lora.target_modules) * 2  # A and B in 2 layers


def test_the_projector_is_rebuilt_from_its_folder(run_of, exported):
    folder, model = exported("vanilla", "peft")[0] / "projector", run_of("vanilla")[1]
    sizes = files.read_json(folder / "config.json")
    projector = Projector(sizes["width"], sizes["hidden_size"], sizes["llm_width"])
    projector.load_state_dict(load_file(folder / "model.safetensors"))
    x = torch.randn(10, sizes["width"])
    assert torch.equal(projector(x, [10])[0], model.projector(x, [10])[0])


# Parity


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_parity_is_written_and_small_in_fp32(exported, format):
    folder, report = exported("zipper_hard", format)
    assert report == json.loads((folder / "parity.json").read_text())
    assert report["audio"] == "3 s of seeded noise" and report["steps"] == [1]
    for lang in LANGS:
        row = report["largest_difference"][lang]
        assert row["encoder"] < 1e-5 < row["encoder_scale"] and row["llm_logits"] < 1e-5 < row["llm_logits_scale"]


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_parity_in_bf16_tells_of_the_rounding(exported, format):
    folder, report = exported("zipper_soft", format, torch.bfloat16)
    row = report["largest_difference"]["th"]
    assert 1e-4 < row["encoder"] / row["encoder_scale"] < 0.1 and row["llm_logits"] > 1e-5
    weights = load_file(folder / "encoder" / ("base" if format == "peft" else "th") / "model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    assert report["dtype"] == "bfloat16"


def test_parity_sees_a_wrong_weight(run_of, tmp_path, monkeypatch):
    """The exported files are what is compared, and not the model that they were written from."""
    save = WhisperEncoder.save_pretrained

    def spoilt(self, folder):
        self.layer_norm.bias = nn.Parameter(self.layer_norm.bias + 1)
        save(self, folder)

    monkeypatch.setattr(WhisperEncoder, "save_pretrained", spoilt)
    report = export(run_of("vanilla")[0], tmp_path / "out", ["de"], format="merged")
    assert report["largest_difference"]["de"]["encoder"] == pytest.approx(1, abs=1e-3)


def test_parity_on_recordings_of_any_rate(run_of, tmp_path, capsys):
    """One shorter than the window and one longer, at two rates; also the command line."""
    for name, rate, duration_s in (("a.wav", 8000, 1.2), ("b.flac", 44100, 3)):
        noise = torch.randn(int(rate * duration_s), 2, generator=torch.Generator().manual_seed(0)) * 0.1
        soundfile.write(tmp_path / name, noise.numpy(), rate)
    audio = [str(tmp_path / name) for name in ("a.wav", "b.flac")]
    argv = ["export", "--run-dir", str(run_of("independent")[0]), "--lang", "th", "--format", "peft"]
    assert cli.main([*argv, "--out", str(tmp_path / "out"), "--audio", *audio]) == 0
    report = files.read_json(tmp_path / "out" / "parity.json")
    assert report["audio"] == audio and report["largest_difference"]["th"]["encoder"] < 1e-5
    assert sorted(p.name for p in (tmp_path / "out" / "encoder").iterdir()) == ["base", "th"]
    printed = capsys.readouterr().out
    assert "largest differences from the run in fp32 on 2 recordings" in printed and "\nth " in printed


# Refusals


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_flylora_is_refused_and_nothing_is_written(run_of, tmp_path, format):
    with pytest.raises(UserError, match="FlyLoRA chooses its ranks anew.*export another method"):
        export(run_of("flylora")[0], tmp_path / "out", ["all"], format=format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "method, langs, message",
    [
        ("zipper_soft", ["xx"], "xx"),
        ("vanilla", ["xx"], "xx"),
        (None, ["all"], "--lang all: the encoder of this run has no adapter with languages; name them"),
    ],
)
def test_languages_that_nothing_is_known_of_are_refused(run_of, tmp_path, method, langs, message):
    with pytest.raises(UserError, match=message):
        export(run_of(method)[0], tmp_path / "out", langs, format="peft")
    assert not list(tmp_path.iterdir())


def test_a_language_without_bank_is_served_as_unseen_says(run_of, tmp_path):
    run_dir, model = run_of("zipper_soft")
    export(run_dir, tmp_path / "out", ["ja"], format="merged")
    assert_near(frames_of(WhisperEncoder.from_pretrained(tmp_path / "out" / "encoder" / "ja")), ours(model, "ja")[0])


def test_an_export_is_never_overwritten(run_of, exported):
    folder, _ = exported("vanilla", "peft")
    before = sorted(path for path in folder.rglob("*"))
    with pytest.raises(UserError, match=f"{folder}: exists already; choose another --out or delete it"):
        export(run_of("zipper_soft")[0], folder, ["de"], format="peft")
    assert sorted(path for path in folder.rglob("*")) == before


def test_an_export_that_fails_leaves_nothing(run_of, tmp_path, monkeypatch):
    monkeypatch.setattr("zipperasr.model.export.parity", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(run_of("vanilla")[0], tmp_path / "out", ["de"], format="peft")
    assert not list(tmp_path.iterdir())


def test_audio_that_is_not_there_is_named(run_of, tmp_path):
    with pytest.raises(UserError, match="--audio: .*no.wav: no such file; give whole audio files"):
        export(run_of("vanilla")[0], tmp_path / "out", ["de"], format="peft", recordings=[tmp_path / "no.wav"])


def test_peft_that_is_not_installed_is_named(run_of, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="--format peft: PEFT is not installed; `pip install peft`"):
        export(run_of("vanilla")[0], tmp_path / "out", ["de"], format="peft")


# Names


def test_the_table_of_names_is_that_of_transformers_and_leads_back(run_of, exported):
    names = load_file(run_of(None)[0] / "checkpoints" / "step-1" / checkpoint.WEIGHTS)
    ours = {n.removeprefix("encoder.") for n in names if n.startswith("encoder.")} | {"positional_embedding"}
    theirs = load_file(exported(None, "peft")[0] / "encoder" / "base" / "model.safetensors").keys()
    assert {hf_name(name) for name in ours} == theirs
    for name in ours:
        back = hf_name(name)
        for left, right in HF_NAMES:
            back = back.replace(right, left)
        assert back == name

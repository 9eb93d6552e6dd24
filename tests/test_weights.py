"""Pretrained weights: Whisper in each of its forms is the same model, and what is not the right model is named."""

import hashlib
import re
import shutil
from fnmatch import fnmatch

import pytest
import tiny
import torch
import transformers
import whisper
from conftest import REPOSITORY
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import WhisperConfig, WhisperForConditionalGeneration
from whisper.model import ModelDimensions, Whisper
from whisper.tokenizer import get_tokenizer

from zipperasr import files
from zipperasr.cli.main import main
from zipperasr.data.packing import Batch
from zipperasr.data.tokenizer import load_tokenizer, stand_in_tokenizer
from zipperasr.errors import UserError
from zipperasr.languages import LANGUAGES
from zipperasr.model import LLMSettings, checkpoint
from zipperasr.model.encoder import SpeechEncoder
from zipperasr.model.llm_io import load_llm
from zipperasr.model.random_init import random_llm, random_whisper
from zipperasr.model.sizes import WHISPER
from zipperasr.model.whisper_io import load_whisper, save_whisper

BINS, FRAMES, WIDTH, VOCAB = 8, 40, 16, 51_866  # the vocabulary of large-v3


def randomised(model):
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def hf():
    """A Whisper of transformers."""
    torch.manual_seed(0)
    lengths = {"max_source_positions": FRAMES // 2, "max_target_positions": 10}
    config = WhisperConfig(
        vocab_size=VOCAB, d_model=WIDTH, num_mel_bins=BINS, encoder_layers=2, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, **lengths,
    )  # fmt: skip
    return randomised(WhisperForConditionalGeneration(config))


def as_openai(hf):
    """The same encoder and token embedding in openai-whisper's classes, module by module; the rest as it falls out."""
    dims = ModelDimensions(BINS, FRAMES // 2, WIDTH, 2, 2, VOCAB, 10, WIDTH, 2, 1)
    model, encoder = Whisper(dims), hf.model.encoder
    nn.init.zeros_(model.decoder.positional_embedding)
    pairs = [(getattr(model.encoder, name), getattr(encoder, name)) for name in ("conv1", "conv2")]
    pairs += [
        (model.encoder.ln_post, encoder.layer_norm),
        (model.decoder.token_embedding, hf.model.decoder.embed_tokens),
    ]
    for block, layer in zip(model.encoder.blocks, encoder.layers, strict=True):
        attn = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
        pairs += [(getattr(block.attn, a), getattr(layer.self_attn, b)) for a, b in attn.items()]
        pairs += [(block.attn_ln, layer.self_attn_layer_norm), (block.mlp_ln, layer.final_layer_norm)]
        pairs += [(block.mlp[0], layer.fc1), (block.mlp[2], layer.fc2)]
    for ours, theirs in pairs:
        ours.load_state_dict(theirs.state_dict())
    model.encoder.positional_embedding.copy_(encoder.embed_positions.weight.detach())
    return model


@pytest.fixture(scope="module")
def forms(hf, tmp_path_factory):
    """The same Whisper in every form, by name."""
    root = tmp_path_factory.mktemp("whisper")
    hf.save_pretrained(root / "transformers")
    hf.save_pretrained(root / "sharded", max_shard_size="1MB")
    assert len(list((root / "sharded").glob("*.safetensors"))) > 1
    hf.model.save_pretrained(root / "without a head")
    model = as_openai(hf)
    torch.save({"dims": vars(model.dims), "model_state_dict": model.state_dict()}, root / "openai.pt")
    tokens = get_tokenizer(True, num_languages=100)
    ids = {lang: tokens.to_language_token(lang) for lang in LANGUAGES}
    save_whisper(root / "ours", model, ids, dtype=torch.float32)
    return root


FORMS = ("transformers", "sharded", "without a head", "openai.pt", "ours")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_whisper_is_transformers_encoder_and_its_language_embeddings(hf, forms, form):
    encoder, embeddings = load_whisper(str(forms / form))
    x = torch.randn(2, FRAMES, BINS, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = hf.model.encoder(x.transpose(1, 2)).last_hidden_state
        frames, lengths = SpeechEncoder(encoder)(list(x), ["de", "th"])
    assert lengths == [FRAMES // 2] * 2
    torch.testing.assert_close(frames, expected.flatten(0, 1), rtol=1e-4, atol=1e-4)
    ids = {"de": 50261, "ar": 50272, "th": 50289, "vi": 50278}  # as in generation_config.json of large-v3
    for lang, token in ids.items():
        assert torch.equal(embeddings[lang], hf.model.decoder.embed_tokens.weight[token])
    assert set(LANGUAGES) <= set(embeddings)


@pytest.mark.parametrize("form", FORMS[1:])
def test_forms_agree_to_the_bit(forms, form):
    (one, vectors), (other, others) = load_whisper(str(forms / "transformers")), load_whisper(str(forms / form))
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in one.state_dict().items())
    assert all(torch.equal(t, vectors[lang]) for lang, t in others.items())


def test_whisper_is_read_as_it_was_written_to_the_rounding_of_its_dtype(hf, tmp_path):
    model = as_openai(hf)
    save_whisper(tmp_path, model, {"de": 3})
    encoder, embeddings = load_whisper(str(tmp_path))
    for name, tensor in encoder.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.encoder.state_dict()[name].half().float()), name
    assert embeddings.keys() == {"de"}
    assert torch.equal(embeddings["de"], model.decoder.token_embedding.weight[3].half().float())
    assert all(p.requires_grad for p in encoder.parameters())


def test_a_folder_of_transformers_says_itself_where_its_languages_are(hf, forms, tmp_path):
    folder = shutil.copytree(forms / "transformers", tmp_path / "other")
    files.write_json(folder / "generation_config.json", {"lang_to_id": {"<|de|>": 7, "<|haw|>": 9}})
    _, embeddings = load_whisper(str(folder))
    assert embeddings.keys() == {"de", "haw"}
    assert torch.equal(embeddings["de"], hf.model.decoder.embed_tokens.weight[7])


# Whisper's that are none


def changed_config(**changes):
    def damage(folder):
        path = folder / "config.json"
        files.write_json(path, {**files.read_json(path), **changes})

    return damage


def changed_tensors(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def with_languages(**tokens):
    return lambda folder: files.write_json(folder / "generation_config.json", {"lang_to_id": tokens})


Q, TABLE = "model.encoder.layers.1.self_attn.q_proj.weight", "model.decoder.embed_tokens.weight"


@pytest.mark.parametrize(
    "damage, message",
    [
        (changed_config(model_type="qwen3"), r"config.json: model_type is 'qwen3', not 'whisper'"),
        (changed_config(model_type="wav2vec2"), r"config.json: model_type is 'wav2vec2', not 'whisper'"),
        (changed_config(activation_function="relu"), r"activation_function is 'relu', not Whisper's 'gelu'"),
        (changed_config(d_model=32), r"tensor '\S+' has shape \[51866, 16\], but the model has \[51866, 32"),
        (changed_config(encoder_ffn_dim=32, encoder_layers=3), r"lacks 15 tensors, such as 'encoder.layers.2"),
        (changed_config(encoder_layers=1), r"has unknown 15 tensors, such as 'encoder.layers.1"),
        (changed_tensors(lambda t: t.pop(Q)), r"lacks 1 tensors, such as 'encoder.layers.1.self_attn.q_proj.weight'"),
        (changed_tensors(lambda t: t.pop(TABLE)), r"such as 'decoder.embed_tokens.weight'"),
        (changed_tensors(lambda t: t[Q].fill_(float("nan"))), r"q_proj.weight' holds NaN or infinity; fetch"),
        (lambda folder: (folder / "config.json").unlink(), r"no config.json; give a folder"),
        (lambda folder: files.write_json(folder / "config.json", {"model_type": "whisper"}), r"whole Whisper \('"),
        (truncated, r"model.safetensors: broken .*; fetch the model again"),
        (pickled, r"model.safetensors: no such file; .*pickled weights are not read, but transformers"),
        (with_languages(de=51_866), r"the token of 'de' is 51866, of 51866"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_whole_whisper_is_named_with_a_mend(forms, tmp_path, damage, message):
    folder = shutil.copytree(forms / "transformers", tmp_path / "damaged")
    damage(folder)
    with pytest.raises(UserError, match=re.escape(str(folder)) + ".*" + message):
        load_whisper(str(folder))


def test_a_shard_that_is_missing_is_named(forms, tmp_path):
    folder = shutil.copytree(forms / "sharded", tmp_path / "damaged")
    shard = min(folder.glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard}: no such file; fetch the model again"):
        load_whisper(str(folder))


@pytest.mark.parametrize(
    "content, message",
    [
        ({"state_dict": {}}, r"no model of openai-whisper \('dims'\); give"),
        (torch.zeros(3), r"no model of openai-whisper"),
        ({"dims": {"n_mels": 80}, "model_state_dict": {}}, r"no model of openai-whisper \('n_audio_ctx'\)"),
        (nn.Linear(1, 1), r"no model of openai-whisper \(.*weights_only"),
    ],
)
def test_a_file_that_holds_no_whisper_is_named(tmp_path, content, message):
    torch.save(content, tmp_path / "some.pt")
    with pytest.raises(UserError, match=f"some.pt: {message}"):
        load_whisper(str(tmp_path / "some.pt"))


def test_a_file_without_one_of_its_tensors_is_named(forms, tmp_path):
    content = torch.load(forms / "openai.pt", weights_only=True)
    del content["model_state_dict"]["encoder.ln_post.bias"]
    torch.save(content, tmp_path / "some.pt")
    with pytest.raises(UserError, match=r"some.pt: lacks 1 tensors, such as 'encoder.ln_post.bias'"):
        load_whisper(str(tmp_path / "some.pt"))


@pytest.mark.parametrize("is_right", [True, False])
def test_the_file_of_a_name_must_have_the_published_sha256(forms, tmp_path, monkeypatch, is_right):
    content = (forms / "openai.pt").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(whisper._MODELS, "tiny", f"http://127.0.0.1:9/{digest}/tiny.pt")
    (tmp_path / "whisper").mkdir()
    (tmp_path / "whisper" / "tiny.pt").write_bytes(content if is_right else content[:-1] + b"?")
    if is_right:
        assert load_whisper("tiny")[0].conv1.weight.shape == (WIDTH, BINS, 3)
    else:
        with pytest.raises(UserError, match=f"whisper/tiny.pt: expected sha256 {digest}, found [0-9a-f]{{64}}; get it"):
            load_whisper("tiny")


def test_of_a_model_of_the_hub_one_form_of_safetensors_is_fetched(forms, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda repo, **more: asked.update(more, repo=repo) or forms / "transformers",
    )
    encoder, _ = load_whisper("openai/whisper-large-v3")
    assert torch.equal(encoder.conv1.weight, load_whisper(str(forms / "openai.pt"))[0].conv1.weight)
    published = (
        "config.json generation_config.json model.safetensors model.safetensors.index.fp32.json tokenizer.json "
        "model.fp32-00001-of-00002.safetensors model-00001-of-00002.safetensors pytorch_model.bin flax_model.msgpack"
    ).split()
    fetched = [name for name in published if any(fnmatch(name, pattern) for pattern in asked["allow_patterns"])]
    assert asked["repo"] == "openai/whisper-large-v3"
    weights = [name for name in fetched if not name.endswith(".json")]
    assert weights == ["model.safetensors", "model-00001-of-00002.safetensors"]
    assert {"config.json", "generation_config.json", "tokenizer.json"} < set(fetched)


def test_a_model_that_the_hub_has_not_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"nobody/whisper-none: HF_HUB_OFFLINE is set"):
        load_whisper("nobody/whisper-none")


def test_a_name_that_nobody_knows_is_named_beside_those_that_are():
    with pytest.raises(UserError, match=r"'largest': .*a known name \(.*large-v3, .*or one such as openai/whisper"):
        load_whisper("largest")


# LLMs

SMALL = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
QWEN = {**SMALL, "num_key_value_heads": 1, "head_dim": 8}


@pytest.mark.parametrize(
    "kind, architecture, options, message",
    [
        ("Bert", "BertForMaskedLM", SMALL, "BertForMaskedLM is no decoder-only LLM"),
        ("Bart", "BartForConditionalGeneration", {}, "BartForConditionalGeneration is no decoder-only LLM"),
        ("T5", "T5ForConditionalGeneration", {}, "T5ForConditionalGeneration is no decoder-only LLM"),
        ("Whisper", "WhisperForConditionalGeneration", {}, "WhisperForConditionalGeneration is no decoder-only LLM"),
        ("Wav2Vec2", "Wav2Vec2ForCTC", {}, "Wav2Vec2ForCTC is no decoder-only LLM"),
        ("Qwen3", "Qwen3ForSequenceClassification", QWEN, "Qwen3ForSequenceClassification is no decoder-only LLM"),
        (
            "Qwen3",
            "Qwen3ForCausalLM",
            {**QWEN, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "some of its layers have sliding_attention, but packed rows need full_attention in every layer",
        ),
        ("Gemma3Text", "Gemma3ForCausalLM", {}, "some of its layers have sliding_attention"),
        ("Mistral", "MistralForCausalLM", {"sliding_window": 4096}, "some of its layers have sliding_attention"),
        ("Qwen3Next", "Qwen3NextForCausalLM", {}, "some of its layers have linear_attention"),
        ("Mpt", "MptForCausalLM", {}, "MptForCausalLM computes attention in a way of its own"),
        ("Qwen3", "Qwen3ForCausalLM", {**QWEN, "quantization_config": {"quant_method": "fp8"}}, "quantised"),
    ],
)
def test_an_llm_of_another_kind_is_refused_by_name(tmp_path, kind, architecture, options, message):
    config = getattr(transformers, f"{kind}Config")(**options)
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    for load in (load_llm, lambda settings: random_llm(settings, "cpu")):
        with pytest.raises(UserError, match=f"{tmp_path}': .*{message}.*choose another model.llm.pretrained"):
            load(LLMSettings(pretrained=str(tmp_path)))


@pytest.mark.parametrize("model_type", ["strange", "qwen3"])
def test_code_that_comes_with_an_llm_is_never_run(tmp_path, model_type):
    """One that transformers does not know is refused, another is loaded without it."""
    transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**QWEN)).save_pretrained(tmp_path)
    code = {"AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.Model"}
    changed_config(auto_map=code, model_type=model_type)(tmp_path)
    (tmp_path / "strange.py").write_text("raise SystemExit('it ran')")
    if model_type == "qwen3":
        assert load_llm(LLMSettings(pretrained=str(tmp_path))).config.model_type == "qwen3"
    else:
        with pytest.raises(UserError, match="it needs code of its own, which is never run"):
            load_llm(LLMSettings(pretrained=str(tmp_path)))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm")
    config = transformers.Qwen3Config(**QWEN, eos_token_id=1, tie_word_embeddings=False)
    randomised(transformers.Qwen3ForCausalLM(config)).save_pretrained(folder)
    return folder


def with_layers(number):
    return changed_config(num_hidden_layers=number, layer_types=["full_attention"] * number)


@pytest.mark.parametrize(
    "damage, message",
    [
        (truncated, r"incomplete metadata"),
        (pickled, r"no model.safetensors, and pickled weights are not read; load and save it with transformers"),
        (changed_tensors(lambda t: t.pop("lm_head.weight")), r"lacks 1 tensors, such as 'lm_head.weight'; .*again"),
        (with_layers(3), r"lacks 11 tensors, such as 'model.layers.2"),
        (with_layers(1), r"has unknown 11 tensors, such as 'model.layers.1"),
        (changed_config(intermediate_size=48), r"down_proj.weight' has shape \[16, 32\], but .* says \[16, 48\]"),
        (lambda folder: (folder / "config.json").unlink(), r"Unrecognized model"),
    ],
)  # fmt: skip
def test_an_llm_that_is_not_whole_is_named(qwen, tmp_path, damage, message):
    folder = shutil.copytree(qwen, tmp_path / "damaged")
    damage(folder)
    with pytest.raises(UserError, match=f"'{folder}': .*{message}"):
        load_llm(LLMSettings(pretrained=str(folder)))


def test_an_llm_whose_layers_have_other_names_is_named(tmp_path):
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=300)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"'{tmp_path}': .*q_proj.*; choose one with layers named so"):
        load_llm(LLMSettings(pretrained=str(tmp_path)))


def test_a_folder_with_an_llm_but_no_tokenizer_is_named(qwen):
    """transformers makes an empty tokenizer of it, for which every text is nothing."""
    with pytest.raises(UserError, match=f"{qwen}: no tokenizer found"):
        load_tokenizer(qwen)


# Without weights


def count(module):
    return sum(p.numel() for name, p in module.named_parameters() if not name.endswith((".A", ".B")))


@pytest.mark.parametrize(
    "name, millions",
    [("tiny", 8.2), ("base", 20.6), ("small", 88), ("medium", 307), ("large-v3", 637), ("large", 637), ("turbo", 637)],
)
def test_a_whisper_of_a_name_has_the_size_of_its_encoder(name, millions):
    encoder, _ = random_whisper(name, "meta")
    assert sum(t.numel() for t in encoder.state_dict().values()) / 1e6 == pytest.approx(millions, rel=0.005)


def test_names_of_the_hub_are_those_of_openai():
    for name, dims in {**WHISPER, "large": WHISPER["large-v1"]}.items():
        if "/" not in name and name not in ("turbo", "large-v1"):
            assert WHISPER[f"openai/whisper-{name}"] == dims
    ours = {name for name in WHISPER if "/" not in name}
    assert ours == {name for name in whisper.available_models() if not name.endswith(".en")}


@pytest.mark.parametrize(
    "name, parameters",
    [("0.6B", 596_049_920), ("1.7B", 1_720_574_976), ("4B", 4_022_468_096), ("8B", 8_190_735_360),
     ("14B", 14_768_307_200), ("32B", 32_762_123_264)],
)  # fmt: skip
def test_a_qwen3_of_a_name_has_its_published_number_of_parameters(name, parameters):
    llm = random_llm(LLMSettings(pretrained=f"Qwen/Qwen3-{name}"), "meta")
    assert count(llm) == parameters


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return tiny.make_pretrained(tmp_path_factory.mktemp("pretrained"))


def without_weights(paths, tmp_path, **more):
    """Settings with init: random, whose folders hold configurations alone, and the LLM's its tokenizer."""
    for kind, names in (("whisper", ["config.json"]), ("lm", ["config.json", "tokenizer.model"])):
        (tmp_path / kind).mkdir()
        for name in names:
            shutil.copy(getattr(paths, kind) / name, tmp_path / kind)
    settings = tiny.settings(tiny.Pretrained(tmp_path / "whisper", tmp_path / "lm"), **more)
    return settings.model_copy(update={"init": "random"})


@pytest.mark.parametrize("stage", [1, 2])
def test_random_weights_have_the_shapes_of_the_pretrained_ones(paths, tmp_path, stage):
    model = checkpoint.build(without_weights(paths, tmp_path), stage)
    expected = checkpoint.build(tiny.settings(paths), stage)
    shapes = [{name: (t.shape, t.dtype) for name, t in m.state_dict().items()} for m in (model, expected)]
    assert shapes[0] == shapes[1]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in expected.parameters()]
    assert model.tokenizer.encode("haus") == expected.tokenizer.encode("haus")
    assert set(expected.language_embeddings) <= set(model.language_embeddings)
    assert not model.training
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())


def test_what_is_frozen_is_the_same_every_time_and_the_seed_is_left_alone(paths, tmp_path):
    """So ranks and resumed runs agree, and decoding has the model that was trained."""
    settings, models = without_weights(paths, tmp_path), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(checkpoint.build(settings, 2))
    one, two = (m.state_dict() for m in models)
    differs = {name for name in one if not torch.equal(one[name], two[name])}
    trained = {name for name, p in models[0].named_parameters() if p.requires_grad}
    assert differs and differs <= trained
    embeddings = [m.language_embeddings["de"] for m in models]
    assert torch.equal(*embeddings) and embeddings[0].std() > 0.5


def test_a_random_model_of_a_size_by_name_can_be_trained(paths, tmp_path):
    settings = without_weights(paths, tmp_path)
    settings = settings.model_copy(update={"encoder": settings.encoder.model_copy(update={"pretrained": "tiny"})})
    model = checkpoint.build(settings, 2)
    ids = model.tokenizer.encode("haus baum")
    features = [torch.randn(60, 80), torch.randn(41, 80)]
    loss = model(Batch(["a", "b"], ["de", "th"], features, prompts=[[3], [4]], targets=[ids, ids])).loss_sum
    loss.backward()
    assert torch.isfinite(loss) and loss > 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "part, message",
    [
        ("encoder", r"model.encoder.pretrained 'huge': no size is known .*large-v3"),
        ("llm", r"model.llm.pretrained 'huge': no size is known .*Qwen/Qwen3-1.7B"),
    ],
)
def test_a_size_that_is_not_known_is_named_beside_those_that_are(paths, tmp_path, part, message):
    settings = without_weights(paths, tmp_path)
    of_part = getattr(settings, part).model_copy(update={"pretrained": "huge"})
    with pytest.raises(UserError, match=message):
        checkpoint.build(settings.model_copy(update={part: of_part}), 1)


def test_a_folder_that_is_no_whispers_has_no_random_one_either(paths):
    with pytest.raises(UserError, match=r"lm/config.json: not that of a Whisper, it lacks 'num_mel_bins'"):
        random_whisper(str(paths.lm), "cpu")


def test_the_name_of_an_llm_stands_for_a_tokenizer_of_bytes():
    tokenizer = stand_in_tokenizer("Qwen/Qwen3-1.7B")
    texts = [row.prompt for row in LANGUAGES.values()] + ["", "Zürich, 東京 - 7½ ☂ ЩЖ"]
    assert [tokenizer.decode([*ids, tokenizer.end_of_text]) for ids in tokenizer.encode_batch(texts)] == texts
    assert all(0 <= i < tokenizer.end_of_text for text in texts for i in tokenizer.encode(text))
    assert tokenizer.decode([0xC3, 151_000]) == "�"


def test_nothing_is_to_be_fetched_for_random_weights(tmp_path, capsys):
    text = "base: {}\nmodel: {{init: {}}}\n"
    paper = REPOSITORY / "egs" / "multilingual12" / "conf" / "paper.yaml"
    shown = {}
    for init in ("pretrained", "random"):
        (tmp_path / f"{init}.yaml").write_text(text.format(paper, init))
        for what in ("pretrained", "downloads"):
            assert main(["show", what, "--conf", str(tmp_path / f"{init}.yaml")]) == 0
            shown[init, what] = capsys.readouterr().out.splitlines()
    assert shown["pretrained", "pretrained"] == ["large-v3", "Qwen/Qwen3-1.7B"] and not shown["random", "pretrained"]
    models = ["--model large-v3", "--model Qwen/Qwen3-1.7B"]
    assert shown["pretrained", "downloads"] == shown["random", "downloads"] + models
    assert main(["check-config", "--conf", str(paper), "model.init=random"]) == 0
    assert "init: random" in capsys.readouterr().out

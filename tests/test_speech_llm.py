"""The whole model on packed batches, against one utterance at a time through transformers' own forward pass."""

import copy
import dataclasses

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from zipperasr import files, prompts
from zipperasr.adapters.base import AdaptedLinear
from zipperasr.data.packing import Batch, num_speech_tokens
from zipperasr.model import checkpoint
from zipperasr.model import llm as llm_module
from zipperasr.model.projector import Projector
from zipperasr.model.speech_llm import set_trainable, stage_tensors

TEXTS = [("de", "haus baum"), ("de", "katze"), ("th", "หนึ่ง สอง"), ("th", "สาม"), ("zh", "一 二 三")]
FRAMES = [57, 240, 33, 8, 120]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return tiny.make_pretrained(tmp_path_factory.mktemp("pretrained"))


@pytest.fixture(scope="module")
def model(paths):
    """A stage-2 model whose trainable parameters are all random, so that nothing hides behind a zero."""
    torch.manual_seed(0)
    model = checkpoint.build(tiny.settings(paths), stage=2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def batch(model):
    torch.manual_seed(1)
    return Batch(
        ids=[f"utt{i}" for i in range(len(TEXTS))],
        langs=[lang for lang, _ in TEXTS],
        features=[torch.randn(n, 80) for n in FRAMES],
        prompts=[prompts.prompt_ids(model.tokenizer, lang) for lang, _ in TEXTS],
        targets=[prompts.target_ids(model.tokenizer, text) for _, text in TEXTS],
    )


def loss_alone(model, batch, i, chunk_s=None):
    """The loss of utterance i from the logits of an unpacked, unpadded forward pass."""
    speech = model.speech_embeddings([batch.features[i]], [batch.langs[i]], chunk_s)[0]
    embed = model.llm.get_input_embeddings()
    prompt, target = torch.tensor(batch.prompts[i]), torch.tensor(batch.targets[i])
    inputs = torch.cat([embed(prompt), speech, embed(target)])
    logits = model.llm(inputs_embeds=inputs[None]).logits[0]
    return F.cross_entropy(logits[-len(target) - 1 : -1], target, reduction="sum")


def gradients(model, loss):
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [model.get_parameter(name) for name in names], allow_unused=True)
    return {name: g for name, g in zip(names, found, strict=True) if g is not None}


def assert_same_gradients(actual, expected):
    assert actual.keys() == expected.keys()
    for name, g in expected.items():
        scale = g.abs().max().item()
        torch.testing.assert_close(actual[name], g, rtol=0, atol=1e-4 * scale + 1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("chunk_s", [None, 0.5])
def test_a_packed_batch_equals_each_utterance_alone_in_loss_and_gradients(model, batch, chunk_s):
    out = model(batch, chunk_s)
    alone = torch.stack([loss_alone(model, batch, i, chunk_s) for i in range(len(TEXTS))])
    torch.testing.assert_close(out.utt_loss, alone.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(out.loss_sum, alone.sum(), rtol=1e-5, atol=0)
    assert out.num_tokens == batch.num_target_tokens and out.utt_tokens.tolist() == [len(t) for t in batch.targets]
    assert_same_gradients(gradients(model, out.loss_sum), gradients(model, alone.sum()))


def part_of(batch, some):
    """The utterances of a batch with the indices `some`, in that order."""
    values = (getattr(batch, field.name) for field in dataclasses.fields(batch))
    return Batch(*([value[i] for i in some] for value in values if value))


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("chunk_s", [None, 0.5])
@pytest.mark.parametrize("parts", [[[0, 1, 2], [3, 4]], [[4, 3, 2, 1, 0]], [[0, 1, 2, 3, 4, 2, 1]]])
def test_neighbours_and_their_order_change_no_loss(model, batch, parts, chunk_s, dtype, rtol):
    model = copy.deepcopy(model).to(dtype)
    whole = model(batch, chunk_s).utt_loss
    for part in parts:
        torch.testing.assert_close(model(part_of(batch, part), chunk_s).utt_loss, whole[part], rtol=rtol, atol=0)


def test_gradients_of_parts_add_up_to_those_of_the_whole(model, batch):
    parts = [gradients(model, model(part_of(batch, part)).loss_sum) for part in ([0, 1, 2], [3, 4])]
    added = {name: sum(part[name] for part in parts if name in part) for name in parts[0] | parts[1]}
    assert_same_gradients(added, gradients(model, model(batch).loss_sum))


@pytest.mark.parametrize("chunk_s", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_leaks_between_neighbours(model, batch, dtype, chunk_s):
    model, other = copy.deepcopy(model).to(dtype), copy.copy(batch)
    other.features = [3 * f if i in (0, 2) else f for i, f in enumerate(batch.features)]
    other.targets = [t[::-1] if i in (0, 2) else t for i, t in enumerate(batch.targets)]
    a, b = model(batch, chunk_s).utt_loss, model(other, chunk_s).utt_loss
    assert torch.equal(a[[1, 3, 4]], b[[1, 3, 4]])
    assert ((a - b).abs() > 1e-3)[[0, 2]].all()


def test_the_decoding_input_is_a_strict_prefix_of_the_training_sequence(model, batch):
    speech = model.speech_embeddings(batch.features, batch.langs)
    decoding = model.decoder_inputs(batch.prompts, speech)
    training = model.decoder_inputs(batch.prompts, speech, batch.targets)
    for d, t, target in zip(decoding, training, batch.targets, strict=True):
        assert len(d) == len(t) - len(target) and torch.equal(d, t[: len(d)])


def test_speech_embeddings_are_as_many_as_packing_counts(model, batch):
    for chunk_s in (None, 1):
        speech = model.speech_embeddings(batch.features, batch.langs, chunk_s)
        assert [len(s) for s in speech] == [num_speech_tokens(n) for n in FRAMES]


def test_the_projector_pads_each_utterance_alone():
    torch.manual_seed(0)
    projector = Projector(6, 5, 7)
    x = torch.randn(13, 6)
    for y, frames in zip(projector(x, [3, 4, 6]), x.split([3, 4, 6]), strict=True):
        padded = F.pad(frames, (0, 0, 0, -len(frames) % 4)).T
        h = (F.silu(projector.gate(padded)) * projector.up(padded)).T
        torch.testing.assert_close(y, projector.out(projector.norm(h + projector.linear(h))), rtol=0, atol=1e-6)


def test_logits_in_chunks_change_neither_loss_nor_gradients(model, batch, monkeypatch):
    whole = model(batch)
    expected = gradients(model, whole.loss_sum)
    monkeypatch.setattr(llm_module, "MAX_LOGITS", 5 * model.llm.lm_head.out_features)
    chunked = model(batch)
    torch.testing.assert_close(chunked.utt_loss, whole.utt_loss, rtol=1e-6, atol=0)
    assert_same_gradients(gradients(model, chunked.loss_sum), expected)


@pytest.mark.parametrize("lang", ["de", "th", "zh"])
def test_merged_equals_unmerged(model, batch, lang):
    merged = model.merged(lang)
    mine = [i for i, (other, _) in enumerate(TEXTS) if other == lang]
    torch.testing.assert_close(merged(batch).utt_loss[mine], model(batch).utt_loss[mine], rtol=1e-5, atol=0)
    assert not any(isinstance(m, AdaptedLinear) for m in merged.modules())


def test_merging_copies_only_what_it_changes(model):
    layers = {name for name, m in model.named_modules() if isinstance(m, AdaptedLinear)}
    before = {name: p.clone() for name, p in model.named_parameters()}
    merged = model.merged("de")
    shared = {name for name, p in merged.named_parameters() if any(p is q for q in model.parameters())}
    changed = {name for name, _ in merged.named_parameters()} - shared
    assert changed == {f"{name}.weight" for name in layers}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert merged.tokenizer is model.tokenizer


def test_each_stage_trains_its_parts_and_nothing_else(model, paths):
    stage1 = checkpoint.build(tiny.settings(paths, method=None), stage=1)
    names1, names2 = list(stage_tensors(stage1, 1)), list(stage_tensors(model, 2))
    lora = {n for n, _ in model.named_parameters() if n.startswith("llm.") and n.endswith((".A", ".B"))}
    projector = {n for n, _ in model.named_parameters() if n.startswith("projector.")}
    encoder = {f"encoder.{n}" for n, _ in stage1.encoder.named_parameters()}
    adapters = {n for n, _ in model.encoder.named_parameters(prefix="encoder")} - encoder
    assert set(names1) == encoder | projector | lora and set(names2) == adapters | projector | lora
    assert len(lora) == 2 * 7 * 2 and all(n.split(".", 5)[-1].startswith(ADAPTER_PARTS) for n in adapters)
    assert list(stage_tensors(model, 1)) == [n for n, _ in model.named_parameters() if n in set(names1)]


ADAPTER_PARTS = ("A", "B_shared", "B_spec.", "router.", "query.", "key.", "value.", "out.")


def test_what_a_stage_does_not_train_is_frozen(model, batch):
    names = set(set_trainable(model, 2))
    model(batch).loss_sum.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert with_gradient == names


def test_language_embeddings_are_rows_of_whispers_token_embedding(model, paths):
    table = load_file(paths.whisper / "model.safetensors")["decoder.token_embedding.weight"].float()
    tokens = files.read_json(paths.whisper / "config.json")["language_tokens"]
    assert model.language_embeddings.keys() == tokens.keys()
    for lang, e in model.language_embeddings.items():
        assert torch.equal(e, table[tokens[lang]])
    router = model.encoder.blocks[0].attn.query.router
    assert torch.equal(router.signal(["th"])[0], model.language_embeddings["th"])


def test_bf16_stays_near_fp32(model, batch):
    half = copy.deepcopy(model).bfloat16()
    out = half(batch)
    torch.testing.assert_close(out.utt_loss, model(batch).utt_loss, rtol=0.05, atol=0)
    assert all(g.dtype == torch.bfloat16 for g in gradients(half, out.loss_sum).values())

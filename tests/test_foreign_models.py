"""The adapters on models of transformers, which know nothing of them; each row must be as if it were alone."""

import pytest
import torch
from torch import nn
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from zipperasr.adapters import AdapterSettings, adapt, adapted_layers, batch_languages, checkpoint_contexts
from zipperasr.errors import UserError

LANGS = ["de", "sw", "de", "yo"]
ZIPPER = AdapterSettings(rank=4, alpha=8, langs=("de", "sw", "yo"), zipper={"signal": "learned"})


def randomised(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def whisper():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "num_mel_bins": 8, "vocab_size": 60}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    lengths = {"max_source_positions": 20, "max_target_positions": 30}
    tokens = {"decoder_start_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1}
    config = WhisperConfig(
        **sizes, **heads, **lengths, **tokens, suppress_tokens=None, begin_suppress_tokens=None, use_cache=True
    )
    model = WhisperForConditionalGeneration(config)
    assert adapt(model, ["model.*_proj", "model.*.fc*"], ZIPPER) == 2 * (6 + 10)
    return randomised(model)


@pytest.fixture(scope="module")
def features():
    return torch.randn(4, 8, 40, generator=torch.Generator().manual_seed(1))


def test_whisper_with_beam_search_writes_for_each_row_what_it_writes_for_it_alone(whisper, features):
    search = {"num_beams": 3, "max_new_tokens": 12, "do_sample": False}
    with batch_languages(LANGS, beams=3):
        together = whisper.generate(features, **search)
    for row, x, lang in zip(together, features, LANGS, strict=True):
        with batch_languages([lang], beams=3):
            alone = whisper.generate(x[None], **search)[0]
        assert row[: len(alone)].tolist() == alone.tolist() and not (row[len(alone) :] > 2).any()
    with batch_languages(LANGS[::-1], beams=3):
        assert not torch.equal(whisper.generate(features, **search), together), "the language should matter"


def test_whisper_with_beams_that_were_not_said_is_an_error(whisper, features):
    with batch_languages(LANGS), pytest.raises(UserError, match="an adapted layer got 12; name the language of every"):
        whisper.generate(features, num_beams=3, max_new_tokens=3)


@pytest.fixture(scope="module")
def wav2vec2():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    convolutions = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_conv_pos_embeddings": 4}
    rates = {"layerdrop": 0.0, "attention_dropout": 0.0, "hidden_dropout": 0.0, "feat_proj_dropout": 0.0}
    rates |= {"activation_dropout": 0.0, "final_dropout": 0.0, "mask_time_prob": 0.0}
    model = Wav2Vec2ForCTC(
        Wav2Vec2Config(**sizes, **convolutions, **rates, vocab_size=30, num_conv_pos_embedding_groups=2)
    )
    adapt(model, ["attention.*_proj", "intermediate_dense", "output_dense"], ZIPPER)
    return randomised(model).train()


def gradients(model, audio, langs):
    model.zero_grad()
    labels = torch.arange(1, 4).repeat(len(audio), 1)
    with batch_languages(langs):
        loss = model(input_values=audio, labels=labels).loss
    loss.backward()  # outside the block
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_transformers_activation_checkpointing_recomputes_with_the_languages_of_the_batch(wav2vec2):
    audio = torch.randn(4, 2000, generator=torch.Generator().manual_seed(2))
    plain = gradients(wav2vec2, audio, LANGS)
    wav2vec2.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
    again = gradients(wav2vec2, audio, LANGS)
    assert plain.keys() == again.keys() and len(plain) > 10 * len(adapted_layers(wav2vec2)) / 2
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7)
    wav2vec2.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(UserError, match="recomputed in the backward pass, where the languages of its batch are not"):
        gradients(wav2vec2, audio, LANGS)
    wav2vec2.gradient_checkpointing_disable()


def test_each_rows_gradients_add_up_to_the_batchs(wav2vec2):
    audio = torch.randn(4, 2000, generator=torch.Generator().manual_seed(3))
    together = gradients(wav2vec2, audio, LANGS)
    alone = [gradients(wav2vec2, row[None], [lang]) for row, lang in zip(audio, LANGS, strict=True)]
    for name, gradient in together.items():
        total = sum(each[name] for each in alone if name in each)  # transformers' CTC loss is a sum
        torch.testing.assert_close(total, gradient, rtol=0, atol=1e-4 * gradient.abs().max().item())

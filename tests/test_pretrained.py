"""The mini configuration's pretrained stand-ins are whole, small, and know their languages."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import load_file
from whisper.model import ModelDimensions, Whisper

from zipperasr import files
from zipperasr.data.features import log_mel
from zipperasr.data.tokenizer import load_tokenizer
from zipperasr.languages import LANGUAGES
from zipperasr.model import LLMSettings
from zipperasr.model.encoder import SpeechEncoder
from zipperasr.model.llm_io import load_llm
from zipperasr.model.whisper_io import load_whisper

MINI = REPOSITORY / "egs" / "multilingual12" / "pretrained" / "mini"


@pytest.fixture(scope="module")
def phrases():
    """The recipe's modules of synthetic speech and text, which lie beside its scripts."""
    sys.path.insert(0, str(REPOSITORY / "local"))
    import mini_phrases

    return mini_phrases


@pytest.fixture(scope="module")
def whisper():
    """The model as openai-whisper builds it, and its language tokens."""
    config = files.read_json(MINI / "whisper" / "config.json")
    model = Whisper(ModelDimensions(**config["dims"]))
    model.load_state_dict(load_file(MINI / "whisper" / "model.safetensors"))
    return model, config["language_tokens"]


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_whisper_has_an_encoder_a_decoder_and_a_token_for_each_language(whisper):
    model, language_tokens = whisper
    assert list(language_tokens) == list(LANGUAGES)
    assert 1.0e6 < count(model.encoder) < 1.4e6
    assert model.dims.n_audio_ctx == 1500, "30 s, as Whisper's"
    assert all(torch.isfinite(p).all() for p in model.parameters())
    encoder, embeddings = load_whisper(str(MINI / "whisper"))
    assert all(torch.equal(t, model.encoder.state_dict()[name]) for name, t in encoder.state_dict().items())
    assert embeddings.keys() == LANGUAGES.keys()


def test_llm_shares_its_embeddings_with_its_output():
    llm = load_llm(LLMSettings(pretrained=str(MINI / "lm")))
    assert llm.config.model_type == "qwen3"
    assert llm.lm_head.weight is llm.get_input_embeddings().weight
    assert 1.2e6 < sum(p.numel() for n, p in llm.named_parameters() if n.endswith("weight")) < 2.0e6


def test_both_are_small_enough_for_the_repository():
    sizes = {path: path.stat().st_size for path in MINI.rglob("*") if path.is_file()}
    assert sum(sizes.values()) < 15e6
    assert max(sizes.values()) < 4e6


def test_tokenizer_returns_every_prompt_and_phrase(phrases):
    tokenizer = load_tokenizer(MINI / "lm")
    for code, language in LANGUAGES.items():
        for text in [language.prompt, *phrases.phrases(code)[::500], "Zürich, 東京 - 7½ ☂ ЩЖ"]:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert tokenizer.end_of_text not in ids


def test_decoder_names_the_language_of_unheard_voices(whisper, phrases):
    import mini_speech

    model, language_tokens = whisper
    start = min(language_tokens.values()) - 1  # Whisper's order: start of transcript, then the languages
    clips = []
    for lang in LANGUAGES:
        texts = [text for text in phrases.phrases(lang) if phrases.part(lang, text) == "test"]
        for number, text in enumerate(texts[::300][:2]):
            voice = mini_speech.speaker(number, "test", "read")
            clips.append(mini_speech.Utterance(lang, text, voice, "read", seed=number))
    encoder, hits = SpeechEncoder(model.encoder), 0
    with torch.no_grad():
        for clip, audio in zip(clips, mini_speech.synthesise_all(clips, nj=1), strict=True):
            states, _ = encoder([log_mel(audio.astype(np.float32) / 32768, num_mel_bins=80)], [clip.lang])
            logits = model.decoder(torch.tensor([[start]]), states[None])[0, 0]
            hits += max(language_tokens, key=lambda lang: logits[language_tokens[lang]]) == clip.lang
    assert hits > 0.8 * len(clips) == 0.8 * 26


def test_logs_tell_how_training_went():
    for name in ("whisper", "lm"):
        rows = [json.loads(line) for line in (MINI / name / "log.jsonl").read_text().splitlines()]
        assert rows[-1]["cer"].keys() == LANGUAGES.keys()
        assert rows[-1]["step"] == max(row["step"] for row in rows)

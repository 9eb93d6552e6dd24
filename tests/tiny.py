"""Tiny random pretrained models on disk, for tests: a Whisper, a Qwen3 and a sentencepiece tokenizer in two seconds.

`paths = tiny.make_pretrained(tmp_path)`, then `tiny.settings(paths, langs=["de", "th"])` are the ModelSettings of a
zipper_soft model, `tiny.settings(paths, method=None)` those without an encoder adapter, as for stage 1.
"""

import io
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from whisper.model import ModelDimensions, Whisper

from zipperasr import config, files
from zipperasr.languages import LANGUAGES
from zipperasr.model import ModelSettings, RunSettings, checkpoint
from zipperasr.model.speech_llm import SpeechLLM
from zipperasr.model.whisper_io import save_whisper

WORDS = {"de": "haus baum katze", "en": "one two three", "th": "หนึ่ง สอง สาม", "ja": "いち に さん", "zh": "一 二 三"}


class Pretrained(NamedTuple):
    """Folders of a Whisper and of an LM with its tokenizer."""

    whisper: Path
    lm: Path


def make_pretrained(
    folder: Path, *, seed: int = 0, num_mel_bins: int = 80, n_audio_ctx: int = 1500, width: int = 16, **lm
) -> Pretrained:
    """Write both models under `folder`: 2 layers each, vocabulary about 450; `lm` are arguments of `make_lm`."""
    paths = Pretrained(Path(folder) / "whisper", Path(folder) / "lm")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        whisper = make_whisper(num_mel_bins, n_audio_ctx, width)
        save_whisper(paths.whisper, whisper, {c: i for i, c in enumerate(LANGUAGES)})
        paths.lm.mkdir(parents=True, exist_ok=True)
        tokenizer = make_tokenizer(paths.lm / "tokenizer.model")
        make_lm(tokenizer.vocab_size(), tokenizer.eos_id(), **lm).save_pretrained(paths.lm)
    return paths


def make_whisper(num_mel_bins: int = 80, n_audio_ctx: int = 1500, width: int = 16) -> Whisper:
    """A Whisper of 2 + 1 layers with random weights."""
    text = {"n_vocab": 32, "n_text_ctx": 8, "n_text_state": width, "n_text_head": 2, "n_text_layer": 1}
    dims = ModelDimensions(num_mel_bins, n_audio_ctx, width, 2, 2, **text)
    model = Whisper(dims)
    torch.nn.init.normal_(model.decoder.positional_embedding, std=0.01)  # openai-whisper leaves it uninitialised
    return model.eval()


def make_lm(vocab_size: int, eos_id: int, *, lm_width: int = 32, embedding_std: float = 0.02) -> Qwen3ForCausalLM:
    """A random Qwen3 of 2 layers with tied embeddings, which scale its logits: it can only learn what they can tell."""
    config = Qwen3Config(
        vocab_size=vocab_size, hidden_size=lm_width, intermediate_size=2 * lm_width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=lm_width // 4, max_position_embeddings=4096,
        tie_word_embeddings=True, eos_token_id=eos_id,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight *= embedding_std / config.initializer_range
    return model.eval()


def make_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    """A sentencepiece model of the prompts and a few words, with byte fallback: any text can be encoded."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([row.prompt for row in LANGUAGES.values()] + list(WORDS.values())),
        model_writer=model, vocab_size=450, hard_vocab_limit=False, byte_fallback=True, character_coverage=0.98,
        bos_id=-1, eos_id=1, eos_piece="<|endoftext|>", unk_id=0, minloglevel=2, num_threads=1,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def settings(
    paths: Pretrained, *, method: str | None = "zipper_soft", langs=("de", "th"), rank: int = 4, **encoder
) -> ModelSettings:
    """Settings of a tiny model; `encoder` are further EncoderSettings, such as context="chunked"."""
    return ModelSettings.model_validate({
        "encoder": {"pretrained": str(paths.whisper), **encoder},
        "llm": {"pretrained": str(paths.lm), "lora": {"rank": rank, "alpha": 2 * rank}},
        "adapter": method and {"method": method, "rank": rank, "alpha": 2 * rank, "langs": list(langs)},
    })  # fmt: skip


def trained(settings: ModelSettings, stage: int, init: Path | None = None) -> SpeechLLM:
    """A model with random values in everything the stage trains; `init`: a folder with the weights of stage 1."""
    model = checkpoint.build(settings, stage)
    if init:
        checkpoint.load_trainable(model, init, stage=1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    return model


def save_run(run_dir: Path, settings: ModelSettings, stage: int, model: SpeechLLM, step: int = 1) -> Path:
    """Write what a run directory needs to be loaded; returns its checkpoint folder."""
    config.save(run_dir / "config.yaml", RunSettings(stage=stage, model=settings))
    folder = run_dir / "checkpoints" / f"step-{step}"
    checkpoint.save_trainable(model, folder)
    files.write_json(folder / "state.json", {})
    return folder

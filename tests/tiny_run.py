"""A run directory with random weights, and noise that comes and goes like speech."""

from pathlib import Path

import numpy as np
import tiny
import torch
from torch import nn

from zipperasr import config, files
from zipperasr.cli import recipe
from zipperasr.languages import LANGUAGES
from zipperasr.model import checkpoint
from zipperasr.model.whisper_io import save_whisper

RATE = 16_000


def speech(duration_s: float, seed: int = 0) -> np.ndarray:
    """Noise in syllables, four a second."""
    noise = np.random.default_rng(seed).normal(0, 0.1, round(duration_s * RATE))
    return (noise * (np.sin(np.arange(len(noise)) * 4 * np.pi / RATE) ** 2 + 0.03)).astype(np.float32)


def make(folder: Path) -> Path:
    """Write a run of Stage 2 for German and Thai, whose Whisper detects languages at random; returns the folder."""
    paths = tiny.make_pretrained(folder)
    torch.manual_seed(0)
    save_whisper(paths.whisper, tiny.make_whisper(), {code: i + 1 for i, code in enumerate(LANGUAGES)})
    stage = {"setting": "target"}
    whole = recipe.Config.model_validate({
        "corpora": {"noise": {"prepare": "mls", "langs": ["de"]}},
        "data": {"lists": {"settings": {"target": {"train": {"noise_de_train": None}}}}},
        "model": tiny.settings(paths).model_dump(),
        "training": {"stage1": stage, "stage2": stage},
        "decoding": {"max_tokens_per_s": 2, "min_max_tokens": 3, "max_tokens_per_batch": 400},
        "transcription": {"max_segment_s": 5},
    })  # fmt: skip
    config.save(folder / "config.yaml", whole)
    checkpoint.save_trainable(checkpoint.build(whole.model, stage=1), folder / "init")
    model, step = checkpoint.build(whole.model, stage=2), folder / "checkpoints" / "step-7"
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    checkpoint.save_trainable(model, step)
    files.write_json(step / "state.json", {})
    return folder

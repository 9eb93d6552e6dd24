"""The directory of a run: begun with one configuration and one input, resumed only with the same, then finished."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from zipperasr import config, files
from zipperasr.config import Settings
from zipperasr.errors import UserError
from zipperasr.languages import LANGUAGES
from zipperasr.model import WEIGHTS
from zipperasr.training import UNBOUND

if TYPE_CHECKING:
    from torch import Tensor, nn

FINISHED = "train.json"


def begin(run_dir: Path, *, settings: Settings, inputs: dict[str, str], bound: tuple[str, ...]) -> None:
    """Write config.yaml and inputs.json, for a new run or one to resume.

    `bound` are the sections (dotted) that a run keeps for life; the others, such as decoding's, follow `settings`.
    `inputs` are digests of what the run reads. Raises UserError naming what differs from the run in the directory.
    """
    if (run_dir / "config.yaml").is_file():
        saved = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        _check_same(run_dir, config.flat(saved), config.flat(settings.model_dump(mode="json")), bound)
        _check_inputs(run_dir, files.read_json(run_dir / "inputs.json"), inputs)
    files.write_json(run_dir / "inputs.json", inputs)
    config.save(run_dir / "config.yaml", settings)


def link_init(run_dir: Path, source: Path) -> None:
    """Give a stage-2 run the weights of stage 1, in the file `source`, as init/trainable.safetensors.

    Linked where the disk allows.
    """
    with files.beside(run_dir / "init" / source.name) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def final_weights(run_dir: Path) -> Path:
    """The weights of a finished run. Raises UserError when it is not finished."""
    if not (run_dir / FINISHED).is_file():
        raise UserError(f"{run_dir}: not a finished run (no {FINISHED}); train it to its end first")
    step = files.read_json(run_dir / FINISHED)["step"]
    path = run_dir / "checkpoints" / f"step-{step}" / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path}: missing; delete {run_dir / FINISHED} and train again")
    return path


def write_trainable(run_dir: Path, model: nn.Module) -> None:
    """Write trainable.txt, the tensors that are trained, and print how many numbers each part of the model trains."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    by_part = count_trainable(model)
    parts = ", ".join(f"{part} {count:,}" for part, count in by_part.items())
    frozen = sum(p.numel() for p in model.parameters()) - by_part.total()
    summary = f"trainable parameters: {by_part.total():,} ({parts}); frozen: {frozen:,}"
    with files.write(run_dir / "trainable.txt") as stream:
        stream.write(f"# {summary}\n")
        stream.writelines(f"{name} {list(p.shape)}\n" for name, p in trainable.items())
    print(summary)


def count_trainable(model: nn.Module) -> Counter[str]:
    """How many numbers each part of the model (encoder, projector, llm) trains."""
    by_part: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        by_part[name.partition(".")[0]] += parameter.numel() * parameter.requires_grad
    return +by_part


def write_language_embeddings(run_dir: Path, embeddings: dict[str, Tensor]) -> None:
    """Write language_embeddings.json, {language: embedding} of the languages this project knows, for the report."""
    known = {lang: embedding.tolist() for lang, embedding in embeddings.items() if lang in LANGUAGES}
    files.write_json(run_dir / "language_embeddings.json", known)


def _check_same(run_dir: Path, saved: dict[str, Any], asked: dict[str, Any], bound: tuple[str, ...]) -> None:
    keys = [k for k in {**saved, **asked} if f"{k}.".startswith(tuple(f"{b}." for b in bound))]
    keys = [k for k in keys if k.rpartition(".")[2] not in UNBOUND]
    absent = object()
    differing = [k for k in keys if saved.get(k, absent) != asked.get(k, absent)]
    if differing:
        named = ", ".join(f"{k} ({saved.get(k, 'absent')} there, {asked.get(k, 'absent')} asked)" for k in differing)
        raise UserError(f"{run_dir}: begun with another configuration: {named}; choose another --exp-dir or delete it")


def _check_inputs(run_dir: Path, saved: dict[str, str], asked: dict[str, str]) -> None:
    differing = [name for name in {**saved, **asked} if saved.get(name) != asked.get(name)]
    if differing:
        raise UserError(
            f"{run_dir}: what it was trained from has changed since ({', '.join(differing)}); "
            "choose another --exp-dir or delete it"
        )

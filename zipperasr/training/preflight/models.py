"""The configuration: pretrained models and languages."""

import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from zipperasr import languages
from zipperasr.errors import UserError
from zipperasr.model import ModelSettings
from zipperasr.training.preflight import Finding

FETCH = "stage 0 fetches it"
ONE_FOR_ALL = ("vanilla", "flylora")
"""Methods of adapters without banks of languages."""

ok, warning, error = (partial(Finding, "configuration", level) for level in ("ok", "warning", "error"))


def check_models(model: ModelSettings) -> Iterator[Finding]:
    """Whether encoder and LLM are there, without asking the network."""
    if model.init == "random":
        yield warning("model.init=random: both models begin without weights, for trials of a machine only")
        return
    yield _check_model("model.encoder.pretrained", model.encoder.pretrained, suffixes=(".pt",))
    yield _check_model("model.llm.pretrained", model.llm.pretrained)


def check_languages(model: ModelSettings, langs: Iterable[str]) -> Iterator[Finding]:
    """Whether every language that stage 2 trains on has a prompt, and a bank of its own where the method has banks."""
    langs, banks = sorted(set(langs)), set(model.adapter.langs) if model.adapter else set()
    if unknown := [lang for lang in langs if lang not in languages.LANGUAGES]:
        yield error(f"no prompt for {', '.join(unknown)}; add rows to zipperasr/languages.py")
        return
    yield ok(f"{len(langs)} languages in stage 2, each with a prompt: {' '.join(langs)}")
    lacking = [lang for lang in langs if lang not in banks]
    if lacking and model.adapter and model.adapter.method not in ONE_FOR_ALL:
        said = f"no bank of their own for {', '.join(lacking)} (model.adapter.unseen={model.adapter.unseen})"
        yield warning(f"{said}; add them to model.adapter.langs")


def _check_model(key: str, name: str, suffixes: tuple[str, ...] = ()) -> Finding:
    path = Path(name)
    if path.is_dir() or (path.is_file() and path.suffix in suffixes):
        lacks = [] if path.is_file() or (path / "config.json").is_file() else ["config.json"]
        return error(f"{key}: {name} has no {lacks[0]}; give a model's folder") if lacks else ok(f"{name}: is there")
    if path.exists() or path.is_absolute() or name.startswith(("pretrained/", ".")):
        return error(f"{key}: {name} is no model; give a folder{' or a .pt file' * bool(suffixes)}, or a known name")
    try:
        is_there = _is_on_hub_disk(name) if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else _is_whisper_there(name)
    except UserError as unknown:
        return error(f"{key}: {unknown}")
    return ok(f"{name}: is in the cache") if is_there else warning(f"{name}: is not in the cache yet; {FETCH}")


def _is_whisper_there(name: str) -> bool:
    from zipperasr.data.download.clients import WhisperModel

    return WhisperModel(name).path.is_file()


def _is_on_hub_disk(name: str) -> bool:
    """Whether the hub's cache has a model's configuration and, in one file or several, its weights."""
    from huggingface_hub import try_to_load_from_cache

    weights = ("model.safetensors", "model.safetensors.index.json")
    found = {file for file in ("config.json", *weights) if isinstance(try_to_load_from_cache(name, file), str)}
    return "config.json" in found and bool(found & set(weights))

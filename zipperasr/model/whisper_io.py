"""Whisper in openai-whisper's form and in that of transformers: what we need of it read, and both forms written.

Of the decoder a model needs the token embedding alone, whose rows for language tokens describe the languages; only the
detection of languages (language_id.py) needs it whole.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
import whisper
from torch import Tensor
from transformers import PreTrainedModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from whisper.model import AudioEncoder, TextDecoder, Whisper
from whisper.tokenizer import get_tokenizer

from zipperasr import files
from zipperasr.data.download.hub import HubModel
from zipperasr.errors import UserError
from zipperasr.model.sizes import whisper_dims
from zipperasr.model.tensors import check_fit, read_tensors, share, write_tensors

HF_NAMES = (
    ("blocks.", "layers."),
    ("attn_ln.", "self_attn_layer_norm."),
    ("attn.query.", "self_attn.q_proj."),
    ("attn.key.", "self_attn.k_proj."),
    ("attn.value.", "self_attn.v_proj."),
    ("attn.out.", "self_attn.out_proj."),
    ("mlp_ln.", "final_layer_norm."),
    ("mlp.0.", "fc1."),
    ("mlp.2.", "fc2."),
    ("ln_post.", "layer_norm."),
    ("positional_embedding", "embed_positions.weight"),
    ("token_embedding.", "embed_tokens."),
    ("cross_self_attn", "encoder_attn"),  # what the rows above make of cross_attn
    ("decoder.ln.", "decoder.layer_norm."),
)
"""Parts of tensors' names in openai-whisper and in transformers; replaced in this order, also backwards."""

TABLE = "decoder.token_embedding.weight"
AGAIN = "fetch the model again"
CHOICE = "give a folder, a whole .pt file or a known name"


def hf_name(name: str) -> str:
    """What transformers' Whisper calls the tensor `name` of openai-whisper."""
    for ours, theirs in HF_NAMES:
        name = name.replace(ours, theirs)
    return name


def load_whisper(name: str) -> tuple[AudioEncoder, dict[str, Tensor]]:
    """A Whisper encoder in fp32 on the CPU, and the embedding [D] of each language's token.

    name: a folder written by `save_whisper` or by transformers, a .pt file of openai-whisper, one of its model names
    (fetched, its SHA-256 checked), or a model id of the Hugging Face hub (safetensors only).
    Raises UserError where there is no such model, or it is not whole, or not a Whisper.
    """
    return _take(_stored(name))


def load_whole_whisper(name: str) -> tuple[AudioEncoder, TextDecoder, dict[str, int]]:
    """A Whisper's encoder and decoder in fp32 on the CPU, and each language's token; `name` and errors as above."""
    stored = _stored(name)
    try:
        dims = whisper_dims(stored.config, with_decoder=True)
    except KeyError as error:
        raise UserError(f"{stored.where}: its config.json has no decoder, it lacks {error}; {AGAIN}") from error
    with torch.device("meta"):
        sizes = ("n_vocab", "n_text_ctx", "n_text_state", "n_text_head", "n_text_layer")
        decoder = TextDecoder(*(dims[size] for size in sizes))
        parts = {"encoder.": make_encoder(dims), "decoder.": decoder}
    wanted = {part + name: t for part, module in parts.items() for name, t in module.state_dict().items()}
    ours = _fitting(stored, wanted, *parts)
    for part, module in parts.items():
        module.load_state_dict({n.removeprefix(part): t for n, t in ours.items() if n.startswith(part)}, assign=True)
    decoder.mask = torch.full(decoder.mask.shape, -torch.inf).triu_(1)  # which no file holds
    return parts["encoder."], decoder, stored.tokens


class _Stored(NamedTuple):
    """A Whisper's tensors as they are stored, what says their sizes, and the languages' tokens."""

    where: Path  # named in errors
    tensors: Mapping[str, Tensor]
    config: dict[str, Any]
    tokens: dict[str, int]
    is_hf: bool


def _stored(name: str) -> _Stored:
    path = Path(name)
    if path.is_dir():
        return _from_folder(path)
    if path.is_file() or path.suffix == ".pt":
        return _from_file(path)
    if name in whisper.available_models():
        return _from_file(_fetched(name))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return _from_folder(HubModel(name).fetch())
    known = ", ".join(whisper.available_models())
    raise UserError(f"Whisper model '{name}': no such folder; {CHOICE} ({known}; or one such as openai/whisper-tiny)")


def make_encoder(dims: Mapping[str, int]) -> AudioEncoder:
    """openai-whisper's encoder of these sizes (see sizes.py), on torch's current device."""
    return AudioEncoder(
        *(dims[f"n_{key}"] for key in ("mels", "audio_ctx", "audio_state", "audio_head", "audio_layer"))
    )


def save_whisper(
    folder: Path | str, model: Whisper, language_tokens: dict[str, int], *, dtype: torch.dtype = torch.float16
) -> None:
    """Write `config.json` (dimensions, language tokens) and `model.safetensors` (openai-whisper's tensor names)."""
    folder = Path(folder)
    config = {"dims": dataclasses.asdict(model.dims), "language_tokens": language_tokens}
    files.write_json(folder / "config.json", config)
    with files.beside(folder / "model.safetensors") as temporary:
        write_tensors(temporary, {name: t.to(dtype) for name, t in model.state_dict().items()})


def save_hf_encoder(folder: Path, tensors: Mapping[str, Tensor], *, num_heads: int, dtype: torch.dtype) -> None:
    """Write an encoder, `tensors` by openai-whisper's names, as what WhisperEncoder.from_pretrained loads."""
    width, num_bins, _ = tensors["conv1.weight"].shape
    config = WhisperConfig(
        d_model=width, num_mel_bins=num_bins, max_source_positions=len(tensors["positional_embedding"]),
        encoder_layers=sum(name.endswith(".attn_ln.weight") for name in tensors), encoder_attention_heads=num_heads,
        encoder_ffn_dim=len(tensors["blocks.0.mlp.0.weight"]),
    )  # fmt: skip
    with torch.device("meta"):
        model = WhisperEncoder(config)
    save_hf(folder, model, {hf_name(name): t for name, t in tensors.items()}, dtype)


def save_hf(folder: Path, model: PreTrainedModel, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write `model`, built on the meta device, with `tensors` cast to `dtype`."""
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    model.to(dtype).save_pretrained(folder)
    for path in Path(folder).glob("*.safetensors"):
        share(path)


def _from_folder(folder: Path) -> _Stored:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no model, it has no config.json; {CHOICE}")
    config = files.read_json(path)
    is_ours = "dims" in config
    if not is_ours and config.get("model_type") != "whisper":
        raise UserError(f"{path}: model_type is '{config.get('model_type')}', not 'whisper'; {CHOICE}")
    if (activation := config.get("activation_function", "gelu")) != "gelu":
        raise UserError(f"{path}: activation_function is '{activation}', not Whisper's 'gelu'; {CHOICE}")
    try:
        dims = whisper_dims(config)
        tokens = config["language_tokens"] if is_ours else _hf_language_tokens(folder, dims["n_vocab"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not that of a whole Whisper ({error}); {AGAIN}") from error
    return _Stored(folder, _read(folder), config, tokens, not is_ours)


def _from_file(path: Path) -> _Stored:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}")
        config, tensors = {"dims": content["dims"]}, content["model_state_dict"]
        dims = whisper_dims(config)
    except (OSError, EOFError, RuntimeError, KeyError, TypeError, UnpicklingError) as error:
        raise UserError(
            f"{path}: no model of openai-whisper ({' '.join(str(error).split())[:300]}); {CHOICE}"
        ) from error
    return _Stored(path, tensors, config, _language_tokens(dims["n_vocab"]), False)


def _take(stored: _Stored) -> tuple[AudioEncoder, dict[str, Tensor]]:
    """The encoder and the languages' embeddings."""
    where, tokens, dims = stored.where, stored.tokens, whisper_dims(stored.config)
    with torch.device("meta"):
        encoder, table = make_encoder(dims), torch.empty(dims["n_vocab"], dims["n_audio_state"])
    wanted = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()} | {TABLE: table}
    ours = _fitting(stored, wanted, "encoder.")
    if outside := [lang for lang, token in tokens.items() if not 0 <= token < dims["n_vocab"]]:
        raise UserError(f"{where}: the token of '{outside[0]}' is {tokens[outside[0]]}, of {dims['n_vocab']}; {AGAIN}")
    table = ours.pop(TABLE)
    encoder.load_state_dict({name.removeprefix("encoder."): t for name, t in ours.items()}, assign=True)
    return encoder, {lang: table[token].clone() for lang, token in tokens.items()}


def _fitting(stored: _Stored, wanted: Mapping[str, Tensor], *parts: str) -> dict[str, Tensor]:
    """The `wanted` tensors in fp32; UserError unless they, and no others of `parts`, are there and fit."""
    theirs = {name: hf_name(name) if stored.is_hf else name for name in wanted}
    found = {name.removeprefix("model."): tensor for name, tensor in stored.tensors.items()}
    found = {name: t for name, t in found.items() if name.startswith(parts) or name in theirs.values()}
    check_fit(stored.where, found, {theirs[name]: t for name, t in wanted.items()}, mend=AGAIN, spoilt=AGAIN)
    return {name: found[theirs[name]].to(torch.float32, copy=True) for name in wanted}


def _read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from one file or several."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    paths = [whole]
    if index.is_file() and not whole.is_file():
        paths = [folder / name for name in sorted(set(files.read_json(index).get("weight_map", {}).values()))]
    pickled = "pickled weights are not read, but transformers can load them and save this"
    tensors: dict[str, Tensor] = {}
    for path in paths:
        tensors |= read_tensors(path, lacking=f"{AGAIN} ({pickled})", broken=AGAIN)
    return tensors


def _hf_language_tokens(folder: Path, num_tokens: int) -> dict[str, int]:
    path = folder / "generation_config.json"
    tokens = files.read_json(path).get("lang_to_id") if path.is_file() else None
    return {name.strip("<|>"): token for name, token in tokens.items()} if tokens else _language_tokens(num_tokens)


def _language_tokens(num_tokens: int) -> dict[str, int]:
    """Where openai-whisper has its languages in a vocabulary of this size; none in one smaller than Whisper's."""
    is_multilingual = num_tokens >= 51_865
    tokenizer = get_tokenizer(is_multilingual, num_languages=num_tokens - 51_765 - is_multilingual)
    return {lang: tokenizer.to_language_token(lang) for lang in tokenizer.all_language_codes}


def _fetched(name: str) -> Path:
    """The file of a model that openai-whisper knows, where that looks for it; UserError if its SHA-256 is another."""
    from zipperasr.data.download import archives
    from zipperasr.data.download.clients import WhisperModel

    model = WhisperModel(name)
    if not model.path.is_file():
        model.run()
    archives.verify(model.path, model.archive)
    return model.path

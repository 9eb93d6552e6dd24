"""Reading and writing Whisper models in openai-whisper's form, and their encoders in that of transformers."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
import whisper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from whisper.model import ModelDimensions, Whisper
from whisper.tokenizer import get_tokenizer

from zipperasr import files
from zipperasr.errors import UserError

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
)
"""Parts of encoder tensors' names in openai-whisper and in transformers; replaced in this order, also backwards."""


def hf_name(name: str) -> str:
    """What transformers' WhisperEncoder calls the encoder tensor `name` of openai-whisper."""
    for ours, theirs in HF_NAMES:
        name = name.replace(ours, theirs)
    return name


def load_whisper(name: str) -> tuple[Whisper, dict[str, int]]:
    """A Whisper model in fp32 on the CPU and its language tokens {lang: token id}.

    name: a folder written by `save_whisper`, a .pt file of openai-whisper, or one of its model names (downloaded and
    checked by openai-whisper). Raises UserError when there is no such model or its parts do not fit.
    """
    if Path(name).is_dir():
        return _load_folder(Path(name))
    try:
        model = whisper.load_model(name, device="cpu")
    except (RuntimeError, OSError, KeyError, TypeError, UnpicklingError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"Whisper model '{name}': {reason}; give a folder, a whole .pt file or a known name") from error
    tokenizer = get_tokenizer(model.is_multilingual, num_languages=model.num_languages)
    return model, {lang: tokenizer.to_language_token(lang) for lang in tokenizer.all_language_codes}


def save_whisper(
    folder: Path | str, model: Whisper, language_tokens: dict[str, int], *, dtype: torch.dtype = torch.float16
) -> None:
    """Write `config.json` (dimensions, language tokens) and `model.safetensors` (openai-whisper's tensor names)."""
    folder = Path(folder)
    config = {"dims": dataclasses.asdict(model.dims), "language_tokens": language_tokens}
    files.write_json(folder / "config.json", config)
    with files.beside(folder / "model.safetensors") as temporary:
        save_file({k: v.detach().to("cpu", dtype).contiguous() for k, v in model.state_dict().items()}, temporary)


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


def _load_folder(folder: Path) -> tuple[Whisper, dict[str, int]]:
    config = files.read_json(folder / "config.json")
    try:
        model = Whisper(ModelDimensions(**config["dims"]))
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model, config["language_tokens"]
    except (KeyError, TypeError, OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: not a whole Whisper model ({' '.join(str(error).split())[:300]})") from error

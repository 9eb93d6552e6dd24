"""Models of a pretrained one's shape without its weights, for benchmarks and tests: nothing is downloaded."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config
from whisper.model import AudioEncoder
from whisper.tokenizer import LANGUAGES

from zipperasr import files
from zipperasr.errors import UserError
from zipperasr.model import LLMSettings
from zipperasr.model.llm import ATTENTION
from zipperasr.model.llm_io import add_lora, read_config
from zipperasr.model.sizes import QWEN3, WHISPER, whisper_dims
from zipperasr.model.whisper_io import make_encoder


def random_whisper(name: str, device: torch.device | str) -> tuple[AudioEncoder, dict[str, Tensor]]:
    """An encoder in fp32 on `device`, and a vector [D] on the CPU for each of Whisper's languages.

    name: a size of sizes.py, or a folder with a config.json. Raises UserError for another one.
    """
    if name in WHISPER:
        dims = WHISPER[name]
    elif Path(name).is_dir():
        path = Path(name) / "config.json"
        try:
            dims = whisper_dims(files.read_json(path))
        except KeyError as error:
            raise UserError(f"{path}: not that of a Whisper, it lacks {error}; give a Whisper's folder") from error
    else:
        raise _unknown("model.encoder.pretrained", name, WHISPER)
    with _the_same_every_time(device):
        encoder = make_encoder(dims)
    with _the_same_every_time("cpu"):
        return encoder, dict(zip(LANGUAGES, torch.randn(len(LANGUAGES), dims["n_audio_state"]), strict=True))


def random_llm(settings: LLMSettings, device: torch.device | str) -> PreTrainedModel:
    """The LLM in fp32 on `device` with a fresh LoRA on all its linear layers.

    settings.pretrained: a size of sizes.py, or a folder with a config.json. Raises UserError for another one.
    """
    name = settings.pretrained
    if name in QWEN3:
        config = Qwen3Config(**QWEN3[name])
    elif Path(name).is_dir():
        config = read_config(name)
    else:
        raise _unknown("model.llm.pretrained", name, QWEN3)
    with _the_same_every_time(device):
        llm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=ATTENTION).eval()
    return add_lora(llm, settings)


def _unknown(key: str, name: str, known: dict[str, dict[str, int]]) -> UserError:
    return UserError(f"{key} '{name}': no size is known for model.init=random; give a folder or {', '.join(known)}")


@contextlib.contextmanager
def _the_same_every_time(device: torch.device | str) -> Iterator[None]:
    """What is made in the block is made on `device`, from a seed of its own.

    So ranks, resumed runs and decoding have the same frozen weights, which no checkpoint holds.
    """
    device = torch.device(device)
    with torch.random.fork_rng([] if device.type in ("cpu", "meta") else [device]), device:
        torch.manual_seed(0)
        yield

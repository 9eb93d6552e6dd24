"""A trained run as models of transformers and adapters of PEFT, and how closely these repeat what the run computes.

    encoder/base/    peft: the encoder without adapters, a WhisperEncoder
    encoder/<lang>/  peft: the language's LoRA of it; merged: a whole WhisperEncoder
    llm/             peft: a LoRA of the pretrained LLM; merged: the whole LLM with its tokenizer
    projector/       model.safetensors and config.json: the sizes of zipperasr.model.projector.Projector
    parity.json      the largest differences between the run and what these folders are when loaded again

transformers' encoder takes exactly 30 s. Parity is over all frames of such windows: audio cut, or padded with silence.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from zipperasr import config, files, languages
from zipperasr.adapters import AdapterSettings, adapted_layers
from zipperasr.adapters.base import AdaptedLinear
from zipperasr.errors import UserError
from zipperasr.model import LoraSettings, ModelSettings, RunSettings, Step, choose_steps
from zipperasr.model.checkpoint import load_run
from zipperasr.model.encoder import SpeechEncoder
from zipperasr.model.parity import NOISE_S, noise_window, parity, recorded_window
from zipperasr.model.projector import STRIDE, Projector
from zipperasr.model.speech_llm import SpeechLLM
from zipperasr.model.tensors import write_tensors
from zipperasr.model.whisper_io import hf_name, save_hf, save_hf_encoder

TOKENIZER_FILES = ("*token*", "*vocab*", "merges.txt", "chat_template*", "*.model")


def export(
    run_dir: Path, out: Path, langs: Sequence[str], *, format: Literal["peft", "merged"], dtype=torch.float32,
    step: Step = None, average: int = 1, recordings: Sequence[Path] = (),
) -> dict[str, Any]:  # fmt: skip
    """Write a run's model for `langs` to the new folder `out`; returns what is in parity.json.

    step, average: as for choose_steps.
    langs: codes, or "all" for the adapter's. recordings: audio to compare on; seeded noise if there is none.
    Raises UserError, and writes nothing, when `out` exists, a recording cannot be read, a language is unknown, or no
    plain LoRA equals the adapter.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; choose another --out or delete it")
    if format == "peft":
        _require_peft()
    settings = config.load(run_dir / "config.yaml", RunSettings).model
    if settings.init == "random":
        raise UserError(f"{run_dir}: trained from random weights (model.init), for a trial; there is nothing to export")
    steps = choose_steps(run_dir, step, average=average)
    model = load_run(run_dir, steps)
    langs = _resolve(langs, model.encoder, settings)
    recorded = [recorded_window(path, model.encoder) for path in recordings]
    windows = {lang: recorded or [noise_window(seed, model.encoder)] for seed, lang in enumerate(langs)}
    with _folder_beside(out) as folder:
        target = {"peft": Peft, "merged": Merged}[format](model, settings, folder, dtype)
        target.write_encoder(langs)
        target.write_llm()
        _write_projector(model.projector, folder / "projector", dtype)
        report = {
            "run": str(run_dir),
            "steps": list(steps),
            "format": format,
            "dtype": str(dtype).removeprefix("torch."),
            "audio": [str(path) for path in recordings] or f"{NOISE_S} s of seeded noise",
            "frames": f"all of each window of {model.encoder.max_frames / 100:g} s",
            "largest_difference": parity(model, windows, target.encoder, target.llm(), dtype),
        }
        files.write_json(folder / "parity.json", report)
    return report


@dataclass(frozen=True)
class Target:
    """What a format writes of a model to `folder`, and reads from there as its users do."""

    model: SpeechLLM
    settings: ModelSettings
    folder: Path
    dtype: torch.dtype


class Peft(Target):
    """LoRAs beside the models that they adapt."""

    def write_encoder(self, langs: Sequence[str]) -> None:
        encoder, folder = self.model.encoder, self.folder / "encoder"
        _write_encoder(encoder, folder / "base", self.dtype, lambda layer: layer)
        for lang in langs if adapted_layers(encoder) else ():
            _write_lora(
                encoder, lang, self.settings.adapter, folder / lang, self.dtype,
                base="../base", task=None, rename=hf_name,
            )  # fmt: skip

    def write_llm(self) -> None:
        lora, base, folder = self.settings.llm.lora, self.settings.llm.pretrained, self.folder / "llm"
        _write_lora(self.model.llm, None, lora, folder, self.dtype, base=base, task="CAUSAL_LM")

    def encoder(self, lang: str) -> nn.Module:
        base = WhisperEncoder.from_pretrained(self.folder / "encoder" / "base", dtype=self.dtype)
        return _with_lora(base, self.folder / "encoder" / lang) if adapted_layers(self.model.encoder) else base

    def llm(self) -> nn.Module:
        source = self.settings.llm.pretrained
        llm = AutoModelForCausalLM.from_pretrained(source, dtype=self.dtype, use_safetensors=True)
        return _with_lora(llm, self.folder / "llm")


class Merged(Target):
    """Plain models, summed in fp32 and then cast."""

    def write_encoder(self, langs: Sequence[str]) -> None:
        for lang in langs:
            folder = self.folder / "encoder" / lang
            _write_encoder(self.model.encoder, folder, self.dtype, lambda layer, lang=lang: layer.merged(lang))

    def write_llm(self) -> None:
        source, folder = self.settings.llm.pretrained, self.folder / "llm"
        with torch.device("meta"):
            llm = type(self.model.llm)(deepcopy(self.model.llm.config))
        llm.generation_config = self.model.llm.generation_config
        save_hf(folder, llm, _tensors(self.model.llm, lambda layer: layer.merged()), self.dtype)
        if not Path(source).is_dir():
            AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        for path in {path for pattern in TOKENIZER_FILES for path in Path(source).glob(pattern)}:
            shutil.copyfile(path, folder / path.name)

    def encoder(self, lang: str) -> nn.Module:
        return WhisperEncoder.from_pretrained(self.folder / "encoder" / lang, dtype=self.dtype)

    def llm(self) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.folder / "llm", dtype=self.dtype)


def _require_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError("--format peft: PEFT is not installed; `pip install peft`, or use --format merged") from error


def _with_lora(model: nn.Module, folder: Path) -> nn.Module:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder)


def _resolve(langs: Sequence[str], encoder: SpeechEncoder, settings: ModelSettings) -> list[str]:
    """`langs` with "all" replaced. Raises UserError for one that the encoder cannot be exported for."""
    layers = list(adapted_layers(encoder).values())
    known = settings.adapter.langs if layers else ()
    if "all" in langs and not known:
        raise UserError("--lang all: the encoder of this run has no adapter with languages; name them")
    found = list(dict.fromkeys(code for lang in langs for code in (known if lang == "all" else [lang])))
    for lang in found:
        languages.get(lang)
        for layer in layers[:1]:
            layer.low_rank(lang)
    return found


@contextlib.contextmanager
def _folder_beside(out: Path) -> Iterator[Path]:
    """`files.beside` for a folder."""
    with files.beside(out.resolve()) as folder:
        try:
            folder.mkdir()
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _write_encoder(
    encoder: SpeechEncoder, folder: Path, dtype: torch.dtype, plain: Callable[[AdaptedLinear], nn.Module]
) -> None:
    tensors = {**_tensors(encoder, plain), "positional_embedding": encoder.positional_embedding}
    save_hf_encoder(folder, tensors, num_heads=encoder.blocks[0].attn.n_head, dtype=dtype)


def _write_projector(projector: Projector, folder: Path, dtype: torch.dtype) -> None:
    gate = projector.gate
    sizes = {"width": gate.in_channels, "hidden_size": gate.out_channels, "llm_width": projector.out.out_features}
    files.write_json(folder / "config.json", {**sizes, "stride": STRIDE})
    write_tensors(folder / "model.safetensors", {name: t.to(dtype) for name, t in projector.state_dict().items()})


def _write_lora(
    module: nn.Module, lang: str | None, settings: AdapterSettings | LoraSettings, folder: Path, dtype: torch.dtype, *,
    base: str, task: str | None, rename: Callable[[str], str] = str,
) -> None:  # fmt: skip
    """The adapters of `module` for `lang` in PEFT's form, which scales by itself."""
    tensors = {}
    for name, layer in adapted_layers(module).items():
        A, B = layer.low_rank(lang)
        for part, factor in (("lora_A", A), ("lora_B", B / (settings.alpha / settings.rank))):
            tensors[f"base_model.model.{rename(f'{name}.{part}.weight')}"] = factor.to(dtype)
    targets = sorted({name.split(".")[-3] for name in tensors})
    lora = {"peft_type": "LORA", "r": settings.rank, "lora_alpha": settings.alpha, "target_modules": targets}
    plain = {"bias": "none", "fan_in_fan_out": False, "inference_mode": True, "lora_dropout": 0.0}
    about = {"base_model_name_or_path": base, "task_type": task}
    files.write_json(folder / "adapter_config.json", lora | plain | about)
    write_tensors(folder / "adapter_model.safetensors", tensors, format="pt")


def _tensors(module: nn.Module, plain: Callable[[AdaptedLinear], nn.Module]) -> dict[str, Tensor]:
    """The state of `module`, of each adapted layer with the weight and bias of `plain(layer)` alone."""
    layers = adapted_layers(module)
    inside = tuple(f"{name}." for name in layers)
    tensors = {name: t for name, t in module.state_dict().items() if not name.startswith(inside)}
    for name, layer in layers.items():
        linear = plain(layer)
        tensors |= {f"{name}.{key}": getattr(linear, key) for key in ("weight", "bias")}
    return {name: t.detach() for name, t in tensors.items() if t is not None}

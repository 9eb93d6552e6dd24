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
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import whisper
from lhotse import Recording
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from zipperasr import config, files, languages
from zipperasr.adapters import AdapterSettings, adapted_layers
from zipperasr.adapters.base import AdaptedLinear
from zipperasr.data import audio, features
from zipperasr.errors import UserError
from zipperasr.model import LoraSettings, ModelSettings, RunSettings, find_checkpoint
from zipperasr.model.checkpoint import load_run
from zipperasr.model.encoder import FRAMES_PER_S, SpeechEncoder
from zipperasr.model.projector import STRIDE, Projector
from zipperasr.model.speech_llm import SpeechLLM
from zipperasr.model.whisper_io import hf_name
from zipperasr.prompts import prompt_ids

NOISE_S = 3
TOKENIZER_FILES = ("*token*", "*vocab*", "merges.txt", "chat_template*", "*.model")


def export(
    run_dir: Path, out: Path, langs: Sequence[str], *, format: Literal["peft", "merged"], dtype=torch.float32,
    step: int | None = None, recordings: Sequence[Path] = (),
) -> dict[str, Any]:  # fmt: skip
    """Write a run's model (at `step`, by default its latest) for `langs` to the new folder `out`; returns parity.json.

    langs: codes, or "all" for the adapter's. recordings: audio to compare on; seeded noise if there is none.
    Raises UserError, and writes nothing, when `out` exists, a recording cannot be read, a language is unknown, or no
    plain LoRA equals the adapter.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; choose another --out or delete it")
    if format == "peft":
        _require_peft()
    samples = [_samples(path) for path in recordings]
    settings, model = config.load(run_dir / "config.yaml", RunSettings).model, load_run(run_dir, step)
    langs = _resolve(langs, model.encoder, settings)
    windows = {lang: [_window(x, model.encoder) for x in samples or [_noise(i)]] for i, lang in enumerate(langs)}
    with _folder_beside(out) as folder:
        target = {"peft": Peft, "merged": Merged}[format](model, settings, folder, dtype)
        target.write_encoder(langs)
        target.write_llm()
        _write_projector(model.projector, folder / "projector", dtype)
        report = {
            "run": str(run_dir),
            "checkpoint": find_checkpoint(run_dir, step).name,
            "format": format,
            "dtype": str(dtype).removeprefix("torch."),
            "audio": [str(path) for path in recordings] or f"{NOISE_S} s of seeded noise",
            "frames": f"all of each window of {model.encoder.max_frames / FRAMES_PER_S:g} s",
            "largest_difference": _parity(target, windows),
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
        _save_encoder(encoder, _tensors(encoder, lambda layer: layer), folder / "base", self.dtype)
        for lang in langs if adapted_layers(encoder) else ():
            lora = _lora(encoder, lang, self.settings.adapter, hf_name)
            _save_lora(lora, self.settings.adapter, folder / lang, self.dtype, base="../base", task=None)

    def write_llm(self) -> None:
        settings = self.settings.llm
        lora = _lora(self.model.llm, None, settings.lora, str)
        _save_lora(lora, settings.lora, self.folder / "llm", self.dtype, base=settings.pretrained, task="CAUSAL_LM")

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
            tensors = _tensors(self.model.encoder, lambda layer, lang=lang: layer.merged(lang))
            _save_encoder(self.model.encoder, tensors, self.folder / "encoder" / lang, self.dtype)

    def write_llm(self) -> None:
        source, folder = self.settings.llm.pretrained, self.folder / "llm"
        with torch.device("meta"):
            llm = type(self.model.llm)(deepcopy(self.model.llm.config))
        llm.generation_config = self.model.llm.generation_config
        _save(llm, _tensors(self.model.llm, lambda layer: layer.merged()), folder, self.dtype)
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


def _write_projector(projector: Projector, folder: Path, dtype: torch.dtype) -> None:
    gate = projector.gate
    sizes = {"width": gate.in_channels, "hidden_size": gate.out_channels, "llm_width": projector.out.out_features}
    files.write_json(folder / "config.json", {**sizes, "stride": STRIDE})
    save_file({name: t.to(dtype) for name, t in projector.state_dict().items()}, folder / "model.safetensors")


def _lora(
    module: nn.Module, lang: str | None, settings: AdapterSettings | LoraSettings, rename: Callable[[str], str]
) -> dict[str, Tensor]:
    """The adapters of `module` for `lang` under PEFT's names; PEFT scales by itself."""
    tensors = {}
    for name, layer in adapted_layers(module).items():
        A, B = layer.low_rank(lang)
        tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B / (settings.alpha / settings.rank)}
    return {f"base_model.model.{rename(name)}": t for name, t in tensors.items()}


def _save_lora(
    tensors: Mapping[str, Tensor], settings: AdapterSettings | LoraSettings, folder: Path, dtype: torch.dtype, *,
    base: str, task: str | None,
) -> None:  # fmt: skip
    targets = sorted({name.split(".")[-3] for name in tensors})
    lora = {"peft_type": "LORA", "r": settings.rank, "lora_alpha": settings.alpha, "target_modules": targets}
    plain = {"bias": "none", "fan_in_fan_out": False, "inference_mode": True, "lora_dropout": 0.0}
    about = {"base_model_name_or_path": base, "task_type": task}
    files.write_json(folder / "adapter_config.json", lora | plain | about)
    cast = {name: t.to(dtype).contiguous() for name, t in tensors.items()}
    save_file(cast, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _tensors(module: nn.Module, plain: Callable[[AdaptedLinear], nn.Module]) -> dict[str, Tensor]:
    """The state of `module`, of each adapted layer with the weight and bias of `plain(layer)` alone."""
    layers = adapted_layers(module)
    inside = tuple(f"{name}." for name in layers)
    tensors = {name: t for name, t in module.state_dict().items() if not name.startswith(inside)}
    for name, layer in layers.items():
        linear = plain(layer)
        tensors |= {f"{name}.{key}": getattr(linear, key) for key in ("weight", "bias")}
    return {name: t.detach() for name, t in tensors.items() if t is not None}


def _save_encoder(encoder: SpeechEncoder, tensors: Mapping[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    block, positions = encoder.blocks[0], encoder.positional_embedding
    sizes = WhisperConfig(
        d_model=encoder.width, encoder_layers=len(encoder.blocks), encoder_attention_heads=block.attn.n_head,
        encoder_ffn_dim=block.mlp[0].out_features, num_mel_bins=encoder.conv1.in_channels,
        max_source_positions=len(positions),
    )  # fmt: skip
    with torch.device("meta"):
        model = WhisperEncoder(sizes)
    tensors = {**tensors, "positional_embedding": positions}
    _save(model, {hf_name(name): t for name, t in tensors.items()}, folder, dtype)


def _save(model: PreTrainedModel, tensors: Mapping[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    """Write `model`, built on the meta device, with `tensors` cast to `dtype`."""
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    model.to(dtype).save_pretrained(folder)


@torch.inference_mode()
def _parity(target: Target, windows: Mapping[str, Sequence[Tensor]]) -> dict[str, dict[str, float]]:
    """By language: the largest differences of encoder frames, and of logits on the prompt and the run's own speech
    embeddings, between the run in fp32 and the export in its dtype; and for scale the run's largest values."""
    model, llm, rows = target.model, target.llm(), {}
    for lang, some in windows.items():
        encoder, frames, logits = target.encoder(lang), [], []
        for window in some:
            ours, lengths = model.encoder([window], [lang])
            frames.append((ours, encoder(window.T[None].to(target.dtype)).last_hidden_state[0]))
            prompt = prompt_ids(model.tokenizer, lang)
            x = model.decoder_inputs([prompt], model.projector(ours, lengths))[0][None]  # [1, S, H]
            logits.append((model.llm(inputs_embeds=x).logits, llm(inputs_embeds=x.to(target.dtype)).logits))
        rows[lang] = _largest("encoder", frames) | _largest("llm_logits", logits)
    return rows


def _largest(name: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    difference = torch.stack([(ours - theirs).abs().max() for ours, theirs in pairs]).max().item()
    return {name: difference, f"{name}_scale": max(ours.abs().max().item() for ours, _ in pairs)}


def _samples(path: Path) -> Tensor:
    """The samples [T] of a recording at 16 kHz. Raises UserError where it is not whole."""
    try:
        audio.probe(str(path))
    except audio.BadAudio as error:
        raise UserError(f"--audio: {error.detail}; give whole audio files") from error
    return torch.from_numpy(audio.load_audio(Recording.from_file(path).to_cut()))


def _noise(seed: int) -> Tensor:
    return 0.1 * torch.randn(NOISE_S * audio.SAMPLE_RATE, generator=torch.Generator().manual_seed(seed))


def _window(samples: Tensor, encoder: SpeechEncoder) -> Tensor:
    """Log-mel features [30 s, bins] of samples cut, or padded with silence, to the encoder's window."""
    samples = whisper.pad_or_trim(samples, encoder.max_frames * features.HOP)
    return features.log_mel(samples, encoder.conv1.in_channels)

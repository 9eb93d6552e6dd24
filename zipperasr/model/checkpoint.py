"""Building a model from settings, and its trained tensors on disk.

A checkpoint holds only what was trained, as plain safetensors. The rest comes from the pretrained models and, for
stage 2, from the stage-1 weights in the run's own `init` folder, so a run directory is all that decoding needs.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from zipperasr import config, files
from zipperasr.adapters import AdapterSettings, adapt, adapted_layers
from zipperasr.data.tokenizer import load_tokenizer, stand_in_tokenizer
from zipperasr.errors import UserError
from zipperasr.model import WEIGHTS, ModelSettings, RunSettings, find_checkpoint, run_of
from zipperasr.model.ctc import PREFIX, UNITS, CtcHead, Units, load_trained_head
from zipperasr.model.encoder import ADAPTED, SpeechEncoder
from zipperasr.model.llm_io import load_llm
from zipperasr.model.projector import Projector
from zipperasr.model.random_init import random_llm, random_whisper
from zipperasr.model.speech_llm import SpeechLLM, set_trainable, stage_tensors
from zipperasr.model.tensors import check_fit, read_tensors, write_tensors
from zipperasr.model.whisper_io import load_whisper


def build(settings: ModelSettings, stage: int, *, device: torch.device | str = "cpu") -> SpeechLLM:
    """A model in fp32 on `device` from its pretrained or random parts, with what `stage` trains unfrozen.

    Stage 1 has no adapter on the encoder, whatever the settings say. Fresh parameters come from torch's global seed.
    Raises UserError when a part is missing.
    """
    if is_random := settings.init == "random":
        whisper, language_embeddings = random_whisper(settings.encoder.pretrained, device)
    else:
        whisper, language_embeddings = load_whisper(settings.encoder.pretrained)
    encoder = SpeechEncoder(whisper, pad_to_30s=settings.encoder.pad_to_30s)
    if stage == 2:
        _adapt_encoder(encoder, settings.adapter, language_embeddings)
    llm = random_llm(settings.llm, device) if is_random else load_llm(settings.llm)
    projector = Projector(encoder.width, settings.projector.hidden_size or encoder.width, llm.config.hidden_size)
    tokenizer = (stand_in_tokenizer if is_random else load_tokenizer)(settings.llm.pretrained)
    model = SpeechLLM(encoder, projector, llm, tokenizer, language_embeddings)
    set_trainable(model, stage)
    return model.to(device).eval()


def load_run(run_dir: Path | str, steps: Sequence[int] = ()) -> SpeechLLM:
    """The model that a run has trained: the mean of its checkpoints at `steps`, by default the latest complete one.

    Raises UserError when the run has no such checkpoint, or one that does not fit its config.yaml.
    """
    run_dir = Path(run_dir)
    settings = config.load(run_dir / "config.yaml", RunSettings)
    folders = [find_checkpoint(run_dir, step) for step in steps or [None]]
    model = build(settings.model, settings.stage)
    if settings.stage == 2:
        load_trainable(model, run_dir / "init", stage=1)
    load_trainable(model, *folders, stage=settings.stage)
    return model


def save_trainable(model: SpeechLLM, folder: Path | str) -> None:
    """Write `trainable.safetensors`: what the model's stage trains, under its own names."""
    with files.beside(Path(folder) / WEIGHTS) as temporary:
        write_tensors(temporary, stage_tensors(model, model.stage))


def load_trainable(model: SpeechLLM, *folders: Path | str, stage: int) -> None:
    """Fill in what `stage` trains from a folder, or with the mean of several (integers: the first's).

    Raises UserError unless all is there, fits exactly and is finite.
    """
    expected, sums = stage_tensors(model, stage), {}
    mend, spoilt = "use the configuration that this checkpoint was trained with", "go back to an earlier checkpoint"
    for folder in folders:
        path = Path(folder) / WEIGHTS
        tensors = read_weights(path, f"train stage {stage} first")
        check_fit(path, tensors, expected, mend=mend, spoilt=spoilt)
        for name, tensor in tensors.items():
            is_summed = name in sums and tensor.is_floating_point()
            sums[name] = sums[name] + tensor if is_summed else sums.get(name, tensor)
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(sums[name] / len(folders) if tensor.is_floating_point() else sums[name])


def warm_start(model: SpeechLLM, folder: Path, settings: AdapterSettings) -> None:
    """Initial-B (section IV-F of arXiv:2603.17558): start the encoder adapters from the checkpoint in `folder`.

    The shared and the specific banks are taken over; A and the router only if the settings say so. With all three, and
    the same method, the encoder is the source's for every language. Without A it is not: what B's columns mean was
    learnt on the source's A, so the new A must first come to agree with them (drawn from the same seed it is the A
    that the source began with, which LoRA moves little). Without the router the mixture starts anew.
    Zipper-LoRA-Static takes the first columns of the shared bank and the last ones of the specific banks.
    Raises UserError when the source is no zipper run of this rank and these languages.
    """
    path = folder / WEIGHTS
    tensors = read_weights(path, "train it first")
    source = config.load(run_of(folder) / "config.yaml", RunSettings).model.adapter
    mine = {"rank": settings.rank, "alpha": settings.alpha}
    theirs = {key: getattr(source, key, None) for key in mine}
    if mine != theirs:
        raise UserError(f"{folder}: trained with {theirs}, not {mine}; begin from a run with the same rank and alpha")
    for name, layer in adapted_layers(model.encoder).items():
        prefix = f"encoder.{name}."
        own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        try:
            layer.warm_start(own, init_A=settings.init_A, init_router=settings.init_router)
        except UserError as error:
            raise UserError(f"{path}: encoder.{name} {error}") from error


def add_ctc(model: SpeechLLM, units: Units, init: tuple[Path, Path] | None = None) -> None:
    """Give `model` a CTC head to train. Fresh parameters come from torch's global seed.

    init: the run, and a checkpoint's file of it, whose head is taken over for the characters that both know, if it was
    trained with one.
    """
    device = next(model.parameters()).device
    model.ctc, model.units = CtcHead(model.encoder.width, len(units)).to(device), units
    if init and (init[0] / UNITS).is_file():
        head, theirs = load_trained_head(*init)
        model.ctc.begin_as(head.to(device), mine=units, theirs=theirs)


def read_weights(path: Path, mend: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint's file, but for the CTC head's: nothing but training needs them.

    Raises UserError where it is not there (`mend` says what to do) or broken.
    """
    tensors = read_tensors(path, lacking=mend, broken="delete it and train again")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)}


def _adapt_encoder(encoder: SpeechEncoder, settings: AdapterSettings | None, embeddings: dict[str, Tensor]) -> None:
    if settings is None or not settings.langs:
        raise UserError("stage 2 needs model.adapter with its method and langs")
    try:
        adapt(encoder, ADAPTED, settings, language_embeddings=embeddings)
    except UserError as error:
        raise UserError(f"model.adapter: {error}") from error

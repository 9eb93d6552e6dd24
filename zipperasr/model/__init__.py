"""The Speech-LLM: encoder, projector, LLM, their assembly and checkpoints. Here: its settings, without torch."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from zipperasr import files
from zipperasr.adapters import AdapterSettings
from zipperasr.config import Settings
from zipperasr.errors import UserError

WEIGHTS = "trainable.safetensors"
ALIGNER, ALIGNER_SETTINGS = "aligner", "settings.json"  # the folder of a run, and a file in it

Step = int | Literal["best"] | None
Seconds = Annotated[float, Field(gt=0, le=30)]


class EncoderSettings(Settings):
    """`pretrained`: a Whisper, in openai-whisper's form or in that of transformers.

    A folder (written by ours or by transformers), a .pt file of openai-whisper, a name that this knows, such as
    large-v3, or a model id of the Hugging Face hub, such as openai/whisper-large-v3. Weights are never unpickled.
    """

    pretrained: str
    context: Literal["full", "chunked"] = "full"
    chunk_durations_s: tuple[Seconds, ...] = (1, 2, 4, 8)  # drawn from, per training batch
    decode_chunk_s: Seconds = 8
    pad_to_30s: bool = False  # as Whisper was trained; costs 2 to 7 times the compute


class ProjectorSettings(Settings):
    """`hidden_size`: width between the convolutions and the output; the encoder's width if null."""

    hidden_size: int | None = Field(None, gt=0)


class LoraSettings(Settings):
    """Standard LoRA on all linear layers of the LLM."""

    rank: int = Field(32, gt=0)
    alpha: float = Field(64, gt=0)


class LLMSettings(Settings):
    """`pretrained`: a decoder-only LLM of transformers, with plain causal attention in every layer.

    A folder or a model id of the Hugging Face hub, such as Qwen/Qwen3-1.7B: safetensors, and no code of its own.
    """

    pretrained: str
    lora: LoraSettings = LoraSettings()


class ModelSettings(Settings):
    """A Speech-LLM. `adapter` is that of the encoder, which exists in stage 2 only.

    `init`: random makes what both `pretrained` name (a size of sizes.py or a folder) without their weights, the same
    every time, so that nothing is downloaded; for benchmarks and tests.
    """

    encoder: EncoderSettings
    projector: ProjectorSettings = ProjectorSettings()
    llm: LLMSettings
    adapter: AdapterSettings | None = None
    init: Literal["pretrained", "random"] = "pretrained"


class RunSettings(Settings):
    """What a run's config.yaml says about its model; the other sections are not read."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    stage: Literal[1, 2]
    model: ModelSettings


def checkpoints_by_step(run_dir: Path | str) -> dict[int, Path]:
    """The folders of a run's complete checkpoints, oldest first."""
    folders = {int(folder.name.removeprefix("step-")): folder for folder in Path(run_dir, "checkpoints").glob("step-*")}
    return {step: f for step, f in sorted(folders.items()) if (f / WEIGHTS).is_file() and (f / "state.json").is_file()}


def run_of(checkpoint: Path) -> Path:
    """The run directory of a checkpoint folder."""
    return checkpoint.resolve().parent.parent


def find_checkpoint(run_dir: Path | str, step: int | None = None) -> Path:
    """The folder of a run's checkpoint at `step`, or of its latest complete one. Raises UserError if there is none."""
    complete = checkpoints_by_step(run_dir)
    if not complete:
        raise UserError(f"{run_dir}: no complete checkpoint; train it first")
    if step is not None and step not in complete:
        raise UserError(f"{run_dir}: no checkpoint at step {step}; there are {', '.join(map(str, complete))}")
    return complete[max(complete) if step is None else step]


def choose_steps(run_dir: Path | str, step: Step = None, *, average: int = 1) -> tuple[int, ...]:
    """The steps of the checkpoints whose mean is wanted: `step`, or the latest, and those before it.

    "best" means those with the lowest dev error. Raises UserError where a run has not kept as many.
    """
    find_checkpoint(run_dir, None if step == "best" else step)
    complete = checkpoints_by_step(run_dir)
    rated = {at: files.read_json(path / "state.json").get("dev") for at, path in complete.items()}
    if step == "best":
        chosen = sorted((at for at in complete if rated[at] is not None), key=rated.__getitem__)
    else:
        chosen = [at for at in reversed(complete) if step is None or at <= step]
    if len(chosen) < average:
        what = f"{len(chosen)} checkpoints{' with a dev error' * (step == 'best')} are kept, {average} asked"
        raise UserError(f"{run_dir}: {what}; train with a larger training.stage<N>.keep_last or keep_best")
    return tuple(chosen[:average])

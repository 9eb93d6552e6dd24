"""Training with DeepSpeed ZeRO-2 as the one engine, on CPU and GPU. Here: its settings."""

from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from zipperasr.config import Settings
from zipperasr.data.packing import SamplingSettings

Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class StageSettings(Settings):
    """One stage's data and optimisation. The learning rate warms up linearly and then falls to zero along a cosine."""

    setting: str
    """The setting of the utterance lists: trained on its `train` lists, watched on its `dev` lists."""
    sampling: SamplingSettings = SamplingSettings()
    """How often each language is trained on."""
    ctc_weight: NonNegativeFloat = 0.0
    """Weight of a character CTC loss on the encoder, a mean over characters, beside the LLM's loss. The run then has an
    aligner at its end. At 0 there is none, and the loss is the paper's."""
    epochs: PositiveInt = 1
    max_steps: PositiveInt | None = None
    """Steps in place of `epochs`."""
    accumulation: PositiveInt = 1
    """Micro-batches of `data.packing.rows_per_batch` rows that each GPU adds up for one step. A run that goes on with
    another number of GPUs shares the same micro-batches among them."""
    recompute_encoder: Share = 0.0
    """Share of the encoder's blocks whose activations are not kept but made again in the backward pass."""
    recompute_llm: Share = 0.0
    """The same of the LLM's blocks."""
    lr: PositiveFloat = 2e-5
    lr_scale: dict[str, NonNegativeFloat] = {}
    """Factor on `lr` for the parameters whose name begins so, as in `{projector: 10}`; the longest prefix counts."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.0
    warmup_ratio: Fraction = 0.1
    max_grad_norm: PositiveFloat = 1.0
    max_loss_ratio: PositiveFloat = 10.0
    """A loss over this many nats a token and this many times its running mean has exploded: training stops."""
    seed: int = 0
    num_workers: NonNegativeInt = 2
    log_every: PositiveInt = 10
    """Steps between updates of TensorBoard and the progress bar; log.jsonl has every step."""
    dev_every: PositiveInt | None = None
    """Steps between passes over the dev lists; there is always one at the end."""
    dev_utts: NonNegativeInt = 16
    """Utterances of each language, the first of its dev lists, that such a pass transcribes for an error rate."""
    save_every: PositiveInt = 500
    keep_last: PositiveInt = 2
    """Checkpoints whose weights are kept; only the newest keeps the optimizer's state, for resuming."""
    keep_best: NonNegativeInt = 0
    """Beside those, as many with the lowest dev error rate (dev loss where nothing is transcribed); every pass over the
    dev lists then saves one."""


UNBOUND = frozenset(
    "recompute_encoder recompute_llm num_workers log_every dev_every dev_utts save_every keep_last keep_best".split()
)
"""Settings that do not change what is learnt, so a run may be resumed with other values."""


class AlignerSettings(Settings):
    """The CTC head for word times, trained alone on the frozen encoder of a finished run (zipperasr train-aligner)."""

    epochs: PositiveInt = 4
    max_steps: PositiveInt | None = None
    """Steps in place of `epochs`."""
    rows_per_batch: PositiveInt = 8
    """Rows of data.packing.max_tokens_per_row that a step takes."""
    lr: PositiveFloat = 1e-2
    """Highest rate; it warms up linearly and then falls along a cosine."""
    weight_decay: NonNegativeFloat = 0.0
    warmup_ratio: Fraction = 0.1
    seed: int = 0
    num_workers: NonNegativeInt = 0


class TrainingSettings(Settings):
    """Both stages of the recipe (section IV-A, arXiv:2603.17558), and what is trained on a finished run."""

    stage1: StageSettings
    stage2: StageSettings
    aligner: AlignerSettings = AlignerSettings()

"""Training with DeepSpeed ZeRO-2 as the one engine, on CPU and GPU. Here: its settings."""

from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from zipperasr.config import Settings

Fraction = Annotated[float, Field(ge=0, lt=1)]


class StageSettings(Settings):
    """One stage's data and optimisation. The learning rate warms up linearly and then falls to zero along a cosine."""

    setting: str
    """The setting of the utterance lists: trained on its `train` lists, watched on its `dev` lists."""
    epochs: PositiveInt = 1
    max_steps: PositiveInt | None = None
    """Steps in place of `epochs`."""
    accumulation: PositiveInt = 1
    """Micro-batches of `data.packing.rows_per_batch` rows that each GPU adds up for one step."""
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
    save_every: PositiveInt = 500
    keep_last: PositiveInt = 2
    """Checkpoints whose weights are kept; only the newest keeps the engine's state, for resuming."""


UNBOUND = frozenset({"num_workers", "log_every", "dev_every", "save_every", "keep_last"})
"""Settings that do not change what is learnt, so a run may be resumed with other values."""


class TrainingSettings(Settings):
    """Both stages of the recipe (section IV-A, arXiv:2603.17558)."""

    stage1: StageSettings
    stage2: StageSettings

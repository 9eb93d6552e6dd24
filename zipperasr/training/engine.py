"""DeepSpeed ZeRO-2 around a model: fp32 with gloo on a CPU, bf16 with NCCL on GPUs."""

from __future__ import annotations

import math
import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zipperasr.adapters import language_parameters
from zipperasr.errors import UserError
from zipperasr.training import StageSettings

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""The environment that torchrun would set, for one process; port 0 is whichever is free."""
MAX_BUCKET = 100_000_000
"""Gradient elements that are reduced together."""


def prepare_process() -> None:
    """Choose this rank's device; to be called before anything imports DeepSpeed, as transformers does."""
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"


def start(model: nn.Module, settings: StageSettings) -> DeepSpeedEngine:
    """An engine that trains the parameters of `model` that require gradients, on every rank from rank 0's weights.

    One backward pass to the engine is one step: micro-batches are added up by the trainer.
    """
    prepare_process()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # names that DeepSpeed uses
    import deepspeed

    is_cuda = torch.cuda.is_available()
    if not is_cuda:  # else it compiles an operator that one machine's gloo does not need
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    groups = parameter_groups(model, settings)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": settings.max_grad_norm,
        "bf16": {"enabled": is_cuda},
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": min(MAX_BUCKET, sum(p.numel() for group in groups for p in group["params"])),
        },
    }
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)
    optimizer.register_step_pre_hook(_leave_alone)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for group in optimizer.param_groups:  # a group may rest in the first step, and ZeRO links all groups' state there
        for p in group["params"]:
            optimizer.state[p] = {"step": torch.tensor(0.0), "exp_avg": p.data * 0, "exp_avg_sq": p.data * 0}
    return engine


def parameter_groups(model: nn.Module, settings: StageSettings) -> list[dict[str, Any]]:
    """Trainable parameters by factor on the learning rate and by the language that alone uses them, if one does.

    Raises UserError for a prefix of `lr_scale` that names none of them.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for prefix in settings.lr_scale:
        if not any(name.startswith(prefix) for name, _ in trainable):
            parts = ", ".join(sorted({name.split(".")[0] for name, _ in trainable}))
            raise UserError(f"lr_scale: no trainable parameter begins with '{prefix}'; they begin with {parts}")
    lang_of = {id(p): lang for lang, parameters in language_parameters(model).items() for p in parameters}
    groups: dict[tuple[float, str | None], list[nn.Parameter]] = {}
    for name, parameter in trainable:
        prefix = max((p for p in settings.lr_scale if name.startswith(p)), key=len, default="")
        key = settings.lr_scale.get(prefix, 1.0), lang_of.get(id(parameter))
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr_scale": scale, "lang": lang, "is_resting": False}
        for (scale, lang), parameters in groups.items()
    ]


def learning_rate(step: int, *, total_steps: int, settings: StageSettings) -> float:
    """The rate after `step` steps: a linear rise over `warmup_ratio` of all steps, then a cosine to zero."""
    warmup = math.ceil(settings.warmup_ratio * total_steps)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total_steps - warmup)))


def set_learning_rate(engine: DeepSpeedEngine, lr: float) -> None:
    """Give every parameter group its share of `lr`."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def rest(engine: DeepSpeedEngine, langs: set[str]) -> None:
    """In the next step, leave the parameters of `langs` alone: nothing in the global batch used them.

    ZeRO's flat buffers give them zero gradients, with which momentum and weight decay would still move them.
    """
    for group in engine.optimizer.param_groups:
        group["is_resting"] = group["lang"] in langs


def _leave_alone(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """AdamW passes by what has no gradient."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["is_resting"] else ():
            parameter.grad = None

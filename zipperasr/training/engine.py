"""DeepSpeed ZeRO-2 around a model: fp32 with gloo on a CPU, bf16 with NCCL on GPUs."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zipperasr.adapters import language_parameters
from zipperasr.errors import UserError
from zipperasr.model import WEIGHTS
from zipperasr.model.recompute import recompute
from zipperasr.model.speech_llm import stage_tensors
from zipperasr.training import StageSettings, checkpoints
from zipperasr.training.process import prepare_process

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MAX_BUCKET = 100_000_000
"""Gradient elements that are reduced together."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter, under its own names."""


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
    recompute(model, encoder=settings.recompute_encoder, llm=settings.recompute_llm)
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
    decay = settings.weight_decay
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, weight_decay=decay, fused=is_cuda)
    optimizer.register_step_pre_hook(_leave_alone)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for group in optimizer.param_groups:  # a group may rest in the first step, and ZeRO links all groups' state there
        for p in group["params"]:
            step = torch.zeros((), device=p.device)
            optimizer.state[p] = {"step": step} | {name: torch.zeros_like(p.data) for name in MOMENTS}
    engine.optimizer._lazy_init_hp_params_optimizer_state()  # else at the first step, and a resumed one comes too late
    return engine


def parameter_groups(model: nn.Module, settings: StageSettings) -> list[dict[str, Any]]:
    """Trainable parameters by factor on the learning rate and by the language that alone uses them, if one does.

    Raises UserError for a prefix of `lr_scale` that names none of them.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for prefix in settings.lr_scale:
        if not any(name.startswith(prefix) for name, _ in trainable):
            parts = ", ".join(sorted({name.split(".")[0] for name, _ in trainable}))
            mend = "; leave it out where ctc_weight is 0" * prefix.startswith("ctc")
            raise UserError(f"lr_scale: no trainable parameter begins with '{prefix}'; they begin with {parts}{mend}")
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


def frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what a checkpoint of `model` holds though it is not trained, such as the banks of other languages.

    To be taken before the engine rounds the model to bf16.
    """
    stored = stage_tensors(model, model.stage)
    return {name: t.detach().clone() for name, t in stored.items() if t.is_floating_point() and not t.requires_grad}


def gather(engine: DeepSpeedEngine) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The trained weights in fp32 by name, and the moments by `<moment>.<name>`, whole, on rank 0's CPU.

    Every rank calls this; the others get nothing.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    weights, moments = {}, {}
    for name, parameter in _trained(engine):
        whole = {name: safe_get_full_fp32_param(parameter)}
        states = {f"{key}.{name}": safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
        if engine.global_rank == 0:
            weights |= {key: tensor.cpu() for key, tensor in whole.items()}
            moments |= {key: tensor.cpu() for key, tensor in states.items()}
    if engine.global_rank == 0:
        weights |= {name: t.cpu().clone() for name, t in _untrained(engine)}
    return weights, moments


def restore(engine: DeepSpeedEngine, run_dir: Path, state: checkpoints.State) -> None:
    """Fill the engine with the newest checkpoint, which `state` is of. Raises UserError when a file is broken."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    with checkpoints.reading(run_dir) as read:
        for name, parameter in _trained(engine):
            safe_set_full_fp32_param(parameter, read(WEIGHTS, name))
            for key in MOMENTS:
                safe_set_full_optimizer_state(parameter, read(checkpoints.OPTIMIZER, f"{key}.{name}"), key)
        for name, tensor in _untrained(engine):
            tensor.data.copy_(read(WEIGHTS, name))
    engine.optimizer.update_lp_params()
    for steps, taken in zip(_steps(engine), state.optimizer_steps, strict=True):
        steps.fill_(taken)


def optimizer_steps(engine: DeepSpeedEngine) -> list[int]:
    """How many steps each parameter group has taken."""
    return [int(steps) for steps in _steps(engine)]


def _steps(engine: DeepSpeedEngine) -> list[Tensor]:
    optimizer = engine.optimizer.optimizer
    return [optimizer.state[group["params"][0]]["step"] for group in optimizer.param_groups]


def _trained(engine: DeepSpeedEngine) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


def _untrained(engine: DeepSpeedEngine) -> list[tuple[str, Tensor]]:
    """What a checkpoint holds beside the trained weights."""
    stored = stage_tensors(engine.module, engine.module.stage)
    return [(name, t) for name, t in stored.items() if not t.requires_grad]


def _leave_alone(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """AdamW passes by what has no gradient."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["is_resting"] else ():
            parameter.grad = None

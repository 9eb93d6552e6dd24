"""Low-rank adapters on frozen linear layers of any torch model, one file per method and one line in REGISTRY each.

    adapt(model, ["q_proj", "v_proj"], AdapterSettings(langs=("de", "sw"), zipper={"signal": "learned"}))
    with batch_languages(["de", "sw", "sw"]):
        loss = model(**batch).loss

This module is light: torch is imported where it is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from zipperasr.config import Settings
from zipperasr.errors import UserError
from zipperasr.languages import LANGUAGES

if TYPE_CHECKING:
    from torch import Tensor, nn

    from zipperasr.adapters.base import AdaptedLinear
    from zipperasr.adapters.batch import Banks

REGISTRY = {
    "vanilla": "Vanilla",
    "flylora": "FlyLoRA",
    "independent": "Independent",
    "zipper_static": "ZipperStatic",
    "zipper_hard": "ZipperHard",
    "zipper_soft": "ZipperSoft",
}  # method (also the name of its file here) -> class, in the order of the paper's tables

Share = Annotated[float, Field(gt=0, le=1)]


class ZipperSettings(Settings):
    """What the zipper variants add (section IV, arXiv:2603.17558)."""

    num_shared: PositiveInt | None = None
    """Static (Eq. 11): the shared ranks; half of all if null."""
    tau: float = Field(0.5, ge=0, le=1)
    """Hard (Eq. 12): the threshold on p."""
    specific_where: Literal[1, 0] = 1
    """Hard (Eq. 13): the mask's value at which the specific column is taken; 0 is the literal reading."""
    signal: Literal["whisper", "learned", "onehot"] = "whisper"
    """What the router knows of a language (zipperasr/adapters/signals.py)."""
    router: Literal["per_layer", "shared"] = "per_layer"
    """One router for each adapted layer, or the same for all."""


class FlyLoRASettings(Settings):
    """What FlyLoRA adds (Eq. 9); zipperasr/adapters/flylora.py tells where its authors' two codes disagree."""

    top_k: PositiveInt = 8
    sparsity: Share | None = None
    """The share of entries in each row of A that are not zero; top_k / rank if null."""
    score: Literal["signed", "absolute"] = "signed"
    x_gradient: bool = True
    bias_rule: Literal["mean", "share"] = "mean"
    bias_rate: float = Field(1e-3, ge=0)


class AdapterSettings(Settings):
    """How linear layers are adapted. Rank and alpha follow arXiv:2603.17558, section V-B."""

    method: str = "zipper_soft"
    rank: PositiveInt = 32
    alpha: float = Field(64, gt=0)
    langs: tuple[str, ...] = ()
    """Languages with a bank of their own."""
    unseen: Literal["shared", "nearest"] = "shared"
    """What a language outside `langs` gets: the shared bank alone (no update from `independent`), or the bank of the
    language whose Whisper embedding is most like its own."""
    zipper: ZipperSettings = ZipperSettings()
    flylora: FlyLoRASettings = FlyLoRASettings()
    init_from: str | None = None
    """Initial-B: a finished zipper run, or one of its checkpoints, whose banks this adapter begins with."""
    init_A: bool = False
    """Initial-B takes over A too. The paper starts from B alone: B's columns then meet the new A's rows, whose outputs
    they were not trained on, and the first forward pass is not the source's."""
    init_router: bool = False
    """Initial-B takes over the router too."""

    @field_validator("method")
    @classmethod
    def _is_known(cls, method: str) -> str:
        if method not in REGISTRY:
            raise ValueError(f"known methods: {', '.join(REGISTRY)}")
        return method

    @model_validator(mode="after")
    def _fits_the_rank(self) -> AdapterSettings:
        if self.method == "zipper_static":
            if self.zipper.num_shared is None and self.rank % 2:
                raise ValueError(f"rank {self.rank} cannot be halved for zipper_static: set zipper.num_shared")
            if (self.zipper.num_shared or 0) >= self.rank:
                raise ValueError(f"zipper.num_shared {self.zipper.num_shared} leaves no specific rank of {self.rank}")
        if self.method == "flylora" and self.flylora.top_k > self.rank:
            raise ValueError(f"flylora.top_k {self.flylora.top_k} exceeds the rank {self.rank}")
        if self.init_from and not self.method.startswith("zipper_"):
            raise ValueError(f"init_from: {self.method} has no shared and specific banks; zipper variants have")
        return self


def method_class(method: str) -> type[AdaptedLinear]:
    """The layer class of a method."""
    return getattr(importlib.import_module(f"{__name__}.{method}"), REGISTRY[method])


def adapt(
    module: nn.Module,
    patterns: Iterable[str],
    settings: AdapterSettings,
    *,
    language_embeddings: Mapping[str, Tensor] | None = None,
) -> int:
    """Freeze `module` and adapt each of its linear layers whose name ends in one of `patterns`; returns their number.

    A pattern is a name or the end of one; with * for anything, "encoder.*.q_proj", it means the linear layers alone.
    language_embeddings: {language: vector [E]}, at least for `settings.langs`; what the signal `whisper` and the policy
    `nearest` read. Raises UserError for a pattern that matches no layer, or one whose weight its parent reads itself.
    """
    from zipperasr.adapters.router import Routers

    cls, embeddings = method_class(settings.method), language_embeddings or {}
    if cls.by_language and not settings.langs:
        raise UserError(f"{settings.method} adapts by language: name the languages in langs")
    names = list(dict.fromkeys(name for pattern in patterns for name in _matching(module, pattern)))
    routers = Routers(settings, embeddings)
    banks = _banks(settings, embeddings) if cls.by_language else None
    module.requires_grad_(False)
    for name in names:
        module.set_submodule(name, cls(module.get_submodule(name), settings, banks, routers))
    return len(names)


def adapted_layers(module: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted layers of `module`, by name."""
    from zipperasr.adapters.base import AdaptedLinear

    return {name: layer for name, layer in module.named_modules() if isinstance(layer, AdaptedLinear)}


def adapter_state(module: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint of the adapters of `module` holds, each tensor once: their parameters and buffers, by name."""
    own = {
        f"{name}.{key}" for name, layer in adapted_layers(module).items() for key in layer.state_dict()
        if key not in ("weight", "bias")
    }  # fmt: skip
    return {name: t for name, t in [*module.named_parameters(), *module.named_buffers()] if name in own}


def load_adapter_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fill the adapters of `module` with what `adapter_state` gave. Raises UserError unless names and shapes fit."""
    import torch

    own = adapter_state(module)
    differing = sorted(own.keys() ^ state.keys()) or [n for n, t in own.items() if t.shape != state[n].shape]
    if differing:
        raise UserError(
            f"{len(differing)} tensors of the state do not fit the adapters, such as '{differing[0]}'; adapt the model "
            "with the settings (method, rank, langs) that the state was made with"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def language_parameters(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The adapters' parameters that belong to one language alone, by language, each once.

    A step whose batch lacks a language leaves their gradients at None, and an optimizer should then leave them alone.
    """
    found: dict[str, dict[int, nn.Parameter]] = {}
    for layer in adapted_layers(module).values():
        for lang, parameters in layer.by_lang().items():
            found.setdefault(lang, {}).update((id(p), p) for p in parameters)
    return {lang: list(parameters.values()) for lang, parameters in found.items()}


def specific_shares(module: nn.Module) -> dict[str, float]:
    """The mean share over all layers of ranks that are a language's own, by language; {} where nothing is routed."""
    import torch

    shares: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for layer in adapted_layers(module).values():
            for lang in layer.by_lang():
                if (share := layer.specific_share(lang)) is not None:
                    shares.setdefault(lang, []).append(share.float())
        return {lang: torch.stack(each).mean().item() for lang, each in shares.items()}


def balance(module: nn.Module, sum_over_ranks: Callable[[Tensor], Any] = lambda load: None) -> None:
    """After each optimizer step: let FlyLoRA balance its ranks; other methods have nothing to do.

    sum_over_ranks: adds up a tensor of counts over processes, in place.
    """
    import torch

    layers = [layer for layer in adapted_layers(module).values() if layer.balances]
    if layers:
        loads = torch.stack([layer.load for layer in layers])
        sum_over_ranks(loads)
        for layer, load in zip(layers, loads, strict=True):
            layer.balance(load)


def __getattr__(name: str) -> Any:
    """`batch_languages`, `checkpoint_contexts` and `language_runs`, which need torch."""
    if name in ("batch_languages", "checkpoint_contexts", "language_runs"):
        return getattr(importlib.import_module(f"{__name__}.batch"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _matching(module: nn.Module, pattern: str) -> Iterator[str]:
    """Names of the linear layers that `pattern` means."""
    from fnmatch import fnmatchcase

    from torch import nn

    names = [name for name, _ in module.named_modules() if name and fnmatchcase(f".{name}", f"*.{pattern}")]
    if "*" in pattern:
        names = [name for name in names if isinstance(module.get_submodule(name), nn.Linear)]
    if not names:
        raise UserError(f"no layer '{pattern}' in {type(module).__name__}: this architecture is not supported")
    for name in names:
        layer, parent = module.get_submodule(name), module.get_submodule(name.rpartition(".")[0])
        is_plain = isinstance(layer, nn.Linear) and layer.weight.shape == (layer.out_features, layer.in_features)
        if not is_plain or isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
            raise UserError(
                f"'{name}' is a {type(layer).__name__} in a {type(parent).__name__}: only an nn.Linear whose parent "
                "calls it can be adapted, and no layer twice; choose other patterns"
            )
        yield name


def _banks(settings: AdapterSettings, embeddings: Mapping[str, Tensor]) -> Banks:
    """Whose bank each known language uses."""
    from zipperasr.adapters.batch import Banks

    others = [lang for lang in dict.fromkeys([*embeddings, *LANGUAGES]) if lang not in settings.langs]
    if settings.unseen == "shared":
        return Banks(settings.langs, dict.fromkeys(others))
    absent = [lang for lang in settings.langs if lang not in embeddings]
    if absent:
        raise UserError(f"unseen: nearest needs a language embedding of {', '.join(absent)}; give it, or use shared")
    near = {lang: nearest(lang, settings.langs, embeddings) for lang in others if lang in embeddings}
    return Banks(settings.langs, near)


def nearest(lang: str, among: Sequence[str], embeddings: Mapping[str, Tensor]) -> str:
    """The language of `among` whose embedding has the largest cosine with that of `lang`."""
    from torch.nn.functional import cosine_similarity

    return max(among, key=lambda other: cosine_similarity(embeddings[lang], embeddings[other], dim=0).item())

"""Another language for trained adapters, beside which those that they have stay as they are.

A method with a bank per language has all that is a language's own in `nn.ParameterDict`s by language (base.py), so what
a language begins with is said for every method at once: its banks, and its vector where the routing signal is learned.
With Whisper's embeddings the router's weights are shared, and the mixture is what it makes of the language's embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal, get_args

from zipperasr.adapters import REGISTRY, AdapterSettings, adapted_layers, method_class, nearest
from zipperasr.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

Begin = Literal["nearest", "mean", "zero"]
"""The bank that a language begins with: that of the language whose Whisper embedding is most like its own, the mean of
all languages' banks, or none (B zero and all else drawn at random, as a fresh adapter begins)."""
BEGINS: tuple[Begin, ...] = get_args(Begin)


def extended(settings: AdapterSettings, lang: str) -> AdapterSettings:
    """`settings` with `lang` behind the languages that have a bank.

    Raises UserError where it has one, and where another language cannot join without changing the others.
    """
    from zipperasr.adapters.signals import SIGNALS
    from zipperasr.adapters.zipper import Routed

    if not method_class(settings.method).by_language:
        banked = [method for method in REGISTRY if method_class(method).by_language]
        raise UserError(
            f"{settings.method} has no banks per language: another one would change what all share; "
            f"add it to a run of {', '.join(banked)}"
        )
    signal, is_routed = settings.zipper.signal, issubclass(method_class(settings.method), Routed)
    if is_routed and not SIGNALS[signal].extensible:
        free = [name for name in SIGNALS if SIGNALS[name].extensible]
        raise UserError(
            f"the routing signal {signal} has a place for each language: another place would change every other "
            f"language's mixture; add the language to a run with zipper.signal {' or '.join(free)}"
        )
    if lang in settings.langs:
        raise UserError(f"'{lang}' has a bank already; the languages with one are {', '.join(settings.langs)}")
    return settings.model_copy(update={"langs": (*settings.langs, lang)})


def begin_language(
    module: nn.Module, lang: str, begin: Begin, *, language_embeddings: Mapping[str, Tensor]
) -> str | None:
    """Set what is the own of `lang`, new in the adapters of `module`; returns the nearest language where that is used.

    `zero` leaves it as it was drawn. Raises UserError for `nearest` where Whisper does not know the language, and where
    a router gives the language no rank of its own, so that its bank could not learn.
    """
    import torch

    shares = [layer.specific_share(lang) for layer in adapted_layers(module).values()]
    if not any(share is None or share.any() for share in shares):
        raise UserError(
            f"the routers give '{lang}' no rank of its own in any layer, so there is nothing to train; add it to a run "
            "of zipper_soft, whose routers mix"
        )
    own = list(_by_lang(module, lang))
    if begin == "zero":
        return None
    near = _nearest(lang, own[0].keys(), language_embeddings) if begin == "nearest" else None
    with torch.no_grad():
        for parameters in own:
            others = [parameter for other, parameter in parameters.items() if other != lang]
            parameters[lang].copy_(parameters[near] if near else torch.stack(others).mean(0))
    return near


def _by_lang(module: nn.Module, lang: str) -> Iterator[nn.ParameterDict]:
    """The adapters' parameters by language, each dictionary once."""
    from torch import nn

    found = {id(part): part for layer in adapted_layers(module).values() for part in layer.modules()}
    yield from (part for part in found.values() if isinstance(part, nn.ParameterDict) and lang in part)


def _nearest(lang: str, among: Iterator[str], embeddings: Mapping[str, Tensor]) -> str:
    known = [other for other in among if other != lang and other in embeddings]
    if lang not in embeddings or not known:
        raise UserError(f"Whisper has no embedding of '{lang}', so none is nearest; begin from mean or zero")
    return nearest(lang, known, embeddings)

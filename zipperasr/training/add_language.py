"""Another language for a finished stage-2 run: what is trained, and the proof that nothing else has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zipperasr import files
from zipperasr.adapters import language_parameters
from zipperasr.adapters.extend import Begin, begin_language
from zipperasr.data import FeatureSettings
from zipperasr.data.utterances import Utterance, load_utterances
from zipperasr.errors import UserError
from zipperasr.model import EncoderSettings, ModelSettings
from zipperasr.model.checkpoint import build, load_run, load_trainable, read_weights
from zipperasr.model.speech_llm import SpeechLLM, stage_tensors
from zipperasr.training import runs

PROOF = "identity.json"
UTTERANCES = 4
"""Of each language, at most, in the proof."""


def build_with_language(
    settings: ModelSettings, base_dir: Path, lang: str, begin: Begin
) -> tuple[SpeechLLM, str | None]:
    """The model of the run `base_dir` with what `settings` give `lang`, which alone is unfrozen; and the language whose
    bank that begins with, if it is one's.

    Raises UserError when the base's weights are not whole.
    """
    weights = runs.final_weights(base_dir)
    model = build(settings, stage=2)
    load_trainable(model, base_dir / "init", stage=1)
    tensors, mine = read_weights(weights, "train that run first"), stage_tensors(model, stage=2)
    with torch.no_grad():
        for name, tensor in tensors.items():
            mine[name].copy_(tensor)
    near = begin_language(model.encoder, lang, begin, language_embeddings=model.language_embeddings)
    model.requires_grad_(False)
    for parameter in language_parameters(model)[lang]:
        parameter.requires_grad_(True)
    return model, near


def choose(
    data_dir: Path, setting: str, langs: Iterable[str], features: FeatureSettings
) -> dict[str, Sequence[Utterance]]:
    """The first utterances of each language in the dev lists of a setting, or else in its train lists."""
    langs, found = list(langs), load_utterances(data_dir, setting, "dev", None, features)
    if not {u.lang for u in found}.issuperset(langs):
        found += load_utterances(data_dir, setting, "train", None, features)
    return {lang: [u for u in found if u.lang == lang][:UTTERANCES] for lang in langs}


def prove(
    run_dir: Path, base_dir: Path, utterances: Mapping[str, Sequence[Utterance]], encoder: EncoderSettings
) -> str:
    """Compare a run with its base, bit for bit: every tensor that the base has, and the speech embeddings of some
    `utterances` of each language. Writes identity.json and returns it as a line; raises UserError for a difference.

    The utterances of a language are one batch, the same in both, in fp32 on the CPU.
    """
    features = {lang: [u.features() for u in some] for lang, some in utterances.items() if some}
    chunk_s = encoder.decode_chunk_s if encoder.context == "chunked" else None
    base, new = (_Outputs.of(folder, features, chunk_s) for folder in (base_dir, run_dir))
    differing = [name for name, digest in base.tensors.items() if new.tensors.get(name) != digest]
    differing += [lang for lang in features if not all(map(torch.equal, base.speech[lang], new.speech[lang]))]
    count = {"languages": len(features), "utterances": sum(map(len, features.values())), "tensors": len(base.tensors)}
    added = [name for name in new.tensors if name not in base.tensors]
    ids = {lang: [u.id for u in some] for lang, some in utterances.items()}
    proof = {"base": str(base_dir), **count, "differing": differing, "added": added, "ids": ids}
    files.write_json(run_dir / PROOF, proof)
    if differing:
        raise UserError(
            f"{run_dir}: not what it was in {base_dir}: {', '.join(differing[:5])} ({len(differing)} in {PROOF}); "
            "delete the run and add the language again"
        )
    return (
        f"{count['languages']} other languages: outputs bit-identical "
        f"({count['utterances']:,} utterances, {count['tensors']:,} tensors)"
    )


@dataclass(frozen=True)
class _Outputs:
    """A run's parameters as digests, and its speech embeddings by language; one model at a time fits the memory."""

    tensors: dict[str, str]
    speech: dict[str, list[Tensor]]

    @classmethod
    @torch.inference_mode()
    def of(cls, run_dir: Path, features: Mapping[str, list[Tensor]], chunk_s: float | None) -> _Outputs:
        model = load_run(run_dir)
        tensors = {name: _digest(p) for name, p in model.named_parameters()}
        speech = {lang: model.speech_embeddings(some, [lang] * len(some), chunk_s) for lang, some in features.items()}
        return cls(tensors, speech)


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy()).hexdigest()

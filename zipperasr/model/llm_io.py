"""Loading the LLM with its LoRA."""

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

from zipperasr.adapters import AdapterSettings, adapt
from zipperasr.errors import UserError
from zipperasr.model import LLMSettings
from zipperasr.model.llm import ATTENTION

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # all linear layers
FULL = "full_attention"


def load_llm(settings: LLMSettings) -> PreTrainedModel:
    """The LLM in fp32 on the CPU with a fresh LoRA on all its linear layers.

    Raises UserError where there is no such model, it is not of the kind that is needed (see `read_config`), or its
    weights are not whole: transformers would fill in what is missing at random.
    """
    name = settings.pretrained
    config = read_config(name)
    disable_progress_bar()  # a bar for a second's work, in every process and every log
    try:
        llm, info = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            attn_implementation=ATTENTION,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are named below
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unreadable(name, error) from error
    mend = "its weights and config.json are not of one model; fetch both again"
    for word, keys in (("lacks", info["missing_keys"]), ("has unknown", info["unexpected_keys"])):
        if keys:
            raise UserError(f"LLM '{name}': {word} {len(keys)} tensors, such as '{min(keys)}'; {mend}")
    for key, found, expected in sorted(info["mismatched_keys"]):
        shapes = f"{list(found)}, but config.json says {list(expected)}"
        raise UserError(f"LLM '{name}': tensor '{key}' has shape {shapes}; {mend}")
    return add_lora(llm, settings)


def add_lora(llm: PreTrainedModel, settings: LLMSettings) -> PreTrainedModel:
    """`llm` itself, frozen, with a fresh LoRA on all its linear layers. Raises UserError where it has not these."""
    try:
        adapt(llm, ADAPTED, AdapterSettings(method="vanilla", **settings.lora.model_dump()))
    except UserError as error:
        raise UserError(f"LLM '{settings.pretrained}': {error}; choose one with layers named so") from error
    return llm


def read_config(name: str) -> PreTrainedConfig:
    """The configuration of an LLM: a folder, or a model id of the hub.

    Raises UserError where there is none, or it is not that of a decoder-only LLM in full precision which transformers
    knows, with full causal attention in every layer: rows of several utterances are computed as if by that.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _unreadable(name, error) from error
    cls = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    kinds = config.architectures or ([cls.__name__] if cls else [config.model_type])
    is_composed = config.is_encoder_decoder or config.get_text_config() is not config
    if cls is None or is_composed or cls.__name__ not in kinds:
        raise _unfit(name, f"{', '.join(kinds)} is no decoder-only LLM")
    windowed = ["sliding_attention"] if getattr(config, "sliding_window", None) else []
    if others := sorted(set(getattr(config, "layer_types", None) or windowed) - {FULL}):
        raise _unfit(name, f"some of its layers have {', '.join(others)}, but packed rows need {FULL} in every layer")
    if not cls._supports_attention_backend:
        raise _unfit(name, f"{cls.__name__} computes attention in a way of its own, which would mix packed utterances")
    if getattr(config, "quantization_config", None):
        raise _unfit(name, "its weights are quantised; take those in full precision")
    return config


def _unfit(name: str, reason: str) -> UserError:
    return UserError(f"LLM '{name}': {reason}; choose another model.llm.pretrained, such as Qwen/Qwen3-1.7B")


def _unreadable(name: str, error: Exception) -> UserError:
    words = str(error)
    if "trust_remote_code" in words:
        return _unfit(name, "it needs code of its own, which is never run")
    if "Unrecognized" in words:
        return _unfit(name, words.splitlines()[0])
    if "no file named model.safetensors" in words:
        mend = "load and save it with transformers, which writes that"
        return UserError(f"LLM '{name}': it has no model.safetensors, and pickled weights are not read; {mend}")
    return UserError(f"LLM '{name}': {words.splitlines()[0]}; check model.llm.pretrained")

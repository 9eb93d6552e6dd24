"""What a training step costs, by arithmetic: useful work of a batch, and memory of a GPU.

Useful work is what training needs and no more: true lengths, no recomputation, no gradients that nobody asks for.
Products of matrices are counted, two FLOPs for each weight and position; what is elementwise is not.
Legend: F feature frames (100 Hz), T encoder frames (50 Hz), D encoder width, P projector width, H LLM width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from zipperasr import files
from zipperasr.adapters import AdapterSettings, adapt, adapted_layers, adapter_state
from zipperasr.data.packing import num_speech_tokens
from zipperasr.errors import UserError
from zipperasr.model import ModelSettings
from zipperasr.model.sizes import QWEN3, WHISPER, whisper_dims

if TYPE_CHECKING:
    from torch import nn

    from zipperasr.model.speech_llm import SpeechLLM

FROZEN, TRAINED, FORWARD = 4, 6, 2
"""FLOPs for each weight and position: forward pass 2, gradient of the input 2, gradient of the weight 2."""
PROJECTOR_STRIDE = 4
HALF, SINGLE = 2, 4  # bytes of bf16 and fp32
LOSS_BYTES = HALF + 3 * SINGLE  # of a logit in flight: logits in bf16 and fp32, their softmax, their gradient

Linears = Sequence[tuple[int, int]]
"""Input and output widths of a block's linear layers."""


@dataclass(frozen=True)
class Shape:
    """The sizes that decide what a model costs in a stage. Adapters of the encoder exist in stage 2 only."""

    stage: int
    num_bins: int
    num_positions: int
    width: int
    num_heads: int
    num_blocks: int
    projector_width: int
    llm_width: int
    llm_intermediate: int
    llm_blocks: int
    llm_heads: int
    llm_kv_heads: int
    llm_head_width: int
    llm_is_tied: int
    vocab_size: int
    lora_rank: int
    adapter_rank: int
    adapter_size: int  # numbers in the encoder's adapters, FlyLoRA's frozen A among them
    adapter_trained: int  # of them, those that are trained

    @staticmethod
    def of(settings: ModelSettings, stage: int) -> Shape:
        """The shape of what the settings name: a size of sizes.py or a local folder with a config.json.

        Raises UserError for anything else.
        """
        try:
            whisper, llm = _whisper(settings.encoder.pretrained), _llm(settings.llm.pretrained)
        except KeyError as error:
            where = f"{settings.encoder.pretrained}, {settings.llm.pretrained}"
            raise UserError(f"{where}: a config.json lacks {error}; use a Whisper and a decoder-only LLM") from error
        width, num_blocks = whisper["width"], whisper["num_blocks"]
        adapter = settings.adapter if stage == 2 else None
        size, trained = _adapter_sizes(adapter, width, num_blocks) if adapter else (0, 0)
        return Shape(
            stage=stage,
            **whisper,
            projector_width=settings.projector.hidden_size or width,
            **llm,
            lora_rank=settings.llm.lora.rank,
            adapter_rank=adapter.rank if adapter else 0,
            adapter_size=size,
            adapter_trained=trained,
        )

    @staticmethod
    def of_model(model: SpeechLLM, stage: int) -> Shape:
        """The shape of a model that `stage` trains."""
        encoder, config = model.encoder, model.llm.config.to_dict()
        adapters = adapter_state(encoder)
        return Shape(
            stage=stage,
            num_bins=encoder.conv1.in_channels,
            num_positions=len(encoder.positional_embedding),
            width=encoder.width,
            num_heads=encoder.blocks[0].attn.n_head,
            num_blocks=len(encoder.blocks),
            projector_width=model.projector.linear.in_features,
            **_llm_sizes(config),
            lora_rank=_rank(model.llm),
            adapter_rank=_rank(encoder),
            adapter_size=sum(t.numel() for t in adapters.values()),
            adapter_trained=sum(t.numel() for t in adapters.values() if t.requires_grad),
        )

    @property
    def linears(self) -> Linears:
        """Of an encoder block: query, key, value, out and the feed-forward layers."""
        return _encoder_linears(self.width)

    @property
    def llm_linears(self) -> Linears:
        """Of an LLM block: q, k, v, o, gate, up and down."""
        q, kv = self.llm_heads * self.llm_head_width, self.llm_kv_heads * self.llm_head_width
        H, intermediate = self.llm_width, self.llm_intermediate
        return [(H, q), (H, kv), (H, kv), (q, H), (H, intermediate), (H, intermediate), (intermediate, H)]

    @property
    def lora_size(self) -> int:
        """Numbers in the LLM's LoRA."""
        return self.llm_blocks * _low_rank(self.llm_linears, self.lora_rank)

    @property
    def encoder_size(self) -> int:
        """Numbers in the encoder without adapters: convolutions, positions, blocks, last norm."""
        D = self.width
        convolutions = 3 * self.num_bins * D + D + 3 * D * D + D
        block = _weights(self.linears) + 8 * D + 4 * D  # biases of all but key, and two norms
        return convolutions + self.num_positions * D + self.num_blocks * block + 2 * D

    @property
    def projector_size(self) -> int:
        """Numbers in the projector: convolutions, linear layer, norm, output."""
        P = self.projector_width
        convolutions = 2 * (PROJECTOR_STRIDE * self.width * P + P)
        return convolutions + P * P + P + 2 * P + P * self.llm_width + self.llm_width

    @property
    def llm_size(self) -> int:
        """Numbers in the LLM without LoRA: embedding, output layer if it is another, blocks, last norm."""
        table = self.vocab_size * self.llm_width * (1 if self.llm_is_tied else 2)
        block = _weights(self.llm_linears) + 2 * self.llm_width + 2 * self.llm_head_width
        return table + self.llm_blocks * block + self.llm_width

    @property
    def trained_size(self) -> int:
        """Numbers that the stage trains; the encoder's positions are none of them."""
        encoder = self.encoder_size - self.num_positions * self.width if self.stage == 1 else self.adapter_trained
        return encoder + self.projector_size + self.lora_size


class Batch(Protocol):
    """What is counted of a batch; `zipperasr.data.packing.Batch` is one."""

    features: list  # [F_u, bins]
    prompts: list[list[int]]
    targets: list[list[int]]


@dataclass(frozen=True)
class Load:
    """The lengths in a batch that decide what it costs."""

    segment_frames: list[int]  # F of each segment of the encoder
    utt_tokens: list[int]  # LLM positions of each utterance
    num_targets: int

    @staticmethod
    def of(batch: Batch, chunk_s: float | None = None) -> Load:
        """What a batch amounts to in segments of `chunk_s`; None is full context."""
        frames = [len(x) for x in batch.features]
        segments = [n for utterance in frames for n in segment_frames(utterance, chunk_s)]
        parts = zip(batch.prompts, map(num_speech_tokens, frames), batch.targets, strict=True)
        tokens = [len(prompt) + speech + len(target) for prompt, speech, target in parts]
        return Load(segments, tokens, sum(map(len, batch.targets)))

    @property
    def encoder_frames(self) -> list[int]:
        """T of each segment."""
        return [(n + 1) // 2 for n in self.segment_frames]

    @property
    def speech_tokens(self) -> float:
        """LLM positions of speech; without what each utterance's last one is padded with."""
        return sum(self.encoder_frames) / PROJECTOR_STRIDE


def segment_frames(num_frames: int, chunk_s: float | None) -> list[int]:
    """The lengths of the encoder's segments of an utterance; `chunk_s` None is full context."""
    size = num_frames if chunk_s is None else 2 * round(50 * chunk_s)
    return [min(size, num_frames - start) for start in range(0, num_frames, size)]


def flops(shape: Shape, load: Load) -> dict[str, float]:
    """Useful FLOPs of one forward and backward pass by part: encoder, projector, llm, lm_head.

    A low-rank update counts as dense and trained, whatever the method.
    """
    P, tokens = shape.projector_width, sum(load.utt_tokens)
    projector = 2 * PROJECTOR_STRIDE * shape.width * P + P * P + P * shape.llm_width
    block = FROZEN * _weights(shape.llm_linears) + TRAINED * _low_rank(shape.llm_linears, shape.lora_rank)
    q = shape.llm_heads * shape.llm_head_width
    causal = sum(TRAINED * n * n * q for n in load.utt_tokens)  # two products, half of the square each
    return {
        "encoder": float(_encoder_flops(shape, load)),
        "projector": TRAINED * projector * load.speech_tokens,
        "llm": float(shape.llm_blocks * (block * tokens + causal)),
        "lm_head": float(FROZEN * shape.llm_width * shape.vocab_size * load.num_targets),
    }


def _encoder_flops(shape: Shape, load: Load) -> int:
    """Stage 2 needs no gradient of anything before the first block's adapters, nor of their input."""
    D, lengths = shape.width, load.encoder_frames
    conv1 = 3 * shape.num_bins * D * sum(load.segment_frames)
    conv2 = 3 * D * D * sum(lengths)
    weights, low_rank = _weights(shape.linears), _low_rank(shape.linears, shape.adapter_rank)
    attention = shape.num_blocks * sum(2 * TRAINED * n * n * D for n in lengths)
    if shape.stage == 1:
        return FROZEN * conv1 + TRAINED * (conv2 + shape.num_blocks * weights * sum(lengths)) + attention
    all_blocks = shape.num_blocks * (FROZEN * weights + TRAINED * low_rank)
    of_input = 2 * 3 * (D * D + shape.adapter_rank * D)  # query, key and value of the first block
    return FORWARD * (conv1 + conv2) + (all_blocks - of_input) * sum(lengths) + attention


def peak_bytes(
    shape: Shape, load: Load, *, recompute_encoder: float = 0.0, recompute_llm: float = 0.0, num_ranks: int = 1
) -> dict[str, float]:
    """Estimated GPU memory in bytes at its peak, by part: weights, gradients, optimizer, activations.

    It is that of bf16 under ZeRO-2: trained tensors have weights and gradients in bf16 on each rank, and fp32 masters
    with two moments spread over `num_ranks`. recompute_*: the share of blocks of which the forward pass keeps only the
    input. The peak is where the backward pass begins: all that is kept, and a block or the logits in flight.
    """
    kept = saved_bytes(shape, load, recompute_encoder=recompute_encoder, recompute_llm=recompute_llm)
    in_flight = max(
        _block_bytes(shape, HALF) * sum(load.encoder_frames),
        _llm_block_bytes(shape, HALF) * sum(load.utt_tokens),
        LOSS_BYTES * min(load.num_targets * shape.vocab_size, _max_logits()),
    )
    return {
        "weights": float(
            HALF * (shape.encoder_size + shape.adapter_size + shape.projector_size + shape.llm_size + shape.lora_size)
        ),
        "gradients": float(HALF * shape.trained_size),
        "optimizer": 3 * SINGLE * shape.trained_size / num_ranks,
        "activations": sum(kept.values()) + in_flight,
    }


def saved_bytes(
    shape: Shape, load: Load, *, itemsize: int = HALF, recompute_encoder: float = 0.0, recompute_llm: float = 0.0
) -> dict[str, float]:
    """Bytes that autograd keeps from the forward pass for the backward pass, by part: encoder, projector, llm, lm_head.

    itemsize: bytes of an activation. What the loss keeps of logits, if they are not recomputed, is not counted.
    """
    frames, tokens = sum(load.encoder_frames), sum(load.utt_tokens)
    convolutions = sum(load.segment_frames) * (shape.num_bins + 2 * shape.width) + frames * shape.width
    encoder = {
        "convolutions": convolutions * itemsize if shape.stage == 1 else 0,
        "blocks": frames
        * shape.num_blocks
        * _mixed(recompute_encoder, shape.width * itemsize, _block_bytes(shape, itemsize)),
        "norm": frames * shape.width * itemsize,
    }
    llm = shape.llm_blocks * _mixed(recompute_llm, shape.llm_width * itemsize, _llm_block_bytes(shape, itemsize))
    return {
        "encoder": sum(encoder.values()),
        "projector": itemsize * (frames * shape.width + 6 * load.speech_tokens * shape.projector_width),
        "llm": tokens * (llm + SINGLE * shape.llm_width),  # and the last norm
        "lm_head": float(load.num_targets * shape.llm_width * itemsize),
    }


def _block_bytes(shape: Shape, itemsize: int) -> int:
    """What an encoder block keeps of a frame: x, its norm, q, k, v, attended, x, its norm, 4 D around the GELU."""
    statistics = SINGLE * (shape.num_heads + 4)  # of the softmax and of two norms
    return itemsize * (16 * shape.width + len(shape.linears) * shape.adapter_rank) + statistics


def _llm_block_bytes(shape: Shape, itemsize: int) -> int:
    """What a block of transformers' Qwen3 keeps of a token. Its RMSNorms keep their input in fp32."""
    q, kv = shape.llm_heads * shape.llm_head_width, shape.llm_kv_heads * shape.llm_head_width
    norms = 2 * (SINGLE + itemsize) * shape.llm_width + SINGLE * (q + kv)  # of the block, and of q and k
    attention = 2 * q + 2 * kv  # q, k, v and what is attended
    gated = 4 * shape.llm_intermediate  # gate, SiLU of it, up, their product
    statistics = SINGLE * (2 * shape.llm_heads + shape.llm_kv_heads + 2)
    return norms + itemsize * (attention + gated + len(shape.llm_linears) * shape.lora_rank) + statistics


def _mixed(share: float, recomputed: int, kept: int) -> float:
    return share * recomputed + (1 - share) * kept


def _weights(linears: Linears) -> int:
    return sum(wide * high for wide, high in linears)


def _low_rank(linears: Linears, rank: int) -> int:
    return rank * sum(wide + high for wide, high in linears)


def _encoder_linears(width: int) -> Linears:
    return [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]


def _max_logits() -> int:
    from zipperasr.model.llm import MAX_LOGITS

    return MAX_LOGITS


def _whisper(name: str) -> dict[str, int]:
    dims = WHISPER.get(name) or whisper_dims(_config(name, "model.encoder.pretrained", WHISPER))
    return {
        "num_bins": dims["n_mels"],
        "num_positions": dims["n_audio_ctx"],
        "width": dims["n_audio_state"],
        "num_heads": dims["n_audio_head"],
        "num_blocks": dims["n_audio_layer"],
    }


def _llm(name: str) -> dict[str, int]:
    return _llm_sizes(QWEN3.get(name) or _config(name, "model.llm.pretrained", QWEN3))


def _llm_sizes(config: dict[str, Any]) -> dict[str, int]:
    heads = config["num_attention_heads"]
    return {
        "llm_width": config["hidden_size"],
        "llm_intermediate": config["intermediate_size"],
        "llm_blocks": config["num_hidden_layers"],
        "llm_heads": heads,
        "llm_kv_heads": config.get("num_key_value_heads", heads),
        "llm_head_width": config.get("head_dim") or config["hidden_size"] // heads,
        "llm_is_tied": int(config.get("tie_word_embeddings", False)),
        "vocab_size": config["vocab_size"],
    }


def _config(folder: str, setting: str, names: Iterable[str]) -> dict[str, Any]:
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{setting} '{folder}': no such folder with a config.json, nor one of {', '.join(names)}")
    return files.read_json(path)


def _adapter_sizes(settings: AdapterSettings, width: int, num_blocks: int) -> tuple[int, int]:
    """Numbers in the adapters of an encoder, and those that are trained; its layers are made without storage."""
    import torch
    from torch import nn

    with torch.device("meta"):
        encoder = nn.ModuleList(nn.Linear(*size) for size in _encoder_linears(width) * num_blocks)
        embeddings = {lang: torch.empty(width) for lang in settings.langs}
        adapt(encoder, ["*"], settings.model_copy(update={"unseen": "shared"}), language_embeddings=embeddings)
    tensors = adapter_state(encoder).values()
    return sum(t.numel() for t in tensors), sum(t.numel() for t in tensors if t.requires_grad)


def _rank(module: nn.Module) -> int:
    """That of its adapters; 0 without any."""
    layer = next(iter(adapted_layers(module).values()), None)
    return 0 if layer is None else next(t for name, t in layer.state_dict().items() if name.startswith("A")).shape[0]

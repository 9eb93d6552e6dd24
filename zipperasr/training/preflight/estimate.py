"""Memory of a GPU and hours of a stage, by the arithmetic of zipperasr.model.cost and assumptions that are told."""

import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

from zipperasr.data.features import num_frames
from zipperasr.data.packing import PackingSettings, num_speech_tokens
from zipperasr.model import EncoderSettings, ModelSettings
from zipperasr.model.cost import FORWARD, FROZEN, TRAINED, Load, Shape, flops, peak_bytes, segment_frames
from zipperasr.training import StageSettings
from zipperasr.training.preflight import Finding, gib
from zipperasr.training.preflight.data import Size

TFLOPS = {
    "H100 PCIe": 756, "H100": 989, "H800": 989, "H200": 989, "GH200": 989, "H20": 148, "B200": 2250,
    "A100": 312, "A800": 312, "A40": 150, "A30": 165, "A10": 125, "L40S": 362, "L40": 181, "L4": 121,
    "A6000": 155, "RTX 6000 Ada": 364, "RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip
"""Peak of dense bf16 products, by what the name of a GPU holds; of several, the first (NVIDIA's data sheets)."""
UTILISATION = 0.4
"""Of the peak: what good fine-tuning stacks reach."""
CPU_FLOPS = 30e9
"""Of a core, which is a rank: about what conf/mini.yaml reaches in fp32."""
ROOM = 0.9
"""Of a GPU's memory: the rest is CUDA's own, NCCL's, and lost between allocations."""
MANY_HOURS = 200

ok, warning, error = (partial(Finding, "memory and time", level) for level in ("ok", "warning", "error"))


@dataclass(frozen=True)
class Device:
    """What a stage runs on. `tflops` is the peak of each rank, None if unknown; without `memory` it is the CPU."""

    name: str
    num_ranks: int
    memory: float | None
    tflops: float | None
    num_cores: int = 1


@dataclass(frozen=True)
class Speech:
    """Lengths of utterances; as a default, LibriSpeech's. Text in tokens for each second of speech."""

    utt_s: float = 12.3
    text_per_s: float = 4.0
    num_prompt: int = 12

    @property
    def num_frames(self) -> int:
        return max(1, num_frames(self.utt_s))

    @property
    def num_targets(self) -> int:
        return max(1, round(self.text_per_s * self.utt_s))

    @property
    def num_tokens(self) -> int:
        """LLM positions of an utterance."""
        return self.num_prompt + num_speech_tokens(self.num_frames) + self.num_targets


SPARSE_TEXT = 1.0
"""Tokens a second where little is said: such rows hold most speech, and training tries the heaviest first."""
MAX_ROWS = 1024


def peak_tflops(name: str) -> float | None:
    """The peak of the GPU of that name, if it is known."""
    return next((peak for known, peak in TFLOPS.items() if re.search(rf"\b{known}\b", name)), None)


def full_batch(speech: Speech, num_rows: int, packing: PackingSettings, encoder: EncoderSettings, chunk_s=None) -> Load:
    """The lengths of a batch of so many full rows of equal utterances; `chunk_s` None is full context."""
    count = max(1, num_rows * packing.max_tokens_per_row // speech.num_tokens)
    segments = segment_frames(speech.num_frames, chunk_s)
    segments = [3000] * len(segments) if encoder.pad_to_30s else segments
    return Load(segments * count, [speech.num_tokens] * count, speech.num_targets * count)


@dataclass(frozen=True)
class Estimate:
    """What a stage costs on a device."""

    stage: int
    model: ModelSettings
    packing: PackingSettings
    settings: StageSettings
    shape: Shape
    device: Device
    speech: Speech = Speech()

    @property
    def context(self) -> str:
        return self.model.encoder.context

    @property
    def num_rows(self) -> int:
        """Of a micro-batch; for `auto` what fits into memory."""
        rows = getattr(self.packing.rows_per_batch, self.context)
        return max(1, self.most_rows()) if rows == "auto" else rows

    @property
    def batch_audio_s(self) -> float:
        """Seconds of speech in a micro-batch of full rows."""
        return self.speech.utt_s * len(self._load(self.num_rows, self.speech).utt_tokens)

    def peak(self, num_rows: int | None = None, recompute: tuple[float, float] | None = None) -> dict[str, float]:
        """Bytes on each GPU, by part, with rows of much speech and little text."""
        encoder, llm = recompute or (self.settings.recompute_encoder, self.settings.recompute_llm)
        load = self._load(num_rows or self.num_rows, replace(self.speech, text_per_s=SPARSE_TEXT))
        ranks = self.device.num_ranks
        return peak_bytes(self.shape, load, recompute_encoder=encoder, recompute_llm=llm, num_ranks=ranks)

    def fits(self, num_rows: int | None = None, recompute: tuple[float, float] | None = None) -> bool:
        return sum(self.peak(num_rows, recompute).values()) <= ROOM * (self.device.memory or 0)

    def most_rows(self, recompute: tuple[float, float] | None = None) -> int:
        """The most rows, up to MAX_ROWS, that fit; 0 if not even one does."""
        return bisect_left(range(1, MAX_ROWS + 1), True, key=lambda num_rows: not self.fits(num_rows, recompute))

    def least_recompute(self) -> tuple[float, float] | None:
        """The least recomputation of encoder and LLM, in quarters, with which the rows fit; None: none is enough.

        Of equal sums the one with more of the encoder, though its blocks and the LLM's keep as much for a FLOP.
        """
        quarters = sorted(product((0, 0.25, 0.5, 0.75, 1), repeat=2), key=lambda shares: (sum(shares), -shares[0]))
        return next((shares for shares in quarters if self.fits(recompute=shares)), None)

    def flops(self) -> float:
        """FLOPs of a micro-batch, those of recomputation among them, as a mean over chunk durations."""
        chunks = (None,) if self.context == "full" else self.model.encoder.chunk_durations_s
        return sum(self._flops(chunk_s) for chunk_s in chunks) / len(chunks)

    def batches(self, audio_s: float) -> float:
        """Micro-batches of a rank in the whole stage."""
        at_once = self.device.num_ranks * self.settings.accumulation
        steps = self.settings.max_steps or self.settings.epochs * audio_s / (self.batch_audio_s * at_once)
        return steps * self.settings.accumulation

    def _load(self, num_rows: int, speech: Speech, chunk_s: float | None = None) -> Load:
        return full_batch(speech, num_rows, self.packing, self.model.encoder, chunk_s)

    def _flops(self, chunk_s: float | None) -> float:
        parts = flops(self.shape, self._load(self.num_rows, self.speech, chunk_s))
        again = parts["encoder"] * self.settings.recompute_encoder * FORWARD / (TRAINED if self.stage == 1 else FROZEN)
        return sum(parts.values()) + again + parts["llm"] * self.settings.recompute_llm * FORWARD / FROZEN


def speech_of(size: Size) -> Speech:
    """The lengths of lists by their mean."""
    return Speech(utt_s=size.duration_s / size.num_utts) if size.num_utts else Speech()


def check(one: Estimate, size: Size) -> Iterator[Finding]:
    """Findings on a stage that trains on lists of `size`."""
    ranks, rows, times = one.device.num_ranks, one.num_rows, one.settings.accumulation
    global_batch = f"{ranks} ranks x {rows} rows x accumulation {times} = {ranks * rows * times} rows a step"
    yield ok(f"stage {one.stage} trains {_trained(one.shape)}; {global_batch}")
    if one.device.memory:
        yield _memory(one)
    yield _hours(one, size.duration_s)


def _trained(shape: Shape) -> str:
    total, projector, lora = shape.trained_size, shape.projector_size, shape.lora_size
    of_encoder = {1: "encoder", 2: "adapters of the encoder"}[shape.stage]
    parts = {of_encoder: total - projector - lora, "projector": projector, "LoRA of the LLM": lora}
    said = ", ".join(f"{part} {size / 1e6:,.1f}" for part, size in parts.items())
    return f"{total / 1e6:,.1f} M parameters ({said})"


def _memory(one: Estimate) -> Finding:
    parts, memory = one.peak(), one.device.memory
    used = ", ".join(f"{part} {gib(num_bytes)}" for part, num_bytes in parts.items())
    said = f"stage {one.stage}: {gib(sum(parts.values()))} at {one.num_rows} rows ({used}) of {gib(memory)} a GPU"
    if one.fits():
        return ok(f"{said}; up to {one.most_rows()} rows fit")
    is_over = sum(parts.values()) > memory
    mend = ", or ".join(_mends(one)) or "take a GPU with more memory, or a smaller model"
    return (error if is_over else warning)(f"{said}: {'too much' if is_over else 'little room'}; {mend}")


def _mends(one: Estimate) -> Iterator[str]:
    """Settings with which a stage fits."""
    at, rows = f"training.stage{one.stage}", f"data.packing.rows_per_batch.{one.context}"
    shares = one.least_recompute()
    recompute = "{0}.recompute_encoder={1:g} {0}.recompute_llm={2:g}".format(at, *shares or (1, 1))
    if shares:
        yield recompute
    if most := one.most_rows():
        yield f"{rows}={most} (and {at}.accumulation for the same global batch)"
    if not shares and (most := one.most_rows((1, 1))):
        yield f"{recompute} and {rows}={most}"


def _hours(one: Estimate, audio_s: float) -> Finding:
    device, settings, stage = one.device, one.settings, f"stage {one.stage}"
    if not (audio_s or settings.max_steps):
        return warning(f"{stage}: hours unknown, as there are no lists; stage 2 of the recipe writes them")
    speech_h = audio_s / 3600
    epochs = f"{settings.epochs} x {speech_h:,.{0 if speech_h >= 10 else 2}f} h of speech"
    what = f"{settings.max_steps} steps" if settings.max_steps else epochs
    total = one.flops() * one.batches(audio_s) * device.num_ranks
    if not device.memory:
        hours = total / (CPU_FLOPS * min(device.num_ranks, device.num_cores)) / 3600
        said = f"{stage}: roughly {hours:,.2g} h for {what} on the CPU ({CPU_FLOPS / 1e9:.0f} GFLOP/s a core, assumed)"
        is_small = hours < MANY_HOURS
        return ok(said) if is_small else warning(f"{said}: this size is not meant for it; take GPUs, or conf/mini.yaml")
    if not device.tflops:
        return warning(f"{stage}: hours unknown, as the peak of {device.name} is; give --tflops (dense bf16)")
    hours = total / (device.num_ranks * UTILISATION * device.tflops * 1e12) / 3600
    rate = f"{device.num_ranks} x {UTILISATION:.0%} of {device.tflops:g} TFLOP/s"
    return ok(f"{stage}: about {hours:,.1f} h for {what} ({total:.2g} FLOPs at {rate}, assumed for {device.name})")

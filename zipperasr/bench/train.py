"""What a whole training step costs (forward pass, backward pass, optimizer), on synthetic batches and random weights.

Ours is compared with what a user would write, and with padded rows of the same utterances; all do a step of training on
the same batch through the same engine, and all are credited with the same useful work (zipperasr/model/cost.py).
Legend: U utterances, S speech tokens of an utterance, H LLM width.
"""

from __future__ import annotations

import random
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from whisper.model import AudioEncoder

from zipperasr.adapters import REGISTRY, adapted_layers, balance, batch_languages
from zipperasr.bench import LENGTHS, SIZES, data, timing
from zipperasr.bench.adapters import LANGS, randomised
from zipperasr.bench.timing import Report, Row, Target
from zipperasr.data.features import num_frames
from zipperasr.data.packing import Batch, Example, RowsPerBatch, make_batch, pack
from zipperasr.data.utterances import Utterance
from zipperasr.errors import UserError
from zipperasr.model import ModelSettings, cost
from zipperasr.model.checkpoint import build
from zipperasr.model.llm import token_losses
from zipperasr.model.speech_llm import SpeechLLM
from zipperasr.training import StageSettings
from zipperasr.training.engine import start
from zipperasr.training.memory import GIB, peak_bytes

OURS = "zipper_soft"
PADDED, USER = "padded rows", "as a user would write it"
PARTS = ("data", "encoder", "projector", "LLM", "loss", "optimizer")
CHUNK_S = 8.0


class Packed(SpeechLLM):
    """Ours: the sum of the loss over target tokens."""

    def forward(self, batch: Batch, chunk_s: float | None = None) -> Tensor:
        return super().forward(batch, chunk_s).loss_sum


class PaddedRows(SpeechLLM):
    """The same, but that the LLM reads one utterance a row, padded to the longest."""

    def forward(self, batch: Batch, chunk_s: float | None = None) -> Tensor:
        speech = self.speech_embeddings(batch.features, batch.langs, chunk_s)
        inputs = self.decoder_inputs(batch.prompts, speech, batch.targets)
        hidden = self.llm.model(**_padded(inputs), use_cache=False)[0]  # [U, longest, H]
        ends = zip(map(len, inputs), map(len, batch.targets), strict=True)
        predicting = [row[end - n - 1 : end - 1] for row, (end, n) in zip(hidden, ends, strict=True)]
        targets = torch.tensor([token for target in batch.targets for token in target], device=hidden.device)
        return token_losses(self.llm.lm_head, torch.cat(predicting), targets).sum()


class AsAUserWouldWriteIt(SpeechLLM):
    """openai-whisper's encoder on 30 s for each utterance, one padded batch, and the loss of transformers."""

    def forward(self, batch: Batch, chunk_s: float | None = None) -> Tensor:
        mel = torch.stack([_to_30s(x, self.encoder.max_frames) for x in batch.features]).transpose(1, 2)
        with batch_languages(batch.langs):
            frames = AudioEncoder.forward(self.encoder, mel.to(self.encoder.conv1.weight))  # [U, 1500, D]
        speech = self.projector(frames.flatten(0, 1), [frames.shape[1]] * len(frames))
        inputs = self.decoder_inputs(batch.prompts, speech, batch.targets)
        labels = [F.pad(torch.tensor(t), (len(x) - len(t), 0), value=-100) for x, t in zip(inputs, batch.targets)]
        labels = pad_sequence(labels, batch_first=True, padding_value=-100).to(frames.device)
        mean = self.llm(**_padded(inputs), labels=labels, use_cache=False).loss
        return mean * batch.num_target_tokens


class Case:
    """A model in training, and the batch that it takes each step on."""

    def __init__(
        self, kind: type[SpeechLLM], model: SpeechLLM, batch: Batch, chunk_s: float | None, **recompute: float
    ):
        parts = (model.encoder, model.projector, model.llm, model.tokenizer, model.language_embeddings)
        case = kind(*parts)
        case.stage = model.stage
        self.engine = start(case.train(), StageSettings(setting="synthetic", lr=1e-6, **recompute))
        self.batch, self.chunk_s = batch, chunk_s
        self.parameters = [p for p in self.engine.module.parameters() if p.requires_grad]
        self.balances = any(layer.balances for layer in adapted_layers(self.engine.module).values())

    def step(self, parts: Parts | None = None) -> None:
        """A training step as the trainer's; `parts` is told where it stands."""
        lap = parts.lap if parts else lambda part: None
        engine = self.engine
        batch = self.batch.to(engine.device)
        lap("data")
        with engine.coalesce_grad_reduction():
            loss = engine(batch, self.chunk_s)
            engine.backward(loss)
            lap("encoder")
            for parameter in self.parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            torch._foreach_mul_([p.grad for p in self.parameters], 1 / batch.num_target_tokens)
        engine.step()
        loss.item()  # the trainer too reads it here
        if self.balances:
            balance(engine.module)
        lap("optimizer")

    def shares(self) -> dict[str, float]:
        """The share of each of PARTS in a step, backward pass and recomputation included."""
        with Parts(self.engine.module) as parts:
            self.step(parts)
        return {part: round(parts.seconds[part] / sum(parts.seconds.values()), 3) for part in PARTS}


class Parts:
    """Within the block, measures what a step spends on each part of the model.

    Where one part hands a tensor to the next, the one ends in the forward pass; where the tensor's gradient arrives,
    the other ends in the backward pass.
    """

    def __init__(self, model: SpeechLLM):
        self.model, self.seconds = model, defaultdict(float)

    def __enter__(self) -> Parts:
        projector, norm = self.model.projector, self.model.llm.model.norm
        self.hooks = [
            projector.gate.register_forward_pre_hook(lambda _, inputs: self._pass(inputs[0], "encoder", "projector")),
            projector.out.register_forward_hook(lambda _, inputs, y: self._pass(y, "projector", "LLM")),
            norm.register_forward_hook(lambda _, inputs, y: self._pass(y, "LLM", "loss")),
        ]
        self.since = timing.clock()
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def lap(self, part: str) -> None:
        """Everything since the last lap was spent on `part`."""
        now = timing.clock()
        self.seconds[part] += now - self.since
        self.since = now

    def _pass(self, tensor: Tensor, before: str, after: str) -> None:
        self.lap(before)
        tensor.register_hook(lambda gradient: self.lap(after))


def run(
    *,
    size: str,
    encoder: str | None,
    llm: str | None,
    stage: int,
    method: Sequence[str] | None,
    baselines: bool | None,
    context: str,
    rows: int | None,
    tokens_per_row: int | None,
    lengths: str,
    recompute_encoder: float,
    recompute_llm: float,
    rounds: int,
    threads: int | None,
) -> Report:
    """Steps of `stage` with each method, and of what they are compared with.

    size: a name of SIZES; encoder, llm: in place of its models. method: of stage 2; if None, all on a CPU, zipper_soft
    on a GPU. baselines: whether also what ours is compared with; if None, on a CPU at size mini. rows: of a batch; if
    None, the paper's on a GPU, else one for each language. tokens_per_row: if None, 2048 on a GPU, else 192.
    lengths: of utterances, a name of LENGTHS. threads: of the CPU.
    A row's peak memory on a CPU is that of the whole process, which holds the models of all rows.
    """
    at = timing.device(threads)
    is_gpu, names = at["device"] == "cuda", (encoder or SIZES[size][0], llm or SIZES[size][1])
    methods = [OURS] if stage == 1 else list(method or ([OURS] if is_gpu else REGISTRY))
    ours = OURS if OURS in methods else methods[0]
    rows = rows or (getattr(RowsPerBatch(), context) if is_gpu else len(LANGS))
    tokens_per_row = tokens_per_row or (2048 if is_gpu else 192)

    peak = timing.peak_flops(**at)
    baselines = not is_gpu and size == "mini" if baselines is None else baselines
    if baselines and is_gpu:
        raise UserError("--baselines: openai-whisper's own encoder does not run in bf16; compare on a CPU")
    kinds = {PADDED: (PaddedRows, ours), USER: (AsAUserWouldWriteIt, ours)} if baselines else {}
    kinds |= {name: (Packed, name) for name in methods}
    models = {name: random_model(names, stage, using, at["device"]) for name, (_, using) in kinds.items()}
    shape = cost.Shape.of_model(models[ours], stage)
    batch = synthetic_batch(shape, LENGTHS[lengths], num_rows=rows, tokens_per_row=tokens_per_row)
    chunk_s = CHUNK_S if context == "chunked" else None
    recompute = {"recompute_encoder": recompute_encoder, "recompute_llm": recompute_llm}
    cases = {name: Case(kind, models[name], batch, chunk_s, **recompute) for name, (kind, _) in kinds.items()}

    seconds = timing.interleave({name: case.step for name, case in cases.items()}, rounds=rounds, title="steps")
    work = sum(cost.flops(shape, cost.Load.of(batch, chunk_s)).values())
    table = []
    for name, case in cases.items():
        taken = statistics.median(seconds[name])
        table.append({
            "case": name,
            "ratio": timing.ratio(seconds[name], seconds[ours]),
            "ms": round(1000 * taken, 1),
            "audio s/s": round(batch.audio_s / taken, 1),
            "tokens/s": round(batch.num_tokens / taken),
            "TFLOP/s": round(work / taken / 1e12, 3),
            "MFU": round(work / taken / peak, 3),
            "peak GiB": round(peak_bytes(case.step, case.engine.device) / GIB, 2),
            **case.shares(),
        })  # fmt: skip
    header = {
        **timing.header(at),
        "model": " + ".join(names),
        "stage": f"{stage}, {context} context",
        "batch": f"{rows} rows x {tokens_per_row}, lengths of {LENGTHS[lengths]}: {len(batch.ids)} utterances, "
        f"{batch.audio_s:.0f} s, {batch.num_tokens} tokens",
        "recomputed": f"{recompute_encoder:g} of the encoder, {recompute_llm:g} of the LLM",
        "useful work": f"{work / 1e12:.3f} TFLOP a step",
        "peak": f"{peak / 1e12:.3f} TFLOP/s of a large product",
        "rounds": rounds,
    }
    figures = {row["case"]: row for row in table}
    over_vanilla = timing.ratio(seconds[OURS], seconds["vanilla"]) if {OURS, "vanilla"} <= seconds.keys() else None
    at_paper_size = figures[ours] if is_gpu and size == "paper" else {}
    return Report(header, table, list(targets(figures, over_vanilla, lengths, at_paper_size)))


def targets(figures: dict[str, Row], over_vanilla: float | None, lengths: str, at_paper_size: Row) -> Iterator[Target]:
    """The limits that the table's figures must keep."""
    user, padded = (figures.get(name, {}).get("ratio") for name in (USER, PADDED))
    of_short = user if lengths == "commonvoice" else None
    yield Target(f"{USER}, over ours, with lengths of Common Voice", of_short, 3.0, ">=")
    yield Target(f"{PADDED}, over packed rows", padded, 1.3, ">=")
    ours = next((row for row in figures.values() if row["ratio"] == 1), {})
    yield Target(f"{PADDED}, over packed rows, the LLM alone", _llm_over(figures.get(PADDED), ours), 1.3, ">=")
    yield Target(f"{OURS} over vanilla", over_vanilla, 1.05)
    yield Target("MFU at the paper's size on a GPU", at_paper_size.get("MFU"), 0.40, ">=")
    yield Target("peak GiB at the paper's size on a GPU", at_paper_size.get("peak GiB"), 130)


def _llm_over(row: Row | None, other: Row) -> float | None:
    """The time of LLM and loss in a row of the table over that in another; the encoder does not know of rows."""
    times = [x["ms"] * (x["LLM"] + x["loss"]) for x in (row, other) if x]
    return round(times[0] / times[1], 3) if len(times) == 2 else None


def settings(names: Sequence[str], stage: int, method: str) -> ModelSettings:
    """Of a random model of the shapes of `names` (encoder, LLM)."""
    return ModelSettings.model_validate({
        "encoder": {"pretrained": names[0]},
        "llm": {"pretrained": names[1]},
        "adapter": {"method": method, "langs": LANGS} if stage == 2 else None,
        "init": "random",
    })  # fmt: skip


def random_model(names: Sequence[str], stage: int, method: str, device: str = "cpu") -> SpeechLLM:
    """A model of the shapes of `names` (encoder, LLM), whose adapters are random too: B would be zero."""
    torch.manual_seed(0)
    model = build(settings(names, stage, method), stage, device=device)
    for layer in adapted_layers(model).values():
        randomised(layer)
    return model


def synthetic_batch(shape: cost.Shape, like: str, *, num_rows: int, tokens_per_row: int) -> Batch:
    """Packed rows of LANGS in turn; the utterances last as in a corpus, what is said in them is random."""
    langs = LANGS[:num_rows]
    rows_per_lang = -(-num_rows // len(langs))
    count = len(langs) * (rows_per_lang + 1) * max(64, tokens_per_row // 25)  # more than are needed
    draw = random.Random(0)
    examples = [
        Example(
            Utterance(f"{number}", langs[number % len(langs)], "", "", s, num_frames(s), shape.num_bins, None),
            draw.choices(range(shape.vocab_size), k=data.PROMPT_TOKENS),
            np.array(draw.choices(range(shape.vocab_size), k=round(data.TEXT_TOKENS_PER_S * s) + 1)),
        )
        for number, s in enumerate(data.durations_s(like, count).tolist())
    ]
    examples = [x for x in examples if x.num_tokens <= tokens_per_row]
    if len({x.utterance.lang for x in examples}) < len(langs):
        raise UserError(
            f"utterances as in {like} are longer than rows of {tokens_per_row} tokens; raise --tokens-per-row"
        )
    by_lang = defaultdict(list)
    for row in pack(examples, max_tokens=tokens_per_row, seed=0, lookahead=data.LOOKAHEAD):
        by_lang[examples[row[0]].utterance.lang].append([examples[i] for i in row])
    rows = [row for turn in zip(*by_lang.values()) for row in turn][:num_rows]
    assert len(rows) == num_rows
    noise = torch.Generator().manual_seed(0)
    return make_batch(rows, lambda u: torch.randn(u.num_frames, u.num_mel_bins, generator=noise))


def _padded(inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """One utterance a row, padded behind, with the mask that says so."""
    mask = pad_sequence([torch.ones(len(x), dtype=torch.long) for x in inputs], batch_first=True)
    return {"inputs_embeds": pad_sequence(list(inputs), batch_first=True), "attention_mask": mask.to(inputs[0].device)}


def _to_30s(features: Tensor, num_frames: int) -> Tensor:
    """Followed by digital silence, which in Whisper's features is 2 below the loudest."""
    return F.pad(features, (0, 0, 0, num_frames - len(features)), value=features.max().item() - 2)

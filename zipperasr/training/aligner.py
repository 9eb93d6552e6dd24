"""The aligner of a finished run: its own CTC head, or one trained on its frozen encoder, told when words begin and end.

CTC says each character in a frame or two somewhere within it, so a word begins before its first frame and ends behind
its last one. By how much is estimated on training data, as the median distance to where the energy of an utterance
rises and falls. Legend: F feature frames (100 Hz), T encoder frames (50 Hz), D encoder width.
"""

import json
import logging
import math
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from zipperasr import alignment, files
from zipperasr.data.loader import load_batches
from zipperasr.data.packing import Example, PackingSettings, Plan, num_speech_tokens, pack
from zipperasr.data.utterances import Utterance
from zipperasr.errors import UserError
from zipperasr.model import ALIGNER, ALIGNER_SETTINGS, WEIGHTS, find_checkpoint
from zipperasr.model.aligner import Aligner
from zipperasr.model.ctc import CtcHead, Units, load_trained_head, save_head
from zipperasr.model.speech_llm import SpeechLLM
from zipperasr.training import AlignerSettings, StageSettings

NUM_CALIBRATING = 300
"""Utterances on which the distances are estimated."""
EDGE = 0.25
"""Of the range of an utterance's level, from its 5th to its 95th percentile: louder is speech."""


def train(
    run_dir: Path,
    model: SpeechLLM,
    utterances: Sequence[Utterance],
    *,
    settings: AlignerSettings,
    packing: PackingSettings,
    chunk_s: float,
    about: dict[str, object],
) -> dict[str, object]:
    """Train a head on `utterances` and write RUN_DIR/aligner; returns what is in its settings.json, beside `about`.

    A call is as good as another: the head depends on settings, data and the run alone. It is not resumed, as it takes
    minutes where the run took hours. Raises UserError where no utterance can be trained on, or the loss is not finite.
    """
    torch.manual_seed(settings.seed)
    device = next(model.parameters()).device
    units = Units.of(u.text for u in utterances)
    head = CtcHead(model.encoder.width, len(units)).to(device)
    examples = _examples(utterances, units, packing)
    loss = _train(head, model, examples, settings=settings, packing=packing, chunk_s=chunk_s)
    some = _choose([x.utterance for x in examples], settings.seed)
    about = {**about, "langs": sorted({u.lang for u in utterances}), "loss": round(loss, 4)}
    return _write(
        run_dir, head.eval(), units, model, some, chunk_s=chunk_s, about=about, settings=settings.model_dump()
    )


def finish(
    run_dir: Path,
    model: SpeechLLM,
    utterances: Sequence[Utterance],
    *,
    settings: StageSettings,
    packing: PackingSettings,
    chunk_s: float,
    about: dict[str, object],
) -> dict[str, object]:
    """Write RUN_DIR/aligner as `train` does, but with the head that the run was trained with on `utterances`.

    Raises UserError where it has none, or no utterance is long enough for its text.
    """
    head, units = load_trained_head(run_dir, find_checkpoint(run_dir, about["step"]) / WEIGHTS)
    some = _choose(_trainable(utterances, units, packing), settings.seed)
    with open(run_dir / "log.jsonl", encoding="utf-8") as stream:
        losses = [json.loads(line)["ctc_loss"] for line in stream]
    about = {**about, "langs": sorted({u.lang for u in utterances}), "loss": round(_last_tenth(losses), 4)}
    head = head.to(next(model.encoder.parameters()).device)
    with_run = {"ctc_weight": settings.ctc_weight, "seed": settings.seed}
    return _write(run_dir, head, units, model, some, chunk_s=chunk_s, about=about, settings=with_run)


def _write(
    run_dir: Path,
    head: CtcHead,
    units: Units,
    model: SpeechLLM,
    some: Sequence[Utterance],
    *,
    chunk_s: float,
    about: dict[str, object],
    settings: dict[str, object],
) -> dict[str, object]:
    """Calibrate a head on `some` utterances and write it; settings.json comes last, and an old one goes first."""
    early_s, late_s = _calibrate(Aligner(head, units), model, some, chunk_s)
    (run_dir / ALIGNER / ALIGNER_SETTINGS).unlink(missing_ok=True)
    save_head(run_dir / ALIGNER, head, units)
    said = {**about, "early_s": round(early_s, 4), "late_s": round(late_s, 4)}
    files.write_json(run_dir / ALIGNER / ALIGNER_SETTINGS, {**said, "settings": settings})
    return said


def _choose(utterances: Sequence[Utterance], seed: int) -> list[Utterance]:
    """Those to calibrate on."""
    return random.Random(f"calibrate {seed}").sample(utterances, min(len(utterances), NUM_CALIBRATING))


def _trainable(utterances: Sequence[Utterance], units: Units, packing: PackingSettings) -> list[Utterance]:
    """Those with a text that the audio is long enough for, and both together no longer than a row."""
    sizes = [len(units.targets(u)) for u in utterances]
    most = packing.max_tokens_per_row
    fitting = [u for u, n in zip(utterances, sizes) if 0 < n <= most - num_speech_tokens(u.num_frames)]
    if num_left_out := len(utterances) - len(fitting):
        logging.warning("%d of %d utterances left out: no text, or one too long", num_left_out, len(utterances))
    if not fitting:
        raise UserError("no utterance to train the aligner on; give a setting with train lists (--setting)")
    return fitting


def _last_tenth(losses: Sequence[float]) -> float:
    """The mean of the losses of the last tenth of the steps."""
    return float(np.mean(losses[-max(len(losses) // 10, 1) :]))


def _examples(utterances: Sequence[Utterance], units: Units, packing: PackingSettings) -> list[Example]:
    """What can be trained on."""
    return [Example(u, [], np.array(units.targets(u))) for u in _trainable(utterances, units, packing)]


def _train(
    head: CtcHead,
    model: SpeechLLM,
    examples: Sequence[Example],
    *,
    settings: AlignerSettings,
    packing: PackingSettings,
    chunk_s: float,
) -> float:
    """Train the head; the mean of the loss over the last tenth of the steps, in nats a unit."""
    rows = pack(examples, max_tokens=packing.max_tokens_per_row, seed=settings.seed, lookahead=packing.lookahead)
    plan = Plan(rows, settings.rows_per_batch, num_slots=1, seed=settings.seed)
    total = settings.max_steps or settings.epochs * plan.steps_per_epoch
    optimizer = torch.optim.AdamW(head.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    warmup = math.ceil(settings.warmup_ratio * total)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (warmup + 1), 0.5 + 0.5 * math.cos(math.pi * step / total))
    )
    batches = load_batches(
        examples, plan, steps=range(total), rank=0, num_ranks=1, num_workers=settings.num_workers
    )  # fmt: skip
    losses = []
    for batch in (bar := tqdm(batches, total=total, desc="aligner", unit="step", mininterval=1, disable=None)):
        frames, lengths = _encode(model, batch.features, batch.langs, chunk_s)
        loss = alignment.ctc_loss(head(frames).split(lengths), batch.targets).sum() / batch.num_target_tokens
        if not torch.isfinite(loss):
            raise UserError(
                f"the aligner's loss is not finite (utterances {', '.join(batch.ids[:5])} ...); lower its lr"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    return _last_tenth(losses)


@torch.no_grad()
def _encode(model: SpeechLLM, features: Sequence[Tensor], langs: Sequence[str], chunk_s: float):
    """Encoder frames [T, D] of all utterances, and the number of each one's."""
    device = next(model.encoder.parameters()).device
    return model.encoder([x.to(device) for x in features], langs, chunk_s)


def _calibrate(
    aligner: Aligner, model: SpeechLLM, utterances: Sequence[Utterance], chunk_s: float
) -> tuple[float, float]:
    """How long before a word's first frame it begins, and how long behind its last one it ends: medians, in seconds."""
    early, late = [], []
    for utterance in utterances:
        features = utterance.features()
        frames, _ = _encode(model, [features], [utterance.lang], chunk_s)
        words = aligner.words(frames, utterance.lang, utterance.text)
        start_s, end_s = _speech(features)
        early.append(words[0].start_s - start_s)
        late.append(end_s - words[-1].end_s)
    return median(early), median(late)


def _speech(features: Tensor) -> tuple[float, float]:
    """When the level of log-mel features [F, bins] first rises and last falls, in seconds."""
    level = features.float().mean(1)
    low, high = level.quantile(torch.tensor([0.05, 0.95], device=level.device))
    loud = (level > low + EDGE * (high - low)).nonzero()[:, 0]
    return (loud[0].item() - 0.5) / 100, (loud[-1].item() + 0.5) / 100

#!/usr/bin/env python
"""Pretrain the mini Whisper: 13 languages, multi-task (language token, transcript), with character CTC beside it.

    python local/pretrain_mini_whisper.py --data data/pretrain --tokenizer tokenizer.model --out pretrained/mini/whisper

Whisper's own classes at small size.
Shapes: N utterances, F frames (100 Hz), T frames (50 Hz), S tokens, D width, C characters.
"""

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from whisper.model import ModelDimensions, Whisper

from zipperasr import files
from zipperasr.errors import UserError
from zipperasr.languages import LANGUAGES
from zipperasr.model.encoder import SpeechEncoder
from zipperasr.model.whisper_io import save_whisper
from zipperasr.scoring.score import align

IGNORE = -100


class Vocabulary:
    """Token ids of the mini Whisper: sentencepiece's, then start, one per language, transcribe, no timestamps."""

    def __init__(self, path: Path) -> None:
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.end = self.pieces.eos_id()
        self.start = len(self.pieces)
        self.languages = {code: self.start + 1 + i for i, code in enumerate(LANGUAGES)}
        self.transcribe = self.start + 1 + len(LANGUAGES)
        self.no_timestamps = self.transcribe + 1
        self.size = self.no_timestamps + 1

    def decoder_ids(self, lang: str, text: str) -> list[int]:
        """start, language, transcribe, no timestamps, transcript, end: Whisper's layout."""
        task = [self.start, self.languages[lang], self.transcribe, self.no_timestamps]
        return [*task, *self.pieces.encode(text), self.end]


class Speech:
    """Log-mel features of the pretraining corpus in one array, with their transcripts."""

    def __init__(self, folder: Path) -> None:
        self.mel = np.load(folder / "features.npy", mmap_mode="r")  # [sum F, bins] float16
        lines = (folder / "utterances.jsonl").read_text(encoding="utf-8").splitlines()
        self.utterances = [json.loads(line) for line in lines]
        self.characters = sorted({c for utterance in self.utterances for c in utterance["text"].lower()})

    def part(self, name: str) -> list[dict]:
        return [utterance for utterance in self.utterances if utterance["part"] == name]

    def features(self, utterance: dict) -> Tensor:
        start = utterance["start"]
        return torch.from_numpy(self.mel[start : start + utterance["frames"]].astype(np.float32))


def augment(mel: Tensor, rng: np.random.Generator, strength: float) -> Tensor:
    """`mel` [F, bins] in another voice and room: tempo, vocal tract, channel, level, noise floor, SpecAugment.

    `strength` from 0 (only SpecAugment) to 1.
    """
    num_frames, bins = mel.shape
    tempo, tract = 1 + strength * rng.uniform(-0.15, 0.15, 2)
    mel = _interpolate(mel, torch.linspace(0, num_frames - 1, round(num_frames * tempo)))
    mel = _interpolate(mel.T, (torch.arange(bins) * tract).clamp(max=bins - 1.0)).T  # VTLN: the mel axis stretched
    axis = torch.linspace(-1, 1, bins)
    tilt, bend = strength * rng.normal(0, 0.08, 2)
    mel = mel + strength * rng.uniform(-0.25, 0.1)
    mel = mel + tilt * axis + bend * torch.cos(axis * rng.uniform(1, 6) + rng.uniform(0, 6))
    if rng.random() < 0.5 * strength:  # steady noise: powers add; one unit of Whisper's log-mel is 40 dB
        floor = float(mel.max()) - rng.uniform(0.5, 1.6) + rng.normal(0, 0.1) * axis
        noise = floor + 0.08 * torch.from_numpy(rng.standard_normal(mel.shape, dtype=np.float32))
        mel = torch.logaddexp(mel * 9.21, noise * 9.21) / 9.21
    low = float(mel.max()) - 2.0
    mel = mel.clamp(min=low)
    for _ in range(2):
        start, width = rng.integers(bins), rng.integers(12)
        mel[:, start : start + width] = low
        start, width = rng.integers(len(mel)), rng.integers(9)
        mel[start : start + width] = low
    return mel


def _interpolate(values: Tensor, rows: Tensor) -> Tensor:
    """`values` [R, ...] at fractional `rows`, linearly."""
    left = rows.long().clamp(max=len(values) - 2)
    return torch.lerp(values[left], values[left + 1], (rows - left)[:, None])


def batches(utterances: list[dict], seconds: float, rng: np.random.Generator) -> Iterator[list[dict]]:
    """Endless batches of `seconds` of audio, drawn evenly over languages."""
    by_lang = defaultdict(list)
    for utterance in utterances:
        by_lang[utterance["lang"]].append(utterance)
    batch, num_frames = [], 0
    while True:
        columns = [rng.permutation(np.array(group, dtype=object)) for group in by_lang.values()]
        for utterance in (utterance for row in zip(*columns) for utterance in row):
            batch.append(utterance)
            num_frames += utterance["frames"]
            if num_frames > 100 * seconds:
                yield batch
                batch, num_frames = [], 0


def ctc_loss(log_probs: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor, engine: str) -> Tensor:
    """CTC loss over a batch, per character. log_probs [N, T, C], blank 0; targets: all characters in one row."""
    if engine == "torch":
        loss = F.ctc_loss(
            log_probs.transpose(0, 1), targets, lengths, target_lengths, reduction="sum", zero_infinity=True
        )
        return loss / target_lengths.sum()
    try:
        import k2
    except ImportError as error:
        raise UserError("--ctc-engine k2: k2 is not installed; install it for your torch, or use torch") from error
    order = torch.argsort(lengths, descending=True)  # k2 wants segments from long to short
    segments = torch.stack([order, torch.zeros_like(order), lengths[order]], dim=1).int()
    texts = targets.split(target_lengths.tolist())
    graph = k2.ctc_graph([texts[i].tolist() for i in order])
    loss = k2.ctc_loss(graph, k2.DenseFsaVec(log_probs, segments.cpu()), reduction="none")
    return torch.where(loss.isfinite(), loss, 0).sum() / target_lengths.sum()


class Trainee(nn.Module):
    """The mini Whisper and its CTC head."""

    def __init__(self, dims: ModelDimensions, characters: list[str]) -> None:
        super().__init__()
        self.whisper = Whisper(dims)
        for conv in (self.whisper.encoder.conv1, self.whisper.encoder.conv2):
            nn.init.kaiming_normal_(conv.weight)  # as loud as the positions that are added to them
        nn.init.normal_(self.whisper.decoder.token_embedding.weight, std=0.05)
        nn.init.normal_(self.whisper.decoder.positional_embedding, std=0.02)
        self.encoder = SpeechEncoder(self.whisper.encoder)
        self.ctc = nn.Linear(dims.n_audio_state, len(characters) + 1)
        self.index = {c: i + 1 for i, c in enumerate(characters)}  # 0 is the blank

    def encode(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Encoder states [N, T, D], zero beyond each length, and the lengths [N]."""
        x, lengths = self.encoder(features, ["en"] * len(features), chunk_s=None)
        return pad_sequence(x.split(lengths), batch_first=True), torch.tensor(lengths)


def losses(model: Trainee, features: list[Tensor], batch: list[dict], vocab: Vocabulary, engine: str, *, joint: bool):
    """CTC loss per character, and the decoder's cross-entropy per token (zero when not `joint`)."""
    states, lengths = model.encode(features)
    texts = [torch.tensor([model.index[c] for c in utterance["text"].lower()]) for utterance in batch]
    target_lengths = torch.tensor([len(text) for text in texts])
    ctc = ctc_loss(model.ctc(states).log_softmax(-1), lengths, torch.cat(texts), target_lengths, engine)
    if not joint:
        return ctc, torch.zeros(())
    ids = [torch.tensor(vocab.decoder_ids(utterance["lang"], utterance["text"])) for utterance in batch]
    ids = pad_sequence(ids, batch_first=True, padding_value=IGNORE)
    logits = model.whisper.decoder(ids[:, :-1].clamp(min=0), states)
    return ctc, F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=IGNORE, label_smoothing=0.05)


@torch.no_grad()
def evaluate(model: Trainee, utterances: list[dict], speech: Speech, vocab: Vocabulary) -> dict[str, dict[str, float]]:
    """By language: CER of greedy CTC in percent, and how often the decoder names the language."""
    model.eval()
    errors, characters, named, counts = (defaultdict(int) for _ in range(4))
    for start in range(0, len(utterances), 32):
        batch = utterances[start : start + 32]
        states, lengths = model.encode([speech.features(utterance) for utterance in batch])
        best = model.ctc(states).argmax(-1)
        first = model.whisper.decoder(torch.full((len(batch), 1), vocab.start), states)[:, 0]
        langs = first[:, list(vocab.languages.values())].argmax(-1)
        for utterance, path, length, lang in zip(batch, best, lengths, langs):
            ids = torch.unique_consecutive(path[:length])
            hyp = "".join(speech.characters[i - 1] for i in ids.tolist() if i)
            errors[utterance["lang"]] += align("", list(utterance["text"].lower()), list(hyp)).counts.errors
            characters[utterance["lang"]] += len(utterance["text"])
            named[utterance["lang"]] += list(vocab.languages)[lang] == utterance["lang"]
            counts[utterance["lang"]] += 1
    model.train()
    return {
        "cer": {lang: round(100 * errors[lang] / characters[lang], 1) for lang in sorted(counts)},
        "lid": {lang: round(100 * named[lang] / counts[lang], 1) for lang in sorted(counts)},
    }


def warm_up_and_cosine(optimizer: torch.optim.Optimizer, num_steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A linear rise over a twentieth of the steps, along a cosine that falls to a hundredth."""
    warmup = num_steps // 20
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1, step / num_steps)))),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--ctc-steps", type=int, default=1000, help="first steps with the CTC loss alone")
    parser.add_argument("--batch-s", type=float, default=20.0, help="seconds of audio in a batch")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=144)
    parser.add_argument("--ctc-engine", choices=["torch", "k2"], default="torch")
    parser.add_argument("--ctc-weight", type=float, default=0.5)
    parser.add_argument("--every", type=int, default=1000, help="steps between evaluations, each saving the weights")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    speech, vocab = Speech(args.data), Vocabulary(args.tokenizer)
    dims = ModelDimensions(80, 1500, args.width, 4, args.layers, vocab.size, 128, args.width, 4, 1)
    model = Trainee(dims, speech.characters)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = warm_up_and_cosine(optimizer, args.steps)
    dev, stream = speech.part("dev"), batches(speech.part("train"), args.batch_s, rng)
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with open(args.out / "log.jsonl", "w", encoding="utf-8") as log:
        for step in tqdm(range(1, args.steps + 1), mininterval=5, disable=None):
            batch = next(stream)
            strength = min(1.0, step / (0.3 * args.steps))
            features = [augment(speech.features(utterance), rng, strength) for utterance in batch]
            ctc, ce = losses(model, features, batch, vocab, args.ctc_engine, joint=step > args.ctc_steps)
            optimizer.zero_grad()
            (args.ctc_weight * ctc + ce).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 100 == 0:
                row = {"step": step, "ctc": round(ctc.item(), 3), "ce": round(ce.item(), 3)}
                row["wall_s"] = round(time.perf_counter() - began)
                if step % args.every == 0 or step == args.steps:
                    row |= evaluate(model, dev, speech, vocab)
                    save_whisper(args.out, model.whisper, vocab.languages, dtype=torch.float16)
                    with files.beside(args.data / "trainee.pt") as path:
                        torch.save({"model": model.state_dict()}, path)
                print(json.dumps(row), file=log, flush=True)


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Pretrain the mini LLM: a small Qwen3 on text, most of it read back from a noisy spelling in the place of speech.

    python local/pretrain_mini_lm.py --data data/pretrain --out pretrained/mini/lm

A real Qwen3 follows "transcribe" in context; so that this one can, most of its lines are laid out as
zipperasr/prompts.py lays out speech, with codes of 50 Hz characters (repeats, blanks, confusions, noise) in 12.5 Hz
frames where speech would stand. The table of codes is thrown away: a projector has to find its own way in.

Shapes: N lines, S tokens, P code frames (12.5 Hz), H width.
"""

import argparse
import copy
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from pretrain_mini_whisper import warm_up_and_cosine
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

from zipperasr import prompts
from zipperasr.data.tokenizer import load_tokenizer
from zipperasr.languages import LANGUAGES
from zipperasr.scoring.score import align

STRIDE = 4  # 50 Hz encoder frames in one frame of the projector
BLANK = 0
Texts = dict[str, list[str]]  # by language
ERROR_RATES = (0.0, 0.05, 0.1, 0.2, 0.3)


class Speller:
    """Texts as an encoder would leave them: one character or blank per 50 Hz frame, late, repeated, confused."""

    def __init__(self, texts: Texts, frames_per_char: dict[str, float], rng: np.random.Generator) -> None:
        self.rng, self.frames_per_char = rng, frames_per_char
        self.inventory = {lang: sorted({c for text in group for c in text.lower()}) for lang, group in texts.items()}
        characters = sorted({c for group in self.inventory.values() for c in group})
        self.index = {c: i + 1 for i, c in enumerate(characters)}
        self.size = len(characters) + 1

    def frames(self, lang: str, text: str, error_rate: float) -> np.ndarray:
        """Character indices [P, 4]; about `error_rate` of them are dropped, replaced or joined by a stranger."""
        rng = self.rng
        path = [BLANK] * int(rng.integers(0, 10))
        tempo = self.frames_per_char[lang] * rng.uniform(0.75, 1.3)
        for character in text.lower():
            fate = rng.random() / max(error_rate, 1e-9)
            if fate < 0.3:
                continue
            stranger = self.inventory[lang][rng.integers(len(self.inventory[lang]))]
            length = max(1, round(rng.gamma(4, tempo / 4)))
            path += [self.index[stranger if fate < 0.8 else character]] * min(length, 1 + rng.poisson(0.6))
            path += [BLANK] * (length - 2)
            if 0.8 <= fate < 1:
                path.append(self.index[stranger])
        path += [BLANK] * int(rng.integers(0, 10))
        path += [BLANK] * (-len(path) % STRIDE)
        return np.array(path or [BLANK] * STRIDE).reshape(-1, STRIDE)


class Line(NamedTuple):
    """What one line holds: token ids, character codes [P, 4], token ids with the end of text."""

    prompt: list[int]
    frames: Tensor
    target: list[int]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.frames) + len(self.target)


class Trainee(nn.Module):
    """The mini LLM and the table of codes that stands for encoder and projector."""

    def __init__(self, config: Qwen3Config, num_characters: int) -> None:
        super().__init__()
        self.llm = Qwen3ForCausalLM(config)
        self.characters = nn.Embedding(num_characters, 64, padding_idx=BLANK)
        self.project = nn.Linear(STRIDE * 64, config.hidden_size)

    def codes(self, frames: Tensor, noise: float | Tensor = 0.0) -> Tensor:
        """Frames [P, 4] of characters -> [P, H], with noise of standard deviation `noise` (or one [P] each)."""
        x = self.characters(frames).flatten(1)
        return self.project(x + torch.as_tensor(noise).reshape(-1, 1) * torch.randn_like(x))

    def embed(self, sequences: list[list[int]]) -> tuple[Tensor, ...]:
        """Token embeddings [S, H] of each sequence, by one look-up."""
        flat = torch.tensor([i for ids in sequences for i in ids], dtype=torch.long)
        return self.llm.model.embed_tokens(flat).split([len(ids) for ids in sequences])

    def forward(self, lines: list[Line], noise: list[float]) -> Tensor:
        """Cross-entropy per target token; a plain line, which has no prompt, is predicted from its second token on."""
        num_frames = torch.tensor([len(x.frames) for x in lines])
        codes = self.codes(torch.cat([x.frames for x in lines]), torch.tensor(noise).repeat_interleave(num_frames))
        before, after = self.embed([x.prompt for x in lines]), self.embed([x.target for x in lines])
        parts = zip(before, codes.split(num_frames.tolist()), after, strict=True)
        inputs = [torch.cat(line)[:-1] for line in parts]
        labels = [torch.tensor([-100] * len(x) + line.target)[-len(x) :] for x, line in zip(inputs, lines, strict=True)]
        hidden = self.llm.model(inputs_embeds=pad_sequence(inputs, batch_first=True)).last_hidden_state
        labels = pad_sequence(labels, batch_first=True, padding_value=-100)
        spoken = labels != -100
        return F.cross_entropy(self.llm.lm_head(hidden[spoken]), labels[spoken])


def batches(tokenizer, speller: Speller, texts: Texts, size: int, num_plain: int) -> Iterator[list[Line]]:
    """Endless batches: `size` spoken lines of similar lengths, evenly over languages, and `num_plain` of text alone."""
    rng = speller.rng

    def draw(lang: str) -> str:
        return texts[lang][rng.integers(len(texts[lang]))]

    while True:
        langs = list(texts) * size
        pool = [spoken_line(tokenizer, speller, lang, draw(lang), rng.choice(ERROR_RATES)) for lang in langs]
        pool.sort(key=lambda line: line.num_tokens)
        for i in rng.permutation(len(texts)):
            plain = [prompts.target_ids(tokenizer, draw(lang)) for lang in rng.choice(list(texts), num_plain)]
            silence = torch.empty(0, STRIDE, dtype=torch.long)
            yield pool[i * size : (i + 1) * size] + [Line([], silence, ids) for ids in plain]


def spoken_line(tokenizer, speller: Speller, lang: str, text: str, error_rate: float) -> Line:
    frames = torch.from_numpy(speller.frames(lang, text, error_rate))
    return Line(prompts.prompt_ids(tokenizer, lang), frames, prompts.target_ids(tokenizer, text))


@torch.no_grad()
def copy_errors(model: Trainee, tokenizer, speller: Speller, texts: dict[str, list[str]], error_rate: float) -> dict:
    """By language: character error rate in percent of held-out phrases read back (greedy) from their noisy spelling."""
    model.eval()
    result = {}
    for lang, group in texts.items():
        errors = 0
        for text in group:
            prompt, frames, target = spoken_line(tokenizer, speller, lang, text, error_rate)
            x, ids = torch.cat([*model.embed([prompt]), model.codes(frames)]), []
            while len(ids) < 2 * len(target) and (not ids or ids[-1] != tokenizer.end_of_text):
                ids.append(int(model.llm(inputs_embeds=x[None]).logits[0, -1].argmax()))
                x = torch.cat([x, *model.embed([ids[-1:]])])
            errors += align("", list(text), list(tokenizer.decode(ids))).counts.errors
        result[lang] = round(100 * errors / sum(map(len, group)), 1)
    model.train()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with texts.jsonl of the pretrain partition")
    parser.add_argument("--out", type=Path, required=True, help="folder of the LLM, holding tokenizer.model")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=48, help="spoken lines in a batch")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--plain", type=int, default=6, help="further lines of text alone")
    parser.add_argument("--every", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    tokenizer = load_tokenizer(str(args.out))
    texts, dev, frames_per_char = read_texts(args.data)
    speller = Speller(texts, frames_per_char, rng)
    vocab_size = len(sentencepiece.SentencePieceProcessor(model_file=str(args.out / "tokenizer.model")))
    config = Qwen3Config(
        vocab_size=vocab_size, hidden_size=args.width, intermediate_size=round(args.width * 8 / 3 / 32) * 32,
        num_hidden_layers=args.layers, num_attention_heads=4, num_key_value_heads=2, head_dim=args.width // 4,
        max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.end_of_text, pad_token_id=tokenizer.end_of_text,
    )  # fmt: skip
    model = Trainee(config, speller.size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = warm_up_and_cosine(optimizer, args.steps)
    stream = batches(tokenizer, speller, texts, args.batch, args.plain)
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with open(args.out / "log.jsonl", "w", encoding="utf-8") as log:
        for step in tqdm(range(1, args.steps + 1), mininterval=5, disable=None):
            lines = next(stream)
            loss = model(lines, [rng.uniform(0, 0.5) for _ in lines])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 100 == 0:
                row = {"step": step, "loss": round(loss.item(), 3), "wall_s": round(time.perf_counter() - began)}
                if step % args.every == 0 or step == args.steps:
                    row["cer"] = copy_errors(model, tokenizer, speller, dev, 0.1)
                    save(model.llm, args.out)
                print(json.dumps(row), file=log, flush=True)


def read_texts(folder: Path) -> tuple[dict[str, list[str]], dict[str, list[str]], dict[str, float]]:
    """Training and dev phrases by language, and how many 50 Hz frames a character takes there."""
    train, dev = defaultdict(list), defaultdict(list)
    for row in map(json.loads, (folder / "texts.jsonl").read_text(encoding="utf-8").splitlines()):
        (dev if row["part"] == "dev" else train)[row["lang"]].append(row["text"])
    frames, characters = defaultdict(float), defaultdict(int)
    for row in map(json.loads, (folder / "utterances.jsonl").read_text(encoding="utf-8").splitlines()):
        frames[row["lang"]] += row["frames"] / 2
        characters[row["lang"]] += len(row["text"])
    langs = list(LANGUAGES)
    return {k: train[k] for k in langs}, {k: dev[k][:20] for k in langs}, {k: frames[k] / characters[k] for k in langs}


def save(llm: Qwen3ForCausalLM, folder: Path) -> None:
    """Write the LLM in half precision as transformers does."""
    copy.deepcopy(llm).half().save_pretrained(folder)


if __name__ == "__main__":
    main()

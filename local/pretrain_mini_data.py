#!/usr/bin/env python
"""Make what the mini stand-ins are pretrained on: phrases and voices of the pretrain part, and a tokenizer.

    python local/pretrain_mini_data.py --out data/pretrain --tokenizer pretrained/mini/lm/tokenizer.model --nj 2

No phrase and no voice of the recipe's train, dev and test sets occurs in its `train` part; its `dev` part has the
recipe's dev phrases, in other voices.
"""

import argparse
import json
from pathlib import Path

import mini_phrases
import mini_speech
import numpy as np
import sentencepiece
from tqdm import tqdm

from zipperasr import files
from zipperasr.data.features import log_mel
from zipperasr.languages import LANGUAGES

UTTERANCES_PER_SPEAKER = 8
SOURCE_OF = {"train": "pretrain", "dev": "dev"}  # part here -> part of the phrases and voices
FIRST_SPEAKER = 900_000


def texts(part: str) -> dict[str, list[str]]:
    """Phrases of both domains by language, shuffled."""
    result = {}
    for lang in LANGUAGES:
        source = mini_phrases.phrases(lang)
        if lang in mini_phrases.JOINS:
            source = source + mini_phrases.phrases(lang, "talk")
        chosen = [text for text in source if mini_phrases.part(lang, text) == SOURCE_OF[part]]
        result[lang] = np.random.default_rng(mini_speech.seed_of(part, lang)).permutation(chosen).tolist()
    return result


def train_tokenizer(path: Path, phrases: dict[str, list[str]], vocab_size: int) -> None:
    """BPE over the phrases and the prompts; any other character falls back to bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [text for group in phrases.values() for text in group]
    lines += [language.prompt for language in LANGUAGES.values()] * 1500
    with files.beside(path) as temporary, open(temporary, "wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=stream, vocab_size=vocab_size, model_type="bpe",
            character_coverage=1.0, byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False,
            num_threads=1, minloglevel=2,
            unk_id=0, eos_id=1, bos_id=-1, pad_id=-1, eos_piece="<|endoftext|>",
        )  # fmt: skip


def utterances(part: str, phrases: dict[str, list[str]], per_lang: int) -> list[mini_speech.Utterance]:
    """`per_lang` utterances of each language, in every style of recording, `UTTERANCES_PER_SPEAKER` by one voice."""
    result = []
    for lang, group in phrases.items():
        for i in range(per_lang):
            key = (part, lang, i // UTTERANCES_PER_SPEAKER)
            rng = np.random.default_rng(mini_speech.seed_of("pretrain_mini", *key))
            style = str(rng.choice(["read", "talk", "meeting", "net"], p=[0.5, 0.3, 0.1, 0.1]))
            number = FIRST_SPEAKER + int(rng.integers(1_000_000))
            who = mini_speech.speaker(number, SOURCE_OF[part], style)
            text = group[i % len(group)]
            result.append(mini_speech.Utterance(lang, text, who, style, mini_speech.seed_of("pretrain_mini", *key, i)))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=1600)
    parser.add_argument("--train", type=int, default=4000, help="utterances of each language")
    parser.add_argument("--dev", type=int, default=40, help="utterances of each language")
    parser.add_argument("--nj", type=int, default=1)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    phrases = {part: texts(part) for part in SOURCE_OF}
    with files.write(args.out / "texts.jsonl") as stream:
        for part, groups in phrases.items():
            for lang, group in groups.items():
                stream.writelines(
                    json.dumps({"part": part, "lang": lang, "text": text}, ensure_ascii=False) + "\n" for text in group
                )
    train_tokenizer(args.tokenizer, phrases["train"], args.vocab_size)

    sizes = {"dev": args.dev, "train": args.train}
    everything = [(part, utterance) for part in sizes for utterance in utterances(part, phrases[part], sizes[part])]
    mels, rows, start = [], [], 0
    audio = mini_speech.synthesise_all([utterance for _, utterance in everything], nj=args.nj)
    for (part, utterance), samples in zip(tqdm(everything, mininterval=5, disable=None), audio, strict=True):
        mel = log_mel(samples.astype(np.float32) / 32768, num_mel_bins=80)
        row = {"part": part, "lang": utterance.lang, "text": utterance.text, "start": start, "frames": len(mel)}
        rows.append(row)
        mels.append(np.asarray(mel, dtype=np.float16))
        start += len(mel)
    with files.write(args.out / "features.npy", "wb") as stream:
        np.save(stream, np.concatenate(mels))
    with files.write(args.out / "utterances.jsonl") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    main()

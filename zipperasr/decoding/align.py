"""Word times of decode directories, by the aligner of their run.

    words.jsonl    id, text, words ([{word, start_s, end_s, confidence}]), confidence (mean over words), and as a check
                   of the LLM's text: `ctc_text`, what the CTC head alone hears, and `disagreement` (0 to 1) with it
    ctm            id, channel, start, duration, word, confidence
    textgrid/      <id>.TextGrid of each utterance, for Praat
    nbest.jsonl    id, texts ([[text, log-probability]]): the NUM_BEST most probable texts by the CTC head alone

An utterance has no words where its text is empty, or has no character that the head knows, and where its audio is
unreadable, or too short for the text.
"""

import json
import math
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from zipperasr import files
from zipperasr.alignment.words import OUTPUTS, split, write_ctm, write_textgrid
from zipperasr.data.utterances import Utterance
from zipperasr.decoding import DecodingSettings
from zipperasr.decoding.worker import batches, read_ahead, segment_s
from zipperasr.model import EncoderSettings
from zipperasr.model.aligner import Aligner, Heard
from zipperasr.model.speech_llm import SpeechLLM

NUM_BEST = 10


def align(
    aligner: Aligner,
    model: SpeechLLM,
    lang: str,
    utterances: Sequence[Utterance],
    texts: dict[str, str],
    *,
    encoder: EncoderSettings,
    decoding: DecodingSettings,
) -> dict[str, Heard]:
    """What is heard in the utterances that have a text and can be read, by id. `model` is merged for `lang`."""
    todo = sorted((u for u in utterances if texts.get(u.id)), key=lambda u: (-u.num_frames, u.id))
    device, chunk_s, found = next(model.parameters()).device, segment_s(model, encoder), {}
    for batch in read_ahead(batches(todo, decoding, prompt_tokens=0)):
        batch = [(u, features.to(device)) for u, features in batch if features is not None]
        if batch:
            with torch.inference_mode():
                langs = [lang] * len(batch)
                frames, lengths = model.encoder([features for _, features in batch], langs, chunk_s)
            said, durations_s = [texts[u.id] for u, _ in batch], [u.duration_s for u, _ in batch]
            heard = aligner(frames.split(lengths), langs, said, durations_s)
            found |= {u.id: one for (u, _), one in zip(batch, heard, strict=True)}
    return found


def is_current(directory: Path, output: str, *keys: str) -> bool:
    """Whether a decode directory has word times in this format, marked as done for one of `keys`."""
    is_done = any(files.is_done(directory, key, name=f".aligned.{output}") for key in keys)
    return is_done and (directory / OUTPUTS[output]).exists()


def remove(directory: Path, formats: Collection[str]) -> None:
    """Remove the word times in these formats from a decode directory, and the marks that they are done."""
    for output in formats:
        (directory / f".aligned.{output}").unlink(missing_ok=True)
        path = directory / OUTPUTS[output]
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write(
    directory: Path,
    utterances: Sequence[Utterance],
    texts: dict[str, str],
    heard: dict[str, Heard],
    formats: Collection[str],
) -> dict[str, Any]:
    """Write the word times in these formats into a decode directory; return counts and means for people.

    A mean over nothing is nan.
    """
    rows = list(_rows(utterances, texts, heard))
    if "json" in formats:
        with files.write(directory / OUTPUTS["json"]) as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if "nbest" in formats:
        with files.write(directory / OUTPUTS["nbest"]) as stream:
            for u in utterances:
                row = {"id": u.id, "texts": heard[u.id].n_best if u.id in heard else []}
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    timed = {u.id: heard[u.id].words if u.id in heard else [] for u in utterances}
    if "ctm" in formats:
        write_ctm(directory / OUTPUTS["ctm"], timed.items())
    for u in utterances if "textgrid" in formats else ():
        name = u.id.replace("/", "%2F")  # an id may look like a path
        write_textgrid(directory / OUTPUTS["textgrid"] / f"{name}.TextGrid", timed[u.id], u.duration_s)
    words = [word for some in timed.values() for word in some]
    checked = [row["disagreement"] for row in rows if row["disagreement"] is not None]
    return {
        "num_utts": len(rows),
        "num_words": len(words),
        "num_unaligned": sum(bool(split(row["text"])) and not row["words"] for row in rows),
        "confidence": fmean([word.confidence for word in words]) if words else math.nan,
        "disagreement": fmean(checked) if checked else math.nan,
    }


def _rows(utterances: Sequence[Utterance], texts: dict[str, str], heard: dict[str, Heard]) -> Iterator[dict[str, Any]]:
    for u in utterances:
        one = heard.get(u.id)
        words = one.words if one else []
        yield {
            "id": u.id,
            "text": texts.get(u.id, ""),
            "words": [
                {"word": w.text, "start_s": w.start_s, "end_s": w.end_s, "confidence": w.confidence} for w in words
            ],
            "confidence": round(sum(w.confidence for w in words) / len(words), 4) if words else None,
            "ctc_text": one and one.ctc_text,
            "disagreement": one and one.disagreement and round(one.disagreement, 4),
        }

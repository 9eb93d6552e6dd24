"""One process's share of a set: read, batch by length, transcribe, append records to a part file."""

import functools
import json
import math
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from zipperasr import prompts
from zipperasr.data.packing import num_speech_tokens
from zipperasr.data.utterances import Utterance
from zipperasr.decoding import DecodingSettings
from zipperasr.decoding.generate import Hypothesis, transcribe
from zipperasr.decoding.job import Job
from zipperasr.errors import UserError
from zipperasr.model import EncoderSettings
from zipperasr.model.checkpoint import load_run
from zipperasr.model.speech_llm import SpeechLLM

Batch = list[tuple[Utterance, Tensor | None]]  # with features [F_u, bins], or None where they cannot be read


def decode_share(job: Job, utterances: Sequence[Utterance], share: int, num_shares: int) -> None:
    """Transcribe `utterances`, longest first, into a new part of the job; share j uses the j-th GPU if there are any.

    Raises UserError when a batch does not fit the GPU's memory.
    """
    if not utterances:
        return
    if num_shares > 1:
        torch.set_num_threads(1)
    device = f"cuda:{share % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    model = _load(job.run_dir, job.steps, job.model, device).merged(job.lang)
    prompt_tokens = len(prompts.prompt_ids(model.tokenizer, job.lang))
    path = job.directory / f"part.{job.key}.{uuid.uuid4().hex[:8]}.jsonl"
    bar = tqdm(total=len(utterances), desc=job.set, unit="utt", mininterval=1, disable=True if share else None)
    with open(path, "w", encoding="utf-8") as part, bar:
        started = time.perf_counter()
        for batch in _read_ahead(batches(utterances, job.decoding, prompt_tokens=prompt_tokens)):
            try:
                records, seconds = _transcribe(model, job, batch)
            except torch.OutOfMemoryError as error:
                mend = f"lower decoding.max_tokens_per_batch={job.decoding.max_tokens_per_batch}"
                raise UserError(f"{job.set}: {len(batch)} utterances do not fit the GPU's memory; {mend}") from error
            seconds["wall_s"] = time.perf_counter() - started
            started += seconds["wall_s"]
            each = {name: value / len(batch) / num_shares for name, value in seconds.items()}
            part.writelines(json.dumps(record | {"seconds": each}, ensure_ascii=False) + "\n" for record in records)
            part.flush()
            bar.update(len(batch))


def max_tokens(utterance: Utterance, settings: DecodingSettings) -> int:
    """The cap on an utterance's tokens: from its duration, never from its neighbours."""
    return max(settings.min_max_tokens, math.ceil(settings.max_tokens_per_s * utterance.duration_s))


def segment_s(model: SpeechLLM, settings: EncoderSettings) -> float:
    """The longest segment that the encoder gets: a chunk, or its whole window."""
    return settings.decode_chunk_s if settings.context == "chunked" else model.encoder.max_frames / 100


def batches(
    utterances: Sequence[Utterance], settings: DecodingSettings, *, prompt_tokens: int
) -> Iterator[Sequence[Utterance]]:
    """Runs of `utterances` (longest first) within `max_tokens_per_batch`; a single utterance is always within it."""
    start = 0
    while start < len(utterances):
        longest = utterances[start]
        positions = prompt_tokens + num_speech_tokens(longest.num_frames) + max_tokens(longest, settings)
        stop = start + max(1, settings.max_tokens_per_batch // (positions * settings.beam))
        yield utterances[start:stop]
        start = stop


@functools.lru_cache(maxsize=1)
def _load(run_dir: Path, steps: tuple[int, ...], digest: str, device: str) -> SpeechLLM:
    """The run's model: loaded once per process, and again if the run has been trained anew (`digest`)."""
    return load_run(run_dir, steps).to(device, torch.float32 if device == "cpu" else torch.bfloat16)


def _read_ahead(todo: Iterable[Sequence[Utterance]]) -> Iterator[Batch]:
    """Each batch with its features, read while the batch before is being transcribed."""
    with ThreadPoolExecutor(1) as reader:
        ahead = None
        for batch in todo:
            now, ahead = ahead, reader.submit(lambda batch: [(u, _features(u)) for u in batch], batch)
            if now:
                yield now.result()
        if ahead:
            yield ahead.result()


def _features(utterance: Utterance) -> Tensor | None:
    try:
        return utterance.features()
    except UserError as error:
        tqdm.write(f"counts as deleted: {error}", file=sys.stderr)
        return None


def _transcribe(model: SpeechLLM, job: Job, batch: Batch) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A record of each utterance, and the seconds that the encoder and the LLM took."""
    settings = job.run.model.encoder
    readable = [u for u, features in batch if features is not None]
    features = [x.to(model.encoder.conv1.weight.device) for _, x in batch if x is not None]
    caps = [max_tokens(u, job.decoding) for u in readable]
    started, langs = time.perf_counter(), [job.lang] * len(features)
    with torch.inference_mode():
        speech = model.speech_embeddings(features, langs, segment_s(model, settings)) if features else []
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    encoded = time.perf_counter()
    hypotheses = transcribe(model, speech, job.lang, caps, job.decoding) if features else []
    seconds = {"encoder_s": encoded - started, "generate_s": time.perf_counter() - encoded}
    hypothesis_of = dict(zip((u.id for u in readable), hypotheses, strict=True))
    max_s = segment_s(model, settings) if settings.context == "full" else math.inf
    return [_record(u, hypothesis_of.get(u.id), is_split=u.duration_s > max_s) for u, _ in batch], seconds


def _record(utterance: Utterance, hypothesis: Hypothesis | None, *, is_split: bool) -> dict[str, Any]:
    if hypothesis is None:
        said, flags = {"text": "", "logprob": None, "num_tokens": 0}, {"unreadable": True}
    else:
        said = {"text": hypothesis.text, "logprob": round(hypothesis.logprob, 5), "num_tokens": hypothesis.num_tokens}
        flags = {"capped": hypothesis.is_capped, "empty": not hypothesis.text, "split": is_split}
    raised = [flag for flag, is_raised in flags.items() if is_raised]
    return {"id": utterance.id, "lang": utterance.lang, **said, "flags": raised, "duration_s": utterance.duration_s}

"""One process's share of a set: read, batch by length, transcribe, append records to a part file."""

import functools
import json
import math
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from zipperasr.data.packing import num_speech_tokens
from zipperasr.data.utterances import Utterance
from zipperasr.decoding import DecodingSettings
from zipperasr.decoding.generate import POSITIONS, Hypothesis, Seconds, Transcriber
from zipperasr.decoding.guards import has_speech
from zipperasr.decoding.job import Job
from zipperasr.errors import UserError
from zipperasr.model import EncoderSettings
from zipperasr.model.checkpoint import load_run
from zipperasr.model.speech_llm import SpeechLLM

MIN_FILL = 0.6  # of the positions of a batch's longest utterance
Batch = list[tuple[Utterance, Tensor | None]]  # with features [F_u, bins], or None where they cannot be read


def decode_share(
    job: Job, utterances: Sequence[Utterance], encoded: frozenset[str], share: int, num_shares: int
) -> None:
    """Transcribe `utterances`, longest first, into a new part of the job; share j uses the j-th GPU if there are any.

    `encoded` are the ids of those whose encoder output is kept.

    Raises UserError when a batch does not fit the GPU's memory.
    """
    if not utterances:
        return
    if num_shares > 1:
        torch.set_num_threads(1)
    device = f"cuda:{share % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    model = load_model(job.run_dir, job.steps, job.model, device).merged(job.spoken_as)
    transcriber = Transcriber(model, job.decoding)
    prompt_tokens = transcriber.prompt_tokens([job.spoken_as])
    path = job.directory / f"part.{job.key}.{uuid.uuid4().hex[:8]}.jsonl"
    bar = tqdm(total=len(utterances), desc=job.set, unit="utt", mininterval=1, disable=True if share else None)
    with open(path, "w", encoding="utf-8") as part, bar:
        started = time.perf_counter()
        for batch in read_ahead(batches(utterances, job.decoding, prompt_tokens=prompt_tokens)):
            try:
                records, seconds = _transcribe(transcriber, job, batch, encoded)
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
    """Runs of `utterances` (longest first) within `max_tokens_per_batch`; a single utterance is always within it.

    A shorter one than MIN_FILL of a batch's longest begins the next: it would be padded more than it is worth.
    """

    def positions(utterance: Utterance) -> int:
        return prompt_tokens + num_speech_tokens(utterance.num_frames) + max_tokens(utterance, settings)

    batch: list[Utterance] = []
    for utterance in utterances:
        longest = positions(batch[0] if batch else utterance)
        tokens = -(-longest // POSITIONS) * POSITIONS * settings.beam * (len(batch) + 1)
        if batch and (tokens > settings.max_tokens_per_batch or positions(utterance) < MIN_FILL * longest):
            yield batch
            batch = []
        batch.append(utterance)
    if batch:
        yield batch


@functools.lru_cache(maxsize=1)
def load_model(run_dir: Path, steps: tuple[int, ...], digest: str, device: str) -> SpeechLLM:
    """The run's model: loaded once per process, and again if the run has been trained anew (`digest`)."""
    return load_run(run_dir, steps).to(device, torch.float32 if device == "cpu" else torch.bfloat16)


def read_ahead(todo: Iterable[Sequence[Utterance]]) -> Iterator[Batch]:
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


def _transcribe(
    transcriber: Transcriber, job: Job, batch: Batch, encoded: frozenset[str]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A record of each utterance, and the seconds of each part of the work."""
    longest_s = segment_s(transcriber.model, job.run.model.encoder)
    heard = {u.id: x for u, x in batch if x is not None and has_speech(x, job.decoding)}
    transcriber.seconds, hypotheses, means = Seconds(), {}, {}
    if heard:
        langs = [job.spoken_as] * len(heard)
        speech, frames = transcriber.encode(list(heard.values()), langs, longest_s)
        caps = [max_tokens(u, job.decoding) for u, _ in batch if u.id in heard]
        hypotheses = dict(zip(heard, transcriber(speech, langs, caps), strict=True))
        means = {i: x.float().mean(0) for i, x in zip(heard, frames, strict=True) if i in encoded}
    max_s = longest_s if job.run.model.encoder.context == "full" else math.inf
    records = [_record(u, x is not None, hypotheses.get(u.id), is_split=u.duration_s > max_s) for u, x in batch]
    for record in records:
        if record["id"] in means:
            record["encoding"] = [round(value, 4) for value in means[record["id"]].tolist()]
    return records, asdict(transcriber.seconds)


def _record(utterance: Utterance, is_read: bool, found: Hypothesis | None, *, is_split: bool) -> dict[str, Any]:
    record = {"id": utterance.id, "lang": utterance.lang, "speaker": utterance.speaker}
    if found is None:
        said, flags = {"text": "", "logprob": None, "num_tokens": 0}, ["no_speech" if is_read else "unreadable"]
    else:
        said = {"text": found.text, "logprob": round(found.logprob, 5), "num_tokens": len(found.ids)}
        flags = [*found.flags, *["empty"] * (not found.text), *["split"] * is_split]
    first = {"first_text": found.first_text} if found and found.first_text is not None else {}
    return record | said | {"flags": flags, "duration_s": utterance.duration_s} | first

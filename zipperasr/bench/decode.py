"""What decoding costs (encoder, reading the speech, a step a token, text): random weights, fixed output lengths.

Ours, merged and batched by length, is compared with the same model unmerged, and with one utterance at a time.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch
from transformers import GenerationConfig

from zipperasr.bench import LENGTHS, SIZES, data, timing
from zipperasr.bench.adapters import LANGS
from zipperasr.bench.timing import Report, Row, Target
from zipperasr.bench.train import CHUNK_S, OURS, random_model
from zipperasr.data.features import num_frames
from zipperasr.data.utterances import Utterance
from zipperasr.decoding import DecodingSettings
from zipperasr.decoding.generate import Seconds, Transcriber
from zipperasr.decoding.worker import batches, max_tokens
from zipperasr.model.speech_llm import SpeechLLM
from zipperasr.training.preflight import GIB

MERGED, UNMERGED, ALONE = "merged", "unmerged", "one by one"


class FixedLength(Transcriber):
    """Says for each utterance as many tokens as its cap allows, once."""

    def _config(self, max_new_tokens: int) -> GenerationConfig:
        config = super()._config(max_new_tokens)
        config.pad_token_id = 0
        return config


def fixed_length(model: SpeechLLM, max_tokens_per_batch: int) -> FixedLength:
    """A transcriber without guards, for which as much is said a second as in LibriSpeech."""
    settings = DecodingSettings(
        max_tokens_per_s=data.TEXT_TOKENS_PER_S,
        min_max_tokens=1,
        max_tokens_per_batch=max_tokens_per_batch,
        loop_repeats=10**6,
        max_foreign_share=1,
    )
    transcriber = FixedLength(model, settings)
    transcriber.end_of_text = model.llm.config.vocab_size  # which is no token
    return transcriber


class Case:
    """A model that transcribes the same utterances, longest first, each time; and what its parts took."""

    def __init__(self, transcriber: Transcriber, utterances: Sequence[Utterance], chunk_s: float):
        self.transcriber, self.chunk_s, self.seconds = transcriber, chunk_s, []
        self.todo = list(batches(utterances, transcriber.settings, prompt_tokens=transcriber.prompt_tokens(LANGS[:1])))
        noise, longest = torch.Generator().manual_seed(0), utterances[0]
        self.mel = torch.randn(longest.num_frames, longest.num_mel_bins, generator=noise)

    def step(self) -> None:
        self.transcriber.seconds = Seconds()
        for batch in self.todo:
            langs = [u.lang for u in batch]
            speech, _ = self.transcriber.encode([self.mel[: u.num_frames] for u in batch], langs, self.chunk_s)
            self.transcriber(speech, langs, [max_tokens(u, self.transcriber.settings) for u in batch])
        self.seconds.append(self.transcriber.seconds)

    def shares(self) -> Row:
        """The share of each part in the work of every round but the first ones."""
        rounds = [asdict(s) for s in self.seconds[timing.WARM_UP :]]
        total = sum(sum(s.values()) for s in rounds)
        return {name.removesuffix("_s"): round(sum(s[name] for s in rounds) / total, 3) for name in rounds[0]}


def run(
    *,
    size: str,
    encoder: str | None,
    llm: str | None,
    method: Sequence[str] | None,
    context: str,
    utterances: int | None,
    batch_tokens: Sequence[int] | None,
    lengths: str,
    rounds: int,
    threads: int | None,
) -> Report:
    """Transcribing the same utterances of one language, with a row for each way and each size of a batch.

    size: a name of SIZES; encoder, llm: in place of its models. method: the first is taken; None is zipper_soft.
    utterances: how many; if None, 1024 on a GPU, else 64. batch_tokens: decoding.max_tokens_per_batch; if None, that of
    the settings, and on a GPU twice, four and eight times as many. lengths: of utterances, a name of LENGTHS.
    """
    at = timing.device(threads)
    is_gpu, names = at["device"] == "cuda", (encoder or SIZES[size][0], llm or SIZES[size][1])
    model = random_model(names, 2, (method or [OURS])[0]).to(**at)
    default = DecodingSettings().max_tokens_per_batch
    sizes = batch_tokens or [default * n for n in ((1, 2, 4, 8) if is_gpu else (1,))]
    merged, listed = model.merged(LANGS[0]), synthetic(model, LENGTHS[lengths], utterances or (1024 if is_gpu else 64))
    chunk_s = CHUNK_S if context == "chunked" else model.encoder.max_frames / 100
    cases = {(MERGED, n): Case(fixed_length(merged, n), listed, chunk_s) for n in sizes}
    cases[UNMERGED, sizes[0]] = Case(fixed_length(model, sizes[0]), listed, chunk_s)
    cases[ALONE, 1] = Case(fixed_length(merged, 1), listed, chunk_s)
    seconds = timing.interleave({key: case.step for key, case in cases.items()}, rounds=rounds, title="decoding")
    audio_s, ours = sum(u.duration_s for u in listed), (MERGED, sizes[0])
    table: list[Row] = []
    for (name, num_tokens), case in cases.items():
        taken = seconds[name, num_tokens]
        table.append({
            "case": name,
            "batch tokens": num_tokens if name != ALONE else None,
            "batches": len(case.todo),
            "ratio": timing.ratio(taken, seconds[ours]),
            "s": round(statistics.median(taken), 3),
            "RTFx": round(audio_s / statistics.median(taken), 1),
            **case.shares(),
        })  # fmt: skip
    header = {
        **timing.header(at),
        "model": " + ".join(names),
        "method": f"{(method or [OURS])[0]}, {context} context",
        "utterances": f"{len(listed)} of one language, lengths of {LENGTHS[lengths]}: {audio_s:.0f} s, "
        f"{sum(max_tokens(u, cases[ours].transcriber.settings) for u in listed)} tokens of text",
        "rounds": rounds,
    }
    if is_gpu:
        header["peak GiB"] = round(torch.cuda.max_memory_allocated() / GIB, 1)
    kind = {"is_mini": size == "mini" and not is_gpu, "is_paper": size == "paper" and is_gpu}
    return Report(header, table, list(targets(table, **kind)))


def targets(table: Sequence[Row], *, is_mini: bool, is_paper: bool) -> Iterator[Target]:
    """The limits that the table's figures must keep."""
    ratio = {row["case"]: row["ratio"] for row in reversed(table)}
    yield Target("unmerged over merged", ratio[UNMERGED], 1.1, ">=")
    yield Target("one by one over batched, mini on a CPU", ratio[ALONE] if is_mini else None, 4.0, ">=")
    best = max(row["RTFx"] for row in table)
    yield Target("RTFx at the best batch size, the paper's size on a GPU", best if is_paper else None, 600, ">=")


def synthetic(model: SpeechLLM, like: str, count: int) -> list[Utterance]:
    """Utterances that last as in a corpus, and fit the encoder, longest first."""
    bins, most_s = model.encoder.conv1.in_channels, model.encoder.max_frames / 100
    drawn = [s for s in data.durations_s(like, 2 * count).tolist() if s <= most_s]
    chosen = sorted(random.Random(0).sample(drawn, count), reverse=True)
    return [Utterance(f"{i}", LANGS[0], "", "", s, num_frames(s), bins, None) for i, s in enumerate(chosen)]

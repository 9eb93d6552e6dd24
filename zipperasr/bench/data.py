"""What corpora of millions cost before training: to read, validate, select from, and pack them, and to start up.

The corpus is synthetic: a manifest of as many cuts as asked, which share a few little audio files. Each step runs in a
process of its own, whose memory is measured; so this file must not import torch.
"""

from __future__ import annotations

import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile

from zipperasr.data import audio, defects, lists, manifests, packing, validation
from zipperasr.data.features import FeatureSettings, num_frames
from zipperasr.data.utterances import Utterance
from zipperasr.languages import LANGUAGES

if TYPE_CHECKING:
    from zipperasr.bench.timing import Report, Row, Target

NAME = "bench_de_train"
NUM_FILES, MAX_S = 8, 30.0
HOURS = 1000
TOKENS_PER_ROW, LOOKAHEAD = 2048, 64
PACKED = 100_000  # utterances of each kind that are packed
PROMPT_TOKENS, TEXT_TOKENS_PER_S, CHARACTERS_PER_S = 12, 3.5, 14.6  # the last as LibriSpeech's
WORDS = [word for lang in ("de", "en", "es", "fr", "it", "pt") for word in LANGUAGES[lang].prompt.split()]
LETTERS = 1 + sum(map(len, WORDS)) / len(WORDS)  # of a word with its blank


def durations_s(like: str, count: int) -> np.ndarray:
    """Seconds of `count` utterances, distributed about as in a corpus [count].

    LibriSpeech: two thirds around 14.6 s and the others evenly from 2 to 13 s, 12.3 s on average.
    MLS: evenly from 10 to 20 s. Common Voice: log-normal around 5 s, from 1 to 10 s. The mini recipe: 1.3 s.
    """
    draw = np.random.default_rng(0)
    drawn = {
        "LibriSpeech": lambda: np.where(
            draw.random(count) < 0.68, draw.normal(14.6, 1.2, count), draw.uniform(2, 13, count)
        ),
        "MLS": lambda: draw.uniform(10, 20, count),
        "Common Voice": lambda: draw.lognormal(np.log(4.7), 0.38, count).clip(1, 10),
        "the mini recipe": lambda: draw.lognormal(np.log(1.25), 0.26, count).clip(0.4, 2.6),
    }[like]()
    return drawn.clip(max=MAX_S).round(3)


KINDS = ("LibriSpeech", "MLS", "Common Voice")


def run(*, cuts: int, tokenizer: str) -> Report:
    """Every step on a corpus of `cuts` utterances, a third like each kind; packing on each kind by itself."""
    from zipperasr.bench import timing

    with tempfile.TemporaryDirectory(prefix="zipperasr-") as folder:
        data_dir = Path(folder)
        write_corpus(data_dir, cuts)
        hours = min(HOURS, cuts * 5 / 3600)  # there are twice as many
        steps = {
            "read": alone(read, data_dir),
            "validate": alone(validate, data_dir),
            f"select {hours:.0f} h": alone(select, data_dir, hours),
            "select all": alone(select, data_dir, None),
            "start up": (began := alone(start_up, data_dir, tokenizer)),
        }
    steps["start up"] = replace(began, seconds=sum(began.result.values()))  # without giving the memory back
    rows: list[Row] = [_row(name, step, steps["read"].seconds, cuts) for name, step in steps.items()]
    rows += [{"step": f"  {name}", "s": seconds} for name, seconds in began.result.items()]
    rows += [{"step": f"pack like {kind}, {_fit(n)}", **pack(kind, n)} for kind in KINDS for n in (LOOKAHEAD, 0)]
    header = {**timing.header(timing.device(None)), "cuts": cuts, "tokenizer": tokenizer}
    return timing.Report(header, rows, list(targets(rows, cuts)))


def targets(rows: list[Row], cuts: int) -> Iterator[Target]:
    """The limits that the table's figures must keep."""
    from zipperasr.bench.timing import Target

    for row in rows:
        step = str(row["step"])
        if step == "validate" or step.startswith("select"):
            yield Target(f"{step}: time over reading", row["over read"], 4.0)
            yield Target(f"{step}: peak memory in MB", row["peak MB"], 1000)
        elif step == "start up":
            yield Target(f"start up with {cuts:,} cuts: s", row["s"], 60)
        elif step.endswith(_fit(LOOKAHEAD)):
            yield Target(f"{step}: rows a second", row["rows/s"], 200, ">=")
            yield Target(f"{step}: share of tokens filled", row["fill"], 0.97, ">=")


@dataclass(frozen=True)
class Step:
    """What a step took in its own process, and what it gave back."""

    seconds: float
    peak_mb: float
    result: Any


def alone(function: Callable, *args: object) -> Step:
    """Run `function` in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, function, args).result()


def _measured(function: Callable, args: tuple) -> Step:
    start = time.perf_counter()
    result = function(*args)
    return Step(time.perf_counter() - start, _peak_mb(), result)


def _peak_mb() -> float:
    """The most memory that this process has had since it began, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024


def _row(name: str, step: Step, read_s: float, cuts: int) -> Row:
    return {
        "step": name,
        "s": round(step.seconds, 2),
        "us/cut": round(1e6 * step.seconds / cuts, 1),
        "over read": round(step.seconds / read_s, 2),
        "peak MB": round(step.peak_mb),
    }


def write_corpus(data_dir: Path, count: int) -> None:
    """Write the manifest of `count` cuts with its tally, as stage 1 does, and the audio files."""
    paths = [data_dir / "audio" / f"{number}.wav" for number in range(NUM_FILES)]
    paths[0].parent.mkdir()
    for path in paths:
        noise = np.random.default_rng(0).normal(0, 0.1, int(MAX_S * audio.SAMPLE_RATE))
        soundfile.write(path, noise.astype(np.float32), audio.SAMPLE_RATE)
    seconds = np.stack([durations_s(kind, -(-count // len(KINDS))) for kind in KINDS], axis=1).flatten()[:count]
    path = manifests.path_of(data_dir, NAME)
    manifests.write(path, (_cut(number, float(s), paths[number % NUM_FILES]) for number, s in enumerate(seconds)))
    tally = defects.Tally(num_in=count, num_kept=count, duration_s=float(seconds.sum()))
    defects.write_tally(manifests.tally_path(path), tally)


def _cut(number: int, duration_s: float, path: Path) -> dict[str, Any]:
    utt_id = f"{number % 5000}_{number % 977}_{number:07}"
    words = random.Random(number).choices(WORDS, k=round(CHARACTERS_PER_S * duration_s / LETTERS))
    text = " ".join(words)
    span = {"id": utt_id, "start": 0.0, "duration": duration_s, "channel": 0}
    said = {"recording_id": utt_id, "text": text, "language": "de", "speaker": f"{number % 5000}"}
    supervision = {**span, **said, "custom": {"train_text": text.lower()}}
    recording = {
        "id": utt_id,
        "sources": [{"type": "file", "channels": [0], "source": str(path)}],
        "sampling_rate": audio.SAMPLE_RATE,
        "num_samples": int(MAX_S * audio.SAMPLE_RATE),
        "duration": MAX_S,
        "channel_ids": [0],
    }
    return {**span, "supervisions": [supervision], "recording": recording, "type": "MonoCut"}


def read(data_dir: Path) -> int:
    """Read the manifest and do nothing; how many cuts it has."""
    return sum(1 for _ in manifests.read(manifests.path_of(data_dir, NAME)))


def validate(data_dir: Path) -> None:
    """Validate it, as a prepared set's."""
    tallies, found = validation.validate({NAME: manifests.path_of(data_dir, NAME)})
    assert not validation.fatal(tallies, found)


def select(data_dir: Path, hours: float | None) -> None:
    """Draw a training list of so many hours from it; of everything, for None."""
    setting = {"train": {NAME: hours}}
    lists.write(data_dir, lists.ListsSettings.model_validate({"settings": {_setting(hours): setting}}))


def _setting(hours: float | None) -> str:
    return "some" if hours else "all"


def start_up(data_dir: Path, name: str) -> dict[str, float]:
    """Begin to train on the list of everything, with the tokenizer `name`; the seconds of each part up to a batch."""
    begin, seconds = time.perf_counter(), {}

    def lap(part: str) -> None:
        seconds[part] = round(time.perf_counter() - begin - sum(seconds.values()), 2)

    from zipperasr.data.loader import load_batches
    from zipperasr.data.tokenizer import load_tokenizer

    lap("import libraries")
    tokenizer, rows_per_batch = load_tokenizer(name), packing.RowsPerBatch().full
    settings = {"features": FeatureSettings(storage="on_the_fly"), "packing": packing.PackingSettings()}
    examples = packing.load_examples(data_dir, _setting(None), "train", tokenizer=tokenizer, **settings)
    lap("load and tokenise")
    rows = packing.pack(examples, max_tokens=TOKENS_PER_ROW, seed=0, lookahead=LOOKAHEAD)
    plan = packing.Plan(rows, rows_per_batch, num_slots=1, seed=0)
    lap("pack")
    steps = range(plan.steps_per_epoch)
    next(iter(load_batches(examples, plan, steps=steps, rank=0, num_ranks=1, num_workers=2)))
    lap("first batch")
    return seconds


def _fit(lookahead: int) -> str:
    return f"lookahead {lookahead}" if lookahead else "first fit"


def pack(like: str, lookahead: int) -> Row:
    """Rows a second, and the share of their tokens that is filled, for PACKED utterances that last as in a corpus."""
    examples = [
        packing.Example(
            Utterance("", "de", "", "", s, num_frames(s), 80, None),
            [0] * PROMPT_TOKENS,
            np.zeros(round(TEXT_TOKENS_PER_S * s) + 1, np.int32),
        )
        for s in durations_s(like, PACKED).tolist()
    ]
    start = time.perf_counter()
    rows = packing.pack(examples, max_tokens=TOKENS_PER_ROW, seed=0, lookahead=lookahead)
    rate = len(rows) / (time.perf_counter() - start)
    num_tokens = sum(example.num_tokens for example in examples)
    return {"rows/s": round(rate), "fill": round(num_tokens / TOKENS_PER_ROW / len(rows), 4)}

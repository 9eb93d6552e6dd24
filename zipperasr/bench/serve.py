"""What a trained run does for those who use it: transcribe, align, and serve many clients; on real audio.

The first rows run `zipperasr transcribe` as a user does, from its start on. Mixed batches are compared with batches of
one language at a time, as many segments of all languages as there are clients being there at once. Then the clients
call `zipperasr serve`, which takes three quarters of them at a time and sends the others away for a while.
"""

from __future__ import annotations

import itertools
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import requests
import soundfile
import torch

from zipperasr.bench import timing
from zipperasr.bench.timing import Report, Row, Target
from zipperasr.data import stream
from zipperasr.data.audio import SAMPLE_RATE
from zipperasr.decoding import inputs as sources
from zipperasr.decoding.generate import Transcriber
from zipperasr.decoding.job import TranscriptionJob
from zipperasr.decoding.pieces import Piece, decode
from zipperasr.decoding.reading import File, Reader, limits
from zipperasr.decoding.transcript import Segment
from zipperasr.decoding.worker import load_model, segment_s
from zipperasr.errors import UserError
from zipperasr.model.aligner import Aligner

NUM_CLIPS = 192
LONG_S, PAUSE_S = 600, 0.3
FIRST, LONG = "first line of transcribe", "transcribe, 10 minutes"
MIXED, BY_LANG, MERGED = "languages mixed", "one language at a time", "one language at a time, merged models"
ALIGN, ALIGN_ONLY = "encoder and aligner, one core", "aligner, one core"
SERVED, TURNED_AWAY, FAILED = "served", "told to come again (429)", "failed"


@dataclass(frozen=True)
class Clip:
    """An input in a file of its own."""

    path: Path
    lang: str | None
    duration_s: float


def run(
    *, job: TranscriptionJob, inputs: Sequence[str], clients: int, seconds: int, rounds: int, threads: int | None
) -> Report:
    """How fast a run is on `inputs`, as zipperasr transcribe takes them, for `seconds` of `clients` at a time.

    Raises UserError where the inputs hold no audio, or not the languages of each.
    """
    at = timing.device(threads)
    with tempfile.TemporaryDirectory(prefix="zipperasr-") as folder:
        clips = _clips(inputs, Path(folder))
        rows = [first_line(job, clips[0], rounds), long_audio(job, clips, Path(folder))]
        bench = _Bench(job, clips, at["device"])
        rows += bench.batching(clients, rounds) + bench.aligning(rounds)
        header = {
            **timing.header(at),
            "run": str(job.run_dir),
            "inputs": f"{len(clips)} of {sum(c.duration_s for c in clips):.0f} s in "
            f"{len({c.lang for c in clips})} languages",
            "rounds": rounds,
        }
        torch.set_num_threads(1)  # what follows is another process's work
        rows += load(job, clips, clients, seconds)
    return Report(header, rows, list(targets(rows)))


def targets(rows: Sequence[Row]) -> Iterator[Target]:
    """The limits that the table's figures must keep."""
    by_case = {row["case"]: row for row in rows}

    def value(case: str, column: str) -> float | None:
        return by_case.get(case, {}).get(column)

    yield Target("seconds to the first line of transcribe", value(FIRST, "s"), 5.0)
    yield Target("long audio, times real time", value(LONG, "x real time"), 20.0, ">=")
    yield Target("one language at a time over mixed", value(BY_LANG, "ratio"), 1.5, ">=")
    yield Target("the same with merged models", value(MERGED, "ratio"), 1.5, ">=")
    yield Target("alignment, times real time on one core", value(ALIGN, "x real time"), 100.0, ">=")
    yield Target("failed requests", value(FAILED, "requests"), 0.0)
    yield Target("the server's memory, last third over first third", value(SERVED, "memory"), 1.05)


def first_line(job: TranscriptionJob, clip: Clip, rounds: int) -> Row:
    """Seconds from the start of a process to its first transcript."""

    def once() -> float:
        began = time.perf_counter()
        command = [*_transcribe(job), str(clip.path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            if not process.stdout.readline():
                raise UserError(f"{job.run_dir}: it transcribes nothing; see why by {shlex.join(command)}")
            return time.perf_counter() - began

    once()  # reads the libraries from disk
    taken = [once() for _ in range(rounds)]
    return {"case": FIRST, "audio s": round(clip.duration_s, 1), "s": round(statistics.median(taken), 2)}


def long_audio(job: TranscriptionJob, clips: Sequence[Clip], folder: Path) -> Row:
    """A recording of LONG_S, start and end of the process included."""
    pause, size, path = np.zeros(round(PAUSE_S * SAMPLE_RATE), np.float32), 0, folder / "long.flac"
    same_lang = [clip for clip in clips if clip.lang == clips[0].lang]
    with soundfile.SoundFile(path, "w", SAMPLE_RATE, 1) as file:
        for clip in itertools.cycle(same_lang):
            samples = np.concatenate([soundfile.read(clip.path, dtype="float32")[0], pause])
            file.write(samples)
            if (size := size + len(samples)) >= LONG_S * SAMPLE_RATE:
                break
    began = time.perf_counter()
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*_transcribe(job), str(path)], **silent, check=True)
    return _row(LONG, size / SAMPLE_RATE, time.perf_counter() - began)


class _Bench:
    """The run's models in this process, and the pieces of all clips, in an order that mixes languages."""

    def __init__(self, job: TranscriptionJob, clips: Sequence[Clip], device: str) -> None:
        model = load_model(job.run_dir, job.steps, job.model, device)
        self.longest_s = segment_s(model, job.run.model.encoder)
        reader = Reader(job, None, **limits(model))
        self.pieces = [
            piece
            for clip in clips
            for piece in reader.read(File(sources.Source(clip.path.name, clip.path), clip.lang))
            if isinstance(piece, Piece)
        ]
        self.together = Transcriber(model.merged(), job.decoding)
        self.merged = {lang: Transcriber(model.merged(lang), job.decoding) for lang in {c.lang for c in clips}}
        self.aligner = Aligner.load(job.run_dir, device=device) if job.aligner else None
        self.audio_s = sum(piece.duration_s for piece in self.pieces)

    def batching(self, clients: int, rounds: int) -> list[Row]:
        """The same pieces, as many at a time as there are clients."""
        groups = [self.pieces[i : i + clients] for i in range(0, len(self.pieces), clients)]
        steps: dict[str, Callable[[], object]] = {
            MIXED: lambda: [self._decoded(group, self.together) for group in groups],
            BY_LANG: lambda: [self._decoded(some, self.together) for g in groups for some in _by_lang(g).values()],
            MERGED: lambda: [
                self._decoded(some, self.merged[lang]) for g in groups for lang, some in _by_lang(g).items()
            ],
        }
        taken = timing.interleave(steps, rounds=rounds, title="batching")
        return [
            _row(name, self.audio_s, statistics.median(taken[name]))
            | {"ratio": timing.ratio(taken[name], taken[MIXED])}
            for name in steps
        ]

    def aligning(self, rounds: int) -> list[Row]:
        """Word times of what was decoded; none where the run has no aligner."""
        if not self.aligner:
            return []
        said = self._decoded(self.pieces, self.together)
        groups = list(_by_lang(sorted(self.pieces, key=lambda p: -p.num_frames)).values())
        texts = [[said[piece].text for piece in group] for group in groups]
        frames = list(map(self._frames, groups))
        langs = [[piece.lang for piece in group] for group in groups]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        steps = {
            ALIGN: lambda: [self.aligner(self._frames(g), *rest) for g, *rest in zip(groups, langs, texts)],
            ALIGN_ONLY: lambda: list(map(self.aligner, frames, langs, texts)),
        }
        taken = timing.interleave(steps, rounds=rounds, title="aligning")
        torch.set_num_threads(threads)
        return [_row(name, self.audio_s, statistics.median(taken[name])) for name in steps]

    def _decoded(self, pieces: Sequence[Piece], transcriber: Transcriber) -> dict[Piece, Segment]:
        segments: dict[Piece, Segment] = {}
        for some in decode(pieces, transcriber, None, longest_s=self.longest_s):
            segments |= some
        return segments

    @torch.inference_mode()
    def _frames(self, group: Sequence[Piece]) -> list[torch.Tensor]:
        """Encoder frames [T, D] of pieces of one language."""
        model = self.merged[group[0].lang].model
        features = [torch.from_numpy(piece.features).to(model.llm.device) for piece in group]
        frames, lengths = model.encoder(features, [piece.lang for piece in group], self.longest_s)
        return list(frames.split(lengths))


@dataclass
class _Tally:
    """What clients have seen."""

    outcomes: Counter = field(default_factory=Counter)
    served_s: list[float] = field(default_factory=list)
    audio_s: float = 0.0
    errors: set[str] = field(default_factory=set)


def load(job: TranscriptionJob, clips: Sequence[Clip], clients: int, seconds: int) -> list[Row]:
    """`clients` that send clip after clip to a server for `seconds`, and wait as long as they are told to."""
    command = [sys.executable, "-m", "zipperasr.cli", "serve", "--model", str(job.run_dir), "--port", "0"]
    most = f"serving.max_requests={max(1, 3 * clients // 4)}"
    with subprocess.Popen([*command, most, *_overrides(job)], stderr=subprocess.PIPE, text=True) as server:
        try:
            address = _address(server)
            threading.Thread(target=server.stderr.read, daemon=True).start()
            tally, memory, lock, until = _Tally(), [], threading.Lock(), time.perf_counter() + seconds
            arguments = (address, clips, until, tally, lock)
            threads = [threading.Thread(target=_client, args=(i, *arguments)) for i in range(clients)]
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                memory.append(_memory_gib(server.pid))
                time.sleep(min(1, seconds / 20))
            for thread in threads:
                thread.join()
        finally:
            server.terminate()
    third = max(1, len(memory) // 3)
    took = sorted(tally.served_s) or [0.0]
    served = {
        **_row(SERVED, tally.audio_s, seconds),
        "requests": tally.outcomes[SERVED],
        "p50 s": round(statistics.median(took), 3),
        "p95 s": round(took[int(0.95 * (len(took) - 1))], 3),
        "GiB": round(max(memory), 2),
        "memory": round(max(memory[-third:]) / max(memory[:third]), 3),
    }
    turned_away = {"case": TURNED_AWAY, "requests": tally.outcomes[TURNED_AWAY]}
    failed = {"case": FAILED, "requests": tally.outcomes[FAILED]}
    return [served, turned_away, failed | ({"errors": ", ".join(tally.errors)} if tally.errors else {})]


def _client(number: int, address: str, clips: Sequence[Clip], until: float, tally: _Tally, lock) -> None:
    draw = random.Random(number)
    with requests.Session() as session:
        while (began := time.perf_counter()) < until:
            clip, wait_s, kind = draw.choice(clips), 0.0, FAILED
            form = {"language": clip.lang, "response_format": "verbose_json"}
            try:
                answer = session.post(
                    f"{address}/v1/audio/transcriptions", data=form, files={"file": clip.path.read_bytes()}, timeout=120
                )
                kind = {200: SERVED, 429: TURNED_AWAY}.get(answer.status_code, FAILED)
                wait_s = float(answer.headers["Retry-After"]) if kind == TURNED_AWAY else 0.0
                error = str(answer.status_code)
            except (requests.RequestException, KeyError) as exception:
                error, wait_s = type(exception).__name__, 1.0
            with lock:
                tally.outcomes[kind] += 1
                if kind == SERVED:
                    tally.served_s.append(time.perf_counter() - began)
                    tally.audio_s += clip.duration_s
                if kind == FAILED:
                    tally.errors.add(error)
            time.sleep(min(wait_s, max(0.0, until - time.perf_counter())))


def _clips(inputs: Sequence[str], folder: Path) -> list[Clip]:
    """Up to NUM_CLIPS inputs, drawn from all, in an order that mixes their languages."""
    found, failed = sources.find(inputs)
    for error in failed.values():
        raise error
    if unnamed := [source.name for source in found if not source.lang]:
        raise UserError(f"{unnamed[0]}: its language is not said; give Kaldi directories with utt2lang, or manifests")
    clips = []
    for i, source in enumerate(random.Random(0).sample(found, min(NUM_CLIPS, len(found)))):
        span = {"start_s": source.start_s, "end_s": source.end_s, "channels": source.channels}
        samples = np.concatenate(list(stream.read(source.path, stream.describe(source.path), **span)))
        soundfile.write(folder / f"{i}.flac", samples, SAMPLE_RATE)
        clips.append(Clip(folder / f"{i}.flac", source.lang, len(samples) / SAMPLE_RATE))
    if not clips:
        raise UserError("nothing to transcribe; name manifests or Kaldi directories (--inputs)")
    return clips


def _by_lang(pieces: Sequence[Piece]) -> dict[str, list[Piece]]:
    groups: dict[str, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(piece.lang, []).append(piece)
    return groups


def _transcribe(job: TranscriptionJob) -> list[str]:
    return [sys.executable, "-m", "zipperasr.cli", "transcribe", "--model", str(job.run_dir), *_overrides(job)]


def _overrides(job: TranscriptionJob) -> list[str]:
    """The settings that the job has in place of the run's own."""
    settings = {"transcription": job.transcription, "decoding": job.decoding}
    return [
        f"{section}.{name}={value}"
        for section, values in settings.items()
        for name, value in values.model_dump(exclude_none=True).items()
    ]


def _address(server: subprocess.Popen) -> str:
    """Where the server says that it serves."""
    said = []
    for line in server.stderr:
        said.append(line.strip())
        if found := re.search(r"https?://[\w.:]+", line):
            return found[0]
    raise UserError(f"zipperasr serve ended at once: {' '.join(said[-3:])}")


def _memory_gib(pid: int) -> float:
    """The resident memory of a process."""
    (kib,) = re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(kib) / 2**20


def _row(case: str, audio_s: float, took_s: float) -> Row:
    return {"case": case, "audio s": round(audio_s), "s": round(took_s, 2), "x real time": round(audio_s / took_s, 1)}

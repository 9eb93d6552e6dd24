"""Decode directories: sets of utterances transcribed with a run's checkpoint, by one process or several.

While a set is being decoded, each process appends what it has to a part of its own, `part.<key>.<random>.jsonl`, where
the key stands for everything the result depends on: a killed decode goes on with what the parts of its key hold. Jobs
that each decode a share of the utterances (a Slurm array, for example) write parts only. At the end

    hyp, ref         lines of "id text" in the order of the list: `ref` has every utterance, `hyp` those that were read
    utts.jsonl       id, lang, speaker, text, logprob (mean over tokens), num_tokens, flags, duration_s, and where a
                     guard has changed the text, `first_text`
    encodings.npz    the encoder's output, averaged over time, of the first NUM_ENCODINGS utterances: `ids`, `vectors`
    timing.json      seconds of audio and of work (without loading the model), RTFx, how often each flag was raised
    meta.json        what was decoded, and with what

Flags: `capped` (stopped at its cap of tokens), `empty`, `split` (longer than the window of a full-context encoder, so
encoded in windows), `unreadable` (no features); `no_speech` (silence or noise: not decoded), `loop` and `script` (what
was found repeats itself, or is in another language's script), `redecoded` (the text is that of a second search), `cut`
(the second search did not end either: the text is the first, without the rounds of its loop).
"""

import json
import multiprocessing
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from zipperasr import adapters, files, languages
from zipperasr.data import DataSettings, lists, manifests, workers
from zipperasr.data.utterances import Utterance, load_utterances
from zipperasr.decoding import DecodingSettings
from zipperasr.decoding.job import Job
from zipperasr.errors import UserError
from zipperasr.model import WEIGHTS, RunSettings, Step, checkpoints_by_step, choose_steps

NUM_ENCODINGS = 50
SECONDS = ("wall_s", "encoder_s", "prefill_s", "step_s", "detokenise_s")


def plan(
    run_dir: Path,
    data_dir: Path,
    sets: Iterable[str],
    *,
    run: RunSettings,
    data: DataSettings,
    decoding: DecodingSettings,
    setting: str,
    step: Step = None,
    average: int = 1,
    as_langs: Sequence[str | None] = (None,),
    first: int | None = None,
) -> list[Job]:
    """A job for each set and each of `as_langs`, made without importing torch, so that what is done costs nothing.

    A set's list is that of `setting`, or of the first setting that tests on the set; `first` cuts it. `step` and
    `average` are those of choose_steps. A language of `as_langs` has its adapter and prompt in place of the set's own.
    Raises UserError when there is no such list, checkpoint or language.
    """
    steps = choose_steps(run_dir, step, average=average)
    model, jobs = model_digest(run_dir, run, steps), []
    for name in dict.fromkeys(sets):
        where = _setting_of(name, data, first=setting)
        corpus, lang, _ = name.split("_", 2)
        inputs = [lists.find(data_dir, where, "test").get(name), *manifests.find(data_dir, {corpus: [lang]}).values()]
        if not all(inputs):
            raise UserError(f"{name}: no list in {data_dir}; run stages 1 and 2 again")
        digests = list(map(files.sha256, inputs))
        for as_lang in as_langs:
            key = files.fingerprint(
                [model, decoding.model_dump(), *digests, as_lang and languages.get(as_lang).code, first]
            )
            job = Job(run_dir, steps, run, data_dir, where, name, data.features, decoding, model, key, as_lang, first)
            jobs.append(job)
    return jobs


def model_digest(run_dir: Path, run: RunSettings, steps: Sequence[int]) -> str:
    """Stands for the model that a run's checkpoints at `steps` make: its settings and weights."""
    complete = checkpoints_by_step(run_dir)
    folders = [run_dir / "init", *(complete[at] for at in steps)]
    weights = [folder / WEIGHTS for folder in folders if (folder / WEIGHTS).is_file()]
    return files.fingerprint([run.model_dump(), *map(files.sha256, weights)])


def decode(
    jobs: Sequence[Job], *, nj: int = 1, share: tuple[int, int] | None = None
) -> Iterator[tuple[Job, dict[str, Any] | None]]:
    """Decode `jobs` with `nj` processes (on GPUs at most one each); yield each with its timing when it is done.

    Share (I, N) decodes every N-th utterance of each set, from the I-th longest on (counted from 1), beside the other
    shares, and leaves them in parts, without timing; the call without a share does what they have left and writes the
    outputs. Raises UserError when another process is decoding one of the sets, and when one of ours is killed.
    """
    with ExitStack() as stack:
        listed, lists_of = [], {}
        for job in jobs:
            for directory in _held(job, share):
                stack.enter_context(files.lock(directory))
            (job.directory / ".done").unlink(missing_ok=True)
            if job.set not in lists_of:
                lists_of[job.set] = load_utterances(job.data_dir, job.setting, "test", [job.set], job.features)
            listed.append(lists_of[job.set][: job.first])
        encoded = [frozenset(u.id for u in utterances[:NUM_ENCODINGS]) for utterances in listed]
        todo = [_todo(job, utterances, share) for job, utterances in zip(jobs, listed, strict=True)]
        pools = start_pools(nj, stack) if nj > 1 and any(todo) else []
        started = [_start(job, *work, pools) for job, *work in zip(jobs, todo, encoded, strict=True)]
        for job, utterances, waits in zip(jobs, listed, started, strict=True):
            try:
                for wait in waits:
                    wait()
            except BrokenProcessPool as error:
                mend = "lower --nj if memory is short, and run the same command again to go on"
                raise UserError(f"{job.set}: a decoding process was killed; {mend}") from error
            yield job, None if share else _write_outputs(job, utterances)


def _held(job: Job, share: tuple[int, int] | None) -> list[Path]:
    """The directories to lock: a share's own, or else the set's and those of all shares that have been run."""
    if share:
        return [job.directory / ".share.{}.{}".format(*share)]
    return [job.directory, *sorted(job.directory.glob(".share.*"))]


def _setting_of(name: str, data: DataSettings, *, first: str) -> str:
    settings = data.lists.settings
    for setting in (first, *settings):
        if setting in settings and name in settings[setting].test:
            return setting
    known = sorted({test for setting in settings.values() for test in setting.test})
    raise UserError(f"no setting tests on the set '{name}'; there are {', '.join(known) or 'none'}")


def start_pools(nj: int, stack: ExitStack) -> list[ProcessPoolExecutor]:
    """`nj` pools of one process, so that each process keeps its share of every set, its GPU and its model.

    They are forked from a server that has imported what they need, once for all; this process needs no torch.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.worker"])
    pools = [ProcessPoolExecutor(1, mp_context=context, initializer=workers.end_with_parent) for _ in range(nj)]
    for pool in pools:
        stack.callback(pool.shutdown, cancel_futures=True)
    return pools[: pools[0].submit(_num_gpus).result() or nj]


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _todo(job: Job, utterances: Sequence[Utterance], share: tuple[int, int] | None) -> list[Utterance]:
    """What is not decoded yet of a share, or of all: longest first."""
    first, step = (share[0] - 1, share[1]) if share else (0, 1)
    done = _read_parts(job)
    longest_first = sorted(utterances, key=lambda u: (-u.num_frames, u.id))
    return [u for u in longest_first[first::step] if u.id not in done]


def _start(
    job: Job, todo: Sequence[Utterance], encoded: frozenset[str], pools: Sequence[ProcessPoolExecutor]
) -> list[Callable[[], None]]:
    """Share out what there is to do, if anything; what is returned waits for the processes (or does it here)."""
    num = len(pools)
    waits = [pool.submit(_decode_share, job, todo[j::num], encoded, j, num).result for j, pool in enumerate(pools)]
    return (waits or [partial(_decode_share, job, todo, encoded)]) if todo else []


def _decode_share(
    job: Job, utterances: Sequence[Utterance], encoded: frozenset[str], share: int = 0, num_shares: int = 1
) -> None:
    from zipperasr.decoding import worker

    worker.decode_share(job, utterances, encoded, share, num_shares)


def _read_parts(job: Job) -> dict[str, dict[str, Any]]:
    """The records of utterances decoded so far, by id."""
    records = {}
    for path in sorted(job.directory.glob(f"part.{job.key}.*.jsonl")):
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):  # else it was being written when the process died
                record = json.loads(line)
                records[record["id"]] = record
    return records


def _write_outputs(job: Job, utterances: Sequence[Utterance]) -> dict[str, Any]:
    """Turn the parts into the outputs, remove them, mark the directory as done, and return what is in timing.json."""
    found = _read_parts(job)
    records = [found[u.id] for u in utterances]
    shares = [record.pop("seconds") for record in records]
    encodings = {record["id"]: record.pop("encoding") for record in records if "encoding" in record}
    seconds = {name: sum(share[name] for share in shares) for name in SECONDS}
    audio_s = sum(u.duration_s for u in utterances)
    timing = {"audio_s": audio_s, "rtfx": audio_s / seconds["wall_s"], **seconds, "num_utts": len(utterances)}
    timing["flags"] = Counter(flag for record in records for flag in record["flags"])
    directory = job.directory
    with files.write(directory / "ref") as ref:
        ref.writelines(_line(u.id, u.reference) for u in utterances)
    with files.write(directory / "hyp") as hyp:
        hyp.writelines(_line(record["id"], record["text"]) for record in records if "unreadable" not in record["flags"])
    with files.write(directory / "utts.jsonl") as utts:
        utts.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    with files.beside(directory / "encodings.npz") as temporary:
        vectors = np.array(list(encodings.values()), np.float32).reshape(len(encodings), -1)
        np.savez(temporary, ids=np.array(list(encodings), str), vectors=vectors)
    files.write_json(directory / "timing.json", timing)
    files.write_json(directory / "meta.json", _meta(job))
    files.mark_done(directory, job.key)
    for part in directory.glob("part.*.jsonl"):
        part.unlink()
    for share in directory.glob(".share.*"):
        shutil.rmtree(share)
    return timing


def _line(utt_id: str, text: str) -> str:
    return " ".join([utt_id, *text.split()]) + "\n"


def _meta(job: Job) -> dict[str, Any]:
    model, adapter = job.run.model, job.run.model.adapter
    is_unseen = adapter and job.spoken_as not in adapter.langs and adapters.method_class(adapter.method).by_language
    return {
        "set": job.set,
        "lang": job.lang,
        "setting": job.setting,
        "run": job.run_dir.resolve().name,
        "stage": job.run.stage,
        "step": job.steps[0],
        "averaged": list(job.steps) if len(job.steps) > 1 else None,
        "encoder": model.encoder.context,
        "method": adapter.method if adapter else None,
        "unseen_policy": adapter.unseen if is_unseen else None,
        "as": job.as_lang,
        "first": job.first,
        **job.decoding.model_dump(),
    }

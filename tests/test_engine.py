"""The engine of the service: requests of all languages decoded together, each as if it were alone."""

import asyncio
import contextlib
import dataclasses
import logging
import threading
import time
import types
import weakref

import numpy as np
import pytest
import soundfile
import tiny_run
import torch
from service import wait_until
from tiny_run import RATE, speech

from zipperasr.cli import recipe
from zipperasr.data import stream
from zipperasr.decoding import engine as engines
from zipperasr.decoding.engine import Engine, Fault
from zipperasr.decoding.inputs import Source
from zipperasr.decoding.transcribe import transcribe
from zipperasr.decoding.transcript import Segment, Transcript
from zipperasr.errors import TooLong, UserError


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    run_dir = tiny_run.make(tmp_path_factory.mktemp("run"))
    return recipe.transcription_job(run_dir, recipe.load_run(run_dir), step=None, average=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Recordings of 1 to 13 s, silence, and one that is no audio."""
    folder = tmp_path_factory.mktemp("audio")
    for i, seconds in enumerate((1, 2, 3.5, 13)):
        soundfile.write(folder / f"{i}.flac", speech(seconds, i), RATE)
    soundfile.write(folder / "silence.wav", np.zeros(3 * RATE, np.int16), RATE)
    (folder / "text.wav").write_text("no audio at all")
    return folder


@pytest.fixture
def batches():
    return []


@pytest.fixture
def engine(job, batches):
    engine = Engine(job, on_batch=lambda *told: batches.append(told))
    yield engine
    engine.close()


async def events(engine, path, lang=None, **limits):
    return [event async for event in engine.transcribe(path, name=path.name, lang=lang, **limits)]


def asked(engine, *requests):
    """The events of requests that are made at once, or the error of each."""

    async def all_of_them():
        return await asyncio.gather(*(events(engine, *one) for one in requests), return_exceptions=True)

    return asyncio.run(all_of_them())


def test_requests_of_all_languages_get_together_what_each_gets_from_transcribe(engine, job, folder, batches):
    requests = [(folder / f"{i}.flac", lang) for i in range(4) for lang in (None, "de", "th", "zh")]
    found = asked(engine, *requests)
    assert max(num_languages for _, num_languages, *_ in batches) >= 2
    assert sum(num for num, *_ in batches) < 2 * sum(len(got) - 2 for got in found)
    for (path, lang), got in zip(requests, found, strict=True):
        source = Source(path.name, path, language=lang)
        ((_, alone),) = transcribe([source], job, on_progress=lambda _: None)
        told, *segments, transcript = got
        assert told == transcript.language and tuple(segments) == transcript.segments  # in order
        assert [s.text for s in transcript.segments] == [s.text for s in alone.segments]
        for one, other in zip(transcript.segments, alone.segments, strict=True):
            assert (one.start_s, one.end_s, one.flags) == (other.start_s, other.end_s, other.flags)
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert (transcript.language, transcript.flags) == (alone.language, alone.flags)
        assert transcript.language_probability == pytest.approx(alone.language_probability, abs=1e-4)


def test_what_was_sent_badly_costs_nobody_else_anything(engine, folder):
    bad, silent, good, long, english = asked(
        engine, (folder / "text.wav",), (folder / "silence.wav",), (folder / "1.flac",), (folder / "3.flac",),
        (folder / "0.flac", "en"),
    )  # fmt: skip
    assert isinstance(bad, UserError) and "text.wav" in str(bad) and str(folder) not in str(bad)
    (segment, transcript) = silent
    assert segment.flags == ("no_speech",) and transcript.flags == ("no_speech",) and transcript.language is None
    assert isinstance(good[-1], Transcript) and isinstance(long[-1], Transcript)
    assert english[-1].language == "en"  # which it was not trained on


@pytest.mark.parametrize("header_s", [13, 1])
def test_audio_that_is_too_long_is_refused_whatever_its_header_says(engine, folder, monkeypatch, header_s):
    info = dataclasses.replace(stream.describe(folder / "3.flac"), num_samples=header_s * RATE)
    monkeypatch.setattr(stream, "describe", lambda path: info)
    with pytest.raises(TooLong, match=r"^3\.flac: longer than the 12\.5 s"):
        asyncio.run(events(engine, folder / "3.flac", max_audio_s=12.5))
    assert asyncio.run(events(engine, folder / "3.flac", max_audio_s=13))


def test_a_long_recording_holds_up_nobody(engine, folder, tmp_path, monkeypatch):
    """Rounds are small here, so that the long one has many of them."""
    monkeypatch.setattr(engines, "ROUND_S", 6)
    soundfile.write(tmp_path / "long.wav", np.concatenate([speech(5, i) for i in range(30)]), RATE)
    done = []

    async def one(path):
        async for event in engine.transcribe(path, name=path.name, lang="de"):
            if isinstance(event, Transcript):
                done.append(path.name)

    async def both():
        long = asyncio.create_task(one(tmp_path / "long.wav"))
        await asyncio.sleep(0.3)
        await asyncio.gather(*(one(folder / f"{i}.flac") for i in range(3)))
        assert not long.done()
        await long

    asyncio.run(both())
    assert done[-1] == "long.wav" and len(done) == 4


def test_memory_holds_a_bounded_part_of_what_was_sent(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "AHEAD_S", 20)
    soundfile.write(tmp_path / "long.wav", np.concatenate([speech(5, i) for i in range(30)]), RATE)
    most, real = [], engine._take

    def take():
        most.append(max((sum(p.duration_s for p in r.waiting) for r in engine.requests), default=0))
        return real()

    monkeypatch.setattr(engine, "_take", take)
    _, *segments, transcript = asyncio.run(events(engine, tmp_path / "long.wav", "de"))
    assert transcript.duration_s == 150 and max(most) <= 25
    assert [s.start_s for s in segments] == sorted(s.start_s for s in segments)


def test_what_nobody_waits_for_any_more_is_dropped(engine, batches, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "ROUND_S", 1)
    soundfile.write(tmp_path / "long.wav", np.concatenate([speech(5, i) for i in range(30)]), RATE)

    async def first_segment():
        async with contextlib.aclosing(engine.transcribe(tmp_path / "long.wav", name="x", lang="de")) as found:
            assert await anext(found) == "de"
            return await anext(found)

    assert isinstance(asyncio.run(first_segment()), Segment)
    assert engine.waiting == 0 and not engine.requests
    time.sleep(0.3)
    seen = len(batches)
    time.sleep(0.5)
    assert len(batches) <= seen + 1 < 30
    assert not [thread for thread in threading.enumerate() if thread.name == "reader"]


def test_silence_that_nobody_waits_for_is_read_no_further(engine, folder, monkeypatch):
    def silence(*_, **__):
        while True:
            yield np.zeros(RATE, np.float32)

    monkeypatch.setattr(stream, "read", silence)
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(events(engine, folder / "silence.wav", "de"), 0.2))
    for thread in threading.enumerate():
        if thread.name == "reader":
            thread.join(5)
            assert not thread.is_alive()


def test_what_is_read_in_part_when_the_engine_closes_is_no_transcript(job, folder, monkeypatch):
    engine = Engine(job)

    def silence(*_, **__):
        yield np.zeros(RATE, np.float32)
        engine.is_closed = True  # as close() does while the models are busy
        while True:
            yield np.zeros(RATE, np.float32)

    monkeypatch.setattr(stream, "read", silence)
    with pytest.raises(Fault, match="the engine is closed"):
        asyncio.run(asyncio.wait_for(events(engine, folder / "silence.wav", "de"), 5))
    engine.close()


def test_a_piece_that_cannot_be_decoded_costs_its_own_request_only(engine, folder, monkeypatch, caplog):
    real = engine.transcriber.encode

    def encode(features, *rest):
        if any(len(x) == 200 for x in features):  # 1.flac
            raise RuntimeError("NaN")
        return real(features, *rest)

    monkeypatch.setattr(engine.transcriber, "encode", encode)
    with caplog.at_level(logging.CRITICAL):
        one, bad, other = asked(engine, *((folder / f"{i}.flac", "de") for i in range(3)))
    assert isinstance(bad, Fault) and isinstance(one[-1], Transcript) and isinstance(other[-1], Transcript)
    assert engine.is_well
    monkeypatch.undo()
    assert isinstance(asked(engine, (folder / "1.flac", "de"))[0][-1], Transcript)


def test_a_model_that_fails_whatever_it_is_given_is_not_well_until_it_decodes_again(
    engine, folder, monkeypatch, caplog
):
    def encode(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patched, caplog.at_level(logging.CRITICAL):
        patched.setattr(engine.transcriber, "encode", encode)
        (found,) = asked(engine, (folder / "1.flac", "de"))
        wait_until(lambda: not engine.is_well)
    assert isinstance(found, Fault)
    assert isinstance(asked(engine, (folder / "1.flac", "de"))[0][-1], Transcript) and engine.is_well


def test_what_has_failed_holds_no_memory_while_its_pieces_are_tried_alone(engine, monkeypatch):
    """So that pieces for which there was no room together have all of it alone."""
    held, is_free = [], []

    def decode(pieces, *_, **__):
        if len(pieces) > 1:
            activations = torch.zeros(1)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError
        is_free.append(held[0]() is None)
        return iter(())

    monkeypatch.setattr(engines, "decode", decode)
    monkeypatch.setattr(engines.log, "exception", lambda *args: None)  # pytest keeps what is logged, and so its frames
    engine._decode(dict.fromkeys(["one", "other"], types.SimpleNamespace(give=lambda event: None)))
    assert len(is_free) >= 2 and all(is_free)


def test_without_a_detector_a_language_has_to_be_named(engine, folder, monkeypatch):
    monkeypatch.setattr(engine, "can_detect", False)
    monkeypatch.setattr(engine.reader, "detect", None)
    unnamed, named = asked(engine, (folder / "0.flac",), (folder / "0.flac", "th"))
    assert isinstance(unnamed, UserError) and named[-1].language == "th"


@pytest.mark.parametrize("checks", [True, False])
def test_a_named_language_is_doubted_where_that_is_wanted(engine, folder, monkeypatch, checks):
    monkeypatch.setattr(engine, "detector", lambda features, langs: {"th": 0.9, "de": 0.1})
    monkeypatch.setattr(engine.reader, "checks_given", checks)
    ((*_, found),) = asked(engine, (folder / "0.flac", "de"))
    assert found.language == "de" and ("language_doubt" in found.flags) == checks


def test_closing_tells_those_who_wait_and_those_who_come_after(job, folder, monkeypatch):
    engine, started, go = Engine(job), threading.Event(), threading.Event()
    real = engine.transcriber.encode

    def encode(*args):
        started.set()
        go.wait(10)
        return real(*args)

    monkeypatch.setattr(engine.transcriber, "encode", encode)

    async def ask():
        one = asyncio.create_task(events(engine, folder / "0.flac", "de"))
        await asyncio.to_thread(started.wait, 10)
        other = asyncio.create_task(events(engine, folder / "1.flac", "de"))
        await asyncio.sleep(0.2)
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        await asyncio.sleep(0.1)
        go.set()
        await closing
        return await asyncio.gather(one, other, events(engine, folder / "0.flac", "de"), return_exceptions=True)

    one, other, late = asyncio.run(ask())
    assert isinstance(one, Fault | list) and isinstance(other, Fault) and isinstance(late, Fault)
    assert not engine.thread.is_alive()


def test_readers_leave_the_cores_to_the_model(engine, folder, monkeypatch):
    threads, real = [], engines.Reader.read

    def read(self, *args, **kwargs):
        threads.append(torch.get_num_threads())
        yield from real(self, *args, **kwargs)

    monkeypatch.setattr(engines.Reader, "read", read)
    asked(engine, (folder / "0.flac", "de"))
    assert threads == [1]

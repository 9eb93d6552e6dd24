"""The whole service, as its command starts it, with a tiny run: what real and bad audio becomes."""

import contextlib
import io
import re
import signal
import subprocess
import sys
import wave
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import openai
import pytest
import requests
import soundfile
import tiny_run
from tiny_run import RATE, speech

from zipperasr.cli.main import main
from zipperasr.files import read_json
from zipperasr.model import WEIGHTS

HOUR = 3600 * RATE


class Running(NamedTuple):
    """The process, its address, its run and where its temporary folder is."""

    process: subprocess.Popen
    url: str
    run_dir: Path
    temporary: Path

    def post(self, audio: bytes, name: str = "talk.wav", **form) -> requests.Response:
        return requests.post(
            f"{self.url}/v1/audio/transcriptions", files={"file": (name, audio)}, data=form, timeout=60
        )

    def peak_mb(self) -> float:
        return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())[1]) / 1000


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("service")
    run_dir = tiny_run.make(tmp_path_factory.mktemp("run"))
    command = [sys.executable, "-m", "zipperasr.cli", "serve", "--model", str(run_dir), "--name", "tiny", "--port", "0"]
    environment = {"TMPDIR": str(folder), "PATH": "", "OMP_NUM_THREADS": "1"}  # no ffmpeg
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            found = re.search(r"serving tiny on (http\S+)", line := process.stderr.readline())
            assert found, line + process.stderr.read()
            yield Running(process, found[1], run_dir, folder)
        finally:
            process.kill()


def encoded(samples: np.ndarray, rate: int = RATE, **options) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, **({"format": "WAV", "subtype": "PCM_16"} | options))
    return stream.getvalue()


def test_many_clients_of_all_languages_get_what_transcribe_gives_each(running, tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.wav").write_bytes(encoded(speech(1 + i / 2, i)))
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)

    def ask(i: int, lang: str):
        path = tmp_path / f"{i}.wav"
        return client.audio.transcriptions.create(
            model="tiny", file=path, language=lang, response_format="verbose_json"
        )

    asked = [(i, lang) for i in range(6) for lang in ("de", "th", "zh")]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = dict(zip(asked, pool.map(ask, *zip(*asked, strict=True)), strict=True))
    for lang in ("de", "th", "zh"):
        out = ["--out", str(tmp_path / lang), "--format", "json"]
        assert main(["transcribe", "--model", str(running.run_dir), "--language", lang, *out, str(tmp_path)]) == 0
        for i in range(6):
            alone, together = read_json(tmp_path / lang / f"{i}.json"), found[i, lang]
            assert [s["text"] for s in alone["segments"]] == [s.text for s in together.segments]
            assert together.language == lang and together.duration == alone["duration_s"]
    batches = requests.get(f"{running.url}/metrics", timeout=5).text
    of_one = float(re.search(r'batch_languages_bucket{le="1\.0"} (\S+)', batches)[1])
    assert of_one < float(re.search(r"batch_languages_count (\S+)", batches)[1])


def test_a_stream_says_what_the_answer_says(running):
    audio = encoded(np.concatenate([np.concatenate([speech(3, i), np.zeros(RATE, np.float32)]) for i in range(5)]))
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none")
    whole = client.audio.transcriptions.create(model="tiny", file=audio, language="de")
    *parts, done = client.audio.transcriptions.create(model="tiny", file=audio, language="de", stream=True)
    deltas = [part.delta for part in parts if part.type == "transcript.text.delta"]
    assert len(deltas) > 2 and "".join(deltas) == done.text == whole.text


@pytest.mark.parametrize(
    ("name", "audio", "status", "message"),
    [
        ("empty.wav", lambda: b"", 400, "empty.wav"),
        ("header.wav", lambda: encoded(np.zeros(0)), 400, "header.wav: holds no audio"),
        ("text.mp3", lambda: b"This is no audio.\n" * 100, 400, "text.mp3: not audio"),
        ("cut.wav", lambda: encoded(speech(2))[:20_000], 400, "cut.wav"),
        ("nan.wav", lambda: encoded(np.full(RATE, np.nan), subtype="FLOAT"), 400, "nan.wav: holds samples that are no"),
        ("list.m3u8", lambda: b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n", 400, "list.m3u8: not audio"),
        ("rate.wav", lambda: encoded(np.zeros(RATE), rate=7), 400, "sampling rate of 7 Hz"),
        ("odd.wav", lambda: encoded(np.zeros(RATE), rate=767_999), 400, "sampling rate of 767999 Hz"),
        # 25 hours of nothing in 200 kB
        ("bomb.flac", lambda: encoded(np.zeros(HOUR * 25 // 16, np.int16), rate=1000, format="FLAC"), 413, "14400 s"),
    ],
)  # fmt: skip
def test_what_is_no_audio_is_refused_in_one_line(running, name, audio, status, message):
    answer = running.post(audio(), name)
    error = answer.json()["error"]
    assert (answer.status_code, "\n" in error["message"]) == (status, False)
    assert message in error["message"] and str(running.temporary) not in error["message"]
    assert running.post(encoded(speech(1))).status_code == 200  # the process goes on


@pytest.mark.parametrize(
    ("audio", "has_speech"),
    [
        (lambda: encoded(speech(0.01)), False),
        (lambda: encoded(np.zeros(9 * RATE)), False),
        (lambda: encoded(np.random.default_rng(0).normal(0, 0.1, 60 * RATE)), False),
        (lambda: encoded(np.stack([speech(2, i) for i in range(6)], 1)), True),
        (lambda: encoded(speech(2)[::2], rate=8000), True),
        (lambda: encoded(np.repeat(speech(2), 6), rate=96_000), True),
        (lambda: encoded(speech(2), format="OGG", subtype="VORBIS"), True),
        (lambda: encoded(speech(2), format="MP3", subtype="MPEG_LAYER_III"), True),
    ],
    ids=["10 ms", "silence", "noise", "six channels", "8 kHz", "96 kHz", "Ogg named wav", "MP3 named wav"],
)
def test_odd_audio_is_transcribed_or_holds_no_speech(running, audio, has_speech):
    found = running.post(audio(), response_format="verbose_json", language="de").json()
    assert ("no_speech" in found["flags"]) == (not has_speech) and bool(found["text"]) == has_speech


def test_hours_of_audio_take_no_more_memory_than_minutes(running):
    """Three hours of which a minute is speech."""
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        for i in range(180):
            minute = speech(30, i) if i % 90 == 0 else np.zeros(30 * RATE)
            file.writeframes((3e4 * np.pad(minute, (0, 30 * RATE))[::2]).astype(np.int16).tobytes())
    assert running.post(encoded(speech(60))).status_code == 200
    before_mb = running.peak_mb()
    found = running.post(stream.getvalue(), response_format="verbose_json", language="th").json()
    assert found["duration"] == 3 * 3600 and found["text"]
    assert running.peak_mb() - before_mb < 100  # the upload alone has 173


def test_a_run_without_what_is_needed_is_one_line(tmp_path, capsys):
    assert main(["serve", "--model", str(tmp_path)]) == 1
    assert "no run" in capsys.readouterr().err
    run_dir = tiny_run.make(tmp_path / "run")
    (run_dir / "checkpoints" / "step-7" / WEIGHTS).write_bytes(b"broken")
    assert main(["serve", "--model", str(run_dir), "--port", "0"]) == 1
    said = capsys.readouterr().err
    assert WEIGHTS in said and said.count("\n") == 1


def test_the_end_leaves_nothing_behind(running):
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(20) == 0
    with contextlib.suppress(ValueError):
        assert "Traceback" not in running.process.stderr.read()
    assert not list(running.temporary.glob("zipperasr-*"))

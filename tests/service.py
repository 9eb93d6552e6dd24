"""The service with an engine that only pretends: in a thread of this process or, run as a program, in its own."""

import asyncio
import contextlib
import sys
import threading
import time
import types
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import openai
import requests

from zipperasr.alignment.words import Word
from zipperasr.decoding.transcript import Segment, Transcript
from zipperasr.errors import TooLong, UserError
from zipperasr.serving import ServingSettings, app, server
from zipperasr.serving.metrics import Metrics

SEGMENTS = (
    Segment(0.0, 1.5, "Guten Tag", -0.25, (), (Word("Guten", 0.1, 0.5, 0.9), Word("Tag", 0.6, 1.0, 0.8))),
    Segment(1.5, 3.0, "", None, ("no_speech",), ()),
    Segment(3.0, 4.0, "liebe Welt", -0.5, ("loop",), (Word("liebe", 3.1, 3.4, 0.7), Word("Welt", 3.5, 3.9, 0.6))),
)
AUDIO = b"RIFF what it pretends to hear"
PAGE = "<!doctype html><style>b{}</style><p>Hello</p><script>1;</script>"


class Engine:
    """Hears SEGMENTS in any file, except in one that begins with `bad`, `long` or `fault`; waits while it is `held`."""

    langs = ("de", "ja")
    has_words = True
    can_detect = True
    is_well = True
    waiting = 7

    def __init__(self, job=None, *, checks_given=False, on_batch=None) -> None:
        self.is_held = threading.Event()
        self.asked: list[tuple] = []
        self.num_open = 0
        self.is_closed = False
        self.checks_given, self.on_batch = checks_given, on_batch

    async def transcribe(
        self, path: Path, *, name: str, lang: str | None, max_audio_s: float
    ) -> AsyncIterator[str | Segment | Transcript]:
        self.num_open += 1
        self.asked.append((name, lang, path.stat().st_size, path))
        try:
            with open(path, "rb") as stream:
                head = stream.read(5)
            if head.startswith(b"bad"):
                raise UserError(f"{name}: not audio; send another file")
            if head.startswith(b"long"):
                raise TooLong(f"{name}: longer than {max_audio_s:g} s; cut it")
            if head == b"fault":
                raise RuntimeError("a secret")
            yield lang or "de"
            for segment in SEGMENTS:
                yield segment
                while self.is_held.is_set():
                    await asyncio.sleep(0.01)
                if head == b"later":
                    raise RuntimeError("a secret")
            if self.on_batch:
                self.on_batch(3, 2, 4.0, 0.5)
            yield Transcript(name, 4.0, 1, lang or "de", 0.93, "de", (), SEGMENTS)
        finally:
            self.num_open -= 1

    def close(self) -> None:
        self.is_closed = True


class Service:
    """What listens at `url` until the block ends."""

    def __init__(self, folder: Path, *, token: str | None = None, **settings) -> None:
        self.folder, self.metrics = folder, Metrics()
        self.engine = Engine(on_batch=self.metrics.on_batch)
        self.settings = ServingSettings(**{"drain_s": 5, **settings})
        (folder.parent / "page.html").write_text(PAGE)
        self.app = app.create(
            app.Service(self.engine, self.settings, "mini", 17, folder, self.metrics, folder.parent / "page.html"),
            token=token,
        )
        self.bound = server.bind("127.0.0.1", 0)
        self.url = server.url(self.bound)
        self.server = server.server(self.app, self.settings, greeting="serving")
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.bound]}, daemon=True)

    def __enter__(self) -> "Service":
        self.thread.start()
        wait_until(lambda: self.server.started)
        return self

    def __exit__(self, *_) -> None:
        self.engine.is_held.clear()
        self.server.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive()
        assert not list(self.folder.iterdir())

    def post(self, audio: bytes = AUDIO, *, headers: dict | None = None, name: str = "talk.wav", **fields):
        """The answer to a transcription request."""
        return requests.post(
            f"{self.url}/v1/audio/transcriptions",
            files={"file": (name, audio)},
            data={key.replace("__", "[]"): value for key, value in fields.items()},
            headers=headers,
            timeout=20,
        )

    def get(self, path: str, **headers):
        return requests.get(self.url + path, headers=headers, timeout=20)

    def health(self) -> dict:
        return self.get("/healthz").json()

    def openai(self, **options) -> openai.OpenAI:
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0} | options)


def wait_until(condition, timeout_s: float = 10) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


@contextlib.contextmanager
def held(service: Service, num: int, **fields) -> Iterator[list]:
    """While `num` requests are in the engine, which does not end them; then what they were answered."""
    service.engine.is_held.set()
    answers: list = []
    threads = [threading.Thread(target=lambda: answers.append(service.post(**fields))) for _ in range(num)]
    for thread in threads:
        thread.start()
    wait_until(lambda: service.engine.num_open == num)
    yield answers
    service.engine.is_held.clear()
    for thread in threads:
        thread.join()


def main(held_s: str, *argv: str) -> int:
    """`zipperasr serve` with this engine, which ends nothing for so long after its first request."""
    from zipperasr.cli import main as cli
    from zipperasr.cli import recipe

    class Slow(Engine):
        def transcribe(self, path: Path, **options):
            if not self.asked:
                self.is_held.set()
                threading.Timer(float(held_s), self.is_held.clear).start()
            return super().transcribe(path, **options)

    sys.modules["zipperasr.decoding.engine"] = types.SimpleNamespace(Engine=Slow)
    recipe.load_run = lambda *_, **__: types.SimpleNamespace(serving=ServingSettings(drain_s=5))
    recipe.transcription_job = lambda *_, **__: None
    return cli.main(["serve", *argv])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""The service: OpenAI's API for transcriptions on an engine, and a page.

All that a request takes (a slot, a temporary file, its segments in the engine) is given back when its answer has been
sent, when it fails, and when its client leaves.
"""

import asyncio
import base64
import hashlib
import logging
import re
import tempfile
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from zipperasr import languages
from zipperasr.decoding.transcript import Segment, Transcript
from zipperasr.errors import TooLong, UserError
from zipperasr.serving import ServingSettings, answers, fields, upload
from zipperasr.serving.gate import TRANSCRIPTIONS, Gate
from zipperasr.serving.metrics import Metrics
from zipperasr.serving.refusal import Refusal
from zipperasr.serving.slots import Slots

if TYPE_CHECKING:
    from zipperasr.decoding.engine import Engine

PAGE = Path(__file__).with_name("page.html")
T = TypeVar("T")
log = logging.getLogger("uvicorn.error")


async def _until_sent() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


UntilSent = Annotated[AsyncExitStack, Depends(_until_sent)]
"""What is entered into it is left when the answer has been sent, or there is none."""


@dataclass
class Service:
    """What the routes do. `folder` is where uploads go, `created` when the model was made (seconds since 1970)."""

    engine: "Engine"
    settings: ServingSettings
    name: str
    created: int
    folder: Path
    metrics: Metrics
    page: Path = PAGE
    slots: Slots = field(init=False)

    def __post_init__(self) -> None:
        self.slots = Slots(self.settings.max_requests)
        self.metrics.watch(in_flight=lambda: self.slots.num_taken, waiting=lambda: self.engine.waiting)

    async def transcribe(self, request: Request, until_sent: UntilSent) -> Response:
        """POST /v1/audio/transcriptions."""
        upload.check_size(int(request.headers.get("content-length", 0)), self.settings)
        until_sent.enter_context(self.slots.take())
        self.folder.mkdir(mode=0o700, exist_ok=True)  # what tidies /tmp removes it when it has been idle for days
        file = until_sent.enter_context(tempfile.NamedTemporaryFile(dir=self.folder))  # noqa: SIM115
        with self.metrics.uploads.track_inprogress():
            form = await upload.read(request, file, self.settings)
        engine = self.engine
        traits = {"langs": engine.langs, "can_detect": engine.can_detect, "has_words": engine.has_words}
        wanted = fields.parse(form.fields, model=self.name, **traits)
        request.state.format = wanted.format
        if form.filename is None:
            raise Refusal(400, "file: there is none; send the audio as the form's part 'file'", param="file")
        items = self._items(Path(file.name), form.filename, wanted)
        await until_sent.enter_async_context(aclosing(items))
        if not wanted.is_stream:
            answer = answers.response(await _unless_gone(request, _last(items)), wanted)
            await until_sent.aclose()  # who has the answer finds the slot free
            return answer
        first = await _unless_gone(request, anext(items))  # what fails at once has a status of its own
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        events = _events(answers.events(_chain(first, items), wanted), until_sent)
        return StreamingResponse(events, headers=headers, media_type="text/event-stream")

    async def _items(self, path: Path, name: str, wanted: fields.Wanted) -> AsyncIterator[str | Segment | Transcript]:
        """What the engine finds. Raises Refusal for bad audio (400), too much of it (413), or too late (504)."""
        deadline = asyncio.get_running_loop().time() + self.settings.answer_s
        found = self.engine.transcribe(path, name=name, lang=wanted.lang, max_audio_s=self.settings.max_audio_s)
        async with aclosing(found):
            try:
                while True:
                    async with asyncio.timeout_at(deadline):
                        item = await anext(found)
                    yield item
                    if isinstance(item, Transcript):
                        self.metrics.audio_seconds.inc(item.duration_s)
                        return
            except UserError as error:
                raise Refusal(413 if isinstance(error, TooLong) else 400, str(error), param="file") from error
            except TimeoutError as error:
                mend = "send less audio, or come again when less is going on"
                raise Refusal(
                    504, f"no transcript after {self.settings.answer_s:g} s; {mend}", code="timeout"
                ) from error

    async def models(self) -> dict[str, Any]:
        """GET /v1/models."""
        return {"object": "list", "data": [self._model()]}

    async def model(self, name: str) -> dict[str, Any]:
        """GET /v1/models/{name}."""
        if name != self.name:
            raise Refusal(
                404, f"model: there is no {name!a}; this is '{self.name}'", param="model", code="model_not_found"
            )
        return self._model()

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "zipperasr",
            "languages": [{"code": lang, "name": languages.get(lang).name} for lang in self.engine.langs],
            "word_times": self.engine.has_words,
            "detects_language": self.engine.can_detect,
            "max_upload_mb": self.settings.max_upload_mb,
            "max_audio_s": self.settings.max_audio_s,
        }

    async def health(self) -> dict[str, Any]:
        """GET /healthz. Raises Refusal (503) where the model fails whatever it is given."""
        if not self.engine.is_well:
            raise Refusal(503, "nothing can be decoded any more, and the log says why; start the service anew")
        counts = {"in_flight": self.slots.num_taken, "waiting_segments": self.engine.waiting}
        return {"status": "ok", "model": self.name, **counts}

    async def prometheus(self) -> Response:
        """GET /metrics."""
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def index(self) -> Response:
        """GET /: a page that may talk to this service and to nothing else, with no script or style but its own."""
        html = self.page.read_text(encoding="utf-8")
        script, style = (_hashes(html, tag) for tag in ("script", "style"))
        policy = (
            f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; media-src blob:; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        return HTMLResponse(html, headers=headers)


def create(service: Service, *, token: str | None = None, is_local: bool = True) -> FastAPI:
    """The application; `token` and `is_local` as in Gate."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.add_api_route(TRANSCRIPTIONS, service.transcribe, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", service.models)
    app.add_api_route("/v1/models/{name:path}", service.model)
    app.add_api_route("/healthz", service.health, methods=["GET", "HEAD"])  # load balancers ask by HEAD
    app.add_api_route("/metrics", service.prometheus, response_model=None)
    app.add_api_route("/", service.index, response_model=None)
    app.add_exception_handler(Refusal, _answer)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_failure)
    limits = {"idle_s": service.settings.idle_s, "metrics": service.metrics}
    app.add_middleware(Gate, token=token, is_local=is_local, **limits)
    return app


async def _answer(request: Request, refusal: Refusal) -> Response:
    return refusal.response()


async def _answer_failure(request: Request, error: Exception) -> Response:
    return _ours().response()  # uvicorn logs the error


async def _answer_http(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}; see GET /v1/models and POST {TRANSCRIPTIONS}"
    return Refusal(error.status_code, message, headers=error.headers).response()


def _ours() -> Refusal:
    return Refusal(500, "the service failed, which is its own fault; its log says why", code="internal_error")


async def _events(found: AsyncIterator[dict[str, Any]], until_sent: AsyncExitStack) -> AsyncIterator[str]:
    """As server-sent events; a failure is one too, as the status is sent already. At the end all is given back."""
    try:
        async for value in found:
            yield answers.event(value)
    except Refusal as refusal:
        yield answers.event({"type": "error", **refusal.body()})
    except Exception:
        log.exception("a stream failed")
        yield answers.event({"type": "error", **_ours().body()})
    await until_sent.aclose()


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves. Raises ClientDisconnect then."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _last(items: AsyncIterator[T]) -> T:
    return [item async for item in items][-1]


async def _chain(first: T, rest: AsyncIterator[T]) -> AsyncIterator[T]:
    yield first
    async for item in rest:
        yield item


def _hashes(html: str, tag: str) -> str:
    """What a Content-Security-Policy calls the page's inline elements of a kind."""
    found = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", html, flags=re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found)
    return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"

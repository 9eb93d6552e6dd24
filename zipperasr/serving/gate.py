"""Who may ask: whoever has the token, and no page of another site."""

import asyncio
import hmac
import ipaddress
import time
from urllib.parse import urlsplit

from fastapi import Request
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zipperasr.serving.metrics import Metrics
from zipperasr.serving.refusal import Refusal

TRANSCRIPTIONS = "/v1/audio/transcriptions"
OPEN = ("/", "/healthz")
CLIENT_LEFT = 499


class Gate:
    """Middleware that refuses at the headers, counts what becomes of transcription requests, and drops slow readers.

    `token` is asked for everywhere but at OPEN, if there is one. Where there is none, pages of other sites are refused;
    and if only this machine is served (`is_local`), so is every name by which a browser may know the service but
    `localhost` and loopback addresses, as another site's name may lead here (DNS rebinding). With a token, which such a
    page does not know, the service may stand behind a proxy under any name.
    An answer of which nothing can be sent for `idle_s` is given up.
    """

    def __init__(self, app: ASGIApp, *, token: str | None, is_local: bool, idle_s: float, metrics: Metrics) -> None:
        self.app, self.token, self.is_local, self.idle_s, self.metrics = app, token, is_local, idle_s, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, start = 0, time.monotonic()

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            try:
                async with asyncio.timeout(self.idle_s):
                    await send(message)
            except TimeoutError as error:
                raise ClientDisconnect from error

        try:
            self._check(Headers(scope=scope), scope["path"])
            await self.app(scope, receive, watched)
        except Refusal as refusal:
            await refusal.response()(scope, receive, watched)
        except ClientDisconnect:
            status = CLIENT_LEFT
        except asyncio.CancelledError:  # the service ends, and this has not been done in time
            if not status:
                await Refusal(503, "the service has been ended; come again when it runs").response()(
                    scope, receive, watched
                )
        finally:
            if scope["path"] == TRANSCRIPTIONS:
                format_ = getattr(Request(scope).state, "format", "unknown")
                self.metrics.requests.labels(status or 500, format_).inc()
                self.metrics.rejected.inc(status == 429)
                self.metrics.request_seconds.observe(time.monotonic() - start)

    def _check(self, headers: Headers, path: str) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.token:
            self._check_token(headers, path)
        elif self.is_local and not _is_loopback(host):
            raise Refusal(403, f"Host is {host!a}, and only this machine is served; call it localhost")
        elif origin is not None and origin.partition("://")[2] != host:
            raise Refusal(403, f"Origin is {origin!a}: pages of other sites are not served; call from a program")

    def _check_token(self, headers: Headers, path: str) -> None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if path not in OPEN:
            is_same = hmac.compare_digest(given.strip().encode("latin-1"), self.token.encode())
            if scheme.lower() != "bearer" or not is_same:
                what = "the token is not the service's" if given else "there is no token"
                mend = "send Authorization: Bearer <token>"
                raise Refusal(401, f"{what}; {mend}", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _is_loopback(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False

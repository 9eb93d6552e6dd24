"""A web server for tests: files with ranges, and the ways in which servers and connections fail."""

import http.server
import threading
import time
from dataclasses import dataclass, field
from typing import NamedTuple


class Served(NamedTuple):
    """One request, and the bytes of the file that went out for it."""

    method: str
    path: str
    range: str | None
    num_bytes: int


@dataclass
class Server:
    """Serves `files` ({path: bytes}) on 127.0.0.1 until `close`.

    cuts: after how many bytes of a body the connection breaks, a number for each of the next answers. statuses: errors
    for the next requests. honours: whether Range, If-Range are understood. etag: whether files have one.
    together: what a GET waits for before it is answered. pause_s: after each 64 kB.
    """

    files: dict[str, bytes]
    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    honours: tuple[str, ...] = ("Range", "If-Range")
    etag: bool = True
    together: threading.Barrier | None = None
    pause_s: float = 0.0
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    served: list[Served] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("H", (_Handler,), {"web": self}))
        self.url = f"http://127.0.0.1:{self.httpd.server_port}"
        threading.Thread(target=self.httpd.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.httpd.shutdown()
        self.httpd.server_close()

    def num_bytes(self, path: str = "") -> int:
        """Bytes of bodies that went out, of all files or of one."""
        return sum(served.num_bytes for served in self.served if path in served.path)

    def gets(self) -> list[Served]:
        return [served for served in self.served if served.method == "GET"]


class _Handler(http.server.BaseHTTPRequestHandler):
    web: Server

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        if self.web.together:
            self.web.together.wait(timeout=10)
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        web, path = self.web, self.path.partition("?")[0]
        if web.statuses or path not in web.files:
            self.send_error(web.statuses.pop(0) if web.statuses else 404)
            web.served.append(Served(self.command, path, None, 0))
            return
        content, etag = web.files[path], f'"{hash(web.files[path])}"'
        start = self.start(etag)
        if start and start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if web.etag:
            self.send_header("ETag", etag)
        for name, value in web.headers.get(path, {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.send_body(content[start:] if with_body else b"", path)

    def start(self, etag: str) -> int:
        wanted, version = self.headers.get("Range"), self.headers.get("If-Range")
        if not wanted or "Range" not in self.web.honours:
            return 0
        if version and "If-Range" in self.web.honours and version != etag:
            return 0
        return int(wanted.removeprefix("bytes=").partition("-")[0])

    def send_body(self, body: bytes, path: str) -> None:
        if self.command == "GET" and self.web.cuts:
            body = body[: self.web.cuts.pop(0)]
        sent = 0
        try:
            for at in range(0, len(body), 1 << 16):
                self.wfile.write(body[at : at + (1 << 16)])
                sent = min(len(body), at + (1 << 16))
                time.sleep(self.web.pause_s)
        except OSError:  # the client has gone
            pass
        self.web.served.append(Served(self.command, path, self.headers.get("Range"), sent))

"""Forms with a file (multipart/form-data), read within limits of size and time; the file goes to disk as it comes.

Nothing of what the client says names a file here.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import IO

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from zipperasr import files
from zipperasr.serving import ServingSettings
from zipperasr.serving.refusal import Refusal

FILE = "file"
MAX_PARTS = 64
MAX_FIELD_BYTES = 64 * 1024
MAX_NAME = 200  # characters of a file's name


class Form:
    """`fields` as (name, text), in order; the file's bytes are in `stream`, and what the client calls it in `filename`.

    That is None where there is no file, and good for messages only.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.filename, self.is_whole = stream, None, False
        self.fields: list[tuple[str, str]] = []
        self._num_parts, self._name, self._value = 0, "", bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._header, self._header_value = b"", b""

    def on_part_begin(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise Refusal(400, f"the form has more than {MAX_PARTS} parts; send only what the API knows")
        self._headers, self._value = {}, bytearray()

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def on_header_end(self) -> None:
        self._headers[self._header.lower()] = self._header_value
        self._header, self._header_value = b"", b""

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode(errors="replace")
        if self._name == FILE:
            if self.filename is not None:
                raise Refusal(400, "the form has more than one file; send a request for each", param=FILE)
            self.filename = _harmless(options.get(b"filename", b"").decode(errors="replace"))

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == FILE:
            self.stream.write(data[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > MAX_FIELD_BYTES:
            raise Refusal(400, f"{self._name[:40]!a}: more than {MAX_FIELD_BYTES} bytes; shorten it")

    def on_part_end(self) -> None:
        if self._name != FILE:
            self.fields.append((self._name, self._value.decode(errors="replace")))

    def on_end(self) -> None:
        self.is_whole = True


async def read(request: Request, stream: IO[bytes], settings: ServingSettings) -> Form:
    """The form of a request, with its file written to `stream`.

    Raises Refusal for what is too large (413), too slow (408), no form or a broken one (400), and ClientDisconnect.
    """
    form = Form(stream)
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise Refusal(400, f"Content-Type is {kind.decode('latin-1')!a}; send multipart/form-data with its boundary")
    try:
        parser = MultipartParser(
            options[b"boundary"], {name: getattr(form, name) for name in dir(Form) if name[:3] == "on_"}
        )
        size = 0
        async for chunk in _chunks(request, settings):
            size += len(chunk)
            check_size(size, settings)
            parser.write(chunk)
        stream.flush()
    except FormParserError as error:
        raise Refusal(400, f"the form is broken ({error}); send multipart/form-data") from error
    except OSError as error:
        if not files.is_disk_full(error):
            raise
        raise Refusal(507, "the service's disk is full; come again when its owner has freed some space") from error
    if not form.is_whole:
        raise Refusal(400, "the form ends before its last boundary; send all of it")
    return form


def check_size(num_bytes: int, settings: ServingSettings) -> None:
    """Raises Refusal (413) for a larger body than is taken."""
    if num_bytes > settings.max_upload_mb * 1e6:
        limit = f"over the {settings.max_upload_mb:g} MB that are taken"
        raise Refusal(
            413, f"the request has {num_bytes / 1e6:.1f} MB or more, {limit}; compress the audio or cut it", param=FILE
        )


async def _chunks(request: Request, settings: ServingSettings) -> AsyncIterator[bytes]:
    chunks, deadline = request.stream(), time.monotonic() + settings.upload_s
    try:
        while True:
            async with asyncio.timeout(min(settings.idle_s, deadline - time.monotonic())):
                chunk = await anext(chunks)
            if not chunk:  # the end
                return
            yield chunk
    except TimeoutError as error:
        limits = f"nothing came for {settings.idle_s:g} s, or not all in {settings.upload_s:g} s"
        raise Refusal(
            408, f"the request is too slow: {limits}; send it again", headers={"Connection": "close"}
        ) from error


def _harmless(name: str) -> str:
    """The last part of a path, as printable text of one line."""
    last = name.replace("\\", "/").rpartition("/")[2]
    return "".join(c for c in last if c.isprintable())[:MAX_NAME] or "audio"

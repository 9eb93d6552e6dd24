"""The service over real sockets: OpenAI's API, limits, refusals, and what becomes of those who leave."""

import asyncio
import base64
import contextlib
import functools
import hashlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import requests
import service as helper
from service import AUDIO, PAGE, SEGMENTS, Service, held, wait_until

from zipperasr import config
from zipperasr.cli import main as cli
from zipperasr.cli import recipe
from zipperasr.errors import UserError
from zipperasr.serving import ServingSettings, gate, server, slots
from zipperasr.serving.metrics import Metrics
from zipperasr.serving.refusal import Refusal

TEXT = "Guten Tag liebe Welt"
PATH = "/v1/audio/transcriptions"


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Iterator[Service]:
    """One with its default settings."""
    folder = tmp_path_factory.mktemp("service") / "uploads"
    folder.mkdir()
    with Service(folder) as running:
        yield running


@pytest.fixture
def start(tmp_path):
    """Starts further ones, each with settings of its own."""
    with contextlib.ExitStack() as stack:

        def begin(**options) -> Service:
            folder = tmp_path / f"{len(list(tmp_path.iterdir()))}" / "uploads"
            folder.mkdir(parents=True)
            return stack.enter_context(Service(folder, **options))

        yield begin


def address(service: Service) -> tuple[str, int]:
    host, port = service.url.removeprefix("http://").split(":")
    return host, int(port)


def head(service: Service, *lines: str, path: str = PATH) -> bytes:
    """The headers of a request with a form."""
    host = "{}:{}".format(*address(service))
    kind = "Content-Type: multipart/form-data; boundary=b"
    return "\r\n".join([f"POST {path} HTTP/1.1", f"Host: {host}", kind, *lines, "", ""]).encode()


def part(name: bytes, value: bytes, *, filename: bytes | None = None) -> bytes:
    is_file = b'; filename="' + filename + b'"' if filename is not None else b""
    return b'--b\r\nContent-Disposition: form-data; name="' + name + b'"' + is_file + b"\r\n\r\n" + value + b"\r\n"


FILE = part(b"file", AUDIO, filename=b"talk.wav")
END = b"--b--\r\n"


def send_form(service: Service, body: bytes) -> requests.Response:
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    return requests.post(service.url + PATH, data=body, headers=headers, timeout=10)


def read_all(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(1 << 16), b""))


def raw(service: Service, *pieces: bytes, pause_s: float = 0.0) -> bytes:
    """What comes back until the service closes the connection."""
    with socket.create_connection(address(service), timeout=10) as sock:
        for i, piece in enumerate(pieces):
            if i:
                time.sleep(pause_s)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(piece)
        return read_all(sock)


def error_of(answer: requests.Response) -> dict:
    """The error, which has OpenAI's shape."""
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"]
    return error


# OpenAI's client


def test_openais_client_gets_text_and_usage(service):
    found = service.openai().audio.transcriptions.create(model="mini", file=("talk.wav", AUDIO))
    assert found.text == TEXT and found.usage.type == "duration" and found.usage.seconds == 4.0


@pytest.mark.parametrize(
    ("format_", "begins"),
    [("text", TEXT + "\n"), ("srt", "1\n00:00:00,100 --> "), ("vtt", "WEBVTT\n\n00:00:00.100 --> ")],
)
def test_openais_client_gets_plain_text_and_subtitles(service, format_, begins):
    found = service.openai().audio.transcriptions.create(model="mini", file=("a", AUDIO), response_format=format_)
    assert isinstance(found, str) and found.startswith(begins)


def test_openais_client_gets_words_and_segments(service):
    found = service.openai().audio.transcriptions.create(
        model="mini",
        file=("talk.wav", AUDIO),
        response_format="verbose_json",
        timestamp_granularities=["word", "segment"],
    )
    assert (found.language, found.duration, found.text) == ("de", 4.0, TEXT)
    words = [word for segment in SEGMENTS for word in segment.words]
    assert [(w.word, w.start, w.end, w.confidence) for w in found.words] == [
        (w.text, w.start_s, w.end_s, w.confidence) for w in words
    ]
    assert [(s.start, s.end, s.text) for s in found.segments] == [(s.start_s, s.end_s, s.text) for s in SEGMENTS]
    assert [s.no_speech_prob for s in found.segments] == [0.0, 1.0, 0.0]
    assert found.segments[2].flags == ["loop"] and found.segments[0].avg_logprob == -0.25
    assert found.language_probability == 0.93 and found.detected_language == "de"


def test_openais_client_iterates_a_stream(service):
    events = list(service.openai().audio.transcriptions.create(model="mini", file=("a", AUDIO), stream=True))
    assert "".join(e.delta for e in events if e.type == "transcript.text.delta") == TEXT == events[-1].text
    assert [e.start for e in events if e.type == "transcript.text.segment"] == [s.start_s for s in SEGMENTS]
    assert events[-1].type == "transcript.text.done" and events[-1].usage.seconds == 4.0
    assert events[-1].srt.startswith("1\n") and events[-1].vtt.startswith("WEBVTT")


def test_openais_client_lists_and_retrieves_the_model(service):
    client = service.openai()
    model = client.models.retrieve("mini")
    assert [m.id for m in client.models.list()] == ["mini"] and model.created == 17
    assert model.languages == [{"code": "de", "name": "German"}, {"code": "ja", "name": "Japanese"}]
    assert model.word_times and model.detects_language and model.max_upload_mb == 200 and model.max_audio_s == 14400
    with pytest.raises(openai.NotFoundError, match="'other'"):
        client.models.retrieve("other")


def test_openais_client_is_told_what_fails_in_the_middle_of_a_stream(service):
    stream = service.openai().audio.transcriptions.create(model="mini", file=("a", b"later"), stream=True)
    assert next(stream).delta == "Guten Tag"
    with pytest.raises(openai.APIError, match="the service failed"):
        list(stream)


def test_openais_client_comes_again_after_429(start):
    service = start(max_requests=1)
    with held(service, 1):
        threading.Timer(0.3, service.engine.is_held.clear).start()
        client = service.openai(max_retries=2)
        assert client.audio.transcriptions.create(model="mini", file=("a", AUDIO)).text == TEXT


# What is asked


def test_the_deltas_of_a_language_without_spaces_join_to_the_text(service):
    events = [json.loads(line[6:]) for line in service.post(language="ja", stream="true").text.split("\n\n") if line]
    deltas = [event["delta"] for event in events if event["type"] == "transcript.text.delta"]
    assert deltas == ["Guten Tag", "liebe Welt"] and events[-1]["text"] == "Guten Tagliebe Welt"
    assert {e["language"] for e in events if e["type"] == "transcript.text.segment"} == {"ja"}


def test_a_stream_of_verbose_json_ends_with_what_would_have_come_at_once(service):
    last = service.post(stream="true", response_format="verbose_json").text.split("\n\n")[-2]
    assert json.loads(last[6:])["transcription"] == service.post(response_format="verbose_json").json()


@pytest.mark.parametrize(
    ("asked", "lang"), [("de", "de"), ("German", "de"), ("JAPANESE", "ja"), ("auto", None), ("", None), ("th", "th")]
)
def test_languages_are_codes_or_names(service, asked, lang):
    assert service.post(language=asked).status_code == 200
    assert service.engine.asked[-1][1] == lang


def test_a_language_that_the_run_has_not_learned_is_obeyed_with_a_warning(service):
    (warning,) = service.post(language="th").json()["warnings"]
    assert "'th'" in warning and "de, ja" in warning


@pytest.mark.parametrize(
    ("fields", "status", "param", "says"),
    [
        ({"model": "whisper-1"}, 404, "model", "'whisper-1'.*'mini'"),
        ({"language": "xx"}, 400, "language", "'xx'.*de \\(German\\).*zh"),
        ({"language": ["de", "ja"]}, 400, "language", "2 times"),
        ({"response_format": "xml"}, 400, "response_format", "'xml'.*json, text, srt, vtt, verbose_json"),
        ({"stream": "perhaps"}, 400, "stream", "'perhaps'.*true"),
        ({"timestamp_granularities__": "line"}, 400, "timestamp_granularities[]", "'line'.*word, segment"),
        ({"timestamp_granularities__": "word"}, 400, "timestamp_granularities[]", "verbose_json"),
    ],
)
def test_what_is_not_known_is_refused_by_name(service, fields, status, param, says):
    answer = service.post(**fields)
    error = error_of(answer)
    assert answer.status_code == status and error["param"] == param
    assert re.search(says, error["message"]) and error["type"] == "invalid_request_error"


def test_words_and_detection_are_refused_where_the_run_has_none(service, monkeypatch):
    monkeypatch.setattr(service.engine, "has_words", False)
    monkeypatch.setattr(service.engine, "can_detect", False)
    words = {"timestamp_granularities__": "word", "response_format": "verbose_json", "language": "de"}
    assert "train-aligner" in error_of(service.post(**words))["message"]
    assert "name one of de, ja" in error_of(service.post())["message"]
    assert service.post(language="de").status_code == 200


@pytest.mark.parametrize(
    "fields", [{"temperature": "0"}, {"temperature": "0.0"}, {"prompt": ""}, {"model": "mini"}, {}]
)
def test_defaults_are_silent(service, fields):
    answer = service.post(**fields).json()
    assert answer["text"] == TEXT and "warnings" not in answer


@pytest.mark.parametrize("field", ["prompt", "temperature", "chunking_strategy", "include__", "unheard_of"])
def test_what_is_ignored_is_said(service, field):
    value = {field: "0.7"}
    (warning,) = service.post(**value).json()["warnings"]
    assert field.removesuffix("__") in warning and "ignored" in warning
    assert service.post(response_format="srt", **value).headers["X-Warnings"] == warning


def test_warnings_in_a_header_are_ascii_of_one_line(service):
    body = part("日本\t".encode(), b"x") + part(b"response_format", b"text") + FILE + END
    assert send_form(service, body).headers["X-Warnings"].isascii()


# Bad input


@pytest.mark.parametrize(("audio", "status", "says"), [(b"bad", 400, "not audio"), (b"long", 413, "cut it")])
@pytest.mark.parametrize("stream", ["false", "true"])
def test_audio_that_cannot_be_taken_is_named_as_the_client_names_it(service, audio, status, says, stream):
    answer = service.post(audio, stream=stream)
    assert answer.status_code == status and error_of(answer)["param"] == "file"
    assert error_of(answer)["message"].startswith("talk.wav: ") and says in error_of(answer)["message"]


def test_a_fault_of_the_service_says_nothing_of_itself(service):
    answer = service.post(b"fault")
    assert answer.status_code == 500 and error_of(answer)["type"] == "server_error"
    assert "secret" not in answer.text and "Traceback" not in answer.text
    assert "secret" not in service.post(b"later", stream="true").text
    assert service.post().json()["text"] == TEXT


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "last boundary"),
        (b"nothing of a form", "broken"),
        (FILE, "last boundary"),
        (FILE[:-10], "last boundary"),
        (part(b"language", b"de") + END, "file: there is none"),
        (FILE + FILE + END, "more than one file"),
        (FILE + part(b"n", b"") * 64 + END, "64 parts"),
        (part(b"prompt", b"x" * 70_000) + FILE + END, "'prompt': more than 65536 bytes"),
        (b"--b\r\nno colon\r\n\r\n" + END, "broken"),
        (b"--b\r\n" + b"X-Long: " + b"x" * 100_000 + b"\r\n\r\n" + END, "broken"),
    ],
)
def test_broken_and_swollen_forms_are_refused(service, body, says):
    answer = send_form(service, body)
    assert answer.status_code == 400 and says in error_of(answer)["message"]


@pytest.mark.parametrize(
    "kind", ["application/json", "multipart/form-data", "multipart/form-data; boundary=" + "b" * 300, "t\xe9xt/plain"]
)
def test_what_is_no_form_is_refused(service, kind):
    answer = requests.post(service.url + PATH, data=b"{}", headers={"Content-Type": kind}, timeout=10)
    assert answer.status_code == 400 and "multipart/form-data" in error_of(answer)["message"]


@pytest.mark.parametrize(
    ("filename", "name"),
    [
        (b"../../etc/passwd", "passwd"),
        (b"C:\\\\Windows\\\\talk.wav", "talk.wav"),
        (b"a%0Ab\x1b[31m.wav", "a%0Ab[31m.wav"),
        (b"\xff\xfe.wav", "��.wav"),
        (b"", "audio"),
        (b"..", ".."),
        (None, "audio"),
        (b"x" * 2000, "x" * 200),
    ],
)
def test_the_name_of_a_file_is_harmless(service, filename, name):
    assert send_form(service, part(b"file", AUDIO, filename=filename) + END).json()["text"] == TEXT
    said, _, num_bytes, path = service.engine.asked[-1]
    assert said == name and num_bytes == len(AUDIO)
    assert path.parent == service.folder and not path.exists()


def test_fields_that_are_not_utf8_are_harmless(service):
    assert send_form(service, part(b"\xff", b"\xff") + FILE + END).status_code == 200
    assert send_form(service, part(b"language", b"\xff") + FILE + END).status_code == 400


@pytest.mark.parametrize("path", ["/nothing", "/v1/audio", "/v1/models/../x", "/docs", "/openapi.json"])
def test_other_paths_are_not_found(service, path):
    answer = service.get(path)
    assert answer.status_code == 404 and error_of(answer)


def test_other_methods_are_not_allowed(service):
    assert service.get(PATH).status_code == 405 and error_of(service.get(PATH))


# Limits


def test_too_many_requests_are_refused_before_their_body_is_read(start):
    service = start(max_requests=2)
    with held(service, 2) as answers:
        answer = raw(service, head(service, "Content-Length: 1000000", "Connection: close"))
        assert answer.startswith(b"HTTP/1.1 429 ")
        seconds = int(re.search(rb"retry-after: (\d+)", answer)[1])
        assert seconds >= 1 and b'"type":"rate_limit_error"' in answer
        assert f"come again in {seconds} s".encode() in answer
        assert service.get("/healthz").json()["in_flight"] == 2
    assert [answer.json()["text"] for answer in answers] == [TEXT] * 2
    assert service.post().json()["text"] == TEXT


def test_retry_after_follows_the_pace_at_which_requests_end(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(slots.time, "monotonic", lambda: now)
    taken = slots.Slots(8)
    for _ in range(40):  # one after another, each 3 s long, with pauses in which there is nothing to do
        with taken.take():
            now += 3.0
        now += 500.0
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(taken.take())
        now += 3.0
        assert taken.retry_after_s() == 12  # half of 8 at 3 s each
        with pytest.raises(Refusal, match="come again in 12 s") as refused, taken.take():
            pass
        assert refused.value.headers == {"Retry-After": "12"}
        now += 330.0  # nothing ends any more
        assert taken.retry_after_s() > 40
    assert taken.num_taken == 0


def test_a_declared_size_over_the_limit_is_refused_before_the_body(start):
    service = start(max_upload_mb=0.1)
    answer = raw(service, head(service, "Content-Length: 100001", "Connection: close"))
    assert answer.startswith(b"HTTP/1.1 413 ") and b"0.1 MB" in answer
    assert send_form(service, FILE + END).status_code == 200


def test_a_body_that_grows_over_the_limit_is_refused_then(start):
    service = start(max_upload_mb=0.1, idle_s=0.5)
    first, further = (b"%x\r\n%b\r\n" % (len(text), text) for text in (FILE, b"x" * 60_000))
    with socket.create_connection(address(service), timeout=10) as sock:
        sock.sendall(head(service, "Transfer-Encoding: chunked") + first + further)
        wait_until(lambda: service.health()["in_flight"] == 1)
        sock.sendall(further)
        assert sock.recv(4096).startswith(b"HTTP/1.1 413 ")
        assert service.health()["in_flight"] == 0 and not list(service.folder.iterdir())
        started = time.monotonic()
        assert drip(sock, b"x") and time.monotonic() - started < 2  # the rest is read for a while, and dropped


def drip(sock: socket.socket, byte: bytes, every_s: float = 0.05, for_s: float = 8.0) -> bool:
    """Send a byte now and then; whether the other side has closed in the end."""
    sock.settimeout(every_s)
    for _ in range(int(for_s / every_s)):
        try:
            sock.sendall(byte)
            while sock.recv(1 << 16):
                pass
            return True
        except TimeoutError:
            pass
        except (BrokenPipeError, ConnectionResetError):
            return True
    return False


@pytest.mark.parametrize("beginning", ["", "POST / HT", "POST / HTTP/1.1\r\nHost: localhost\r\nX"])
def test_slow_headers_are_given_up(start, beginning):
    service = start(idle_s=0.4)
    started = time.monotonic()
    with socket.create_connection(address(service), timeout=10) as sock:
        sock.sendall(beginning.encode())
        assert drip(sock, b"") if not beginning else drip(sock, b"a")
    assert 0.3 < time.monotonic() - started < 3


def test_slow_headers_are_told_why(start):
    service = start(idle_s=0.3)
    answer = raw(service, b"GET / HTTP/1.1\r\n")
    body = answer.partition(b"\r\n\r\n")[2]
    assert answer.startswith(b"HTTP/1.1 408 ") and "headers" in json.loads(body)["error"]["message"]


def test_a_body_that_stops_is_given_up(start):
    service = start(idle_s=0.3, max_requests=1)
    answer = raw(service, head(service, "Content-Length: 1000") + FILE)
    assert answer.startswith(b"HTTP/1.1 408 ") and b"nothing came for 0.3 s" in answer
    assert service.post().status_code == 200


def test_a_body_byte_by_byte_is_given_up(start):
    service = start(idle_s=0.4, upload_s=0.8, max_requests=1)
    started = time.monotonic()
    with socket.create_connection(address(service), timeout=10) as sock:
        sock.sendall(head(service, "Content-Length: 1000") + FILE)
        assert drip(sock, b"x")
    assert 0.7 < time.monotonic() - started < 3
    assert service.post().status_code == 200


def test_a_transcript_that_takes_too_long_is_given_up(start):
    service = start(answer_s=0.3)
    service.engine.is_held.set()
    answer = service.post()
    assert answer.status_code == 504 and "0.3 s" in error_of(answer)["message"]
    events = service.post(stream="true").text.split("\n\n")
    assert json.loads(events[-2][6:])["error"]["code"] == "timeout"
    assert service.engine.num_open == 0


def test_an_answer_that_is_not_read_is_given_up():
    async def answer(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def never(message):
        await asyncio.Event().wait()

    metrics = Metrics()
    guarded = gate.Gate(answer, token=None, is_local=True, idle_s=0.1, metrics=metrics)
    scope = {"type": "http", "path": PATH, "headers": [(b"host", b"localhost")]}
    asyncio.run(asyncio.wait_for(guarded(scope, None, never), 5))
    assert b'zipperasr_requests_total{format="unknown",status="499"} 1.0' in metrics.text()


@pytest.mark.parametrize("fields", [{}, {"stream": "true"}])
def test_a_client_that_leaves_is_forgotten(start, fields):
    service = start(max_requests=1)
    service.engine.is_held.set()
    body = b"".join(part(key.encode(), value.encode()) for key, value in fields.items()) + FILE + END
    with socket.create_connection(address(service), timeout=10) as sock:
        sock.sendall(head(service, f"Content-Length: {len(body)}") + body)
        wait_until(lambda: service.engine.num_open == 1)
    wait_until(lambda: service.engine.num_open == 0 and service.health()["in_flight"] == 0)
    assert not list(service.folder.iterdir())
    wait_until(lambda: "requests_total{" in service.get("/metrics").text)
    assert 'status="500"' not in service.get("/metrics").text  # nor is it a fault
    service.engine.is_held.clear()
    assert service.post().status_code == 200


def test_a_client_that_leaves_while_it_uploads_is_forgotten(start):
    service = start(max_requests=1)
    with socket.create_connection(address(service), timeout=10) as sock:
        sock.sendall(head(service, "Content-Length: 100000") + FILE)
        wait_until(lambda: service.health()["in_flight"] == 1 and list(service.folder.iterdir()))
    wait_until(lambda: service.health()["in_flight"] == 0 and not list(service.folder.iterdir()))
    assert service.engine.asked == []


# Who may ask


def test_with_a_token_all_but_the_page_asks_for_it(start):
    service = start(token="sésame")
    for path in ("/v1/models", "/metrics", "/nothing"):
        for given in (None, "Bearer wrong", "Basic sésame".encode(), "Bearer", "Bearer sésame2".encode()):
            answer = service.get(path, **({"Authorization": given} if given else {}))
            assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
            assert error_of(answer)["code"] == "invalid_api_key"
        assert service.get(path, Authorization="Bearer sésame".encode()).status_code in (200, 404)
    assert service.post().status_code == 401 and not service.engine.asked
    assert service.get("/").status_code == service.get("/healthz").status_code == 200


def test_openais_client_sends_the_token(start):
    service = start(token="sesame")
    with pytest.raises(openai.AuthenticationError):
        service.openai().models.list()
    assert service.openai(api_key="sesame").models.list().data[0].id == "mini"


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://", "http://["])
def test_pages_of_other_sites_are_refused(service, origin):
    answer = service.post(headers={"Origin": origin})
    assert answer.status_code == 403 and origin in error_of(answer)["message"]
    assert "Access-Control-Allow-Origin" not in answer.headers


def test_its_own_page_is_served(service):
    answer = service.post(headers={"Origin": service.url})
    assert answer.status_code == 200 and not [
        name for name in answer.headers if name.lower().startswith("access-control")
    ]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *[(name, 403) for name in ("evil.example", "localhost.evil.example", "10.0.0.1:80", "[", "")],
        *[(name, 200) for name in ("localhost", "LOCALHOST:99", "127.0.0.1", "[::1]:8000")],
    ],
)
def test_names_of_other_sites_that_lead_here_are_refused(service, host, status):
    assert service.get("/healthz", Host=host).status_code == status


def test_with_a_token_the_service_may_stand_behind_a_proxy(start):
    service = start(token="sesame")
    proxied = {"Host": "asr.example", "Origin": "https://asr.example"}
    assert service.get("/", **proxied).status_code == 200
    assert service.post(headers={**proxied, "Authorization": "Bearer sesame"}).status_code == 200
    assert service.post(headers=proxied).status_code == 401


def test_the_page_may_run_its_own_script_only(service):
    answer = service.get("/")
    policy = dict(rule.split(" ", 1) for rule in answer.headers["Content-Security-Policy"].split("; "))
    sha256 = {text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in ("b{}", "1;")}
    assert answer.text == PAGE and answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert policy["script-src"] == f"'sha256-{sha256['1;']}'" and policy["style-src"] == f"'sha256-{sha256['b{}']}'"
    assert policy["default-src"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"


def test_a_service_whose_model_is_broken_is_not_healthy(service, monkeypatch):
    assert requests.head(f"{service.url}/healthz", timeout=20).status_code == 200  # as load balancers ask
    monkeypatch.setattr(service.engine, "is_well", False)
    answer = service.get("/healthz")
    assert answer.status_code == 503 and "start the service anew" in error_of(answer)["message"]


def test_metrics_count_what_has_been_done(start):
    service = start(max_requests=1)
    service.post(response_format="srt")
    service.post(b"bad")
    with held(service, 1):
        assert service.post().status_code == 429
        assert "zipperasr_in_flight 1.0" in service.get("/metrics").text
    text = service.get("/metrics").text
    for line in (
        'requests_total{format="srt",status="200"} 1.0',
        'requests_total{format="json",status="400"} 1.0',
        'requests_total{format="unknown",status="429"} 1.0',
        "rejected_total 1.0",
        "uploads 0.0",
        "in_flight 0.0",
        "waiting_segments 7.0",
        "audio_seconds_total 8.0",
        "request_seconds_count 4.0",
        "batch_segments_sum 6.0",
        'batch_languages_bucket{le="2.0"} 2.0',
        "decoded_audio_seconds_total 8.0",
        "decode_seconds_total 1.0",
    ):
        assert f"zipperasr_{line}\n" in text


def test_the_example_of_the_readme_runs(service, tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    (tmp_path / "talk.wav").write_bytes(AUDIO)
    monkeypatch.chdir(tmp_path)
    assert "http://127.0.0.1:8000/" in example and '"zipper_soft_full"' in example
    example = example.replace("http://127.0.0.1:8000", service.url).replace("zipper_soft_full", "mini")
    exec(compile(example, "README.md", "exec"), {})
    words = [(word.start_s, word.text) for segment in SEGMENTS for word in segment.words]
    assert capsys.readouterr().out == f"de {TEXT} {words}\n"


def test_requests_of_one_connection_follow_each_other(service):
    with requests.Session() as session:
        for _ in range(3):
            answer = session.post(service.url + PATH, files={"file": AUDIO}, data={"model": "mini"}, timeout=10)
            assert answer.json()["text"] == TEXT


# The command


@contextlib.contextmanager
def command(tmp_path: Path, *, held_s: float = 0.0) -> Iterator[tuple[subprocess.Popen, str]]:
    """`zipperasr serve` in a process of its own, and its address, when it has said that it serves."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    (tmp_path / "tmp").mkdir()
    argv = [sys.executable, helper.__file__, str(held_s), "--model", str(tmp_path / "run"), "--port", "0"]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            greeting = process.stderr.readline()
            found = re.fullmatch(r"serving run on (http://127\.0\.0\.1:\d+) .*\n", greeting)
            assert found, greeting + process.stderr.read()
            yield process, found[1]
        finally:
            process.kill()


def test_a_signal_ends_what_is_in_flight_first(tmp_path):
    answers = []
    with command(tmp_path, held_s=1.0) as (process, url):
        post = threading.Thread(
            target=lambda: answers.append(requests.post(url + PATH, files={"file": AUDIO}, timeout=10))
        )
        post.start()
        wait_until(lambda: requests.get(f"{url}/healthz", timeout=5).json()["in_flight"] == 1)
        (folder,) = (tmp_path / "tmp").iterdir()
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and len(list(folder.iterdir())) == 1
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: refuses(url))
        assert not answers
        post.join()
        assert answers[0].json()["text"] == TEXT
        assert process.wait(10) == 0
        assert "Traceback" not in process.stderr.read()
    assert not list((tmp_path / "tmp").iterdir())


def test_what_is_not_done_in_time_at_the_end_is_told_so(start):
    service = start(drain_s=0.3)
    service.engine.is_held.set()
    with held(service, 1) as answers:
        service.server.should_exit = True
        service.thread.join(5)
        assert not service.thread.is_alive() and service.engine.num_open == 0
    assert answers[0].status_code == 503 and "come again" in error_of(answers[0])["message"]


def refuses(url: str) -> bool:
    host, port = url.removeprefix("http://").split(":")
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection((host, int(port)), timeout=5):
        return False
    return True


def test_a_folder_that_somebody_has_tidied_away_is_made_anew(start):
    service = start()
    service.folder.rmdir()
    assert service.post().status_code == 200
    assert stat.S_IMODE(service.folder.stat().st_mode) == 0o700


def test_a_large_upload_goes_to_disk_and_not_to_memory(tmp_path):
    def peak_mb() -> int:
        return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) // 1000

    with command(tmp_path) as (process, url):
        assert requests.post(url + PATH, files={"file": AUDIO}, timeout=10).status_code == 200
        before, size = peak_mb(), 100_000_000
        block = b"\r\n--b\r" * 10_000  # what a boundary begins like, over and over
        body = [part(b"file", b"", filename=b"a")[:-2], *[block] * (size // len(block)), b"\r\n" + END]
        headers = {"Content-Type": "multipart/form-data; boundary=boundary"}
        body = [piece.replace(b"--b\r\nC", b"--boundary\r\nC").replace(b"--b--", b"--boundary--") for piece in body]
        answer = requests.post(url + PATH, data=iter(body), headers=headers, timeout=60)
        assert answer.json()["text"] == TEXT
        assert peak_mb() < before + 10
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0


@pytest.fixture
def stubbed(tmp_path, monkeypatch) -> list[helper.Engine]:
    """`zipperasr serve` loads no run, and serves nothing; the engines that it makes."""
    engines: list[helper.Engine] = []

    def make(*args, **options) -> helper.Engine:
        engines.append(helper.Engine(*args, **options))
        return engines[-1]

    monkeypatch.setitem(sys.modules, "zipperasr.decoding.engine", types.SimpleNamespace(Engine=make))
    (tmp_path / "settings.yaml").touch()
    load = functools.partial(config.load, tmp_path / "settings.yaml", ServingSettings, section="serving")
    monkeypatch.setattr(
        recipe, "load_run", lambda *_, overrides, **__: types.SimpleNamespace(serving=load(overrides=overrides))
    )
    monkeypatch.setattr(recipe, "transcription_job", lambda *_, **__: None)
    monkeypatch.setattr(server, "serve", lambda *_, greeting, **__: print(greeting, file=sys.stderr))
    return engines


def test_a_port_in_use_is_said_in_one_line_before_the_model_is_loaded(service, stubbed, capsys):
    _, port = address(service)
    assert cli.main(["serve", "--model", "run", "--port", str(port)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"127.0.0.1:{port}: address already in use; give another --port" in said
    assert not stubbed


def test_of_two_services_that_bound_one_port_at_once_the_later_one_says_so_in_one_line(tmp_path):
    first = server.bind("127.0.0.1", 0)
    port = first.getsockname()[1]
    with first, server.bind("127.0.0.1", port) as later:
        first.listen()
        made = helper.Service(tmp_path / "uploads")
        made.bound.close()
        with pytest.raises(UserError, match=f"^127.0.0.1:{port}: address already in use; give another --port"):
            server.serve(made.app, later, made.settings, greeting="serving")


@pytest.mark.parametrize(
    ("host", "token", "warns"), [("0.0.0.0", None, True), ("0.0.0.0", "x", False), ("::1", None, False)]
)
def test_an_open_service_without_a_token_is_warned_of(tmp_path, stubbed, monkeypatch, capsys, host, token, warns):
    (tmp_path / "config.yaml").touch()
    if token:
        monkeypatch.setenv("ZIPPERASR_API_KEY", token)
    assert cli.main(["serve", "--model", str(tmp_path), "--name", "mine", "--host", host, "--port", "0"]) == 0
    *warning, greeting = capsys.readouterr().err.splitlines()
    assert re.match(r"serving mine on http://(0\.0\.0\.0|\[::1\]):[1-9]\d+ ", greeting)
    assert [f"whoever reaches {host}" in line and "ZIPPERASR_API_KEY" in line for line in warning] == [True] * warns
    assert [engine.is_closed for engine in stubbed] == [True]


@pytest.mark.parametrize(("overrides", "checks"), [([], False), (["serving.check_language=true"], True)])
def test_whether_a_named_language_is_doubted_is_a_setting(tmp_path, stubbed, overrides, checks):
    (tmp_path / "config.yaml").touch()
    assert cli.main(["serve", "--model", str(tmp_path), "--port", "0", *overrides]) == 0
    assert [engine.checks_given for engine in stubbed] == [checks]


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7", "a..b", "a" * 64])
def test_an_address_of_another_machine_is_said_in_one_line(host):
    with pytest.raises(UserError, match=re.escape(host)):
        server.bind(host, 0)


def test_an_empty_token_is_no_open_door(monkeypatch, capsys):
    monkeypatch.setenv("ZIPPERASR_API_KEY", "")
    assert cli.main(["serve", "--model", "run"]) == 1
    assert "ZIPPERASR_API_KEY: it is set, but empty" in capsys.readouterr().err


def test_a_token_may_come_from_a_file_that_ends_with_a_newline(tmp_path, stubbed, monkeypatch):
    (tmp_path / "config.yaml").touch()
    found = []
    monkeypatch.setenv("ZIPPERASR_API_KEY", "sesame\n")
    monkeypatch.setattr(server, "serve", lambda app, *_, **__: found.append(app.user_middleware[0].kwargs["token"]))
    assert cli.main(["serve", "--model", str(tmp_path), "--port", "0"]) == 0
    assert found == ["sesame"]


def test_a_run_that_is_none_is_said_in_one_line(tmp_path, capsys):
    assert cli.main(["serve", "--model", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"zipperasr: error: {tmp_path}: no run")

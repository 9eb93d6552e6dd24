"""Claims about the page of the service, in a real browser against a fabricated service with the same policy."""

import base64
import contextlib
import email
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from contrast import FAINT

import zipperasr

PAGE = (Path(zipperasr.__file__).parent / "serving" / "page.html").read_text(encoding="utf-8")
EVIL = "<img src=x onerror='window.evil=1'><b id=evil>"
MODEL = {
    "id": "mini", "object": "model", "created": 0, "owned_by": "zipperasr",
    "word_times": True, "detects_language": True,
    "languages": [{"code": "de", "name": "German"}, {"code": "ar", "name": "Arabic"}, {"code": "th", "name": "Thai"}],
    "max_upload_mb": 1, "max_audio_s": 3600,
}  # fmt: skip


def policy_of(page):
    """The policy that the service sends: only what is in the page runs."""
    (script,), (style,) = (
        re.findall(r"<script>(.*?)</script>", page, re.S),
        re.findall(r"<style>(.*?)</style>", page, re.S),
    )
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style)]
    return (
        "default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; connect-src 'self'; media-src blob:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'".format(*hashes)
    )


def error(message, code=None):
    return {"error": {"message": message, "type": "error", "param": None, "code": code}}


def segment(number, start, end, text, words=(), *, flags=(), lang="de"):
    """An event; `words` are (word, start, end, confidence)."""
    keys = ("word", "start", "end", "confidence")
    timed = [dict(zip(keys, word)) for word in words]
    return {"type": "transcript.text.segment", "id": number, "start": start, "end": end, "text": text, "language": lang,
            "avg_logprob": -0.1, "flags": list(flags), "words": timed}  # fmt: skip


def done(*, flags=(), language="de", probability=0.98, detected="de", warnings=()):
    """The last event, with subtitles that nothing else here could make."""
    transcription = {"language": language, "language_probability": probability, "detected_language": detected,
                     "duration": 4.0, "flags": list(flags), "warnings": list(warnings)}  # fmt: skip
    return {"type": "transcript.text.done", "text": "", "srt": "1\n00:00 --> ü\r\n\n",
            "vtt": "WEBVTT\n\n\ufeffü &amp;\n", "transcription": transcription}  # fmt: skip


GERMAN = segment(
    0, 0, 2, "Guten Tag, gut.", [("Guten", 0.2, 0.6, 0.93), ("Tag,", 0.6, 1.1, 0.45), ("gut.", 1.5, 2, 0.1)]
)
ARABIC = segment(1, 2, 3, "كتاب جديد", [("كتاب", 2, 2.5, 0.9), ("جديد", 2.5, 3, 0.9)], flags=["loop", "cut"], lang="ar")
THAI = segment(2, 3, 4, "ปีนี้ ดี", [("ปี", 3, 3.2, 0.9), ("นี้", 3.2, 3.5, 0.9), ("ดี", 3.5, 4, 0.9)], lang="th")
SILENCE = segment(3, 4, 5, "", flags=["no_speech"])
ALL = [GERMAN, ARABIC, THAI, SILENCE, done()]


class Service:
    """Answers each upload with the next of `answers`: (status, headers, body), or events with what to wait for."""

    def __init__(self):
        self.answers, self.uploads, self.model, self.token = [], [], MODEL, None
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("H", (_Handler,), {"service": self}))
        self.url = f"http://127.0.0.1:{self.http.server_port}/"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


class _Handler(http.server.BaseHTTPRequestHandler):
    service: Service

    def log_message(self, *args):
        pass

    def answer(self, status, headers, body):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

    def is_allowed(self):
        token = self.service.token
        if token and self.headers["Authorization"] != f"Bearer {token}":
            self.answer(401, {}, error("give the service's token"))
            return False
        return True

    def do_GET(self):
        if self.path == "/":
            headers = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": policy_of(PAGE)}
            self.answer(200, headers, PAGE.encode())
        elif self.path == "/v1/models" and self.is_allowed():
            self.answer(200, {}, {"object": "list", "data": [self.service.model]})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        message = email.message_from_bytes(f"Content-Type: {self.headers['Content-Type']}\n\n".encode() + body)
        form = {
            part.get_param("name", header="Content-Disposition"): part.get_payload(decode=True)
            for part in message.get_payload()
        }
        self.service.uploads.append((self.path, form))
        answer = self.service.answers.pop(0) if self.is_allowed() else ()
        if isinstance(answer, tuple):
            self.answer(*answer) if answer else None
            return
        self.answer(200, {"Content-Type": "text/event-stream"}, b"")
        with contextlib.suppress(OSError):  # the page has gone
            for event in answer:
                if isinstance(event, threading.Event):
                    event.wait(10)
                    continue
                for piece in np.array_split(
                    np.frombuffer(f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode(), np.uint8), 3
                ):
                    self.wfile.write(piece.tobytes())  # cut within letters, as networks do
                    self.wfile.flush()


def tone(seconds, rate=16000):
    """A tone that comes and goes four times a second, so that no noise suppression takes it for noise."""
    time_s = np.arange(int(seconds * rate)) / rate
    stream = io.BytesIO()
    soundfile.write(
        stream, 0.5 * np.sin(2 * np.pi * 440 * time_s) * (np.sin(8 * np.pi * time_s) > 0), rate, format="WAV"
    )
    return stream.getvalue()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    sync_api = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"no browser here: none of {', '.join(names)}")
    heard = tmp_path_factory.mktemp("microphone") / "tone.wav"
    heard.write_bytes(tone(5, rate=48000))
    args = [
        "--no-sandbox", "--autoplay-policy=no-user-gesture-required", "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream", f"--use-file-for-fake-audio-capture={heard}",
        "--host-resolver-rules=MAP elsewhere.test 127.0.0.1",
    ]  # fmt: skip
    with sync_api.sync_playwright() as play:
        yield play.chromium.launch(executable_path=path, args=args)


@pytest.fixture
def service():
    made = Service()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture
def opened(service, browser):
    """A function that opens the page; in the end the console may have told of nothing but answers that are errors."""
    said, sent = [], []
    with contextlib.ExitStack() as stack:

        def open_page(width=1000, *, url=None, **options):
            tab = browser.new_page(viewport={"width": width, "height": 800}, **options)
            stack.callback(tab.close)
            tab.set_default_timeout(5000)
            for event in ("console", "pageerror", "dialog"):
                tab.on(event, lambda what: said.append(str(getattr(what, "text", what))))
            tab.on("request", lambda request: sent.append(request.url))
            tab.goto(url or service.url)
            return tab

        yield open_page
        assert [text for text in said if not text.startswith("Failed to load resource: ")] == []
        assert all(url.startswith((service.url, "blob:", "http://elsewhere.test")) for url in sent)


def upload(tab, content=None, name="a talk.wav"):
    tab.locator("#file").set_input_files({"name": name, "mimeType": "audio/wav", "buffer": content or tone(4)})
    tab.locator("#go:text-is('Transcribe')").click()


def status(tab, text):
    """Wait until the status line has the text."""
    tab.locator("#status", has_text=text).wait_for()


def until(tab, condition):
    """Wait until a JavaScript expression is true; Playwright's own way of it is what the policy forbids."""
    end = time.monotonic() + 5
    while not tab.evaluate(condition):
        assert time.monotonic() < end, condition
        time.sleep(0.02)


def transcribed(tab, service, events=ALL):
    service.answers.append(events)
    upload(tab)
    status(tab, "Done.")
    return tab


def test_segments_are_shown_while_the_rest_is_still_being_transcribed(opened, service):
    tab, second, last = opened(), threading.Event(), threading.Event()
    service.answers.append([GERMAN, second, ARABIC, last, THAI, done()])
    upload(tab)
    for number, event in enumerate((second, last), start=1):
        tab.locator(".segment").nth(number - 1).wait_for()
        assert tab.locator(".segment").count() == number and tab.locator("#go").inner_text() == "Cancel"
        assert tab.locator("progress").evaluate("bar => bar.value") == pytest.approx((2, 3)[number - 1] / 4, abs=0.02)
        assert tab.locator("[data-format=srt]").is_disabled() and tab.locator("[data-format=txt]").is_enabled()
        event.set()
    status(tab, "Done.")
    ((path, form),) = service.uploads
    assert path == "/v1/audio/transcriptions" and form.pop("file") == tone(4)
    assert form == {"model": b"mini", "language": b"auto", "response_format": b"verbose_json", "stream": b"true",
                    "timestamp_granularities[]": b"word"}  # fmt: skip
    assert tab.locator(".segment .time").all_inner_texts() == ["0:00", "0:02", "0:03"]
    assert tab.locator("#spoken").inner_text() == "German, detected, 98% sure · 0:04"
    assert tab.locator("progress").is_hidden() and tab.locator("#go").inner_text() == "Transcribe"


def test_a_segments_text_keeps_its_spaces_and_each_word_tells_its_time_and_confidence(opened, service):
    tab = transcribed(opened(), service)
    assert tab.locator(".text").all_inner_texts() == ["Guten Tag, gut.", "كتاب جديد", "ปีนี้ ดี"]
    assert tab.locator("[lang=th] .word").all_inner_texts() == ["ปี", "นี้", "ดี"]
    titles = tab.locator("[lang=de] .word").evaluate_all("all => all.map(one => one.title)")
    assert titles == ["0:00.20, 93% sure", "0:00.60, 45% sure", "0:01.50, 10% sure"]
    lines = (
        "all => all.map(one => getComputedStyle(one).textDecorationLine + getComputedStyle(one).textDecorationStyle)"
    )
    assert tab.locator("[lang=de] .word").evaluate_all(lines) == ["nonesolid", "underlinedotted", "underlinewavy"]
    assert (
        len(set(tab.locator("[lang=de] .word").evaluate_all("all => all.map(one => getComputedStyle(one).color)"))) == 3
    )
    assert tab.locator(".flag").all_inner_texts() == ["repeated itself", "repetition removed", "no speech"]


def test_arabic_runs_from_the_right_also_within_its_line(opened, service):
    text = tab_text = transcribed(opened(), service).locator("[lang=ar]")
    assert text.evaluate("one => getComputedStyle(one).direction") == "rtl"
    first, second = tab_text.locator(".word").evaluate_all("all => all.map(one => one.getBoundingClientRect().right)")
    assert first > second and first == pytest.approx(text.evaluate("one => one.getBoundingClientRect().right"), abs=1)
    flag = text.page.locator(".flag").first  # it stands under the beginning of the text
    assert flag.evaluate("one => one.getBoundingClientRect().right") == pytest.approx(first, abs=1)
    assert text.page.locator("[lang=de]").evaluate("one => getComputedStyle(one).direction") == "ltr"


def test_a_click_on_a_word_plays_from_it_and_the_word_being_said_is_marked(opened, service):
    tab = transcribed(opened(), service)
    tab.evaluate("player.currentTime = 3.5")
    tab.locator(".word", has_text="Tag,").click()  # backwards, where playing on does not lead
    until(tab, "!player.paused && player.currentTime >= 0.6 && player.currentTime < 3")
    until(tab, "document.querySelector('[aria-current]')?.textContent === 'Tag,'")
    until(tab, "player.currentTime > 1.5 && document.querySelector('[aria-current]')?.textContent === 'gut.'")
    assert tab.locator("[aria-current]").count() == 1 and tab.locator("#said").inner_text() == "0:01.50, 10% sure"
    tab.evaluate("player.pause(); player.currentTime = 1.3")  # between two words
    until(tab, "!document.querySelector('[aria-current]')")
    tab.locator(".time").nth(2).click()
    assert tab.evaluate("player.currentTime >= 3")  # at once, not by playing on
    until(tab, "document.querySelector('[aria-current]')?.textContent === 'ปี'")


def test_the_keyboard_reaches_every_word_and_plays_it(opened, service):
    tab = transcribed(opened(), service)
    tab.locator(".time").first.focus()
    reached = []
    for key in ["ArrowRight"] * 4 + ["Tab", "ArrowRight", "ArrowLeft", "ArrowRight"]:
        tab.keyboard.press(key)
        reached.append(tab.evaluate("document.activeElement.textContent"))
    assert reached == ["Guten", "Tag,", "gut.", "0:02", "0:03", "ปี", "0:03", "ปี"]
    tab.keyboard.press("Enter")
    assert tab.evaluate("player.currentTime >= 3")
    until(tab, "!player.paused")
    tab.locator(".word", has_text="كتاب").focus()
    tab.keyboard.press("ArrowLeft")  # onwards, where the text runs from the right
    assert tab.evaluate("document.activeElement.textContent") == "جديد"


def test_downloads_are_the_answers_bytes_and_the_text_goes_to_the_clipboard(opened, service):
    tab = transcribed(opened(permissions=["clipboard-read", "clipboard-write"]), service)
    text = "Guten Tag, gut.\nكتاب جديد\nปีนี้ ดี\n"
    for kind, wanted in {"txt": text, "srt": done()["srt"], "vtt": done()["vtt"]}.items():
        with tab.expect_download() as download:
            tab.locator(f"[data-format={kind}]").click()
        assert download.value.suggested_filename == f"a talk.{kind}"
        assert download.value.path().read_bytes() == wanted.encode()
    tab.locator("#copy").click()
    status(tab, "Copied.")
    assert tab.evaluate("navigator.clipboard.readText()") == text


def test_what_the_microphone_hears_reaches_the_service_as_wav_of_16_khz(opened, service):
    tab = opened()
    tab.locator("#file").set_input_files({"name": "a.wav", "mimeType": "audio/wav", "buffer": tone(9)})
    tab.evaluate("player.play()")
    tab.locator("#record").click()
    began = time.monotonic()
    tab.locator("#record:text-is('Stop')").wait_for()
    assert tab.evaluate("player.paused")  # so that it is not recorded
    assert tab.get_by_role("status").inner_text() == "Recording…"
    until(tab, "document.getElementById('level').value > -40")
    tab.locator("#clock:text-is('0:01')").wait_for()
    tab.wait_for_timeout(300)
    recorded_s = time.monotonic() - began
    tab.locator("#record").dblclick(delay=100)  # the second click begins no other recording
    service.answers.append(ALL)
    tab.locator("#go:enabled").click()
    status(tab, "Done.")
    content = service.uploads[0][1]["file"]
    info = soundfile.info(io.BytesIO(content))
    samples, rate = soundfile.read(io.BytesIO(content))
    assert (info.format, info.subtype, info.channels, rate) == ("WAV", "PCM_16", 1, 16000)
    assert len(content) == 44 + 2 * len(samples) and len(samples) / rate == pytest.approx(recorded_s, abs=0.5)
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    assert np.fft.rfftfreq(len(samples), 1 / rate)[spectrum.argmax()] == pytest.approx(440, abs=10)
    assert abs(samples).max() > 0.01 and tab.evaluate("player.duration") == pytest.approx(len(samples) / rate, abs=0.01)


def test_a_microphone_that_cannot_be_had_is_explained(opened, service):
    tab = opened(url=service.url.replace("127.0.0.1", "elsewhere.test"))  # not a secure context
    assert not tab.evaluate("isSecureContext")
    tab.locator("#record").click()
    status(tab, "localhost")
    tab = opened()
    tab.evaluate(
        """() => {
          const refused = new Promise((_, reject) => window.refuse = reject);
          navigator.mediaDevices.getUserMedia = () => refused;
        }"""
    )
    tab.locator("#record").click()
    status(tab, "Waiting for the microphone…")
    tab.evaluate("refuse(new DOMException('', 'NotAllowedError'))")
    status(tab, "Allow it for this page")
    assert tab.locator("#record").inner_text() == "Record" and tab.locator("#choose").is_enabled()
    tab.evaluate("load()")
    assert tab.locator("#status").inner_text().startswith("The microphone is not allowed here.")


def test_the_token_is_asked_for_only_where_it_is_needed_and_kept_for_the_tab(opened, service):
    assert opened().locator("#access").is_hidden()
    service.token = "secret"
    tab = opened()
    status(tab, "The service asks for its access token.")
    assert tab.locator("#go").is_disabled()
    for token, said, focused in (
        ("wrong", "This is not the service's access token.", "token"),
        ("secret", "", "choose"),
    ):
        tab.keyboard.type(token)  # the focus is where it is wanted, and what was wrong is gone
        with tab.expect_response("**/v1/models"):
            tab.keyboard.press("Enter")
        tab.locator(f"#status:text-is({json.dumps(said)})").wait_for(state="attached")
        assert tab.locator("#access").is_visible() == bool(said)
        assert tab.evaluate("document.activeElement.id") == focused
    tab.reload()
    transcribed(tab, service)
    assert tab.evaluate("[sessionStorage.token, localStorage.length, document.cookie].join()") == "secret,0,"


def test_a_file_that_is_taken_asks_again_for_a_service_that_was_not_there(opened, service):
    service.token = "secret"
    tab = opened()
    tab.locator("#access").wait_for()
    service.token = None
    service.answers.append(ALL)
    upload(tab)
    status(tab, "Done.")
    assert tab.locator("#access").is_hidden()


def test_a_double_click_transcribes_and_what_is_dropped_meanwhile_is_visibly_not_taken(opened, service):
    tab, last = opened(), threading.Event()
    service.answers.append([GERMAN, last, done()])
    tab.locator("#file").set_input_files({"name": "a.wav", "mimeType": "audio/wav", "buffer": tone(0.1)})
    tab.locator("#go").dblclick()
    tab.locator(".segment").wait_for()
    drag = """() => {
      const dataTransfer = new DataTransfer();
      document.body.dispatchEvent(new DragEvent("dragover", {dataTransfer, bubbles: true, cancelable: true}));
      return document.getElementById("drop").className;
    }"""
    assert tab.evaluate(drag) == "row"
    last.set()
    status(tab, "Done.")
    assert tab.evaluate(drag) == "row over" and tab.locator("#name").inner_text() == "a.wav, 4 kB"


def test_a_file_that_changes_after_it_was_chosen_is_named_and_the_service_is_not_blamed(opened, service, tmp_path):
    tab, path = opened(), tmp_path / "a talk.wav"
    path.write_bytes(tone(4))
    tab.locator("#file").set_input_files(path)
    os.utime(path, (1, 1))
    tab.locator("#go").click()
    status(tab, "a talk.wav cannot be read: it has changed or gone. Choose it again.")


def test_a_busy_service_is_asked_again_when_it_says_so_until_cancelled(opened, service):
    tab, busy = opened(), error("64 requests are in front")
    service.answers += [(429, {"Retry-After": "1"}, busy), ALL]
    upload(tab)
    status(tab, "64 requests are in front. Trying again in 1 s (1 of 5).")
    began = time.monotonic()
    status(tab, "Done.")
    assert time.monotonic() - began > 0.8 and len(service.uploads) == 2
    service.answers.append((429, {"Retry-After": "60"}, busy))
    tab.locator("#go").click()
    status(tab, "Trying again in 60 s")
    tab.locator("#go:text-is('Cancel')").click()
    status(tab, "Cancelled.")
    assert tab.locator("#go").inner_text() == "Transcribe" and len(service.uploads) == 3


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([GERMAN, error("out of memory") | {"type": "error"}], "out of memory. What is below is incomplete."),
        ([GERMAN], "The answer ended before it was complete. What is below is incomplete."),
    ],
)
def test_an_answer_that_fails_midway_is_called_incomplete_and_kept(opened, service, events, message):
    tab = opened()
    service.answers.append(events)
    upload(tab)
    status(tab, message)
    assert tab.locator("#status.error").count() and tab.locator(".text").all_inner_texts() == ["Guten Tag, gut."]
    with tab.expect_download() as download:
        tab.locator("[data-format=txt]").click()
    assert download.value.path().read_text(encoding="utf-8") == "Guten Tag, gut.\n"
    assert tab.locator("[data-format=vtt]").is_disabled() and tab.locator("#go").is_enabled()


def test_cancelling_keeps_what_is_there_and_ends_the_request(opened, service):
    tab, never = opened(), threading.Event()
    service.answers.append([GERMAN, never])
    upload(tab)
    tab.locator(".segment").wait_for()
    with tab.expect_event("requestfailed"):
        tab.locator("#go").click()
    status(tab, "Cancelled. What is below is incomplete.")
    never.set()
    assert tab.locator(".segment").count() == 1


def test_each_error_is_told_in_the_services_words_or_named(opened, service):
    tab = opened()
    service.answers += [(status, {}, error(f"what {status} means")) for status in (400, 413, 504)]
    service.answers.append((502, {}, b"<html>a proxy"))
    for text in [*(f"what {status} means." for status in (400, 413, 504)), "The service answered 502."]:
        upload(tab)
        tab.locator(f"#status:text-is('{text}')").wait_for()
        assert tab.locator("#result").is_hidden()
    upload(tab, content=bytes(1_000_001), name="long.wav")
    status(tab, "long.wav is larger than the 1 MB that are taken.")
    tab.context.set_offline(True)
    upload(tab)
    status(tab, "The service cannot be reached.")
    assert len(service.uploads) == 4


def test_doubts_and_warnings_are_told_beside_the_transcript(opened, service):
    tab = opened()
    tab.locator("#language").select_option("ar")
    end = done(
        flags=["language_doubt"], language="ar", probability=0.02, detected="th", warnings=["prompt is not used"]
    )
    transcribed(tab, service, [ARABIC, end])
    assert service.uploads[0][1]["language"] == b"ar"
    assert tab.locator("#spoken").inner_text() == "Arabic, as chosen · 0:04"
    doubt, warning = tab.locator("#remarks li").all_inner_texts()
    assert doubt.startswith("This sounds like Thai (Arabic: 2% likely).") and warning == "prompt is not used"
    transcribed(tab, service, [SILENCE, done(flags=["no_speech"], language=None, probability=None, detected=None)])
    assert tab.locator("#remarks li").all_inner_texts() == ["No speech was found in this audio."]
    assert tab.locator("#spoken").inner_text() == "0:04"


def test_a_model_without_words_or_detection_gives_text_and_languages_alone(opened, service):
    service.model = MODEL | {"word_times": False, "detects_language": False}
    tab = opened()
    transcribed(tab, service, [{key: value for key, value in GERMAN.items() if key != "words"}, done()])
    form = service.uploads[0][1]
    assert form["language"] == b"ar" and "timestamp_granularities[]" not in form
    assert tab.locator("#language option").all_inner_texts() == ["Arabic", "German", "Thai"]
    assert tab.locator(".text").inner_text() == "Guten Tag, gut." and tab.locator("#legend").is_hidden()


def test_hostile_text_names_and_messages_stay_text(opened, service):
    tab = opened()
    said = segment(0, 0, 1, EVIL, [(EVIL, 0, 1, 0.9)], flags=[EVIL], lang=EVIL)
    service.answers += [[said, done(language=EVIL, warnings=[EVIL])], (400, {}, error(EVIL))]  # fmt: skip
    upload(tab, name="<img src=x>.wav")
    status(tab, "Done.")
    for part in (".text", ".word", ".flag", "#remarks li"):
        assert tab.locator(part).inner_text() == EVIL
    tab.locator("#go").click()
    status(tab, EVIL)
    assert "<img" in tab.locator("#name").inner_text()
    assert tab.locator("img, #evil").count() == 0 and tab.evaluate("window.evil === undefined")


def test_a_dropped_file_is_taken(opened, service):
    tab = opened()
    service.answers.append(ALL)
    tab.evaluate(
        """() => {
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File(["not audio"], "notes.txt"));
          document.body.dispatchEvent(new DragEvent("drop", {dataTransfer, bubbles: true, cancelable: true}));
        }"""
    )
    tab.locator("#name", has_text="this browser cannot play it").wait_for()
    tab.locator("#go").click()
    status(tab, "Done.")
    assert service.uploads[0][1]["file"] == b"not audio" and tab.locator("#bar").is_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it_without_scrolling_sideways_and_with_contrast(opened, service, scheme):
    service.token = "secret"
    tab = opened(360, color_scheme=scheme)
    status(tab, "token")
    assert tab.evaluate("document.scrollingElement.scrollWidth") <= 360
    tab.locator("#token").fill("secret")
    tab.keyboard.press("Enter")
    long = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft"
    transcribed(
        tab,
        service,
        [GERMAN, segment(1, 4000, 4100, long, [(long, 4000, 4100, 0.5)], flags=["loop"]), done(warnings=[long])],
    )
    heights = tab.locator(".time").evaluate_all("all => all.map(one => one.offsetHeight)")
    assert len(heights) == 2 and len(set(heights)) == 1  # hours are in the same line as minutes
    top = "document.querySelector('.segment').offsetTop"
    before = tab.evaluate(top)
    tab.evaluate("player.currentTime = 0.7")  # a doubtful word is marked
    tab.locator("[aria-current]").wait_for()
    assert tab.evaluate(top) == before  # nothing moves under the finger
    assert tab.evaluate("document.scrollingElement.scrollWidth") <= 360
    small = """all => all.map(one => one.getBoundingClientRect())
        .filter(box => box.width && Math.min(box.width, box.height) < 24).length"""
    assert tab.locator("button, select, input").evaluate_all(small) == 0  # the size that WCAG 2.2 asks of targets
    shown = "all => all.filter(one => one.checkVisibility() && one.innerText && !one.disabled)"
    texts = tab.locator("body *")
    num_texts, faint = texts.evaluate_all(f"all => (texts => [texts.length, ({FAINT})(texts)])(({shown})(all))")
    assert num_texts > 20 and faint == []  # the contrast that WCAG 2.2 asks of text


def test_every_control_has_a_name_and_the_status_is_announced(opened, service):
    tab = transcribed(opened(), service)
    for role, names in {
        "button": ["Choose a file", "Record", "Transcribe", "TXT", "Copy"],
        "combobox": ["Language"],
    }.items():
        for name in names:
            assert tab.get_by_role(role, name=name, exact=True).count() == 1, name
    assert tab.get_by_role("status").inner_text() == "Done." and tab.locator("audio[aria-label]").count() == 1
    assert not re.search(r"https?://|\son\w+=|\sstyle=|eval\(|innerHTML", PAGE)

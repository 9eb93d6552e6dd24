"""Speech of the mini corpora, synthesised by eSpeak NG 1.52 (`espeakng-loader`) in process.

What eSpeak NG says depends on what it has said before in the same process. So the library is only ever loaded in
short-lived child processes: each handles one fixed chunk of utterances in order and ends. The bytes then depend on the
utterances and their chunk, never on the number of jobs, the order of chunks, or what the caller did before.
"""

import ctypes
import functools
import hashlib
import itertools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import soxr

from zipperasr.errors import UserError

SAMPLE_RATE = 16000
ESPEAK_SAMPLE_RATE = 22050
VOLUME = 40  # of 100: loud voices clip above
CHUNK = 32  # utterances spoken by one process
PARTS = ("test", "dev", "train", "pretrain")

LANGS = "ar de en es fr it ja ko pt ru th vi zh".split()
VOICES = {lang: lang for lang in LANGS} | {"en": "en-us", "pt": "pt-br", "zh": "cmn"}

# eSpeak NG's voice variants that sound like a person: no robots, whispers, echoes, nor any that swaps phonemes.
VARIANTS = (
    "f1 f2 f4 m1 m3 m4 m5 m6 m8 Alex Andy Annie Denis Gene Henrique Jacky john Lee Mario Mike Nguyen Reed Tweaky adam "
    "benjamin boris david edward2 gustave ian iven3 klatt klatt2 klatt3 linda marcelo michel mike2 norbert pablo paul "
    "quincy robert sandro steph steph3 travis victor"
).split()
HELD_OUT_VARIANTS = "f3 f5 m2 m7 Michael belinda Diogo ed klatt4 max rob steph2".split()  # for test and dev only

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Speaker:
    """A voice: eSpeak variant, base pitch (0-99), pitch range (0-99), rate (words per minute) and peak level (0-1)."""

    variant: str
    pitch: int
    pitch_range: int
    rate: int
    level: float


@dataclass(frozen=True)
class Style:
    """A way of speaking and recording; each pair is the range a value is drawn from."""

    rate: tuple[int, int]  # words per minute
    pitch_range: tuple[int, int]
    snr_db: tuple[float, float]
    reverberation_s: tuple[float, float]  # RT60
    wet: float  # energy of the reverberant tail relative to the direct sound
    band_hz: tuple[float, float] | None = None


STYLES = {
    "read": Style(rate=(160, 215), pitch_range=(35, 65), snr_db=(25, 45), reverberation_s=(0.05, 0.2), wet=0.05),
    "talk": Style(rate=(185, 240), pitch_range=(50, 85), snr_db=(18, 35), reverberation_s=(0.1, 0.3), wet=0.15),
    "meeting": Style(rate=(185, 240), pitch_range=(50, 85), snr_db=(12, 22), reverberation_s=(0.3, 0.6), wet=0.5),
    "net": Style(rate=(185, 240), pitch_range=(50, 85), snr_db=(15, 30), reverberation_s=(0.05, 0.2), wet=0.05,
                 band_hz=(250, 3600)),
}  # fmt: skip


@dataclass(frozen=True)
class Utterance:
    """Something to be said: text, language code, voice, name of a style, and the seed of its noise and room."""

    lang: str
    text: str
    speaker: Speaker
    style: str
    seed: int


def seed_of(*key: object) -> int:
    """A 32-bit seed from anything printable, the same on every platform."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little")


def speaker(number: int, part: str, style: str, *, seed: int = 0) -> Speaker:
    """The voice of speaker `number` of a part of the data (`PARTS`).

    No voice is shared between parts: (pitch + rate) mod 4 is the part's index. In test and dev every second speaker
    has a variant never heard in training; the others share their variant, not their pitch and rate, with training.
    """
    rng = np.random.default_rng(seed_of("speaker", number, part, seed))
    is_held_out = part in ("test", "dev") and number % 2 == 0
    pool = HELD_OUT_VARIANTS if is_held_out else VARIANTS
    rate = int(rng.integers(*STYLES[style].rate))
    pitch = int(rng.integers(20, 76)) // 4 * 4
    pitch += (PARTS.index(part) - pitch - rate) % 4
    return Speaker(
        variant=str(rng.choice(pool)),
        pitch=pitch,
        pitch_range=int(rng.integers(*STYLES[style].pitch_range)),
        rate=rate,
        level=round(float(rng.uniform(0.3, 0.9)), 2),
    )


def synthesise_all(utterances: Sequence[Utterance], *, nj: int = 1) -> Iterator[np.ndarray]:
    """The speech of each utterance in order: int16 [T] at 16 kHz; `nj` chunks of `CHUNK` at a time."""
    chunks = [utterances[start : start + CHUNK] for start in range(0, len(utterances), CHUNK)]
    return itertools.chain.from_iterable(in_fresh_processes(synthesise, chunks, nj=nj))


def synthesise(utterances: Sequence[Utterance]) -> list[np.ndarray]:
    """The speech of each utterance: int16 [T] at 16 kHz.

    Reproducible only in a process that has not used eSpeak before (`synthesise_all` sees to it).
    Raises UserError when eSpeak is missing or says nothing.
    """
    espeak = _Espeak()
    return [_record(espeak.say(utterance), utterance) for utterance in utterances]


def speakable(lang: str, texts: Sequence[str]) -> list[bool]:
    """Whether eSpeak reads each text in the language itself, without falling back to English."""
    (answer,) = in_fresh_processes(functools.partial(_speakable, lang), [list(texts)])
    return answer


def in_fresh_processes(function: Callable[[T], R], items: Iterable[T], *, nj: int = 1) -> Iterator[R]:
    """`map(function, items)` in order, each item in a process of its own, `nj` at a time."""
    with multiprocessing.get_context("fork").Pool(nj, maxtasksperchild=1) as pool:
        yield from pool.imap(function, items)


class _Espeak:
    """eSpeak NG's C interface (speak_lib.h), as far as it is needed here."""

    SYNCHRONOUS, UTF8, IPA = 2, 1, 2
    RATE, VOLUME, PITCH, RANGE = 1, 2, 3, 4

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise UserError("espeakng-loader is not installed; run pip install 'zipperasr[mini]'") from error
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        data = espeakng_loader.get_data_path().encode()
        rate = self.library.espeak_Initialize(self.SYNCHRONOUS, 0, data, 0)
        if rate != ESPEAK_SAMPLE_RATE:
            raise UserError(f"eSpeak NG does not start (answer {rate}); install espeakng-loader 0.2.4 again")
        callback_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.pieces: list[np.ndarray] = []
        self.callback = callback_type(self._collect)  # kept alive as long as the library may call it
        self.library.espeak_SetSynthCallback(self.callback)

    def _collect(self, samples, num_samples: int, _events) -> int:
        if num_samples > 0:
            self.pieces.append(np.ctypeslib.as_array(samples, (num_samples,)).copy())
        return 0

    def voice(self, name: str) -> None:
        if self.library.espeak_SetVoiceByName(name.encode()) != 0:
            raise UserError(f"eSpeak NG has no voice '{name}'; install espeakng-loader 0.2.4")

    def say(self, utterance: Utterance) -> np.ndarray:
        """Clean speech, float32 [T] at 22,050 Hz."""
        who = utterance.speaker
        self.voice(f"{VOICES[utterance.lang]}+{who.variant}")
        settings = {self.RATE: who.rate, self.PITCH: who.pitch, self.RANGE: who.pitch_range, self.VOLUME: VOLUME}
        for parameter, value in settings.items():
            self.library.espeak_SetParameter(parameter, value, 0)
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(utterance.seed))
        self.pieces.clear()
        text = utterance.text.encode() + b"\0"
        self.library.espeak_Synth(text, len(text), 0, 1, 0, self.UTF8, None, None)
        self.library.espeak_Synchronize()
        if not self.pieces:
            raise UserError(f"eSpeak NG says nothing for '{utterance.text}' ({utterance.lang}); drop that phrase")
        return np.concatenate(self.pieces).astype(np.float32) / 32768

    def ipa(self, text: str) -> str:
        """The pronunciation of a text by the voice set last."""
        clauses, rest = [], ctypes.c_char_p(text.encode())
        while rest.value:
            clauses.append(self.library.espeak_TextToPhonemes(ctypes.byref(rest), self.UTF8, self.IPA).decode())
        return " ".join(clauses)


def _speakable(lang: str, texts: list[str]) -> list[bool]:
    espeak = _Espeak()
    espeak.voice(VOICES[lang])
    pronunciations = [espeak.ipa(text) for text in texts]
    return [bool(ipa.strip()) and "(" not in ipa for ipa in pronunciations]


def _record(clean: np.ndarray, utterance: Utterance) -> np.ndarray:
    """`clean` (22,050 Hz) as recorded in a room: int16 [T] at 16 kHz, its peak at the speaker's level."""
    style, rng = STYLES[utterance.style], np.random.default_rng(utterance.seed)
    speech = _reverberate(_trim(soxr.resample(clean, ESPEAK_SAMPLE_RATE, SAMPLE_RATE)), style, rng)
    noise = _filter(rng.standard_normal(len(speech)), 0, rng.uniform(100, 2000))
    snr = 10 ** (rng.uniform(*style.snr_db) / 10)
    audio = speech + noise * np.sqrt(np.mean(speech**2) / np.mean(noise**2) / snr)
    if style.band_hz:
        audio = _filter(audio, *style.band_hz)
    audio = audio / np.abs(audio).max() * utterance.speaker.level
    return np.round(audio * 32767).astype(np.int16)


def _trim(audio: np.ndarray) -> np.ndarray:
    """`audio` with 50 ms of silence before and after the speech."""
    loud = np.flatnonzero(np.abs(audio) > 0.01 * np.abs(audio).max())
    return np.pad(audio[loud[0] : loud[-1] + 1], SAMPLE_RATE // 20)


def _reverberate(audio: np.ndarray, style: Style, rng: np.random.Generator) -> np.ndarray:
    """`audio` and its echo: noise that decays by 60 dB in RT60 seconds. The last 50 ms of echo are kept."""
    rt60 = rng.uniform(*style.reverberation_s)
    time = np.arange(1, int(rt60 * SAMPLE_RATE)) / SAMPLE_RATE
    tail = rng.standard_normal(len(time)) * 10 ** (-3 * time / rt60)
    tail *= np.sqrt(style.wet * rng.uniform(0.3, 1.0) / np.sum(tail**2))
    size = _fft_size(len(audio) + len(tail))
    spectrum = np.fft.rfft(audio, size) * np.fft.rfft(np.concatenate([[1.0], tail]), size)
    return np.fft.irfft(spectrum, size)[: len(audio) + SAMPLE_RATE // 20]


def _filter(audio: np.ndarray, low_hz: float, high_hz: float) -> np.ndarray:
    """`audio` damped by 12 dB an octave below `low_hz` and 6 dB an octave above `high_hz`."""
    size = _fft_size(len(audio))
    frequency = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    gain = 1 / np.sqrt(1 + (frequency / high_hz) ** 2) / (1 + (low_hz / np.maximum(frequency, 1.0)) ** 2)
    return np.fft.irfft(np.fft.rfft(audio, size) * gain, size)[: len(audio)]


def _fft_size(length: int) -> int:
    """The next power of two: transforms of other lengths may take ten times as long."""
    return 1 << (length - 1).bit_length()

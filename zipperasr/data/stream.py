"""Audio files of any format, rate, length and number of channels, read in blocks of 16 kHz mono samples.

libsndfile reads WAV, FLAC, Ogg and MP3, ffmpeg the rest where it is installed. A file's content decides, not its name.
T samples, C channels.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import soundfile

from zipperasr.data.audio import SAMPLE_RATE, AudioInfo, BadAudio, probe
from zipperasr.errors import UserError

if TYPE_CHECKING:
    import numpy as np

BLOCK_S = 30
BLOCK_VALUES = 2**24  # of all channels: few files have enough channels for this to be less than BLOCK_S
RATES = range(1000, 768_001)
MAX_DOWN = 48_000  # of the least ratio of a rate to 16 kHz: the filter has 20 times as many values (767999 Hz: 1 GB)
_CONTAINERS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,eac3,flac,flv,matroska,webm,mov,mp4,m4a,3gp,mp3,mpeg,mpegts,ogg,tta,w64,wav,wv"
)
"""What ffmpeg may read: no playlist, as that can name other files and addresses."""


def describe(path: Path) -> AudioInfo | None:
    """What libsndfile says of a file; None for one that is left to ffmpeg.

    Raises UserError when there is no such file, it is cut short, or it holds no audio that can be read here.
    """
    try:
        info = probe(str(path))
    except BadAudio as bad:
        if bad.kind != "unreadable audio" or not path.stat().st_size:
            raise UserError(f"{bad.detail}; give a whole audio file") from bad
        if not os.access(path, os.R_OK):
            raise UserError(f"{path}: permission denied; mend its permissions") from bad
        if shutil.which("ffmpeg"):
            return None
        mend = "give audio, or install ffmpeg, which reads more formats"
        raise UserError(f"{path}: not audio that libsndfile reads; {mend}") from bad
    rate = info.sampling_rate
    if rate not in RATES or rate // math.gcd(rate, SAMPLE_RATE) > MAX_DOWN:
        known = f"{RATES[0]} to {RATES[-1]} are read, and above {MAX_DOWN} only round ones; resample it"
        raise UserError(f"{path}: a sampling rate of {rate} Hz; {known}")
    return info


def read(
    path: Path, info: AudioInfo | None, *, start_s: float = 0, end_s: float | None = None, channels: Sequence[int] = ()
) -> Iterator[np.ndarray]:
    """Blocks [T], float32, of at most about BLOCK_S of what `describe` has found: the mean of `channels`, or of all.

    Raises UserError when the audio cannot be decoded, or holds values that are no numbers.
    """
    import numpy as np

    if info is None:
        blocks = _from_ffmpeg(path, start_s, end_s, channels)
    else:
        if outside := [c for c in channels if c >= info.num_channels]:
            raise UserError(f"{path}: no channel {outside[0]}, there are {info.num_channels}; mend the manifest")
        blocks = resampled(_from_soundfile(path, start_s, end_s, channels), info.sampling_rate)
    for block in blocks:
        if not np.isfinite(block).all():
            raise UserError(f"{path}: holds samples that are no numbers; write it anew")
        yield block


def _from_soundfile(path: Path, start_s: float, end_s: float | None, channels: Sequence[int]) -> Iterator[np.ndarray]:
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            size = max(1, min(BLOCK_S * rate, BLOCK_VALUES // file.channels))
            stop = file.frames if end_s is None else min(file.frames, round(end_s * rate))
            file.seek(min(round(start_s * rate), stop))
            while (left := stop - file.tell()) > 0:
                block = file.read(min(left, size), dtype="float32", always_2d=True)  # [T, C]
                if not len(block):
                    break  # a compressed file may hold a little less than its header says
                yield (block[:, list(channels)] if channels else block).mean(axis=1)
    except soundfile.SoundFileError as error:
        what = getattr(error, "error_string", error)
        raise UserError(f"{path}: broken in the middle ({what}); give a whole audio file") from error


def resampled(blocks: Iterable[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """Blocks at 16 kHz that are, end to end, what scipy's resample_poly makes of the whole.

    Each block is resampled with as much of its neighbours as the filter spans.
    """
    if rate == SAMPLE_RATE:
        yield from blocks
        return
    import numpy as np
    from scipy.signal import resample_poly

    divisor = math.gcd(rate, SAMPLE_RATE)
    up, down = SAMPLE_RATE // divisor, rate // divisor
    context = down * (math.ceil(10 * max(up, down) / up / down) + 1)  # half a filter, whole steps of `down`
    held, num_read, num_given = np.zeros(context, np.float32), 0, 0
    for block in itertools.chain(blocks, [None]):
        num_read += 0 if block is None else len(block)
        if block is None:  # zeros follow the end
            block = np.zeros(context + -(len(held) - context) % down, np.float32)
        held = np.concatenate([held, block])
        size = (len(held) - 2 * context) // down * down
        if size > 0:
            made = resample_poly(held[: size + 2 * context], up, down)[context * up // down :][: size * up // down]
            made = made[: -(-num_read * up // down) - num_given].astype(np.float32)
            held, num_given = held[size:], num_given + len(made)
            yield made


def _from_ffmpeg(path: Path, start_s: float, end_s: float | None, channels: Sequence[int]) -> Iterator[np.ndarray]:
    import numpy as np

    duration = [] if end_s is None else ["-t", str(end_s - start_s)]
    mean = "+".join(f"{1 / len(channels):.6f}*c{c}" for c in channels)
    picked = ["-af", f"pan=mono|c0={mean}"] if channels else []
    command = [
        "ffmpeg", "-nostdin", "-v", "error", "-protocol_whitelist", "file", "-format_whitelist", _CONTAINERS,
        "-ss", str(start_s), *duration, "-i", f"file:{path}",
        "-map", "0:a:0", *picked, "-ac", "1", "-ar", str(SAMPLE_RATE), "-f", "f32le", "-",
    ]  # fmt: skip
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        try:
            while data := process.stdout.read(4 * BLOCK_S * SAMPLE_RATE):
                yield np.frombuffer(data[: len(data) // 4 * 4], np.float32)
        except BaseException:
            process.kill()
            raise
        if process.wait():
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise UserError(f"{path}: no audio that ffmpeg can read ({said}); give a whole audio file")

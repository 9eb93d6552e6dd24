"""Audio of any length: read in blocks, cut at pauses, transcribed, written as text and subtitles."""

import contextlib
import html
import itertools
import json
import os
import re
import stat
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
import tiny_run
import torch
import whisper
from scipy.signal import resample_poly
from tiny_run import RATE, speech
from transformers import WhisperConfig, WhisperForConditionalGeneration

from zipperasr import files
from zipperasr.alignment.words import Word, split
from zipperasr.cli import recipe as recipes
from zipperasr.cli.main import main
from zipperasr.data import manifests, stream
from zipperasr.data.features import log_mel
from zipperasr.decoding import DecodingSettings, formats, inputs, pieces, segments, transcribe
from zipperasr.decoding.generate import Hypothesis, Transcriber
from zipperasr.decoding.transcript import Segment, Transcript
from zipperasr.errors import UserError
from zipperasr.languages import LANGUAGES
from zipperasr.model import checkpoint
from zipperasr.model.aligner import Aligner
from zipperasr.model.ctc import Units
from zipperasr.model.language_id import LanguageDetector

PAUSES = {"min_pause_s": 0.2, "margin_s": 0.2}


def in_blocks(samples: np.ndarray, size: int):
    return iter(np.split(samples, range(size, len(samples), size)))


# Cutting


def conversation(seed: int, *, longest_s: float, noise: float) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Five minutes of speech between pauses of 0.3 to 1.5 s, and sometimes 10 s, over noise; when there is speech."""
    draw = np.random.default_rng(seed)
    samples, spans, at_s = draw.normal(0, noise, 300 * RATE).astype(np.float32), [], draw.uniform(0, 3)
    while at_s < 300 - longest_s:
        said = speech(draw.uniform(0.4, longest_s), seed=len(spans))
        samples[round(at_s * RATE) :][: len(said)] += said
        spans.append((at_s, at_s + len(said) / RATE))
        at_s = spans[-1][1] + draw.choice([draw.uniform(0.3, 1.5), 10], p=[0.95, 0.05])
    return samples, spans


@pytest.mark.parametrize("noise", [0, 1e-4, 5e-3])
@pytest.mark.parametrize("max_s, longest_s, block", [(25, 8, 480_000), (30, 4, 77_777), (2, 1.2, 480_000)])
def test_pieces_hold_all_speech_and_are_cut_in_pauses(max_s, longest_s, block, noise):
    samples, spans = conversation(round(max_s + 1e4 * noise), longest_s=longest_s, noise=noise)
    pieces = list(segments.cut(in_blocks(samples, block), max_s=max_s, **PAUSES))
    times = [(piece.start_s, piece.start_s + len(piece.samples) / RATE) for piece in pieces]
    assert all(any(a <= start and end <= b + 1e-6 for a, b in times) for start, end in spans)  # each in one piece
    assert all(end <= start + 1e-6 for (_, end), (start, _) in itertools.pairwise(times))
    assert max(len(piece.samples) for piece in pieces) <= max_s * RATE
    assert all(np.array_equal(p.samples, samples[round(p.start_s * RATE) :][: len(p.samples)]) for p in pieces)
    alone = [end - start for start, end in times if max_s > 10]
    assert np.mean([length > 8 for length in alone] or [1]) > 0.6  # few are short, and those before a long pause


def test_unbroken_speech_is_cut_at_its_quietest_frames_without_a_gap():
    draw, quiet_s = np.random.default_rng(0), (17.0, 36.0, 51.5)
    samples = draw.normal(0, 0.1, 60 * RATE).astype(np.float32) * np.repeat(draw.uniform(0.6, 1, 600), RATE // 10)
    for at_s in quiet_s:  # shorter than a pause
        samples[round(at_s * RATE) :][: RATE // 20] *= 0.1
    pieces = list(segments.cut(in_blocks(samples, 480_000), max_s=25, **PAUSES))
    assert sum(len(piece.samples) for piece in pieces) == len(samples)
    assert [piece.start_s for piece in pieces[1:3]] == pytest.approx([q + 0.025 for q in quiet_s[:2]], abs=0.03)


@pytest.mark.parametrize("level, covered_s", [(0, 0), (1e-5, 0), (0.05, 90)])
def test_silence_is_in_no_piece_and_what_could_hide_speech_in_some(level, covered_s):
    samples = np.random.default_rng(0).normal(0, level, 90 * RATE).astype(np.float32)
    pieces = segments.cut(in_blocks(samples, 480_000), max_s=25, **PAUSES)
    assert sum(len(piece.samples) for piece in pieces) == covered_s * RATE


def test_a_loud_voice_does_not_hide_one_that_is_30_db_below_it():
    samples = np.random.default_rng(0).normal(0, 1e-4, 120 * RATE).astype(np.float32)
    samples[RATE : 21 * RATE] += speech(20)
    samples[60 * RATE : 64 * RATE] += 10**-1.5 * speech(4)
    times = [(p.start_s, p.start_s + len(p.samples) / RATE) for p in segments.cut([samples], max_s=25, **PAUSES)]
    assert any(start <= 60 and end >= 64 for start, end in times)


@pytest.mark.parametrize("noise", [0, 1e-3])
def test_real_recordings_are_covered_and_cut_where_nobody_speaks(shared_speech, noise):
    """What is within 25 dB of a recording's loudest frame, and above the noise, is taken for speech."""
    draw, clips = np.random.default_rng(0), []
    for path in sorted(shared_speech.glob("*/*.*"))[::2]:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        clips.append(resample_poly(samples.mean(axis=1), RATE, rate) * 10 ** draw.uniform(-0.75, 0))
    samples = np.concatenate(clips)
    level = segments.level_db(samples)
    loudest = [segments.level_db(clip).max() for clip in clips]
    at = np.minimum(np.searchsorted(np.cumsum([len(c) for c in clips]), np.arange(len(level)) * 160), len(clips) - 1)
    is_said = level > np.maximum(np.array(loudest)[at] - 25, 20 * np.log10(noise + 1e-9) + 3)
    samples = (samples + noise * draw.normal(size=len(samples))).astype(np.float32)
    pieces = list(segments.cut(in_blocks(samples, 480_000), max_s=25, **PAUSES))
    starts = [round(100 * piece.start_s) for piece in pieces]
    ends = [start + len(piece.samples) // 160 for start, piece in zip(starts, pieces, strict=True)]
    is_covered = np.zeros(len(level), bool)
    for start, end in zip(starts, ends, strict=True):
        is_covered[start:end] = True
    assert (is_said & ~is_covered).sum() < 1e-3 * is_said.sum()
    assert np.mean([10 <= (end - start) / 100 <= 25 for start, end in zip(starts, ends, strict=True)]) > 0.6
    assert np.mean(is_said[ends[:-1]]) < 0.1


def test_what_fits_the_encoder_is_not_cut():
    samples = np.concatenate([np.zeros(4 * RATE, np.float32), speech(1), np.zeros(4 * RATE, np.float32)])
    (piece,) = segments.cut(in_blocks(samples, 1000), max_s=9, **PAUSES)
    assert piece.start_s == 0 and np.array_equal(piece.samples, samples)


# Reading


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000, 96000])
@pytest.mark.parametrize("block", [1000, 31_337])
def test_blocks_are_resampled_as_the_whole(rate, block):
    samples = np.random.default_rng(0).normal(0, 0.1, 50_001).astype(np.float32)
    made = np.concatenate(list(stream.resampled(in_blocks(samples, block), rate)))
    divisor = np.gcd(rate, RATE)
    np.testing.assert_allclose(made, resample_poly(samples, RATE // divisor, rate // divisor), atol=1e-6)


def read(path: Path, **span) -> np.ndarray:
    return np.concatenate(list(stream.read(path, stream.describe(path), **span)))


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3", "AIFF"])
def test_content_decides_what_a_file_is(tmp_path, format):
    samples = speech(3)
    soundfile.write(tmp_path / "talk.txt", samples, RATE, format=format)
    found = read(tmp_path / "talk.txt")
    assert abs(len(found) - len(samples)) <= 2400
    assert np.corrcoef(found[: len(samples)], samples[: len(found)])[0, 1] > 0.7


def test_channels_are_averaged_and_times_and_channels_picked(tmp_path):
    channels = np.random.default_rng(0).uniform(-0.5, 0.5, (40 * RATE, 3)).astype(np.float32)
    soundfile.write(tmp_path / "x.wav", channels, RATE, subtype="FLOAT")
    np.testing.assert_allclose(read(tmp_path / "x.wav"), channels.mean(axis=1), atol=1e-7)
    picked = read(tmp_path / "x.wav", start_s=31.5, end_s=39.25, channels=(1,))
    assert np.array_equal(picked, channels[int(31.5 * RATE) : int(39.25 * RATE), 1])
    with pytest.raises(UserError, match="no channel 7, there are 3"):
        read(tmp_path / "x.wav", channels=(7,))


def write_bad(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.wav"
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("Not a sound.\n" * 100)
    elif kind == "headed":
        soundfile.write(path, np.zeros(0, np.float32), RATE)
    elif kind == "truncated":
        soundfile.write(path, speech(2), RATE)
        path.write_bytes(path.read_bytes()[:20_000])
    elif kind == "broken":
        soundfile.write(path, speech(60), RATE, format="FLAC")
        data = bytearray(path.read_bytes())
        data[len(data) // 2 : len(data) // 2 + 60_000] = bytes(60_000)
        path.write_bytes(data)
    elif kind == "numberless":
        soundfile.write(path, np.full(RATE, np.nan, np.float32), RATE, subtype="FLOAT")
    return path


BAD = {
    "missing": "no such file",
    "empty": "an empty file",
    "text": "not audio that libsndfile reads; give audio, or install ffmpeg",
    "headed": "holds no audio",
    "truncated": "ends before the audio that its header declares",
    "broken": "broken",
    "numberless": "no numbers",
}


def program(folder: Path, text: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / "ffmpeg"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_ffmpeg_reads_what_libsndfile_does_not(tmp_path, monkeypatch):
    samples, path = speech(70), tmp_path / "-talk.m4a"
    path.write_bytes(b"\0\0\0\x18ftypM4A " + bytes(1000))
    samples.tofile(tmp_path / "raw")
    program(tmp_path / "bin", f'printf "%s\\n" "$@" > {tmp_path}/args; cat {tmp_path}/raw')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    assert stream.describe(path) is None
    assert np.array_equal(read(path, start_s=1.5, end_s=3), samples)
    said = (tmp_path / "args").read_text().splitlines()
    assert said[said.index("-i") + 1] == f"file:{path}" and said[said.index("-ss") + 1] == "1.5"
    assert "hls" not in said[said.index("-format_whitelist") + 1].split(",")  # playlists name other files
    assert "-af" not in said  # all channels are mixed
    read(path, channels=(1, 3))
    said = (tmp_path / "args").read_text().splitlines()
    assert said[said.index("-af") + 1] == "pan=mono|c0=0.500000*c1+0.500000*c3"
    first = stream.read(path, None)
    next(first)
    first.close()  # ends the program too
    program(tmp_path / "bin", "echo one >&2; echo moov atom not found >&2; exit 1")
    with pytest.raises(UserError, match=r"-talk.m4a: no audio that ffmpeg can read \(moov atom not found\)"):
        read(path)


# What there is to transcribe


def test_a_kaldi_directory_is_its_utterances_in_their_languages(tmp_path):
    (tmp_path / "wav.scp").write_text("a audio/a.flac\nb /data/b.wav\n")
    (tmp_path / "utt2lang").write_text("a-1 deu\n")
    assert [s.path for s in inputs.find([str(tmp_path)])[0]] == [Path("audio/a.flac"), Path("/data/b.wav")]
    (tmp_path / "segments").write_text("a-1 a 0.5 2\na-2 a 3 -1\nb-1 b 0 1.25\n")
    found, failed = inputs.find([str(tmp_path)])
    assert not failed
    assert [(s.name, s.start_s, s.end_s, s.lang) for s in found] == [
        ("a-1", 0.5, 2, "de"), ("a-2", 3, None, None), ("b-1", 0, 1.25, None),
    ]  # fmt: skip


def test_an_unknown_language_costs_its_utterance_alone_and_nothing_if_one_is_named(run, audio, capsys):
    (audio / "wav.scp").write_text(f"one {audio}/a.flac\ntwo {audio}/a.flac\n")
    (audio / "utt2lang").write_text("one nl\ntwo de\n")
    assert main(run.args(audio)) == 1
    said = capsys.readouterr()
    assert said.out.startswith("two\t") and said.out.count("\n") == 1
    assert "one: unknown language 'nl'" in said.err and "or give --language" in said.err
    assert main(run.args("--language", "de", audio)) == 0
    assert capsys.readouterr().out.count("\n") == 2


@pytest.mark.parametrize(
    "wav_scp, segments_, said",
    [
        ("a sox a.wav -t wav - |\n", None, "recording 'a' is 'sox a.wav -t wav - \\|', not a file"),
        ("a | cat\n", None, "not a file"),
        ("a data.ark:123\n", None, "local/prepare_kaldi.py"),
        ("a a.wav\n", "u b 0 1\n", "no recording of wav.scp"),
        ("a a.wav\n", "u a 2 1\n", "before it begins"),
        ("a a.wav\n", "u a 0 x\n", "mend segments"),
    ],
)
def test_a_kaldi_directory_that_is_not_plain_files_is_refused(tmp_path, wav_scp, segments_, said):
    (tmp_path / "wav.scp").write_text(wav_scp)
    if segments_:
        (tmp_path / "segments").write_text(segments_)
    found, failed = inputs.find([str(tmp_path)])
    assert not found and re.search(said, str(failed[str(tmp_path)]))


@pytest.mark.parametrize("name", ["wav.scp", "segments"])
def test_a_kaldi_directory_without_utterances_is_named(tmp_path, name):
    (tmp_path / "wav.scp").write_text("a a.wav\n")
    (tmp_path / name).write_text("")
    assert f"an empty {name}" in str(inputs.find([str(tmp_path)])[1][str(tmp_path)])


def test_a_folder_holds_its_folders_and_their_audio_lies_in_such_folders_again(tmp_path):
    for name in ("b.wav", "a b/1/b.wav", "a b/2/b.FLAC", ".hidden/b.wav", "a b/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "around").symlink_to(tmp_path)
    found, _ = inputs.find([str(tmp_path)])
    assert [source.output for source in found] == ["a b/1/b", "a b/2/b", "b"]


def test_what_the_system_refuses_costs_itself_only(tmp_path):
    (tmp_path / "a.wav").touch()
    found, failed = inputs.find(["x" * 300, str(tmp_path)])  # root may read everything, but no name is that long
    assert len(found) == 1 and re.search("too long; mend its name", str(failed["x" * 300]))


def test_a_file_that_may_not_be_read_is_not_taken_for_another_format(tmp_path, monkeypatch):
    path = write_bad(tmp_path, "text")
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(UserError, match="permission denied"):
        stream.describe(path)


def test_manifests_of_cuts_and_of_recordings_are_read_packed_or_not(tmp_path):
    sources = [{"type": "file", "channels": [0, 1], "source": "x.wav"}]
    recording = {"id": "r", "sources": sources, "sampling_rate": 8000, "num_samples": 80_000, "duration": 10.0}
    said = [{"id": "c", "recording_id": "r", "start": 0, "duration": 2, "language": "German"}]
    cut = {"id": "c", "start": 1.5, "duration": 2.0, "channel": 1, "supervisions": said, "recording": recording}
    manifests.write(tmp_path / "cuts.jsonl.gz", [cut | {"type": "MonoCut"}])
    (tmp_path / "recordings.jsonl").write_text(json.dumps(recording) + "\n")
    found, _ = inputs.find([str(tmp_path / "cuts.jsonl.gz"), str(tmp_path / "recordings.jsonl")])
    assert found == [
        inputs.Source("c", Path("x.wav"), 1.5, 3.5, (1,), "German"), inputs.Source("r", Path("x.wav"), 0, 10, (0, 1)),
    ]  # fmt: skip
    assert [source.lang for source in found] == ["de", None]
    per_channel = json.dumps(recording | {"sources": sources * 2})
    for text in ("", "{", '{"id": "mixed", "tracks": []}\n', "[]\n", '{"id": 1, "sources": []}', per_channel):
        (tmp_path / "bad.jsonl").write_text(text)
        (error,) = inputs.find([str(tmp_path / "bad.jsonl")])[1].values()
        assert "\n" not in str(error)
        assert "has 2 sources" in str(error) if text == per_channel else "bad.jsonl: " in str(error)


# Formats

SAID = {
    "de": "Wir reden --> und <i>reden</i> & reden, bis die Donaudampfschifffahrtsgesellschaft nichts mehr sagt. " * 3,
    "ja": "これは日本語の文章です。iPhone 12 を使って書きました、とても長いので分けます。" * 4,
    "th": "หนึ่งสองสามสี่ห้าหกเจ็ดแปดเก้าสิบหนึ่งสองสามสี่ห้าหกเจ็ดแปดเก้าสิบ หนึ่ง สอง สาม " * 3,
}


def transcript(lang: str, *, words: tuple[Word, ...] | None = None) -> Transcript:
    text = SAID[lang].strip()
    said = (Segment(3599.5, 3623.25, text, -0.1, (), words), Segment(3623.25, 3624, "", None, ("no_speech",)))
    return Transcript("a b.wav", 3700.0, 1, lang, 0.9, lang, (), (*said, Segment(3630, 3631.0004, "Ja", -0.2)))


def seconds(hours: str, minutes: str, rest: str) -> float:
    return 3600 * int(hours) + 60 * int(minutes) + float(rest.replace(",", "."))


def parse_srt(text: str) -> list[tuple[float, float, list[str]]]:
    """Strictly: blocks between empty lines, counted from 1."""
    clock, found = r"(\d\d):(\d\d):(\d\d,\d{3})", []
    for i, block in enumerate(text.removesuffix("\n\n").split("\n\n"), start=1):
        number, times, *lines = block.split("\n")
        match = re.fullmatch(f"{clock} --> {clock}", times)
        assert int(number) == i and match and lines and not any("-->" in line for line in lines)
        found.append((seconds(*match.groups()[:3]), seconds(*match.groups()[3:]), lines))
    return found


def parse_vtt(text: str) -> list[tuple[float, float, list[str]]]:
    """Strictly, by the W3C's syntax: no < or bare & in what is shown."""
    head, *blocks = text.removesuffix("\n").split("\n\n")
    clock, found = r"(\d\d+):(\d\d):(\d\d\.\d{3})", []
    assert head == "WEBVTT"
    for block in blocks:
        times, *lines = block.split("\n")
        match = re.fullmatch(f"{clock} --> {clock}", times)
        assert match and not any(re.search(r"-->|[<>]|&(?!amp;|lt;|gt;)", line) for line in lines)
        found.append((seconds(*match.groups()[:3]), seconds(*match.groups()[3:]), [html.unescape(x) for x in lines]))
    return found


@pytest.mark.parametrize("lang", SAID)
@pytest.mark.parametrize("format, parse", [("srt", parse_srt), ("vtt", parse_vtt)])
def test_subtitles_say_all_in_short_cues_of_short_lines(lang, format, parse):
    cues = parse(formats.FORMATS[format](transcript(lang)))
    shown = "".join("".join(line.split()) for *_, lines in cues for line in lines)
    said = "".join(SAID[lang].split()) + "Ja"
    assert shown == (said.replace("-->", "→") if format == "srt" else said)
    assert cues[0][0] == 3599.5 and cues[-1][:2] == (3630, 3631)
    assert all(0 < end - start <= 7 for start, end, _ in cues)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(cues))
    wide = 2 if lang == "ja" else 1
    marks = re.compile(r"[\u0e31\u0e34-\u0e3a\u0e47-\u0e4e]")
    widths = [sum(wide if ord(c) > 0x2E80 else 1 for c in marks.sub("", line)) for *_, lines in cues for line in lines]
    assert max(widths) <= 42 and max(len(lines) for *_, lines in cues) == 2
    assert not any(marks.match(line) for *_, lines in cues for line in lines)  # no letter has lost its mark


def test_cues_and_ctm_follow_the_times_of_words():
    texts = SAID["de"].split()
    words = tuple(Word(text, 3600 + i / 2, 3600.4 + i / 2, 0.5) for i, text in enumerate(texts))
    starts = [start for start, *_ in parse_vtt(formats.vtt(transcript("de", words=words)))]
    assert all(start * 2 == round(start * 2) for start in starts)
    rows = formats.ctm(transcript("de", words=words).__class__(**{
        **vars(transcript("de", words=words)), "segments": transcript("de", words=words).segments[:2],
    })).splitlines()  # fmt: skip
    assert len(rows) == len(words) and rows[1] == "a_b.wav 1 3600.500 0.400 reden 0.500"
    with pytest.raises(UserError, match="the times of words"):
        formats.ctm(transcript("de"))


def test_words_of_a_segment_have_the_times_of_their_audio():
    piece, said = pieces.Piece("de", 12.5, 2.0, np.zeros((200, 80))), Hypothesis([1, 2], "ja nein", -0.12345678)
    words = [Word("ja", 0.1, 0.5, 0.9), Word("nein", 0.5, 1.25, 0.8)]
    segment = pieces.decoded(piece, said, words)
    assert segment.words == (Word("ja", 12.6, 13.0, 0.9), Word("nein", 13.0, 13.75, 0.8)) and segment.flags == ()
    assert (segment.start_s, segment.end_s, segment.logprob) == (12.5, 14.5, -0.12346)
    assert pieces.decoded(piece, said, None).words is None
    assert pieces.decoded(piece, said, []).flags == ("unaligned",)
    assert pieces.decoded(piece, Hypothesis([2], "", -1.0), []).flags == ("empty",)


def test_no_cue_is_without_duration_where_words_have_none():
    known = [Word(text, 1 + i, 1.9 + i, 0.5) for i, text in enumerate(["Donaudampfschifffahrt"] * 4)]
    words = (*known, *(Word("42", 4.9, 4.9, 0.0) for _ in range(9)))
    said = Segment(0.5, 8.0, " ".join(word.text for word in words), -0.1, (), words)
    found = list(formats.cues(Transcript("a", 9.0, 1, "de", 0.9, "de", (), (said,))))
    assert " ".join(" ".join(cue.lines) for cue in found) == said.text
    assert all(0.5 <= cue.start_s < cue.end_s <= 8 for cue in found)


def test_no_word_reaches_into_the_next_segment():
    """Five feature frames are three of the encoder's, which reach 10 ms beyond them."""

    class Says(NamedTuple):
        settings: DecodingSettings = DecodingSettings()
        prompt_tokens: object = staticmethod(lambda langs: 1)

        def encode(self, features, langs, longest_s):
            return None, [torch.eye(3)[[0, 1, 2]].log_softmax(-1) for _ in features]

        def __call__(self, speech, langs, caps):
            return [Hypothesis([1], "ab", -0.1) for _ in langs]

    aligner = Aligner(torch.nn.Identity(), Units(("a", "b")))
    two = [pieces.Piece("de", start_s, 0.05, np.zeros((5, 80), np.float32)) for start_s in (0.1, 0.15)]
    (found,) = pieces.decode(two, Says(), aligner, longest_s=30)
    assert [(w.start_s, w.end_s) for piece in two for w in found[piece].words] == [(0.12, 0.15), (0.17, 0.2)]


def test_subtitles_of_timed_thai_have_spaces_where_its_text_has_them_only():
    text = "ปีนี้ ดี"
    words = tuple(Word(unit, i, i + 0.5, 1.0) for i, unit in enumerate(split(text)))
    segment = Segment(0.0, 5.0, text, -0.1, (), words)
    one = Transcript("a", 5.0, 1, "th", 0.9, "th", (), (segment,))
    assert [lines for *_, lines in parse_vtt(formats.vtt(one))] == [[text]]


def test_an_aligner_counts_only_for_the_checkpoint_that_it_was_trained_on(tmp_path):
    assert recipes._aligner_digest(tmp_path, (7,)) is None
    files.write_json(tmp_path / "aligner" / "settings.json", {"step": 7})
    digest = recipes._aligner_digest(tmp_path, (7,))
    assert digest and recipes._aligner_digest(tmp_path, (8,)) is None
    (tmp_path / "aligner" / ".lock").touch()  # as train-aligner leaves it, though it may have been stopped at once
    assert recipes._aligner_digest(tmp_path, (7,)) == digest
    assert recipes._aligner_digest(tmp_path, (7, 8)) is None


def test_json_leaves_words_out_until_they_are_known():
    tree = json.loads(formats.to_json(transcript("th")))
    assert tree["segments"][0]["text"] == SAID["th"].strip() and "words" not in tree["segments"][0]
    timed = json.loads(formats.to_json(transcript("th", words=(Word("a", 1, 2, 0.5),))))
    assert timed["segments"][0]["words"] == [{"text": "a", "start_s": 1, "end_s": 2, "confidence": 0.5}]


# Languages


@torch.no_grad()
def test_languages_are_detected_as_transformers_and_openai_whisper_would(tmp_path):
    torch.manual_seed(0)
    hf = WhisperForConditionalGeneration(WhisperConfig(
        vocab_size=51_865, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=80,
    )).eval()  # fmt: skip
    for parameter in hf.parameters():
        parameter.copy_(0.3 * torch.randn_like(parameter))
    hf.save_pretrained(tmp_path)
    detector = LanguageDetector.load(str(tmp_path))
    samples = speech(3.2)
    padded = whisper.log_mel_spectrogram(np.pad(samples, (0, 30 * RATE - len(samples))))
    theirs = hf(input_features=padded[None], decoder_input_ids=torch.tensor([[50_258]])).logits[0, 0]
    tokenizer = whisper.tokenizer.get_tokenizer(True)
    langs = {code: theirs[tokenizer.to_language_token(code)] for code in LANGUAGES}
    expected = dict(zip(langs, torch.stack([*langs.values()]).softmax(0).tolist(), strict=True))
    found = detector([log_mel(samples, 80)], list(LANGUAGES))
    assert found == pytest.approx(expected, abs=0.01) and list(found) == sorted(found, key=lambda x: -found[x])
    assert max(expected.values()) > 3 * min(expected.values())
    assert sum(detector([log_mel(samples, 80)] * 2, ["de", "xx", "en"]).values()) == pytest.approx(1)


def test_the_whisper_of_the_mini_recipe_has_its_decoder_and_needs_no_padding():
    folder = Path(__file__).parents[1] / "egs" / "multilingual12" / "pretrained" / "mini" / "whisper"
    detector = LanguageDetector.load(str(folder))
    assert set(detector.tokens) == set(LANGUAGES) and not detector.is_padded
    one, two = log_mel(speech(1.5), 80), log_mel(speech(1, 1), 80)
    each = [detector([x], list(LANGUAGES)) for x in (one, two)]
    weighted = {lang: (150 * each[0][lang] + 100 * each[1][lang]) / 250 for lang in LANGUAGES}
    assert detector([one, two], list(LANGUAGES)) == pytest.approx(weighted, abs=1e-5)


# Transcribing


class Run(NamedTuple):
    """A run directory with random weights, whose Whisper detects German, Thai or Chinese at random."""

    directory: Path

    def args(self, *rest) -> list[str]:
        return ["transcribe", "--model", str(self.directory), *map(str, rest)]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return Run(tiny_run.make(tmp_path_factory.mktemp("run")))


@pytest.fixture
def audio(tmp_path) -> Path:
    """Recordings of 2, 3.5 and 13 s, in a folder of their own."""
    folder = tmp_path / "audio"
    folder.mkdir()
    soundfile.write(folder / "a.flac", speech(2), RATE)
    soundfile.write(folder / "b.wav", np.stack([resample_poly(speech(3.5, 1), 3, 1)] * 2, axis=1), 48_000)
    pause = np.zeros(RATE, np.float32)
    soundfile.write(folder / "c.ogg", np.concatenate([x for i in range(4) for x in (speech(2.25, i), pause)]), RATE)
    return folder


def test_a_short_file_has_the_text_that_decoding_gives(run, audio, capsys):
    assert main(run.args("--language", "de", "--format", "json", audio / "a.flac")) == 0
    found = json.loads(capsys.readouterr().out)
    whole = recipes.load_run(run.directory)
    model = checkpoint.load_run(run.directory).merged("de")
    transcriber = Transcriber(model, whole.decoding)
    samples = soundfile.read(audio / "a.flac", dtype="float32")[0]
    (said,) = transcriber(transcriber.encode([log_mel(samples, 80)], ["de"], 30)[0], ["de"], [4])
    (segment,) = found["segments"]
    assert said.text and segment["text"] == said.text and segment["logprob"] == pytest.approx(said.logprob, abs=1e-4)
    assert (segment["start_s"], segment["end_s"], found["duration_s"]) == (0, 2, 2)
    assert found["language"] == "de" and set(found) == set(Transcript.__dataclass_fields__)


def test_a_folder_is_written_in_every_format_and_processes_change_nothing(run, audio, tmp_path, capsys):
    assert main(run.args("--format", "txt", "json", "srt", "vtt", "--out", tmp_path / "one", audio)) == 0
    said = capsys.readouterr().err
    assert "b.wav: 3.5 s" in said and "the mean of 2 channels" in said and "(probability 0." in said
    assert main(run.args("--nj", 2, "--format", "json", "txt", "--out", tmp_path / "two", audio)) == 0
    assert {p.name for p in (tmp_path / "one").glob("[!.]*")} == {
        f"{name}.{suffix}" for name in "abc" for suffix in ("txt", "json", "srt", "vtt")
    }
    for name in "abc":
        one, two = (files.read_json(tmp_path / folder / f"{name}.json") for folder in ("one", "two"))
        logprobs = [[segment.pop("logprob") for segment in found["segments"]] for found in (one, two)]
        assert one == two and np.allclose(*logprobs, atol=1e-4)
        parse_srt((tmp_path / "one" / f"{name}.srt").read_text())
    times = [(s["start_s"], s["end_s"]) for s in one["segments"]]
    assert len(times) > 1 and all(end - start <= 5 for start, end in times)


def test_folders_in_a_folder_are_written_into_such_and_skipped_when_done(run, audio, tmp_path, capsys):
    (audio / "b.wav").rename((audio / "sub").mkdir() or audio / "sub" / "a.wav")
    args = run.args("--language", "de", "--out", tmp_path / "out", audio)
    assert main(args) == 0
    out = tmp_path / "out"
    assert {str(p.relative_to(out)) for p in out.rglob("*.txt")} == {"a.txt", "c.txt", "sub/a.txt"}
    capsys.readouterr()
    assert main(args) == 0 and capsys.readouterr().err.count("complete") == 3


def test_inputs_of_one_name_are_not_written_over_each_other(run, audio, tmp_path, capsys):
    for folder, name in (("dev", "a.flac"), ("test", "b.wav")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "wav.scp").write_text(f"utt1 {audio / name}\n")
    out = tmp_path / "out"
    assert main(run.args("--language", "de", "--out", out, tmp_path / "dev", tmp_path / "test")) == 1
    assert "utt1: would be written over 'utt1'" in capsys.readouterr().err and not out.exists()


def test_a_process_that_is_killed_between_two_batches_is_named(run, audio, monkeypatch):
    def broken(*args):
        raise BrokenProcessPool

    monkeypatch.setattr(transcribe.ThreadPoolExecutor, "submit", broken)
    job = recipes.transcription_job(run.directory, recipes.load_run(run.directory), step=None, average=1, lang="de")
    found = transcribe.transcribe([inputs.Source("a", audio / "a.flac")], job, on_progress=lambda seconds: None)
    with pytest.raises(UserError, match="a decoding process was killed; lower --nj"):
        next(found)


def test_text_is_printed_in_one_line_for_each_input(run, audio, capsys):
    assert main(run.args("--format", "txt", audio / "a.flac", audio / "b.wav")) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == [str(audio / "a.flac"), str(audio / "b.wav")] and all(row[1] for row in rows)


def test_bad_inputs_cost_themselves_only(run, audio, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no ffmpeg
    paths = {kind: write_bad(tmp_path, kind) for kind in BAD}
    assert main(run.args("--out", tmp_path / "out", *paths.values(), audio / "a.flac")) == 1
    said = capsys.readouterr().err.splitlines()
    for kind, mistake in BAD.items():
        (line,) = (line for line in said if line.startswith(f"no transcript: {paths[kind]}: "))
        assert mistake in line
    last = said[-1]
    assert "7 of 8 inputs have no transcript" in last and all(str(path) in last for path in paths.values())
    assert (tmp_path / "out" / "a.txt").is_file() and not (tmp_path / "out" / "broken.txt").exists()


def test_a_name_that_is_not_unicode_costs_itself_only(run, audio, capfd):  # its stderr escapes, as a real one
    (audio / "b.wav").rename(audio / os.fsdecode(b"M\xfcller.wav"))
    assert main(run.args("--language", "de", "--out", audio / "out", audio)) == 1
    said = capfd.readouterr().err
    assert "ller.wav: not a name in UTF-8" in said and "1 of 3 inputs have no transcript" in said
    assert {path.name for path in (audio / "out").glob("*.txt")} == {"a.txt", "c.txt"}


def test_a_name_that_leaves_no_room_for_that_of_its_output_is_named(run, audio, capsys):
    long = (audio / "a.flac").rename(audio / f"{'ä' * 122}.flac")
    assert main(run.args("--language", "de", "--out", audio / "out", long)) == 1
    assert re.search("error: .*cannot be written .*too long", capsys.readouterr().err.splitlines()[-1])


def test_what_holds_no_speech_has_an_empty_transcript(run, tmp_path, capsys):
    noise = np.random.default_rng(0).normal(0, 0.1, 60 * RATE)
    for name, samples in {
        "tick": speech(0.01),
        "still": np.zeros(9 * RATE),
        "noise": noise,
        "hiss": noise[: 2 * RATE],
    }.items():
        soundfile.write(tmp_path / f"{name}.wav", samples, RATE)
    assert main(run.args("--format", "json", *sorted(tmp_path.glob("*.wav")))) == 0
    out, err = capsys.readouterr()
    for found in map(json.loads, out.splitlines()):
        assert found["flags"] == ["no_speech"] and found["language"] is None
        assert all(segment["flags"] == ["no_speech"] and not segment["text"] for segment in found["segments"])
    assert len(out.splitlines()) == 4 and err.count("no speech") == 4
    assert main(run.args("--language", "de", tmp_path / "still.wav")) == 0 and "no speech" in capsys.readouterr().err


class Detector:
    """Says German, and how sure it is."""

    tokens = {"de": 1, "th": 2}

    def __init__(self, probability):
        self.probability = probability

    def __call__(self, features, langs):
        self.heard_s = sum(map(len, features)) / 100
        return {"de": self.probability, "th": 1 - self.probability}


@pytest.mark.parametrize("probability, is_doubted", [(0.9, True), (0.7, False)])
def test_a_given_language_is_obeyed_and_doubted(run, audio, capsys, monkeypatch, probability, is_doubted):
    detector = Detector(probability)
    monkeypatch.setattr(transcribe, "load_detector", lambda *args, **kwargs: detector)
    assert main(run.args("--language", "th", "--format", "json", audio / "c.ogg")) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["language"], found["detected_language"]) == ("th", "de") and 9 <= detector.heard_s <= 13
    assert ("language_doubt" in found["flags"]) == is_doubted == ("Whisper is sure that it is 'de'" in err)
    assert found["language_probability"] == pytest.approx(1 - probability)
    assert main(run.args("--format", "json", audio / "c.ogg")) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["language"], found["flags"]) == ("de", [])


def test_without_a_detector_the_language_has_to_be_named(run, audio, capsys, monkeypatch):
    def load(name, device):
        raise UserError(f"{name}: lacks 9 tensors")

    monkeypatch.setattr(LanguageDetector, "load", load)
    assert main(run.args(audio / "a.flac")) == 1
    assert re.search(
        "no language can be detected: .*lacks 9 tensors; name it, as in --language de", capsys.readouterr().err
    )
    assert main(run.args("--language", "de", "--format", "json", audio / "a.flac")) == 0
    assert json.loads(capsys.readouterr().out)["language_probability"] is None


def test_what_is_done_is_skipped_until_audio_or_settings_change(run, audio, tmp_path, capsys, monkeypatch):
    args = run.args("--language", "de", "--out", tmp_path / "out", audio)
    done = []
    real = transcribe.transcribe

    def stopped(sources, *rest, **more):
        for source, found in real(sources, *rest, **more):
            if len(done) == 1:
                raise KeyboardInterrupt
            done.append(source.name)
            yield source, found

    with monkeypatch.context() as patch:
        patch.setattr(transcribe, "transcribe", stopped)
        assert main(args) == 130 and done == [str(audio / "a.flac")]
    first = (tmp_path / "out" / "a.txt").stat().st_mtime_ns
    assert main(args) == 0 and "a.flac: complete" in capsys.readouterr().err
    assert (tmp_path / "out" / "a.txt").stat().st_mtime_ns == first
    with monkeypatch.context() as patch:
        patch.setattr(transcribe, "transcribe", lambda *args, **kwargs: pytest.fail("all is done"))
        assert main(args) == 0 and capsys.readouterr().err.count("complete") == 3
    soundfile.write(audio / "b.wav", speech(1), RATE)
    assert main(args) == 0 and capsys.readouterr().err.count("complete") == 2
    assert main([*args, "decoding.min_max_tokens=2"]) == 0 and "complete" not in capsys.readouterr().err
    assert main([*args, "--format", "txt", "srt"]) == 0 and "complete" not in capsys.readouterr().err


def test_what_is_half_written_with_other_settings_is_not_done_with_the_old_ones(run, audio, capsys, monkeypatch):
    args = run.args("--language", "de", "--format", "txt", "json", "--out", audio / "out", audio / "a.flac")
    assert main(args) == 0
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setitem(formats.FORMATS, "json", lambda found: 1 / 0)  # as if it were killed there
        main([*args, "decoding.min_max_tokens=2"])
    assert main(args) == 0 and "complete" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, said",
    [
        (["--format", "sbv", "x.wav"], "--format: 'sbv' is unknown; known: txt, json"),
        (["--format", "ctm", "--out", "out", "x.wav"], "has no aligner of these weights; run zipperasr train-aligner"),
        (["--language", "xx", "x.wav"], "unknown language 'xx'"),
        (["--format", "txt", "srt", "a.wav"], "one format can be printed"),
        (["--format", "srt", "a.wav", "b.wav"], "name a directory with --out"),
        (["--out", "out", "x/a.wav", "y/a.flac"], "would be written over 'x/a.wav'"),
        (["--out", "/dev/null", "a.wav"], "a file, not a directory"),
        (["--out", "/dev/null/out", "a.wav"], "cannot be written (Not a directory)"),
        (["--out", "/proc/out", "a.wav"], "--out /proc/out: cannot be written"),
        (["decoding.beam=0", "a.wav"], "decoding.beam"),
        ([], "nothing to transcribe"),
        (["--step", "3", "a.wav"], "no checkpoint at step 3"),
        (["a.wav"], "no such file"),
    ],
)
def test_mistakes_are_one_line(run, capsys, args, said):
    assert main(run.args(*args)) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if said in line]
    assert len(errors) == 1 and errors[0].startswith("zipperasr: error: ")


def test_a_directory_that_is_no_run_is_named(tmp_path, capsys):
    assert main(["transcribe", "--model", str(tmp_path), "a.wav"]) == 1
    assert f"{tmp_path}: no run" in capsys.readouterr().err


def test_a_long_file_is_never_whole_in_memory(run):
    """Pieces come while the file is read: after the first, little more than a minute has been."""
    num_read = 0

    def blocks():
        nonlocal num_read
        for i in range(120):
            num_read += 1
            yield np.concatenate([speech(29, i), np.zeros(RATE, np.float32)])

    pieces = segments.cut(blocks(), max_s=25, **PAUSES)
    with contextlib.closing(pieces):
        next(pieces)
        assert num_read <= 3

"""Trees of the five real corpora in their exact layouts: a few short utterances each, and the defects that they have.

Speech is synthesised (noise where the mini extra is not installed) and cut to the seconds that are asked for. Where an
id is genuine, its real recording lies there if the folder of real recordings is beside the checkout.
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import mls
import numpy as np
import soundfile
from scipy.signal import resample_poly

REPOSITORY = Path(__file__).resolve().parents[1]
REAL = REPOSITORY.parent / "shared" / "data" / "speech"
sys.path.insert(0, str(REPOSITORY / "local"))

CV_COLUMNS = (
    "client_id path sentence_id sentence sentence_domain up_votes down_votes age gender accents variant locale segment"
).split()


@dataclass(frozen=True)
class Speech:
    """A recording to make: `text` in `lang`, cut to `seconds`; sampling rate in Hz. `real` is a genuine one's name."""

    path: Path
    lang: str
    text: str
    seconds: float
    rate: int = 16000
    channels: int = 1
    real: str | None = None


def librispeech(root: Path) -> Path:
    """LibriSpeech with all parts but train-clean-360; train has empty texts and four kinds of bad audio."""
    here = root / "LibriSpeech"
    record(
        chapter(here / "train-clean-100", "103-1240", ["ONE FINE DAY", "", "NOBODY", "HALF A WORD", "NOTHING AT ALL"])
        + chapter(here / "train-other-500", "20-205", ["SHE SAID SO", "TWICE"], crlf=True)
        + chapter(here / "dev-clean", "2412-153948", ["IF THE READER WILL EXCUSE ME"], seconds=11.66, real=True)
        + chapter(here / "dev-other", "116-288045", ["AS I APPROACHED"])
        + chapter(here / "test-clean", "61-70968", ["HE BEGAN A CONFUSED COMPLAINT"], seconds=4.905, real=True)
        + chapter(here / "test-other", "367-130732", ["LOBSTERS AND LOBSTERS"])
    )
    bad = here / "train-clean-100" / "103" / "1240"
    (bad / "103-1240-0002.flac").unlink()
    cut(bad / "103-1240-0003.flac")
    (bad / "103-1240-0004.flac").write_bytes(b"")
    mls.noise(here / "train-other-500/20/205/20-205-0001.flac", seconds=1.2, format="WAV")
    return root


def chapter(
    part: Path, name: str, texts: list[str], *, seconds: float = 1.2, real: bool = False, crlf: bool = False
) -> list[Speech]:
    """Write a chapter's transcripts, with an empty line at the end; its audio is returned, to be recorded.

    With `crlf` the transcripts are as Windows writes them, with a byte order mark.
    """
    folder = part.joinpath(*name.split("-"))
    lines = [f"{name}-{number:04} {text}" for number, text in enumerate(texts)]
    end = "\r\n" if crlf else "\n"
    put(folder / f"{name}.trans.txt", "\ufeff" * crlf + "".join(line + end for line in [*lines, ""]))
    ids = [line.split()[0] for line in lines]
    return [
        Speech(folder / f"{utt_id}.flac", "en", text or "silence", seconds, real=f"en/{utt_id}.flac" if real else None)
        for utt_id, text in zip(ids, texts)
    ]


def multilingual_librispeech(root: Path) -> Path:
    """German as flac and as opus, Spanish as opus only; German training lines are doubled, broken or not UTF-8."""
    clips = []
    for folder, suffix in (("mls_german", ".flac"), ("mls_german_opus", ".opus")):
        where = root / folder
        clips += split(where / "train", "de", {"1_10_000000": "eins zwei", "1_10_000001": "zwölf drei"}, suffix=suffix)
        clips += split(where / "dev", "de", {"2_20_000000": "vier fünf"}, suffix=suffix)
        clips += split(where / "test", "de", {"3_30_000000": "sechs sieben"}, suffix=suffix)
    with open(root / "mls_german" / "train" / "transcripts.txt", "ab") as lines:
        lines.write(b"1_10_000000\teins zwei\n" + "1_10_000002\tfünf\n".encode("latin-1") + b"oddity\tacht\n")
    clips.append(Speech(root / "mls_german/train/audio/1/10/1_10_000002.flac", "de", "fünf", 1.2))
    where, real = root / "mls_spanish_opus", {"13697_11991_000000": "la sorpresa y el disgusto"}
    clips += split(where / "train", "es", real, suffix=".opus", seconds=14.85, real="es/13697_11991_000000.opus")
    clips += split(where / "dev", "es", {"4_40_000000": "uno dos"}, suffix=".opus")
    clips += split(where / "test", "es", {"5_50_000000": "tres cuatro"}, suffix=".opus")
    record(clips)
    return root


def split(
    folder: Path, lang: str, texts: dict[str, str], *, suffix: str, seconds: float = 1.2, real: str | None = None
) -> list[Speech]:
    """Write the text files of one split; its audio is returned, to be recorded."""
    put(folder / "transcripts.txt", "".join(f"{utt_id}\t{text}\n" for utt_id, text in texts.items()))
    url = "https://example.org/book.mp3"
    put(folder / "segments.txt", "".join(f"{utt_id}\t{url}\t0.00\t{seconds}\n" for utt_id in texts))
    put(folder.parent / "metainfo.txt", " SPEAKER   |   GENDER   | PARTITION  |  MINUTES   |  BOOK ID   | TITLE\n")
    return [
        Speech(folder.joinpath("audio", *utt_id.split("_")[:2], utt_id + suffix), lang, text, seconds, real=real)
        for utt_id, text in texts.items()
    ]


def common_voice(root: Path) -> Path:
    """Japanese: training rows doubled, quoted, stereo and of 8 kHz; bad audio and a short row in `other`."""
    here = root / "cv-corpus-18.0-2024-06-14" / "ja"
    train = {24511055: "真っ昼間なのに", 10000001: '彼は"はい', 10000002: "右と左", 10000003: "電話の声"}
    dev, test = {10000010: "開発。"}, {10000020: "試験、"}
    validated = train | dev | test | {10000030: "検証", 10000031: "再検証"}
    other = {10000040: "その他", 10000041: "行方不明", 10000042: "空", 10000043: "途中まで"}
    tables = {"train": train, "dev": dev, "test": test, "validated": validated, "invalidated": {10000050: "無効"}}
    for name, rows in tables.items():
        put(here / f"{name}.tsv", cv_table(rows))
    with open(here / "train.tsv", "a", encoding="utf-8") as table:
        table.write(cv_table(train).splitlines()[2] + "\n")
    put(here / "other.tsv", "\ufeff" + (cv_table(other) + "short\tcommon_voice_ja_1.mp3\n").replace("\n", "\r\n"))
    special = {10000002: {"channels": 2, "rate": 48000}, 10000003: {"rate": 8000}}
    special[24511055] = {"seconds": 6.516, "real": "ja/common_voice_ja_24511055.mp3"}
    clips = {n: here / "clips" / f"common_voice_ja_{n}.mp3" for n in validated | other | tables["invalidated"]}
    plain = {"seconds": 1.2, "rate": 32000}
    record([Speech(path, "ja", "こんにちは", **plain | special.get(n, {})) for n, path in clips.items()])
    clips[10000041].unlink()
    clips[10000042].write_bytes(b"")
    cut(clips[10000043])
    return root


def cv_table(sentences: dict[int, str]) -> str:
    """A table of Common Voice 18.0, header included."""
    rows = [
        (f"speaker{number % 7}", f"common_voice_ja_{number}.mp3", f"{number:064x}", sentence, "", "2", "0", *[""] * 6)
        for number, sentence in sentences.items()
    ]
    return "".join("\t".join(row) + "\n" for row in (CV_COLUMNS, *rows))


def wenetspeech(root: Path) -> Path:
    """Long opus files, durations wrong: blank texts, segments beyond the audio or without an end, a missing file."""
    podcast, youtube = "audio/train/podcast/B00000", "audio/train/youtube/B00000"
    everywhere, large = ["L", "M", "S"], ["L"]
    talk = [
        (0.2, 1.7, "不惜在这种试验中", everywhere),
        (2.0, 3.5, "", everywhere),
        (3.5, 4.0, "　", large),
        (5.0, 6.3, "毁灭自己ＡＢ", large),
        (8.0, 9.5, "没有声音", large),
        (0.0, 0.2, "弱标签", []),
        (4.0, None, "没有结尾", large),
    ]
    meeting = "audio/test_meeting/meeting/B00000/TEST_MEETING_T0000000001.opus"
    net = "audio/test_net/youtube/B00000/TEST_NET_Y0000000000_-KTKHdZ2fb8.opus"
    dev = [(0.0, 1.5, "开发集", ["DEV"]), (1.5, 3.25, "第二句", ["DEV"])]
    audios = [
        long_recording(f"{podcast}/X0000000000_100638174.opus", 9.9, talk),
        long_recording(f"{youtube}/Y0000000000_--5llN02F84.opus", 3.0, [(0.5, 2.0, "失踪的文件", large)]),
        long_recording("audio/dev/youtube/B00000/DEV_T0000000000.opus", 0.1, dev),
        long_recording(net, 6.0, [(1.0, 2.5, "网络", ["TEST_NET"])]),
        long_recording(meeting, 6.0, [(2.5, 4.0, "会议", ["TEST_MEETING"])]),
    ]
    put(root / "WenetSpeech.json", json.dumps({"audios": audios}, ensure_ascii=False, indent=4))
    record([Speech(root / audio["path"], "zh", "今天天气很好我们去公园", 6.0) for audio in audios])
    (root / audios[1]["path"]).unlink()
    return root


def long_recording(path: str, duration: float, segments: list[tuple[float, float | None, str, list[str]]]) -> dict:
    """An entry of WenetSpeech.json; a segment without an end has no such key."""
    aid, entries = Path(path).stem, []
    for number, (begin, end, text, subsets) in enumerate(segments):
        times = {"begin_time": begin} | ({} if end is None else {"end_time": end})
        entries.append({"sid": f"{aid}_S{number:05}", **times, "text": text, "confidence": 1.0, "subsets": subsets})
    return {"aid": aid, "duration": duration, "md5": "0" * 32, "path": path, "segments": entries, "tags": []}


def msr86k(root: Path) -> Path:
    """English as long recordings, some ids with the language's name before them; Thai with a file an utterance."""
    aid = "EN_000000001__lEC6Rsur11E"
    english = {"train": [f"{aid}_19", f"English-{aid}_20", "19"], "dev": ["EN_000000002_XYZ_1"]}
    thai = {"train": ["TH_000000029_184", "TH_000000029_185"], "dev": ["TH_000000030_1"]}
    clips = []
    for part, sids in english.items():
        recording = sids[0].rpartition("_")[0]
        put(root / "English" / f"{part}.json", msr_list({recording: sids}, text="hello there"))
        clips.append(Speech(root / "English" / "audio" / part / f"{recording}.wav", "en", "hello there all", 5.0))
    for part, sids in thai.items():
        put(root / "Thai" / f"{part}.json", msr_list({sids[0].rpartition("_")[0]: sids}, text="สวัสดี", bom="\ufeff"))
        clips += [Speech(root / "Thai" / "audio" / part / f"{sid}.wav", "th", "สวัสดีครับ", 1.2) for sid in sids]
    record(clips)
    return root


def msr_list(recordings: dict[str, list[str]], *, text: str, bom: str = "") -> str:
    """A list of MSR-86K; the segments of a recording are 1.5 s long and follow each other."""
    audios = [
        {
            "aid": aid,
            "segments": [
                {"sid": sid, "begin_time": 1.5 * number, "end_time": 1.5 * (number + 1), "text_tn": f"{text} {number}"}
                for number, sid in enumerate(sids)
            ],
        }
        for aid, sids in recordings.items()
    ]
    return bom + json.dumps({"audios": audios})


def put(path: Path, text: str) -> None:
    """Write a text file as it is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")


def cut(path: Path) -> None:
    """Leave the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def record(clips: list[Speech]) -> None:
    """Make recordings, in the format that each one's suffix says."""
    for clip, samples in zip(clips, spoken(clips)):
        clip.path.parent.mkdir(parents=True, exist_ok=True)
        if clip.real and (REAL / clip.real).is_file():
            shutil.copy(REAL / clip.real, clip.path)
            continue
        samples = np.resize(samples, round(clip.seconds * 16000))
        samples = resample_poly(samples, clip.rate, 16000)[: round(clip.seconds * clip.rate)]
        kwargs = {"format": "OGG", "subtype": "OPUS"} if clip.path.suffix == ".opus" else {}
        soundfile.write(clip.path, np.stack([samples] * clip.channels, axis=1), clip.rate, **kwargs)


def spoken(clips: list[Speech]) -> list[np.ndarray]:
    """What is said in each recording: float [T] at 16 kHz, of any length."""
    try:
        import mini_speech
        import soxr  # noqa: F401
    except ImportError:
        return [np.random.default_rng(number).normal(0, 0.1, 16000) for number in range(len(clips))]
    voice = mini_speech.speaker(1, "train", "read")
    utterances = [mini_speech.Utterance(c.lang, c.text, voice, "read", seed=number) for number, c in enumerate(clips)]
    return [samples / 2**15 for samples in mini_speech.synthesise_all(utterances)]

"""Bad input: each kind is found when a corpus is prepared, and dropped, fixed or kept by its rule; all is counted."""

import csv
import os
import tracemalloc
from pathlib import Path

import mls
import pytest
from test_manifests import prepare_clips

from zipperasr.data import defects, manifests
from zipperasr.data.prepare import Clip, Rejected, read_lines
from zipperasr.errors import UserError


def outcome(data_dir, row: Clip | Rejected, *, name: str = "a_de_train") -> tuple[list[str], dict[str, int]]:
    """The ids that are kept of a sound utterance and `row`, and the defects counted."""
    sound = Clip("sound", mls.noise(data_dir / "sound.flac"), "de", "text")
    prepare_clips(data_dir, name, [sound, row])
    tally = defects.read_tally(manifests.tally_path(manifests.path_of(data_dir, name)))
    kept = [cut["id"] for cut in manifests.read(manifests.path_of(data_dir, name))]
    assert (tally.num_in, tally.num_kept) == (2, len(kept))
    assert kept[0] == "sound"
    return kept[1:], tally.kinds


def clip(path: Path, text: str = "text", **more) -> Clip:
    return Clip(**{"id": "utt", "path": path, "lang": "de", "text": text} | more)


def truncated(path: Path) -> Path:
    mls.noise(path)
    os.truncate(path, path.stat().st_size // 2)
    return path


def empty(path: Path) -> Path:
    path.touch()
    return path


def not_audio(path: Path) -> Path:
    path.write_bytes(b"RIFF but not really" * 100)
    return path


DROPPED = {
    "missing audio": lambda d: clip(d / "nowhere.flac"),
    "unreadable audio": lambda d: clip(not_audio(d / "x.wav")),
    "truncated audio": lambda d: clip(truncated(d / "x.flac")),
    "too short": lambda d: clip(mls.noise(d / "x.wav", seconds=0)),
    "segment outside its audio": lambda d: clip(mls.noise(d / "x.wav", seconds=2), start_s=1.0, end_s=2.6),
    "bad row": lambda d: clip(mls.noise(d / "x.wav"), id=" "),
    "not UTF-8": lambda d: clip(mls.noise(d / "x.wav"), text="caf\udce9"),
    "duplicate id": lambda d: clip(mls.noise(d / "x.wav"), id="sound"),
}


@pytest.mark.parametrize("kind", DROPPED)
def test_what_cannot_be_used_is_dropped_from_training_material_and_fatal_in_a_test_set(tmp_path, kind):
    assert outcome(tmp_path, DROPPED[kind](tmp_path)) == ([], {kind: 1})
    assert outcome(tmp_path, DROPPED[kind](tmp_path), name="a_de_test") == ([], {kind: 1})
    fatal = {
        name: [d.kind for d in defects.read_tally(manifests.tally_path(manifests.path_of(tmp_path, name))).fatal(name)]
        for name in ("a_de_train", "a_de_test")
    }
    lost_audio = kind in ("missing audio", "unreadable audio", "truncated audio")  # half of two: not copied whole
    assert fatal == {
        "a_de_train": ["incomplete corpus"] * lost_audio,
        "a_de_test": [kind],
    }


@pytest.mark.parametrize(
    "make",
    [
        lambda d: empty(d / "x.wav"),
        lambda d: empty(d / "x.mp3"),
        lambda d: d,
    ],
)
def test_an_empty_file_or_a_folder_is_no_audio(tmp_path, make):
    kept, kinds = outcome(tmp_path, clip(make(tmp_path)))
    assert kept == [] and set(kinds) <= {"unreadable audio", "missing audio"}


@pytest.mark.parametrize("text", ["", " \t\u3000", "...", "«!»"])
def test_an_utterance_without_words_is_dropped_everywhere(tmp_path, text):
    row = clip(mls.noise(tmp_path / "x.wav"), text)
    for name in ("a_de_train", "a_de_test"):
        assert outcome(tmp_path, row, name=name) == ([], {"empty text": 1})
        tally = defects.read_tally(manifests.tally_path(manifests.path_of(tmp_path, name)))
        assert tally.fatal(name) == []


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (lambda d: clip(mls.noise(d / "x.wav", channels=2)), "several channels"),
        (lambda d: clip(mls.noise(d / "x.wav", rate=8000)), "below 16 kHz"),
        (lambda d: clip(mls.noise(d / "x.wav", rate=12345)), "odd sampling rate"),
        (lambda d: clip(mls.noise(d / "x.wav", format="FLAC")), "wrong extension"),
        (lambda d: clip(mls.noise(d / "x.wav"), 'he said "no'), "unbalanced quote"),
        (lambda d: clip(mls.noise(d / "x.wav", seconds=2), start_s=0.5, end_s=2.4), "segment shortened to its audio"),
    ],
)
def test_what_can_be_used_is_kept_and_said(tmp_path, row, kind):
    assert outcome(tmp_path, row(tmp_path)) == (["utt"], {kind: 1})


def test_over_30_s_is_dropped_in_training_and_kept_for_testing(tmp_path):
    row = clip(mls.noise(tmp_path / "x.wav", seconds=30.5))
    assert outcome(tmp_path, row) == ([], {"over 30 s": 1})
    assert outcome(tmp_path, row, name="a_de_test") == (["utt"], {"over 30 s": 1})


def test_ids_are_made_safe_for_files_and_kaldi(tmp_path):
    assert outcome(tmp_path, clip(mls.noise(tmp_path / "x.wav"), id="a/b c")) == (["a_b_c"], {"unsafe id": 1})


def test_the_same_row_twice_is_a_duplicate_row(tmp_path):
    path = mls.noise(tmp_path / "sound.flac")
    assert outcome(tmp_path, Clip("sound", path, "de", "text"), name="a_de_test") == ([], {"duplicate row": 1})


def test_a_segment_lies_where_its_times_say(tmp_path):
    row = clip(mls.noise(tmp_path / "long.wav", seconds=3), start_s=0.5, end_s=1.75)
    outcome(tmp_path, row)
    _, cut = manifests.read(manifests.path_of(tmp_path, "a_de_train"))
    assert (cut["start"], cut["duration"], cut["recording"]["duration"]) == (0.5, 1.25, 3.0)
    assert (cut["supervisions"][0]["start"], cut["supervisions"][0]["duration"]) == (0.0, 1.25)
    samples = manifests.to_cut(cut).load_audio()
    whole = mls.soundfile.read(tmp_path / "long.wav", dtype="float32")[0]
    assert (samples[0] == whole[8000:28000]).all()


def test_marks_and_returns_of_a_file_are_taken_off_and_counted(tmp_path):
    table = tmp_path / "table.txt"
    table.write_bytes("\ufeffeins\r\nzwei\r\n".encode())
    assert [line.strip() for line in read_lines(table)] == ["eins", "zwei"]
    sound = Clip("sound", mls.noise(tmp_path / "sound.flac"), "de", "text\r")
    prepare_clips(tmp_path, "a_de_train", [sound], sources=[table])
    (cut,) = manifests.read(manifests.path_of(tmp_path, "a_de_train"))
    assert cut["supervisions"][0]["text"] == "text"
    tally = defects.read_tally(manifests.tally_path(manifests.path_of(tmp_path, "a_de_train")))
    assert tally.kinds == {"byte order mark": 1, "carriage returns": 1}


def test_bytes_of_another_encoding_cost_one_row_and_not_the_file(tmp_path):
    (tmp_path / "table.txt").write_bytes(b"eins\n" + "caf\xe9\n".encode("latin-1") + b"drei\n")
    assert list(read_lines(tmp_path / "table.txt")) == ["eins", "caf\udce9", "drei"]


def test_every_defect_is_named_in_a_table_that_csv_reads(tmp_path):
    rows = [Clip(f"u{i}", tmp_path / f"no\ttab {i}.wav", "de", "text") for i in range(7)]
    rows += [Rejected("odd\udcff", "bad row", 'a "quote'), Clip("ok", mls.noise(tmp_path / "ok.wav"), "de", "text")]
    prepare_clips(tmp_path, "a_de_train", rows)
    with open(tmp_path / "manifests/a_de_train_defects.tsv", encoding="utf-8", newline="") as stream:
        table = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE, escapechar="\\"))
    assert [(row["id"], row["rule"], row["defect"]) for row in table] == [
        *((f"u{i}", "dropped", "missing audio") for i in range(7)),
        ("odd\\xff", "dropped", "bad row"),
    ]
    tally = defects.read_tally(manifests.tally_path(manifests.path_of(tmp_path, "a_de_train")))
    assert tally.named("missing audio") == "u0, u1, u2, u3, u4 and 2 more"
    report = " ".join(defects.report({"a_de_train": tally}).split())  # columns are as wide as their content
    assert "| a_de_train | 9 | 1 | 8 | 0 | 0.000 |" in report
    assert "| a_de_train | missing audio | dropped | 7 | u0, u1, u2, u3, u4 and 2 more |" in report


def test_a_set_without_a_row_and_a_source_that_is_not_there_are_errors(tmp_path):
    with pytest.raises(UserError, match="a_de_train: the corpus holds no utterance of it"):
        prepare_clips(tmp_path, "a_de_train", [])
    with pytest.raises(UserError, match="gone.txt: cannot be read .*; mend the corpus"):
        prepare_clips(tmp_path, "a_de_train", [], sources=[tmp_path / "gone.txt"])
    assert not list((tmp_path / "manifests").glob("*.gz"))


def test_an_interrupted_preparation_leaves_the_manifest_of_before(tmp_path):
    outcome(tmp_path, clip(mls.noise(tmp_path / "x.wav")))
    before = manifests.path_of(tmp_path, "a_de_train").read_bytes()
    (tmp_path / "manifests" / manifests.marker("a_de_train")).unlink()

    class Stop(Exception):
        pass

    def rows():
        yield clip(tmp_path / "x.wav")
        raise Stop

    with pytest.raises(Stop):
        prepare_clips(tmp_path, "a_de_train", rows())
    assert manifests.path_of(tmp_path, "a_de_train").read_bytes() == before
    assert not [
        path for path in (tmp_path / "manifests").iterdir() if path.name.startswith(".") and "done" not in path.name
    ]


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    path = mls.noise(tmp_path / "x.wav", seconds=0.1)
    peaks = []
    for count in (1000, 5000):
        (tmp_path / "manifests" / manifests.marker("a_de_train")).unlink(missing_ok=True)
        tracemalloc.start()
        prepare_clips(tmp_path, "a_de_train", (clip(path, id=f"utt{i}") for i in range(count)))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 4000 * 60, peaks  # bytes an utterance: a hash, and what numpy makes of it

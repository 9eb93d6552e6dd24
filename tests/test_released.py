"""Released lists: found by folder and language, read as they stand, and held against the manifests."""

import argparse
import csv
import shutil
import subprocess
from pathlib import Path

import pytest

from zipperasr import files, languages
from zipperasr.cli import data, recipe
from zipperasr.data import lists, manifests, released
from zipperasr.data.lists import ListsSettings
from zipperasr.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "egs" / "multilingual12" / "conf"
GENUINE = ROOT.parent / "shared" / "data" / "released_lists"
MLS = {"mls_de_train": (238943, 238943), "mls_fr_train": (239835, 239835), "mls_it_train": (119246, 59623)}
TESTS = {
    "commonvoice_ar_test": (3311, 3049),
    "commonvoice_ja_test": (2792, 2461),
    "commonvoice_th_test": (2929, 2741),
    "commonvoice_ko_test": (664, 332),
}
COUNTS = {  # lines, distinct ids
    "target_1h": {
        "commonvoice_ar_train": (826, 826),
        "commonvoice_ja_train": (739, 739),
        "commonvoice_ko_train": (599, 599),
        "commonvoice_pt_train": (729, 729),
        "commonvoice_pt_test": (688, 688),
        **MLS,
        **TESTS,
    },
    "target_30h": {
        "commonvoice_ar_train": (26621, 25547),
        "commonvoice_ja_train": (22631, 22608),
        "commonvoice_ko_train": (3969, 3108),
        "mls_pt_train": (7481, 7481),
        **MLS,
        **TESTS,
    },
}
SECONDS = {  # of each utterance, such that lists last as long as the genuine ones: hours by lines
    "mls_de": 1000 * 3600 / 238943,
    "mls_fr": 1000 * 3600 / 239835,
    "mls_it": 495 * 3600 / 119246,
    "mls_pt": 32 * 3600 / 7481,
    "commonvoice_ar": 30.8 * 3600 / 26621,
    "commonvoice_ja": 30.2 * 3600 / 22631,
    "commonvoice_ko": 6.4 * 3600 / 3969,
    "commonvoice_pt": 0.83 * 3600 / 729,
    "commonvoice_th": 3.4 * 3600 / 2929,
}


def manifest(data_dir: Path, name: str, ids, duration_s: float = 3.0) -> None:
    manifests.write(manifests.path_of(data_dir, name), ({"id": utt_id, "duration": duration_s} for utt_id in ids))


def ids_of(start: int, end: int) -> list[str]:
    return [f"common_voice_ko_{i}" for i in range(start, end)]


def put(path: Path, ids, *, end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{utt_id}{end}" for utt_id in ids).encode())
    return path


@pytest.fixture
def data_dir(tmp_path) -> Path:
    """Manifests of Common Voice Korean: 20 ids each of train, dev, test and other."""
    for i, split in enumerate(("train", "dev", "test", "other")):
        manifest(tmp_path / "data", f"commonvoice_ko_{split}", ids_of(20 * i, 20 * i + 20))
    return tmp_path / "data"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A training list, one id twice and two in another split, and a test list, under the names that were released."""
    train = [*ids_of(0, 5), *ids_of(60, 62), *ids_of(3, 4)]
    put(tmp_path / "released/deep/train/lite_30h/common-voice/train_com_voice_ko_ids.txt", train)
    put(tmp_path / "released/deep/test/lite_30h/commo-voice/ko_test.txt", ids_of(40, 45))
    return tmp_path / "released"


TRAIN = "train/lite_30h/common-voice/train_com_voice_ko_ids.txt"
TEST = "test/lite_30h/commo-voice/ko_test.txt"


def settings(folder: Path | None, parts: dict | None = None, **how) -> ListsSettings:
    parts = parts or {"train": {"commonvoice_ko_train": 1}, "test": {"commonvoice_ko_test": None}}
    given = {"dir": folder, "folders": {"here": "lite_30h"}, **how}
    return ListsSettings.model_validate({"settings": {"here": parts}, "released": given})


def named(data_dir: Path) -> list[list[str]]:
    """The rows of REPORT.tsv."""
    with open(data_dir / "lists/here/REPORT.tsv", encoding="utf-8", newline="") as stream:
        return list(csv.reader(stream, delimiter="\t"))[1:]


def rows_of(data_dir: Path, path: str) -> list[list[str]]:
    """The rows of a list in the tables of REPORT.md."""
    report = (data_dir / "lists/here/REPORT.md").read_text(encoding="utf-8").splitlines()
    cells = ([cell.strip() for cell in line.split("|")[1:-1]] for line in report)
    return [row[1:] for row in cells if row and row[0] == path]


def test_a_released_list_is_written_in_its_order_with_its_repeats(data_dir, folder):
    train, test = lists.write(data_dir, settings(folder))["here"]
    there = data_dir / "lists/here"
    for one, where in ((train, TRAIN), (test, TEST)):
        assert (there / one.path).read_bytes() == (folder / "deep" / where).read_bytes()
        assert (one.match.name, one.match.sha256) == (where, files.sha256(folder / "deep" / where))
    assert (train.num_utts, train.num_unique, train.duration_s) == (8, 7, 24)
    assert str(train).endswith(".txt: 8 utterances, 0.007 h, released, 7 of 7 ids found, 1 of them repeats")
    origin, numbers = rows_of(data_dir, train.path)
    assert origin[:5] == [f"released {TRAIN}", "1", "0.007", "8", "7"]
    lies_in = "5 commonvoice_ko_train, 2 commonvoice_ko_other"
    assert numbers == ["8", "7", "1", "7", "0", "0", "0.007", lies_in, "–", train.match.sha256]
    assert named(data_dir) == []
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=there, check=True, capture_output=True)


def test_missing_ids_are_left_out_counted_and_named(data_dir, folder):
    put(folder / "deep" / TEST, ["gone_1", *ids_of(40, 45), "gone_1", "gone_2"])
    _, test = lists.write(data_dir, settings(folder))["here"]
    assert lists.read(data_dir / "lists/here" / test.path) == ids_of(40, 45)
    assert "5 utterances, 0.004 h, released, 5 of 7 ids found" in str(test)
    assert rows_of(data_dir, test.path)[1][:7] == ["8", "7", "1", "5", "2", "0", "0.004"]
    assert named(data_dir) == [[test.path, utt_id, "missing"] for utt_id in ("gone_1", "gone_2")]


def test_a_list_of_another_corpus_is_an_error_with_ids_of_both(data_dir, folder):
    put(folder / "deep" / TEST, ["Korean-KO_1", "Korean-KO_2", *ids_of(40, 41)])
    message = "ko_test.txt: 2 of its 3 ids .* such as Korean-KO_1, Korean-KO_2; the manifests have common_voice_ko_40, "
    with pytest.raises(UserError, match=message):
        lists.write(data_dir, settings(folder))
    assert not (data_dir / "lists/here").exists()


@pytest.mark.parametrize(("overlap", "trained"), [("keep", [0, 1, 40, 41, 40]), ("drop", [0, 1])])
def test_ids_released_for_training_and_testing_are_named_and_kept_or_dropped(data_dir, folder, overlap, trained):
    put(folder / "deep" / TRAIN, [f"common_voice_ko_{i}" for i in (0, 1, 40, 41, 40)])
    train, _ = lists.write(data_dir, settings(folder, overlap=overlap))["here"]
    assert lists.read(data_dir / "lists/here" / train.path) == [f"common_voice_ko_{i}" for i in trained]
    assert train.num_unique == len(set(trained)) and train.duration_s == 3 * len(trained)
    where = "also in test/commonvoice_ko_test.txt"
    assert named(data_dir) == [[train.path, utt_id, where] for utt_id in ids_of(40, 42)]
    assert f"2 ids are held out as well: {'kept' if overlap == 'keep' else 'dropped'}" in str(train)


def test_windows_line_ends_blank_lines_and_a_byte_order_mark_are_mended_and_counted(data_dir, folder):
    text = "".join(f"{utt_id}\r\n" for utt_id in ids_of(40, 45))
    (folder / "deep" / TEST).write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\n\n")
    _, test = lists.write(data_dir, settings(folder))["here"]
    assert (data_dir / "lists/here" / test.path).read_bytes() == text.replace("\r", "").encode()
    assert rows_of(data_dir, test.path)[1][-2] == "1 byte order mark, 5 carriage returns, 2 blank lines"


def test_a_set_without_a_released_list_is_drawn_and_says_so(data_dir, folder):
    (folder / "deep" / TRAIN).unlink()
    parts = {"train": {"commonvoice_ko_train": 30 / 3600}, "test": {"commonvoice_ko_test": None}}
    train, _ = lists.write(data_dir, settings(folder, parts))["here"]
    assert str(train).endswith("10 utterances, 0.008 h, no released list: drawn here")
    drawn_only = ListsSettings.model_validate({"settings": {"here": {"train": parts["train"]}}})
    ids = lists.read(data_dir / "lists/here" / train.path)
    lists.write(data_dir, drawn_only)
    assert ids == lists.read(data_dir / "lists/here" / train.path)


def test_a_draw_leaves_out_what_a_released_list_tests_on(data_dir, folder):
    (folder / "deep" / TRAIN).unlink()
    put(folder / "deep" / TEST, ids_of(5, 15))  # of the split train, as Portuguese has it
    parts = {"train": {"commonvoice_ko_train": None}, "test": {"commonvoice_ko_test": 1}}
    train, _ = lists.write(data_dir, settings(folder, parts))["here"]
    assert set(lists.read(data_dir / "lists/here" / train.path)) == {*ids_of(0, 5), *ids_of(15, 20)}
    assert train.num_left_out == 10 and "10 candidates left out: held out" in str(train)


def test_validation_leaves_out_what_a_released_list_trains_on_and_an_official_test_stays_whole(data_dir, folder):
    put(folder / "deep" / TRAIN, [*ids_of(0, 5), *ids_of(20, 35), *ids_of(40, 42)])
    (folder / "deep" / TEST).unlink()
    whole = {part: {f"commonvoice_ko_{part}": None} for part in lists.PARTS}
    train, dev, test = lists.write(data_dir, settings(folder, whole))["here"]
    assert (dev.num_utts, dev.num_left_out, test.num_utts) == (5, 15, 20)
    assert train.match.overlapping == dict.fromkeys(ids_of(40, 42), test.path)


def test_lists_follow_the_released_files(data_dir, folder):
    lists.write(data_dir, settings(folder))
    assert lists.write(data_dir, settings(folder)) == {"here": None}
    put(folder / "deep" / TEST, ids_of(50, 52))
    _, test = lists.write(data_dir, settings(folder))["here"]
    assert lists.read(data_dir / "lists/here" / test.path) == ids_of(50, 52)
    (data_dir / "lists/here/REPORT.md").unlink()
    assert lists.write(data_dir, settings(folder))["here"]


def repository(folder: Path) -> str:
    """The URL of a repository that holds `folder`."""
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "lists"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    return folder.as_uri()


def test_without_a_folder_the_lists_are_cloned_once(data_dir, folder):
    url = repository(folder)
    train, _ = lists.write(data_dir, settings(None, repository=url))["here"]
    assert train.match.name == TRAIN and sorted(path.name for path in data_dir.iterdir() if path.name != "lists") == [
        "manifests",
        "released_lists",
    ]
    shutil.rmtree(folder)
    assert lists.write(data_dir, settings(None, repository=url)) == {"here": None}


def test_a_clone_that_fails_says_how_to_do_without(data_dir, tmp_path, monkeypatch):
    nowhere = settings(None, repository=(tmp_path / "nowhere").as_uri())
    with pytest.raises(UserError, match=r"nowhere: cannot be cloned \(.*\); .*data.lists.released.dir"):
        lists.write(data_dir, nowhere)
    assert [path.name for path in data_dir.iterdir()] == ["manifests"]
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="git is not here .*install git, or set data.lists.released.dir"):
        lists.write(data_dir, nowhere)


def test_a_repository_that_looks_like_an_option_is_none(data_dir, tmp_path):
    with pytest.raises(UserError, match="cannot be cloned"):
        lists.write(data_dir, settings(None, repository=f"--upload-pack=touch {tmp_path / 'harm'}"))
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: put(f / "two" / TRAIN, ["a"]), "holds .*deep, .*two; set data.lists.released.dir"),
        (lambda f: shutil.rmtree(f / "deep"), "no folder train/lite_30h or test/lite_30h"),
        (lambda f: put((f / "deep" / TEST).with_name("ko_more.txt"), ["a"]), "ko_more.txt, .*which is of common"),
        (lambda f: (f / "deep" / TEST).write_bytes(b"\xff\n"), "ko_test.txt: not UTF-8"),
        (lambda f: (f / "deep" / TEST).write_bytes(b"\n"), "ko_test.txt: holds no id"),
    ],
)
def test_what_cannot_be_told_apart_or_read_is_named(data_dir, folder, spoil, message):
    spoil(folder)
    with pytest.raises(UserError, match=message):
        lists.write(data_dir, settings(folder))


def test_two_sets_cannot_share_a_released_list(data_dir, folder):
    parts = {"test": {"commonvoice_ko_test": None, "commonvoice_ko_dev": None}}
    with pytest.raises(UserError, match="which is of commonvoice_ko_"):
        lists.write(data_dir, settings(folder, parts))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.lists.released={folders: {target_1h: lite_1h}}", "released: give dir, .*, or repository"),
        ("data.lists.released.folders={targets: lite_1h}", "folders: 'targets' is not in data.lists.settings;"),
        ("data.lists.paper_hours.mls_nl_train=1", "paper_hours: 'mls_nl_train' is in no setting"),
        ("data.lists.settings.target_1h.train.mls_de_train={hours: -1}", "train.mls_de_train.*greater than 0"),
        ("data.lists.settings.target_1h.train.mls_de_train={hour: 1}", "unknown key .*; known here: hours, splits"),
    ],
)
def test_a_section_that_contradicts_itself_is_an_error(override, message):
    with pytest.raises(UserError, match=message):
        recipe.load(CONF / "paper.yaml", overrides=[override])


@pytest.fixture(scope="module")
def genuine() -> Path:
    if not GENUINE.is_dir():
        pytest.skip("the released lists are not here (shared/data/released_lists beside the checkout)")
    return GENUINE


@pytest.fixture(scope="module")
def prepared(genuine, tmp_path_factory) -> tuple[recipe.Config, Path]:
    """paper_30h.yaml, and a data directory with its lists; manifests hold the released ids and some made-up ones."""
    data_dir = tmp_path_factory.mktemp("paper")
    whole = recipe.load(CONF / "paper_30h.yaml", overrides=[f"data.lists.released.dir={genuine}"])
    draws = [draw for parts in whole.data.lists.settings.values() for draw in parts.draws.items()]
    ids = {one: {f"{one}-{i}": 3600.0 for i in range(50)} for (_, name), draw in draws for one in draw.sets(name)}
    for path in sorted(genuine.rglob("*.txt")):  # of test/ first
        corpus = "mls" if path.parent.name == "mls" else "commonvoice"
        language = f"{corpus}_{next(word for word in path.stem.split('_') if word in languages.LANGUAGES)}"
        for i, utt_id in enumerate(path.read_text().splitlines()):
            if not any(
                utt_id in ids.get(f"{language}_{split}", ()) for split in ("test", "train", "validated", "other")
            ):
                splits = ["test"] if "/test/" in str(path) else ["train", "validated", "other"]
                split = splits[i % len(splits)] if corpus == "commonvoice" else "train"
                ids.setdefault(f"{language}_{split}", {})[utt_id] = SECONDS[language]
    for name, durations_s in ids.items():
        cuts = ({"id": utt_id, "duration": duration_s} for utt_id, duration_s in durations_s.items())
        manifests.write(manifests.path_of(data_dir, name), cuts)
    lists.write(data_dir, whole.data.lists)
    return whole, data_dir


def test_every_released_file_has_the_lines_and_ids_that_were_counted(genuine):
    for setting, counts in COUNTS.items():
        for part in ("train", "test"):
            names = [name for name in counts if name.endswith(part)]
            found = released.find(genuine, setting.replace("target", "lite"), part=part, names=names)
            read = {name: released.read(path) for name, path in found.items()}
            assert {name: (len(file.ids), len(set(file.ids))) for name, file in read.items()} == {
                name: counts[name] for name in names
            }
            assert not any(file.slips for file in read.values())
    assert sum(map(len, COUNTS.values())) == len(list(genuine.rglob("*.txt"))) == 23


def test_the_released_lists_are_taken_whole_from_all_splits_and_the_others_are_drawn(genuine, prepared):
    data_dir = prepared[1]
    for setting, counts in COUNTS.items():
        for part in lists.PARTS:
            for name, path in lists.find(data_dir, setting, part).items():
                ids = path.read_text().splitlines()
                if name in counts:
                    assert (len(ids), len(set(ids))) == counts[name]
                else:
                    assert all(utt_id.startswith(name.rsplit("_", 1)[0]) for utt_id in ids)
    report = (data_dir / "lists/target_1h/REPORT.md").read_text()
    drawn = [line.split("|")[1].strip() for line in report.splitlines() if "no released list: drawn here" in line]
    assert drawn == [
        f"train/{name}_train.txt" for name in ("commonvoice_th", "librispeech_en", "mls_es", "msr86k_ru", "msr86k_vi")
    ]


def test_the_two_korean_ids_in_both_lists_are_named(prepared):
    with open(prepared[1] / "lists/target_30h/REPORT.tsv", encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream, delimiter="\t"))[1:]
    where = "train/commonvoice_ko_train.txt", "also in test/commonvoice_ko_test.txt"
    assert sorted(rows) == [[where[0], f"common_voice_ko_{i}", where[1]] for i in (40612792, 40620849)]
    with open(prepared[1] / "lists/target_1h/REPORT.tsv", encoding="utf-8", newline="") as stream:
        assert len(list(stream)) == 1


def cells(table: str) -> dict[tuple[str, str, str], list[str]]:
    rows = [[cell.strip() for cell in line.replace("\\|", "/").split("|")[1:-1]] for line in table.splitlines()]
    return {tuple(row[:3]): row[3:] for row in rows if len(row) > 3}


def test_table_1_has_our_hours_beside_the_papers(prepared):
    whole, data_dir = prepared
    table = data.table(whole, data_dir)
    rows = cells(table)
    assert len({len(line) for line in table.splitlines() if line.startswith("|")}) == 1  # aligned
    assert len(rows) == 2 + 4 + 12
    german = rows["target_30h", "MLS", "German (de)"]
    assert german[:3] == ["1000.00", "1000.00", "+0.00"] and german[6] == "238943"
    korean = rows["target_30h", "Common Voice", "Korean (ko)"]
    assert korean == ["6.40", "6.51", "-0.11", "1.07", "0.98", "+0.09", "3969 (3108 different)", "664 (332 different)"]
    italian = rows["target_30h", "MLS", "Italian (it)"]
    assert italian[:3] == ["495.00", "500.00 [1]", "-5.00"] and italian[4] == "8.10 [1]"
    assert "[1] Table I says MSR-86K; by Tables IV and V and the released list, Italian is MLS's." in table
    english = rows["target_30h", "LibriSpeech", "English (en)"]
    assert english[3:6] == ["50.00 / 50.00", "5.40 / 5.34", "+44.60 / +44.66"]
    assert rows["target_30h", "MLS", "Portuguese (pt)"][3:6] == ["50.00", "–", "–"]


def test_table_1_without_manifests_or_lists_says_which_stage_makes_them(data_dir, capsys):
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    data.run(parser.parse_args(["table", "--conf", str(CONF / "paper.yaml"), "--data-dir", str(data_dir)]))
    table = capsys.readouterr().out
    rows = cells(table)
    korean = rows["target_1h", "Common Voice", "Korean (ko)"]
    arabic = rows["target_1h", "Common Voice", "Arabic (ar)"]
    notes = dict(line.split(" ", 1) for line in table.splitlines() if line.startswith("["))
    assert korean[1:3] == ["1.00", "–"] and korean[-2:] == ["–", "–"]
    assert notes[korean[0].removeprefix("– ")] == "There is no list: run stage 2."
    assert notes[arabic[0].removeprefix("– ")] == "There is no manifest: run stage 1."


def test_a_configuration_without_the_papers_hours_has_a_table_without_them(tmp_path):
    whole = recipe.load(CONF / "mini.yaml")
    manifest(tmp_path, "talk_zh_train", ids_of(0, 12), 300.0)
    put(tmp_path / "lists/source/train/talk_zh_train.txt", [*ids_of(0, 12), *ids_of(0, 6), "lost"])
    table = data.table(whole, tmp_path)
    assert "paper" not in table
    assert cells(table)["source", "talk", "Chinese (zh)"][0::2] == ["1.50 [2]", "19 (13 different)"]
    assert "[2] talk_zh_train: no manifest has 1 of its ids" in table


def test_the_paper_configurations_have_the_hours_of_table_1():
    whole = recipe.load(CONF / "paper.yaml").data.lists
    names = {
        name for setting in whole.settings.values() for part in ("train", "test") for name in getattr(setting, part)
    }
    assert whole.paper_hours.keys() == names
    for setting in whole.settings.values():
        assert {name: draw.hours for name, draw in setting.train.items()} == {
            name: whole.paper_hours[name] for name in setting.train
        }
    low = recipe.load(CONF / "paper_30h.yaml").data.lists
    assert {name: draw.hours for name, draw in low.settings["target_30h"].train.items()} == {
        name: low.paper_hours[name] for name in low.settings["target_30h"].train
    }

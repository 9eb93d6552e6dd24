"""Stage 1 of the five real corpora, on trees in their exact layouts (tests/trees.py), and the path on to features."""

import argparse
import importlib
import json
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path

import mls
import pytest
import trees
import yaml

from zipperasr.cli.main import main
from zipperasr.data import defects, manifests, sources
from zipperasr.errors import UserError

LOCAL = Path(__file__).resolve().parents[1] / "local"
sys.path.insert(0, str(LOCAL))

import prepare_commonvoice  # noqa: E402
import prepare_librispeech  # noqa: E402
import prepare_mls  # noqa: E402
import prepare_msr86k  # noqa: E402
import prepare_tsv  # noqa: E402
import prepare_wenetspeech  # noqa: E402

MAKE = {
    "librispeech": trees.librispeech,
    "mls": trees.multilingual_librispeech,
    "commonvoice": trees.common_voice,
    "wenetspeech": trees.wenetspeech,
    "msr86k": trees.msr86k,
}
LANGS = {
    "librispeech": ["en"],
    "mls": ["de", "es"],
    "commonvoice": ["ja"],
    "wenetspeech": ["zh"],
    "msr86k": ["en", "th"],
}

# What the trees hold, by hand: set: {utterance: (speaker, text, training text, start in s, duration in s)}
MSR_AID = "EN_000000001__lEC6Rsur11E"
KEPT = {
    "librispeech_en_train": {
        "103-1240-0000": ("103", "ONE FINE DAY", "one fine day", 0, 1.2),
        "20-205-0000": ("20", "SHE SAID SO", "she said so", 0, 1.2),
        "20-205-0001": ("20", "TWICE", "twice", 0, 1.2),
    },
    "librispeech_en_dev_clean": {
        "2412-153948-0000": ("2412", "IF THE READER WILL EXCUSE ME", "if the reader will excuse me", 0, 11.66)
    },
    "librispeech_en_dev_other": {"116-288045-0000": ("116", "AS I APPROACHED", "as i approached", 0, 1.2)},
    "librispeech_en_test_clean": {
        "61-70968-0000": ("61", "HE BEGAN A CONFUSED COMPLAINT", "he began a confused complaint", 0, 4.905)
    },
    "librispeech_en_test_other": {
        "367-130732-0000": ("367", "LOBSTERS AND LOBSTERS", "lobsters and lobsters", 0, 1.2),
    },
    "mls_de_train": {
        "1_10_000000": ("1", "eins zwei", "eins zwei", 0, 1.2),
        "1_10_000001": ("1", "zwölf drei", "zwölf drei", 0, 1.2),
    },
    "mls_de_dev": {"2_20_000000": ("2", "vier fünf", "vier fünf", 0, 1.2)},
    "mls_de_test": {"3_30_000000": ("3", "sechs sieben", "sechs sieben", 0, 1.2)},
    "mls_es_train": {
        "13697_11991_000000": ("13697", "la sorpresa y el disgusto", "la sorpresa y el disgusto", 0, 14.85)
    },
    "mls_es_dev": {"4_40_000000": ("4", "uno dos", "uno dos", 0, 1.2)},
    "mls_es_test": {"5_50_000000": ("5", "tres cuatro", "tres cuatro", 0, 1.2)},
    "commonvoice_ja_train": {
        "common_voice_ja_24511055": ("speaker2", "真っ昼間なのに", "真っ昼間なのに", 0, 6.516),
        "common_voice_ja_10000001": ("speaker4", '彼は"はい', "彼ははい", 0, 1.2),
        "common_voice_ja_10000002": ("speaker5", "右と左", "右と左", 0, 1.2),
        "common_voice_ja_10000003": ("speaker6", "電話の声", "電話の声", 0, 1.2),
    },
    "commonvoice_ja_dev": {"common_voice_ja_10000010": ("speaker6", "開発。", "開発", 0, 1.2)},
    "commonvoice_ja_test": {"common_voice_ja_10000020": ("speaker2", "試験、", "試験", 0, 1.2)},
    "commonvoice_ja_validated": {
        "common_voice_ja_10000030": ("speaker5", "検証", "検証", 0, 1.2),
        "common_voice_ja_10000031": ("speaker6", "再検証", "再検証", 0, 1.2),
    },
    "commonvoice_ja_other": {"common_voice_ja_10000040": ("speaker1", "その他", "その他", 0, 1.2)},
    "wenetspeech_zh_train": {
        "X0000000000_100638174_S00000": (None, "不惜在这种试验中", "不惜在这种试验中", 0.2, 1.5),
        "X0000000000_100638174_S00003": (None, "毁灭自己ＡＢ", "毁灭自己ab", 5.0, 1.0),
    },
    "wenetspeech_zh_dev": {
        "DEV_T0000000000_S00000": (None, "开发集", "开发集", 0, 1.5),
        "DEV_T0000000000_S00001": (None, "第二句", "第二句", 1.5, 1.75),
    },
    "wenetspeech_zh_test_net": {"TEST_NET_Y0000000000_-KTKHdZ2fb8_S00000": (None, "网络", "网络", 1.0, 1.5)},
    "wenetspeech_zh_test_meeting": {"TEST_MEETING_T0000000001_S00000": (None, "会议", "会议", 2.5, 1.5)},
    "msr86k_en_train": {
        f"{MSR_AID}_19": (None, "hello there 0", "hello there 0", 0, 1.5),
        f"{MSR_AID}_20": (None, "hello there 1", "hello there 1", 1.5, 1.5),
    },
    "msr86k_en_dev": {"EN_000000002_XYZ_1": (None, "hello there 0", "hello there 0", 0, 1.5)},
    "msr86k_th_train": {
        "TH_000000029_184": (None, "สวัสดี 0", "สวัสดี 0", 0, 1.2),
        "TH_000000029_185": (None, "สวัสดี 1", "สวัสดี 1", 0, 1.2),
    },
    "msr86k_th_dev": {"TH_000000030_1": (None, "สวัสดี 0", "สวัสดี 0", 0, 1.2)},
}
# Set: (utterances in, {kind of defect: utterances or files}); every other set keeps all and has no defect.
WINDOWS = {"byte order mark": 1, "carriage returns": 1}
BOOKS = {
    "librispeech_en_train": (
        7,
        {"empty text": 1, "missing audio": 1, "truncated audio": 1, "unreadable audio": 1, "wrong extension": 1}
        | WINDOWS,
    ),
    "mls_de_train": (5, {"not UTF-8": 1, "bad row": 1, "duplicate row": 1}),
    "commonvoice_ja_train": (
        5,
        {"unbalanced quote": 2, "several channels": 1, "below 16 kHz": 1, "duplicate row": 1},
    ),
    "commonvoice_ja_validated": (8, {"in another split": 6}),
    "commonvoice_ja_other": (
        5,
        {"bad row": 1, "missing audio": 1, "truncated audio": 1, "unreadable audio": 1} | WINDOWS,
    ),
    "wenetspeech_zh_train": (
        7,
        {
            "empty text": 2,
            "segment outside its audio": 1,
            "segment shortened to its audio": 1,
            "bad row": 1,
            "missing audio": 1,
        },
    ),
    "msr86k_en_train": (3, {"bad row": 1}),
    "msr86k_th_train": (2, {"byte order mark": 1}),
    "msr86k_th_dev": (1, {"byte order mark": 1}),
}


def prepare(corpus: str, corpus_dir: Path, out: Path, *, nj: int = 1, **options) -> None:
    """Run the script of a corpus as a command would, with its own defaults."""
    defaults = {
        "commonvoice": {"any_release": False},
        "wenetspeech": {"subset": "L"},
        "msr86k": {
            "splits": ["train", "dev"],
            "lists": prepare_msr86k.LISTS,
            "audio": prepare_msr86k.FOLDERS,
            "ids": prepare_msr86k.IDS,
        },
    }
    given = {"langs": LANGS[corpus]} | defaults.get(corpus, {}) | options
    args = argparse.Namespace(corpus=corpus, corpus_dir=corpus_dir, out=out, nj=nj, **given)
    importlib.import_module(f"prepare_{corpus}").run(args)


def read(out: Path) -> dict[str, dict[str, dict]]:
    """Every manifest in a directory: {set: {id: cut}}."""
    paths = sorted(out.glob(f"*{manifests.SUFFIX}"))
    names = [path.name.removesuffix(manifests.SUFFIX) for path in paths]
    return {name: {cut["id"]: cut for cut in manifests.read(path)} for name, path in zip(names, paths)}


def expected(corpus: str) -> dict[str, dict[str, tuple]]:
    return {name: cuts for name, cuts in KEPT.items() if name.startswith(f"{corpus}_")}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, Path]:
    """A tree of each corpus."""
    root = tmp_path_factory.mktemp("corpora")
    return {corpus: make(root / corpus) for corpus, make in MAKE.items()}


@pytest.fixture(scope="module")
def prepared(corpora, tmp_path_factory) -> Path:
    """The manifests of all trees, made by one process."""
    out = tmp_path_factory.mktemp("manifests")
    for corpus, corpus_dir in corpora.items():
        prepare(corpus, corpus_dir, out)
    return out


@pytest.mark.parametrize("corpus", MAKE)
def test_every_utterance_has_its_own_id_text_language_and_place(prepared, corpus):
    found = {name: cuts for name, cuts in read(prepared).items() if name.startswith(f"{corpus}_")}
    assert {name: list(cuts) for name, cuts in found.items()} == {
        name: list(cuts) for name, cuts in expected(corpus).items()
    }
    for name, cuts in expected(corpus).items():
        for utt_id, (speaker, text, train_text, start_s, duration_s) in cuts.items():
            (supervision,) = (cut := found[name][utt_id])["supervisions"]
            assert (supervision["id"], supervision["text"]) == (utt_id, text)
            assert supervision["custom"] == {"train_text": train_text}
            assert (supervision["language"], supervision.get("speaker")) == (name.split("_")[1], speaker)
            assert (cut["start"], supervision["start"]) == (start_s, 0)
            assert cut["duration"] == supervision["duration"] == pytest.approx(duration_s, abs=0.04)


@pytest.mark.parametrize("name", KEPT)
def test_what_comes_in_is_kept_or_counted_by_its_reason(prepared, name):
    num_in, kinds = BOOKS.get(name, (len(KEPT[name]), {}))
    tally = defects.read_tally(manifests.tally_path(prepared / f"{name}{manifests.SUFFIX}"))
    assert (tally.num_in, tally.num_kept, tally.kinds) == (num_in, len(KEPT[name]), kinds)
    num_dropped = sum(count for kind, count in kinds.items() if defects.rule(kind, name) == "dropped")
    assert tally.num_in == tally.num_kept + num_dropped


@pytest.mark.parametrize("corpus", MAKE)
def test_the_number_of_processes_does_not_change_a_byte(corpora, prepared, tmp_path, corpus):
    prepare(corpus, corpora[corpus], tmp_path, nj=2)
    files = sorted(path for path in tmp_path.iterdir() if path.is_file())
    assert len(files) >= 3 * len(expected(corpus))
    for path in files:
        assert path.read_bytes() == (prepared / path.name).read_bytes(), path.name


@pytest.mark.parametrize("corpus", MAKE)
def test_a_folder_without_the_corpus_is_named_with_what_was_looked_for(tmp_path, corpus):
    looked_for = {
        "librispeech": "looked there and in LibriSpeech/ for train-clean-100, .*test-other",
        "mls": "no language 'de'; looked for de, mls_german, mls_german_opus",
        "commonvoice": "looked for cv-corpus-18.0-2024-06-14/ja and ja",
        "wenetspeech": "WenetSpeech.json: no such file",
        "msr86k": r"looked for English/\*train\*.json, EN/\*train\*.json, en/.*; say with --lists",
    }
    with pytest.raises(UserError, match=looked_for[corpus]):
        prepare(corpus, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("corpus", "langs"), [("librispeech", ["en", "de"]), ("wenetspeech", ["en"])])
def test_a_corpus_of_one_language_takes_no_other(corpora, tmp_path, corpus, langs):
    with pytest.raises(UserError, match=f"--langs {' '.join(langs)}: "):
        prepare(corpus, corpora[corpus], tmp_path, langs=langs)


def test_a_part_of_librispeech_that_is_not_there_is_said(corpora, tmp_path, capsys):
    prepare("librispeech", corpora["librispeech"] / "LibriSpeech", tmp_path)
    assert "no train-clean-360; librispeech_en_train is made without it" in capsys.readouterr().out


def test_a_part_of_librispeech_without_transcripts_is_an_error(tmp_path):
    (tmp_path / "train-clean-100").mkdir()
    with pytest.raises(UserError, match="train-clean-100: no transcripts; looked for"):
        prepare("librispeech", tmp_path, tmp_path / "out")


def test_of_a_flac_and_an_opus_tree_of_mls_the_flac_is_taken_and_this_is_said(corpora, prepared, tmp_path, capsys):
    prepare("mls", corpora["mls"], tmp_path)
    assert "takes mls_german, not mls_german_opus\n" in capsys.readouterr().out
    suffixes = {
        name: {Path(cut["recording"]["sources"][0]["source"]).suffix for cut in cuts.values()}
        for name, cuts in read(prepared).items()
        if name.startswith("mls_")
    }
    assert suffixes == {name: {".flac" if "_de_" in name else ".opus"} for name in expected("mls")}


@pytest.mark.parametrize("is_linked", [False, True])
def test_another_release_of_common_voice_is_refused_unless_it_is_wanted(corpora, tmp_path, is_linked):
    corpus_dir, other = tmp_path / "commonvoice", Path("cv-corpus-17.0-2024-03-15", "ja")
    here = tmp_path / other if is_linked else corpus_dir / other
    shutil.copytree(corpora["commonvoice"] / prepare_commonvoice.RELEASE / "ja", here)
    if is_linked:
        corpus_dir.mkdir()
        (corpus_dir / "ja").symlink_to(here)
    with pytest.raises(UserError, match=r"is of cv-corpus-17.0-2024-03-15; .* get cv-corpus-18.0-2024-06-14"):
        prepare("commonvoice", corpus_dir, tmp_path / "out")
    prepare("commonvoice", corpus_dir, tmp_path / "out", any_release=True)
    assert read(tmp_path / "out").keys() == expected("commonvoice").keys()


def test_common_voice_is_found_without_the_name_of_its_release_and_preferred_in_the_right_one(corpora, tmp_path):
    release = corpora["commonvoice"] / prepare_commonvoice.RELEASE
    assert prepare_commonvoice.find_tables(release, "ja")["other"] == release / "ja" / "other.tsv"
    for folder in ("cv-corpus-9.0-2022-04-27", prepare_commonvoice.RELEASE):
        shutil.copytree(release / "ja", tmp_path / folder / "ja")
    assert prepare_commonvoice.find_tables(tmp_path, "ja")["dev"] == tmp_path / release.name / "ja" / "dev.tsv"


def test_a_table_of_common_voice_that_is_missing_or_of_other_columns_is_named(corpora, tmp_path):
    shutil.copytree(corpora["commonvoice"] / prepare_commonvoice.RELEASE / "ja", tmp_path / "ja")
    (tmp_path / "ja" / "validated.tsv").write_text("client_id\tpath\ttext\n")
    with pytest.raises(UserError, match="validated.tsv: no column sentence; its header has: client_id, path, text"):
        prepare("commonvoice", tmp_path, tmp_path / "out")
    for name in ("validated", "other"):
        (tmp_path / "ja" / f"{name}.tsv").unlink()
    with pytest.raises(UserError, match="ja: no validated.tsv, other.tsv; unpack the whole archive"):
        prepare("commonvoice", tmp_path, tmp_path / "out")


def test_a_smaller_subset_of_wenetspeech_replaces_the_larger_one(corpora, prepared, tmp_path, capsys):
    prepare("wenetspeech", corpora["wenetspeech"], tmp_path)
    prepare("wenetspeech", corpora["wenetspeech"], tmp_path, subset="S")
    assert "WenetSpeech.json: 6 utterances are in none of S, DEV, TEST_NET, TEST_MEETING\n" in capsys.readouterr().out
    found = read(tmp_path)
    assert list(found.pop("wenetspeech_zh_train")) == ["X0000000000_100638174_S00000"]
    assert found == {name: cuts for name, cuts in read(prepared).items() if name in found}


@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_a_list_of_recordings_that_is_cut_off_is_named_and_no_manifest_is_written(corpora, tmp_path, keep):
    whole = (corpora["wenetspeech"] / "WenetSpeech.json").read_bytes()
    (tmp_path / "WenetSpeech.json").write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(UserError, match="WenetSpeech.json: not whole JSON .*; fetch it again"):
        prepare("wenetspeech", tmp_path, tmp_path / "out")
    assert not list((tmp_path / "out").glob(f"*{manifests.SUFFIX}"))


def test_json_without_recordings_is_named(tmp_path):
    trees.put(tmp_path / "a.json", '{"files": []}')
    with pytest.raises(UserError, match='a.json: no "audios" in it'):
        list(sources.read_audios(tmp_path / "a.json"))


def test_msr86k_may_be_laid_out_and_named_otherwise(corpora, tmp_path):
    tree = corpora["msr86k"] / "Thai"
    for part in ("train", "dev"):
        text = (tree / f"{part}.json").read_text(encoding="utf-8-sig")
        trees.put(tmp_path / "text" / f"thai.{part}.json", text.replace("TH_", "v2-TH_"))
        for path in (tree / "audio" / part).iterdir():
            aid = path.stem.rpartition("_")[0]
            place = tmp_path / "sound" / "th" / f"v2-{aid}"
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place / f"v2-{path.name}")
    patterns = {"lists": ["text/{language}.{split}.json"], "audio": ["sound/{lang}"], "ids": r"v\d{1}-(TH_\d{9}_\d+)"}
    with pytest.raises(UserError, match="no audio; looked for the folders .*/noise/th; say with --audio"):
        prepare("msr86k", tmp_path, tmp_path / "out", langs=["th"], **patterns | {"audio": ["noise/{lang}"]})
    prepare("msr86k", tmp_path, tmp_path / "out", langs=["th"], **patterns)
    assert {name: list(cuts) for name, cuts in read(tmp_path / "out").items()} == {
        name: list(KEPT[name]) for name in ("msr86k_th_dev", "msr86k_th_train")
    }


@pytest.mark.parametrize(("ids", "message"), [("(", "not a regular expression"), ("TH_.*", "in parentheses")])
def test_a_pattern_of_ids_that_names_none_is_an_error(corpora, tmp_path, ids, message):
    with pytest.raises(UserError, match=message):
        prepare("msr86k", corpora["msr86k"], tmp_path, ids=ids)


def test_recordings_of_msr86k_lie_where_their_list_says(tmp_path):
    audio = {"aid": "EN_1", "path": "deep/a.opus", "segments": [{"sid": "EN_1_1", "begin_time": "0.5", "end_time": 1}]}
    audio["segments"][0]["text_tn"] = "hello"
    trees.put(tmp_path / "deep" / "a.opus", "")
    (clip,) = prepare_msr86k.utterances(audio, [tmp_path / "elsewhere", tmp_path], "en", [".wav"])
    assert (clip.path, clip.start_s, clip.end_s) == (tmp_path / "deep" / "a.opus", 0.5, 1.0)


NUM_ROWS = 50_000


def table(path: Path, header: str, row: str) -> Path:
    """A large table; `row` is a format of the row's number."""
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(header)
        stream.writelines(row.format(number) for number in range(NUM_ROWS))
    return path


def recordings(path: Path, text: str) -> Path:
    """A large JSON list of recordings of 100 segments; the text is the field `text`."""
    with open(path, "w", encoding="utf-8") as stream:
        stream.write('{"audios": [')
        for number in range(NUM_ROWS // 100):
            times = {"begin_time": 1.5, "end_time": 3.25, text: "some words", "subsets": ["L"]}
            segments = [{"sid": f"EN_{number}_{segment}"} | times for segment in range(100)]
            audio = {"aid": f"EN_{number}", "path": "here.wav", "segments": segments}
            stream.write(("," if number else "") + json.dumps(audio))
        stream.write("]}")
    return path


def large(corpus: str, folder: Path) -> Iterable[tuple[str, object]]:
    """The rows of a large source of transcripts in the form of a corpus."""
    match corpus:
        case "tsv":
            clips = table(
                folder / "t.tsv", "id\tpath\tlang\ttranscript\n", "utt{0}\tsome/{0}.wav\ten\tsome words {0}\n"
            )
            return prepare_tsv.rows(clips, {"en": "clips_en_train"})
        case "librispeech":
            return prepare_librispeech.rows("a_en_train", [table(folder / "t.txt", "", "1-2-{0} SOME WORDS {0}\n")])
        case "mls":
            return prepare_mls.rows("a_de_train", table(folder / "t.txt", "", "1_2_{0}\tsome words {0}\n"), "de")
        case "commonvoice":
            clips = table(folder / "t.tsv", "client_id\tpath\tsentence\n", "me\tsome{0}.mp3\tsome words {0}\n")
            return prepare_commonvoice.rows("a_ja_other", clips, "ja", others=[])
        case "wenetspeech":
            return prepare_wenetspeech.rows(recordings(folder / "t.json", "text"), {"L": "a_zh_train"})
        case "msr86k":
            lists = {recordings(folder / "t.json", "text_tn"): [mls.noise(folder / "here.wav").parent]}
            return prepare_msr86k.rows("a_en_train", lists, "en", ids=prepare_msr86k.compile_ids("(EN_.*)", {}))


@pytest.mark.parametrize("corpus", ["tsv", *MAKE])
def test_memory_does_not_grow_with_the_corpus(tmp_path, corpus):
    rows = large(corpus, tmp_path)
    assert isinstance(rows, Iterator)
    tracemalloc.start()
    try:
        assert sum(1 for _ in rows) == NUM_ROWS
        assert tracemalloc.get_traced_memory()[1] < 16e6  # bytes; a list of the rows takes 18 to 37 million
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def conf(corpora, tmp_path_factory) -> Path:
    """A configuration of all five corpora, whose data directory is beside it."""
    root = tmp_path_factory.mktemp("recipe")
    (root / "corpora").mkdir()
    for corpus, corpus_dir in corpora.items():
        (root / "corpora" / corpus).symlink_to(corpus_dir)
    parts = {"train": {}, "dev": {}, "test": {}}
    for name in KEPT:
        part = name.split("_")[2]
        parts[part if part in parts else "train"][name] = None
    settings = {
        "corpora": {corpus: {"prepare": corpus, "langs": langs} for corpus, langs in LANGS.items()},
        "data": {"lists": {"settings": {"all": parts}}, "features": {"storage": "precomputed"}},
        "model": {"encoder": {"pretrained": "whisper"}, "llm": {"pretrained": "lm"}},
        "training": {"stage1": {"setting": "all"}, "stage2": {"setting": "all"}},
    }
    (root / "conf.yaml").write_text(yaml.safe_dump(settings))
    return root / "conf.yaml"


def test_all_five_corpora_go_from_their_trees_to_features(conf, capsys):
    root = conf.parent
    for corpus, langs in LANGS.items():
        command = [sys.executable, LOCAL / f"prepare_{corpus}.py", "--corpus", corpus, "--corpus-dir"]
        command += [root / "corpora" / corpus, "--langs", *langs, "--out", root / "manifests", "--nj", "2"]
        subprocess.run(command, check=True, capture_output=True)

    def zipperasr(verb: str, *more: str) -> int:
        return main([verb, "--conf", str(conf), "--data-dir", str(root), *more])

    assert zipperasr("validate") == 1  # so many files of so small a corpus are broken that it was not copied whole
    assert "incomplete corpus" in capsys.readouterr().err
    assert zipperasr("validate", "--drop") == 0
    assert zipperasr("lists") == 0
    for name in KEPT:
        (path,) = (root / "lists" / "all").glob(f"*/{name}.txt")
        assert sorted(path.read_text(encoding="utf-8").split()) == sorted(KEPT[name])
    assert zipperasr("features") == 0
    out = capsys.readouterr().out
    assert f" {sum(map(len, KEPT.values()))} utterances of {len(KEPT)} sets now" in out

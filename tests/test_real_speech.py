"""Real recordings from a table to error rates: 215 clips in 13 languages; wav, flac, mp3, ogg, opus and aiff; 8 to 48
kHz; mono and stereo. A tiny random model learns a dozen of them by heart in Stage 2, which works only if audio,
features, packing, labels, adapters, decoding and scoring agree.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml

from zipperasr.cli.main import main
from zipperasr.data import defects, manifests

PREPARE = Path(__file__).resolve().parents[1] / "local" / "prepare_tsv.py"
DOZEN = """ardigit_0_0000 ardigit_3_0001 common_voice_en_22058267 sr_english fsdd_8_nicolas_1 sr_french
pv_cheetah_test_it_norm pv_cheetah_test_pt_norm f5thai_ref_3 f5thai_ref_4 f5vi_ref sr_chinese""".split()
LEARNT = ("ar", "en", "fr", "it", "pt", "th", "vi", "zh")
ALL = ("ar", "de", "en", "es", "fr", "it", "ja", "ko", "pt", "ru", "th", "vi", "zh")
OVERLONG = "fleurs-de-009"  # 43 s


def zipperasr(*args):
    assert main(list(map(str, args))) == 0, args


def configuration(paths):
    """Stage 1 gets a single step, so that whatever the dozen's error falls to is Stage 2's doing."""
    dozen = {f"real_{lang}_dozen": None for lang in LEARNT}
    every = {f"real_{lang}_test": None for lang in ALL}
    stage = {"setting": "dozen", "num_workers": 0, "lr": 6e-3}
    return {
        "corpora": {"real": {"prepare": "tsv", "langs": list(ALL)}},
        "data": {
            "lists": {"settings": {"dozen": {"train": dozen}, "every": {"test": every}, "learnt": {"test": dozen}}},
            "packing": {"max_tokens_per_row": 400, "rows_per_batch": {"full": 12, "chunked": 12}},
        },
        "model": tiny.settings(paths, langs=LEARNT, rank=32).model_dump(mode="json"),
        "training": {"stage1": {**stage, "max_steps": 1}, "stage2": {**stage, "max_steps": 240}},
        "decoding": {"max_tokens_per_s": 1, "min_max_tokens": 90},
    }


@pytest.fixture(scope="module")
def work(shared_speech, tmp_path_factory):
    """A directory after stages 1 to 5 of the recipe."""
    work = tmp_path_factory.mktemp("real")
    with open(shared_speech / "manifest.tsv", encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE) if row["id"] in DOZEN]
    lines = [[row["id"], str(shared_speech / row["path"]), row["lang"], row["transcript"]] for row in rows]
    table = ["\t".join(cells) + "\n" for cells in [["id", "path", "lang", "transcript"], *lines]]
    (work / "dozen.tsv").write_text("".join(table), encoding="utf-8")
    for split, tsv in (("test", shared_speech / "manifest.tsv"), ("dozen", work / "dozen.tsv")):
        command = [sys.executable, PREPARE, "--tsv", tsv, "--corpus", "real", "--split", split, "--nj", "1"]
        subprocess.run([*map(str, command), "--out", str(work / "data" / "manifests")], check=True)
    paths = tiny.make_pretrained(work / "pretrained", width=32, lm_width=96, embedding_std=0.15)
    (work / "conf.yaml").write_text(yaml.safe_dump(configuration(paths)), encoding="utf-8")
    recipe = ["--conf", work / "conf.yaml", "--data-dir", work / "data"]
    zipperasr("lists", *recipe)
    zipperasr("features", *recipe)
    zipperasr("train", *recipe, "--stage", 1, "--run-dir", work / "one")
    decode_and_score(work, "one", "test", ALL)
    decode_and_score(work, "one", "dozen", LEARNT)
    return work


def decode_and_score(work, run, split, langs):
    sets = [f"real_{lang}_{split}" for lang in langs]
    zipperasr("decode", "--run-dir", work / run, "--data-dir", work / "data", "--sets", *sets)
    zipperasr("score", *(work / run / f"decode_{name}" for name in sets))


def scores_of(work, run, split, langs):
    found = [work / run / f"decode_real_{lang}_{split}" / "scores.json" for lang in langs]
    return [json.loads(path.read_text(encoding="utf-8")) for path in found]


def percent_of(scores):
    counts = [s["profiles"]["whisper"] for s in scores]
    return 100 * sum(c["sub"] + c["ins"] + c["del"] for c in counts) / sum(c["ref_len"] for c in counts)


def test_every_clip_is_kept_and_the_one_over_30_s_is_said(work):
    sets = [f"real_{lang}_test" for lang in ALL]
    tallies = {name: defects.read_tally(manifests.tally_path(manifests.path_of(work / "data", name))) for name in sets}
    assert sum(tally.num_in for tally in tallies.values()) == sum(tally.num_kept for tally in tallies.values()) == 215
    assert [tally.examples["over 30 s"] for tally in tallies.values() if "over 30 s" in tally.kinds] == [[OVERLONG]]
    assert [defect for name in sets for defect in tallies[name].fatal(name)] == []
    assert {kind for tally in tallies.values() for kind in tally.kinds} <= {
        "over 30 s",
        "several channels",
        "below 16 kHz",
    }


def test_every_clip_is_decoded_and_scored(work):
    scores = scores_of(work, "one", "test", ALL)
    assert sum(s["num_utts"] for s in scores) == 215
    assert sum(s["num_missing"] for s in scores) == 0
    found = [work / "one" / f"decode_real_{lang}_test" / "utts.jsonl" for lang in ALL]
    lines = "".join(path.read_text(encoding="utf-8") for path in found).splitlines()
    flags = {row["id"]: row["flags"] for row in map(json.loads, lines)}
    assert len(flags) == 215
    assert [utt_id for utt_id in flags if "split" in flags[utt_id]] == [OVERLONG]
    assert not [utt_id for utt_id in flags if "unreadable" in flags[utt_id]]


def test_a_dozen_clips_are_learnt_by_heart_in_stage_2(work):
    recipe = ["--conf", work / "conf.yaml", "--data-dir", work / "data"]
    zipperasr("train", *recipe, "--stage", 2, "--run-dir", work / "two", "--init", work / "one")
    decode_and_score(work, "two", "dozen", LEARNT)
    before, after = scores_of(work, "one", "dozen", LEARNT), scores_of(work, "two", "dozen", LEARNT)
    assert sum(s["num_utts"] for s in after) == len(DOZEN)
    assert percent_of(before) > 90
    assert percent_of(after) < 5

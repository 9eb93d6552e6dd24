"""The aligner of a run: trained on its frozen encoder, accurate to a few frames, written beside what was decoded."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny
import tiny_recipe
import torch
import yaml
from conftest import REPOSITORY
from torch import nn

from zipperasr import config, files
from zipperasr.cli import recipe as recipes
from zipperasr.cli.main import main
from zipperasr.data import lists
from zipperasr.data.features import log_mel
from zipperasr.data.packing import PackingSettings
from zipperasr.data.utterances import Utterance, load_utterances
from zipperasr.errors import UserError
from zipperasr.model import LLMSettings, ModelSettings, checkpoint
from zipperasr.model.aligner import Aligner
from zipperasr.model.ctc import CtcHead, Units, load_head, save_head
from zipperasr.training import AlignerSettings
from zipperasr.training import aligner as training

MINI = REPOSITORY / "egs" / "multilingual12" / "pretrained" / "mini"
UNITS = Units(tuple(" abc一二"))


def frames_of(path, posterior=0.9):
    """Log-posteriors [T, V] that say a path: `posterior` for its unit in each frame."""
    others = (1 - posterior) / (len(UNITS) - 1)
    one_hot = torch.eye(len(UNITS))[[(UNITS.encode(c) or [0])[0] for c in path]]
    return (others + (posterior - others) * one_hot).log()


def aligner(**more):
    """An aligner whose frames are its posteriors."""
    return Aligner(nn.Identity(), UNITS, **more)


def times(words):
    return [(w.text, w.start_s, w.end_s) for w in words]


PAUSED = "--aab------ ------cc-a"  # 0.26 s between two words


def test_words_have_the_times_of_their_characters_and_the_mean_posterior_of_their_frames():
    words = aligner().words(frames_of(PAUSED), "de", "aB, ca!")
    assert times(words) == [("aB,", 0.04, 0.1), ("ca!", 0.36, 0.44)]
    assert [w.confidence for w in words] == [0.9, 0.9]
    frames = frames_of(PAUSED)
    frames[2] = frames_of("a", posterior=0.3)[0]
    assert aligner().words(frames, "de", "ab ca")[0].confidence == pytest.approx((0.3 + 0.9 + 0.9) / 3, abs=1e-4)


def test_words_begin_early_and_end_late_but_never_overlap_or_leave_the_audio():
    shifted = aligner(early_s=0.01, late_s=0.02)
    assert times(shifted.words(frames_of(PAUSED), "de", "ab ca")) == [("ab", 0.03, 0.12), ("ca", 0.35, 0.44)]
    shifted = aligner(early_s=0.03, late_s=0.05)
    assert times(shifted.words(frames_of("aab -cc"), "de", "ab ca")) == [("ab", 0.0, 0.09), ("ca", 0.09, 0.14)]


def test_no_word_ends_behind_its_audio_which_may_end_within_the_last_frame():
    frames = [frames_of("ab -cc"), frames_of("--a")]
    cut, within = aligner(late_s=0.01)(frames, ["de"] * 2, ["ab c", "a"], [0.11, 0.045])
    assert times(cut.words) == [("ab", 0.0, 0.065), ("c", 0.065, 0.11)]
    assert times(within.words) == [("a", 0.04, 0.045)]


def test_what_is_less_than_a_pause_between_two_words_is_shared_by_them():
    assert times(aligner().words(frames_of("--aab-- --cc-a"), "de", "ab ca")) == [
        ("ab", 0.04, 0.15),
        ("ca", 0.15, 0.28),
    ]


def test_characters_are_words_where_there_are_no_spaces():
    words = aligner().words(frames_of("-一--二二-a"), "zh", "一二 a")
    assert times(words) == [("一", 0.02, 0.06), ("二", 0.06, 0.13), ("a", 0.13, 0.16)]


def test_a_word_of_unknown_characters_has_no_duration_and_no_confidence():
    words = aligner().words(frames_of("-aa- -bb-"), "de", "xyz a ... b")
    assert times(words) == [("xyz", 0.0, 0.0), ("a", 0.02, 0.09), ("...", 0.09, 0.09), ("b", 0.09, 0.16)]
    assert [w.confidence for w in words] == [0.0, 0.9, 0.0, 0.9]
    (heard,) = aligner()([frames_of("-a")], ["de"], ["xyz"])  # a text that cannot be judged at all
    assert (heard.words, heard.disagreement) == ([], None)


def test_disagreement_is_the_edit_distance_to_what_the_head_hears_by_the_longer_text():
    one, other, long = aligner()(
        [frames_of("-a-b c-"), frames_of("-a-b c-"), frames_of("ab")], ["de"] * 3, ["A bc.", "a", "abcabc"]
    )
    assert (one.ctc_text, one.disagreement) == ("ab c", 0.0)  # spaces, case and punctuation do not count
    assert other.disagreement == pytest.approx(2 / 3)
    assert long.words == [] and long.disagreement == pytest.approx(4 / 6)  # too long for two frames
    assert aligner()([], [], []) == []


def test_a_head_is_read_as_it_was_written(tmp_path):
    head, units = CtcHead(16, 4), Units.of(["ba", "c"])
    assert units.characters == ("a", "b", "c") and units.decode(units.encode("cxab")) == "cab"
    korean = Units.of(["한국", "말"])
    assert (
        korean.decode(korean.encode("국말 한x")) == "국말한" and len(korean.encode("몬")) == 2
    )  # ㄴ is no last letter
    save_head(tmp_path, head, units)
    again, same = load_head(tmp_path)
    x = torch.randn(5, 16)
    assert same == units and torch.equal(again(x), head(x))
    (tmp_path / "units.json").write_text('{"characters": ["a"]}')
    with pytest.raises(UserError, match="'linear.bias' has shape .4., but the model has .2.; train it with"):
        load_head(tmp_path)
    with pytest.raises(UserError, match="no such file; train it with zipperasr train-aligner"):
        load_head(tmp_path / "no")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished stage-2 run with an aligner, and the data directory; its dev sets are tested on."""
    folder = tmp_path_factory.mktemp("aligner")
    made = tiny_recipe.make(folder, num_utts=8)
    tree = yaml.safe_load(made.conf.read_text(encoding="utf-8"))
    settings = tree["data"]["lists"]["settings"]
    settings["all"]["test"] = settings["all"].pop("dev")
    made.conf.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    whole = recipes.load(made.conf)
    lists.write(made.data, whole.data.lists)
    run_dir = folder / "run"
    first = whole.model.model_copy(update={"adapter": None})
    checkpoint.save_trainable(tiny.trained(first, stage=1), run_dir / "init")
    tiny.save_run(run_dir, whole.model, 2, tiny.trained(whole.model, 2, run_dir / "init"), step=7)
    config.save(run_dir / "config.yaml", whole)
    files.write_json(run_dir / "train.json", {"step": 7})
    before = digests(run_dir)
    assert main(train_args(run_dir, made.data)) == 0
    assert before.items() <= digests(run_dir).items()  # the run itself is as it was
    return run_dir, made.data


def train_args(run_dir, data_dir, *more):
    args = ["train-aligner", "--run-dir", run_dir, "--data-dir", data_dir, *more, "training.aligner.epochs=2"]
    return list(map(str, args))


def align_args(run_dir, data_dir, *more):
    return list(map(str, ["align", "--run-dir", run_dir, "--data-dir", data_dir, "--sets", "noise_de_dev", *more]))


def digests(folder):
    return {path: files.sha256(path) for path in folder.rglob("*") if path.is_file()}


def test_training_again_gives_the_same_bytes_and_what_is_done_is_left(trained, capsys):
    run_dir, data_dir = trained
    weights = run_dir / "aligner" / "aligner.safetensors"
    first = files.sha256(weights)
    assert main(train_args(run_dir, data_dir)) == 0
    assert "trained already" in capsys.readouterr().out
    (run_dir / "aligner" / ".done").unlink()
    assert main(train_args(run_dir, data_dir)) == 0 and files.sha256(weights) == first
    assert main(train_args(run_dir, data_dir, "training.aligner.seed=1")) == 0 and files.sha256(weights) != first
    assert main(train_args(run_dir, data_dir)) == 0 and files.sha256(weights) == first
    assert set("haus ") <= set(json.loads((run_dir / "aligner" / "units.json").read_text())["characters"])


def test_each_language_is_trained_on_through_its_own_adapter(trained):
    run_dir, data_dir = trained
    whole = recipes.load_run(run_dir)
    model = checkpoint.load_run(run_dir)
    some = [u for u in load_utterances(data_dir, "all", "train", None, whole.data.features) if u.lang == "de"][:2]
    features = [u.features() for u in some]
    mixed, _ = training._encode(model, features, ["de", "th"], 30.0)
    alone = [model.merged(lang).encoder([x], [lang], 30.0)[0] for lang, x in zip(("de", "th"), features)]
    torch.testing.assert_close(mixed, torch.cat(alone), rtol=1e-4, atol=1e-4)


def decoded(run_dir, data_dir, hyps):
    """A decode directory of noise_de_dev with these hypotheses; the utterances in the order of the list."""
    utterances = load_utterances(data_dir, "all", "test", ["noise_de_dev"], recipes.load_run(run_dir).data.features)
    directory = run_dir / "decode_noise_de_dev"
    for name, texts in {"hyp": hyps, "ref": [u.reference for u in utterances]}.items():
        with files.write(directory / name) as stream:
            stream.writelines(f"{u.id} {text}\n" for u, text in zip(utterances, texts, strict=True) if text is not None)
    files.write_json(directory / "meta.json", {"lang": "de", "set": "noise_de_dev", "setting": "all", "first": None})
    return directory, utterances


def test_word_times_are_written_for_every_utterance_of_a_set(trained, capsys):
    run_dir, data_dir = trained
    directory, utterances = decoded(run_dir, data_dir, ["haus katze", None, "baum " * 200])
    assert main(align_args(run_dir, data_dir)) == 0
    assert "2 words of 3 utterances (1 have none)" in capsys.readouterr().out
    rows = [json.loads(line) for line in (directory / "words.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == [u.id for u in utterances]
    assert [[w["word"] for w in row["words"]] for row in rows] == [["haus", "katze"], [], []]
    edges = [edge for w in rows[0]["words"] for edge in (w["start_s"], w["end_s"])]
    assert edges == sorted(edges) and edges[0] >= 0 and edges[-1] <= utterances[0].duration_s + 0.0005  # rounded
    assert rows[1]["ctc_text"] is rows[1]["disagreement"] is None and rows[1]["confidence"] is None
    assert rows[2]["disagreement"] > 0.9  # nobody says two hundred words in a second
    ctm = [line.split() for line in (directory / "ctm").read_text().splitlines()]
    assert [(line[0], line[4]) for line in ctm] == [(utterances[0].id, "haus"), (utterances[0].id, "katze")]
    assert {path.stem for path in (directory / "textgrid").iterdir()} == {u.id for u in utterances}

    model, lang = checkpoint.load_run(run_dir).merged("de"), "de"
    with torch.inference_mode():
        frames, _ = model.encoder([utterances[0].features()], [lang], 30.0)
    alone = Aligner.load(run_dir).words(frames, lang, "haus katze")
    assert [(w["word"], w["start_s"], w["end_s"]) for w in rows[0]["words"]] == times(alone)

    assert main(align_args(run_dir, data_dir)) == 0 and "aligned already" in capsys.readouterr().out
    assert main(align_args(run_dir, data_dir, "--text", "ref", "--format", "json")) == 0
    rows = [json.loads(line) for line in (directory / "words.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [" ".join(w["word"] for w in row["words"]) for row in rows] == [u.reference for u in utterances]


def test_the_best_texts_of_the_head_alone_are_written_where_they_are_asked_for(trained):
    run_dir, data_dir = trained
    directory, utterances = decoded(run_dir, data_dir, ["haus katze", None, "baum"])
    assert main(align_args(run_dir, data_dir)) == 0 and not (directory / "nbest.jsonl").exists()
    assert main(align_args(run_dir, data_dir, "--format", "nbest")) == 0
    rows = [json.loads(line) for line in (directory / "nbest.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == [u.id for u in utterances]
    assert [len(row["texts"]) for row in rows] == [10, 0, 10]
    scores = [score for _, score in rows[0]["texts"]]
    assert scores == sorted(scores, reverse=True)

    model, aligner = checkpoint.load_run(run_dir).merged("de"), Aligner.load(run_dir)
    with torch.inference_mode():
        frames, _ = model.encoder([utterances[0].features()], ["de"], 30.0)
        log_probs = aligner.head(frames)
    for text, score in rows[0]["texts"]:
        ids = aligner.units.encode(text)
        loss = torch.nn.functional.ctc_loss(
            log_probs, torch.tensor(ids), [len(log_probs)], [len(ids)], reduction="none"
        )
        assert score == pytest.approx(-loss.item(), abs=1e-3)


def test_no_word_times_are_left_of_texts_that_are_no_longer_there(trained, capsys):
    run_dir, data_dir = trained
    directory, utterances = decoded(run_dir, data_dir, ["haus katze"] * 3)
    assert main(align_args(run_dir, data_dir)) == 0
    assert main(align_args(run_dir, data_dir, "--text", "ref", "--format", "ctm")) == 0
    assert (directory / "words.jsonl").exists() and (directory / "textgrid").exists()  # of the hypotheses, as asked
    capsys.readouterr()
    assert main(align_args(run_dir, data_dir, "--format", "textgrid", "json")) == 0
    assert "aligned already" in capsys.readouterr().out
    decoded(run_dir, data_dir, ["baum", None, "haus"])  # and so decoded again
    assert main(align_args(run_dir, data_dir, "--format", "json")) == 0
    assert not (directory / "textgrid").exists()
    said = [line.split()[4] for line in (directory / "ctm").read_text().splitlines()]
    assert said == [word for u in utterances for word in u.reference.split()]
    assert [json.loads(line)["text"] for line in (directory / "words.jsonl").open()] == ["baum", "", "haus"]
    (directory / "ref").write_text("".join(f"{u.id} haus\n" for u in utterances[1:]), encoding="utf-8")
    (directory / "hyp").write_text("", encoding="utf-8")
    assert main(align_args(run_dir, data_dir)) == 1
    assert "decoded by another list than that in" in capsys.readouterr().err


def test_what_is_not_known_of_a_set_is_not_said_to_be_nothing(trained, capsys):
    run_dir, data_dir = trained
    decoded(run_dir, data_dir, ["猫"] * 3)  # no character that the head knows
    assert main(align_args(run_dir, data_dir)) == 0
    assert "0 words of 3 utterances (3 have none), confidence nan, disagreement nan" in capsys.readouterr().out


def test_an_aligner_that_was_being_replaced_is_none(trained, monkeypatch, capsys):
    run_dir, data_dir = trained

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training, "save_head", stopped)
        assert main(train_args(run_dir, data_dir, "training.aligner.seed=2")) == 130
    with pytest.raises(UserError, match="settings.json"):
        Aligner.load(run_dir)
    assert main(train_args(run_dir, data_dir)) == 0 and Aligner.load(run_dir)


def test_what_cannot_be_aligned_is_one_clear_line(trained, capsys):
    run_dir, data_dir = trained

    def said(args):
        assert main(args) == 1
        return capsys.readouterr().err

    decoded(run_dir, data_dir, ["haus"] * 3)
    assert "engine 'kaldi' is unknown" in said(align_args(run_dir, data_dir, "--engine", "kaldi"))
    assert "override 'model.x=1': a trained run takes only" in said(train_args(run_dir, data_dir, "model.x=1"))
    assert "no such lists; there are all" in said(train_args(run_dir, data_dir, "--setting", "nothing"))
    weights = run_dir / "checkpoints" / "step-7" / "trainable.safetensors"
    kept = weights.read_bytes()
    try:
        checkpoint.save_trainable(tiny.trained(recipes.load_run(run_dir).model, 2, run_dir / "init"), weights.parent)
        assert "has been trained anew since; run zipperasr train-aligner again" in said(align_args(run_dir, data_dir))
    finally:
        weights.write_bytes(kept)
    (run_dir / "aligner").rename(run_dir / "elsewhere")
    try:
        assert "train it with zipperasr train-aligner" in said(align_args(run_dir, data_dir))
    finally:
        (run_dir / "elsewhere").rename(run_dir / "aligner")


class Synthesised(Utterance):
    """An utterance whose features are in memory."""

    def features(self):
        return self.source


def utterance_of(spoken, number):
    said = spoken.utterance
    features = log_mel(spoken.audio.astype(np.float32) / 2**15, 80)
    seconds = len(spoken.audio) / 16000
    return Synthesised(str(number), said.lang, said.text, said.text, seconds, len(features), 80, features)


@pytest.mark.parametrize(
    ("langs", "said"), [([], "no such file; train it with zipperasr train-aligner"), (["--langs", "ja"], "choose from")]
)
def test_a_measurement_that_cannot_be_made_is_one_clear_line(tmp_path, langs, said):
    script = str(REPOSITORY / "local" / "word_times.py")
    done = subprocess.run(
        [sys.executable, script, "--run-dir", str(tmp_path), *langs], capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode and said in done.stderr and "Traceback" not in done.stderr


def test_word_times_are_within_40_ms_of_those_that_the_synthesiser_tells(tmp_path):
    pytest.importorskip("espeakng_loader", reason="the mini extra is not installed")
    sys.path.insert(0, str(REPOSITORY / "local"))
    import word_times

    settings = ModelSettings(
        encoder={"pretrained": str(MINI / "whisper")}, llm=LLMSettings(pretrained=str(MINI / "lm"))
    )  # fmt: skip
    model = checkpoint.build(settings, stage=1)
    train, test = (
        word_times.speak([one for lang in ("de", "en") for one in word_times.phrases(lang, part, number)])
        for part, number in (("train", 100), ("test", 20))
    )
    training.train(
        tmp_path, model, [utterance_of(spoken, number) for number, spoken in enumerate(train)],
        settings=AlignerSettings(epochs=4, rows_per_batch=4), packing=PackingSettings(max_tokens_per_row=256),
        chunk_s=30.0, about={},
    )  # fmt: skip
    saved = files.read_json(tmp_path / "aligner" / "settings.json")
    aligned = Aligner(*load_head(tmp_path / "aligner"), saved["early_s"], saved["late_s"])
    distances = []
    for spoken in test:
        with torch.inference_mode():
            frames, _ = model.encoder([utterance_of(spoken, 0).features()], [spoken.utterance.lang])
        words = aligned.words(frames, spoken.utterance.lang, spoken.utterance.text)
        distances.append(word_times.distances_ms(spoken, words))
    assert np.median(np.abs(np.concatenate(distances))) <= 40

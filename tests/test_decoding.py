"""Hypotheses against plain forward passes, and decode directories: whole, resumable, in the order of the list."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
import tiny
import torch
from lhotse import MonoCut, Recording, SupervisionSegment
from torch import nn
from transformers import CompileConfig

from zipperasr import config, files, languages, prompts
from zipperasr.cli import recipe as recipes
from zipperasr.cli.main import main
from zipperasr.data import lists, manifests
from zipperasr.data.features import FeatureSettings, num_frames
from zipperasr.data.utterances import Utterance, load_utterances
from zipperasr.decoding import DecodingSettings, job, worker
from zipperasr.decoding.generate import Transcriber
from zipperasr.decoding.guards import MIN_LOOP
from zipperasr.model import checkpoint
from zipperasr.model.speech_llm import SpeechLLM

DURATIONS_S = {"de": [0.9, 0.3, 1.7, 2.6, 0.5], "zh": [0.4, 1.1]}
WINDOW_S = 2.0
CAPS = [9, 3, 14, 6]
DE = ["de"] * 4
FRAMES = [90, 31, 170, 55]


def randomised(model):
    """The model with random trained parameters."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def sharpened(llm):
    """The LLM with larger weights, so that it says different things about different speech."""
    for parameter in llm.parameters():
        parameter *= 3
    return llm


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return tiny.make_pretrained(tmp_path_factory.mktemp("pretrained"), n_audio_ctx=int(WINDOW_S * 50))


@pytest.fixture(scope="module")
def model(paths):
    """A model of German; its end of text is a token that it really says in the middle of a hypothesis."""
    model = randomised(checkpoint.build(tiny.settings(paths), stage=2)).merged("de")
    sharpened(model.llm)
    with torch.inference_mode():
        said = [naive_greedy(model, x, 12)[0] for x in speech_of(model)]
    model.tokenizer.end_of_text = said[2][6]
    return model


def speech_of(model):
    generator = torch.Generator().manual_seed(2)
    features = [torch.randn(n, 80, generator=generator) for n in FRAMES]
    with torch.inference_mode():
        return model.speech_embeddings(features, ["de"] * len(features))


def step_logprobs(model, speech, ids):
    """Log-probabilities [len(ids) + 1, V] of what stands at and after each of `ids`: one unpadded pass, no cache."""
    prompt = model.embed([prompts.prompt_ids(model.tokenizer, "de")])[0]
    inputs = torch.cat([prompt, speech, *([model.embed([ids])[0]] if ids else [])])
    return model.llm(inputs_embeds=inputs[None]).logits[0].log_softmax(-1)[-len(ids) - 1 :]


def naive_greedy(model, speech, cap):
    """Tokens and the mean of their log-probabilities, by the argmax of one forward pass a token."""
    ids, total = [], 0.0
    while len(ids) < cap and model.tokenizer.end_of_text not in ids:
        logprob, token = step_logprobs(model, speech, ids)[-1].max(-1)
        ids.append(token.item())
        total += logprob.item()
    return ids, total / len(ids)


def text_of(model, ids):
    return " ".join(model.tokenizer.decode([i for i in ids if i != model.tokenizer.end_of_text]).split())


@torch.inference_mode()
def test_a_greedy_hypothesis_is_the_argmax_of_plain_forward_passes(model):
    speech = speech_of(model)
    found = Transcriber(model, DecodingSettings())(speech, DE, CAPS)
    for hypothesis, x, cap in zip(found, speech, CAPS, strict=True):
        ids, logprob = naive_greedy(model, x, cap)
        assert (hypothesis.text, hypothesis.ids) == (text_of(model, ids), ids)
        assert hypothesis.logprob == pytest.approx(logprob, abs=1e-4)
        assert ("capped" in hypothesis.flags) == (ids[-1] != model.tokenizer.end_of_text)
    assert {"capped" in h.flags for h in found} == {True, False}  # or the test would not test both ends
    assert len({h.text for h in found}) == len(found)


@pytest.mark.parametrize("beam", [1, 4])
def test_a_hypothesis_does_not_depend_on_its_neighbours(model, beam):
    speech, settings = speech_of(model), DecodingSettings(beam=beam, length_penalty=0.7)
    transcriber = Transcriber(model, settings)
    together = transcriber(speech, DE, CAPS)
    for order in ([3, 1, 0, 2], [2, 0], *([i] for i in range(4))):
        alone = transcriber([speech[i] for i in order], DE[: len(order)], [CAPS[i] for i in order])
        for i, hypothesis in zip(order, alone, strict=True):
            assert (hypothesis.text, hypothesis.ids) == (together[i].text, together[i].ids)
            assert hypothesis.logprob == pytest.approx(together[i].logprob, abs=1e-4)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("beam", [1, 3])
def test_languages_in_one_batch_say_what_each_says_alone_with_its_merged_model(paths, beam, static):
    """Guards included: what is foreign to one language is another's own script."""
    torch.manual_seed(3)
    langs, caps = ["th", "de", "zh", "de"], [9, 12, 14, 6]
    built = randomised(checkpoint.build(tiny.settings(paths, langs=("de", "th", "zh")), stage=2))
    sharpened(built.llm)
    together = Transcriber(built.merged(), DecodingSettings(beam=beam, static_cache=static, max_foreign_share=0.2))
    generator = torch.Generator().manual_seed(2)
    features = [torch.randn(n, 80, generator=generator) for n in FRAMES]
    assert len({len(together.prompt(lang).embeddings) for lang in langs}) == 3  # or no prompt would be padded
    speech, frames = together.encode(features, langs, 30)
    found = together(speech, langs, caps)
    texts = []
    for i, lang in enumerate(langs):
        alone = Transcriber(built.merged(lang), DecodingSettings(beam=beam, max_foreign_share=0.2))
        own_speech, (own_frames,) = alone.encode(features[i : i + 1], [lang], 30)
        (expected,) = alone(own_speech, [lang], caps[i : i + 1])
        torch.testing.assert_close(frames[i], own_frames, atol=1e-4, rtol=1e-4)
        assert (found[i].ids, found[i].flags, found[i].text) == (expected.ids, expected.flags, expected.text)
        assert found[i].logprob == pytest.approx(expected.logprob, abs=1e-4)
        texts.append([h.text for h in alone(own_speech, ["de" if lang != "de" else "th"], caps[i : i + 1])])
    assert any("script" in one.flags for one in found)
    assert all(one.text != other for one, (other,) in zip(found, texts, strict=True))  # the prompt matters


class Letters:
    """A tokenizer of seven letters, whose end of text is 0."""

    end_of_text = 0

    def encode(self, text):
        return [1 + ord(letter) % 7 for letter in text]

    def decode(self, ids):
        return "".join("abcdefg"[i - 1] for i in ids if i)


@torch.inference_mode()
def test_a_wide_beam_finds_the_most_probable_text(model):
    torch.manual_seed(3)
    small = SpeechLLM(model.encoder, model.projector, sharpened(tiny.make_lm(8, 0)), Letters(), {})
    caps = [3, 2, 3, 3]
    found = Transcriber(small, DecodingSettings(beam=64, length_penalty=0))(speech_of(small), DE, caps)
    for hypothesis, x, cap in zip(found, speech_of(small), caps, strict=True):
        best = (-torch.inf, None)
        for length in range(1, cap + 1):
            for ids in map(list, itertools.product(range(8), repeat=length)):
                if 0 not in ids[:-1] and (ids[-1] == 0 or length == cap):
                    steps = step_logprobs(small, x, ids[:-1])
                    best = max(best, (steps[range(length), ids].sum().item(), ids))
        assert hypothesis.text == Letters().decode(best[1])
        assert hypothesis.logprob * len(hypothesis.ids) == pytest.approx(best[0], abs=1e-4)


class Scripted(Letters):
    """Letters, the last four of which are Greek."""

    def decode(self, ids):
        return super().decode(ids).translate(str.maketrans("defg", "δεζη"))


@pytest.fixture(scope="module")
def small(model):
    """A model of eight tokens, which repeats itself."""
    torch.manual_seed(8)
    return SpeechLLM(model.encoder, model.projector, sharpened(tiny.make_lm(8, 0)), Scripted(), {})


def has_loop(text, repeats):
    """Whether some letters stand there often enough in a row, by the definition."""
    units = ((start, unit) for unit in range(1, len(text)) for start in range(len(text) - unit + 1))
    return any(text[i:].startswith(text[i : i + n] * max(repeats, math.ceil(MIN_LOOP / n))) for i, n in units)


@pytest.mark.parametrize("beam", [1, 3])
def test_a_loop_is_searched_for_again_or_cut_and_other_text_stays(small, beam):
    speech, caps, loose = speech_of(small), [60, 50, 60, 40], {"beam": beam, "max_foreign_share": 1}
    before = Transcriber(small, DecodingSettings(loop_repeats=1000, **loose))(speech, DE, caps)
    transcriber = Transcriber(small, DecodingSettings(loop_repeats=4, **loose))
    after = transcriber(speech, DE, caps)
    for first, found in zip(before, after, strict=True):
        assert ("loop" in found.flags) == has_loop(first.text, 4)
        if "loop" in found.flags:
            assert found.first_text == first.text and not has_loop(found.text, 4)
            assert "redecoded" in found.flags or ("cut" in found.flags and first.text.startswith(found.text))
        else:
            assert found == first
    assert any("loop" in found.flags for found in after)
    for i, found in enumerate(after):
        (alone,) = transcriber([speech[i]], ["de"], [caps[i]])
        assert (alone.text, alone.flags) == (found.text, found.flags)


def test_text_in_another_script_is_searched_for_again_without_it(small):
    speech, caps, german = speech_of(small), [30] * 4, languages.get("de")
    before = Transcriber(small, DecodingSettings(loop_repeats=1000, max_foreign_share=1))(speech, DE, caps)
    after = Transcriber(small, DecodingSettings(loop_repeats=1000, max_foreign_share=0.2))(speech, DE, caps)
    for first, found in zip(before, after, strict=True):
        assert ("script" in found.flags) == (languages.foreign_share(first.text, german) > 0.2)
        is_again = "redecoded" in found.flags
        assert found.first_text == (first.text if is_again else None) and (is_again or found.text == first.text)
        assert not is_again or languages.foreign_share(found.text, german) in (0, None)
    assert any("redecoded" in found.flags for found in after)


@pytest.mark.parametrize("beam", [1, 3])
def test_a_cache_of_fixed_size_changes_nothing(model, beam):
    grown, fixed = (
        Transcriber(model, DecodingSettings(beam=beam, static_cache=static))(speech_of(model), DE, CAPS)
        for static in (False, True)
    )
    for one, other in zip(grown, fixed, strict=True):
        assert (one.text, one.flags) == (other.text, other.flags)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


class Compiled(Transcriber):
    """Compiles the step as on a GPU, but for the code that is made of its graph."""

    def _config(self, max_new_tokens):
        config = super()._config(max_new_tokens)
        config.compile_config = CompileConfig(backend="eager", mode=None, fullgraph=True)
        config.compile_config._compile_all_devices = True
        return config


def test_the_step_is_one_graph_that_batches_of_a_shape_share(model):
    plain = Transcriber(model, DecodingSettings())(speech_of(model), DE, CAPS)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = Compiled(model, DecodingSettings(static_cache=True))
    for _ in range(2):
        assert [h.text for h in compiled(speech_of(model), DE, CAPS)] == [h.text for h in plain]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("beam", [1, 3])
def test_batches_hold_every_utterance_once_within_memory_and_without_much_padding(beam):
    draw, settings = np.random.default_rng(0), DecodingSettings(beam=beam, max_tokens_per_batch=4096)
    durations_s = np.sort(draw.uniform(0.3, 29, 200))[::-1].tolist()
    listed = [Utterance(f"{i}", "de", "", "", s, num_frames(s), 80, None) for i, s in enumerate(durations_s)]
    made = list(worker.batches(listed, settings, prompt_tokens=12))
    assert [u.id for batch in made for u in batch] == [u.id for u in listed]
    for batch in made:
        positions = [12 + math.ceil(u.num_frames / 8) + worker.max_tokens(u, settings) for u in batch]
        assert len(batch) == 1 or beam * len(batch) * 64 * math.ceil(positions[0] / 64) <= 4096
        assert min(positions) >= 0.6 * max(positions)
    assert max(map(len, made)) > 4


class Run(NamedTuple):
    """A run directory with random weights, and its data."""

    directory: Path
    data: Path

    def args(self, *sets, more=()):
        return ["decode", "--run-dir", str(self.directory), "--data-dir", str(self.data), "--sets", *sets, *more]

    def read(self, name, lang="de"):
        return (self.directory / f"decode_noise_{lang}_test" / name).read_text(encoding="utf-8")

    def utts(self, lang="de"):
        return {row["id"]: row for row in map(json.loads, self.read("utts.jsonl", lang).splitlines())}


def write_set(data, lang, durations_s):
    draw = np.random.default_rng(0)
    cuts = []
    for i, duration_s in enumerate(durations_s):
        utt_id = f"{lang}-{i}"
        path = data / "audio" / f"{utt_id}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = draw.normal(0, 0.1, int(duration_s * 16000))
        syllables = np.sin(np.arange(len(noise)) * 4 * np.pi / 16000) ** 2 + 0.01  # 4 Hz
        soundfile.write(path, (noise * syllables).astype(np.float32), 16000)
        recording = Recording.from_file(path, recording_id=utt_id)
        supervision = SupervisionSegment(utt_id, utt_id, 0, recording.duration, text="haus\u3000 baum ", language=lang)
        cut = MonoCut(utt_id, 0, recording.duration, 0, recording=recording, supervisions=[supervision])
        cuts.append(cut.to_dict())
    manifests.write(manifests.path_of(data, f"noise_{lang}_test"), cuts)


@pytest.fixture
def run(paths, tmp_path):
    """A stage-2 run on German and Thai; German is tested in its own setting (and listed twice), Chinese in another."""
    data, directory = tmp_path / "data", tmp_path / "exp" / "zipper_soft_full"
    for lang, durations_s in DURATIONS_S.items():
        write_set(data, lang, durations_s)
    stage = {"setting": "target"}
    hours = 2 * sum(DURATIONS_S["de"]) / 3600
    whole = recipes.Config.model_validate({
        "corpora": {"noise": {"prepare": "mls", "langs": ["de", "zh"]}},
        "data": {
            "features": {"storage": "on_the_fly"},
            "lists": {"settings": {
                "source": {"test": {"noise_zh_test": None}},
                "target": {"test": {"noise_de_test": hours}},
            }},
        },
        "model": tiny.settings(paths).model_dump(),
        "training": {"stage1": stage, "stage2": stage},
        "decoding": {"max_tokens_per_s": 5, "min_max_tokens": 3, "max_tokens_per_batch": 200},
    })  # fmt: skip
    lists.write(data, whole.data.lists)
    config.save(directory / "config.yaml", whole)
    checkpoint.save_trainable(checkpoint.build(whole.model, stage=1), directory / "init")
    step = directory / "checkpoints" / "step-7"
    checkpoint.save_trainable(randomised(checkpoint.build(whole.model, stage=2)), step)
    files.write_json(step / "state.json", {})
    return Run(directory, data)


def test_a_decode_directory_holds_the_list_in_its_order(run):
    assert main(run.args("noise_de_test", "noise_zh_test")) == 0
    listed = load_utterances(run.data, "target", "test", None, FeatureSettings(storage="on_the_fly"))
    ids = [u.id for u in listed]
    assert sorted(ids) == sorted([f"de-{i}" for i in range(5)] + [f"de-{i}#2" for i in range(5)])
    utts = run.utts()
    assert list(utts) == ids
    assert run.read("ref") == "".join(f"{i} haus baum\n" for i in ids)
    assert run.read("hyp") == "".join(" ".join([i, *utts[i]["text"].split()]) + "\n" for i in ids)
    assert len({u["text"] for u in utts.values()}) > 1
    for u in listed:
        row, repeated = utts[u.id], utts[u.id.removesuffix("#2")]
        assert (row["text"], row["duration_s"]) == (repeated["text"], u.duration_s)
        assert ("split" in row["flags"]) == (u.duration_s > WINDOW_S)
        assert ("capped" in row["flags"]) == (row["num_tokens"] == max(3, math.ceil(5 * u.duration_s)))
        assert ("empty" in row["flags"]) == (not row["text"])
    meta = json.loads(run.read("meta.json"))
    expected = {
        "set": "noise_de_test",
        "lang": "de",
        "setting": "target",
        "run": "zipper_soft_full",
        "stage": 2,
        "step": 7,
        "averaged": None,
    }
    expected |= {"method": "zipper_soft", "encoder": "full", "unseen_policy": None, "beam": 1}
    assert meta.items() >= expected.items()
    assert json.loads(run.read("meta.json", "zh")).items() >= {"setting": "source", "unseen_policy": "shared"}.items()
    timing = json.loads(run.read("timing.json"))
    assert timing["audio_s"] == pytest.approx(sum(u.duration_s for u in listed))
    assert timing["rtfx"] == pytest.approx(timing["audio_s"] / timing["wall_s"])
    parts = [timing[name] for name in ("encoder_s", "prefill_s", "step_s", "detokenise_s")]
    assert min(parts) > 0 and sum(parts) <= timing["wall_s"]
    assert set(os.listdir(run.directory / "decode_noise_de_test")) == {*job.OUTPUTS, ".done", ".lock"}


@pytest.mark.parametrize(
    "more", [["decoding.max_tokens_per_batch=1"], ["decoding.max_tokens_per_batch=9999"], ["--nj", "2"]]
)
def test_neither_batches_nor_processes_change_results(run, more):
    assert main(run.args("noise_de_test")) == 0
    expected = run.utts()
    shutil.rmtree(run.directory / "decode_noise_de_test")
    assert main(run.args("noise_de_test", more=more)) == 0
    assert list(run.utts()) == list(expected)
    for utt_id, row in run.utts().items():
        assert row == expected[utt_id] | {"logprob": pytest.approx(expected[utt_id]["logprob"], abs=1e-4)}


def test_a_killed_decode_goes_on_and_ends_with_the_same_results(run, monkeypatch):
    assert main(run.args("noise_de_test")) == 0
    expected, directory = run.read("utts.jsonl"), run.directory / "decode_noise_de_test"
    shutil.rmtree(directory)
    transcribed = []

    def transcribe_all(transcriber, job, batch, encoded):
        transcribed.append([u.id for u, _ in batch])
        return real(transcriber, job, batch, encoded)

    def transcribe_three_batches(*args):
        if len(transcribed) == 3:
            raise KeyboardInterrupt
        return transcribe_all(*args)

    real = worker._transcribe
    monkeypatch.setattr(worker, "_transcribe", transcribe_three_batches)
    assert main(run.args("noise_de_test")) == 130
    assert set(os.listdir(directory)) == {".lock", *(path.name for path in directory.glob("part.*.jsonl"))}
    (part,) = directory.glob("part.*.jsonl")
    part.write_bytes(part.read_bytes()[:-5])  # killed in the middle of a line
    monkeypatch.setattr(worker, "_transcribe", transcribe_all)
    assert main(run.args("noise_de_test")) == 0
    assert run.read("utts.jsonl") == expected
    ids = list(itertools.chain.from_iterable(transcribed))
    assert {utt_id for utt_id in ids if ids.count(utt_id) == 2} == {transcribed[2][-1]}  # the one that was cut off
    assert not list(directory.glob("part.*"))


def test_a_finished_set_is_skipped_without_torch_and_decoded_again_with_other_settings(run):
    assert main(run.args("noise_de_test")) == 0
    first = (run.directory / "decode_noise_de_test" / "hyp").stat().st_mtime_ns
    code = f"import sys; from zipperasr.cli.main import main; status = main({run.args('noise_de_test')!r}); " + (
        "print({'torch', 'lhotse', 'transformers'} & set(sys.modules)); sys.exit(status)"
    )
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert again.stdout == f"{run.directory}/decode_noise_de_test: complete\nset()\n"
    assert (run.directory / "decode_noise_de_test" / "hyp").stat().st_mtime_ns == first
    assert main(run.args("noise_de_test", more=["decoding.min_max_tokens=1"])) == 0
    assert min(row["num_tokens"] for row in run.utts().values()) < 3
    (run.directory / "decode_noise_de_test" / "hyp").unlink()
    assert main(run.args("noise_de_test", more=["decoding.min_max_tokens=1"])) == 0
    assert run.read("hyp")


def test_unreadable_audio_costs_its_own_utterance_only(run, capsys):
    (run.data / "audio" / "de-2.wav").write_bytes(b"RIFF")
    (run.data / "audio" / "de-0.wav").unlink()
    assert main(run.args("noise_de_test", more=["decoding.max_tokens_per_batch=1"])) == 0
    bad = {"de-0", "de-2", "de-0#2", "de-2#2"}
    assert {utt_id for utt_id, row in run.utts().items() if row["flags"] == ["unreadable"]} == bad
    assert {line.split()[0] for line in run.read("hyp").splitlines()} == run.utts().keys() - bad
    assert len(run.read("ref").splitlines()) == 10
    out, err = capsys.readouterr()
    assert "4 unreadable" in out
    assert [err.count(f"cut '{utt_id}'") for utt_id in sorted(bad)] == [1] * 4


def test_silence_has_empty_text_and_ten_milliseconds_count_as_deleted(run, capsys):
    soundfile.write(run.data / "audio" / "de-3.wav", np.zeros(int(2.6 * 16000)), 16000)
    write_set(run.data, "zh", [0.01, 1.1])
    (run.data / "lists" / "source" / "test" / "noise_zh_test.txt").write_text("zh-0\nzh-1\n")
    assert main(run.args("noise_de_test", "noise_zh_test")) == 0
    silent = run.utts()["de-3"]
    assert (silent["text"], silent["flags"], silent["logprob"]) == ("", ["no_speech"], None)
    assert "de-3\n" in run.read("hyp")
    assert {i: row["flags"] == ["unreadable"] for i, row in run.utts("zh").items()} == {"zh-0": True, "zh-1": False}
    assert "cut 'zh-0': 0.01 s is too short" in capsys.readouterr().err
    assert json.loads(run.read("timing.json"))["flags"]["no_speech"] == 2  # it is listed twice


def test_the_encoders_output_is_kept_as_its_mean_over_time(run):
    assert main(run.args("noise_de_test")) == 0
    with np.load(run.directory / "decode_noise_de_test" / "encodings.npz") as kept:
        by_id = dict(zip(kept["ids"].tolist(), kept["vectors"], strict=True))
    listed = load_utterances(run.data, "target", "test", ["noise_de_test"], FeatureSettings(storage="on_the_fly"))
    model = checkpoint.load_run(run.directory)
    assert list(by_id) == [u.id for u in listed]
    for u in listed:
        with torch.inference_mode():
            frames, _ = model.encoder([u.features()], ["de"], WINDOW_S)
        assert torch.tensor(by_id[u.id]).allclose(frames.mean(0), atol=2e-4)


def test_a_set_is_decoded_as_another_language_beside_its_own_results(run):
    assert main(run.args("noise_de_test", "noise_zh_test")) == 0
    own = run.utts()
    assert main(run.args("noise_de_test", more=["--as", "de", "th", "--first", "4"])) == 0
    found = {}
    for lang in ("de", "th"):
        directory = run.directory / f"as_{lang}" / "decode_noise_de_test"
        meta = files.read_json(directory / "meta.json")
        assert (meta["lang"], meta["as"], meta["first"]) == ("de", lang, 4)
        found[lang] = [json.loads(line) for line in (directory / "utts.jsonl").read_text().splitlines()]
        assert [row["id"] for row in found[lang]] == list(own)[:4]
    assert [row["text"] for row in found["de"]] == [row["text"] for row in own.values()][:4]
    assert [row["text"] for row in found["th"]] != [row["text"] for row in found["de"]]
    assert run.utts() == own
    model = checkpoint.load_run(run.directory).merged("th")
    (u,) = load_utterances(run.data, "target", "test", ["noise_de_test"], FeatureSettings(storage="on_the_fly"))[:1]
    with torch.inference_mode():
        speech = model.speech_embeddings([u.features()], ["th"], WINDOW_S)
    settings = DecodingSettings(max_tokens_per_s=5, min_max_tokens=3)
    (expected,) = Transcriber(model, settings)(speech, ["th"], [worker.max_tokens(u, settings)])
    assert found["th"][0]["text"] == expected.text


@pytest.mark.parametrize(
    ("sets", "more", "said"),
    [
        (["noise_fr_test"], [], "no setting tests on the set 'noise_fr_test'; there are noise_de_test, noise_zh_test"),
        (["noise_de_test"], ["--step", "3"], "no checkpoint at step 3; there are 7"),
        (["noise_de_test"], ["model.encoder.context=chunked"], "a trained run takes only decoding.<key> and"),
        (
            ["noise_de_test"],
            ["--run-dir", "conf"],
            "conf: no run (it has no config.yaml); give what stage 4 or 6 has made",
        ),
        (["noise_de_test"], ["--as", "xx"], "unknown language 'xx'; known: ar,"),
        (["noise_de_test"], ["decoding.bean=4"], "unknown key 'decoding.bean'; known here: beam,"),
    ],
)
def test_mistakes_are_one_line(run, capsys, sets, more, said):
    assert main(run.args(*sets, more=more)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_two_runs_do_not_decode_the_same_set(run, capsys):
    with files.lock(run.directory / "decode_noise_de_test"):
        assert main(run.args("noise_de_test")) == 1
    assert "another run is writing here" in capsys.readouterr().err


def test_shares_and_the_call_that_ends_them_write_what_one_call_writes(run, capsys):
    assert main(run.args("noise_de_test", "noise_zh_test")) == 0
    expected = [run.utts(lang) for lang in ("de", "zh")]
    timing = json.loads(run.read("timing.json"))
    for lang in ("de", "zh"):
        shutil.rmtree(run.directory / f"decode_noise_{lang}_test")
    for share in ("3/3", "1/3"):
        assert main(run.args("noise_de_test", "noise_zh_test", more=["--share", share])) == 0
    directory = run.directory / "decode_noise_de_test"
    assert f"{directory}: share 1 of 3 is done" in capsys.readouterr().out
    assert not any((directory / name).exists() for name in (*job.OUTPUTS, ".done"))
    assert main(run.args("noise_de_test", "noise_zh_test", more=["--nj", "2"])) == 0  # does 2/3 and ends the sets
    for lang, whole in zip(("de", "zh"), expected):
        assert list(run.utts(lang)) == list(whole)
        for utt_id, row in run.utts(lang).items():
            assert row == whole[utt_id] | {"logprob": pytest.approx(whole[utt_id]["logprob"], abs=1e-4)}
    again = json.loads(run.read("timing.json"))
    assert [again[name] for name in ("num_utts", "audio_s", "flags")] == [
        timing[name] for name in ("num_utts", "audio_s", "flags")
    ]
    assert set(os.listdir(directory)) == {*job.OUTPUTS, ".done", ".lock"}


def test_shares_are_disjoint_and_as_long_as_each_other(run, monkeypatch):
    decoded = []
    monkeypatch.setattr(worker, "decode_share", lambda job, todo, *_: decoded.append(todo))
    for share in ("1/2", "2/2"):
        assert main(run.args("noise_de_test", more=["--share", share])) == 0
    listed = load_utterances(run.data, "target", "test", None, FeatureSettings(storage="on_the_fly"))
    assert sorted(u.id for u in itertools.chain(*decoded)) == sorted(u.id for u in listed)
    seconds = [sum(u.duration_s for u in share) for share in decoded]
    assert abs(seconds[0] - seconds[1]) <= max(u.duration_s for u in listed)


def test_a_share_that_is_done_needs_no_torch_and_one_that_is_being_done_is_left_alone(run, capsys):
    share = run.args("noise_de_test", more=["--share", "2/2"])
    assert main(share) == 0
    code = f"import sys; from zipperasr.cli.main import main; status = main({[*share, '--nj', '2']!r}); " + (
        "print('torch' in sys.modules); sys.exit(status)"
    )
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert again.stdout.splitlines()[-1] == "False"
    with files.lock(run.directory / "decode_noise_de_test" / ".share.2.2"):
        assert main(share) == 1
        assert main(run.args("noise_de_test")) == 1
        assert main(run.args("noise_de_test", more=["--share", "1/2"])) == 0
    assert capsys.readouterr().err.count("another run is writing here") == 2

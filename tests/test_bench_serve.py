"""The benchmark of a trained run: on a tiny one, with few clients for a short time."""

import json

import pytest
import soundfile
import tiny_run
import torch
from tiny_run import RATE, speech

from zipperasr.bench import serve
from zipperasr.cli import main as cli


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A Kaldi data directory with 8 recordings in two languages."""
    folder = tmp_path_factory.mktemp("audio")
    names = [f"{lang}{i}" for lang in ("de", "th") for i in range(4)]
    for i, name in enumerate(names):
        soundfile.write(folder / f"{name}.wav", speech(1 + i / 4, i), RATE)
    (folder / "wav.scp").write_text("".join(f"{name} {folder}/{name}.wav\n" for name in names))
    (folder / "utt2lang").write_text("".join(f"{name} {name[:2]}\n" for name in names))
    return folder


def test_a_run_is_measured_as_its_users_see_it(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serve, "LONG_S", 20)
    run_dir, path, threads = tiny_run.make(tmp_path), tmp_path / "bench.json", torch.get_num_threads()
    options = ["--clients", "8", "--seconds", "2", "--rounds", "1", "--threads", "1", "--json", str(path)]
    try:
        assert cli.main(["bench", "serve", "--run-dir", str(run_dir), "--inputs", str(inputs), *options]) == 0
    finally:
        torch.set_num_threads(threads)
    found = json.loads(path.read_text())
    rows = {row["case"]: row for row in found["rows"]}
    assert rows[serve.FIRST]["s"] > 1  # the imports alone take longer
    assert 20 <= rows[serve.LONG]["audio s"] < 24
    for case in (serve.MIXED, serve.BY_LANG, serve.MERGED):
        assert rows[case]["audio s"] == pytest.approx(sum(1 + i / 4 for i in range(8)), abs=0.5)
    assert rows[serve.SERVED]["requests"] > 8 and rows[serve.SERVED]["p50 s"] <= rows[serve.SERVED]["p95 s"]
    assert rows[serve.TURNED_AWAY]["requests"] > 0  # 8 clients, 6 are taken
    assert rows[serve.FAILED] == {"case": serve.FAILED, "requests": 0}
    verdicts = {target["what"]: target["verdict"] for target in found["targets"]}
    assert verdicts.pop("alignment, times real time on one core") == "not measured"  # it has no aligner
    assert set(verdicts.values()) <= {"met", "missed"} and "failed" in capsys.readouterr().out


def test_what_fails_is_counted_with_its_reason(inputs, tmp_path):
    """A server that is not there."""
    tally = serve._Tally()
    clip = serve.Clip(inputs / "de0.wav", "de", 1.0)
    serve._client(0, "http://127.0.0.1:9", [clip], serve.time.perf_counter() + 0.3, tally, serve.threading.Lock())
    assert tally.outcomes[serve.FAILED] == 1 and tally.errors == {"ConnectionError"}


@pytest.mark.parametrize("options", [[], ["--run-dir", "x"], ["--inputs", "x"]])
def test_what_is_needed_is_asked_for(options, capsys):
    assert cli.main(["bench", "serve", *options]) == 1
    assert "--run-dir" in capsys.readouterr().err


def test_inputs_have_to_say_their_language(inputs, tmp_path, capsys):
    run_dir = tiny_run.make(tmp_path)
    options = ["--inputs", str(inputs / "de0.wav"), "--threads", "1"]
    assert cli.main(["bench", "serve", "--run-dir", str(run_dir), *options]) == 1
    assert "its language is not said" in capsys.readouterr().err

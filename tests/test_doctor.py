"""`zipperasr doctor`: what it finds on machines that are described to it, and on the tiny recipe."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_recipe

from zipperasr.cli import doctor, recipe
from zipperasr.cli.main import main
from zipperasr.data import lists
from zipperasr.model.cost import Load, Shape, flops
from zipperasr.training.preflight import GIB, Finding, machine, models, report
from zipperasr.training.preflight import data as preflight_data
from zipperasr.training.preflight.data import Need, Size, check_disks, checkpoints_need, features_need
from zipperasr.training.preflight.estimate import (
    ROOM,
    UTILISATION,
    Device,
    Estimate,
    Speech,
    check,
    full_batch,
    peak_tflops,
    speech_of,
)
from zipperasr.training.preflight.machine import Gpu, Machine

CONF = Path(__file__).resolve().parents[1] / "egs" / "multilingual12" / "conf"
A800 = Gpu("NVIDIA A800-SXM4-80GB", 79 * GIB, capability=8)
V100 = Gpu("Tesla V100-SXM2-32GB", 32 * GIB, capability=7)
NODE = Machine(
    num_cores=64, memory=512 * GIB, shm=16 * GIB, torch="2.13.0+cu128", cuda="12.8", nccl="2.27.5", driver="570.86",
    gpus=(A800,) * 4, packages={"torch": "2.13.0+cu128"}, pinned={"torch": "2.13.0"},
)  # fmt: skip
LAPTOP = Machine(shm=8 * GIB, torch="2.13.0+cpu", packages={"torch": "2.13.0+cpu"}, pinned={"torch": "2.13.0"})


def levels(findings) -> list[str]:
    return [finding.level for finding in findings if finding.level != "ok"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tiny_recipe.Recipe:
    return tiny_recipe.make(tmp_path_factory.mktemp("doctor"))


@pytest.fixture(scope="module")
def paper() -> recipe.Config:
    return recipe.load(CONF / "paper.yaml")


def estimate(
    paper: recipe.Config, stage: int = 2, *, context="chunked", device=None, speech=None, **settings
) -> Estimate:
    """The paper's stage on four A800, without recomputation unless `settings` of the stage say so."""
    encoder = paper.model.encoder.model_copy(update={"context": context})
    of_stage = getattr(paper.training, f"stage{stage}")
    of_stage = of_stage.model_copy(update={"recompute_encoder": 0.0, "recompute_llm": 0.0, **settings})
    return Estimate(
        stage, paper.model.model_copy(update={"encoder": encoder}), paper.data.packing, of_stage,
        Shape.of(paper.model, stage), device or Device("A800", 4, 79 * GIB, 312), speech or Speech(),
    )  # fmt: skip


# The machine


@pytest.mark.parametrize(("where", "num_gpus"), [(NODE, 4), (NODE, 0), (LAPTOP, 0)])
def test_a_machine_with_all_that_is_asked_for_has_no_warning(where, num_gpus):
    assert not levels(machine.check(where, num_gpus=num_gpus))


@pytest.mark.parametrize(
    ("where", "num_gpus", "level", "said", "mend"),
    [
        (replace(NODE, gpus=(A800,) * 2), 4, "error", "4 GPUs are asked for and 2 are visible", "CUDA_VISIBLE_DEVICES"),
        (LAPTOP, 1, "error", "without CUDA", "CUDA wheels"),
        (replace(NODE, shm=64 * 2**20), 4, "error", "/dev/shm has 0.1 GiB", "--shm-size=4g"),
        (replace(LAPTOP, shm=64 * 2**20), 0, "warning", "/dev/shm has 0.1 GiB", "--ipc=host"),
        (replace(NODE, gpus=(V100,) * 4), 4, "error", "Tesla V100-SXM2-32GB: no bf16", "Ampere"),
        (replace(NODE, gpus=(A800, V100)), 1, None, "", ""),
        (replace(NODE, gpus=(A800, replace(A800, name="L40S"))), 2, "warning", "unlike", "CUDA_VISIBLE_DEVICES"),
        (replace(NODE, gpus=()), 0, "warning", "no GPU is visible", "too old for CUDA 12.8"),
        (replace(NODE, open_files=256), 4, "warning", "256 open files", "ulimit -n"),
        (replace(NODE, open_files=-1), 4, None, "", ""),
        (replace(NODE, packages={"torch": "2.6.0"}), 4, "warning", "torch 2.6.0 (wanted 2.13.0)", "path.sh"),
        (replace(NODE, packages={}), 4, "warning", "torch missing", "path.sh"),
        (replace(LAPTOP, pinned={"torchaudio": "2.11.0"}), 0, None, "", ""),
        (replace(LAPTOP, torchaudio_failure="OSError: libc10_cuda.so"), 0, "error", "libc10_cuda", "pip uninstall"),
    ],
)
def test_what_a_machine_lacks_is_named_with_its_mend(where, num_gpus, level, said, mend):
    found = [finding for finding in machine.check(where, num_gpus=num_gpus) if finding.level != "ok"]
    assert [finding.level for finding in found] == ([level] if level else [])
    assert all(said in finding.text and mend in finding.text for finding in found)


def test_this_machine_is_described_as_the_system_says():
    here = machine.describe()
    (total,) = re.findall(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())
    assert 0 < here.memory <= 1024 * int(total)
    assert here.packages["torch"].partition("+")[0] == here.torch.partition("+")[0] and here.pinned["torch"]
    assert here.num_cores >= 1 and all(gpu.memory > GIB for gpu in here.gpus)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A6000", 155),
        ("NVIDIA GeForce RTX 4090", 165),
        ("Tesla V100-SXM2-32GB", None),
    ],
)
def test_the_peak_is_that_of_the_gpu_and_of_no_other_with_a_like_name(name, peak):
    assert peak_tflops(name) == peak


# Disks, by sums on paper


def test_checkpoints_take_the_weights_kept_and_one_more_and_two_moments_twice(paper):
    stage = paper.training.stage1.model_copy(update={"keep_last": 2, "keep_best": 1})
    assert checkpoints_need(Path("exp"), 1, stage, trained=1000).num_bytes == 1000 * (4 * 4 + 2 * 8)


@pytest.mark.parametrize(
    ("storage", "speeds", "num_bytes"),
    [
        ("on_the_fly", [0.8], 0),
        ("audio", [0.8], 30 * 16_000),
        ("precomputed", [], 30 * 100 * 128 * 4),
        ("precomputed", [0.8], (30 + 20 / 0.8) * 100 * 128 * 4),  # only what is trained on has copies
    ],
)
def test_features_take_what_stage_3_will_store(paper, tmp_path, storage, speeds, num_bytes):
    features = {"storage": storage, "speed_perturb": speeds, "num_mel_bins": 128}
    data = paper.data.model_validate({**paper.data.model_dump(), "features": features})
    sizes = {("train", "mls_de_train"): Size(2, 20.0), ("test", "mls_de_test"): Size(1, 10.0)}
    smaller = {("train", "mls_de_train"): Size(1, 5.0)}
    assert features_need(data, tmp_path, [smaller, sizes]).num_bytes == num_bytes


def test_a_disk_must_hold_the_sum_of_all_that_is_written_there(tmp_path):
    needs = [Need(tmp_path / "data", 3 * GIB, "features"), Need(tmp_path / "not" / "yet", 4 * GIB, "checkpoints")]
    device = tmp_path.stat().st_dev
    (enough,), (full,) = (list(check_disks(needs, free={device: free * GIB})) for free in (7, 6))
    assert (enough.level, full.level) == ("ok", "error")
    assert "6.0 GiB free, 7.0 GiB needed (features 3.0 GiB, checkpoints 4.0 GiB)" in full.text


# Memory and time


def test_a_full_batch_is_counted_as_on_paper(paper):
    # 8 s: 800 frames, 400 of the encoder, 100 speech tokens; 12 of the prompt, 32 of text; 14 utterances in 2048 tokens
    load = full_batch(Speech(utt_s=8, text_per_s=4, num_prompt=12), 1, paper.data.packing, paper.model.encoder, 3)
    assert load == Load([300, 300, 200] * 14, [144] * 14, 32 * 14)


def test_the_papers_batch_holds_as_much_speech_and_work_as_counted_elsewhere(paper):
    one = estimate(paper)  # 16 rows x 2048 tokens, about 1,850 s of LibriSpeech-like audio: 485 TFLOP
    assert one.batch_audio_s == pytest.approx(1850, rel=0.05)
    assert one.flops() == pytest.approx(485e12, rel=0.1)


def test_the_most_rows_fit_and_one_more_does_not(paper):
    one = estimate(paper, recompute_encoder=1.0)
    most = one.most_rows()
    assert 0 < most < one.num_rows and one.fits(most) and not one.fits(most + 1)
    peak = sum(one.peak(most).values())
    assert peak <= ROOM * one.device.memory < sum(one.peak(most + 1).values())


def test_as_many_rows_as_fit_are_reckoned_with_where_they_are_auto(paper):
    one = estimate(paper, recompute_encoder=1.0)
    packing = one.packing.model_copy(
        update={"rows_per_batch": one.packing.rows_per_batch.model_copy(update={"chunked": "auto"})}
    )
    assert replace(one, packing=packing).num_rows == one.most_rows()


@pytest.mark.parametrize("stage", [1, 2])
def test_the_recomputation_that_is_advised_is_enough_and_a_quarter_less_is_not(paper, stage):
    one = estimate(paper, stage)
    encoder, llm = one.least_recompute()
    assert one.fits(recompute=(encoder, llm)) and not one.fits(recompute=(encoder, llm - 0.25))
    (_, memory, _) = check(one, Size(0, 3600.0))
    assert memory.level == "error" and f"recompute_encoder={encoder:g} " in memory.text
    mended = estimate(paper, stage, recompute_encoder=encoder, recompute_llm=llm)
    assert not levels(check(mended, Size(0, 3600.0)))


def test_a_model_that_fits_in_no_way_has_no_setting_advised(paper):
    (_, memory, _) = check(estimate(paper, device=Device("small", 1, 4 * GIB, 100)), Size(0, 3600.0))
    assert (
        memory.level == "error"
        and "more memory, or a smaller model" in memory.text
        and "rows_per_batch" not in memory.text
    )


def test_where_all_recomputation_is_not_enough_it_is_advised_with_fewer_rows(paper):
    small = Device("RTX 4090", 1, 24 * GIB, 165)
    (_, memory, _) = check(estimate(paper, 1, device=small), Size(0, 3600.0))
    advice = r"training.stage1.recompute_encoder=1 training.stage1.recompute_llm=1 and .*rows_per_batch.chunked=(\d+)$"
    most = int(re.search(advice, memory.text).group(1))
    mended = estimate(paper, 1, device=small, recompute_encoder=1.0, recompute_llm=1.0)
    assert mended.fits(most) and not mended.fits(most + 1)


@pytest.mark.parametrize("context", ["full", "chunked"])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", ["paper.yaml", "paper_30h.yaml"])
def test_the_papers_configurations_fit_into_the_papers_gpus_and_into_one_of_them(name, stage, context):
    whole = recipe.load(CONF / name)
    settings = getattr(whole.training, f"stage{stage}").model_dump()
    for num_ranks in (1, 4):
        device = Device("A800", num_ranks, 79 * GIB, 312)
        assert estimate(whole, stage, context=context, device=device, **settings).fits()


def test_hours_are_flops_over_the_assumed_rate(paper):
    device = Device("A800", num_ranks=4, memory=79 * GIB, tflops=312)
    one = estimate(paper, context="full", device=device, recompute_llm=1.0, max_steps=100, accumulation=2)
    parts = flops(one.shape, full_batch(one.speech, 10, one.packing, one.model.encoder))
    seconds = 100 * 2 * (sum(parts.values()) + parts["llm"] / 2) / (UTILISATION * 312e12)  # ranks work side by side
    assert f"about {seconds / 3600:,.1f} h for 100 steps" in list(check(one, Size(0, 0.0)))[-1].text


def test_epochs_take_all_speech_in_full_batches_whatever_the_number_of_ranks(paper):
    for num_ranks, accumulation in ((1, 1), (4, 1), (2, 3)):
        device = Device("A800", num_ranks, 79 * GIB, 312)
        one = estimate(paper, device=device, epochs=2, accumulation=accumulation)
        assert one.batches(9000.0) * num_ranks * one.batch_audio_s == pytest.approx(2 * 9000)


def test_without_a_known_peak_or_without_lists_no_hours_are_told(paper):
    unknown = estimate(paper, recompute_encoder=1.0, recompute_llm=1.0, device=Device("X1", 1, 79 * GIB, None))
    assert "give --tflops" in list(check(unknown, Size(0, 3600.0)))[-1].text
    assert "no lists" in list(check(estimate(paper), Size(0, 0.0)))[-1].text


def test_the_papers_size_is_not_meant_for_a_cpu(paper):
    (_, hours) = check(estimate(paper, device=Device("CPU", 2, None, None, num_cores=2)), Size(10, 3.6e6))
    assert hours.level == "warning" and "not meant" in hours.text


def test_copies_at_other_speeds_are_trained_on_too(paper):
    sizes = {("train", "mls_de_train"): Size(2, 20.0), ("test", "mls_de_test"): Size(1, 10.0)}
    features = paper.data.features.model_copy(update={"speed_perturb": (0.8, 1.25)})
    assert preflight_data.train_size(sizes, features) == Size(6, 20.0 + 25.0 + 16.0)


def test_lengths_are_the_means_of_the_lists():
    assert speech_of(Size(4, 20.0)).utt_s == 5.0 and speech_of(Size(0, 3600.0)) == Speech()


# Models and languages


def test_models_are_folders_or_in_a_cache_or_yet_to_be_fetched(paper, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    there = recipe.load(tiny.conf).model
    assert [finding.level for finding in models.check_models(there)] == ["ok", "ok"]
    encoder = paper.model.encoder
    named = there.model_copy(update={"encoder": encoder})
    assert [finding.level for finding in models.check_models(named)] == ["warning", "ok"]
    (tmp_path / "whisper").mkdir()
    (tmp_path / "whisper" / "large-v3.pt").touch()
    assert [finding.level for finding in models.check_models(named)] == ["ok", "ok"]
    for wrong in ("large-v9", "pretrained/none", str(tmp_path), str(tiny.conf)):
        model = named.model_copy(update={"encoder": encoder.model_copy(update={"pretrained": wrong})})
        (found, _) = models.check_models(model)
        assert found.level == "error" and wrong in found.text


def test_languages_without_prompt_or_bank_are_named(tiny):
    model = recipe.load(tiny.conf).model  # banks for de and th
    (_, bank) = models.check_languages(model, ["de", "en", "th"])
    assert bank.level == "warning" and "for en (model.adapter.unseen=shared)" in bank.text
    (prompt,) = models.check_languages(model, ["de", "xx"])
    assert prompt.level == "error" and "xx" in prompt.text
    vanilla = model.model_copy(update={"adapter": model.adapter.model_copy(update={"method": "vanilla"})})
    assert not levels(models.check_languages(vanilla, ["en"]))


# Data


def test_sizes_of_lists_are_those_that_the_manifests_have(tiny):
    found = preflight_data.measure(tiny.data, "all")
    assert len(found) == 6
    for (part, name), size in found.items():
        counted = lists.measure(tiny.data, name, lists.read(tiny.data / "lists" / "all" / part / f"{name}.txt"))
        assert size.num_utts == counted.num_utts and size.duration_s == pytest.approx(counted.duration_s, abs=2)


# The command


def doctored(capsys, *args) -> tuple[int, str]:
    status = main(["doctor", *map(str, args)])
    return status, capsys.readouterr().out


def test_a_recipe_that_can_be_run_has_no_error(tiny, capsys, tmp_path):
    status, out = doctored(capsys, "--conf", tiny.conf, "--data-dir", tiny.data, "--exp-dir", tmp_path, "--ngpu", 0)
    assert status == 0 and "0 errors" in out
    assert [line for line in out.splitlines() if not line.startswith(" ")][:-1] == [
        "machine", "configuration", "data", "disk", "memory and time",
    ]  # fmt: skip
    assert "all train: 0.00 h, 33 utterances: de 0.00 h (11), en 0.00 h (11), th 0.00 h (11)" in out
    assert "no manifest" not in out and "roughly" in out


def test_missing_data_is_a_warning_that_names_the_stage(tiny, capsys, tmp_path):
    status, out = doctored(capsys, "--conf", tiny.conf, "--data-dir", tmp_path / "none", "--ngpu", 0)
    assert status == 0
    assert "no manifest noise_de_dev" in out and "stages 0 and 1 make them" in out and "stage 2 writes the lists" in out
    status, out = doctored(
        capsys, "--conf", tiny.conf, "--data-dir", tiny.data, "--ngpu", 0, "data.features.storage=precomputed"
    )
    assert status == 0 and "nothing is stored of noise_de_train" in out and "run stage 3" in out


def test_without_a_configuration_only_the_machine_is_looked_at(capsys):
    status, out = doctored(capsys, "--ngpu", 0)
    assert "machine" in out and "configuration" not in out
    assert status == ("error " in out)


def test_errors_end_with_status_1(tiny, capsys):
    status, out = doctored(capsys, "--ngpu", 999)
    assert status == 1 and "999 GPUs" in out
    status, out = doctored(capsys, "--conf", tiny.conf, "--ngpu", 0, "model.encoder.contxt=full")
    assert status == 1 and "unknown key 'model.encoder.contxt'" in out


def test_numbers_that_make_no_sense_are_refused(capsys):
    for wrong in (("--ngpu", -1), ("--nodes", 0)):
        assert main(["doctor", *map(str, wrong)]) == 1
        assert "nodes 1 or more" in capsys.readouterr().err


def test_gpus_elsewhere_are_planned_for_without_gpus_here(capsys):
    where = ("--conf", CONF / "paper.yaml", "--ngpu", 4, "--nodes", 2, "--gpu-memory", 80, "--tflops", 312)
    status, out = doctored(capsys, *where, "training.stage1.accumulation=3")
    assert status == 0 and "8 ranks x 10 rows x accumulation 3 = 240 rows a step" in out
    assert out.count("assumed for a GPU of 80 GiB") == 2
    status, out = doctored(capsys, *where, "data.packing.rows_per_batch.full=99")
    assert status == 1 and "data.packing.rows_per_batch.full=" in out


def test_the_gpus_that_are_there_are_planned_for(paper):
    def device(*args):
        parser = doctor.argparse.ArgumentParser()
        doctor.add_arguments(parser)
        found = parser.parse_args(list(args))
        return doctor._device(found, NODE, 4)

    assert device("--nodes", "2") == Device(A800.name, 8, A800.memory, 312)
    assert device("--tflops", "100").tflops == 100


def test_the_report_has_a_line_for_each_finding_below_its_section():
    findings = [Finding("a", "ok", "one"), Finding("a", "error", "two"), Finding("b", "warning", "three")]
    assert report(findings).splitlines() == [
        "a", "  ok       one", "  error    two", "b", "  warning  three", "1 errors, 1 warnings",
    ]  # fmt: skip

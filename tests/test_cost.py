"""What a step costs: the arithmetic agrees with what torch counts while it computes, and with the models as built."""

import pytest
import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import flop_counter
from transformers import WhisperConfig

from zipperasr import files
from zipperasr.adapters import REGISTRY
from zipperasr.bench.adapters import saved_bytes
from zipperasr.bench.data import durations_s
from zipperasr.data.packing import Batch, num_speech_tokens
from zipperasr.errors import UserError
from zipperasr.languages import LANGUAGES
from zipperasr.model import ModelSettings, checkpoint, cost
from zipperasr.model.cost import Load, Shape

PAPER = ModelSettings.model_validate({
    "encoder": {"pretrained": "large-v3"},
    "llm": {"pretrained": "Qwen/Qwen3-1.7B"},
    "adapter": {"langs": list(LANGUAGES)[:12]},
})  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return tiny.make_pretrained(tmp_path_factory.mktemp("pretrained"), width=64, lm_width=64)


def batch_of(frames: list[int], num_targets: int = 8) -> Batch:
    """Utterances of so many feature frames each, German ones first."""
    return Batch(
        ids=[str(n) for n in range(len(frames))],
        langs=["de"] * (len(frames) // 2) + ["th"] * (len(frames) - len(frames) // 2),
        features=[torch.randn(n, 80) for n in frames],
        prompts=[[5, 6, 7]] * len(frames),
        targets=[[8] * num_targets] * len(frames),
    )


def paper_load(chunk_s: float | None, num_tokens: int = 16 * 2048) -> Load:
    """As many utterances that last as LibriSpeech's as fill the rows of the paper's batch."""
    segments, tokens, num_targets = [], [], 0
    for seconds in durations_s("LibriSpeech", 300).tolist():
        frames, size = round(100 * seconds), 3000 if chunk_s is None else round(100 * chunk_s)
        num_text = round(3.5 * seconds) + 1
        if sum(tokens) + 12 + num_speech_tokens(frames) + num_text > num_tokens:
            break
        segments += [min(size, frames - start) for start in range(0, frames, size)]
        tokens.append(12 + num_speech_tokens(frames) + num_text)
        num_targets += num_text
    return Load(segments, tokens, num_targets)


# Useful work


@pytest.mark.parametrize(("stage", "method"), [(1, None), (2, "vanilla"), (2, "zipper_soft")])
def test_useful_work_is_what_torch_counts(pretrained, stage, method):
    """Torch counts whole squares for causal attention, the zeros between segments, and the router."""
    model = checkpoint.build(tiny.settings(pretrained, method=method), stage).train()
    batch = batch_of([480] * 4)
    with counter() as counted, sdpa_kernel(SDPBackend.MATH):
        model(batch).loss_sum.backward()
    shape, load = Shape.of_model(model, stage), Load.of(batch)
    parts = cost.flops(shape, load)
    squares = sum(6 * n * n * shape.llm_heads * shape.llm_head_width for n in load.utt_tokens) * shape.llm_blocks
    assert counted.get_total_flops() == pytest.approx(sum(parts.values()) + squares, rel=0.01)
    theirs = counted.get_flop_counts()
    assert sum(theirs["SpeechLLM.projector"].values()) == pytest.approx(parts["projector"], rel=0.01)


def counter() -> flop_counter.FlopCounterMode:
    """Also of what is added in place."""

    def addmm_(y, a, b, **_):
        return flop_counter.addmm_flop(y, a, b)

    return flop_counter.FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_})


@pytest.mark.parametrize("chunk_s", [None, 8.0])
def test_useful_work_at_the_papers_size_is_485_tflop_a_step(chunk_s):
    parts = cost.flops(Shape.of(PAPER, 2), paper_load(chunk_s))
    tflop = {name: value / 1e12 for name, value in parts.items()}
    assert tflop["encoder"] == pytest.approx(279, rel=0.06) and tflop["llm"] + tflop["lm_head"] == pytest.approx(
        203, rel=0.03
    )
    assert sum(tflop.values()) == pytest.approx(485, rel=0.04)


def test_stage_1_costs_more_than_stage_2():
    """Half as much again for the encoder, whose weights are trained."""
    one, two = (cost.flops(Shape.of(PAPER, stage), paper_load(None)) for stage in (1, 2))
    assert 1.3 < one["encoder"] / two["encoder"] < 1.5 and one["llm"] == two["llm"]


def test_a_load_is_counted_in_segments():
    load = Load.of(batch_of([150, 99], num_targets=4), chunk_s=0.4)
    assert load.segment_frames == [40, 40, 40, 30, 40, 40, 19] and load.encoder_frames[-2:] == [20, 10]
    assert load.utt_tokens == [3 + 19 + 4, 3 + 13 + 4] and load.num_targets == 8
    assert Load.of(batch_of([150, 99])).segment_frames == [150, 99]


# Shapes


@pytest.mark.parametrize("method", REGISTRY)
def test_the_shape_by_name_is_that_of_the_model(pretrained, method):
    settings = tiny.settings(pretrained, method=method, rank=8)
    assert Shape.of(settings, 2) == Shape.of_model(checkpoint.build(settings, 2), 2)


@pytest.mark.parametrize(("stage", "method"), [(1, None), (2, "zipper_hard"), (2, "flylora")])
def test_sizes_are_those_of_the_model(pretrained, stage, method):
    model = checkpoint.build(tiny.settings(pretrained, method=method, rank=8), stage)
    shape = Shape.of_model(model, stage)
    assert shape.trained_size == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape.projector_size == sum(p.numel() for p in model.projector.parameters())
    assert shape.llm_size + shape.lora_size == sum(p.numel() for p in model.llm.parameters())
    assert shape.encoder_size + shape.adapter_trained == shape.num_positions * shape.width + sum(
        p.numel() for p in model.encoder.parameters()
    )


def test_the_papers_models_are_as_large_as_they_say():
    shape = Shape.of(PAPER, 2)
    assert shape.encoder_size / 1e6 == pytest.approx(637, abs=1) and shape.llm_size / 1e9 == pytest.approx(
        1.72, abs=0.01
    )
    with_head = Shape.of(
        PAPER.model_copy(update={"llm": PAPER.llm.model_copy(update={"pretrained": "Qwen/Qwen3-8B"})}), 1
    )
    assert with_head.llm_size / 1e9 == pytest.approx(8.19, abs=0.01)


def test_a_hugging_face_whisper_folder_has_a_shape(pretrained, tmp_path):
    config = WhisperConfig(
        num_mel_bins=80, max_source_positions=1500, d_model=64, encoder_attention_heads=2, encoder_layers=2
    )
    config.save_pretrained(tmp_path)
    settings = tiny.settings(pretrained)
    theirs = settings.model_copy(update={"encoder": settings.encoder.model_copy(update={"pretrained": str(tmp_path)})})
    assert Shape.of(theirs, 2) == Shape.of(settings, 2)


@pytest.mark.parametrize(
    ("config", "reason"), [(None, "nor one of"), ({"dims": {"n_mels": 80}}, "lacks 'n_audio_ctx'")]
)
def test_what_has_no_shape_is_named(pretrained, tmp_path, config, reason):
    if config:
        files.write_json(tmp_path / "config.json", config)
    settings = tiny.settings(pretrained)
    encoder = settings.encoder.model_copy(update={"pretrained": str(tmp_path)})
    with pytest.raises(UserError, match=reason):
        Shape.of(settings.model_copy(update={"encoder": encoder}), 1)


# Memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("stage", "method"), [(1, None), (2, "zipper_soft")])
def test_kept_activations_are_those_that_autograd_keeps(pretrained, dtype, stage, method):
    """Of equally long utterances, so that no bucket of CPU attention is padded."""
    model = checkpoint.build(tiny.settings(pretrained, method=method), stage).to(dtype).train()
    batch = batch_of([480] * 4)
    kept = saved_bytes(lambda: model(batch).loss_sum, [*model.parameters(), *model.buffers(), *batch.features])
    expected = cost.saved_bytes(Shape.of_model(model, stage), Load.of(batch), itemsize=dtype.itemsize)
    print(kept, sum(expected.values()), expected)
    assert kept == pytest.approx(sum(expected.values()), rel=0.15)


def test_a_second_of_audio_keeps_67_mib_in_large_v3():
    kept = cost.saved_bytes(Shape.of(PAPER, 2), Load([100], [], 0))
    assert kept["encoder"] / 2**20 == pytest.approx(67, rel=0.06)


def test_memory_falls_with_recomputation_and_the_optimizer_with_ranks():
    shape, load = Shape.of(PAPER, 2), paper_load(8.0)
    none = cost.peak_bytes(shape, load)
    encoder, llm = (cost.peak_bytes(shape, load, **{f"recompute_{part}": 1.0}) for part in ("encoder", "llm"))
    both = cost.peak_bytes(shape, load, recompute_encoder=1.0, recompute_llm=1.0, num_ranks=4)
    assert both["activations"] < min(encoder["activations"], llm["activations"])
    assert max(encoder["activations"], llm["activations"]) < none["activations"]
    assert both["optimizer"] == none["optimizer"] / 4 == 3 * shape.trained_size
    assert both["weights"] == none["weights"] and both["gradients"] == none["gradients"] == 2 * shape.trained_size
    frames, tokens = sum(load.encoder_frames), sum(load.utt_tokens)
    inputs = 2 * (32 * frames * 1280 + 28 * tokens * 2048)
    assert inputs < both["activations"] < 4 * inputs


def test_arithmetic_needs_no_torch():
    from test_floors import modules_after

    assert "torch" not in modules_after("import zipperasr.model.cost")

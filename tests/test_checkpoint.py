"""Runs on disk: what is written is what is read, and what does not fit says so."""

import pytest
import tiny
import torch
from safetensors.torch import load_file

from zipperasr import config, files
from zipperasr.adapters import REGISTRY, AdapterSettings
from zipperasr.errors import UserError
from zipperasr.model import WEIGHTS, RunSettings, checkpoint, choose_steps
from zipperasr.model.speech_llm import stage_tensors
from zipperasr.model.whisper_io import load_whisper, save_whisper


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return tiny.make_pretrained(tmp_path_factory.mktemp("pretrained"))


@pytest.fixture
def run(tmp_path, paths):
    """A stage-2 run directory and its model, whose encoder is that of a stage-1 run."""
    torch.manual_seed(0)
    checkpoint.save_trainable(tiny.trained(tiny.settings(paths, method=None), 1), tmp_path / "init")
    settings = tiny.settings(paths)
    model = tiny.trained(settings, 2, init=tmp_path / "init")
    tiny.save_run(tmp_path, settings, 2, model)
    return tmp_path, model


def test_a_stage_1_run_is_read_as_it_was_written(tmp_path, paths):
    settings = tiny.settings(paths, method=None)
    model = tiny.trained(settings, 1)
    tiny.save_run(tmp_path, settings, 1, model)
    assert_same(checkpoint.load_run(tmp_path), model)


def test_a_stage_2_run_directory_is_all_that_loading_needs(run):
    run_dir, model = run
    loaded = checkpoint.load_run(run_dir)
    assert_same(loaded, model)
    assert loaded.encoder.blocks[0].attn.query.weight.std() > 0.5, "the encoder is that of stage 1, not Whisper's"


def assert_same(a, b):
    b = dict(b.named_parameters())
    for name, parameter in a.named_parameters():
        assert torch.equal(parameter, b[name]) and parameter.requires_grad == b[name].requires_grad, name


def test_a_checkpoint_holds_exactly_what_was_trained(run):
    run_dir, model = run
    tensors = load_file(run_dir / "checkpoints" / "step-1" / checkpoint.WEIGHTS)
    assert tensors.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


def test_the_latest_complete_checkpoint_is_loaded(run):
    run_dir, model = run
    with torch.no_grad():
        model.projector.out.bias.fill_(7)
    settings = config.load(run_dir / "config.yaml", RunSettings)
    tiny.save_run(run_dir, settings.model, 2, model, step=10)
    checkpoint.save_trainable(model, run_dir / "checkpoints" / "step-20")  # killed before its state was written
    assert checkpoint.find_checkpoint(run_dir).name == "step-10"
    assert checkpoint.load_run(run_dir).projector.out.bias.eq(7).all()
    assert not checkpoint.load_run(run_dir, [1]).projector.out.bias.eq(7).any()
    with pytest.raises(UserError, match="no checkpoint at step 20; there are 1, 10"):
        checkpoint.load_run(run_dir, [20])


def test_the_mean_of_checkpoints_is_that_of_their_tensors(run):
    run_dir, model = run
    settings = config.load(run_dir / "config.yaml", RunSettings)
    for step, value, dev in ((2, 3.0, 9.0), (3, 5.0, 7.0), (4, 7.0, 8.0)):
        with torch.no_grad():
            model.projector.out.bias.fill_(value)
        folder = tiny.save_run(run_dir, settings.model, 2, model, step=step)
        files.write_json(folder / "state.json", {"dev": dev})
    assert choose_steps(run_dir) == (4,) and choose_steps(run_dir, 3, average=2) == (3, 2)
    assert choose_steps(run_dir, "best") == (3,) and choose_steps(run_dir, "best", average=2) == (3, 4)
    mean = checkpoint.load_run(run_dir, choose_steps(run_dir, average=3))
    assert mean.projector.out.bias.eq(5).all()
    assert torch.allclose(mean.projector.up.weight, model.projector.up.weight, atol=1e-7)
    with pytest.raises(UserError, match="3 checkpoints with a dev error are kept, 4 asked; train with a larger"):
        choose_steps(run_dir, "best", average=4)
    with pytest.raises(UserError, match="no checkpoint at step 9"):
        choose_steps(run_dir, 9)


def test_a_run_without_checkpoints_says_so(tmp_path, paths):
    config.save(tmp_path / "config.yaml", RunSettings(stage=1, model=tiny.settings(paths)))
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint.load_run(tmp_path)


def test_stage_2_without_its_init_says_so(run):
    (run[0] / "init" / checkpoint.WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"init.*no such file; train stage 1 first"):
        checkpoint.load_run(run[0])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rank": 8}, r"tensor '.*' has shape \[.*\], but the model has \[.*\]"),
        ({"langs": ["de", "th", "ja"]}, r"lacks 12 tensors, such as '.*B_spec.ja'"),
        ({"langs": ["de"]}, r"has unknown 12 tensors, such as '.*B_spec.th'"),
        ({"method": "vanilla"}, r"lacks 12 tensors, such as 'encoder.*\.B'"),
    ],
)
def test_a_checkpoint_that_does_not_fit_the_configuration_is_named(run, paths, change, message):
    model = checkpoint.build(tiny.settings(paths, **change), 2)
    with pytest.raises(UserError, match=message + ".*; use the configuration"):
        checkpoint.load_trainable(model, run[0] / "checkpoints" / "step-1", stage=2)


def test_a_truncated_checkpoint_is_named(run):
    path = run[0] / "checkpoints" / "step-1" / checkpoint.WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"step-1.*broken"):
        checkpoint.load_run(run[0])


def test_stage_2_needs_an_adapter_and_languages_that_whisper_knows(paths):
    for settings in (tiny.settings(paths, method=None), tiny.settings(paths, langs=[])):
        with pytest.raises(UserError, match=r"stage 2 needs model.adapter"):
            checkpoint.build(settings, 2)
    with pytest.raises(
        UserError, match="model.adapter: no language embedding of xx; give it, or set zipper.signal: learned"
    ):
        checkpoint.build(tiny.settings(paths, langs=["de", "xx"]), 2)


@pytest.mark.parametrize("method", REGISTRY)
def test_every_method_is_read_as_it_was_written(tmp_path, paths, method):
    """Also what is frozen and drawn at random: FlyLoRA's A."""
    settings = tiny.settings(paths, method=method, rank=8)
    model = tiny.trained(settings, 2)
    checkpoint.save_trainable(model, tmp_path)
    other = checkpoint.build(settings, 2)
    checkpoint.load_trainable(other, tmp_path, stage=2)
    for name, tensor in stage_tensors(model, 2).items():
        assert torch.equal(stage_tensors(other, 2)[name], tensor), name
    assert method != "flylora" or "encoder.blocks.0.attn.query.A" in load_file(tmp_path / WEIGHTS)


def test_a_number_that_is_none_is_named(tmp_path, paths):
    settings = tiny.settings(paths)
    model = checkpoint.build(settings, 2)
    with torch.no_grad():
        model.encoder.blocks[1].attn.key.router.linear.bias[0] = torch.nan
    checkpoint.save_trainable(model, tmp_path)
    with pytest.raises(
        UserError, match=r"'encoder.blocks.1.attn.key.router.linear.bias' holds NaN.*earlier checkpoint"
    ):
        checkpoint.load_trainable(checkpoint.build(settings, 2), tmp_path, stage=2)


# Initial-B


def initial_b(paths, method, **more):
    settings = tiny.settings(paths, method=method)
    adapter = settings.adapter.model_dump() | {"zipper": {"num_shared": 1}} | more
    return settings.model_copy(update={"adapter": AdapterSettings.model_validate(adapter)})


def frames(model, lang):
    """Encoder frames of seeded noise [40, 80]."""
    features = torch.randn(40, 80, generator=torch.Generator().manual_seed(3))
    return model.encoder([features], [lang])[0]


def test_initial_b_with_A_and_router_is_the_source_for_every_language(run, paths):
    run_dir, source = run
    model = checkpoint.build(tiny.settings(paths), 2)
    checkpoint.load_trainable(model, run_dir / "init", stage=1)
    settings = initial_b(paths, "zipper_soft", init_A=True, init_router=True).adapter
    checkpoint.warm_start(model, run_dir / "checkpoints" / "step-1", settings)
    for lang in ("de", "th", "zh"):
        assert torch.equal(frames(model, lang), frames(source, lang))


@pytest.mark.parametrize("method", ["zipper_soft", "zipper_hard", "zipper_static"])
@pytest.mark.parametrize("init_A", [False, True])
def test_initial_b_takes_the_banks_and_nothing_unasked(run, paths, method, init_A):
    run_dir, source = run
    model = checkpoint.build(initial_b(paths, method), 2)
    before = {name: t.clone() for name, t in stage_tensors(model, 2).items()}
    checkpoint.warm_start(model, run_dir / "checkpoints" / "step-1", initial_b(paths, method, init_A=init_A).adapter)
    theirs = stage_tensors(source, 2)
    for name, tensor in stage_tensors(model, 2).items():
        end = name.rpartition(".")[2]
        if ".B_shared" in name or ".B_spec." in name:
            first = ".B_shared" in name
            expected = theirs[name][:, : tensor.shape[1]] if first else theirs[name][:, -tensor.shape[1] :]
        else:
            expected = theirs[name] if init_A and end == "A" and name.startswith("encoder.") else before[name]
        assert torch.equal(tensor, expected), name
    if not init_A:
        assert not torch.equal(frames(model, "de"), frames(source, "de"))


@pytest.mark.parametrize(
    "source, message",
    [
        ({"rank": 2}, r"trained with \{'rank': 2, 'alpha': 4.0\}, not \{'rank': 4, 'alpha': 8.0\}"),
        ({"langs": ["de"]}, r"encoder.blocks.0.attn.query has no B_spec.th; .*same languages"),
        ({"method": "vanilla"}, r"has no B_shared; it must come from a zipper run"),
    ],
)
def test_initial_b_from_another_kind_of_run_is_refused(tmp_path, paths, source, message):
    settings = tiny.settings(paths, **source)
    folder = tiny.save_run(tmp_path, settings, 2, checkpoint.build(settings, 2))
    with pytest.raises(UserError, match=message):
        checkpoint.warm_start(checkpoint.build(tiny.settings(paths), 2), folder, tiny.settings(paths).adapter)


def test_openai_whispers_own_checkpoint_file_is_read_in_fp32(tmp_path):
    torch.manual_seed(0)
    whisper = tiny.make_whisper()
    dims = vars(whisper.dims)
    torch.save({"dims": dims, "model_state_dict": whisper.half().state_dict()}, tmp_path / "tiny.pt")
    encoder, _ = load_whisper(str(tmp_path / "tiny.pt"))
    assert torch.equal(encoder.conv1.weight, whisper.encoder.conv1.weight.float())


@pytest.mark.parametrize("content", [None, b"not a checkpoint", {"weights": 1}])
def test_a_whisper_file_or_name_that_is_none_is_named(tmp_path, content):
    path = tmp_path / "tiny.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(content, path)
    with pytest.raises(UserError, match=r"tiny.pt.*a known name"):
        load_whisper(str(path))


@pytest.mark.parametrize("damage", ["name", "config", "weights"])
def test_a_whisper_that_is_not_there_or_not_whole_is_named(tmp_path, damage):
    folder = tmp_path / "whisper"
    if damage != "name":
        save_whisper(folder, tiny.make_whisper(), {})
    if damage == "config":
        files.write_json(folder / "config.json", {"dims": {"n_mels": 80}})
    if damage == "weights":
        (folder / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(UserError, match=str(folder)):
        load_whisper(str(folder))


def test_an_llm_that_is_not_there_is_named(tmp_path, paths):
    settings = tiny.settings(paths._replace(lm=tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"nowhere.*model.llm.pretrained"):
        checkpoint.build(settings, 2)

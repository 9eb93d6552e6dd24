"""One table of methods drives the tests of all adapters; the oracles are the paper's equations in float64."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zipperasr import config
from zipperasr.adapters import REGISTRY, AdapterSettings, adapt, language_runs, method_class
from zipperasr.errors import UserError

LANGS = ("de", "ja", "th")
RANK, ALPHA = 4, 8.0
GROUPS = [("th", 0, 5), ("de", 5, 6), ("xx", 6, 9), ("th", 9, 11)]  # xx is unseen; th comes twice
METHODS = pytest.mark.parametrize("method", REGISTRY)


def vanilla_delta(m, lang):
    """Eq. 7."""
    return ALPHA / RANK * m.B @ m.A


def zipper_soft_delta(m, lang):
    """Eq. 14 to 18, and the shared bank alone for a language without its own."""
    if lang not in LANGS:
        return ALPHA / RANK * m.B_shared @ m.A
    e = m.router.language_embeddings[LANGS.index(lang)]
    normed = (e - e.mean()) / (e.var(unbiased=False) + 1e-5).sqrt() * m.router.norm.weight + m.router.norm.bias
    p = 1 / (1 + torch.exp(-(m.router.linear.weight @ normed + m.router.linear.bias)))
    B = m.B_shared @ torch.diag(1 - p) + m.B_spec[lang] @ torch.diag(p)
    return ALPHA / RANK * B @ m.A


DELTA = {"vanilla": vanilla_delta, "zipper_soft": zipper_soft_delta}


def layer(method, *, bias=True, is_fresh=False):
    """An adapted 6 -> 10 layer in float64; every trainable parameter random unless fresh."""
    torch.manual_seed(0)
    linear = nn.Linear(6, 10, bias=bias, dtype=torch.float64)
    settings = AdapterSettings(method=method, rank=RANK, alpha=ALPHA, langs=LANGS)
    adapted = method_class(method)(linear, settings, torch.randn(len(LANGS), 7, dtype=torch.float64))
    if not is_fresh:
        for parameter in trainable(adapted).values():
            nn.init.normal_(parameter)
    return adapted


def trainable(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def by_equation(method, m, x):
    """The layer's output from dense weight updates, run by run."""
    runs = [F.linear(x[a:b], m.weight + DELTA[method](m, lang), m.bias) for lang, a, b in GROUPS]
    return torch.cat(runs)


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(11, 6, dtype=torch.float64, requires_grad=True)


@METHODS
def test_a_fresh_adapter_changes_nothing(method, x):
    m = layer(method, is_fresh=True)
    torch.testing.assert_close(m(x, GROUPS), F.linear(x, m.weight, m.bias), rtol=0, atol=0)


@METHODS
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_equal_the_equation(method, bias, x):
    m = layer(method, bias=bias)
    weights = torch.randn(11, 10, dtype=torch.float64)
    inputs = {"x": x, **trainable(m)}
    outputs = [m(x, GROUPS), by_equation(method, m, x)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    actual, expected = (
        torch.autograd.grad((y * weights).sum(), list(inputs.values()), allow_unused=True) for y in outputs
    )
    for name, a, b in zip(inputs, actual, expected, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@METHODS
def test_a_row_does_not_depend_on_its_neighbours_or_their_language(method, x):
    m = layer(method)
    y = m(x, GROUPS)
    for lang, start, stop in GROUPS:
        torch.testing.assert_close(y[start:stop], m(x[start:stop], [(lang, 0, stop - start)]), rtol=0, atol=1e-14)


@METHODS
@pytest.mark.parametrize("lang", [*LANGS, "xx"])
def test_merged_equals_unmerged(method, lang, x):
    m = layer(method).float()
    x = x.detach().float()
    merged = m.merged(lang)
    assert type(merged) is nn.Linear and not merged.weight.requires_grad and merged.bias is m.bias
    torch.testing.assert_close(merged(x), m(x, [(lang, 0, len(x))]), rtol=1e-5, atol=1e-5)


def test_merging_into_half_precision_adds_in_fp32():
    m = layer("vanilla").to(torch.bfloat16)
    expected = (m.weight.float() + (m.scaling * m.B).float() @ m.A.float()).bfloat16()
    assert torch.equal(m.merged().weight, expected)


@METHODS
def test_the_frozen_layer_gets_no_gradient_and_keeps_its_name(method, x):
    m = layer(method)
    m(x, GROUPS).sum().backward()
    assert {"weight", "bias"} <= dict(m.named_parameters()).keys() and not {"weight", "bias"} & trainable(m).keys()
    assert m.weight.grad is None and m.bias.grad is None


def test_a_language_absent_from_the_batch_gets_no_gradient(x):
    m = layer("zipper_soft")
    m(x, [("de", 0, 4), ("th", 4, 11)]).sum().backward()
    assert m.B_spec["ja"].grad is None
    assert all(p.grad is not None for name, p in trainable(m).items() if name != "B_spec.ja")


def test_a_fresh_router_prefers_neither_bank():
    router = layer("zipper_soft", is_fresh=True).router
    assert torch.equal(router([0, 1, 2]), torch.full((3, RANK), 0.5, dtype=torch.float64))


def test_language_embeddings_are_frozen_and_in_no_checkpoint():
    m = layer("zipper_soft")
    assert not any("embedding" in name for name in m.state_dict())


@pytest.mark.parametrize(
    "groups, message",
    [
        (None, "depends on the language"),
        ([("de", 0, 4)], "end at 4, but there are 11 tokens"),
        ([("de", 0, 4), ("th", 5, 11)], "not contiguous"),
        ([("de", 0, 6), ("th", 5, 11)], "not contiguous"),
    ],
)
def test_groups_must_be_there_and_cover_all_tokens(groups, message, x):
    with pytest.raises(ValueError, match=message):
        layer("zipper_soft")(x, groups)


def test_vanilla_needs_no_groups_and_takes_any_number_of_dimensions(x):
    m = layer("vanilla")
    torch.testing.assert_close(m(x[:10].view(2, 5, 6)), m(x[:10]).view(2, 5, 10))


def test_vanilla_equals_pefts_lora_with_the_same_factors(x):
    peft = pytest.importorskip("peft")
    m = layer("vanilla")
    model = nn.Sequential(nn.Linear(6, 10, dtype=torch.float64))
    model[0].load_state_dict({"weight": m.weight, "bias": m.bias})
    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], lora_dropout=0.0)
    model = peft.get_peft_model(model, lora, autocast_adapter_dtype=False).double()
    theirs = {
        name.partition(".lora_")[2].partition(".")[0]: p for name, p in model.named_parameters() if "lora" in name
    }
    with torch.no_grad():
        theirs["A"].copy_(m.A)
        theirs["B"].copy_(m.B)
    expected, actual = model(x), m(x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(expected.square().sum(), [x, theirs["A"], theirs["B"]])
    for a, b in zip(torch.autograd.grad(actual.square().sum(), [x, m.A, m.B]), gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_a_starts_like_lora():
    A = method_class("vanilla")(nn.Linear(400, 10), AdapterSettings(method="vanilla", rank=64)).A
    bound = 1 / math.sqrt(400)
    assert A.abs().max() <= bound and A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_adapt_replaces_exactly_the_named_layers():
    model = nn.ModuleDict({"attn": nn.ModuleDict({"query": nn.Linear(3, 3), "key_query": nn.Linear(3, 3)})})
    assert adapt(model, ["attn.query"], AdapterSettings(method="vanilla")) == 1
    assert type(model["attn"]["query"]).__name__ == "Vanilla" and type(model["attn"]["key_query"]) is nn.Linear


def test_adapt_names_a_pattern_without_a_layer():
    with pytest.raises(UserError, match="no layer 'q_proj' in Sequential"):
        adapt(nn.Sequential(nn.Linear(3, 3)), ["q_proj"], AdapterSettings(method="vanilla"))


@pytest.mark.parametrize("key, value, known", [("method", "zipper", "zipper_soft"), ("unseen", "guess", "shared")])
def test_an_unknown_method_or_policy_is_named_with_the_known_ones(key, value, known):
    with pytest.raises(UserError, match=f"{key}.*{known}.*{value}"):
        config.parse({key: value}, AdapterSettings, source="conf.yaml")


def test_language_runs_join_neighbours_of_one_language():
    runs = language_runs(["de", "de", "th", "de"], [3, 4, 1, 2])
    assert runs == [("de", 0, 7), ("th", 7, 8), ("de", 8, 10)]

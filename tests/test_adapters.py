"""One table of cases drives the tests of all adapters; the oracles are the paper's equations in float64, and PEFT."""

import copy
import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from zipperasr import adapters, config
from zipperasr.adapters import (
    REGISTRY,
    AdapterSettings,
    adapt,
    adapted_layers,
    adapter_state,
    batch_languages,
    checkpoint_contexts,
    language_parameters,
    language_runs,
    load_adapter_state,
)
from zipperasr.adapters.base import AdaptedLinear
from zipperasr.errors import UserError

LANGS = ("de", "ja", "th")
RANK, ALPHA = 4, 8.0
RUNS = language_runs(["th", "de", "zh", "th"], [5, 1, 3, 2])  # zh has no bank; th comes twice
EMBEDDINGS = {lang: torch.randn(7, generator=torch.Generator().manual_seed(i)).double()
              for i, lang in enumerate([*LANGS, "zh"])}  # fmt: skip
EMBEDDINGS["zh"] = EMBEDDINGS["ja"] + 0.1  # Japanese is the nearest to Chinese


def vanilla(m, lang, s):
    """Eq. 7."""
    return m.B @ m.A


def independent(m, lang, s):
    """Eq. 8; no update for a language without a bank."""
    return m.B_spec[lang] @ m.A_spec[lang] if lang else torch.zeros_like(m.weight)


def zipper_static(m, lang, s):
    """Eq. 11; zeros stand for the columns of a bank that is not there."""
    num_shared = s.zipper.num_shared or RANK // 2
    B_spec = m.B_spec[lang] if lang else torch.zeros(len(m.weight), RANK - num_shared, dtype=m.weight.dtype)
    return torch.cat([m.B_shared, B_spec], dim=1) @ m.A


def share(m, lang):
    """Eq. 16 to 18."""
    e = m.router.signal([lang])[0]
    normed = (e - e.mean()) / (e.var(unbiased=False) + 1e-5).sqrt() * m.router.norm.weight + m.router.norm.bias
    return 1 / (1 + torch.exp(-(m.router.linear.weight @ normed + m.router.linear.bias)))


def zipper_soft(m, lang, s):
    """Eq. 14 and 15; the shared bank alone for a language without its own."""
    if lang is None:
        return m.B_shared @ m.A
    p = share(m, lang)
    return (m.B_shared @ torch.diag(1 - p) + m.B_spec[lang] @ torch.diag(p)) @ m.A


def zipper_hard(m, lang, s):
    """Eq. 12 and 13, column by column; the straight-through estimator adds nothing but a gradient."""
    if lang is None:
        return m.B_shared @ m.A
    p = share(m, lang)
    mask = (p >= s.zipper.tau).double() + p - p.detach()
    mask = mask if s.zipper.specific_where == 1 else 1 - mask
    columns = [m.B_spec[lang][:, i] * mask[i] + m.B_shared[:, i] * (1 - mask[i]) for i in range(RANK)]
    return torch.stack(columns, dim=1) @ m.A


DELTA = {f.__name__: f for f in (vanilla, independent, zipper_static, zipper_hard, zipper_soft)}


@dataclass(frozen=True)
class Case:
    """A method with settings; `served` says whose bank Chinese, which has none, is given."""

    method: str
    settings: dict = field(default_factory=dict)
    served: str | None = None

    def __str__(self):
        return "-".join([self.method, *(f"{k}={v}".replace(" ", "") for k, v in self.settings.items())])


CASES = [
    Case("vanilla"),
    Case("flylora", {"flylora": {"top_k": 2}}),
    Case("flylora", {"flylora": {"top_k": 2, "score": "absolute", "x_gradient": False}}),
    Case("independent"),
    Case("independent", {"unseen": "nearest"}, served="ja"),
    Case("zipper_static"),
    Case("zipper_static", {"zipper": {"num_shared": 1}, "unseen": "nearest"}, served="ja"),
    Case("zipper_hard"),
    Case("zipper_hard", {"zipper": {"specific_where": 0, "tau": 0.4}, "unseen": "nearest"}, served="ja"),
    Case("zipper_soft"),
    Case("zipper_soft", {"unseen": "nearest"}, served="ja"),
    Case("zipper_soft", {"zipper": {"signal": "learned"}}),
    Case("zipper_soft", {"zipper": {"signal": "onehot", "router": "shared"}}),
]
ALL = pytest.mark.parametrize("case", CASES, ids=str)
MERGEABLE = pytest.mark.parametrize("case", [case for case in CASES if case.method != "flylora"], ids=str)
BANKED = pytest.mark.parametrize("method", ["independent", "zipper_static", "zipper_hard", "zipper_soft"])


def settings_of(case):
    return AdapterSettings(method=case.method, rank=RANK, alpha=ALPHA, langs=LANGS, **case.settings)


def model_of(case, *, num_layers=1, bias=True, is_fresh=False, dtype=torch.float64):
    """Adapted 6 -> 6 layers, every trainable parameter random unless fresh."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6, bias=bias, dtype=dtype) for _ in range(num_layers)))
    adapt(model, ["*"] if num_layers == 1 else ["0", "1"], settings_of(case), language_embeddings=EMBEDDINGS)
    if not is_fresh:
        for parameter in trainable(model).values():
            nn.init.normal_(parameter)
        if case.method == "flylora":
            for layer in model:
                layer.bias_moves += torch.randint(-300, 300, (RANK,))
    return model


def layer_of(case, **kwargs):
    return model_of(case, **kwargs)[0]


def trainable(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def flylora_by_hand(m, x):
    """Eq. 9, token by token, with each choice of the settings; A passes no gradient where they say so."""
    rows, s = [], m.settings
    for token in x:
        y = m.A @ (token if s.x_gradient else token.detach())
        score = y.detach() + s.bias_rate * m.bias_moves
        top = sorted(range(RANK), key=lambda i: -(abs(score[i]) if s.score == "absolute" else score[i]))[: s.top_k]
        rows.append(ALPHA / RANK * sum(m.B[:, i] * y[i] for i in top))
    return F.linear(x, m.weight, m.bias) + torch.stack(rows)


def by_equation(case, m, x):
    """The layer's output from dense weight updates, run by run."""
    if case.method == "flylora":
        return flylora_by_hand(m, x)
    served = {**{lang: lang for lang in LANGS}, "zh": case.served}
    deltas = [DELTA[case.method](m, served[lang], settings_of(case)) for lang in RUNS.langs]
    return torch.cat([F.linear(x[a:b], m.weight + ALPHA / RANK * deltas[g], m.bias) for g, a, b in RUNS.runs])


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(11, 6, dtype=torch.float64, requires_grad=True)


def test_the_table_has_every_method():
    assert {case.method for case in CASES} == set(REGISTRY)


@ALL
def test_a_fresh_adapter_changes_nothing(case, x):
    m = layer_of(case, is_fresh=True)
    torch.testing.assert_close(m(x, RUNS), F.linear(x, m.weight, m.bias), rtol=0, atol=0)


@ALL
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_equal_the_equation(case, bias, x):
    m = layer_of(case, bias=bias)
    weights = torch.randn(11, 6, dtype=torch.float64)
    inputs = {"x": x, **trainable(m)}
    outputs = [m(x, RUNS), by_equation(case, m, x)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    actual, expected = (
        torch.autograd.grad((y * weights).sum(), list(inputs.values()), allow_unused=True) for y in outputs
    )
    for name, a, b in zip(inputs, actual, expected, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@ALL
def test_a_row_does_not_depend_on_its_neighbours_or_their_language(case, x):
    m = layer_of(case)
    y = m(x, RUNS)
    for g, start, stop in RUNS.runs:
        alone = m(x[start:stop], language_runs([RUNS.langs[g]], [stop - start]))
        torch.testing.assert_close(y[start:stop], alone, rtol=0, atol=1e-14)


@MERGEABLE
@pytest.mark.parametrize("lang", [*LANGS, "zh"])
def test_merged_equals_unmerged(case, lang, x):
    m = layer_of(case).float()
    x = x.detach().float()
    merged = m.merged(lang)
    assert type(merged) is nn.Linear and not merged.weight.requires_grad and merged.bias is m.bias
    torch.testing.assert_close(merged(x), m(x, language_runs([lang], [len(x)])), rtol=1e-5, atol=1e-5)


def test_merging_into_half_precision_adds_in_fp32():
    m = layer_of(Case("vanilla")).to(torch.bfloat16)
    expected = (m.weight.float() + (m.scaling * m.B).float() @ m.A.float()).bfloat16()
    assert torch.equal(m.merged().weight, expected)


@ALL
def test_only_the_adapter_trains_and_the_frozen_layer_keeps_its_name(case, x):
    m = layer_of(case)
    m(x, RUNS).sum().backward()
    assert {"weight", "bias"} <= dict(m.named_parameters()).keys() and not {"weight", "bias"} & trainable(m).keys()
    assert m.weight.grad is None and m.bias.grad is None
    unused = {"ja"} - {case.served}
    idle = {id(p) for lang in unused for p in language_parameters(nn.Sequential(m)).get(lang, [])}
    assert {name for name, p in trainable(m).items() if p.grad is None} == {
        name for name, p in trainable(m).items() if id(p) in idle
    }


@ALL
def test_state_is_all_that_another_model_needs(case, x):
    model, other = model_of(case, num_layers=2), model_of(case, num_layers=2, is_fresh=True)
    state = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    assert not any(name.endswith(("weight", "bias")) and name.count(".") == 1 for name in state)
    assert not any("embeddings" in name for name in state) or case.settings["zipper"]["signal"] == "learned"
    load_adapter_state(other, state)
    for a, b in zip(model, other, strict=True):
        assert torch.equal(a(x, RUNS), b(x, RUNS))


@ALL
def test_bf16_stays_near_the_exact_result_on_the_same_numbers(case, x):
    m = layer_of(case, dtype=torch.float32).bfloat16()
    x = x.detach().bfloat16()
    exact = copy.deepcopy(m).double()
    if case.method == "flylora":  # which ranks act may turn on the rounding
        exact.active = lambda h: m.active(x @ m.A.T)
    y = m(x, RUNS)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact(x.double(), RUNS), rtol=0.05, atol=0.2)


@ALL
def test_autocast_computes_in_its_dtype_and_gives_gradients_in_fp32(case, x):
    m = layer_of(case, dtype=torch.float32)
    x = x.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = m(x, RUNS)
        expected = F.linear(x, m.weight, m.bias)
    assert y.dtype == expected.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and all(
        p.grad.dtype == torch.float32 for p in trainable(m).values() if p.grad is not None
    )


@ALL
def test_activation_checkpointing_gives_equal_gradients_and_counts_once(case, x):
    def gradients(run):
        model = model_of(case, num_layers=2)
        y = run(model)
        y.square().sum().backward()
        loads = [layer.load.clone() for layer in model if layer.balances]
        return {name: p.grad for name, p in trainable(model).items()}, loads

    plain, loads = gradients(lambda model: model[1](model[0](x, RUNS), RUNS))
    again, loads_again = gradients(
        lambda model: checkpoint(lambda x: model[1](model[0](x, RUNS), RUNS), x, use_reentrant=False)
    )
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert (gradient is None) == (again[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(again[name], gradient, rtol=0, atol=0)
    assert all(torch.equal(a, b) and a.sum() == 22 for a, b in zip(loads, loads_again, strict=True))


@ALL
def test_little_but_x_is_kept_for_the_backward_pass(case):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    adapt(model, ["0"], settings_of(case), language_embeddings={k: v.float() for k, v in EMBEDDINGS.items()})
    x = torch.randn(512, 64, requires_grad=True)
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model[0](x, language_runs(["de", "ja", "th"], [200, 200, 112]))
    y.sum().backward()
    assert sum(kept.values()) <= 1.3 * x.untyped_storage().nbytes()


def test_a_parameter_that_changes_before_the_backward_pass_is_noticed(x):
    m = layer_of(Case("zipper_soft"))
    y = m(x, RUNS)
    with torch.no_grad():
        m.B_shared.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# PEFT


def peft_model(m, names):
    """PEFT on the frozen layer of `m`, with an adapter a name whose A and B can be filled."""
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(6, 6, dtype=torch.float64))
    model[0].load_state_dict({"weight": m.weight, "bias": m.bias})
    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], lora_dropout=0.0)
    model = peft.get_peft_model(model, lora, adapter_name=names[0], autocast_adapter_dtype=False).double()
    for name in names[1:]:
        model.add_adapter(name, lora)
    return model.double()


def fill(model, name, A, B):
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_A[name].weight.copy_(A)
        layer.lora_B[name].weight.copy_(B)
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def test_vanilla_equals_pefts_lora_with_the_same_factors(x):
    m = layer_of(Case("vanilla"))
    model = peft_model(m, ["default"])
    theirs = fill(model, "default", m.A, m.B)
    expected, actual = model(x), m(x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(expected.square().sum(), [x, *theirs])
    for a, b in zip(torch.autograd.grad(actual.square().sum(), [x, m.A, m.B]), gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@MERGEABLE
def test_each_language_is_a_plain_lora_of_peft(case, x):
    m = layer_of(case)
    model = peft_model(m, list(LANGS))
    for lang in LANGS:
        A, B = m.low_rank(lang)
        fill(model, lang, A, B / m.scaling)
        model.set_adapter(lang)
        torch.testing.assert_close(m(x, language_runs([lang], [11])), model(x), rtol=0, atol=1e-12)


def test_independent_trains_as_pefts_adapters_do(x):
    m = layer_of(Case("independent"))
    model = peft_model(m, list(LANGS))
    for lang in ("de", "th"):
        theirs = fill(model, lang, m.A_spec[lang], m.B_spec[lang])
        model.set_adapter(lang)
        expected = torch.autograd.grad(model(x).square().sum(), [x, *theirs])
        ours = m(x, language_runs([lang], [11])).square().sum()
        for a, b in zip(torch.autograd.grad(ours, [x, m.A_spec[lang], m.B_spec[lang]]), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


# Zippers


def test_hard_uses_the_binary_mask_and_passes_the_gradient_straight_through():
    """A 2x2 layer of rank 2 for one language, p = (0.7, 0.2): rank 0 is specific, rank 1 shared."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    settings = AdapterSettings(method="zipper_hard", rank=2, alpha=2, langs=("de",))
    adapt(model, ["0"], settings, language_embeddings={"de": torch.tensor([1.0, -1.0])})
    m = model[0]
    with torch.no_grad():
        m.A.copy_(torch.eye(2))
        m.weight.zero_()
        m.B_shared.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        m.B_spec["de"].copy_(torch.tensor([[10.0, 20.0], [30.0, 40.0]]))
        m.router.linear.weight.zero_()
        m.router.linear.bias.copy_(torch.logit(torch.tensor([0.7, 0.2])))
    y = m(torch.eye(2), language_runs(["de"], [2]))
    assert torch.equal(y, torch.tensor([[10.0, 30.0], [2.0, 4.0]]))  # row i is column i of B
    (y * torch.tensor([[1.0, 0.0], [0.0, 1.0]])).sum().backward()  # dL/dB = [[1, 0], [0, 1]]
    assert torch.equal(m.B_spec["de"].grad, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert torch.equal(m.B_shared.grad, torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    # dL/ds_i = sum over o of dL/dB_oi (B_spec - B_shared)_oi = (9, 36), ds/dp = 1, dp/dz = p (1 - p)
    torch.testing.assert_close(m.router.linear.bias.grad, torch.tensor([9 * 0.7 * 0.3, 36 * 0.2 * 0.8]))


def test_fresh_hard_trains_both_banks_and_a_fresh_soft_router_prefers_neither(x):
    hard, soft = (layer_of(Case(method), is_fresh=True) for method in ("zipper_hard", "zipper_soft"))
    shares = torch.stack([hard.specific_share(lang) for lang in LANGS])
    assert set(shares.unique().tolist()) == {0.0, 1.0}
    hard(x, RUNS).sum().backward()
    assert hard.B_shared.grad.abs().sum() > 0 and hard.B_spec["th"].grad.abs().sum() > 0
    assert all(torch.equal(soft.specific_share(lang), torch.full((RANK,), 0.5).double()) for lang in LANGS)


def test_shares_are_the_routers_and_zero_without_a_bank():
    m = layer_of(Case("zipper_soft"))
    torch.testing.assert_close(m.specific_share("de"), share(m, "de"))
    assert torch.equal(m.specific_share("zh"), torch.zeros(RANK).double())
    assert layer_of(Case("vanilla")).specific_share("de") is None


def test_a_shared_router_is_one_and_is_saved_once():
    model = model_of(CASES[-1], num_layers=2)
    assert model[0].router is model[1].router
    assert sum(name.endswith("router.linear.weight") for name in adapter_state(model)) == 1
    own = model_of(Case("zipper_soft"), num_layers=2)
    assert own[0].router is not own[1].router and own[0].router.signal is own[1].router.signal


# FlyLoRA


def fly(**flylora):
    return layer_of(Case("flylora", {"flylora": {"top_k": 2, **flylora}}), is_fresh=True)


def test_flyloras_A_is_sparse_frozen_and_saved():
    model = nn.Sequential(nn.Linear(400, 10))
    adapt(model, ["0"], AdapterSettings(method="flylora", rank=32))
    A = model[0].A
    assert ((A != 0).sum(1) == 100).all()  # 400 * 8 / 32
    assert A[A != 0].std().item() == pytest.approx(1 / 32, rel=0.05) and not A.requires_grad
    assert "0.A" in adapter_state(model) and model[0].scaling == 2


@pytest.mark.parametrize("sparsity, expected", [(0.5, 3), (0.01, 1)])
def test_the_sparsity_is_a_setting(sparsity, expected):
    assert ((fly(sparsity=sparsity).A != 0).sum(1) == expected).all()


def test_the_bias_moves_once_a_step_in_training_by_the_load_of_real_frames(x):
    m = fly(bias_rate=0.5)
    is_real = torch.arange(11) < 7
    runs = language_runs(["de"], [11], is_real)
    for _ in range(2):  # two micro-batches
        m(x, runs).sum().backward()
    expected = 2 * m.active(x @ m.A.T)[is_real].sum(0)
    assert torch.equal(m.load, expected) and m.load.sum() == 2 * 7 * 2 and not m.bias_moves.any()
    m.eval()(x, runs).sum().backward()
    assert torch.equal(m.load, expected), "a backward pass in eval mode is no training"
    adapters.balance(nn.Sequential(m), lambda load: load.mul_(2))  # another rank saw as much
    assert torch.equal(m.bias_moves, torch.sign(2 * 7 * 2 * 2 / RANK - 2 * expected).long()) and not m.load.any()


def test_the_rules_of_the_two_official_codes(x):
    load = torch.tensor([0, 5, 1, 2])
    balanced, alike = fly(bias_rule="mean"), fly(bias_rule="share")
    for m in (balanced, alike):
        m.balance(load)
    assert balanced.bias_moves.tolist() == [1, -1, 1, 0]  # sign(2 - c)
    assert alike.bias_moves.tolist() == [1, -1, -1, -1]  # sign(2 / 4 - c)


def test_balancing_evens_the_load():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8))
    adapt(model, ["0"], AdapterSettings(method="flylora", rank=16, flylora={"top_k": 4, "bias_rate": 3e-3}))
    x = torch.randn(2000, 64) + 0.5

    def imbalance():
        load = model[0].active(x @ model[0].A.T).sum(0).float()
        return (load.max() / load.mean()).item()

    before = imbalance()
    for _ in range(100):
        model(x).sum().backward()
        adapters.balance(model)
    assert imbalance() < 1.25 < before


def test_half_precision_does_not_lose_the_moves_of_the_bias(x):
    m = fly().bfloat16()
    for _ in range(300):
        m.balance(torch.tensor([0, 1, 0, 1]))
    assert m.bias_moves.tolist() == [300, -300, 300, -300]


def test_flylora_is_no_plain_lora_and_says_so():
    for call in (fly().merged, fly().low_rank):
        with pytest.raises(UserError, match="chooses its ranks anew for every frame"):
            call("de")


# Languages of a batch


class Attention(nn.Module):
    """A model that is not ours: it calls its layers with nothing but x [N, T, D]."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.head = (nn.Linear(6, 6, dtype=torch.float64) for _ in range(3))

    def forward(self, x):
        return self.head(torch.softmax(self.q_proj(x), -1) * self.v_proj(x))


@pytest.fixture
def foreign():
    torch.manual_seed(0)
    model = Attention()
    assert adapt(model, ["q_proj", "v_proj"], settings_of(Case("zipper_soft")), language_embeddings=EMBEDDINGS) == 2
    for parameter in trainable(model).values():
        nn.init.normal_(parameter)
    return model


@pytest.fixture
def rows():
    return torch.randn(4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def alone(model, rows, langs):
    outputs = []
    for row, lang in zip(rows, langs, strict=True):
        with batch_languages([lang]):
            outputs.append(model(row[None]))
    return torch.cat(outputs)


def test_any_model_can_be_adapted_and_rows_are_as_if_alone(foreign, rows):
    langs = ["de", "th", "de", "zh"]
    with batch_languages(langs):
        y = foreign(rows)
    torch.testing.assert_close(y, alone(foreign, rows, langs), rtol=0, atol=1e-12)
    assert not foreign.head.weight.requires_grad and all("proj" in name for name in trainable(foreign))


def test_beam_search_repeats_rows(foreign, rows):
    repeated = rows.repeat_interleave(3, 0)
    with batch_languages(["de", "th", "ja", "de"], beams=3):
        y, once = foreign(repeated), foreign(rows)
    torch.testing.assert_close(y, once.repeat_interleave(3, 0), rtol=0, atol=1e-12)


def test_a_forgotten_language_is_an_error(foreign, rows):
    with pytest.raises(UserError, match="ZipperSoft depends on the language, and none was said"):
        foreign(rows)
    with batch_languages(["de"] * 4):
        foreign(rows)
    with pytest.raises(UserError, match="none was said"):
        foreign(rows)


@pytest.mark.parametrize("langs, beams", [(["de"], 1), (["de"] * 2, 3), (["de"] * 5, 1)])
def test_languages_of_another_batch_are_an_error(foreign, rows, langs, beams):
    with batch_languages(langs, beams=beams), pytest.raises(UserError, match="an adapted layer got 4"):
        foreign(rows)


def test_an_unknown_language_is_named_with_the_known_ones(foreign, rows):
    with batch_languages(["de", "ger", "de", "de"]), pytest.raises(UserError, match="'ger'.*de, ja, th"):
        foreign(rows)


def test_recomputation_sees_the_languages_of_its_own_forward_pass(foreign, rows):
    """Two batches forward, then both backward: each recomputes with its own languages, outside any block."""

    def losses(run):
        total = 0
        for langs in (["de", "th", "de", "de"], ["ja", "ja", "de", "th"]):
            with batch_languages(langs):
                total = total + run(rows).square().sum()
        foreign.zero_grad()
        total.backward()
        return {name: p.grad for name, p in trainable(foreign).items()}

    plain = losses(foreign)
    again = losses(lambda x: checkpoint(foreign, x, use_reentrant=False, context_fn=checkpoint_contexts))
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=0, atol=1e-12)


def test_a_kept_graph_is_recomputed_with_its_languages_again(foreign, rows):
    with batch_languages(["de", "th", "de", "ja"]):
        loss = checkpoint(foreign, rows, use_reentrant=False, context_fn=checkpoint_contexts).square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in trainable(foreign).values()]
    loss.backward()
    torch.testing.assert_close([p.grad for p in trainable(foreign).values()], [2 * g for g in once])


def test_recomputation_without_its_languages_is_an_error_even_where_others_are_said(foreign, rows):
    with batch_languages(["de"] * 4):
        loss = checkpoint(foreign, rows.requires_grad_(), use_reentrant=False).sum()
    with batch_languages(["th"] * 4), pytest.raises(UserError, match="context_fn=zipperasr.adapters.checkpoint_conte"):
        loss.backward()


@pytest.mark.parametrize("case", [Case("zipper_soft"), Case("flylora", {"flylora": {"top_k": 2}})], ids=str)
def test_a_compiled_model_follows_the_languages_of_each_batch(case, rows):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Attention()
    adapt(model, ["q_proj", "v_proj"], settings_of(case), language_embeddings=EMBEDDINGS)
    for parameter in trainable(model).values():
        nn.init.normal_(parameter)
    compiled = torch.compile(model, backend="aot_eager")
    for langs in (["de", "th", "de", "zh"], ["ja", "ja", "de", "th"], ["de"] * 4):
        found = []
        for run in (model, compiled):
            with batch_languages(langs):
                y = run(rows)
            model.zero_grad()
            y.square().sum().backward()
            found.append([y, *(p.grad for p in trainable(model).values())])
        torch.testing.assert_close(*found, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", [Case("independent"), Case("zipper_hard")], ids=str)
def test_a_compiled_layer_follows_the_runs_that_it_is_given(case, x):
    torch._dynamo.reset()
    m = layer_of(case)
    compiled = torch.compile(m, backend="aot_eager")
    for langs, lengths in ((["de", "th"], [4, 7]), (["th", "zh", "de"], [1, 6, 4]), (["ja"], [11])):
        runs = language_runs(langs, lengths)
        y, same = m(x, runs), compiled(x, runs)
        torch.testing.assert_close(same, y, rtol=0, atol=1e-12)
        inputs = [x, *m.parameters_for(runs.langs)]
        expected, found = (torch.autograd.grad(z.square().sum(), inputs, allow_unused=True) for z in (y, same))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_gradients_accumulate_over_batches_of_different_languages(foreign, rows):
    for langs in (["de"] * 4, ["th"] * 4):
        with batch_languages(langs):
            foreign(rows).sum().backward()
    gradients = {name: p.grad for name, p in trainable(foreign).items()}
    assert gradients["q_proj.B_spec.ja"] is None
    assert gradients["q_proj.B_spec.de"].any() and gradients["q_proj.B_spec.th"].any()


def test_padding_of_rows_is_not_counted_as_load(rows):
    model = Attention()
    adapt(model, ["q_proj"], settings_of(Case("flylora", {"flylora": {"top_k": 2}})))
    is_real = torch.arange(5) < torch.tensor([5, 2, 1, 3])[:, None]
    with batch_languages(["de"] * 4, is_real=is_real):
        model(rows).sum().backward()
    assert model.q_proj.load.sum() == 2 * 11
    with batch_languages(["de"] * 4, is_real=is_real[:, :3]), pytest.raises(UserError, match="is_real has shape"):
        model(rows)


def test_runs_must_cover_the_tokens(x):
    with pytest.raises(ValueError, match="for 4 tokens, but there are 11"):
        layer_of(Case("zipper_soft"))(x, language_runs(["de"], [4]))


def test_vanilla_needs_no_languages_and_takes_any_number_of_dimensions(x):
    m = layer_of(Case("vanilla"))
    torch.testing.assert_close(m(x[:10].view(2, 5, 6)), m(x[:10]).view(2, 5, 6))


def test_language_runs_join_neighbours_of_one_language():
    runs = language_runs(["de", "de", "th", "de"], [3, 4, 1, 2])
    assert runs.langs == ("de", "th") and runs.runs == ((0, 0, 7), (1, 7, 8), (0, 8, 10)) and runs.num_tokens == 10


@BANKED
def test_parameters_of_a_language_are_its_own_alone(method):
    model = model_of(Case(method), num_layers=2)
    own = language_parameters(model)
    per_layer = 2 if method == "independent" else 1
    assert {lang: len(parameters) for lang, parameters in own.items()} == dict.fromkeys(LANGS, 2 * per_layer)
    learned = language_parameters(model_of(Case("zipper_soft", {"zipper": {"signal": "learned"}}), num_layers=2))
    assert all(len(parameters) == 3 for parameters in learned.values())  # two banks and one embedding for all layers


# Settings


def test_a_starts_like_lora():
    model = nn.Sequential(nn.Linear(400, 10))
    adapt(model, ["0"], AdapterSettings(method="vanilla", rank=64))
    A, bound = model[0].A, 1 / math.sqrt(400)
    assert A.abs().max() <= bound and A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_adapt_replaces_exactly_the_named_layers():
    model = nn.ModuleDict({"attn": nn.ModuleDict({"query": nn.Linear(3, 3), "key_query": nn.Linear(3, 3)})})
    assert adapt(model, ["attn.query"], AdapterSettings(method="vanilla")) == 1
    assert list(adapted_layers(model)) == ["attn.query"] and type(model["attn"]["key_query"]) is nn.Linear


def test_a_star_in_a_pattern_stands_for_anything():
    model = nn.ModuleDict(
        {side: nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(3, 3)})] * 1) for side in ("enc", "dec")}
    )
    assert adapt(model, ["enc.*.fc"], AdapterSettings(method="vanilla")) == 1
    assert isinstance(model["enc"][0]["fc"], AdaptedLinear) and type(model["dec"][0]["fc"]) is nn.Linear


def test_adapt_names_a_pattern_without_a_layer():
    with pytest.raises(UserError, match="no layer 'q_proj' in Sequential"):
        adapt(nn.Sequential(nn.Linear(3, 3)), ["q_proj"], AdapterSettings(method="vanilla"))


@pytest.mark.parametrize(
    "module, pattern",
    [
        (nn.Sequential(nn.Conv1d(3, 3, 1)), "0"),
        (nn.Sequential(nn.MultiheadAttention(4, 2)), "out_proj"),
        (nn.Sequential(nn.TransformerEncoderLayer(4, 2)), "linear1"),
    ],
)
def test_a_layer_that_would_be_passed_by_is_refused(module, pattern):
    with pytest.raises(UserError, match="only an nn.Linear whose parent calls it"):
        adapt(module, [pattern], AdapterSettings(method="vanilla"))


def test_a_layer_is_not_adapted_twice():
    model = nn.Sequential(nn.Linear(3, 3))
    adapt(model, ["0"], AdapterSettings(method="vanilla"))
    with pytest.raises(UserError, match="no layer twice"):
        adapt(model, ["0"], AdapterSettings(method="vanilla"))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "zipper"}, "method.*known methods: vanilla.*'zipper'"),
        ({"unseen": "guess"}, "unseen.*shared.*guess"),
        ({"method": "zipper_static", "rank": 5}, "rank 5 cannot be halved.*zipper.num_shared"),
        ({"method": "zipper_static", "rank": 4, "zipper": {"num_shared": 4}}, "num_shared 4 leaves no specific rank"),
        ({"method": "flylora", "rank": 4}, "top_k 8 exceeds the rank 4"),
        ({"method": "vanilla", "init_from": "exp/x"}, "vanilla has no shared and specific banks"),
        ({"zipper": {"temperature": 2}}, "unknown key 'zipper.temperature'; known here: num_shared"),
    ],
)
def test_settings_that_cannot_be_are_named_with_what_can(settings, message):
    with pytest.raises(UserError, match=message):
        config.parse(settings, AdapterSettings, source="conf.yaml")


def test_what_a_method_needs_is_asked_for():
    linear = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(UserError, match="zipper_soft adapts by language: name the languages"):
        adapt(linear, ["0"], AdapterSettings())
    with pytest.raises(UserError, match="no language embedding of de"):
        adapt(linear, ["0"], AdapterSettings(langs=("de",)))
    with pytest.raises(UserError, match="unseen: nearest needs a language embedding of de"):
        adapt(linear, ["0"], AdapterSettings(langs=("de",), unseen="nearest", zipper={"signal": "onehot"}))


def test_a_state_of_other_settings_is_refused_by_name():
    state = adapter_state(model_of(Case("vanilla")))
    with pytest.raises(UserError, match=r"such as '0\.A'|such as '0\.B'"):
        load_adapter_state(model_of(Case("independent")), state)


def test_a_router_that_is_not_a_number_says_which_language(x):
    m = layer_of(Case("zipper_soft", {"zipper": {"signal": "learned"}}))
    with torch.no_grad():
        m.router.signal.embeddings["th"].fill_(math.nan)
    m(x[5:6], language_runs(["de"], [1]))
    with pytest.raises(UserError, match=r"router's weights for th are not numbers \(NaN\)"):
        m(x, RUNS)

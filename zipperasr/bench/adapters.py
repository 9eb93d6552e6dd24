"""What an adapted layer costs beside the frozen one and beside PEFT: time, and memory for the backward pass.

Legend: N rows of a batch, sorted by language, T tokens of a row, I input width, O output width.
"""

import copy
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from zipperasr.adapters import REGISTRY, AdapterSettings, adapt, language_runs, method_class
from zipperasr.bench import timing
from zipperasr.bench.timing import Report, Row, Target
from zipperasr.languages import LANGUAGES
from zipperasr.model.encoder import ADAPTED, SpeechEncoder
from zipperasr.model.sizes import WHISPER
from zipperasr.model.whisper_io import make_encoder

LANGS = tuple(LANGUAGES)[:12]
NUM_ROWS = 12
ANY = "any"  # number of languages of a case whose cost does not depend on it
RANK, ALPHA = 32, 64
EMBEDDING_SIZE = 1280  # of Whisper large-v3's decoder
FROZEN, SINGLE, MIXED = "frozen nn.Linear", "PEFT, one adapter for all", "PEFT, mixed adapters"
FORWARD = ", forward only"
MOST = {"1280x1280": 1.20, "1280x5120": 1.16}  # targets of zipper_soft, as multiples of the frozen layer's time


@dataclass(frozen=True)
class Case:
    """A module, and how it is called on x for a batch of so many languages; its time is compared with `baseline`'s."""

    name: str
    languages: int | str
    module: nn.Module
    call: Callable[[Tensor], Tensor]
    baseline: str = FROZEN

    def step(self, x: Tensor, dy: Tensor) -> None:
        """A forward pass and its backward pass, down to x if it requires a gradient; or the former alone."""
        if self.name.endswith(FORWARD):
            with torch.no_grad():
                self.call(x)
        else:
            leaves = [t for t in (x, *self.module.parameters()) if t.requires_grad]
            torch.autograd.grad(self.call(x), leaves, dy, allow_unused=True)  # a language may be absent


def run(
    *,
    sizes: Sequence[tuple[int, int]],
    langs: Sequence[int],
    tokens: int,
    rounds: int,
    encoder: str | None,
    threads: int | None,
) -> Report:
    """Every method and PEFT on layers of `sizes` (I, O), for batches of each number of languages in `langs`.

    tokens: of a batch. encoder: also every method in a whole encoder, by name, or "none"; if None, large-v3 on a GPU
    and none on a CPU. threads: of the CPU.
    """
    at, num_tokens = timing.device(threads), max(1, round(tokens / NUM_ROWS))
    encoder = encoder or ("large-v3" if at["device"] == "cuda" else "none")
    header = {**timing.header(at), "tokens": f"{NUM_ROWS} x {num_tokens}", "rounds": rounds}
    rows, targets = [], []
    for size in sizes:
        rows += time_layer(size, sorted(set(langs)), num_tokens, rounds, at)
        targets += targets_of_layer(rows, _name(size))
    if encoder != "none":
        rows += time_encoder(encoder, num_tokens, rounds, at)
        where = f"encoder {encoder}"
        targets.append(Target(f"{where}: zipper_soft over vanilla", figures(rows, where)["zipper_soft"], 1.10))
    return Report(header, rows, targets)


def time_layer(size: tuple[int, int], langs: Sequence[int], num_tokens: int, rounds: int, at: dict) -> list[Row]:
    """A row for each case on one layer."""
    x = torch.randn(NUM_ROWS, num_tokens, size[0], **at, requires_grad=True)
    dy = torch.randn(NUM_ROWS, num_tokens, size[1], **at)
    cases = list(cases_of(nn.Linear(*size, **at).requires_grad_(False), langs, num_tokens))
    rows = time_cases(_name(size), cases, x, dy, rounds)
    for row, case in zip(rows, cases, strict=True):
        if not case.name.endswith(FORWARD):
            known = [*case.module.parameters(), *case.module.buffers()]
            row["saved / x"] = round(saved_bytes(partial(case.call, x), known) / (x.numel() * x.itemsize), 3)
    if not any(case.name == SINGLE for case in cases):
        rows.append({"where": _name(size), "case": "PEFT (skipped: peft is not installed)"})
    return rows


def time_encoder(name: str, num_tokens: int, rounds: int, at: dict) -> list[Row]:
    """A row for each method in a whole encoder, over vanilla: training steps on an utterance in each of LANGS.

    As in training, the features have no gradient. The frozen weights are the same for all methods.
    """
    dims = WHISPER[name]
    frozen = SpeechEncoder(make_encoder(dims)).to(**at)
    features = torch.randn(len(LANGS), 2 * num_tokens, dims["n_mels"], **at)
    dy = torch.randn(len(LANGS) * num_tokens, frozen.width, **at)
    cases = []
    for method in REGISTRY:
        model = adapted(copy.deepcopy(frozen, {id(p): p for p in frozen.parameters()}), method, ADAPTED)
        number = len(LANGS) if method_class(method).by_language else ANY
        cases.append(Case(method, number, model, lambda x, model=model: model(x, LANGS)[0], "vanilla"))
    return time_cases(f"encoder {name}", cases, features, dy, rounds)


def time_cases(where: str, cases: Sequence[Case], x: Tensor, dy: Tensor, rounds: int) -> list[Row]:
    """A row for each case: its seconds as a multiple of its baseline's in the same round, trainable parameters."""
    steps = {(case.name, case.languages): partial(case.step, x, dy) for case in cases}
    seconds = timing.interleave(steps, rounds=rounds, title=where)
    return [
        {
            "where": where,
            "case": case.name,
            "languages": case.languages,
            "ratio": timing.ratio(taken, seconds[case.baseline, ANY]),
            "ms": round(1000 * statistics.median(taken), 3),
            "trainable": sum(p.numel() for p in case.module.parameters() if p.requires_grad),
        }
        for case, taken in zip(cases, seconds.values(), strict=True)
    ]


def cases_of(linear: nn.Linear, langs: Sequence[int], num_tokens: int) -> Iterator[Case]:
    """The cases on a frozen layer, whose weight all share; those of PEFT only where it is installed."""
    yield Case(FROZEN, ANY, linear, linear)
    yield Case(FROZEN + FORWARD, ANY, linear, linear, FROZEN + FORWARD)
    for method in REGISTRY:
        (layer,) = adapted(nn.Sequential(linear), method, ["0"])
        for number in langs if layer.by_language else [ANY]:
            runs = language_runs(langs_of_rows(number), [num_tokens] * NUM_ROWS)
            yield Case(method, number, layer, partial(layer, runs=runs))
    try:
        single, mixed = peft_layer(linear, LANGS[:1]), peft_layer(linear, LANGS)
    except ImportError:
        return
    yield Case(SINGLE, ANY, single, single)
    for number in langs:
        call = partial(mixed, adapter_names=langs_of_rows(number))
        yield Case(MIXED, number, mixed, call)
        yield Case(MIXED + FORWARD, number, mixed, call, FROZEN + FORWARD)


def adapted(model: nn.Module, method: str, patterns: Sequence[str]) -> nn.Module:
    """`model` with adapters for LANGS."""
    settings = AdapterSettings(method=method, rank=RANK, alpha=ALPHA, langs=LANGS)
    adapt(model, patterns, settings, language_embeddings={lang: torch.randn(EMBEDDING_SIZE) for lang in LANGS})
    return randomised(model)


def peft_layer(linear: nn.Linear, names: Sequence[str]) -> nn.Module:
    """PEFT's LoRA layer with an adapter a name, all of them trainable. Raises ImportError without PEFT.

    A PEFT model in training mode refuses rows of unlike adapters, so its layer is called, in evaluation mode; without
    dropout nothing else differs. The adapters have the weight's dtype, like ours; PEFT's own choice would be fp32.
    """
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], lora_dropout=0.0)
    model = get_peft_model(nn.Sequential(linear), lora, adapter_name=names[0], autocast_adapter_dtype=False)
    for name in names[1:]:
        model.add_adapter(name, lora, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return randomised(model.base_model.model[0].eval())


def randomised(module: nn.Module) -> nn.Module:
    """`module` with random numbers in all that is trainable: B starts at zero, and a GPU multiplies zeros faster."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
    return module


def langs_of_rows(number: int | str) -> list[str]:
    """A language for each row, neighbours alike; `number` of them, or all for ANY."""
    number = len(LANGS) if number == ANY else number
    return [LANGS[i * number // NUM_ROWS] for i in range(NUM_ROWS)]


def saved_bytes(forward: Callable[[], Tensor], known: Iterable[Tensor]) -> int:
    """Bytes that the graph of `forward()` holds for its backward pass: each storage once, without those of `known`."""
    saved = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    there_anyway = {t.untyped_storage().data_ptr() for t in known}
    return sum(storage.nbytes() for at, storage in saved.items() if at not in there_anyway)


def targets_of_layer(rows: Sequence[Row], where: str) -> Iterator[Target]:
    """The targets for batches of 12 languages on one layer, from the table's figures."""
    ratio = figures(rows, where)
    soft = ratio.get("zipper_soft")
    if where in MOST:
        yield Target(f"{where}: zipper_soft", soft, MOST[where])
    yield Target(f"{where}: zipper_soft over {SINGLE}", _over(soft, ratio.get(SINGLE)), 1.0)
    yield Target(f"{where}: {MIXED}, over zipper_soft", _over(ratio.get(MIXED), soft), 3.0, ">=")
    for method in (method for method in REGISTRY if method.startswith("zipper_")):
        yield Target(f"{where}: {method} over vanilla", _over(ratio.get(method), ratio.get("vanilla")), 1.05)
        yield Target(f"{where}: {method}, saved / x", figures(rows, where, "saved / x").get(method), 1.3)


def figures(rows: Sequence[Row], where: str, column: str = "ratio") -> dict[str, float]:
    """What a column says by case, of those with 12 languages, or any number where that makes no difference."""
    found = [row for row in rows if row["where"] == where and row.get("languages") in (len(LANGS), ANY)]
    return {row["case"]: row[column] for row in found if column in row}


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else round(a / b, 3)


def _name(size: tuple[int, int]) -> str:
    return "{}x{}".format(*size)

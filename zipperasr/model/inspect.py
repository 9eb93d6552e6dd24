"""What a checkpoint holds, read from the run's own files: no pretrained model is loaded."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from zipperasr import config, files
from zipperasr.adapters import AdapterSettings, adapt, load_adapter_state, method_class
from zipperasr.adapters.zipper import Routed
from zipperasr.errors import UserError
from zipperasr.model import WEIGHTS, RunSettings, find_checkpoint, run_of

ADAPTED = re.compile(r"encoder\.(blocks\.\d+\.\w+\.\w+)\.(.+)")  # the layer, and its tensor's own name


def inspect(folder: Path) -> dict[str, Any]:
    """The figures of a checkpoint folder, or of the latest complete checkpoint of a run directory.

    `parameters` are counted as stored, FlyLoRA's frozen A among them. `specific_share`, where the method routes, is
    {language: [mean share of specific ranks over the linear layers of each encoder block]}.
    Raises UserError when there is no checkpoint, or its files are not whole.
    """
    checkpoint = folder if (folder / WEIGHTS).is_file() else find_checkpoint(folder)
    run = config.load(run_of(checkpoint) / "config.yaml", RunSettings)
    settings = run.model.adapter if run.stage == 2 else None
    is_routed = settings is not None and issubclass(method_class(settings.method), Routed)
    sizes, adapters = _read(checkpoint / WEIGHTS, with_adapters=is_routed)
    counts = {"total": sum(sizes.values()), "by_part": _sums(sizes, lambda name: name.partition(".")[0])}
    figures = {"checkpoint": str(checkpoint), "stage": run.stage, "parameters": counts}
    if settings:
        of_encoder = {name: size for name, size in sizes.items() if name.startswith("encoder.")}
        counts["adapter"] = _sums(of_encoder, lambda name: _owner(name, settings))
        figures["adapter"] = settings.model_dump(mode="json")
    if is_routed:
        layers = _rebuilt(adapters, settings, _embeddings(run_of(checkpoint), settings))
        figures["specific_share"] = {lang: _shares(layers, lang) for lang in settings.langs}
    return figures


def _read(path: Path, *, with_adapters: bool) -> tuple[dict[str, int], dict[str, Tensor]]:
    """The size of each tensor, and the encoder's tensors if they are wanted."""
    try:
        with safe_open(path, "pt") as stored:
            sizes = {name: torch.Size(stored.get_slice(name).get_shape()).numel() for name in stored.keys()}  # noqa: SIM118
            wanted = [name for name in sizes if with_adapters and name.startswith("encoder.")]
            return sizes, {name: stored.get_tensor(name) for name in wanted}
    except SafetensorError as error:
        raise UserError(f"{path}: broken ({error}); delete it and train again") from error


def _sums(sizes: Mapping[str, int], key_of: Callable[[str], str]) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for name, size in sizes.items():
        sums[key_of(name)] += size
    return dict(sums)


def _owner(name: str, settings: AdapterSettings) -> str:
    """The language that an adapter's tensor belongs to: the last part of its name, or else `shared`."""
    last = name.rpartition(".")[2]
    return last if last in settings.langs else "shared"


def _embeddings(run_dir: Path, settings: AdapterSettings) -> dict[str, Tensor]:
    if settings.zipper.signal != "whisper" and settings.unseen != "nearest":
        return {}
    return {lang: torch.tensor(e) for lang, e in files.read_json(run_dir / "language_embeddings.json").items()}


def _rebuilt(
    tensors: Mapping[str, Tensor], settings: AdapterSettings, embeddings: Mapping[str, Tensor]
) -> dict[str, Routed]:
    """The adapted layers, by name, from the encoder's tensors."""
    own: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        layer, key = ADAPTED.fullmatch(name).groups()
        own[layer][key] = tensor
    names = sorted(own, key=lambda name: -len(own[name]))  # what all layers share is stored with the first
    layers = nn.ModuleList(_linear(own[name]) for name in names)
    adapt(layers, [str(i) for i in range(len(names))], settings, language_embeddings=embeddings)
    load_adapter_state(layers, {f"{i}.{key}": t for i, name in enumerate(names) for key, t in own[name].items()})
    return dict(zip(names, layers, strict=True))


@torch.no_grad()
def _shares(layers: Mapping[str, Routed], lang: str) -> list[float]:
    """The mean share of specific ranks in each block."""
    by_block: dict[int, list[Tensor]] = defaultdict(list)
    for name, layer in layers.items():
        by_block[int(name.split(".")[1])].append(layer.specific_share(lang))
    return [torch.stack(by_block[block]).double().mean().item() for block in sorted(by_block)]


def _linear(adapter: Mapping[str, Tensor]) -> nn.Linear:
    """A layer of the widths that an adapter fits. Its weight, which nothing reads, is one zero seen everywhere."""
    (_, width), (out, _) = adapter["A"].shape, adapter["B_shared"].shape
    linear = nn.Linear(width, out, bias=False, device="meta")
    linear.weight = nn.Parameter(torch.zeros(()).expand(out, width))
    return linear

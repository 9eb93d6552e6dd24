"""What a checkpoint holds, read from the run's own files: no pretrained model is loaded."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
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

ADAPTED = re.compile(r"encoder\.(blocks\.(\d+)\.\w+\.\w+)\.(.+)")  # the layer, its block, the layer's own tensor


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
    figures = {"checkpoint": str(checkpoint), "stage": run.stage, "parameters": {"total": sum(sizes.values())}}
    figures["parameters"]["by_part"] = _sums(sizes, {name: name.partition(".")[0] for name in sizes})
    if settings:
        own = {name: name.rpartition(".")[2] for name in sizes if name.startswith("encoder.")}
        owner = {name: lang if lang in settings.langs else "shared" for name, lang in own.items()}
        figures["parameters"]["adapter"] = _sums(sizes, owner)
        figures["adapter"] = settings.model_dump(mode="json")
    if is_routed:
        figures["specific_share"] = _specific_share(adapters, settings, _embeddings(run_of(checkpoint), settings))
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


def _sums(sizes: Mapping[str, int], key_of: Mapping[str, str]) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for name, key in key_of.items():
        sums[key] += sizes[name]
    return dict(sums)


def _embeddings(run_dir: Path, settings: AdapterSettings) -> dict[str, Tensor]:
    if settings.zipper.signal != "whisper" and settings.unseen != "nearest":
        return {}
    return {lang: torch.tensor(e) for lang, e in files.read_json(run_dir / "language_embeddings.json").items()}


@torch.no_grad()
def _specific_share(
    tensors: Mapping[str, Tensor], settings: AdapterSettings, embeddings: Mapping[str, Tensor]
) -> dict[str, list[float]]:
    """By language, from the tensors of the encoder's adapters."""
    by_layer: dict[str, dict[str, Tensor]] = defaultdict(dict)
    by_block: dict[int, list[int]] = defaultdict(list)
    for name, tensor in tensors.items():
        layer, _, key = ADAPTED.fullmatch(name).groups()
        by_layer[layer][key] = tensor
    names = sorted(by_layer, key=lambda name: -len(by_layer[name]))  # first the one with what all layers share
    layers = nn.ModuleList(_linear(by_layer[name]) for name in names)
    adapt(layers, [str(i) for i in range(len(names))], settings, language_embeddings=embeddings)
    load_adapter_state(layers, {f"{i}.{key}": t for i, name in enumerate(names) for key, t in by_layer[name].items()})
    for i, name in enumerate(names):
        by_block[int(name.split(".")[1])].append(i)
    blocks = [by_block[block] for block in sorted(by_block)]
    return {
        lang: [torch.stack([layers[i].specific_share(lang) for i in block]).double().mean().item() for block in blocks]
        for lang in settings.langs
    }


def _linear(adapter: Mapping[str, Tensor]) -> nn.Linear:
    """A layer of the widths that an adapter fits. Its weight, which nothing reads, is one zero seen everywhere."""
    (_, width), (out, _) = adapter["A"].shape, adapter["B_shared"].shape
    linear = nn.Linear(width, out, bias=False, device="meta")
    linear.weight = nn.Parameter(torch.zeros(()).expand(out, width))
    return linear

"""Named tensors on disk, read so that what is missing, broken or of another model is named."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from zipperasr.errors import UserError


def write_tensors(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> None:
    """Write a safetensors file, which others may read too (see `share`)."""
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, metadata or None)
    share(path)


def share(path: Path) -> None:
    """Give a file the mode of any new one: safetensors lets the owner alone read what it writes."""
    new = path.with_name(f".new.{path.name}")
    new.touch()
    shutil.copymode(new, path)
    new.unlink()


def read_tensors(path: Path, *, lacking: str, broken: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises UserError where it is not there or not whole; both mends are given."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; {lacking}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: broken ({error}); {broken}") from error


def check_fit(
    path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, mend: str, spoilt: str
) -> None:
    """Raises UserError unless all `expected` are there, no others, in these shapes (`mend`), and finite (`spoilt`)."""
    for word, names in (("lacks", expected.keys() - tensors.keys()), ("has unknown", tensors.keys() - expected.keys())):
        if names:
            raise UserError(f"{path}: {word} {len(names)} tensors, such as '{min(names)}'; {mend}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{list(tensor.shape)}, but the model has {list(expected[name].shape)}"
            raise UserError(f"{path}: tensor '{name}' has shape {shapes}; {mend}")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: tensor '{name}' holds NaN or infinity; {spoilt}")

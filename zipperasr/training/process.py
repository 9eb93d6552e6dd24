"""What a training process does before anything imports DeepSpeed, as transformers does."""

import os

import torch

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""The environment that torchrun would set, for one process; port 0 is whichever is free."""


def prepare_process() -> None:
    """Choose this rank's device, and say who it is if no launcher has."""
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # batches are of many sizes
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"

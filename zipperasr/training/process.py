"""What a training process does before anything imports DeepSpeed, as transformers does."""

import os

import torch

from zipperasr.errors import UserError

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""The environment that torchrun would set, for one process; port 0 is whichever is free."""


def prepare_process() -> None:
    """Choose this rank's device, and say who it is if no launcher has.

    Raises UserError when there is no GPU left for it.
    """
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # batches are of many sizes
    if torch.cuda.is_available():
        at, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if at >= num_gpus:
            name = os.uname().nodename
            raise UserError(f"{name}: more ranks than its {num_gpus} GPUs; lower --ngpu, or mend the hostfile's slots")
        torch.cuda.set_device(at)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"

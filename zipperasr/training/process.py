"""A training process: which rank and device it is, and when it is to stop."""

from __future__ import annotations

import os
import signal
import time

import torch

from zipperasr.errors import UserError

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""The environment that torchrun would set, for one process; port 0 is whichever is free."""


def prepare_process() -> None:
    """Choose this rank's device, and say who it is if no launcher has, before anything imports DeepSpeed.

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


class StopSignal:
    """Notes SIGTERM or SIGINT, so that the step in hand can be finished; one that comes later ends the process.

    Slurm signals every process of a step, and a launcher its ranks: what comes together is one request.
    """

    TOGETHER_S = 5.0
    is_set = False

    def __enter__(self) -> StopSignal:
        self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, frame: object) -> None:
        if not self.is_set:
            self.is_set, self.since = True, time.monotonic()
        elif time.monotonic() - self.since > self.TOGETHER_S:
            self.__exit__()
            signal.raise_signal(number)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

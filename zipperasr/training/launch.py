"""Several ranks on one machine, each a process: what torchrun does, without its traceback where one line is enough."""

import logging
import sys
from collections.abc import Sequence


def launch(argv: Sequence[str], *, num_ranks: int) -> int:
    """Run `zipperasr` with `argv` as `num_ranks` ranks and return its exit status.

    When one rank fails it has said why; the others are ended, and the status is 1. Signals reach every rank.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # this process only waits
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "zipperasr.cli", *argv)
    except (ChildFailedError, SignalException):
        return 1
    return 0

"""Time as a GPU tells it."""

import time

import torch


def clock() -> float:
    """Seconds, read when a GPU has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()

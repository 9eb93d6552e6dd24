"""Work spread over processes, in order, with a progress bar."""

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, islice
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
R = TypeVar("R")

BLOCK = 4096
"""Items handed to the processes at once: bounds the memory, whatever the length of the input."""
FEW = 64
"""Fewer items than this are not worth starting processes for."""


def run(function: Callable[[T], R], items: Iterable[T], *, nj: int, desc: str, total: int | None = None) -> Iterator[R]:
    """`function` of each item, in the order of the items, computed by `nj` processes (in this one if items are few)."""
    with tqdm(total=total, desc=desc, unit="utt", mininterval=0.5, disable=None) as bar:
        for result in _spread(function, iter(items), nj):
            bar.update()
            yield result


def _spread(function: Callable[[T], R], items: Iterator[T], nj: int) -> Iterator[R]:
    block = list(islice(items, BLOCK if nj > 1 else 0))
    if len(block) < FEW:
        yield from map(function, chain(block, items))
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(nj, mp_context=context, initializer=_be_a_worker) as executor:
        while block:
            yield from executor.map(function, block, chunksize=16)
            block = list(islice(items, BLOCK))


def _be_a_worker() -> None:
    """One thread a process, and Ctrl-C is the parent's business. Whoever needs torch imports it before the fork."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

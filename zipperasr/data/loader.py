"""The micro-batches of one rank, read by worker processes in the order of the plan."""

import multiprocessing
import multiprocessing.util
import signal
from collections.abc import Callable, Sequence

import torch
from torch.utils.data import DataLoader, Dataset

from zipperasr.data.augment import SpecAugmentSettings, spec_augment
from zipperasr.data.packing import Batch, Example, Plan, make_batch
from zipperasr.data.utterances import Utterance

CtcTargets = Callable[[Utterance], list[int]]
"""The units of an utterance that CTC is trained on."""


class MicroBatches(Dataset):
    """Maps (step, slot) to its micro-batch: whichever worker is asked, whenever, the answer is the same."""

    def __init__(
        self,
        examples: Sequence[Example],
        plan: Plan,
        spec_augment: SpecAugmentSettings | None,
        ctc_targets: CtcTargets | None,
    ):
        self.examples, self.plan, self.spec_augment, self.ctc_targets = examples, plan, spec_augment, ctc_targets

    def __getitem__(self, at: tuple[int, int]) -> Batch:
        rows = self.plan.slot_rows(*at)
        batch = make_batch([[self.examples[index] for index in row] for row in rows], ctc_targets=self.ctc_targets)
        if self.spec_augment:
            seed = "spec augment {} {} {}".format(self.plan.seed, *at)
            batch.features = spec_augment(batch.features, self.spec_augment, seed=seed)
        return batch


def load_batches(
    examples: Sequence[Example],
    plan: Plan,
    *,
    steps: range,
    rank: int,
    num_ranks: int,
    num_workers: int,
    spec_augment: SpecAugmentSettings | None = None,
    ctc_targets: CtcTargets | None = None,
) -> DataLoader:
    """This rank's micro-batches of `steps` (counted over all epochs): `plan.num_slots / num_ranks` for each step.

    One set of workers lives through all epochs. `spec_augment` depends on the seed, the step and the slot alone.
    """
    if num_workers and examples:
        examples[0].utterance.features()  # the workers, which fork, then have all imported that reading takes
        multiprocessing.util.Finalize(None, _end_workers, exitpriority=0)
    order = [(step, slot) for step in steps for slot in range(rank, plan.num_slots, num_ranks)]
    return DataLoader(
        MicroBatches(examples, plan, spec_augment, ctc_targets),
        sampler=order,
        batch_size=None,
        pin_memory=torch.cuda.is_available(),  # by Batch.pin_memory; copies to a GPU then do not hold it up
        num_workers=num_workers,
        multiprocessing_context="fork" if num_workers else None,  # they share millions of examples
        worker_init_fn=_ignore_signals,
    )


def _end_workers() -> None:
    """At the end of this process: workers that an exception has left open ignore SIGTERM, and would be waited for."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes their end for a failure
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


def _ignore_signals(worker: int) -> None:
    """The trainer alone decides what a signal to the whole process group means; workers end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

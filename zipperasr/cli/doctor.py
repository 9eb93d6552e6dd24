"""Look at machine, configuration, data, disk, memory and time before anything is run; status 1 if there is an error.

Nothing is downloaded or written. Without --conf only the machine is looked at. Hours and memory are arithmetic: each
line says what it assumes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from zipperasr.cli import recipe
from zipperasr.errors import UserError

if TYPE_CHECKING:
    from zipperasr.training.preflight import Finding
    from zipperasr.training.preflight.data import Sizes
    from zipperasr.training.preflight.estimate import Device
    from zipperasr.training.preflight.machine import Machine

DEFAULT_GIB = 80
"""Of the GPUs that are asked for and not there: those of the paper."""
CPU_RANKS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--conf", help="YAML file")
    parser.add_argument("--data-dir", type=Path, help="corpora, manifests, lists; not looked at if not given")
    parser.add_argument("--exp-dir", type=Path, help="of runs to come; its disk is not looked at if not given")
    parser.add_argument("--ngpu", type=int, help="GPUs of a node (default: 1 if there is any, else 0)")
    parser.add_argument("--nodes", type=int, default=1, help="(default: 1)")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="of GPUs elsewhere; those here do not count")
    parser.add_argument("--tflops", type=float, help="peak of a GPU in dense bf16, where its name does not tell")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values laid over the configuration")


def run(args: argparse.Namespace) -> int:
    from zipperasr.training import preflight
    from zipperasr.training.preflight import machine

    if (args.ngpu or 0) < 0 or args.nodes < 1:
        raise UserError(f"--ngpu {args.ngpu} --nodes {args.nodes}: GPUs are 0 or more, nodes 1 or more")
    findings = list(examine(args, machine.describe()))
    print(preflight.report(findings))
    return int(any(finding.level == "error" for finding in findings))


def examine(args: argparse.Namespace, here: Machine) -> Iterator[Finding]:
    """All findings for a machine."""
    from zipperasr.alignment import engines
    from zipperasr.training.preflight import Finding, machine

    is_elsewhere = args.gpu_memory is not None
    num_gpus = args.ngpu if args.ngpu is not None else int(bool(here.gpus) or is_elsewhere)
    yield from machine.check(here, num_gpus=0 if is_elsewhere else num_gpus)
    yield Finding("machine", "ok", engines.describe())
    if args.conf is None:
        return
    try:
        whole = recipe.load(args.conf, overrides=args.overrides)
    except UserError as error:
        yield Finding("configuration", "error", str(error))
        return
    yield Finding("configuration", "ok", f"{args.conf}: every setting is known")
    yield from _examine(whole, args, _device(args, here, num_gpus))


def _examine(whole: recipe.Config, args: argparse.Namespace, device: Device) -> Iterator[Finding]:
    """Findings on a configuration that parses."""
    from zipperasr.training.preflight import data, models

    settings = list(dict.fromkeys((whole.training.stage1.setting, whole.training.stage2.setting)))
    there = {setting: args.data_dir and data.measure(args.data_dir, setting) for setting in settings}
    yield from models.check_models(whole.model)
    yield from models.check_languages(whole.model, data.langs(whole.data, whole.training.stage2.setting))
    for setting in settings if args.data_dir else ():
        yield from data.check(whole.data, setting, args.data_dir, there[setting])
    sizes = {setting: there[setting] or data.asked(whole.data, setting) for setting in settings}
    yield from _costs(whole, args, device, sizes)


def _costs(
    whole: recipe.Config, args: argparse.Namespace, device: Device, sizes: dict[str, Sizes]
) -> Iterator[Finding]:
    """Disk, memory and time of both stages; `sizes` are those of the lists by setting."""
    from zipperasr.model.cost import Shape
    from zipperasr.training.preflight import Finding, data, estimate

    stages = {1: whole.training.stage1, 2: whole.training.stage2}
    try:
        shapes = {number: Shape.of(whole.model, number) for number in stages}
    except UserError as error:
        yield Finding("memory and time", "warning", f"no estimate: {error}")
        return
    needs = [data.features_need(whole.data, args.data_dir, list(sizes.values()))] if args.data_dir else []
    for number, stage in stages.items() if args.exp_dir else ():
        needs.append(data.checkpoints_need(args.exp_dir, number, stage, trained=shapes[number].trained_size))
    yield from data.check_disks(needs)
    for number, stage in stages.items():
        size = data.train_size(sizes[stage.setting], whole.data.features)
        speech = estimate.speech_of(size)
        one = estimate.Estimate(number, whole.model, whole.data.packing, stage, shapes[number], device, speech)
        yield from estimate.check(one, size)


def _device(args: argparse.Namespace, here: Machine, num_gpus: int) -> Device:
    """What is trained on: GPUs that are there, GPUs that are said to be elsewhere, or the CPU."""
    from zipperasr.training.preflight import GIB
    from zipperasr.training.preflight.estimate import Device, peak_tflops

    if not num_gpus:
        return Device("CPU", CPU_RANKS, None, None, num_cores=here.num_cores)
    if here.gpus and args.gpu_memory is None:
        name, memory = here.gpus[0].name, here.gpu_memory
    else:
        gib = args.gpu_memory or DEFAULT_GIB
        name, memory = f"a GPU of {gib:g} GiB", gib * GIB
    return Device(name, num_gpus * args.nodes, memory, args.tflops or peak_tflops(name))

"""The training loop: token-sum loss over the global batch, resumable at every checkpoint.

Legend: U utterances of a micro-batch, L languages. Losses are in nats a token.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import distributed, nn

from zipperasr import adapters, files
from zipperasr.data.augment import SpecAugmentSettings
from zipperasr.data.loader import load_batches
from zipperasr.data.packing import Batch, Example, PackingSettings, Plan, pack
from zipperasr.data.utterances import Utterance
from zipperasr.errors import AlreadySaid, UserError
from zipperasr.model import EncoderSettings
from zipperasr.model.cost import Load, Shape, flops
from zipperasr.model.speech_llm import LossOutput, SpeechLLM
from zipperasr.training import StageSettings, checkpoints, engine, memory, runs
from zipperasr.training.log import RunLog
from zipperasr.training.preflight.estimate import peak_tflops
from zipperasr.training.process import StopSignal

MEMORY = 0.98
"""Weight of the past in the running mean of the loss."""

ALARM = 1.5
"""The running mean of the loss over its lowest value, from which on it is said that training diverges."""

Losses = list[tuple[Batch, LossOutput]]
"""Micro-batches with the losses of their utterances, detached."""
CountErrors = Callable[[SpeechLLM, Sequence[Utterance]], Mapping[str, tuple[int, int]]]
"""Transcribes utterances: errors and length of the references by language."""


@dataclass(frozen=True)
class Counts:
    """Sums over all micro-batches of all ranks, of what is known without waiting for a GPU."""

    num_targets: dict[str, float]  # tokens that the loss covers, by language
    num_tokens: float  # LLM positions
    audio_s: float
    flops: float  # useful ones
    num_stopping: float  # ranks that were asked to stop
    num_failing: float  # ranks with an exception
    num_using: dict[str, float]  # ranks on which the language's own parameters got a gradient

    @property
    def resting(self) -> set[str]:
        """Languages whose own parameters nothing in the global batch used."""
        return {lang for lang, num_using in self.num_using.items() if not num_using}


class Trainer:
    """Trains what requires gradients in `model`, from the newest checkpoint of `run_dir` to the last step.

    model(batch, chunk_s) gives `loss_sum`, summed over the tokens of the micro-batch, and `utt_loss` [U], detached; and
    where the settings give CTC a weight, `utt_ctc` [U], from the head that `model` must have (checkpoint.add_ctc).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        train: Sequence[Example],
        dev: Sequence[Example],
        settings: StageSettings,
        packing: PackingSettings,
        encoder: EncoderSettings,
        run_dir: Path,
        spec_augment: SpecAugmentSettings | None = None,
        count_errors: CountErrors | None = None,
    ):
        self.settings, self.packing, self.encoder, self.run_dir = settings, packing, encoder, run_dir
        self.spec_augment, self.count_errors = spec_augment, count_errors
        self.units = model.units
        assert bool(self.units) == (settings.ctc_weight > 0), "a CTC head, and a weight for its loss"
        self.shape = Shape.of_model(model, model.stage)
        self.frozen = engine.frozen_tensors(model)
        self.engine = engine.start(model, settings)
        self.rank, self.num_ranks = self.engine.global_rank, self.engine.world_size
        is_cuda = self.engine.device.type == "cuda"
        self.cpu_group = distributed.new_group(backend="gloo") if is_cuda and self.num_ranks > 1 else None
        self.peak_tflops = peak_tflops(torch.cuda.get_device_name(self.engine.device)) if is_cuda else None
        self.parameters = [p for p in self.engine.module.parameters() if p.requires_grad]
        self.own = adapters.language_parameters(self.engine.module)
        self.balances = any(layer.balances for layer in adapters.adapted_layers(self.engine.module).values())
        self.langs = sorted({x.utterance.lang for x in chain(train, dev)})
        self.train, self.dev = train, dev
        self.is_alarmed, self.stop = False, StopSignal()
        rows = pack(train, seed=settings.seed, max_tokens=packing.max_tokens_per_row, lookahead=packing.lookahead)
        trial = memory.Trial(self.engine, train, rows, encoder)
        self.state = checkpoints.newest(run_dir) or self._new_state(trial)
        self.said = [trial.check(self.state.rows_per_batch)]
        langs = [train[row[0]].utterance.lang for row in rows]
        shares = {"langs": langs, "sampling": settings.sampling}
        self.plan = Plan(rows, self.state.rows_per_batch, self.state.num_slots, settings.seed, **shares)
        self.total_steps = settings.max_steps or settings.epochs * self.plan.steps_per_epoch
        self.num_slots = len(range(self.rank, self.state.num_slots, self.num_ranks))
        if not self.num_slots:
            raise UserError(
                f"{run_dir}: a step has {self.state.num_slots} micro-batches, too few for {self.num_ranks} ranks; "
                f"go on with at most {self.state.num_slots} (--ngpu)"
            )
        if self.state.step:
            engine.restore(self.engine, run_dir, self.state)
        self.writer = None
        if self.rank == 0:
            checkpoints.clean(run_dir)
            runs.write_trainable(run_dir, self.engine.module)
            keep = {"keep_last": settings.keep_last, "keep_best": settings.keep_best}
            self.writer = checkpoints.Writer(run_dir, **keep)

    def run(self) -> None:
        """Take the remaining steps and write train.json.

        Raises UserError when a loss or gradient is not finite or the loss explodes, naming the utterances; and after
        SIGTERM or SIGINT, once a checkpoint is saved.
        """
        settings, state = self.settings, self.state
        log = RunLog(self.run_dir, start=state.step, total=self.total_steps, every=settings.log_every, rank=self.rank)
        batches = closing(self._batches(range(state.step, self.total_steps)))  # closing ends the loader's workers
        with log, batches as batches, self.stop:
            log.say(*self._plan_in_words())
            while state.step < self.total_steps:
                began = time.monotonic()
                counts, row = self._step(batches)
                row |= self._speed(counts, time.monotonic() - began, row.pop("waited_s"))
                is_last = state.step == self.total_steps
                state.dev = None
                if is_last or (settings.dev_every and state.step % settings.dev_every == 0):
                    row |= self.evaluate()
                    state.dev = row.get("dev_error", row.get("dev_loss"))
                log.write(row)
                log.say(*self._alarm())
                state.audio_s += counts.audio_s
                state.wall_s += time.monotonic() - began
                is_rated = settings.keep_best and state.dev is not None
                if is_last or counts.num_stopping or is_rated or state.step % settings.save_every == 0:
                    self._save()
                if counts.num_stopping and not is_last:
                    self._wait()
                    self._stop(f"stopped, saved at step {state.step}; run it again to go on")
        self._wait()
        if self.rank == 0:
            self._finish()

    def evaluate(self) -> dict[str, Any]:
        """The dev lists' loss, whole and by language, and the error rate in percent of their first utterances; and how
        much of the adapters' ranks is each language's own. Nothing without dev lists."""
        self.engine.module.eval()
        row = self._dev_loss() | self._dev_error() if self.dev else {}
        shares = adapters.specific_shares(self.engine.module)
        return row | ({"specific_share": shares} if shares else {})

    @torch.no_grad()
    def _dev_loss(self) -> dict[str, Any]:
        chunk_s = self.encoder.decode_chunk_s if self.encoder.context == "chunked" else None
        rows = pack(self.dev, seed=self.settings.seed, max_tokens=self.packing.max_tokens_per_row)
        plan = Plan(rows, self.state.rows_per_batch, self.num_ranks, self.settings.seed)
        batches = self._load(self.dev, plan, range(plan.steps_per_epoch))
        losses = [(b, self.engine.module(b.to(self.engine.device), chunk_s)) for b in batches if b.ids]
        return {f"dev_{name}": value for name, value in self._losses(losses, self._count(losses).num_targets).items()}

    def _dev_error(self) -> dict[str, Any]:
        """Errors over the references of each language, and their mean over languages."""
        first = [[x.utterance for x in self.dev if x.utterance.lang == lang] for lang in self.langs]
        chosen = [u for utterances in first for u in utterances[: self.settings.dev_utts]]
        if not (chosen and self.count_errors):
            return {}
        counts = self.count_errors(self.engine.module, chosen[self.rank :: self.num_ranks])
        sums = [counts.get(lang, (0, 0)) for lang in self.langs]
        sums = torch.tensor(sums, dtype=torch.float64, device=self.engine.device)  # [L, 2]
        distributed.all_reduce(sums)
        rates = {lang: 100 * e / n for lang, (e, n) in zip(self.langs, sums.tolist(), strict=True) if n}
        return {"dev_error": sum(rates.values()) / len(rates), "dev_error_per_lang": rates} if rates else {}

    def _new_state(self, trial: memory.Trial) -> checkpoints.State:
        rows = getattr(self.packing.rows_per_batch, self.encoder.context)
        return checkpoints.State(
            num_slots=self.num_ranks * self.settings.accumulation,
            rows_per_batch=trial.largest() if rows == "auto" else rows,
        )

    def _plan_in_words(self) -> Iterator[str]:
        plan, state = self.plan, self.state
        yield from self.said
        yield (
            f"{len(self.train):,} utterances in {len(plan.rows):,} rows; a step has {state.num_slots} micro-batches of "
            f"{state.rows_per_batch} rows on {self.num_ranks} ranks; steps {state.step + 1:,} to {self.total_steps:,}, "
            f"{plan.steps_per_epoch:,} an epoch"
        )
        if not self.settings.sampling.is_natural:
            yield "passes an epoch: " + ", ".join(f"{lang} {n:.2f}" for lang, n in plan.passes_per_epoch.items())

    def _speed(self, counts: Counts, elapsed_s: float, waited_s: float) -> dict[str, float]:
        """Of one step, data loading included; TFLOP/s are useful ones of each rank, MFU their share of its peak."""
        tflops = counts.flops / elapsed_s / self.num_ranks / 1e12
        speed = {"tokens_per_s": counts.num_tokens / elapsed_s, "audio_s_per_s": counts.audio_s / elapsed_s}
        speed |= {"tflops": tflops, "waited_for_data": waited_s / elapsed_s}
        return speed | ({"mfu": tflops / self.peak_tflops} if self.peak_tflops else {})

    def _alarm(self) -> Iterator[str]:
        """Says, once each time that it begins, that the running mean of the loss has left its lowest value behind."""
        mean, lowest = self.state.mean_loss, self.state.lowest_mean
        was_alarmed, self.is_alarmed = self.is_alarmed, mean > ALARM * lowest
        if self.is_alarmed and not was_alarmed:
            yield (
                f"ALARM: step {self.state.step}: the loss rises; its running mean is {mean:.3f} nats a token, and was "
                f"{lowest:.3f}; a lower learning rate (training.stage{self.engine.module.stage}.lr) may help"
            )

    def _save(self) -> None:
        self.state.optimizer_steps = engine.optimizer_steps(self.engine)
        weights, moments = engine.gather(self.engine)
        if self.writer:
            self.writer.save(self.state, weights | self.frozen, moments)

    def _wait(self) -> None:
        """Return when the last checkpoint is written: the first rank to leave may take the others with it."""
        if self.writer:
            self.writer.wait()
        distributed.barrier()

    def _stop(self, reason: str) -> NoReturn:
        """Raise, on all ranks, what the first one says."""
        raise UserError(f"{self.run_dir}: {reason}") if self.rank == 0 else AlreadySaid

    def _load(self, examples: Sequence[Example], plan: Plan, steps: range, **more) -> Iterator[Batch]:
        more |= {"rank": self.rank, "num_ranks": self.num_ranks, "ctc_targets": self.units and self.units.targets}
        return iter(load_batches(examples, plan, steps=steps, num_workers=self.settings.num_workers, **more))

    def _batches(self, steps: range) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each step."""
        loaded = self._load(self.train, self.plan, steps, spec_augment=self.spec_augment)
        while batches := list(islice(loaded, self.num_slots)):
            yield batches

    def _step(self, coming: Iterator[list[Batch]]) -> tuple[Counts, dict[str, Any]]:
        """Take one optimizer step on the global batch; its sums and what to log.

        Gradients stay on their rank until its micro-batches are added up, and are then reduced once, in the order of
        the parameters: ranks may see different languages, and so reach different parameters in a different order.
        """
        zero, state = self.engine, self.state
        draw = random.Random(f"step {self.settings.seed} {state.step}")
        chunk_s = draw.choice(self.encoder.chunk_durations_s) if self.encoder.context == "chunked" else None
        torch.manual_seed(draw.getrandbits(62) + self.rank)
        lr = engine.learning_rate(state.step, total_steps=self.total_steps, settings=self.settings)
        engine.set_learning_rate(zero, lr)
        zero.module.train()
        ctc_scale = self._ctc_scale()
        losses: Losses = []
        began, work, error = time.monotonic(), 0.0, None
        with zero.coalesce_grad_reduction():
            try:
                if self.writer:
                    self.writer.wait(only_if_done=True)
                batches = next(coming)
                waited_s = time.monotonic() - began
                for batch in batches:
                    if batch.ids:
                        output = zero(batch.to(zero.device), chunk_s)
                        zero.backward(output.total(ctc_scale))
                        losses.append((batch, output.detached()))
                        work += sum(flops(self.shape, Load.of(batch, chunk_s)).values())
            except Exception as caught:  # the other ranks are waiting: tell them before it is raised
                error = self._mendable(caught)
            counts = self._count(losses, work, is_failing=error is not None)
            if counts.num_failing:
                zero.zero_grad()  # ranks have unlike ones, and leaving this block would wait for them all
            else:
                self._scale_gradients(self.num_ranks / sum(counts.num_targets.values()), resting=counts.resting)
        if counts.num_failing:
            raise error or AlreadySaid
        engine.rest(zero, counts.resting)
        zero.step()
        row = self._losses(losses, counts.num_targets)  # not before: a GPU still has work until here
        self._check_loss(row, losses)
        if not zero.was_step_applied():
            self._stop_at(losses, "a gradient is not finite")
        if self.balances:
            adapters.balance(zero.module, distributed.all_reduce)
        state.step += 1
        epoch = round(state.step / self.plan.steps_per_epoch, 4)
        row = {"step": state.step, "epoch": epoch, **row, "lr": lr, "chunk_s": chunk_s, "waited_s": waited_s}
        return counts, row | {"grad_norm": float(zero.get_global_grad_norm())}

    def _ctc_scale(self) -> float:
        """The factor on this step's sums of CTC losses, 0 without CTC.

        Gradients are divided by the target tokens of the global batch (`_scale_gradients`), and those of CTC are to be
        by its own targets. How many there are of both is known to every rank, from the plan.
        """
        if not self.units:
            return 0.0
        slots = [self.plan.slot_rows(self.state.step, slot) for slot in range(self.plan.num_slots)]
        examples = [self.train[i] for row in chain.from_iterable(slots) for i in row]
        num_units = sum(len(self.units.targets(x.utterance)) for x in examples)
        return self.settings.ctc_weight * sum(len(x.target) for x in examples) / max(num_units, 1)

    def _mendable(self, error: Exception) -> Exception:
        """The exception, or what a user can do where a GPU's memory is too small."""
        if not isinstance(error, torch.OutOfMemoryError):
            return error
        what, total = f"step {self.state.step + 1}: a batch", memory.total_bytes(self.engine.device)
        return UserError(memory.does_not_fit(what, self.engine.module.stage, self.encoder.context, total))

    def _count(self, losses: Losses, work: float = 0.0, *, is_failing: bool = False) -> Counts:
        """What the ranks must agree on before gradients are reduced; no rank waits for its GPU here."""
        num_targets = Counter()
        for batch, _ in losses:
            for lang, target in zip(batch.langs, batch.targets, strict=True):
                num_targets[lang] += len(target)
        tokens, audio_s = (sum(getattr(b, name) for b, _ in losses) for name in ("num_tokens", "audio_s"))
        using = [any(p.grad is not None for p in parameters) for parameters in self.own.values()]
        numbers = [tokens, audio_s, work, self.stop.is_set, is_failing, *using]
        sums = torch.tensor([*(num_targets[lang] for lang in self.langs), *numbers], dtype=torch.float64)
        if self.num_ranks > 1:
            distributed.all_reduce(sums, group=self.cpu_group)
        sums = iter(sums.tolist())
        by_lang = dict(zip(self.langs, islice(sums, len(self.langs)), strict=True))
        return Counts(by_lang, *islice(sums, 5), dict(zip(self.own, sums, strict=True)))

    def _losses(self, losses: Losses, num_targets: Mapping[str, float]) -> dict[str, Any]:
        """The mean over target tokens, of all ranks, whole and by language; and that over CTC's targets, if any."""
        where = {lang: i for i, lang in enumerate(self.langs)}
        device = self.engine.device
        sums = torch.zeros(len(where), dtype=torch.float64, device=device)  # [L]
        for batch, output in losses:
            langs = torch.tensor([where[lang] for lang in batch.langs], device=device)
            sums.index_add_(0, langs, output.utt_loss.double())
        distributed.all_reduce(sums)
        by_lang = dict(zip(self.langs, sums.tolist(), strict=True))
        mean = sum(by_lang.values()) / sum(num_targets.values())
        per_lang = {lang: by_lang[lang] / n for lang, n in num_targets.items() if n}
        return {"loss": mean, "loss_per_lang": per_lang} | (self._ctc_loss(losses) if self.units else {})

    def _ctc_loss(self, losses: Losses) -> dict[str, float]:
        """The mean over CTC's targets, of all ranks."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.engine.device)  # losses, targets
        for batch, output in losses:
            sums[0] += output.utt_ctc.double().sum()
            sums[1] += sum(map(len, batch.ctc_targets))
        distributed.all_reduce(sums)
        total, num_units = sums.tolist()
        return {"ctc_loss": total / max(num_units, 1)}

    def _scale_gradients(self, factor: float, *, resting: set[str]) -> None:
        """Make the gradients exist on every rank, `factor` times what they are, but for those of `resting` languages.

        The engine averages over ranks: a factor of `num_ranks` / targets of the global batch makes that a token mean.
        What has no gradient on any rank is not sent.
        """
        idle = {id(p) for lang in resting for p in self.own[lang]}
        active = [p for p in self.parameters if id(p) not in idle]
        for parameter in active:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        torch._foreach_mul_([p.grad for p in active], factor)

    def _check_loss(self, row: dict[str, Any], losses: Losses) -> None:
        """Stop at a loss that is not finite or has exploded; else follow its running mean."""
        loss, mean, ratio = row["loss"], self.state.mean_loss, self.settings.max_loss_ratio
        if not math.isfinite(loss):
            self._stop_at(losses, f"the loss is {loss}")
        if not math.isfinite(row.get("ctc_loss", 0.0)):
            self._stop_at(losses, f"the CTC loss is {row['ctc_loss']}")
        if mean is not None and loss > ratio * max(mean, 1):
            self._stop_at(losses, f"the loss is {loss:.3g}, over {ratio:g} times its running mean {mean:.3g}")
        self.state.mean_loss = loss if mean is None else MEMORY * mean + (1 - MEMORY) * loss
        self.state.lowest_mean = min(self.state.mean_loss, self.state.lowest_mean or math.inf)

    def _stop_at(self, losses: Losses, reason: str) -> NoReturn:
        """Write the global batch to bad_batch.json, worst utterances first, and raise UserError."""
        mine = [
            {"id": utt_id, "lang": lang, "loss": loss / len(target)}
            for batch, output in losses
            for utt_id, lang, target, loss in zip(
                batch.ids, batch.langs, batch.targets, output.utt_loss.tolist(), strict=True
            )
        ]
        parts: list[Any] = [None] * self.num_ranks
        distributed.all_gather_object(parts, mine)
        worst = sorted(chain(*parts), key=lambda x: (math.isfinite(x["loss"]), -x["loss"]))
        path = self.run_dir / "bad_batch.json"
        if self.rank == 0:
            files.write_json(path, {"step": self.state.step + 1, "reason": reason, "utterances": worst})
        named = ", ".join(x["id"] for x in worst[:5])
        self._stop(
            f"step {self.state.step + 1}: {reason}; its batch begins with {named} (all in {path}); "
            "mend or remove what is wrong with them, or lower the learning rate in another --exp-dir"
        )

    def _finish(self) -> None:
        by_part = runs.count_trainable(self.engine.module)
        done = asdict(self.state) | {"steps": self.total_steps}
        done |= {"num_trainable": by_part.total(), "num_trainable_encoder": by_part["encoder"]}
        files.write_json(self.run_dir / runs.FINISHED, done)
        checkpoints.finish(self.run_dir)

"""Model, data, layer groups, plan and settings go in; trained weights, history and the log of every step come out."""

import itertools
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset

from finetune.console import clock, headline, shown
from finetune.data.decoded import DecodedCache
from finetune.data.loaders import Batch, epoch_order, make_loader, text_lengths
from finetune.data.splits import Splits
from finetune.data.task import main_metric, units
from finetune.errors import DataError, PlanError
from finetune.model.groups import LayerGroups, set_mode, set_trainable
from finetune.model.pretrained import Pretrained
from finetune.model.sharding import whole
from finetune.plan.rates import param_groups
from finetune.plan.settings import Settings
from finetune.plan.stages import Point, ResolvedPlan
from finetune.train import checkpoint, memory, resuming
from finetune.train.evaluate import Evaluation, Loss, Metrics, as_float, evaluate
from finetune.train.group_norms import GroupNorms
from finetune.train.keeping import keep_best, kept_name, update_average
from finetune.train.lengthening import go_on
from finetune.train.processes import Processes
from finetune.train.progress import Diverged, Outcome, Progress
from finetune.train.replaying import Request, StageReplay, open_stage
from finetune.train.selection import Average, candidate, standing
from finetune.train.solving import solve
from finetune.train.steplog import StepLog
from finetune.train.stopping import Interrupted, StopWish, listening
from finetune.train.trackers import Trackers
from finetune.train.views import mislead

CHECKPOINT_SHARE = 0.05  # of the time goes into checkpoints at most
REWINDS, SLOWER = 3, 0.25  # times that training may go back, and the factor on its rates each time
STOP = 1000.0  # a wish above every sum of the processes' wishes to save
UNREADABLE_SHARE = 0.01  # of the training rows may turn out to be unreadable under way


class Trainer:
    """One run of a plan. Everything it does is reached from `run`, from top to bottom of this class."""

    def __init__(
        self,
        pretrained: Pretrained,
        splits: Splits,
        groups: LayerGroups,
        plan: ResolvedPlan,
        settings: Settings,
        *,
        folder: Path,
        loss: Loss,
        processes: Processes,
        seed: int = 0,
        own_metrics: Metrics | None = None,
        solvable: str | None = None,
        save_minutes: float = 1.0,
        save_steps: int | None = None,
        say: Callable[[str], None] = print,
        bar: Callable[[str, int, int], None] = lambda stage, done, steps: None,
        trackers: Trackers | None = None,
    ) -> None:
        self.pretrained, self.splits, self.groups = pretrained, splits, groups
        self.planned = self.plan = plan  # as asked for, and as training has changed it
        self.chosen = self.settings = settings  # likewise
        self.folder, self.loss, self.processes, self.seed = folder, loss, processes, seed
        self.own_metrics, self.solvable, self.say, self.bar = own_metrics, solvable, say, bar
        self.trackers = trackers if trackers is not None else Trackers((), folder, say)
        self.save_seconds, self.save_steps = 60.0 * save_minutes, save_steps
        # A step of MobileNetV2 takes two thirds of the time with the channels last (0.29 instead of 0.43 s). In one's
        # own module, `.view` behind a convolution would fail.
        self.model = pretrained.model
        if not processes.sharded:  # what is spread lies where it has to
            last = splits.task.modality == "image" and pretrained.family != "module"
            layout = torch.channels_last if last else torch.preserve_format
            self.model = pretrained.model.to(processes.device).to(memory_format=layout)
        self.wrapped: torch.nn.Module = self.model
        self.optimizer = self.new_optimizer()
        self.norms = GroupNorms(self.model, groups, spread=processes.sharded)
        self.average: Average | None = None
        self.replay: StageReplay | None = None
        self.cache = DecodedCache(folder / "cache") if splits.task.modality == "image" else None
        self.head: Evaluation | None = None  # of the solved head, before the first step
        self.head_weights: checkpoint.Weights = {}
        self.start_weights: checkpoint.Weights = {}  # of the first stage that begins anew, and so of all such stages
        self.progress = Progress()
        self.best_weights = checkpoint.snapshot(self.model)  # those of the start, until a validation says more
        self.last_valid: Evaluation | None = None
        self.lengths = {"train": self.lengths_of(splits.train), "valid": self.lengths_of(splits.valid)}
        self.evaluate_seconds = self.head_seconds = 0.0
        self.saved_at, self.save_took = time.monotonic(), 0.0
        self.stop = StopWish()
        self.stage = self.epoch = 0
        order = epoch_order(len(splits.train), settings.batch_size, seed=seed, epoch=0)
        shortest = min(map(len, without_remainder(order, settings.batch_size)))
        if shortest < processes.count * settings.accumulation:
            raise PlanError(
                f"batch_size={settings.batch_size}: the shortest batch has {shortest} examples, too few for "
                f"{processes.count} processes with accumulation={settings.accumulation}; give a larger batch_size"
            )
        self.log = StepLog(None)

    def new_optimizer(self) -> torch.optim.AdamW:
        """AdamW over all parameters, as before the first step."""
        return torch.optim.AdamW(
            param_groups(self.model, self.groups, self.plan.stages[-1].rates, self.settings.weight_decay),
            betas=self.settings.betas,
            eps=self.settings.eps,
            fused=True,
        )

    def run(self) -> Outcome:
        """Train through every stage of the plan, from a checkpoint if the folder holds one, and keep the best
        weights."""
        with listening() as self.stop:
            resuming.resume(self)
            self.saved_at = time.monotonic()
            path = self.folder / "steps.jsonl" if self.processes.is_main else None
            self.trackers.start(self.progress.step)
            self.log = StepLog(path, self.say, self.trackers.step)
            try:
                why = self.train()
                self.close_replay()
                valid, kept = keep_best(self, diverged=bool(why))
            finally:
                self.close()
        status = "diverged" if why else "finished"
        return Outcome(self.progress, valid, kept, status, why, self.evaluate_seconds)

    def train(self) -> str:
        """The head, and then stage after stage; why it ended before its time, or ""."""
        if self.solvable is not None and not self.progress.history:
            self.solve_head(self.solvable)
        if self.norms.start is None:
            self.norms.begin()
        while self.progress.step < self.plan.steps or go_on(self):
            try:
                self.run_stage(self.plan.at(self.progress.step).stage)
            except Diverged as error:
                if len(self.progress.rewinds) == REWINDS:
                    lower = self.settings.lr * SLOWER ** (REWINDS + 1)
                    return f"{error}, {REWINDS} times at ever lower rates; try lr={lower:.1g}, or look at the targets"
                self.rewind(str(error))
        return ""

    def rewind(self, why: str) -> None:
        """Begin the stage anew, from the best weights so far, at a lower rate."""
        self.close_replay()
        progress, index = self.progress, self.stage
        progress.rewinds.append({"stage": index, "step": progress.step, "factor": SLOWER, "why": why})
        progress.shortened = [cut for cut in progress.shortened if cut[0] != index]
        self.plan = progress.applied_to(self.planned)
        progress.step = self.plan.start(index)
        progress.epoch_losses, progress.skipped_in_a_row = [], 0
        self.norms.taken()
        progress.first_loss = progress.smooth_loss = None
        anew = self.plan.stages[index].anew
        checkpoint.restore(self.model, self.start_weights if anew else self.best_weights)
        self.optimizer = self.new_optimizer()
        if not anew:  # else it has the ends of the cycles before
            self.average = None
        self.log.back_to(progress.step)
        best = "its start" if anew else f"the weights of {kept_name(progress.best) if progress.best else 'the start'}"
        self.say(f"Back      {why}: this stage again from {best}, at {SLOWER:g} of the rate")
        self.save_checkpoint()

    def close(self) -> None:
        """Give back what only training needs."""
        self.close_replay()
        if self.cache is not None:
            self.cache.close()
        self.log.close()

    def lengths_of(self, dataset: Dataset) -> list[int] | None:
        """Tokens of each row, by which batches of text are put together."""
        task = self.splits.task
        return text_lengths(dataset, task, cast(Any, self.pretrained.processor)) if task.modality == "text" else None

    def solve_head(self, layer: str) -> None:
        """Begin with the optimal head on the frozen features, and remember it as what all training has to beat."""
        begin, data = time.monotonic(), self.splits.train
        solved = solve(
            self.pretrained, layer, data, self.splits.task, self.processes, lengths=self.lengths["train"],
            seed=self.seed, cache=self.cache,
        )  # fmt: skip
        self.head_seconds = time.monotonic() - begin
        valid = self.head = self.remember_epoch("head", solved.log_loss)
        self.head_weights = self.best_weights
        self.say(
            f"Baseline  linear probe on frozen features: {self.figures(valid)} on validation, after "
            f"{clock(self.head_seconds)}"
        )
        self.look_at_views(valid)

    def look_at_views(self, plain: Evaluation) -> None:
        """Train on pictures as they are where random views of them mislead the solved head."""
        augment, by = self.settings.augment, self.settings.reasons["augment"][1]
        if self.splits.task.modality != "image" or augment == "none" or by == "user":
            return
        why = mislead(plain, lambda number: self.evaluate(view=number), self.splits.task)
        if why:
            self.progress.misleading_views = why
            self.settings = self.progress.applied_to_settings(self.chosen)
            self.say(f"Augment   none: {why}")

    def run_stage(self, index: int) -> None:
        stage, first, self.stage = self.plan.stages[index], self.plan.start(index), index
        begin = time.monotonic() - sum(self.progress.stage_seconds[index : index + 1])  # what a resumed stage has had
        if self.progress.step == first:
            self.progress.stale, self.progress.stage_best = 0, None
            self.begin_anew(index)
        set_trainable(self.model, self.groups, stage.open_from)
        self.wrapped = self.processes.wrap(self.wrapped)
        set_mode(self.model, self.groups, stage.open_from, self.settings.freeze_batchnorm)
        self.open_replay(index)
        self.fit_memory(index)
        steps_per_epoch = self.plan.steps_per_epoch
        while self.progress.step < first + stage.steps:
            epoch, offset = divmod(self.progress.step - first, steps_per_epoch)
            last = min(steps_per_epoch, stage.steps - epoch * steps_per_epoch)
            set_mode(self.model, self.groups, stage.open_from, self.settings.freeze_batchnorm)
            for done, micro_batches in enumerate(self.steps_of_epoch(index, epoch, offset, last), offset + 1):
                self.step(micro_batches, self.plan.at(self.progress.step))
                update_average(self, index)
                self.progress.step += 1
                self.bar(stage.name, self.progress.step - first, stage.steps)
                if self.log.asked and done < last:
                    self.progress.stage_seconds[index:] = [time.monotonic() - begin]
                    self.answer()
            self.log.flush(self.progress)
            self.progress.stage_seconds[index:] = [time.monotonic() - begin]
            self.end_epoch(index, epoch + 1, math.ceil(stage.steps / steps_per_epoch))
            self.progress.stage_seconds[index:] = [time.monotonic() - begin]
            if self.ends_early(index, self.progress.step - first):
                stage = self.plan.stages[index]
            if self.log.asked:
                self.answer()
        self.processes.check_same(self.model, stage.name)
        self.close_replay()

    def begin_anew(self, index: int) -> None:
        """At a stage that does: go back to the weights with which the first such stage began."""
        if not self.plan.stages[index].anew:
            return
        if self.plan.cycles(index) == 1:
            solved = index == 0 and self.head is not None
            self.start_weights = self.head_weights if solved else checkpoint.snapshot(self.model)
        else:
            checkpoint.restore(self.model, self.start_weights)
            self.optimizer = self.new_optimizer()
            self.progress.first_loss = self.progress.smooth_loss = None

    def ends_early(self, index: int, done: int) -> bool:
        """Take the rest of a stage that no longer improves in one epoch: its rate still comes down to its end."""
        stage, rest = self.plan.stages[index], self.plan.steps_per_epoch
        again = any(cut[0] == index for cut in self.progress.shortened)
        if self.settings.patience == 0 or self.progress.stale < self.settings.patience or again:
            return False
        if stage.steps - done <= rest or 2 * done < stage.steps:  # before, the rate is high, and a plateau is no end
            return False
        self.progress.shortened.append((index, done, rest))
        self.plan = self.progress.applied_to(self.planned)
        self.say(f"{stage.name:<9} no better for {self.progress.stale} epochs: the rate comes down within one more")
        return True

    def open_replay(self, index: int) -> None:
        """Compute the frozen part of a stage once, where that pays."""
        stage, before = self.plan.stages[index], self.progress.replayed[index : index + 1]
        if before and not before[0][0]:
            return
        request = Request(
            self.pretrained, self.splits, self.settings, self.processes, self.lengths, self.folder,
            self.loss, self.seed, self.cache,
        )  # fmt: skip
        self.replay, why = open_stage(request, stage, self.plan.steps_per_epoch, self.epochs_before(index))
        self.progress.replayed[index:] = [(self.replay is not None, why)]
        if self.replay is not None:
            self.say(f"{stage.name:<9} frozen part computed once: {why}")

    def fit_memory(self, index: int) -> None:
        """Raise the number of micro-batches until the largest step of the stage fits every device.

        Raises:
            RunError: It does not, one example at a time.
        """
        # A pass of a spread model is one of all processes: one that is out of memory would leave the others waiting.
        if self.processes.device.type not in memory.PROBED or self.processes.sharded or self.replay is not None:
            return
        order = epoch_order(len(self.splits.train), self.settings.batch_size, seed=self.seed, epoch=0)[0]
        lengths, parts = self.lengths["train"], self.processes.count
        rows = order if lengths is None else sorted(range(len(lengths)), key=lambda row: -lengths[row])[: len(order)]

        def batch(count: int) -> Batch:
            share = _split(rows, parts * count)[0]
            task, processor = self.splits.task, self.pretrained.processor
            return next(iter(make_loader(self.splits.train, task, processor, [share], train=True, workers=0)))

        attempt = memory.largest_step(self.pretrained, batch, self.loss, self.processes)
        before, most = self.accumulation, max(1, len(rows) // parts)
        found = memory.micro_batches(attempt, before, most, self.processes)
        if found is None and not self.progress.recompute:
            self.progress.recompute = memory.save_activations(self.model)
            found = memory.micro_batches(attempt, most, most, self.processes) if self.progress.recompute else None
        if found is None:
            raise memory.does_not_fit(rows[:1])
        self.progress.accumulation = found
        if found != before:
            how = ", activations computed twice" if self.progress.recompute else ""
            self.say(f"Memory    {self.plan.stages[index].name}: {found} micro-batches a step instead of {before}{how}")

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step on each process."""
        return max(self.settings.accumulation, self.progress.accumulation)

    def epochs_before(self, stage: int) -> int:
        """Epochs, whole or begun, of the stages before one."""
        return sum(math.ceil(before.steps / self.plan.steps_per_epoch) for before in self.plan.stages[:stage])

    def close_replay(self) -> None:
        """Compute everything again."""
        if self.replay is not None:
            self.processes.wait()
            self.replay.close()
        self.replay = None

    def forward(self, batch: Batch) -> Any:
        """Outputs for a training batch of `steps_of_epoch`."""
        if self.replay is not None:
            return self.replay.train.forward(batch, self.epoch, self.wrapped)
        return self.pretrained.forward(batch.inputs, model=self.wrapped)

    def steps_of_epoch(self, stage: int, epoch: int, offset: int, end: int | None = None) -> Iterator[list[Batch]]:
        """This process's micro-batches of each step from `offset` to `end`; a pure function of seed, stage and
        epoch."""
        data, batch_size, accumulation = self.splits.train, self.settings.batch_size, self.accumulation
        number = self.epochs_before(stage) + epoch
        order = epoch_order(len(data), batch_size, seed=self.seed, epoch=number, lengths=self.lengths["train"])
        order = without_remainder(order, batch_size)
        parts = self.processes.count * accumulation
        mine = slice(self.processes.rank * accumulation, (self.processes.rank + 1) * accumulation)
        shares = [part for rows in order[offset:end] for part in _split(rows, parts)[mine]]
        task, processor = self.splits.task, self.pretrained.processor
        options: dict[str, Any] = {"train": True, "seed": self.seed, "epoch": number, "augment": self.settings.augment}
        options["cache"] = self.cache
        self.epoch = number
        if self.replay is not None:
            loader = iter(self.replay.train.loader(shares))
        else:
            loader = iter(make_loader(data, task, processor, shares, **options))
        while micro_batches := list(itertools.islice(loader, accumulation)):
            yield micro_batches

    def step(self, micro_batches: list[Batch], point: Point) -> None:
        """One optimizer step. The loss is the mean over all examples (or tags) of the step, whatever the split into
        micro-batches."""
        begin = time.monotonic()
        # Random numbers are a function of seed, step and process, so that nothing that draws some on the way (a check,
        # a validation, a run that is taken up again) changes the steps.
        torch.manual_seed((1_000_003 * self.seed + self.progress.step) * 65_537 + self.processes.rank)
        for group in self.optimizer.param_groups:
            group["lr"] = point.rates[group["layer_group"]]
            if point.momentum is not None:
                group["betas"] = (point.momentum, group["betas"][1])
        self.note_unreadable(micro_batches)
        counts = [units(self.splits.task, cast(torch.Tensor, batch.targets)) for batch in micro_batches]
        total = max(1.0, self.processes.total(sum(counts)))
        loss = torch.zeros((), device=self.processes.device)
        for number, (batch, count) in enumerate(zip(micro_batches, counts, strict=True), start=1):
            batch = batch.to(self.processes.device)
            with self.processes.sync_gradients(self.wrapped, number == len(micro_batches)):
                with self.processes.autocast():
                    outputs = as_float(self.forward(batch))
                part = self.loss(outputs, cast(torch.Tensor, batch.targets)) * (count / total)
                # Gradients are averaged over the processes, and the loss is a sum over them.
                self.processes.accelerator.backward(part * self.processes.count)
            loss += part.detach()
        norm = whole(self.norms.clip(self.settings.clip if self.settings.clip > 0 else math.inf))
        asked = torch.full((), self.wish(), device=loss.device)
        if self.processes.count > 1:
            loss, asked = self.processes.accelerator.reduce(torch.stack([loss, asked]), reduction="sum").unbind()
        # A step without a usable gradient is left out.
        useless = ~torch.isfinite(norm + loss)
        if not self.processes.sharded:  # on the device, as after the scaling of losses: there is no need to wait for it
            self.optimizer.found_inf = useless.float()  # type: ignore[attr-defined]
        if not self.processes.sharded or not useless:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.log.add(self.progress, point, loss, norm, asked, time.monotonic() - begin)

    def wish(self) -> float:
        """What this process asks of all of them at the end of a step: nothing, 1 for a checkpoint, `STOP` to end."""
        if self.stop.signal:
            return STOP
        if not self.processes.is_main:
            return 0.0
        if self.save_steps is not None and (self.progress.step + 1) % self.save_steps == 0:
            return 1.0
        due = max(self.save_seconds, self.save_took / CHECKPOINT_SHARE)
        return float(time.monotonic() - self.saved_at > due)

    def answer(self) -> None:
        """Do what the processes asked for: save, and end if one of them must."""
        self.log.flush(self.progress)
        asked, self.log.asked = self.log.asked, 0.0
        saved = self.save_checkpoint()
        if asked >= STOP:
            where = f"at step {self.progress.step} of {self.plan.steps}"
            safe = "saved: the same command goes on from there" if saved else "it could not be saved, see above"
            raise Interrupted(f"stopped {where}, {safe}", self.stop.signal or signal.SIGTERM)

    def note_unreadable(self, micro_batches: list[Batch]) -> None:
        """Count the rows that could be read when the run began, and now cannot.

        Raises:
            DataError: They are more than a small share of the rows.
        """
        found = {row: why for batch in micro_batches for row, why in batch.unreadable.items()}
        if not found:
            return
        self.progress.unreadable |= {str(self.splits.train["id"][row]): why for row, why in found.items()}
        lost, rows = self.progress.unreadable, len(self.splits.train)
        names = "; ".join(f"{name}: {why}" for name, why in list(lost.items())[:5])
        if len(lost) > max(1.0, UNREADABLE_SHARE * rows):
            raise DataError(
                f"{len(lost)} of {rows} training rows have become unreadable since the run began ({names}); put them "
                "back and give the same command again"
            )
        self.say(f"Warning   left out, unreadable since the run began: {names}")

    def end_epoch(self, stage: int, epoch: int, epochs: int) -> None:
        """Validate, and say how it went.

        Raises:
            Diverged: None of its steps could be used.
        """
        name, losses = self.plan.stages[stage].name, self.progress.epoch_losses
        if not losses:
            raise Diverged(f"epoch {epoch} of {epochs}: no step had a loss and a gradient that are numbers")
        train_loss, self.progress.epoch_losses = sum(losses) / len(losses), []
        valid = self.remember_epoch(name, train_loss)
        self.say(
            f"{name:<9} {epoch}/{epochs}   loss {train_loss:.3f}   validation: {self.figures(valid)}   "
            f"{clock(self.progress.stage_seconds[stage])}"
        )

    def remember_epoch(self, stage: str, train_loss: float) -> Evaluation:
        """Validate, and remember the weights if they are the best so far. What comes before the first step is epoch
        0."""
        valid = self.last_valid = self.evaluate()
        shown = {name: value for name, value in valid.metrics.items() if isinstance(value, int | float)}
        self.trackers.log("valid", valid.metrics, self.progress.step)
        history = self.progress.history
        number = history[-1]["epoch"] + 1 if history else int(self.progress.step > 0)
        history.append(
            {"epoch": number, "step": self.progress.step, "stage": stage, "train_loss": train_loss, "valid": shown}
            | ({"groups": norms} if (norms := self.norms.taken()) else {})
        )
        best = self.progress.best
        if math.isfinite(valid.loss) and (best is None or list(standing(valid)) > best["standing"]):
            self.progress.best = candidate(valid, number)
            self.best_weights = checkpoint.snapshot(self.model)
        # Within the stage: at the height of its rate it may well be worse than what came before it.
        stage_best = self.progress.stage_best
        if stage_best is None or list(standing(valid)) > stage_best:
            self.progress.stage_best, self.progress.stale = list(standing(valid)), 0
        else:
            self.progress.stale += 1
        return valid

    def figures(self, valid: Evaluation) -> str:
        """What counts of an evaluation, in words."""
        main = headline(valid.metrics, main_metric(self.splits.task)[0])
        return f"loss {valid.loss:.3f}" if main is None else f"{shown(*main)}, loss {valid.loss:.3f}"

    def evaluate(self, dataset: Dataset | None = None, *, view: int | None = None) -> Evaluation:
        """Evaluate a data set, by default the validation part, with the weights as they are; of images, a random view
        of each, by its number, if asked for."""
        begin = time.monotonic()
        options: dict[str, Any] = {"loss": self.loss, "batch_size": 4 * self.settings.batch_size}
        options["own_metrics"] = self.own_metrics
        random = {"train": True, "seed": self.seed, "epoch": view}
        options |= {"cache": self.cache} if view is None else random
        lengths = self.lengths["valid"] if dataset is None else self.lengths_of(dataset)
        data = self.splits.valid if dataset is None else dataset
        replayed = self.replay.valid if self.replay is not None and dataset is None else None
        result = evaluate(
            self.pretrained, data, self.splits.task, self.processes, lengths=lengths, replayed=replayed, **options,
        )  # fmt: skip
        self.evaluate_seconds += time.monotonic() - begin
        return result

    def save_checkpoint(self) -> bool:
        """Write a checkpoint; whether that worked, as the main process sees it."""
        begin = time.monotonic()
        self.progress.gradients = self.norms.state()
        saved = resuming.save(self)
        self.processes.wait()
        self.saved_at = time.monotonic()
        self.save_took = self.saved_at - begin
        return saved


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Optimizer steps of one epoch."""
    whole, rest = divmod(rows, batch_size)
    return max(1, whole + (2 * rest >= batch_size))


def without_remainder(order: list[list[int]], batch_size: int) -> list[list[int]]:
    """The epoch's batches without one of less than half the size: a full step on a few examples is mostly noise, and
    batch statistics of one example do not exist. Which rows are left out changes with the epoch."""
    return [rows for rows in order if 2 * len(rows) >= batch_size] or order


def _split(rows: list[int], parts: int) -> list[list[int]]:
    """Near-equal contiguous parts, as many as asked for."""
    return [part.tolist() for part in np.array_split(np.asarray(rows), parts)]

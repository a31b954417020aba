"""Model, data, layer groups, plan and settings go in; trained weights, history and the log of every step come out."""

import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch.optim.swa_utils import AveragedModel

from finetune.data.decoded import DecodedCache
from finetune.data.loaders import Batch, epoch_order, make_loader, text_lengths
from finetune.data.splits import Splits
from finetune.data.task import units
from finetune.errors import PlanError
from finetune.model.groups import LayerGroups, set_mode, set_trainable
from finetune.model.pretrained import Pretrained
from finetune.plan.rates import param_groups
from finetune.plan.settings import Settings
from finetune.plan.stages import Point, ResolvedPlan
from finetune.train import checkpoint
from finetune.train.evaluate import Evaluation, Loss, Metrics, as_float, evaluate
from finetune.train.processes import Processes
from finetune.train.progress import Diverged, Outcome, Progress
from finetune.train.replaying import Request, StageReplay, open_stage
from finetune.train.selection import (
    averaged_weights,
    averages_at,
    candidate,
    clearly_better,
    head_is_better,
    new_average,
    standing,
)
from finetune.train.solving import solve
from finetune.train.steplog import StepLog

CHECKPOINT_SECONDS = 60.0


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
        say: Callable[[str], None] = print,
    ) -> None:
        self.pretrained, self.splits, self.groups, self.plan, self.settings = pretrained, splits, groups, plan, settings
        self.folder, self.loss, self.processes, self.seed = folder, loss, processes, seed
        self.own_metrics, self.solvable, self.say = own_metrics, solvable, say
        # A step of MobileNetV2 takes two thirds of the time with the channels last (0.29 instead of 0.43 s). In one's
        # own module, `.view` behind a convolution would fail.
        last = splits.task.modality == "image" and pretrained.family != "module"
        layout = torch.channels_last if last else torch.preserve_format
        self.model = pretrained.model.to(processes.device).to(memory_format=layout)
        self.wrapped: torch.nn.Module = self.model
        self.optimizer = torch.optim.AdamW(
            param_groups(self.model, groups, plan.stages[-1].rates, settings.weight_decay),
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )
        self.average: AveragedModel | None = None
        self.replay: StageReplay | None = None
        self.cache = DecodedCache(folder / "cache") if splits.task.modality == "image" else None
        self.head: Evaluation | None = None  # of the solved head, before the first step
        self.head_weights: checkpoint.Weights = {}
        self.progress = Progress()
        self.best_weights = checkpoint.snapshot(self.model)  # those of the start, until a validation says more
        self.last_valid: Evaluation | None = None
        self.lengths = {"train": self.lengths_of(splits.train), "valid": self.lengths_of(splits.valid)}
        self.evaluate_seconds = self.head_seconds = 0.0
        self.saved_at = time.monotonic()
        self.epoch = 0
        order = epoch_order(len(splits.train), settings.batch_size, seed=seed, epoch=0)
        shortest = min(map(len, without_remainder(order, settings.batch_size)))
        if shortest < processes.count * settings.accumulation:
            raise PlanError(
                f"batch_size={settings.batch_size}: the shortest batch has {shortest} examples, too few for "
                f"{processes.count} processes with accumulation={settings.accumulation}; give a larger batch_size"
            )
        self.log = StepLog(None, settings.lr)

    def run(self) -> Outcome:
        """Train through every stage of the plan, from a checkpoint if the folder holds one, and keep the best
        weights."""
        torch.manual_seed(self.seed + 1 + self.processes.rank)
        self.resume()
        self.saved_at = time.monotonic()
        self.log = StepLog(self.folder / "steps.jsonl" if self.processes.is_main else None, self.settings.lr)
        try:
            why = self.train()
            self.close_replay()
            valid, kept = self.keep_best(diverged=bool(why))
        finally:
            self.close()
        progress, status = self.progress, "diverged" if why else "finished"
        return Outcome(
            progress.history, progress.stage_seconds, valid, kept, status, why, self.evaluate_seconds, progress.replayed
        )

    def train(self) -> str:
        """The head, and then stage after stage; why it ended before its time, or ""."""
        try:
            if self.solvable is not None and not self.progress.history:
                self.solve_head(self.solvable)
            while self.progress.step < self.plan.steps:
                self.run_stage(self.plan.at(self.progress.step).stage)
        except Diverged as error:
            return str(error)
        return ""

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

    def drop_checkpoints(self) -> None:
        """Delete what only an unfinished run needs."""
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)

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
            f"{'head':<9} solved on frozen features of {len(data)} rows (penalty {solved.strength:.2g} by "
            f"cross-validation)  valid {valid.loss:.3f}  {_figures(valid)}   {_clock(time.monotonic() - begin)}"
        )

    def run_stage(self, index: int) -> None:
        stage, first = self.plan.stages[index], self.plan.start(index)
        begin = time.monotonic() - sum(self.progress.stage_seconds[index : index + 1])  # what a resumed stage has had
        if self.progress.step == first:
            self.progress.stale, self.progress.stage_best = 0, None
        set_trainable(self.model, self.groups, stage.open_from)
        self.wrapped = self.processes.wrap(self.wrapped)
        set_mode(self.model, self.groups, stage.open_from, self.settings.freeze_batchnorm)
        self.open_replay(index)
        steps_per_epoch = self.plan.steps_per_epoch
        while self.progress.step < first + stage.steps:
            epoch, offset = divmod(self.progress.step - first, steps_per_epoch)
            last = min(steps_per_epoch, stage.steps - epoch * steps_per_epoch)
            set_mode(self.model, self.groups, stage.open_from, self.settings.freeze_batchnorm)
            losses = []
            for micro_batches in itertools.islice(self.steps_of_epoch(index, epoch, offset), last - offset):
                point = self.plan.at(self.progress.step)
                losses.append(self.step(micro_batches, point))
                self.update_average(index)
                self.progress.step += 1
            self.log.flush(self.progress)
            self.progress.stage_seconds[index:] = [time.monotonic() - begin]
            self.end_epoch(
                index, epoch + 1, math.ceil(stage.steps / steps_per_epoch), float(torch.stack(losses).mean())
            )
            self.progress.stage_seconds[index:] = [time.monotonic() - begin]
            if self.ends_early(index, self.progress.step - first):
                stage = self.plan.stages[index]
        self.close_replay()

    def ends_early(self, index: int, done: int) -> bool:
        """Take the rest of a stage that no longer improves in one epoch: its rate still comes down to its end."""
        stage, rest = self.plan.stages[index], self.plan.steps_per_epoch
        again = any(cut[0] == index for cut in self.progress.shortened)
        if self.settings.patience == 0 or self.progress.stale < self.settings.patience or again:
            return False
        if stage.steps - done <= rest or 2 * done < stage.steps:  # before, the rate is high, and a plateau is no end
            return False
        self.progress.shortened.append((index, done, rest))
        self.plan = self.plan.shortened(index, done, rest)
        self.say(f"{stage.name:<9} no better for {self.progress.stale} epochs: the rate comes down within one more")
        return True

    def open_replay(self, index: int) -> None:
        """Compute the frozen part of a stage once, where that pays."""
        stage, before = self.plan.stages[index], self.progress.replayed[index : index + 1]
        if before and not before[0][0]:
            return
        request = Request(
            self.pretrained, self.splits, self.settings, self.processes, self.lengths, self.folder,
            self.loss, self.seed, self.cache, bool(before),
        )  # fmt: skip
        self.replay, why = open_stage(request, stage, self.plan.steps_per_epoch, self.epochs_before(index))
        self.progress.replayed[index:] = [(self.replay is not None, why)]
        if self.replay is not None:
            self.say(f"{stage.name:<9} frozen part computed once: {why}")

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

    def steps_of_epoch(self, stage: int, epoch: int, offset: int) -> Iterator[list[Batch]]:
        """This process's micro-batches of each step from `offset` on; a pure function of seed, stage and epoch."""
        data, batch_size, accumulation = self.splits.train, self.settings.batch_size, self.settings.accumulation
        number = self.epochs_before(stage) + epoch
        order = epoch_order(len(data), batch_size, seed=self.seed, epoch=number, lengths=self.lengths["train"])
        order = without_remainder(order, batch_size)
        parts = self.processes.count * accumulation
        mine = slice(self.processes.rank * accumulation, (self.processes.rank + 1) * accumulation)
        shares = [part for rows in order[offset:] for part in _split(rows, parts)[mine]]
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

    def step(self, micro_batches: list[Batch], point: Point) -> torch.Tensor:
        """One optimizer step. The loss is the mean over all examples (or tags) of the step, whatever the split into
        micro-batches."""
        begin = time.monotonic()
        for group in self.optimizer.param_groups:
            group["lr"] = point.rates[group["layer_group"]]
            if point.momentum is not None:
                group["betas"] = (point.momentum, group["betas"][1])
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
        norm = torch.nn.utils.clip_grad_norm_(
            [p for p in self.model.parameters() if p.grad is not None],
            self.settings.clip if self.settings.clip > 0 else math.inf,
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.processes.count > 1:
            loss = self.processes.accelerator.reduce(loss, reduction="sum")
        self.log.add(self.progress, point, loss, norm, time.monotonic() - begin)
        return loss

    def update_average(self, stage: int) -> None:
        """Take the weights into their average, now and then over the end of the last stage."""
        step = self.progress.step - self.plan.start(stage)
        last = stage == len(self.plan.stages) - 1
        if self.settings.ema and last and averages_at(step, self.plan.stages[stage].steps):
            self.average = self.average if self.average is not None else new_average(self.model)
            self.average.update_parameters(self.model)

    def end_epoch(self, stage: int, epoch: int, epochs: int, train_loss: float) -> None:
        """Validate, and write a checkpoint if the last is old."""
        name = self.plan.stages[stage].name
        valid = self.remember_epoch(name, train_loss)
        self.say(
            f"{name:<9} {epoch}/{epochs}   loss {train_loss:.3f}  valid {valid.loss:.3f}  {_figures(valid)}   "
            f"{_clock(self.progress.stage_seconds[stage])}"
        )
        if time.monotonic() - self.saved_at > CHECKPOINT_SECONDS:
            self.save_checkpoint()

    def remember_epoch(self, stage: str, train_loss: float) -> Evaluation:
        """Validate, and remember the weights if they are the best so far. What comes before the first step is epoch
        0."""
        valid = self.last_valid = self.evaluate()
        shown = {name: value for name, value in valid.metrics.items() if isinstance(value, int | float)}
        history = self.progress.history
        number = history[-1]["epoch"] + 1 if history else int(self.progress.step > 0)
        history.append(
            {"epoch": number, "step": self.progress.step, "stage": stage, "train_loss": train_loss, "valid": shown}
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

    def evaluate(self, dataset: Dataset | None = None) -> Evaluation:
        """Evaluate a data set, by default the validation part, with the weights as they are."""
        begin = time.monotonic()
        options = {"loss": self.loss, "batch_size": 4 * self.settings.batch_size, "own_metrics": self.own_metrics}
        options["cache"] = self.cache
        lengths = self.lengths["valid"] if dataset is None else self.lengths_of(dataset)
        data = self.splits.valid if dataset is None else dataset
        replayed = self.replay.valid if self.replay is not None and dataset is None else None
        result = evaluate(
            self.pretrained, data, self.splits.task, self.processes, lengths=lengths, replayed=replayed,
            **cast(Any, options),
        )  # fmt: skip
        self.evaluate_seconds += time.monotonic() - begin
        return result

    def keep_best(self, *, diverged: bool) -> tuple[Evaluation, str]:
        """Leave the best weights in the model; their evaluation, and which they are ("last", "average", "epoch N")."""
        best = self.progress.best
        if diverged:
            checkpoint.restore(self.model, self.best_weights)
            return self.evaluate(), _kept(best) if best else "start"
        valid, kept = self.last_valid or self.evaluate(), "last"
        if self.average is not None:
            last = checkpoint.snapshot(self.model)
            self.model.load_state_dict(averaged_weights(self.average))
            averaged = self.evaluate()
            if standing(averaged) > standing(valid):
                valid, kept = averaged, "average"
            else:
                checkpoint.restore(self.model, last)
        if self.head is not None and head_is_better(self.head, valid, self.splits.task):
            checkpoint.restore(self.model, self.head_weights)
            return self.head, "solved head"
        if best is not None and clearly_better(best, valid):
            checkpoint.restore(self.model, self.best_weights)
            valid, kept = self.evaluate(), _kept(best)
        return valid, kept

    def save_checkpoint(self) -> None:
        rng = [
            torch.tensor(state, dtype=torch.uint8) for state in self.processes.gather([torch.get_rng_state().tolist()])
        ]
        if self.processes.is_main:
            weights = {"model": checkpoint.snapshot(self.model), "best": self.best_weights}
            if self.average is not None:
                weights["average"] = checkpoint.snapshot(self.average)
            if self.head is not None:
                names = [f"{self.solvable}.{name}" for name in ("weight", "bias")]
                weights["head"] = {name: self.head_weights[name] for name in names if name in self.head_weights}
            checkpoint.save(
                self.folder / "checkpoints",
                self.progress.step,
                weights=weights,
                optimizer=self.optimizer.state_dict(),
                progress=vars(self.progress),
                rng=rng,
            )
        self.processes.wait()
        self.saved_at = time.monotonic()

    def resume(self) -> None:
        """Go on from the newest checkpoint of the folder; lines of `steps.jsonl` beyond it are dropped."""
        path, log = checkpoint.newest(self.folder / "checkpoints"), self.folder / "steps.jsonl"
        if path is not None:
            weights, optimizer, rng, progress = checkpoint.load(path)
            if "head" in weights:  # the model is still as it was loaded
                self.model.load_state_dict(weights["head"], strict=False)
                self.head, self.head_weights = self.evaluate(), checkpoint.snapshot(self.model)
            checkpoint.restore(self.model, weights["model"])
            self.best_weights = weights["best"]
            if "average" in weights:
                self.average = new_average(self.model)
                self.average.load_state_dict(weights["average"])
            self.optimizer.load_state_dict(optimizer)
            torch.set_rng_state(rng[self.processes.rank])
            self.progress = Progress(**progress)
            for cut in self.progress.shortened:
                self.plan = self.plan.shortened(*cut)
            self.say(f"Resumed   from step {self.progress.step} of {self.plan.steps}")
        if self.processes.is_main:
            lines = log.read_text().splitlines(keepends=True)[: self.progress.step] if log.exists() else []
            log.write_text("".join(lines))


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Optimizer steps of one epoch."""
    whole, rest = divmod(rows, batch_size)
    return max(1, whole + (2 * rest >= batch_size))


def without_remainder(order: list[list[int]], batch_size: int) -> list[list[int]]:
    """The epoch's batches without one of less than half the size: a full step on a few examples is mostly noise, and
    batch statistics of one example do not exist. Which rows are left out changes with the epoch."""
    return [rows for rows in order if 2 * len(rows) >= batch_size] or order


def _kept(best: dict[str, Any]) -> str:
    return f"epoch {best['epoch']}" if best["epoch"] else "solved head"


def _figures(valid: Evaluation) -> str:
    shown = {name: value for name, value in valid.metrics.items() if isinstance(value, int | float)}
    return "  ".join(f"{metric} {value:.4g}" for metric, value in shown.items() if metric != "loss")


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _split(rows: list[int], parts: int) -> list[list[int]]:
    """Near-equal contiguous parts, as many as asked for."""
    return [part.tolist() for part in np.array_split(np.asarray(rows), parts)]

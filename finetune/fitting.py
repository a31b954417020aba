"""The whole line on one page: data, backbone and choices go in, a trained `Run` comes out."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from torch import nn

from finetune.console import Console
from finetune.data.sources import load_dataset
from finetune.data.splits import Splits
from finetune.errors import DataError, PlanError, RunError
from finetune.model.groups import LayerGroups
from finetune.model.heads import Head
from finetune.model.outputs import scale_outputs
from finetune.model.pretrained import Pretrained
from finetune.model.sharding import put_back
from finetune.output.adapter import save_adapter, write_card
from finetune.output.export import save_pretrained
from finetune.output.mistakes import keep_mistakes
from finetune.output.record import (
    describe_run,
    described_calibration,
    identity_of,
    starting_record,
    test_predictions,
    versions,
)
from finetune.output.summary import result_lines
from finetune.plan.settings import Settings
from finetune.plan.stages import Plan
from finetune.preparing import data_lines, prepare
from finetune.run import Run
from finetune.train.balance import UNEVEN, Balance, evened, fold_shares, measure
from finetune.train.calibration import applies, cooled, fold, temperature
from finetune.train.evaluate import Evaluation, Loss, Metrics
from finetune.train.folder import open_folder, read_record, release, take, write_record
from finetune.train.processes import start_processes
from finetune.train.resuming import drop_checkpoints
from finetune.train.trackers import Trackers, check_names, described
from finetune.train.trainer import Trainer


def fit(
    data: Splits | str | Path | Any,
    backbone: str | Path | nn.Module | Pretrained,
    *,
    out: str | Path = "runs/finetune",
    head: Head | None = None,
    loss: Loss | None = None,
    metrics: Metrics | None = None,
    plan: Plan | None = None,
    groups: LayerGroups | None = None,
    minutes: float | None = None,
    epochs: float | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    image_size: int | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    save_minutes: float = 1.0,
    save_steps: int | None = None,
    trackers: str | Sequence[str] | None = None,
    overwrite: bool = False,
    resume_anyway: bool = False,
) -> Run:
    """Fine-tune a pretrained backbone on data; write the run folder.

    Whatever is None, the toolkit decides; its choices and their reasons are in `run.json`.

    Args:
        data: `Splits` from `load_images`, `load_table` or `load_dataset`, or what `load_dataset` takes.
        backbone: What `load_backbone` takes, or what it gave.
        out: Run folder. An unfinished run of the same request found there goes on.
        head: Class or function from the number of features to a module; see `finetune.model.heads`.
        loss: Function of (outputs, targets) giving a mean over the examples; by default the task's own.
        metrics: Function of (outputs, targets) as numpy arrays giving {name: number}, in place of the task's own.
        plan: Stages; by default the head first, then everything.
        groups: Layer groups of one's own, from `layer_groups(pretrained, spec=…)`.
        minutes: Time that training may take; it sets the length of the schedule.
        epochs: Passes over the training rows, in all stages together.
        lr: Peak learning rate of the head; the groups below have less.
        batch_size: Examples an optimizer step, over all processes.
        image_size: Pixels of a side; by default the checkpoint's.
        settings: Any other dial of `Settings` by name, such as {"span": 1.0}.
        seed: Same seed, same run.
        save_minutes: Time between checkpoints, of which the last two are kept until the run ends; more of it where
            they would take more than a twentieth of the time.
        save_steps: Optimizer steps between checkpoints, in addition.
        trackers: "tensorboard", "trackio", "wandb" or another tracker that accelerate knows, or several; see
            `finetune.train.trackers`.
        overwrite: Replace another run in `out`.
        resume_anyway: Go on with an unfinished run in `out` that was begun with other data or options.

    Ctrl-C and SIGTERM end it after the step that runs, and save it; the same request goes on from there.

    Raises:
        DataError: The data cannot be read, or training on it would be meaningless.
        BackboneError: The backbone cannot be loaded or does not fit.
        PlanError: Contradicting settings, groups or stages.
        RunError: `out` cannot be used.
    """
    started = time.monotonic()
    if minutes is not None and (plan is not None or epochs is not None or "epochs" in (settings or {})):
        raise PlanError("minutes: sets the number of epochs, which epochs= or plan= set too; give one of them")
    given = {"epochs": epochs, "lr": lr, "batch_size": batch_size, **(settings or {})}
    tracked = check_names(trackers)
    processes = start_processes()
    if minutes is not None and processes.sharded:
        raise PlanError("minutes: is measured on one device, and this model is spread over several; give epochs")
    say = Console(silent=not processes.is_main)

    splits = data if isinstance(data, Splits) else load_dataset(data, seed=seed)
    for line in data_lines(splits):
        say(line)
    folder = Path(out)
    if isinstance(backbone, Pretrained) and (head is not None or image_size is not None):
        raise DataError("fit: a loaded backbone has its head and image size already; give them to load_backbone")
    name = backbone.name if isinstance(backbone, Pretrained) else str(backbone)
    if isinstance(backbone, nn.Module):
        name = type(backbone).__name__
    identity = identity_of(splits, name, given, plan, seed, minutes=minutes, image_size=image_size)

    def opened() -> bool:
        take(folder)
        try:
            return open_folder(folder, identity, overwrite=overwrite, resume_anyway=resume_anyway)
        except RunError:
            release(folder)
            raise

    resuming = processes.first(opened)

    setup_began = time.monotonic() - started
    with ExitStack() as stack:
        stack.push(lambda kind, *_: release(folder) if kind is not None else None)  # others may write to it then
        ready = prepare(
            splits, backbone, processes, stack, given=given, head=head, loss=loss, plan=plan, groups=groups,
            minutes=minutes, image_size=image_size, seed=seed, started=started, say=say,
            before=read_record(folder)["settings"] if resuming else None,
        )  # fmt: skip
        pretrained, groups, adapter, processes = ready.pretrained, ready.groups, ready.adapter, ready.processes
        trained = processes.shard(pretrained, groups)
        record = starting_record(splits, pretrained, ready.settings, identity, processes.count, seed)
        curves = Trackers(tracked if processes.is_main else (), folder, say, described(record))
        stack.callback(curves.close)
        trainer = Trainer(
            trained,
            splits,
            groups,
            ready.plan,
            ready.settings,
            folder=folder,
            loss=ready.loss,
            processes=processes,
            seed=seed,
            own_metrics=metrics,
            solvable=ready.solvable,
            save_minutes=save_minutes,
            save_steps=save_steps,
            say=say,
            bar=say.step,
            trackers=curves,
        )
        if processes.is_main:
            write_record(folder, record)
            splits.report.left_out_csv(folder / "left_out.csv")
        test, began = None, time.monotonic()
        unscale = scale_outputs(trained, *ready.scale) if ready.scale is not None else None
        try:
            pretrained.info["trained"] = True  # and so has other weights than those of its name from here on
            outcome = trainer.run()
            train_seconds = time.monotonic() - began - outcome.evaluate_seconds - trainer.head_seconds
            if outcome.status != "finished":
                say(f"Stopped   {outcome.why}; the weights of {outcome.kept} are kept")
            degrees, balance = 1.0, None
            if ready.linear and loss is None and metrics is None and applies(outcome.valid, splits.task):
                layer = cast(nn.Linear, trained.model.get_submodule(ready.linear))
                valid, degrees, balance = into_head(layer, outcome.valid, splits, ready.settings, say)
                outcome = replace(outcome, valid=valid)
            if splits.test is not None:
                test = trainer.evaluate(splits.test)
                curves.log("test", test.metrics, trainer.progress.step)
        finally:
            say.close()
            if unscale is not None:  # also after Ctrl-C: in a notebook the same model may be given again
                unscale()
        if processes.sharded:
            put_back(trained.model, pretrained.model)
    exporting = time.monotonic()
    if processes.is_main:
        try:
            save_pretrained(pretrained, splits.task, folder / "model")
            if adapter is not None:
                save_adapter(adapter, pretrained, splits.task, folder / "model", folder / "adapter")
            if splits.test is not None and test is not None:
                test_predictions(folder / "predictions" / "test.csv", splits.test, splits.task, test)
            held_out: dict[str, tuple[Any, Any]] = {"valid": (splits.valid, outcome.valid)}
            held_out |= {"test": (splits.test, test)} if splits.test is not None else {}
            keep_mistakes(folder / "predictions", splits.task, held_out)
        except (OSError, SafetensorError) as error:
            release(folder)
            raise RunError(
                f"{folder}: the model cannot be written ({error}); make room, and give the same command again: it goes "
                "on from the last checkpoint"
            ) from None
    seconds = {
        "total": time.monotonic() - started,
        "setup": setup_began + ready.setup_seconds,
        "probes": ready.probe_seconds,
        "head": trainer.head_seconds,
        "train": train_seconds,
        "evaluate": trainer.evaluate_seconds,
        "export": time.monotonic() - exporting,
    }
    record |= {"settings": trainer.settings.table()}  # as training has changed them
    record |= {"adapter": adapter.to_json()} if adapter is not None else {}
    record |= describe_run(outcome, test, trainer.plan, len(splits.train), seconds, processes.device) | {
        "versions": versions(),
        "calibration": described_calibration(
            1.0 if ready.settings.balance else degrees, outcome.valid, test, splits.task
        ),
        "balance": balance.to_json(ready.settings.balance) if balance is not None else None,
    }
    if processes.is_main:
        write_record(folder, record)
        if adapter is not None:
            write_card(folder / "adapter")
        drop_checkpoints(folder)
        release(folder)
    processes.wait()
    for line in result_lines(record, folder):
        say(line)
    return Run(folder, record, pretrained, splits.task, outcome.history, processes.is_main)


def into_head(
    layer: nn.Linear, valid: Evaluation, splits: Splits, settings: Settings, say: Callable[[str], None]
) -> tuple[Evaluation, float, Balance]:
    """Fold what the validation rows say into the last linear layer: the temperature, and the classes' shares if asked
    for. The evaluation as the model is then, the temperature (1: none), and what the shares are worth."""
    degrees = 1.0
    if settings.calibrate:
        degrees = temperature(valid)
        fold(layer, degrees)
        valid = cooled(valid, splits.task, degrees)
    balance = measure(splits.train["target"][:], valid, splits.task)
    if settings.balance:
        fold_shares(layer, balance.log_share_C)
        valid = evened(valid, splits.task, balance.log_share_C)
    if settings.balance or (balance.ratio >= UNEVEN and layer.bias is not None):  # what the user could ask for
        say(balance.line(applied=settings.balance))
    return valid, degrees, balance

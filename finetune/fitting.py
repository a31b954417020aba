"""The whole line on one page: data, backbone and choices go in, a trained `Run` comes out."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from finetune.data.loaders import epoch_order, make_loader
from finetune.data.sources import load_dataset
from finetune.data.splits import Splits
from finetune.data.task import default_loss
from finetune.errors import DataError, PlanError, RunError
from finetune.model.backbones import load_backbone
from finetune.model.convex import linear_head_name
from finetune.model.groups import LayerGroups, layer_groups
from finetune.model.heads import Head
from finetune.model.lora import adapters
from finetune.model.outputs import scale_outputs, scaled_loss, target_scale
from finetune.model.pretrained import Pretrained
from finetune.model.sharding import put_back
from finetune.output.adapter import save_adapter, write_card
from finetune.output.export import save_pretrained
from finetune.output.record import describe_run, identity_of, starting_record, test_predictions, versions
from finetune.plan.probes import epochs_in, seconds_per_step
from finetune.plan.rates import geometric_rates
from finetune.plan.settings import Settings, choose_settings, for_adapters, from_solved_head
from finetune.plan.stages import Plan
from finetune.run import Run
from finetune.train.evaluate import Loss, Metrics
from finetune.train.folder import open_folder, read_record, release, take, write_record
from finetune.train.processes import Processes, native_precision, start_processes
from finetune.train.trainer import Trainer, steps_per_epoch


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
    processes = start_processes()
    if minutes is not None and processes.sharded:
        raise PlanError("minutes: is measured on one device, and this model is spread over several; give epochs")
    say = print if processes.is_main else _silent

    splits = data if isinstance(data, Splits) else load_dataset(data, seed=seed)
    for number, line in enumerate(splits.report.lines()):
        say(f"{'Data' if number == 0 else '':<9} {line}")
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

    if not isinstance(backbone, Pretrained):
        backbone = load_backbone(backbone, splits.task, head=head, image_size=image_size, seed=seed)
    pretrained = backbone
    if not processes.sharded:  # the parts of one that is go to the device instead
        pretrained.model.to(processes.device)
    groups = groups if groups is not None else layer_groups(pretrained)
    weights = sum(group.size for group in groups)
    say(f"Backbone  {name}, {weights / 1e6:.3g} M parameters, {len(groups)} layer groups")

    loss_function = loss if loss is not None else default_loss(splits.task)
    scale = target_scale(splits.train["target"][:]) if loss is None and splits.task.kind == "regression" else None
    if scale is not None:
        loss_function = scaled_loss(scale[1])
    chosen = choose_settings(
        splits.task.modality, len(splits.train), precision=native_precision(pretrained.model), given=given
    )
    processes = replace(processes, precision=chosen.precision)
    sample = _sample(pretrained, splits)
    layer, reason = _solvable(pretrained, groups, sample, chosen, loss, plan)
    if layer is None:
        chosen = chosen.changed(reason, by="rule", solve_head=False)
    elif plan is None:
        chosen = from_solved_head(chosen, splits.task.modality, len(splits.train))
    chosen = for_adapters(chosen)
    with adapters(pretrained, groups, chosen.lora, sample, seed=seed) as (groups, adapter):
        if adapter is not None:
            say(f"Adapters  {adapter}")
        setup_seconds = time.monotonic() - started
        if minutes is not None and resuming:  # a resumed run keeps the length that it began with
            before = read_record(folder)["settings"]
            dials = {
                dial: before[dial]["value"] for dial in ("epochs", "head_epochs") if before[dial]["by"] == "measured"
            }
            chosen = chosen.changed("measured when the run began", **dials)
        elif minutes is not None:
            left = 60.0 * minutes - setup_seconds
            chosen = _fit_into(left, chosen, pretrained, splits, groups, loss_function, processes)
        per_epoch = steps_per_epoch(len(splits.train), chosen.batch_size)
        rates = geometric_rates(len(groups), chosen.lr, chosen.span)
        resolved = (plan if plan is not None else chosen.default_plan(len(groups))).resolve(groups, rates, per_epoch)
        probe_seconds = time.monotonic() - started - setup_seconds
        say(
            f"Chosen    peak rate {chosen.lr:.2g} head -> {rates[0]:.2g} stem, {chosen.epochs:g} epochs, "
            f"batch {chosen.batch_size}, {chosen.precision} on {processes.device.type}"
        )
        for number, line in enumerate(str(resolved).splitlines()):
            say(f"{'Plan' if number == 0 else '':<9} {line}")

        trained = processes.shard(pretrained, groups)
        trainer = Trainer(
            trained,
            splits,
            groups,
            resolved,
            chosen,
            folder=folder,
            loss=loss_function,
            processes=processes,
            seed=seed,
            own_metrics=metrics,
            solvable=layer,
            save_minutes=save_minutes,
            save_steps=save_steps,
            say=say,
        )
        record = starting_record(splits, pretrained, chosen, identity, processes.count, seed)
        if processes.is_main:
            write_record(folder, record)
            splits.report.left_out_csv(folder / "left_out.csv")
        test, began = None, time.monotonic()
        unscale = scale_outputs(trained, *scale) if scale is not None else None
        try:
            pretrained.info["trained"] = True  # and so has other weights than those of its name from here on
            outcome = trainer.run()
            train_seconds = time.monotonic() - began - outcome.evaluate_seconds - trainer.head_seconds
            if outcome.status != "finished":
                say(f"Stopped   {outcome.why}; the weights of {outcome.kept} are kept")
            if splits.test is not None:
                test = trainer.evaluate(splits.test)
        finally:
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
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"{folder}: the model cannot be written ({error}); make room, and give the same command again: it goes "
                "on from the last checkpoint"
            ) from None
    seconds = {
        "total": time.monotonic() - started,
        "setup": setup_seconds,
        "probes": probe_seconds,
        "head": trainer.head_seconds,
        "train": train_seconds,
        "evaluate": trainer.evaluate_seconds,
        "export": time.monotonic() - exporting,
    }
    record |= {"adapter": adapter.to_json()} if adapter is not None else {}
    record |= describe_run(outcome, test, trainer.plan, len(splits.train), seconds, processes.device) | {
        "versions": versions()
    }
    if processes.is_main:
        write_record(folder, record)
        if adapter is not None:
            write_card(folder / "adapter")
        trainer.drop_checkpoints()
        release(folder)
    processes.wait()
    for line in _result_lines(record, folder):
        say(line)
    return Run(folder, record, pretrained, splits.task, outcome.history, processes.is_main)


def _solvable(
    pretrained: Pretrained,
    groups: LayerGroups,
    sample: dict[str, torch.Tensor],
    settings: Settings,
    loss: Loss | None,
    plan: Plan | None,
) -> tuple[str | None, str]:
    """The linear layer whose optimum training starts from, or None and why it does not."""
    asked = settings.reasons["solve_head"][1] == "user"
    if not settings.solve_head:
        return None, settings.reasons["solve_head"][0]
    if loss is not None:
        return None, "a loss of one's own is trained by gradients"
    if not asked and (plan is not None or settings.reasons["head_epochs"][1] == "user"):
        return None, "the user gives the head a stage of its own"
    return linear_head_name(pretrained, groups, sample)


def _sample(pretrained: Pretrained, splits: Splits) -> dict[str, torch.Tensor]:
    """Inputs of two training rows, on the model's device."""
    loader = make_loader(splits.train, splits.task, pretrained.processor, [[0, len(splits.train) - 1]], train=False)
    return next(iter(loader)).to(next(pretrained.model.parameters()).device).inputs


def _fit_into(
    seconds: float,
    settings: Settings,
    pretrained: Pretrained,
    splits: Splits,
    groups: LayerGroups,
    loss: Loss,
    processes: Processes,
) -> Settings:
    """Settings whose epochs fill the time, a quarter of them for the head unless the user gave its length."""
    rows = epoch_order(len(splits.train), settings.batch_size, seed=0, epoch=0)[0]
    batch = next(iter(make_loader(splits.train, splits.task, pretrained.processor, [rows], train=True, workers=0)))
    full, head = (
        seconds_per_step(pretrained, groups, batch, loss, open_from=first, autocast=processes.autocast)
        for first in (0, len(groups) - 1)
    )
    per_epoch = steps_per_epoch(len(splits.train), settings.batch_size)
    validation = head * len(splits.valid) / settings.batch_size / processes.count
    solving = head * len(splits.train) / settings.batch_size / processes.count if settings.solve_head else 0.0
    epochs = epochs_in(
        0.9 * (seconds - solving - validation),
        steps_per_epoch=per_epoch,
        step_seconds=full / processes.count,
        head_step_seconds=head / processes.count,
        evaluate_seconds=validation,
        head_share=0.0 if settings.solve_head else 0.25,
    )
    epochs = float(torch.tensor(processes.gather([epochs])).min())
    reason = f"{full:.3g} s a step, {seconds / 60:.2g} minutes left for training"
    dials: dict[str, Any] = {"epochs": round(epochs, 3)}
    if settings.reasons["head_epochs"][1] != "user" and not settings.solve_head:
        dials["head_epochs"] = round(epochs / 4.0, 3)
    return settings.changed(reason, **dials)


def _result_lines(record: dict[str, Any], folder: Path) -> list[str]:
    split = "test" if "test" in record["metrics"] else "valid"
    figures = ", ".join(
        f"{name} {value:.4g}" for name, value in record["metrics"][split].items() if isinstance(value, int | float)
    )
    return [
        f"Result    {split}: {figures}   ({record['seconds']['total']:.0f} s, weights: {record['kept']})",
        f"Saved     {folder / 'model'}",
    ]


def _silent(_: str) -> None:
    """What processes other than the first say."""

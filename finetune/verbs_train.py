"""The words after `finetune fit`, `inspect` and `range-test` go in; a run, a table of layer groups, or a rate come out.
`--help` costs no torch."""

from pathlib import Path
from typing import Any

from tyro.conf import Positional

from finetune.errors import DataError

BACKBONES = {"image": "timm/convnext_nano.in12k_ft_in1k", "text": "answerdotai/ModernBERT-base"}


def fit(
    data: Positional[str],
    backbone: Positional[str | None] = None,
    *,
    out: Path | None = None,
    label: tuple[str, ...] = (),
    text: str | None = None,
    text_pair: str | None = None,
    image: str | None = None,
    group: str | None = None,
    test: str | None = None,
    minutes: float | None = None,
    epochs: float | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    trackers: tuple[str, ...] = (),
    push_to_hub: str | None = None,
    overwrite: bool = False,
    resume_anyway: bool = False,
) -> None:
    """Fine-tune a backbone on images or texts: what to do is told by the data.

    Args:
        data: Folder with one sub-folder a class, a table, a folder of tables, or the name of a Hub data set.
        backbone: timm or transformers checkpoint, or a folder; by default a small one.
        out: Run folder, where an interrupted run goes on; by default in runs/.
        label: Column of the label, or several; by default found.
        text: Column of the text; by default found.
        text_pair: Column of the second text of a pair.
        image: Column of the image path; by default found.
        group: Column, such as a patient, whose rows stay together.
        test: Rows to report on; by default the `test` part of the data.
        minutes: Time that training may take.
        epochs: Passes over the training rows.
        lr: Peak learning rate of the head.
        batch_size: Examples a step, over all processes.
        seed: Same seed, same run.
        trackers: tensorboard, trackio, wandb, ... to log to.
        push_to_hub: Also upload the model to this repository (owner/name).
        overwrite: Replace another run in `out`.
        resume_anyway: Go on with an unfinished run that was begun differently.
    """
    import finetune

    splits = _splits(data, label, text, text_pair, image, test, seed, group)
    run = finetune.fit(
        splits,
        backbone or BACKBONES[splits.task.modality],
        out=out or Path("runs") / (Path(data.rstrip("/")).stem or "run"),
        minutes=minutes,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        seed=seed,
        trackers=trackers,
        overwrite=overwrite,
        resume_anyway=resume_anyway,
    )
    page = run.write_report()
    if push_to_hub:
        print(run.push_to_hub(push_to_hub))
    if run.is_main:
        print(f"Report    {page}\nNext      finetune predict {run.folder} NEW_DATA --out predictions.csv")


def inspect(
    backbone: Positional[str],
    *,
    task: str = "single_label",
    modality: str | None = None,
    labels: int = 2,
    lr: float = 1e-3,
    span: float = 10.0,
    image_size: int | None = None,
) -> None:
    """Show a backbone's layer groups in order of execution, with weights, peak rates, and memory to train from each on.

    Args:
        backbone: timm or transformers checkpoint, a name or a folder; fractals and minilm need no network.
        task: single_label, multi_label, regression or tokens.
        modality: image or text, for a backbone that can be either.
        labels: Outputs of the new head.
        lr: Peak rate of the head.
        span: That over the stem's.
        image_size: Pixels of a side; by default the checkpoint's.
    """
    from finetune.data.task import Task
    from finetune.errors import BackboneError
    from finetune.model.backbones import load_backbone
    from finetune.model.groups import layer_groups
    from finetune.plan.rates import geometric_rates

    kinds = {
        "single_label": "single_label_classification",
        "multi_label": "multi_label_classification",
        "regression": "regression",
        "tokens": "token_classification",
    }
    if task not in kinds:
        raise DataError(f"task: {task!r} is not one of {', '.join(kinds)}")
    names = tuple(f"label{i}" for i in range(labels))
    pretrained = None
    for kind in [modality] if modality else ["image", "text"]:
        try:
            wanted = Task(kinds[task], str(kind), names)  # type: ignore[arg-type]
            pretrained = load_backbone(backbone, wanted, image_size=image_size if kind == "image" else None)
            break
        except BackboneError:
            if modality or kind == "text":
                raise
    assert pretrained is not None
    groups = layer_groups(pretrained)
    rates = geometric_rates(len(groups), lr, span)
    width = max(len(group.name) for group in groups)
    print(f"{backbone}: {pretrained.family}, {pretrained.modality}, {sum(g.size for g in groups) / 1e6:.3g} M weights")
    print(f"{'':>4}  {'group':<{width}}  {'weights':>12}  {'peak rate':>9}  {'to train from here on':>21}")
    everything = sum(group.size for group in groups)
    for i, (group, rate) in enumerate(zip(groups, rates, strict=True)):
        trained = sum(above.size for above in groups[i:])
        memory = (4 * everything + 12 * trained) / 2**20
        print(f"{i:>4}  {group.name:<{width}}  {group.size:>12,}  {rate:>9.1e}  {memory:>17,.0f} MiB")
    print("Memory is that of weights, gradients and Adam's two moments in fp32, without activations.")
    print("\n".join(groups.notes))


def plan(
    data: Positional[str],
    backbone: Positional[str | None] = None,
    *,
    label: tuple[str, ...] = (),
    text: str | None = None,
    text_pair: str | None = None,
    image: str | None = None,
    group: str | None = None,
    test: str | None = None,
    minutes: float | None = None,
    epochs: float | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> None:
    """Show what `finetune fit` would do with this data: what is wrong with it, every dial and its reason, the stages
    and how long they would take. Nothing is trained and nothing written.

    Args:
        data: As for `finetune fit`.
        backbone: As for `finetune fit`.
        label: Column of the label, or several; by default found.
        text: Column of the text; by default found.
        text_pair: Column of the second text of a pair.
        image: Column of the image path; by default found.
        group: Column, such as a patient, whose rows stay together.
        test: Rows to report on; by default the `test` part of the data.
        minutes: Time that training may take.
        epochs: Passes over the training rows.
        lr: Peak learning rate of the head.
        batch_size: Examples a step, over all processes.
        seed: Of the drawn validation part.
    """
    from contextlib import ExitStack

    from finetune.console import clock
    from finetune.preparing import data_lines, prepare, stage_seconds
    from finetune.train.processes import start_processes

    splits = _splits(data, label, text, text_pair, image, test, seed, group)
    print("\n".join(data_lines(splits)))
    given = {"epochs": epochs, "lr": lr, "batch_size": batch_size}
    with ExitStack() as stack:
        ready = prepare(
            splits, backbone or BACKBONES[splits.task.modality], start_processes(), stack, given=given, minutes=minutes,
            seed=seed,
        )  # fmt: skip
        seconds = stage_seconds(ready, splits)
    named = ", ".join(f"{s.name} {clock(round(t))}" for s, t in zip(ready.plan.stages, seconds, strict=True))
    more = f"; up to {2**ready.settings.doublings} times that while it helps" if ready.settings.doublings else ""
    print(f"Time      about {clock(round(sum(seconds)))} of steps ({named}), and the validations{more}")
    if ready.solvable is not None:
        print("Baseline  a linear probe on frozen features comes first, from one pass over the data")
    print("\nAll dials")
    for dial, entry in ready.settings.table().items():
        value = f"{entry['value']:g}" if isinstance(entry["value"], float) else str(entry["value"])
        print(f"  {dial:<17} {value:<14} {entry['reason'] if entry['by'] != 'user' else 'as asked for'}")


def range_test(
    data: Positional[str],
    backbone: Positional[str | None] = None,
    *,
    label: tuple[str, ...] = (),
    text: str | None = None,
    text_pair: str | None = None,
    image: str | None = None,
    steps: int = 100,
    lowest: float = 1e-7,
    highest: float = 1.0,
    span: float = 10.0,
    batch_size: int = 16,
    open_from: int = 0,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Train a hundred steps at a climbing rate, and say where the loss runs away. Nothing is kept.

    Args:
        data: As for `finetune fit`.
        backbone: As for `finetune fit`.
        label: Column of the label, or several; by default found.
        text: Column of the text; by default found.
        text_pair: Column of the second text of a pair.
        image: Column of the image path; by default found.
        steps: Of the whole way.
        lowest: First rate of the head.
        highest: Last rate of the head.
        span: Rate of the head over the stem's.
        batch_size: Examples a step.
        open_from: First layer group that trains (0: all, -1: the head alone).
        seed: Of the order of rows.
        out: Also draw the losses into this file (.png, .svg, .pdf).
    """
    import torch

    import finetune
    from finetune.data.loaders import epoch_order, make_loader
    from finetune.data.task import default_loss
    from finetune.model.groups import set_mode, set_trainable

    splits = _splits(data, label, text, text_pair, image, None, seed)
    pretrained = finetune.load_backbone(backbone or BACKBONES[splits.task.modality], splits.task, seed=seed)
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    pretrained.model.to(device)
    groups = finetune.layer_groups(pretrained)
    set_trainable(pretrained.model, groups, open_from)
    set_mode(pretrained.model, groups, open_from)
    order = epoch_order(len(splits.train), batch_size, seed=seed, epoch=0)
    loader = make_loader(splits.train, splits.task, pretrained.processor, order, train=True, seed=seed)
    plain = default_loss(splits.task)

    def loss(_: torch.nn.Module, batch: Any) -> torch.Tensor:
        batch = batch.to(device)
        return plain(pretrained.forward(batch.inputs).float(), batch.targets)

    parts = finetune.param_groups(pretrained.model, groups, finetune.geometric_rates(len(groups), 1.0, span), 0.0)
    found = finetune.range_test(
        pretrained.model, loader, loss, lowest=lowest, highest=highest, steps=steps, groups=parts
    )
    print(found)
    print(
        f"as lr of the head, with span {span:g}; the default is measured from a solved head, this test from a new one"
    )
    if out is not None:
        from finetune.output.plots import draw_range_test

        print(draw_range_test(found, out))


def _splits(
    data: str,
    label: tuple[str, ...],
    text: str | None,
    text_pair: str | None,
    image: str | None,
    test: str | None,
    seed: int,
    group: str | None = None,
) -> Any:
    """The data, with the columns that were named."""
    from finetune.data.sources import load_table

    columns = {"text": text, "text_pair": text_pair, "image": image, "test": test, "group": group}
    labels = None if not label else label[0] if len(label) == 1 else list(label)
    return load_table(data, label=labels, seed=seed, **{k: v for k, v in columns.items() if v is not None})  # type: ignore[arg-type]

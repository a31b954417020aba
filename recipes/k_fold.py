"""K-fold cross-validation: a score over all rows, and the rows whose labels are likely wrong.

    python recipes/k_fold.py --data photos/
    python recipes/k_fold.py --data scans.csv --group patient --backbone timm/resnet50.a1_in1k

Each row is predicted by a model that has not seen it. Where such a model finds the given label improbable, the row is
hard, or its label is wrong: `label_errors.csv` lists these, the worst first.
"""

from pathlib import Path

import finetune


def main(
    data: str, backbone: str = "timm/convnext_nano.in12k_ft_in1k", *, out: Path = Path("runs/k_fold"), folds: int = 5,
    group: str | None = None, minutes: float | None = None, epochs: float | None = None, lr: float | None = None,
    batch_size: int | None = None, seed: int = 0, save_minutes: float = 1.0, overwrite: bool = False,
) -> None:  # fmt: skip
    """Train and predict on k folds of images or texts with one label each; write scores and likely label errors.

    Args:
        data: Folder with one sub-folder a class, a table, or the name of a Hub data set. A test part is not used.
        backbone: timm or transformers checkpoint: a name, or a local folder.
        out: Folder of the tables and of the runs, a folder a fold. The same command goes on where it was interrupted.
        folds: How many.
        group: Column of a table; rows with the same value, such as a patient, are never on both sides.
        minutes: Time that training may take, each fold.
        epochs: Passes over the training rows, each fold.
        lr: Peak learning rate of the head; the layers below have less.
        batch_size: Examples an optimizer step, over all processes.
        seed: Same seed, same folds and runs.
        save_minutes: Time between checkpoints.
        overwrite: Begin anew with the folds that are there.
    """
    from finetune.data.folds import folds as divide
    from finetune.data.folds import group_column
    from finetune.output.label_errors import label_errors, out_of_fold, read_out_of_fold, write_label_errors
    from finetune.train.processes import start_processes

    first = start_processes().is_main
    splits = finetune.load_dataset(data, seed=seed)
    groups = group_column(data, group) if group else None
    parts = []
    for number, part in enumerate(divide(splits, folds, groups=groups, seed=seed), start=1):
        table = out / f"fold{number}_of_{folds}_{part.fingerprint}.csv"  # of just these rows
        if overwrite or not table.exists():
            run = finetune.fit(
                part, backbone, out=out / f"fold{number}", minutes=minutes, epochs=epochs, lr=lr, batch_size=batch_size,
                seed=seed, save_minutes=save_minutes, overwrite=overwrite,
            )  # fmt: skip
            parts.append(out_of_fold(run.pretrained, part))
            if first:
                parts[-1].write(table)
        else:
            parts.append(read_out_of_fold(table, part.task))
            if first:
                print(f"Fold      {number} of {folds} is there already: {table}")
    if not first:
        return
    found = sum(parts[1:], parts[0])
    errors = label_errors(found)
    found.write(out / "out_of_fold.csv")
    write_label_errors(errors, out / "label_errors.csv")
    scores = [part.metrics["accuracy"] for part in parts]
    print(
        f"Result    out-of-fold accuracy {found.metrics['accuracy']:.1%} over {len(found.ids)} rows, "
        f"{min(scores):.1%} to {max(scores):.1%} by fold, log-loss {found.metrics['log_loss']:.3f}"
    )
    print(f"Labels    {len(errors)} are likely wrong -> {out / 'label_errors.csv'}")
    for error in errors[:5]:
        print(f"          {error.id}: {error.given}, likely {error.likely} ({error.confidence:.0%})")


if __name__ == "__main__":
    finetune.cli(main)

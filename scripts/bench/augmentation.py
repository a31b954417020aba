"""Whether stronger augmentation is worth it in a short fine-tuning: test accuracy and log-loss of four arms, and JSON.

    python scripts/bench/augmentation.py --data ../shared/data       # about ten minutes of a core

200 rows, MobileNetV2 at 96 px, everything else as `fit` chooses it: crops and flips; with TrivialAugment after them
(Mueller & Hutter 2021); mixup of the batch (Zhang et al. 2018, alpha 0.2); CutMix (Yun et al. 2019, alpha 1).
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from datetime import date
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "bench_augmentation.json"
SETS, SEEDS, ARMS = ("hymenoptera", "cifar10_small"), (0, 1), ("plain", "trivial", "mixup", "cutmix")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path[:0] = [str(HERE), str(HERE.parents[1])]
    from dials import Task
    from dials_tasks import Worker

    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    done = {(row["set"], row["seed"], row["arm"]) for row in rows}
    for name in SETS:
        for seed in SEEDS:
            worker = Worker(Task(name, "torch", "small"), seed, options.data)
            for arm in ARMS:
                if (name, seed, arm) not in done:
                    rows.append({"set": name, "seed": seed, "arm": arm, **measured(worker, arm, seed)})
                    print(rows[-1], flush=True)
                    found = {"script": "scripts/bench/augmentation.py", "date": date.today().isoformat(), "rows": rows}
                    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
            worker.close()


def measured(worker: Any, arm: str, seed: int) -> dict[str, float]:
    """Test scores of one run."""
    import dials_tasks

    import finetune
    from finetune.data import images
    from finetune.train.trainer import Trainer

    with redirect_stdout(StringIO()), ExitStack() as stack:
        stack.enter_context(patch.object(finetune.fitting, "save_pretrained"))
        if arm == "trivial":
            stack.enter_context(patch.object(images, "train_transform", trivial(images.train_transform)))
        elif arm != "plain":
            stack.enter_context(patch.object(Trainer, "step", mixed(Trainer.step, arm)))
        run = finetune.fit(
            worker.splits, worker.load(), out=worker.folder / "run", seed=seed, overwrite=True, save_minutes=1e9
        )
    return dials_tasks.figures(run.metrics["test"])


def trivial(plain: Callable[..., Any]) -> Callable[..., Any]:
    """The usual crop and flip, then one random operation of random strength."""
    import numpy as np
    import torch
    from PIL import Image
    from torchvision.transforms import TrivialAugmentWide

    operation = TrivialAugmentWide()

    def transform(image: Any, pre: Any, generator: Any) -> Any:
        cropped = plain(image, pre, generator)
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        return operation(Image.fromarray(np.asarray(cropped)))

    return transform


def mixed(plain: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """A training step on pairs of its examples and of their labels."""
    import numpy as np
    import torch

    def step(trainer: Any, micro_batches: list[Any], point: Any) -> None:
        number, classes = trainer.progress.step, len(trainer.splits.task.labels)
        generator = torch.Generator().manual_seed(number)
        alpha = 0.2 if kind == "mixup" else 1.0
        share = float(np.random.default_rng(number).beta(alpha, alpha))
        changed = []
        for batch in micro_batches:
            [(key, images)] = batch.inputs.items()
            other = torch.randperm(len(images), generator=generator)
            if kind == "mixup":
                of_first, pictures = share, share * images + (1 - share) * images[other]
            else:
                height, width = images.shape[-2:]
                tall, wide = (int(size * (1 - share) ** 0.5) for size in (height, width))
                y, x = (int(torch.randint(size, (1,), generator=generator)) for size in (height, width))
                rows = slice(max(0, y - tall // 2), min(height, y + tall // 2))
                columns = slice(max(0, x - wide // 2), min(width, x + wide // 2))
                pictures = images.clone()
                pictures[:, :, rows, columns] = images[other][:, :, rows, columns]
                of_first = 1 - pictures[0, 0, rows, columns].numel() / (height * width)
            one_hot = torch.nn.functional.one_hot(batch.targets, classes).float()
            targets = of_first * one_hot + (1 - of_first) * one_hot[other]
            changed.append(replace(batch, inputs={key: pictures}, targets=targets))
        plain(trainer, changed, point)

    return step


if __name__ == "__main__":
    main()

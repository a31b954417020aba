"""A task, an arm and dials go in; one run through `finetune.fit` and its figures come out. The heavy half of dials.py.

An arm says how `fit` is called. Recipes of others are their rates, stages, schedule and optimizer, on the same rows,
backbone, batches, head layer and number of examples as ours; what is not theirs to say is as ours.
"""

import math
import pkgutil
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import pandas
import timm  # noqa: F401  # before the fork of the workers, as are the others
import torch
import transformers  # noqa: F401
from dials import ABLATIONS, VISION, Task, modality, test_rows
from PIL import Image
from sklearn.datasets import load_digits

import finetune
import finetune.fitting
from finetune.data.splits import Splits
from finetune.plan.onecycle import Flat, LinearDecay, OneCycle
from finetune.plan.rates import param_groups
from finetune.plan.settings import DEFAULTS
from finetune.plan.stages import Plan, Stage, gradual_unfreezing
from finetune.train.keeping import keep_best
from finetune.train.selection import clearly_better, head_is_better
from finetune.train.trainer import Trainer

for package in (finetune.data, finetune.model, finetune.plan, finetune.train):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        import_module(module.name)  # as it is now, whatever is changed in the hours to come

IMAGE_SIZE, TOKENS, TEST_DIGITS = 96, 64, 400
COSINE = OneCycle(pct_start=1e-6, momentum=None)  # a rise of no step
BACKBONES = {
    "torch": "weights/mobilenetv2_100_torch",
    "insect": "weights/mobilenetv2_100_inat_insect",
    "llama": "weights/llama_stories260k",
}


@dataclass(frozen=True)
class Staircase:
    """BiT's hyper-rule: up over a fifth, a tenth of the rate from 2, 3 and 4 fifths on (Kolesnikov et al. 2020)."""

    def at(self, step: int, steps: int) -> tuple[float, float | None]:
        part = 5.0 * (step + 1) / steps
        return (part if part < 1.0 else 0.1 ** max(0, math.ceil(part) - 2)), None


def optimizer(kind: str, decay: float) -> Callable[[Trainer], Any]:
    """In place of `Trainer.new_optimizer`."""

    def new(trainer: Trainer) -> Any:
        groups = param_groups(trainer.model, trainer.groups, trainer.plan.stages[-1].rates, decay)
        if kind == "sgd":
            return torch.optim.SGD(groups, momentum=0.9, fused=True)
        if kind == "prodigy":
            from prodigyopt import Prodigy

            return Prodigy(groups, lr=1.0, weight_decay=decay)
        from schedulefree import AdamWScheduleFree

        made = AdamWScheduleFree(groups, betas=(0.9, 0.99), warmup_steps=trainer.plan.steps // 10)
        made.train()
        return made

    return new


def averaged(method: Callable[..., Any], *, back: bool) -> Callable[..., Any]:
    """Schedule-Free evaluates other weights than it trains."""

    def wrapped(trainer: Any, *args: Any, **options: Any) -> Any:
        trainer.optimizer.eval()
        result = method(trainer, *args, **options)
        if back:
            trainer.optimizer.train()
        return result

    return wrapped


def call(arm: str, dials: Mapping[str, Any], kind: str, groups: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of `fit` for an arm, and what stands in place of the trainer's own methods and functions.

    Args:
        arm: A name.
        dials: {"lr", "span", ...} of a cell of the grid; {"epochs"} for whoever sees as many examples as ours.
        kind: "image" or "text".
        groups: Layer groups of the backbone.
    """
    settings, epochs, first = dict(dials), dials.get("epochs"), int(kind == "text")
    own: dict[str, Any]
    if arm == "ours":
        return {}, {}
    if arm == "grid":
        return {"settings": settings | {"cycles": 1}}, {}
    if arm in ("no one-cycle", "no momentum cycle"):
        shape = Flat() if arm == "no one-cycle" else OneCycle(DEFAULTS["pct_start"][kind][0], momentum=None)
        style = "head_then_all" if kind == "image" else "all_but_stem"
        plan = gradual_unfreezing(
            groups, dials["epochs"], style=style, head_epochs=0.0, shape=shape, cycles=dials["cycles"]
        )
        return {"plan": plan, "settings": {"solve_head": dials.get("solve_head", True)}}, {}
    if arm in ABLATIONS:
        return {"settings": settings | ABLATIONS[arm]}, {}
    if arm == "probe":
        plan = Plan(Stage(open_from=-1, steps=1))  # of next to no rate
        return {"plan": plan, "lr": 1e-12, "settings": {"solve_head": True, "replay": "off", "ema": False}}, {}
    if arm in ("prodigy", "schedule-free"):  # from our solved head; they replace rate or schedule
        free, own = arm == "schedule-free", {"new_optimizer": optimizer(arm, 0.01)}
        plan = Plan(Stage(open_from=first, epochs=epochs, shape=Flat() if free else COSINE))
        rates = {} if free else {"lr": 1.0, "span": 1.0}
        if free:
            own |= {"remember_epoch": averaged(Trainer.remember_epoch, back=True)}
            own |= {"keep_best": averaged(keep_best, back=False)}
        return {"plan": plan, "settings": {"solve_head": True, "ema": False, **rates}}, own
    plain = {"solve_head": False, "ema": False, "patience": 0, "freeze_batchnorm": False, "span": 1.0}
    if arm.startswith("hf"):  # TrainingArguments as they are
        plan = Plan(Stage(open_from=0, epochs=epochs or 3, shape=LinearDecay()))
        own = {"lr": 5e-5, "weight_decay": 0.0, "betas": (0.9, 0.999), "batch_size": 8}
        return {"plan": plan, "settings": plain | own}, {}
    if arm == "fastai":  # fine_tune(epochs - 1): frozen at the base rate, then half of it, 100 times less at the stem
        assert epochs is not None
        plan = Plan(
            Stage(open_from=-1, epochs=1, lr_scale=2.0, shape=OneCycle(pct_start=0.99)),
            Stage(open_from=0, epochs=epochs - 1, shape=OneCycle(pct_start=0.3, div_factor=5.0)),
        )
        own = {"lr": 1e-3, "span": 100.0, "weight_decay": 0.01, "eps": 1e-5, "clip": 0.0}
        return {"plan": plan, "settings": plain | own}, {}
    if arm == "autogluon":  # its 20 epochs cut to ours; a tenth to climb, then a cosine
        plan = Plan(Stage(open_from=0, epochs=epochs, shape=OneCycle(pct_start=0.1, momentum=None)))
        own = {"lr": 1e-4, "span": 0.9 ** (1 - groups), "weight_decay": 1e-3, "betas": (0.9, 0.999), "patience": 10}
        return {"plan": plan, "settings": plain | own}, {}
    assert arm == "bit", arm
    plan = Plan(Stage(open_from=0, epochs=epochs, shape=Staircase()))
    own = {"lr": 3e-3, "clip": 0.0}
    return {"plan": plan, "settings": plain | own}, {"new_optimizer": optimizer("sgd", 0.0)}


def draw(name: str, rows: int, seed: int, data: Path, out: Path) -> None:
    """Write train and test of a set into a folder: two rows a class and the rest at random; test the same for all."""
    for part, count, drawn in (("train", rows, seed), ("test", test_rows(seed), 0)):
        table = table_of(name, part, data).sample(frac=1.0, random_state=drawn)
        label = table.columns[-1]
        if part == "train" and label == "label":
            order = table.groupby(label).cumcount() >= 2
            table = pandas.concat([table[~order], table[order]])
        table = table.head(count)
        if name not in VISION:
            table.to_csv(out / f"{part}.csv", index=False)
            continue
        for index, (source, folder) in enumerate(table.itertuples(index=False)):
            target = out / part / str(folder)
            target.mkdir(parents=True, exist_ok=True)
            if name == "digits":
                source.save(target / f"{index}.png")
            else:
                shutil.copy(source, target / f"{index}{source.suffix}")


def table_of(name: str, part: str, data: Path) -> pandas.DataFrame:
    """All rows of a part; the label in the last column."""
    if name == "digits":
        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0)).tolist()
        chosen = order[TEST_DIGITS:] if part == "train" else order[:TEST_DIGITS]
        pictures = [Image.fromarray((digits.images[row] * 15.9).astype("uint8")) for row in chosen]
        return pandas.DataFrame({"image": pictures, "label": digits.target[chosen]})
    if name in VISION:
        files = sorted((data / "vision" / name / part).glob("*/*"))
        return pandas.DataFrame({"image": files, "label": [file.parent.name for file in files]})
    return pandas.read_csv(data / "text" / name / f"{part}.csv")


class Worker:
    """The rows of one task, read and checked once, and the runs on them."""

    def __init__(self, task: Task, seed: int, data: Path) -> None:
        torch.set_num_threads(1)
        self.kind, self.seed = modality(task.set), seed
        here = BACKBONES.get(task.backbone)
        self.backbone = str((data / here).resolve()) if here else task.backbone
        self.folder = Path(tempfile.mkdtemp(prefix="dials-"))
        with redirect_stdout(StringIO()):
            draw(task.set, task.rows, seed, data, self.folder)
            self.splits: Splits = finetune.load_dataset(self.folder, seed=seed)
            self.groups = len(finetune.layer_groups(self.load()))

    def load(self) -> Any:
        """The backbone, anew for each run."""
        size = IMAGE_SIZE if self.kind == "image" else None
        loaded = finetune.load_backbone(self.backbone, self.splits.task, image_size=size, seed=self.seed)
        if self.kind == "text":
            tokenizer = cast(Any, loaded.processor)
            tokenizer.model_max_length = min(tokenizer.model_max_length, TOKENS)
        return loaded

    def run(self, arm: str, dials: Mapping[str, Any]) -> dict[str, Any]:
        """Figures of one run; an error is one of them."""
        begin, out = time.process_time(), self.folder / "run"
        options, own = call(arm, dials, self.kind, self.groups)
        head_better: list[bool] = []

        def noted(*evaluations: Any) -> bool:
            head_better.append(head_is_better(*evaluations))
            return False

        def trained_and_better(best: dict[str, Any], last: Any) -> bool:
            return best["epoch"] > 0 and clearly_better(best, last)

        try:
            with ExitStack() as stack, redirect_stdout(StringIO()):
                for saving in ("save_pretrained", "save_adapter", "write_card"):
                    stack.enter_context(patch.object(finetune.fitting, saving))
                for name, method in own.items():
                    of = Trainer if hasattr(Trainer, name) else finetune.train.trainer
                    stack.enter_context(patch.object(of, name, method))
                if arm in ("grid", "no fallback"):
                    stack.enter_context(patch.object(finetune.train.keeping, "head_is_better", noted))
                    stack.enter_context(patch.object(finetune.train.keeping, "clearly_better", trained_and_better))
                run = finetune.fit(
                    self.splits, self.load(), out=out, seed=self.seed, overwrite=True, save_minutes=1e9, **options
                )
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"[:300]}
        record = run.record
        settings = {name: entry["value"] for name, entry in record["settings"].items()}
        return {
            **{part: figures(record["metrics"][part]) for part in ("valid", "test")},
            "cpu_seconds": round(time.process_time() - begin, 2),
            "examples": sum(stage["steps"] for stage in record["stages"]) * settings["batch_size"],
            "status": record["status"],
            "kept": record["kept"],
            "head_better": any(head_better),
            "rewinds": len(record["rewinds"]),
            "rows": record["data"]["counts"],
            "chosen": {dial: settings[dial] for dial in ("lr", "span", "epochs", "cycles", "batch_size", "solve_head")},
        }

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Score (accuracy, or Spearman's correlation) and log-loss, where there is one."""
    found = {"score": metrics["accuracy"] if "accuracy" in metrics else metrics["spearman"]}
    return {name: round(float(value), 5) for name, value in (found | {"log_loss": metrics.get("log_loss")}).items()
            if value is not None}  # fmt: skip

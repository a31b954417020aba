"""Trainers of tiny models, made anew for every run, so that two runs share nothing but what they are given."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import finetune
from finetune.data.splits import Splits
from finetune.data.task import default_loss
from finetune.model.backbones import load_backbone
from finetune.model.groups import layer_groups
from finetune.plan.onecycle import OneCycle
from finetune.plan.rates import geometric_rates
from finetune.plan.settings import choose_settings
from finetune.plan.stages import Plan, Stage
from finetune.train.processes import start_processes
from finetune.train.trainer import Trainer, steps_per_epoch

STAGES = Plan(
    Stage(-1, epochs=1, shape=OneCycle(pct_start=0.4), lr_scale=5.0), Stage(0, epochs=3, shape=OneCycle(pct_start=0.4))
)


def make(
    splits: Splits,
    backbone: Any,
    folder: Path,
    *,
    plan: Plan = STAGES,
    given: Mapping[str, Any] | None = None,
    seed: int = 0,
    loss: Callable[..., torch.Tensor] | None = None,
    said: list[str] | None = None,
    save_steps: int | None = None,
) -> Trainer:
    """A trainer on a freshly loaded backbone, in fp32, batches of 8."""
    folder.mkdir(exist_ok=True)
    settings = choose_settings(
        splits.task.modality, len(splits.train), given={"batch_size": 8, "precision": "fp32", **(given or {})}
    )
    pretrained = load_backbone(backbone, splits.task, seed=seed)
    groups = layer_groups(pretrained)
    return Trainer(
        pretrained,
        splits,
        groups,
        plan.resolve(
            groups,
            geometric_rates(len(groups), settings.lr, settings.span),
            steps_per_epoch(len(splits.train), settings.batch_size),
        ),
        settings,
        folder=folder,
        loss=loss or default_loss(splits.task),
        processes=start_processes(),
        seed=seed,
        save_steps=save_steps,
        say=[].append if said is None else said.append,
    )


def run_killed(trainer: Trainer, *, after: int) -> None:
    """Run until so many steps are done and the next one begins, and leave it as a kill would."""
    original, left = trainer.step, [after]

    def step(*args: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        original(*args)

    trainer.step = step  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.run()


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A copy of the weights and buffers of the model."""
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def differences(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not equal bit for bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def cool_and_plain(splits: Splits, backbone: Path, folder: Path, head: str) -> tuple[finetune.Run, finetune.Run]:
    """A run whose temperature is in its head, a layer of this name, and nowhere else, and the same run without one."""
    options: dict[str, Any] = {"epochs": 2, "batch_size": 8}
    cool = finetune.fit(splits, backbone, out=folder / "cool", **options)
    plain = finetune.fit(splits, backbone, out=folder / "plain", settings={"calibrate": False}, **options)
    weights = [load_file(run.folder / "model" / "model.safetensors") for run in (cool, plain)]
    degrees = cool.record["calibration"]["temperature"]
    assert degrees != 1.0 and plain.record["calibration"]["temperature"] == 1.0
    for name in weights[0]:
        factor = degrees if name.startswith(f"{head}.") else 1.0
        assert torch.allclose(weights[0][name].double() * factor, weights[1][name].double(), rtol=1e-5), name
    return cool, plain


def steps(folder: Path) -> list[dict[str, Any]]:
    """The lines of `steps.jsonl`, without the seconds."""
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]

"""Every row is evaluated once, in its place, whatever the batches and the processes."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from finetune.data.loaders import make_loader, text_lengths
from finetune.data.splits import Splits
from finetune.data.task import default_loss, metrics
from finetune.model.backbones import load_backbone
from finetune.model.pretrained import Pretrained
from finetune.train.evaluate import as_float, evaluate
from finetune.train.processes import Processes, start_processes


def alone(pretrained: Pretrained, splits: Splits) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Outputs and targets of each row of valid, one forward pass a row."""
    pretrained.model.eval()
    outputs, targets = [], []
    rows = [[row] for row in range(len(splits.valid))]
    with torch.no_grad():
        for batch in make_loader(splits.valid, splits.task, pretrained.processor, rows, train=False):
            assert batch.targets is not None
            keep = batch.targets[0] != -100 if splits.task.kind == "token_classification" else slice(None)
            output, target = pretrained.forward(batch.inputs)[0], batch.targets[0]
            outputs.append(output[keep].numpy() if isinstance(keep, torch.Tensor) else output.numpy())
            targets.append(target[keep].numpy() if isinstance(keep, torch.Tensor) else target.numpy())
    return outputs, targets


@pytest.mark.parametrize("kind", ["images", "text", "tags"])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_every_row_once_and_in_its_place(request: pytest.FixtureRequest, kind: str, batch_size: int) -> None:
    names = {"images": ("square_splits", "resnet"), "text": ("review_splits", "bert"), "tags": ("tag_splits", "bert")}
    splits, backbone = map(request.getfixturevalue, names[kind])
    pretrained = load_backbone(backbone, splits.task)
    lengths = None if kind == "images" else text_lengths(splits.valid, splits.task, pretrained.processor)  # type: ignore[arg-type]
    if lengths is not None:
        assert lengths != sorted(lengths)  # the batches are not in the order of the rows
    found = evaluate(
        pretrained, splits.valid, splits.task, start_processes(), loss=default_loss(splits.task),
        batch_size=batch_size, lengths=lengths,
    )  # fmt: skip
    outputs, targets = alone(pretrained, splits)
    assert len(found.outputs) == len(found.targets) == len(outputs) == len(splits.valid)
    for ours, expected in zip(found.outputs, outputs, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    for one, other in zip(found.targets, targets, strict=True):
        np.testing.assert_array_equal(one, other)
    flat = [(z, y) for z, y in zip(outputs, targets, strict=True)]
    z = np.concatenate([z.reshape(-1, splits.task.outputs) for z, _ in flat]).astype(np.float64)
    y = np.concatenate([np.ravel(y) for _, y in flat])
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    assert found.loss == pytest.approx(-log_p[np.arange(len(y)), y].mean(), rel=1e-4)
    whole = metrics(splits.task, outputs if kind == "tags" else np.stack(outputs), targets)
    for name, value in whole.items():
        np.testing.assert_allclose(found.metrics[name], value, rtol=1e-4, err_msg=name)
    assert found.metrics["loss"] == found.loss
    assert found.scores is not None and found.scores.shape == (len(splits.valid),)
    assert found.scores.mean() > 0.0 or found.metrics["accuracy"] == 0.0


@dataclass(frozen=True)
class OneOf(Processes):
    """One of several processes, whose gathering is only noted."""

    number: int = 0
    of: int = 1
    given: list[Any] = field(default_factory=list)

    @property
    def rank(self) -> int:
        return self.number

    @property
    def count(self) -> int:
        return self.of

    def gather(self, items: list[Any]) -> list[Any]:
        self.given.append(items)
        return items


def test_processes_share_the_rows(review_splits: Splits, bert: Path) -> None:
    splits = review_splits
    pretrained = load_backbone(bert, splits.task)
    options: dict[str, Any] = {"loss": default_loss(splits.task), "batch_size": 3}
    whole = evaluate(pretrained, splits.valid, splits.task, start_processes(), **options)
    rows: list[Any] = []
    sums: list[Any] = []
    for rank in range(3):
        one = OneOf(Accelerator(cpu=True), number=rank, of=3)
        evaluate(pretrained, splits.valid, splits.task, one, **options)
        rows += one.given[0]
        sums += one.given[1]
    assert sorted(row for row, *_ in rows) == list(range(len(splits.valid)))
    for row, output, target in rows:
        np.testing.assert_array_equal(output, whole.outputs[row])
        assert target == whole.targets[row]
    assert sum(value for value, _ in sums) / sum(count for _, count in sums) == pytest.approx(whole.loss)


def test_the_model_evaluates_and_learns_nothing(review_splits: Splits, bert: Path) -> None:
    pretrained = load_backbone(bert, review_splits.task)
    pretrained.model.train()
    modes: list[tuple[bool, bool]] = []
    pretrained.model.register_forward_hook(lambda module, *_: modes.append((module.training, torch.is_grad_enabled())))
    options: dict[str, Any] = {"loss": default_loss(review_splits.task), "batch_size": 8}
    one, other = (
        evaluate(pretrained, review_splits.valid, review_splits.task, start_processes(), **options) for _ in range(2)
    )
    np.testing.assert_array_equal(one.outputs, other.outputs)  # no dropout
    assert set(modes) == {(False, False)}


def test_heads_with_several_outputs_and_metrics_of_ones_own(square_splits: Splits, resnet: Path) -> None:
    class Two(torch.nn.Module):
        def __init__(self, features: int) -> None:
            super().__init__()
            self.name, self.size = torch.nn.Linear(features, 3), torch.nn.Linear(features, 1)

        def forward(self, x_BF: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"name": self.name(x_BF), "size": self.size(x_BF).squeeze(-1)}

    pretrained = load_backbone(resnet, square_splits.task, head=Two)

    def loss(outputs: dict[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs["name"], targets) + outputs["size"].square().mean()

    def own(outputs: dict[str, np.ndarray], targets: np.ndarray) -> dict[str, float]:
        assert outputs["size"].shape == targets.shape == (len(square_splits.valid),)
        return {"right": float((outputs["name"].argmax(1) == targets).mean())}

    options: dict[str, Any] = {"loss": loss, "batch_size": 4}
    plain = evaluate(pretrained, square_splits.valid, square_splits.task, start_processes(), **options)
    assert set(plain.metrics) == {"loss"} and plain.scores is None
    found = evaluate(pretrained, square_splits.valid, square_splits.task, start_processes(), own_metrics=own, **options)
    assert set(found.metrics) == {"right", "loss"} and 0.0 <= found.metrics["right"] <= 1.0
    assert found.outputs["name"].shape == (len(square_splits.valid), 3)
    assert found.outputs["size"].dtype == np.float32


def test_half_precision_comes_out_in_full(review_splits: Splits, bert: Path) -> None:
    pretrained = load_backbone(bert, review_splits.task)
    task, one = review_splits.task, start_processes()
    options: dict[str, Any] = {"loss": default_loss(task), "batch_size": 8}
    full, half = (
        evaluate(pretrained, review_splits.valid, task, replace(one, precision=precision), **options)
        for precision in ("fp32", "bf16")
    )
    assert half.outputs.dtype == np.float32
    assert (half.outputs != full.outputs).any()
    np.testing.assert_allclose(half.outputs, full.outputs, atol=0.05)
    tensors = as_float({"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(1, dtype=torch.float16)})
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}

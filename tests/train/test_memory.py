"""A step that is too large for the memory is taken in more micro-batches, the same on every process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.data.splits import Splits
from finetune.data.task import default_loss
from finetune.errors import RunError
from finetune.train import memory
from finetune.train.memory import is_out_of_memory, micro_batches, save_activations
from tests.train.runs import make, steps
from tests.train.test_trainer import Outcome


class Two:
    """One of two processes; `other` says whether the other one fails with so many micro-batches."""

    def __init__(self, other: Callable[[int], bool]) -> None:
        self.other, self.count = other, 0

    def total(self, failed: float) -> float:
        return failed + self.other(self.count)


@pytest.mark.parametrize(
    ("mine", "others", "most", "found"),
    [
        (1, 1, 8, 1),
        (4, 1, 8, 4),
        (1, 4, 8, 4),
        (2, 8, 8, 8),
        (3, 3, 6, 4),
        (5, 1, 6, 6),
        (9, 1, 8, None),
        (1, 9, 8, None),
    ],
)
def test_the_process_with_the_least_memory_decides(mine: int, others: int, most: int, found: int | None) -> None:
    two = Two(lambda count: count < others)

    def attempt(count: int) -> None:
        two.count = count
        if count < mine:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    assert micro_batches(attempt, 1, most, two) == found  # type: ignore[arg-type]


def test_other_errors_are_not_taken_for_it() -> None:
    assert is_out_of_memory(
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
    )
    assert is_out_of_memory(RuntimeError("MPS backend out of memory"))
    with pytest.raises(RuntimeError, match="shapes"):
        micro_batches(lambda _: (_ for _ in ()).throw(RuntimeError("shapes")), 1, 8, Two(lambda _: False))  # type: ignore[arg-type]


class Room:
    """The task's own loss on a device with room for so many examples."""

    def __init__(self, splits: Splits, room: int) -> None:
        self.plain, self.room, self.seen = default_loss(splits.task), room, 0

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if outputs.requires_grad:
            if len(outputs) > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            self.seen = max(self.seen, len(outputs))
        return self.plain(outputs, targets)


def run(splits: Splits, bert: Path, folder: Path, room: int, said: list[str], **options: Any) -> tuple[Outcome, int]:
    loss = Room(splits, room)
    return make(splits, bert, folder, loss=loss, said=said, **options).run(), loss.seen


def test_a_batch_that_does_not_fit_is_split_and_training_is_the_same(
    review_splits: Splits, plain_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    _, seen = run(review_splits, plain_bert, tmp_path / "whole", 8, said)
    assert seen == 8 and not any(line.startswith("Memory") for line in said)
    monkeypatch.setattr(memory, "PROBED", ("cpu",))
    outcome, seen = run(review_splits, plain_bert, tmp_path / "split", 3, said, given={"replay": "off"})
    assert seen == 2 and outcome.progress.accumulation == 4
    assert [line for line in said if line.startswith("Memory")] == [
        "Memory    head: 4 micro-batches a step instead of 1"
    ]
    for one, other in zip(steps(tmp_path / "whole"), steps(tmp_path / "split"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_what_does_not_fit_at_all(
    review_splits: Splits, plain_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "PROBED", ("cpu",))
    with pytest.raises(RunError, match="^out of memory with 1 example a step on each device: take a smaller backbone"):
        run(review_splits, plain_bert, tmp_path, 0, [])


def test_activations_are_computed_twice_where_one_example_does_not_fit(
    review_splits: Splits, plain_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses stay the same; a run that goes on keeps it."""
    monkeypatch.setattr(memory, "PROBED", ("cpu",))

    class Recomputing(Room):
        def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            self.room = 8 if trainer.model.is_activation_checkpointing else 0
            return super().__call__(outputs, targets)

    trainer = make(review_splits, plain_bert, tmp_path / "one", loss=Recomputing(review_splits, 0), save_steps=5)
    outcome = trainer.run()
    assert outcome.progress.recompute and outcome.progress.accumulation == 8
    run(review_splits, plain_bert, tmp_path / "plain", 8, [], given={"accumulation": 8})
    for one, other in zip(steps(tmp_path / "one"), steps(tmp_path / "plain"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    trainer = make(review_splits, plain_bert, tmp_path / "one", loss=Recomputing(review_splits, 0))
    assert trainer.run().progress.recompute and trainer.model.is_activation_checkpointing


def test_networks_that_can_and_cannot_recompute(resnet: Path) -> None:
    import timm

    assert save_activations(timm.create_model("test_vit"))
    assert not save_activations(torch.nn.Linear(2, 2))

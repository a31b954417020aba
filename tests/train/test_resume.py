"""A run that was interrupted and started again ends as the one that was not, bit for bit."""

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.data.splits import Splits
from finetune.data.task import default_loss
from finetune.errors import RunError
from finetune.train import checkpoint, selection, stopping
from finetune.train.evaluate import Evaluation
from finetune.train.resuming import drop_checkpoints
from finetune.train.trainer import Outcome, Trainer
from tests.train.runs import differences, make, state, steps

STEPS = 20  # of the plan: one epoch of the head, three of everything, 5 steps each


@pytest.fixture(autouse=True, scope="module")
def often() -> Iterator[None]:
    """Weights are averaged from the first epoch of the last stage on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "AVERAGED_SHARE", 0.8)
        yield


class Interrupted:
    """The task's own loss, which Ctrl-C meets at its nth call in training, or in evaluation."""

    def __init__(self, splits: Splits, when: str, number: int) -> None:
        self.plain, self.when, self.left = default_loss(splits.task), when, number

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if outputs.requires_grad == (self.when == "training"):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return self.plain(outputs, targets)


def everything(run: Trainer, outcome: Outcome) -> dict[str, Any]:
    """What two runs that are the same have in common, but for the weights."""
    return {
        "history": outcome.history,
        "kept": outcome.kept,
        "valid": outcome.valid.metrics,
        "best": run.progress.best,
        "first_loss": run.progress.first_loss,
        "smooth_loss": run.progress.smooth_loss,
        "steps": steps(run.folder),
    }


@dataclass(frozen=True)
class Kind:
    """What a run is made of, and the run that nothing interrupts."""

    splits: Splits
    backbone: Path
    given: dict[str, Any]
    whole: Trainer
    expected: dict[str, Any]


@pytest.fixture(scope="module")
def kinds(
    review_splits: Splits, square_splits: Splits, bert: Path, resnet: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Kind]:
    """A text model with dropout; an image model with moving batch norms, augmentation and micro-batches."""
    fewer = replace(square_splits, train=square_splits.train.select(list(range(20))), test=None)
    found = {}
    for name, splits, backbone, given in (
        ("text", review_splits, bert, {}),
        ("images", fewer, resnet, {"batch_size": 4, "freeze_batchnorm": False, "accumulation": 2}),
    ):
        whole = make(splits, backbone, tmp_path_factory.mktemp(name), given=given)
        found[name] = Kind(splits, backbone, given, whole, everything(whole, whole.run()))
        assert whole.average is not None and len(found[name].expected["steps"]) == STEPS
    return found


@pytest.mark.parametrize("kind", ["text", "images"])
@pytest.mark.parametrize(
    ("when", "number", "every", "goes_on_from"),
    [
        ("training", 3, 5, 0),  # before there is any checkpoint
        ("evaluation", 1, 5, 5),  # in the validation after the first epoch of all groups
        ("training", 12, 5, 10),
        ("evaluation", 3, 5, 15),
        ("evaluation", 4, 5, 20),  # all steps are done; the averaged weights are being validated
        ("training", 12, 1, 12),  # in the middle of an epoch
        ("evaluation", 1, 1, 9),
        ("evaluation", 3, 2, 18),
    ],
)
def test_resumed_is_uninterrupted(
    kinds: dict[str, Kind], tmp_path: Path, kind: str, when: str, number: int, every: int, goes_on_from: int
) -> None:
    one = kinds[kind]
    splits, backbone, given, whole = one.splits, one.backbone, one.given, one.whole
    per_call = given.get("accumulation", 1) if when == "training" else 1
    assert len(splits.valid) <= 4 * whole.settings.batch_size  # one call a validation
    stopped = make(splits, backbone, tmp_path / "parts", given=given, save_steps=every,
                   loss=Interrupted(splits, when, number * per_call))  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        stopped.run()

    said: list[str] = []
    resumed = make(splits, backbone, tmp_path / "parts", given=given, said=said)
    found = everything(resumed, resumed.run())
    assert [line for line in said if line.startswith("Resumed")] == (
        [f"Resumed   from step {goes_on_from} of {STEPS}"] if goes_on_from else []
    )
    assert found == one.expected
    assert not differences(state(resumed), state(whole))
    assert resumed.average is not None
    assert not differences(resumed.average.tensors, whole.average.tensors)
    if goes_on_from < STEPS:
        moments, expected = resumed.optimizer.state_dict()["state"], whole.optimizer.state_dict()["state"]
        assert moments.keys() == expected.keys() and len(moments) > 0
        assert not any(differences(tensors, expected[index]) for index, tensors in moments.items())


def test_interrupted_twice(kinds: dict[str, Kind], tmp_path: Path) -> None:
    splits, backbone = kinds["text"].splits, kinds["text"].backbone
    for when, number in (("training", 7), ("evaluation", 2)):
        with pytest.raises(KeyboardInterrupt):
            make(splits, backbone, tmp_path / "parts", loss=Interrupted(splits, when, number), save_steps=3).run()
    resumed = make(splits, backbone, tmp_path / "parts")
    assert everything(resumed, resumed.run()) == kinds["text"].expected
    assert not differences(state(resumed), state(kinds["text"].whole))


def test_the_best_weights_of_before_can_be_kept(kinds: dict[str, Kind], tmp_path: Path) -> None:
    """They are those of an epoch that the resumed process has never seen."""
    splits, backbone = kinds["text"].splits, kinds["text"].backbone
    good, poor = (Evaluation(None, None, 1.0, {"loss": 1.0}, np.full(20, score)) for score in (1.0, 0.0))
    weights: list[dict[str, torch.Tensor]] = []

    def scripted(run: Trainer, script: list[Evaluation]) -> Trainer:
        def evaluate() -> Evaluation:
            weights.append(state(run))
            if not script:
                raise KeyboardInterrupt
            return script.pop(0)

        run.evaluate = evaluate  # type: ignore[method-assign, assignment]
        return run

    with pytest.raises(KeyboardInterrupt):
        scripted(make(splits, backbone, tmp_path, save_steps=5), [good, poor]).run()
    resumed = scripted(make(splits, backbone, tmp_path), [poor, poor, poor, good])  # two epochs, average, best
    outcome = resumed.run()
    assert outcome.kept == "epoch 1" and outcome.valid is good
    assert not differences(state(resumed), weights[0]) and differences(weights[0], weights[1])


def test_time_spent_before_counts(kinds: dict[str, Kind], tmp_path: Path) -> None:
    splits, backbone = kinds["text"].splits, kinds["text"].backbone
    with pytest.raises(KeyboardInterrupt):
        make(splits, backbone, tmp_path, loss=Interrupted(splits, "training", 12), save_steps=5).run()
    newest = max((tmp_path / "checkpoints").glob("step-*")) / "progress.json"
    progress = json.loads(newest.read_text())
    assert progress["step"] == 10 and len(progress["stage_seconds"]) == 2
    progress["stage_seconds"] = [100.0, 1000.0]
    newest.write_text(json.dumps(progress))
    (newest.parent / "checksums.json").write_text("{}")
    outcome = make(splits, backbone, tmp_path).run()
    assert outcome.progress.stage_seconds[0] == 100.0 and 1000.0 < outcome.progress.stage_seconds[1] < 1100.0


def test_checkpoints_are_written_when_the_last_is_old(kinds: dict[str, Kind], tmp_path: Path) -> None:
    splits, backbone = kinds["text"].splits, kinds["text"].backbone
    run = make(splits, backbone, tmp_path)
    run.run()
    assert not (tmp_path / "checkpoints").exists()
    run = make(splits, backbone, tmp_path)
    run.save_seconds, run.save_took = 0.0, 1e9  # none while they would take more than their share of the time
    run.run()
    assert not (tmp_path / "checkpoints").exists()
    run = make(splits, backbone, tmp_path)
    run.save_seconds, save = 0.0, run.save_checkpoint

    def quick() -> bool:
        saved, run.save_took = save(), 0.0
        return saved

    run.save_checkpoint = quick  # type: ignore[method-assign]
    run.run()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-0000019", "step-0000020"]
    drop_checkpoints(tmp_path)
    assert not (tmp_path / "checkpoints").exists()


@pytest.fixture
def in_front() -> Iterator[None]:
    """Ctrl-C is heard, as by a program in front of a shell; behind one it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_behind_a_shell_ctrl_c_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping.listening() as wish:
            os.kill(os.getpid(), signal.SIGINT)
            assert wish.signal == 0 and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("in_front")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends(kinds: dict[str, Kind], tmp_path: Path, number: signal.Signals) -> None:
    one = kinds["text"]

    def signalled(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if outputs.requires_grad and stopped.progress.step == 12:
            os.kill(os.getpid(), number)
        return plain(outputs, targets)

    plain, before = default_loss(one.splits.task), signal.getsignal(number)
    stopped = make(one.splits, one.backbone, tmp_path, loss=signalled)
    with pytest.raises(stopping.Interrupted) as caught:
        stopped.run()
    assert str(caught.value) == "stopped at step 13 of 20, saved: the same command goes on from there"
    assert caught.value.signal == number and signal.getsignal(number) is before
    resumed = make(one.splits, one.backbone, tmp_path)
    assert everything(resumed, resumed.run()) == one.expected
    assert not differences(state(resumed), state(one.whole))


@pytest.mark.usefixtures("in_front")
def test_a_second_signal_ends_at_once(
    kinds: dict[str, Kind], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one = kinds["text"]

    def twice(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if outputs.requires_grad:
            os.kill(os.getpid(), signal.SIGINT)
            while not run.stop.signal:  # two that come at once are one
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGINT)
        return default_loss(one.splits.task)(outputs, targets)

    with pytest.raises(KeyboardInterrupt) as caught:
        run = make(one.splits, one.backbone, tmp_path, loss=twice)
        run.run()
    assert type(caught.value) is KeyboardInterrupt and not (tmp_path / "checkpoints").exists()
    assert "Ctrl-C again stops at once" in capfd.readouterr().err


def test_a_full_disk_costs_the_checkpoints_and_not_the_run(
    kinds: dict[str, Kind], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, said = kinds["text"], []

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    run = make(one.splits, one.backbone, tmp_path, said=said, save_steps=5)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        found = everything(run, run.run())
    assert found == one.expected
    assert said.count("Warning   no checkpoint (No space left on device); training goes on, unsaved") == 4
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_damaged_checkpoint_costs_time_only(kinds: dict[str, Kind], tmp_path: Path) -> None:
    one, said = kinds["images"], []
    with pytest.raises(KeyboardInterrupt):
        make(one.splits, one.backbone, tmp_path, given=one.given, save_steps=3,
             loss=Interrupted(one.splits, "training", 28)).run()  # fmt: skip
    path = tmp_path / "checkpoints" / "step-0000012" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    resumed = make(one.splits, one.backbone, tmp_path, given=one.given, said=said)
    assert everything(resumed, resumed.run()) == one.expected
    assert said[0].startswith(f"Damaged   {path.parent}: ") and said[1] == "Resumed   from step 9 of 20"
    assert not differences(state(resumed), state(one.whole))


def test_a_checkpoint_that_holds_code_is_not_taken_up(kinds: dict[str, Kind], tmp_path: Path) -> None:
    one = kinds["text"]
    with pytest.raises(KeyboardInterrupt):
        make(one.splits, one.backbone, tmp_path, save_steps=3, loss=Interrupted(one.splits, "training", 8)).run()
    for path in (tmp_path / "checkpoints").iterdir():
        torch.save(Interrupted(one.splits, "training", 0), path / "optimizer.pt")
        sums = json.loads((path / checkpoint.CHECKSUMS).read_text())
        sums["optimizer.pt"] = checkpoint._checksum(path / "optimizer.pt")
        (path / checkpoint.CHECKSUMS).write_text(json.dumps(sums))
    with pytest.raises(RunError, match="its optimizer.pt holds more than numbers, which loading it would run"):
        make(one.splits, one.backbone, tmp_path).run()

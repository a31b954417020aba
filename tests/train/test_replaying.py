"""A stage with a frozen part that is computed once is the stage that computes it each time; faults cost only speed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from finetune.data.splits import Splits
from finetune.model import store
from finetune.plan.onecycle import OneCycle
from finetune.plan.stages import Plan, Stage
from finetune.train import replaying
from finetune.train.trainer import Trainer
from tests.tiny import vit_folder
from tests.train.runs import differences, make, state, steps

TWO = Plan(Stage(-1, epochs=3, shape=OneCycle()), Stage(2, epochs=3, shape=OneCycle()), Stage(0, epochs=1))
GIVEN = {"ema": False, "replay_views": 3}


@pytest.fixture(autouse=True)
def any_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """In networks this small, the clock says little about what pays."""
    monkeypatch.setattr(replaying, "LEAST_SHARE", 0.0)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vit_folder(tmp_path_factory.mktemp("vit") / "m")


def trained(splits: Splits, backbone: Path, folder: Path, plan: Plan = TWO, **given: Any) -> Trainer:
    trainer = make(splits, backbone, folder, plan=plan, given={**GIVEN, **given})
    trainer.run()
    return trainer


def far(one: Trainer, other: Trainer) -> float:
    """Largest difference between two models' weights."""
    pairs = zip(state(one).values(), state(other).values(), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


def test_images_with_a_view_an_epoch_are_the_plain_run_bit_for_bit(twelve: Splits, vit: Path, tmp_path: Path) -> None:
    plain = trained(twelve, vit, tmp_path / "plain", replay="off")
    replayed = trained(twelve, vit, tmp_path / "replayed", augment="none")
    computed = trained(twelve, vit, tmp_path / "computed", augment="none", replay="off")
    assert [done for done, _ in replayed.progress.replayed] == [True, True, False]
    assert [why for _, why in plain.progress.replayed] == ["switched off", "switched off", "everything trains"]
    assert far(replayed, computed) < 1e-6 < far(plain, computed)
    for mine, other in zip(steps(tmp_path / "replayed"), steps(tmp_path / "computed"), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
    for mine, other in zip(replayed.progress.history, computed.progress.history, strict=True):
        assert mine["valid"]["loss"] == pytest.approx(other["valid"]["loss"], rel=1e-5)


def test_texts_of_many_lengths(review_splits: Splits, bert: Path, tmp_path: Path) -> None:
    """With dropout above the boundary: both ways draw the same numbers."""
    one, other = (trained(review_splits, bert, tmp_path / mode, replay=mode) for mode in ("auto", "off"))
    assert [done for done, _ in one.progress.replayed] == [True, True, False]
    assert far(one, other) < 1e-5


def test_the_views_are_the_crops_of_the_first_epochs(twelve: Splits, vit: Path, tmp_path: Path) -> None:
    long = Plan(Stage(-1, epochs=4, shape=OneCycle()))
    one, other = (trained(twelve, vit, tmp_path / mode, long, replay=mode) for mode in ("auto", "off"))
    assert "3 views" in one.progress.replayed[0][1]
    losses = [[line["loss"] for line in steps(tmp_path / mode)] for mode in ("auto", "off")]
    per_epoch = len(losses[0]) // 4
    assert losses[0][: 3 * per_epoch] == pytest.approx(losses[1][: 3 * per_epoch], rel=1e-5)
    assert losses[0][3 * per_epoch :] != pytest.approx(losses[1][3 * per_epoch :], rel=1e-5)
    assert far(one, other) > 0


def test_a_frozen_part_that_takes_next_to_nothing_is_computed(
    twelve: Splits, vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replaying, "LEAST_SHARE", 2.0)
    trainer = trained(twelve, vit, tmp_path / "run", Plan(Stage(1, epochs=2)), augment="none")
    done, why = trainer.progress.replayed[0]
    assert not done and why.endswith("% of a forward pass")


def test_a_stage_too_short_to_gain_is_plain(twelve: Splits, vit: Path, tmp_path: Path) -> None:
    trainer = trained(twelve, vit, tmp_path / "run", Plan(Stage(-1, epochs=1)))
    assert trainer.progress.replayed == [(False, "too short to gain from it")]


def test_what_does_not_fit_into_memory_goes_to_the_disk_and_is_gone_afterwards(
    review_splits: Splits, bert: Path, tmp_path: Path
) -> None:
    one = trained(review_splits, bert, tmp_path / "disk", replay_memory=0.0)
    other = trained(review_splits, bert, tmp_path / "memory")
    assert all("on disk" in why for _, why in one.progress.replayed[:2])
    assert differences(state(one), state(other)) == []
    assert not (tmp_path / "disk" / "cache").exists()


def test_a_full_disk_costs_only_time(
    review_splits: Splits, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "posix_fallocate", full)
    one = trained(review_splits, bert, tmp_path / "full", replay_memory=0.0)
    monkeypatch.undo()
    other = trained(review_splits, bert, tmp_path / "off", replay="off")
    assert one.progress.replayed[0] == (False, "no space for what crosses (No space left on device)")
    assert differences(state(one), state(other)) == [] and not (tmp_path / "full" / "cache").exists()


def test_a_disk_that_is_nearly_full_is_left_alone(
    review_splits: Splits, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(replaying.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    one = trained(review_splits, bert, tmp_path / "full", replay_memory=0.0)
    assert one.progress.replayed[0][1].endswith("GiB of disk are free")


class Stop(Exception):
    """In place of a kill."""


def interrupted(splits: Splits, backbone: Path, folder: Path) -> Path:
    """A run that ends in the middle of its first stage, whose store is left in a file; the file."""
    trainer = make(splits, backbone, folder, plan=TWO, given={**GIVEN, "replay_memory": 0.0})
    trainer.close_replay = lambda: None  # type: ignore[method-assign]
    original, count = trainer.step, 0

    def step(*args: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        if count > 7:
            raise Stop
        return original(*args)

    trainer.step = step  # type: ignore[method-assign]
    with pytest.raises(Stop):
        trainer.run()
    return next((folder / "cache").glob("*.bin"))


@pytest.mark.parametrize("fault", ["none", "corrupt", "half", "no note", "nonsense note"])
def test_a_store_that_a_killed_run_left(
    review_splits: Splits, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    file = interrupted(review_splits, bert, tmp_path / "run")
    if fault == "corrupt":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 255
        file.write_bytes(content)
    if fault == "half":
        file.write_bytes(file.read_bytes()[:100])
    if fault == "no note":
        file.with_suffix(".json").unlink()
    if fault == "nonsense note":
        file.with_suffix(".json").write_text("[")
    filled: list[int] = []
    original = replaying.Replay.fill
    monkeypatch.setattr(replaying.Replay, "fill", lambda *a, **k: (filled.append(1), original(*a, **k)))
    again = trained(review_splits, bert, tmp_path / "run", replay_memory=0.0)
    first = len(filled)
    whole = trained(review_splits, bert, tmp_path / "whole", replay_memory=0.0)
    assert differences(state(again), state(whole)) == []
    assert (first < len(filled) - first) == (fault == "none"), "a good store is used again, a bad one is not"


def test_a_stale_store_is_not_used(review_splits: Splits, bert: Path, tmp_path: Path) -> None:
    """Other rows, or other weights below the boundary, are another file."""
    file = interrupted(review_splits, bert, tmp_path / "run")
    note = json.loads(file.with_suffix(".json").read_text())
    changed = make(review_splits, bert, tmp_path / "changed", plan=TWO, given={**GIVEN, "replay_memory": 0.0})
    with torch.no_grad():
        changed.model.get_parameter("bert.encoder.layer.0.output.dense.weight").mul_(1.1)
    (tmp_path / "changed" / "cache").mkdir(exist_ok=True)
    shutil.copy(file, tmp_path / "changed" / "cache")
    (tmp_path / "changed" / "cache" / file.with_suffix(".json").name).write_text(json.dumps(note))
    changed.close_replay = lambda: None  # type: ignore[method-assign]
    changed.run()
    assert len(list((tmp_path / "changed" / "cache").glob("*.bin"))) > 1


def test_a_network_that_cannot_be_replayed_trains_plainly(
    twelve: Splits, resnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that leaves the graph: the check finds it."""

    def spoil(trainer: Trainer) -> Trainer:
        block, fc = trainer.model.get_submodule("layer1"), trainer.model.get_submodule("fc")
        seen: list[float] = [1.0]
        block.register_forward_hook(lambda m, i, o: seen.__setitem__(0, float(o.detach().abs().mean())))
        fc.register_forward_pre_hook(lambda m, i: (i[0] * seen[0],))
        return trainer

    plan = Plan(Stage(-1, epochs=3))
    one = spoil(make(twelve, resnet, tmp_path / "one", plan=plan, given=GIVEN))
    other = spoil(make(twelve, resnet, tmp_path / "other", plan=plan, given={**GIVEN, "replay": "off"}))
    one.run(), other.run()
    done, why = one.progress.replayed[0]
    assert not done and "differ by" in why
    assert differences(state(one), state(other)) == []


def test_a_network_that_fails_when_run_in_parts_trains_plainly(
    twelve: Splits, vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(replaying.Replay, "forward", fails)
    trainer = trained(twelve, vit, tmp_path / "run", Plan(Stage(-1, epochs=3)))
    assert trainer.progress.replayed == [
        (False, "the network cannot be run from its boundary (RuntimeError: shapes do not fit)")
    ]


def test_frozen_statistics_stay(twelve: Splits, resnet: Path, tmp_path: Path) -> None:
    trainer = make(twelve, resnet, tmp_path / "run", plan=Plan(Stage(-1, epochs=3)), given=GIVEN)
    before = state(trainer)
    trainer.run()
    assert trainer.progress.replayed[0][0]
    assert set(differences(before, state(trainer))) == {"fc.weight", "fc.bias"}
    assert all(isinstance(module, nn.Module) and "forward" not in vars(module) for module in trainer.model.modules())

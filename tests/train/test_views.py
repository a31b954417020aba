"""Random views of pictures that mislead the solved head: training goes without them, also after a kill."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import finetune
from finetune.data.sources import load_images
from finetune.data.splits import Splits
from finetune.data.task import Task
from finetune.plan.stages import Plan, Stage
from finetune.train.evaluate import Evaluation
from finetune.train.trainer import Trainer
from finetune.train.views import mislead, views_a_row
from tests.train.runs import differences, make, run_killed, state, steps

PLAN = Plan(Stage(0, epochs=2))


def ramps(folder: Path, mirrored: bool) -> Path:
    """Saw teeth: of the second class the mirror image, or the colour, is another."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("valid", 12)):
        for name in ("falling", "rising"):
            for i in range(count):
                teeth = np.tile(np.arange(0, 240, 30), 4)[None, :, None].repeat(32, 0).repeat(3, 2).astype(float)
                if name == "falling":
                    teeth = teeth[:, ::-1] if mirrored else teeth * np.array([1.0, 0.2, 0.2])
                noisy = np.clip(teeth + rng.normal(0, 10, teeth.shape), 0, 255).astype(np.uint8)
                target = folder / part / name / f"{i}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(noisy).save(target)
    return folder


@pytest.fixture(scope="module")
def teeth(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    return load_images(ramps(tmp_path_factory.mktemp("teeth"), mirrored=True))


def evaluation(right: list[int], targets: list[int]) -> Evaluation:
    outputs = np.eye(2, dtype=np.float32)[[t if r else 1 - t for r, t in zip(right, targets, strict=True)]]
    return Evaluation(outputs, np.array(targets), 0.0, {}, np.array(right, dtype=float))


def views(*given: Evaluation) -> Callable[[int], Evaluation]:
    """Those, over and over."""
    return lambda number: given[number % len(given)]


def test_what_is_lost_is_told_from_noise_and_from_what_there_was_to_lose() -> None:
    task = Task("single_label_classification", "image", ("a", "b"))
    even = [0, 1] * 10
    plain = evaluation([1] * 20, even)
    half = evaluation([1, 1, 0, 0] * 5, even)
    assert "the solved head gets 50 % of them right, 100 % as they are" in mislead(plain, views(half), task)
    many = 6 * [0, 1] * 5
    five, four = evaluation([1, 1, 1, 1, 1, 0] * 10, many), evaluation([1, 1, 1, 0, 1, 0] * 10, many)
    assert mislead(evaluation([1] * 60, many), views(five), task) == "", "two thirds of the lead are kept"
    assert mislead(evaluation([1] * 60, many), views(four), task)
    assert mislead(plain, views(plain), task) == ""
    assert mislead(half, views(evaluation([0] * 20, even)), task) == "", "there was nothing to lose"
    assert mislead(plain, views(evaluation([1, 0], [0, 1])), task) == "", "not the same rows"
    assert mislead(plain, views(half), Task("multi_label_classification", "image", ("a", "b"))) == ""
    assert mislead(evaluation([1] * 4, [0, 1] * 2), views(evaluation([0] * 4, [0, 1] * 2)), task) == "", "four rows"
    few = [0, 1] * 3
    three, others = evaluation([1, 0] * 3, few), evaluation([0, 1] * 3, few)
    assert mislead(evaluation([1] * 6, few), views(three), task) == "", "three rows of six are no proof"
    assert mislead(evaluation([1] * 6, few), views(three, others), task), "each of them lost half of its views is"


def test_where_nothing_can_be_told_no_view_is_looked_at() -> None:
    def view(number: int) -> Evaluation:
        raise AssertionError

    single, several = (Task(f"{kind}_label_classification", "image", ("a", "b")) for kind in ("single", "multi"))
    assert mislead(evaluation([1] * 20, [0, 1] * 10), view, several) == ""
    assert mislead(evaluation([1] * 4, [0, 1] * 2), view, single) == ""


def test_the_fewer_rows_the_more_views() -> None:
    assert [views_a_row(rows) for rows in (0, 1, 10, 11, 30, 99, 100, 5000)] == [10, 10, 10, 10, 4, 2, 1, 1]


def test_pictures_whose_mirror_image_is_of_another_class_are_taken_as_they_are(tmp_path: Path, resnet: Path) -> None:
    options: dict[str, Any] = {"epochs": 1, "settings": {"precision": "fp32"}}
    run = finetune.fit(ramps(tmp_path / "data", mirrored=True), resnet, out=tmp_path / "run", **options)
    chosen = run.record["settings"]["augment"]
    assert chosen["value"] == "none" and chosen["by"] == "measured" and "mirror images mislead" in chosen["reason"]
    assert "mirror images mislead" in finetune.explain(run)
    options["settings"]["augment"] = "default"
    run = finetune.fit(tmp_path / "data", resnet, out=tmp_path / "given", **options)
    assert run.record["settings"]["augment"] == {"value": "default", "reason": "given by the user", "by": "user"}
    run = finetune.fit(ramps(tmp_path / "colour", mirrored=False), resnet, out=tmp_path / "c", epochs=1)
    assert run.record["settings"]["augment"]["value"] == "default"


@pytest.mark.parametrize("stop", [0, 4])
def test_resumed_is_uninterrupted(teeth: Splits, resnet: Path, tmp_path: Path, stop: int) -> None:
    def made(folder: Path, every: int | None = None) -> Trainer:
        trainer = make(teeth, resnet, folder, plan=PLAN, save_steps=every)
        trainer.solvable = "fc"
        return trainer

    whole = made(tmp_path / "whole")
    expected = whole.run()
    assert whole.settings.augment == "none"
    run_killed(made(tmp_path / "parts", 1), after=stop)
    resumed = made(tmp_path / "parts")
    outcome = resumed.run()
    assert resumed.settings.augment == "none"
    assert (outcome.history, outcome.kept) == (expected.history, expected.kept)
    assert not differences(state(resumed), state(whole)) and steps(resumed.folder) == steps(whole.folder)

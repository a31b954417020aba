"""The temperature of the validation rows: found, folded into the head, and of no influence on any answer."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.data.splits import Splits
from finetune.data.task import Task
from finetune.train.calibration import applies, cooled, fold, reliability, temperature
from finetune.train.evaluate import Evaluation
from tests.train.runs import cool_and_plain

TASK = Task("single_label_classification", "image", ("a", "b", "c"))


def found(rows: int, sure: float, seed: int = 0) -> Evaluation:
    """Classes drawn from the probabilities of some logits, which are then told `sure` times as large."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, 3)) * 1.5
    share = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    targets = np.array([rng.choice(3, p=each) for each in share])
    return Evaluation(logits * sure, targets, 1.0, {}, np.ones(rows))


@pytest.mark.parametrize("sure", [0.5, 1.0, 4.0])
def test_the_temperature_undoes_what_was_too_sure(sure: float) -> None:
    assert temperature(found(20_000, sure)) == pytest.approx(sure, rel=0.05)


def test_few_rows_that_are_all_right_do_not_ask_for_certainty() -> None:
    right = Evaluation(np.eye(3)[[0, 1, 2] * 4] * 2.0, np.array([0, 1, 2] * 4), 0.1, {}, np.ones(12))
    assert 0.3 < temperature(right) < 1.0


def test_reliability() -> None:
    honest, boasting = reliability(found(50_000, 1.0)), reliability(found(50_000, 4.0))
    assert honest["ece"] < 0.01 < 0.1 < boasting["ece"] and honest["log_loss"] < boasting["log_loss"]
    assert sum(rows for *_, rows in honest["bins"]) == 50_000
    assert all(abs(sure - right) < 0.03 for sure, right, rows in honest["bins"] if rows > 1_000)


def test_a_folded_layer_answers_what_the_cooled_evaluation_says() -> None:
    layer, before = torch.nn.Linear(4, 3), found(50, 3.0)
    inputs = torch.randn(50, 4)
    with torch.no_grad():
        outputs = layer(inputs).numpy().copy()
        fold(layer, 2.5)
        assert np.allclose(layer(inputs).numpy(), outputs / 2.5, atol=1e-6)
    after = cooled(before, TASK, 2.5)
    assert np.array_equal(after.outputs.argmax(1), before.outputs.argmax(1))
    assert after.loss == after.metrics["loss"] == pytest.approx(reliability(after)["log_loss"])


def test_what_has_no_temperature() -> None:
    assert applies(found(9, 1.0), TASK)
    assert not applies(found(9, 1.0), Task("regression", "image", ("a", "b", "c")))
    assert not applies(Evaluation({"a": np.ones(3)}, np.ones(3), 1.0, {}, None), TASK)


def test_in_a_run(square_splits: Splits, resnet: Path, tmp_path: Path) -> None:
    cool, plain = cool_and_plain(square_splits, resnet, tmp_path, "fc")
    kept = json.loads((tmp_path / "cool" / "run.json").read_text())["calibration"]
    before, after = kept["valid"]["before"], kept["valid"]["after"]
    assert after["log_loss"] == pytest.approx(cool.metrics["valid"]["log_loss"], rel=1e-5)
    assert before["log_loss"] == pytest.approx(plain.metrics["valid"]["log_loss"], rel=1e-4)
    assert after["log_loss"] <= before["log_loss"]
    assert cool.metrics["valid"]["accuracy"] == plain.metrics["valid"]["accuracy"]

"""Classes with many rows and with few: what weighing them alike does, and that it is in the checkpoint."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

import finetune
from finetune.data.splits import Splits
from finetune.data.task import Task, metrics
from finetune.train.balance import evened, measure
from finetune.train.evaluate import Evaluation

TASK = Task("single_label_classification", "text", ("many", "few"))


def evaluation(logits: list[list[float]], targets: list[int]) -> Evaluation:
    outputs, true = np.array(logits, dtype=np.float32), np.array(targets)
    found = metrics(TASK, outputs, true)
    return Evaluation(outputs, true, 0.5, found, (outputs.argmax(1) == true) * 1.0)


def test_a_rare_class_is_answered_where_the_evidence_is_for_it() -> None:
    # The model has learnt p(x | class) and the shares 9 to 1: the third row speaks for "few" by 2 to 1.
    shares = np.log([0.9, 0.1])
    evidence = np.log([[0.8, 0.2], [0.7, 0.3], [1 / 3, 2 / 3], [0.1, 0.9]])
    found = evaluation((evidence + shares).tolist(), [0, 0, 1, 1])
    assert found.metrics["accuracy"] == 0.5
    balance = measure([0] * 9 + [1], found, TASK)
    assert balance.ratio == 9.0 and balance.log_share_C == pytest.approx(shares)
    assert balance.f1_before == pytest.approx(1 / 3) and balance.f1_after == 1.0
    np.testing.assert_allclose(evened(found, TASK, shares).outputs, evidence, atol=1e-6)
    assert "9 rows of the commonest class" in balance.line(applied=False)
    assert balance.to_json(applied=True)["applied"] is True


def test_a_class_without_rows_counts_as_one() -> None:
    balance = measure([0] * 9, evaluation([[1.0, 0.0]], [0]), TASK)
    assert balance.ratio == 1.0 and balance.log_share_C == pytest.approx(np.log([0.9, 0.1]))


def uneven(splits: Splits) -> Splits:
    """All rows of the first class, two of each other one."""
    from dataclasses import replace

    seen: dict[int, int] = {}
    rows = []
    for row, target in enumerate(splits.train["target"][:]):
        seen[target] = seen.get(target, 0) + 1
        if target == 0 or seen[target] <= 2:
            rows.append(row)
    return replace(splits, train=splits.train.select(rows))


def test_the_checkpoint_has_it(
    square_splits: Splits, resnet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits, found = uneven(square_splits), {}
    counts = np.bincount(splits.train["target"][:])
    for balance in (False, True):
        out = tmp_path / str(balance)
        run = finetune.fit(splits, resnet, out=out, settings={"balance": balance, "epochs": 1})
        found[balance] = load_file(out / "model" / "model.safetensors"), run.record
        assert "macro-F1 on validation" in capsys.readouterr().out
    head = timm.create_model(f"local-dir:{tmp_path / 'True' / 'model'}", pretrained=True).pretrained_cfg["classifier"]
    [(plain, record), (changed, balanced)] = found[False], found[True]
    difference = plain[f"{head}.bias"] - changed[f"{head}.bias"]
    torch.testing.assert_close(
        difference, torch.from_numpy(np.log(counts / counts.sum())).float(), atol=1e-5, rtol=1e-4
    )
    assert all(torch.equal(plain[name], changed[name]) for name in plain if name != f"{head}.bias")
    assert record["balance"]["applied"] is False and balanced["balance"]["applied"] is True
    assert record["balance"]["f1_macro"]["weighed_alike"] == pytest.approx(balanced["metrics"]["valid"]["f1_macro"])
    assert record["balance"]["ratio"] == counts.max() / counts.min()


def test_where_it_cannot_be(square_splits: Splits, resnet: Path, tmp_path: Path) -> None:
    with pytest.raises(finetune.PlanError, match="balance=True: is folded into the bias of a new linear head"):
        finetune.fit(
            square_splits, resnet, out=tmp_path / "run", settings={"balance": True},
            loss=torch.nn.functional.cross_entropy,
        )  # fmt: skip

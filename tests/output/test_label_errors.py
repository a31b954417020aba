"""Labels that were turned are found again, by models that have not seen them."""

import csv
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from PIL import Image

import finetune
from finetune.data.folds import folds
from finetune.data.task import Task
from finetune.errors import DataError
from finetune.output.label_errors import OutOfFold, label_errors, out_of_fold, read_out_of_fold, write_label_errors
from tests.conftest import COLOURS

TASK = Task("single_label_classification", "image", ("cat", "dog", "owl"))


def test_flipped_labels_are_on_top_of_the_list(resnet: Path, tmp_path: Path) -> None:
    rng, names = np.random.default_rng(0), list(COLOURS)
    labels = [names[i % 3] for i in range(120)]
    images = [
        Image.fromarray(np.clip(rng.normal(COLOURS[c], 60, (32, 32, 3)), 0, 255).astype(np.uint8)) for c in labels
    ]
    flipped = rng.choice(120, 6, replace=False)  # 5 %
    for row in flipped:
        labels[row] = names[(names.index(labels[row]) + 1) % 3]
    splits = finetune.load_images(DatasetDict({"train": Dataset.from_dict({"image": images, "label": labels})}))
    parts = []
    for number, part in enumerate(folds(splits, 3)):
        run = finetune.fit(part, resnet, out=tmp_path / str(number), epochs=1, batch_size=16)
        parts.append(out_of_fold(run.pretrained, part))
        assert parts[-1].metrics["accuracy"] == pytest.approx(run.metrics["test"]["accuracy"])
    found = parts[0] + parts[1] + parts[2]
    assert len(set(found.ids)) == len(found.given) == 120 and np.allclose(found.probabilities.sum(1), 1)
    errors = label_errors(found)
    wrong = {f"train[{row}]" for row in flipped}
    assert wrong < set(found.ids) and len({error.id for error in errors[:6]} & wrong) >= 5
    for error in errors[:6]:
        assert error.given != error.likely and error.confidence > error.probability
    assert [e.probability for e in errors] == sorted(e.probability for e in errors)


def made() -> OutOfFold:
    probabilities = np.array([[0.7, 0.2, 0.1], [0.6, 0.1, 0.3], [0.5, 0.01, 0.49], [0.1, 0.1, 0.8]])
    return OutOfFold(("1.png", "2.png", "3.png", "4.png"), np.array([0, 1, 1, 2]), probabilities, TASK)


def test_tables(tmp_path: Path) -> None:
    found = made()
    assert found.metrics["accuracy"] == 0.5
    found.write(tmp_path / "all.csv")
    again = read_out_of_fold(tmp_path / "all.csv", TASK)
    assert again.ids == found.ids and (again.given == found.given).all()
    assert np.allclose(again.probabilities, found.probabilities)
    write_label_errors(label_errors(found), tmp_path / "errors.csv")
    with (tmp_path / "errors.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["id", "given", "likely", "confidence", "probability of given"],
            ["3.png", "dog", "cat", "0.5000", "0.01"], ["2.png", "dog", "cat", "0.6000", "0.1"],
        ]  # fmt: skip


def test_other_tasks_are_refused(square_splits: finetune.Splits, bert: Path) -> None:
    rows = Dataset.from_dict({"text": [f"text {i}" for i in range(20)], "label": [float(i) for i in range(20)]})
    part = folds(finetune.load_table(rows), 2)[0]
    with pytest.raises(DataError, match="^label errors: found among rows with one label each, not for regression"):
        out_of_fold(finetune.load_backbone(str(bert), part.task), part)

"""The surest mistakes are kept with what was seen, and nothing else."""

from pathlib import Path

import numpy as np
from datasets import Dataset, Image
from PIL import Image as Pictures

from finetune.data.task import Task
from finetune.output.mistakes import LETTERS, MOST, keep_mistakes, read_mistakes
from finetune.train.evaluate import Evaluation

TASK = Task("single_label_classification", "text", ("no", "yes"))


def evaluated(logits: list[list[float]], targets: list[int]) -> Evaluation:
    return Evaluation(np.array(logits), np.array(targets), 0.5, {}, np.ones(len(targets)))


def test_texts_of_both_splits_the_surest_first(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"id": ["a", "b", "c"], "text": ["x " * 400, "fine", "bad"], "target": [0, 1, 1]})
    found = {
        "valid": (rows, evaluated([[0, 2], [0, 9], [1, 0]], [0, 1, 1])),
        "test": (rows, evaluated([[9, 0], [4, 0], [0, 9]], [0, 1, 1])),
    }
    keep_mistakes(tmp_path / "predictions", TASK, found)
    kept = read_mistakes(tmp_path / "predictions")
    assert [(each["split"], each["id"], each["label"], each["prediction"]) for each in kept] == [
        ("test", "b", "yes", "no"), ("valid", "a", "no", "yes"), ("valid", "c", "yes", "no")
    ]  # fmt: skip
    assert kept[0]["probability"] == 0.982 and kept[0]["probability_of_label"] == 0.018
    assert len(kept[1]["text"]) == LETTERS and kept[2]["text"] == "bad"


def test_pictures_are_small_and_one_that_is_gone_is_left_out(tmp_path: Path) -> None:
    Pictures.new("RGB", (400, 300), "red").save(tmp_path / "a.png")
    rows = Dataset.from_dict(
        {"id": ["a", "b"], "image": [str(tmp_path / "a.png"), str(tmp_path / "gone.png")], "target": [0, 0]}
    ).cast_column("image", Image(decode=False))
    keep_mistakes(tmp_path, TASK, {"valid": (rows, evaluated([[0, 3], [0, 2]], [0, 0]))})
    with Pictures.open(tmp_path / "mistake00.jpg") as image:
        assert image.size == (160, 120)
    first, second = read_mistakes(tmp_path)
    assert first["picture"].startswith("data:image/jpeg;base64,") and "picture" not in second


def test_no_more_than_a_page_holds_and_nothing_of_other_tasks(tmp_path: Path) -> None:
    count = MOST + 5
    rows = Dataset.from_dict({"id": [str(i) for i in range(count)], "text": ["x"] * count, "target": [0] * count})
    keep_mistakes(
        tmp_path / "a", TASK, {"valid": (rows, evaluated([[0, 1]] * count, [0] * count)), "test": (rows, None)}
    )
    assert len(read_mistakes(tmp_path / "a")) == MOST
    keep_mistakes(
        tmp_path / "b", Task("regression", "text", ("x",)), {"valid": (rows, evaluated([[0, 1]] * count, [0] * count))}
    )
    assert read_mistakes(tmp_path / "b") == []

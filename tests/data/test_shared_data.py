"""Real data sets, where they are there: <repository>/../shared/data, or the folder that FINETUNE_DATA names."""

import os
from pathlib import Path

import pytest

from finetune.data.sources import load_dataset, load_table
from finetune.data.task import Task

DATA = Path(os.environ.get("FINETUNE_DATA", Path(__file__).parents[3] / "shared" / "data"))
pytestmark = [pytest.mark.data, pytest.mark.skipif(not DATA.is_dir(), reason=f"no data in {DATA}")]

SINGLE, MULTI, NUMBER, TAGS = (
    "single_label_classification", "multi_label_classification", "regression", "token_classification",
)  # fmt: skip
# name, kind, outputs, train, test; rows of train that are left out, and why
SETS = [
    ("vision/hymenoptera", SINGLE, 2, 244, 153, {}),
    ("vision/dogs_cats", SINGLE, 2, 800, 400, {}),
    ("vision/face_mask", SINGLE, 2, 800, 300, {}),
    ("vision/cifar10_small", SINGLE, 10, 2000, 1000, {}),
    ("vision/bccd_multilabel", MULTI, 3, 273, 91, {}),
    ("text/sst2", SINGLE, 2, 6920, 1821, {"also in test": 3}),
    ("text/trec6", SINGLE, 6, 5452, 500, {"also in test": 11}),
    ("text/cr", SINGLE, 2, 2967, 800, {"empty text": 2}),
    ("text/ag_news", SINGLE, 4, 6000, 1600, {}),
    ("text/sms_spam", SINGLE, 2, 4169, 1000, {"also in test": 6}),
    ("text/banking77", SINGLE, 77, 10003, 3080, {"also in test": 7}),
    ("text/tweet_emotion", SINGLE, 4, 3257, 1421, {}),
    ("text/sts", NUMBER, 1, 4800, 1462, {"also in test": 5}),
    ("text/wnut17", TAGS, 13, 3394, 1287, {}),
]


@pytest.mark.parametrize(("name", "kind", "outputs", "train", "test", "left_out"), SETS, ids=[row[0] for row in SETS])
def test_counts(name: str, kind: str, outputs: int, train: int, test: int, left_out: dict[str, int]):
    label = ["RBC", "WBC", "Platelets"] if "bccd" in name else None
    splits = load_dataset(DATA / name, label=label)
    assert (splits.task.kind, splits.task.outputs) == (kind, outputs)
    assert splits.n["train"] + splits.n["valid"] + len(splits.report.left_out) == train
    assert splits.n["test"] == test
    reasons = [entry.reason.partition(": ")[0] for entry in splits.report.left_out]
    assert {reason: reasons.count(reason) for reason in reasons} == left_out
    assert splits.n["valid"] == pytest.approx(0.15 * train, rel=0.03)


def test_counts_of_cells_are_a_regression():
    splits = load_table(DATA / "vision" / "bccd_multilabel", image="file", targets=["n_RBC", "n_WBC", "n_Platelets"])
    assert splits.task == Task(NUMBER, "image", ("n_RBC", "n_WBC", "n_Platelets"))

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest

from finetune.data.draw import draw
from finetune.data.sources import load_dataset, load_images, load_table
from finetune.data.task import Task
from finetune.errors import DataError

Make = Callable[..., Path]
SINGLE = Task("single_label_classification", "text", ("a", "b", "c"))


def unique(n: int) -> list[str]:
    return [f"key {i}" for i in range(n)]


def test_classes_keep_their_share():
    targets = [0] * 600 + [1] * 300 + [2] * 100
    chosen = draw(unique(1000), targets, SINGLE, seed=0)
    assert Counter(targets[row] for row in chosen) == {0: 90, 1: 45, 2: 15}


@pytest.mark.parametrize(("n", "drawn"), [(10, 2), (100, 20), (1000, 150), (100_000, 2000)])
def test_number_of_rows(n: int, drawn: int):
    assert len(draw(unique(n), [i % 2 for i in range(n)], SINGLE, seed=0)) == drawn


def test_seed_decides():
    targets = [i % 3 for i in range(300)]
    first = draw(unique(300), targets, SINGLE, seed=1)
    assert first == draw(unique(300), targets, SINGLE, seed=1) != draw(unique(300), targets, SINGLE, seed=2)


def test_more_classes_than_rows_drawn():
    targets = [i // 2 for i in range(140)]
    chosen = draw(unique(140), targets, Task(SINGLE.kind, "text", tuple(map(str, range(70)))), seed=0)
    assert len(chosen) == 28 and len({targets[row] for row in range(140) if row not in chosen}) == 70


def test_equal_inputs_stay_together_and_crowds_in_train():
    keys = [f"key {i // 2}" for i in range(400)] + ["crowd"] * 200
    chosen = draw(keys, [0, 0, 1, 1] * 100 + [0, 1] * 100, SINGLE, seed=0)
    assert not {keys[row] for row in chosen} & {keys[row] for row in range(600) if row not in chosen}
    assert not any(keys[row] == "crowd" for row in chosen)


def test_a_class_that_only_a_conflict_has_stays_in_train():
    keys = [*unique(200), "key 0"]
    for seed in range(100):
        assert not {0, 200} & draw(keys, [0, 1] * 100 + [2], SINGLE, seed)


def test_regression_is_stratified_by_range():
    targets = [[float(value)] for value in np.random.default_rng(0).permutation(1000)]
    chosen = np.array(
        [targets[row][0] for row in draw(unique(1000), targets, Task("regression", "text", ("y",)), seed=0)]
    )
    assert np.histogram(chosen, 10, (0, 1000))[0].tolist() == [15] * 10


@pytest.mark.parametrize("kind", ["multi_label_classification", "token_classification"])
def test_rare_tags_are_in_both_and_never_missing_in_train(kind: str):
    task = Task(kind, "text", tuple("abcdef"))
    rng = np.random.default_rng(0)
    on = (rng.random((500, 6)) < [0.9, 0.5, 0.3, 0.1, 0.03, 0]).astype(float)
    on[7, 5] = 1  # one example of f
    targets = on.tolist() if kind.startswith("multi") else [np.flatnonzero(row).tolist() for row in on]
    for seed in range(5):
        chosen = sorted(draw(unique(500), targets, task, seed))
        rest = [row for row in range(500) if row not in chosen]
        assert (on[rest].sum(axis=0) > 0).all()
        assert on[chosen][:, 4].sum() == pytest.approx(0.15 * on[:, 4].sum(), abs=1.5)


def test_every_class_stays_in_train_of_a_small_set(table: Make):
    rows = [f"text {i},{label}" for i, label in enumerate("aabbccd" * 2 + "e")]
    splits = load_table(table("\n".join(["text,label", *rows])))
    assert all(splits.report.classes.values()) and splits.n == {"train": 12, "valid": 3}


def test_multi_label_from_columns_lists_and_strings(table: Make):
    rows = [f"text {i},{i % 2},{int(i % 3 == 0)}" for i in range(12)]
    columns = load_table(table("\n".join(["text,red,big", *rows])), label=["red", "big"])
    assert columns.task == Task("multi_label_classification", "text", ("red", "big"))
    assert dict(zip(columns.train["id"], columns.train["target"], strict=True))["reviews.csv:2"] == [0, 1]
    lists = datasets.Dataset.from_dict(
        {
            "text": [f"text {i}" for i in range(12)],
            "labels": [["red"] * (i % 2) + ["big"] * (i % 3 == 0) for i in range(12)],
        }
    )
    found = load_table(lists)
    assert found.task.labels == ("big", "red")
    by_id = {row["id"]: row["target"] for data in found.named.values() for row in data}
    assert by_id["train[0]"] == [1, 0] and by_id["train[1]"] == [0, 1] and by_id["train[2]"] == [0, 0]
    strings = table(
        "\n".join(["text,tags", *(f"text {i},{'red|big' if i % 2 else 'red'}" for i in range(12))]), "s.csv"
    )
    assert load_table(strings, task="multi_label").report.classes["big"] in (4, 5)
    hot = datasets.Dataset.from_dict({"text": lists["text"][:], "label": [[i % 2, int(i % 3 == 0)] for i in range(12)]})
    assert load_table(hot).task.labels == ("0", "1")


def test_multi_label_warns_of_constant_labels_and_leaves_out_other_numbers(table: Make):
    rows = [f"text {i},1,{i % 2}" for i in range(12)]
    splits = load_table(table("\n".join(["text,red,big", *rows, "more,1,2"])), label=["red", "big"], task="multi_label")
    assert splits.report.warnings == ("Label 'red' is on in every row of train; nothing is learned about it.",)
    assert splits.report.left_out[0].reason == "label 2 is neither 0 nor 1"


def test_regression_targets(table: Make):
    splits = load_table(table("\n".join(["text_a,text_b,score", *(f"a{i},b{i},{i}.5" for i in range(12))])))
    assert splits.task == Task("regression", "text", ("score",)) and splits.report.classes == {}
    assert splits.train[0]["target"] == [float(splits.train[0]["text"][1:]) + 0.5]
    assert set(splits.train.column_names) == {"id", "text", "text_pair", "target"}


def test_tokens(table: Make):
    rows = ['{"tokens": ["a", "%d"], "tags": ["O", "%s"]}' % (i, "B-x" if i % 2 else "O") for i in range(12)]  # noqa: UP031
    splits = load_table(table("\n".join(rows), "train.jsonl"))
    assert splits.task == Task("token_classification", "text", ("B-x", "O"))
    assert set(splits.train.column_names) == {"id", "tokens", "target"}
    assert all(row["target"] == [1, 1 - int(row["tokens"][1]) % 2] for row in splits.train)


def test_numbers_as_classes(table: Make):
    splits = load_table(table("\n".join(["text,label", *(f"text {i},{i % 3}" for i in range(12))])))
    assert splits.task.labels == ("0", "1", "2")
    floats = load_table(table("\n".join(["text,label", *(f"text {i},{i % 3}.0" for i in range(60))])))
    assert floats.task.labels == ("0", "1", "2")


def test_fingerprint_follows_the_content(reviews: Make, folder: Make, tmp_path: Path):
    path = reviews(20)
    first = load_table(path).fingerprint
    assert first == load_dataset(str(path)).fingerprint != load_table(path, seed=1).fingerprint
    root = folder(cat=5, dog=5)
    there = load_images(root).fingerprint
    assert there == load_images(root.rename(tmp_path / "moved")).fingerprint


def test_groups_stay_on_one_side(tmp_path):
    lines = [f"visit {i} of {i % 9},{'ab'[i % 2]},p{i % 9}" for i in range(90)]
    path = tmp_path / "train.csv"
    path.write_text("\n".join(["text,label,patient", *lines]) + "\n")
    splits = load_table(path, group="patient")
    sides = [{row["text"].split()[-1] for row in part} for part in (splits.train, splits.valid)]
    assert sides[0] and sides[1] and not sides[0] & sides[1] and len(splits.valid) in (10, 20)
    plain = load_table(path, text="text", label="label")
    assert {r["text"].split()[-1] for r in plain.train} & {r["text"].split()[-1] for r in plain.valid}
    test = tmp_path / "test.csv"
    test.write_text("text,label,patient\nanother,a,p3\nmore,b,q1\n")
    warned = load_table(path, group="patient", test=test).report.warnings
    assert warned == (
        "1 of the 'patient' groups of train are in test too (p3 among them): its score is partly of what was seen.",
    )


def test_groups_that_make_no_sense(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("\n".join(["text,label,patient", *(f"visit {i},{'ab'[i % 2]},p" for i in range(20))]) + "\n")
    with pytest.raises(DataError, match=r"no column 'doctor'; the columns are text .*; name one with group="):
        load_table(path, group="doctor")
    with pytest.raises(DataError, match="all rows are of one 'patient'; give valid=, or another column to group by"):
        load_table(path, group="patient")

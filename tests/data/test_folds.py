"""Folds: each row is held out once, classes are spread evenly, and what belongs together stays together."""

from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset

from finetune.data.folds import folds, group_column
from finetune.data.sources import load_table
from finetune.data.splits import Splits
from finetune.errors import DataError


def texts(n: int = 60, *, repeats: int = 0, values: bool = False) -> Splits:
    """Sentences in three classes of different sizes, the last ones repeated."""
    words = [f"sentence number {i} of them" for i in range(n)]
    labels = [float(i) if values else ("a", "b", "c", "c", "c")[i % 5] for i in range(n)]
    words, labels = words + words[n - repeats :], labels + labels[n - repeats :]
    return load_table(Dataset.from_dict({"text": words, "label": labels}))


def held(part: Splits) -> Dataset:
    """The rows that a fold holds out."""
    assert part.test is not None
    return part.test


def test_every_row_is_held_out_once_and_classes_are_spread() -> None:
    splits = texts()
    made = folds(splits, 5)
    assert len(made) == 5
    out = [name for part in made for name in held(part)["id"]]
    assert sorted(out) == sorted([*splits.train["id"], *splits.valid["id"]]) and len(set(out)) == 60
    for part in made:
        ids = [set(data["id"]) for data in part.named.values()]
        assert not ids[0] & ids[1] and not ids[2] & (ids[0] | ids[1]) and len(set().union(*ids)) == 60
        assert part.report.counts == part.n and sum(part.report.classes.values()) == len(part.train)
        counts: Counter[int] = Counter(held(part)["target"])
        assert 2 <= counts[0] <= 3 and 2 <= counts[1] <= 3 and 6 <= counts[2] <= 9
        assert set(part.valid["target"]) == {0, 1, 2}
    assert "fold 2 of 5" in made[1].source and made[0].task == splits.task


def test_same_seed_same_folds() -> None:
    splits = texts()
    ids = [[held(part)["id"][:] for part in folds(splits, 3, seed=seed)] for seed in (1, 1, 2)]
    assert ids[0] == ids[1] != ids[2]


def test_repeats_are_on_one_side() -> None:
    splits = texts(50, repeats=20)
    for part in folds(splits, 4):
        assert not {*held(part)["text"]} & {*part.train["text"], *part.valid["text"]}
        assert not {*part.train["text"]} & {*part.valid["text"]}


def test_groups_are_on_one_side_also_where_repeats_tie_them() -> None:
    splits = texts(50, repeats=10)
    rows = {row["id"]: row["text"] for data in (splits.train, splits.valid) for row in data}
    groups = {name: place // 3 for place, name in enumerate(sorted(rows, key=lambda name: int(name[6:-1])))}
    sides: dict[object, set[int]] = {}
    for number, part in enumerate(folds(splits, 4, groups=groups)):
        of = [{groups[name] for name in data["id"]} for data in part.named.values()]
        assert not of[0] & of[1] and not of[2] & (of[0] | of[1])
        assert not {*held(part)["text"]} & {*part.train["text"], *part.valid["text"]}
        assert len(part.valid) >= 3
        for group in of[2]:
            sides.setdefault(group, set()).add(number)
    assert len(sides) == 20 and all(len(found) == 1 for found in sides.values())


def test_values_are_spread_too() -> None:
    for part in folds(texts(values=True), 3):
        out = sorted(target[0] for target in held(part)["target"])
        assert out[0] < 10 and out[-1] > 49 and len(out) == 20


def test_small_classes_do_not_stop_it() -> None:
    rows = Dataset.from_dict({"text": [f"text {i}" for i in range(20)], "label": ["a"] * 10 + ["b"] * 9 + ["c"]})
    assert [len(held(part)) for part in folds(load_table(rows), 5)] == [4] * 5
    each = Dataset.from_dict(
        {"text": [f"text {i}" for i in range(12)], "label": [f"{'abcdef'[i // 2]}" for i in range(12)]}
    )
    assert sum(len(held(part)) for part in folds(load_table(each), 4)) == 12


def test_a_column_gives_the_groups(tmp_path: Path) -> None:
    lines = [f"the scan {i} of many,{('yes', 'no')[i % 2]},p{i // 4}" for i in range(40)]
    (tmp_path / "scans.csv").write_text("\n".join(["text,label,patient", *lines]))
    groups = group_column(str(tmp_path / "scans.csv"), "patient")
    splits = load_table(str(tmp_path / "scans.csv"))
    assert {*splits.train["id"], *splits.valid["id"]} == set(groups) and set(groups.values()) == {
        f"p{i}" for i in range(10)
    }
    assert len(folds(splits, 5, groups=groups)) == 5
    with pytest.raises(DataError, match=r"scans.csv: no column 'person' to group by; it has text, label, patient$"):
        group_column(str(tmp_path / "scans.csv"), "person")


def test_what_is_refused() -> None:
    splits = texts(20)
    for count in (1, 21):
        with pytest.raises(DataError, match=rf"^folds={count}: at least 2, and at most the 20 different rows"):
            folds(splits, count)
    with pytest.raises(DataError, match=r"^groups: 19 rows have none, "):
        folds(splits, 2, groups={splits.train["id"][0]: 1})
    with pytest.raises(DataError, match=r"^folds=3: .*the 2 groups of rows"):
        folds(splits, 3, groups={name: i % 2 for i, name in enumerate([*splits.train["id"], *splits.valid["id"]])})

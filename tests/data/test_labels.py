import math
from typing import Any

import pytest

from finetune.data.labels import (
    as_list,
    as_number,
    infer_kind,
    is_missing,
    label_name,
    label_order,
    make_task,
    multi_hot,
)
from finetune.errors import DataError

SINGLE, MULTI, NUMBER, TAGS = (
    "single_label_classification", "multi_label_classification", "regression", "token_classification",
)  # fmt: skip


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["pos", "neg", "neg"], SINGLE),
        ([True, False], SINGLE),
        ([0, 1, 2, 1], SINGLE),
        (["0", "1", "2"], SINGLE),
        (["007", "008"], SINGLE),
        ([0.5, 1.0, 2.25], NUMBER),
        (["3.6", "4.0", "0.2"], NUMBER),
        (["1e-5", "2e-5"], NUMBER),
        ([1.0, 2.0, 3.0] * 30, SINGLE),  # whole numbers, few of them
        ([float(i) for i in range(100)], NUMBER),  # whole numbers, many
        (list(range(100)), NUMBER),  # integers that never repeat
        (list(range(50)) * 4, SINGLE),
        ([1, "a", 2], SINGLE),
        ([["red", "big"], ["red"], []], MULTI),
        ([[0, 3], [1]], MULTI),
        ([[0, 1, 0], [1, 1, 0]], MULTI),
        ([[0.5, 1.5], [2.0, 0.1]], NUMBER),
        (["['red', 'big']", "[]"], MULTI),
    ],
)
def test_kind_is_told_from_labels(cells: list[Any], kind: str):
    assert infer_kind(cells) == kind


def test_kind_of_several_columns_and_of_tokens():
    assert infer_kind([("0", "1"), ("1", "1")], several=True) == MULTI
    assert infer_kind([(0, True), (1, False)], several=True) == MULTI
    assert infer_kind([(3, 1), (4, 0)], several=True) == NUMBER
    assert infer_kind([["O", "B-x"]], tokens=True) == TAGS


def make(cells: list[Any], **options: Any) -> tuple[str, ...]:
    return make_task(cells, columns=("label",), modality="text", **options).labels


def test_labels_are_sorted_numbers_by_value():
    assert make(["b", "a", "b"]) == ("a", "b")
    assert make(["10", "9", "1"]) == ("1", "9", "10")
    assert make([2.0, 1.0] * 20) == ("1", "2")
    assert make([1, "a"]) == ("1", "a")
    assert make([["red"], ["big", "red"]]) == ("big", "red")
    assert make([[0, 1], [1, 1]]) == ("0", "1")
    assert label_order({"10", "9.5"}) == ("9.5", "10")


def test_declared_names_keep_their_order_and_are_classes():
    assert make(["2.5", "1.5"], names=("2.5", "1.5")) == ("2.5", "1.5")
    assert make_task(["2.5", "1.5"], columns=("label",), modality="text", names=("2.5", "1.5")).kind == SINGLE


def test_regression_is_named_after_its_columns():
    task = make_task([(1.5, 2), (3, 4)], columns=("age", "mass"), modality="image")
    assert (task.kind, task.labels, task.outputs) == (NUMBER, ("age", "mass"), 2)
    assert make([[0.5, 1.5]]) == ("label_0", "label_1")
    assert make([1, 2], kind="regression") == ("label",)


def test_kind_that_does_not_fit_is_refused():
    with pytest.raises(DataError, match="^task: token_classification needs a column with lists of words, name it with"):
        make(["a"], kind="tokens")
    with pytest.raises(DataError, match="^task: regression does not fit lists of words$"):
        make([["a"]], kind="regression", tokens=True)


def test_cells():
    assert [is_missing(cell) for cell in (None, math.nan, "", "  ", "NaN", "None", 0, [])] == [True] * 5 + [False] * 3
    assert [as_number(cell) for cell in ("3", " -1.5", "1e3", "007", "", "x", True, 2)] == [
        3, -1.5, 1000, None, None, None, None, 2
    ]  # fmt: skip
    assert [as_number(cell) for cell in ("0", "0.5", ".5", "-", "inf", "1_000")] == [0, 0.5, 0.5, None, None, None]
    assert [label_name(cell) for cell in (1.0, "1.0", "007", 3, True, " a ", "1e3", "0.0")] == [
        "1", "1", "007", "3", "True", "a", "1e3", "0"
    ]  # fmt: skip
    assert (
        as_list("['a', 'b']") == ["a", "b"] and as_list("[x") is None and as_list("[x]") is None and as_list(3) is None
    )
    assert multi_hot([[0, 1], [1, 1]]) and not multi_hot([[0], [1]]) and not multi_hot([[0, 2], [1, 1]])

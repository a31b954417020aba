"""Runs side by side: the numbers are the folders', and the test on rows is the one that it says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest, wilcoxon

from finetune.errors import RunError
from finetune.output.compare import compare, draw_curves
from tests.output.test_report import MULTI, VALUE, make_run


def rows(right: list[bool]) -> list[list[Any]]:
    return [[f"{i}.png", "cat", "cat" if ok else "dog", 0.9] for i, ok in enumerate(right)]


def test_two_classifiers(tmp_path: Path) -> None:
    right = [i % 3 > 0 for i in range(60)]
    better = [ok or i % 2 == 0 for i, ok in enumerate(right)]
    better[1] = False
    a, b = (
        make_run(tmp_path / "a", rows=rows(right), steps=20),
        make_run(tmp_path / "b", rows=rows(better)[::-1], steps=20),
    )
    found = compare([a, b])
    assert found.names == ("a", "b")
    assert dict(found.lines)["test accuracy"] == ("0.5", "0.5")
    (test,) = found.paired
    assert (test.better, test.worse, test.rows) == (10, 1, 60)
    assert test.p == pytest.approx(binomtest(10, 11).pvalue)
    assert "b against a: better on 10 of 60 test rows, worse on 1; p = 0.012, a difference" in str(found)
    again = compare([a, a])
    assert again.paired[0].p == 1.0 and "no difference that these rows can tell" in str(again)


def test_what_differs_is_shown_and_what_does_not_is_not(tmp_path: Path) -> None:
    a = make_run(tmp_path / "x" / "run", rows=rows([True]), seed=0)
    b = make_run(tmp_path / "y" / "run", rows=rows([True]), seed=1)
    found = compare([a, b])
    assert found.names == ("x/run", "y/run")
    assert ("seed", ("0", "1")) in found.different and "backbone" not in dict(found.different)


def test_numbers_are_tested_by_their_errors(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    target, near, far = rng.normal(size=40), rng.normal(scale=0.1, size=40), rng.normal(scale=1.0, size=40)
    runs = [
        make_run(tmp_path / name, VALUE, ["price"], header=["id", "target price", "price"],
                 rows=[[str(i), t, t + e] for i, (t, e) in enumerate(zip(target, error, strict=True))])
        for name, error in (("far", far), ("near", near))
    ]  # fmt: skip
    (test,) = compare(runs).paired
    assert test.better > 30 and test.p == pytest.approx(wilcoxon(np.abs(far) - np.abs(near)).pvalue)


def test_rows_that_are_not_the_same(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a", rows=rows([True, False])), make_run(tmp_path / "b", rows=rows([True]))
    found = compare([a, b])
    assert found.paired == () and found.notes == ("b against a: no test on rows, for their test rows are not the same",)
    assert "no predictions" in compare([a, make_run(tmp_path / "c")]).notes[0]


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a")
    with pytest.raises(RunError, match="at least two"):
        compare([a])
    with pytest.raises(RunError, match=r"run\.json: .*give the folder of a run"):
        compare([a, tmp_path])
    with pytest.raises(RunError, match="runs of different tasks"):
        compare([a, make_run(tmp_path / "b", MULTI)])


def test_the_picture(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a", steps=20), make_run(tmp_path / "b", steps=20)
    with Image.open(draw_curves(compare([a, b]), tmp_path / "curves" / "c.png")) as picture:
        assert picture.width > 600 and len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 5
    with pytest.raises(RunError, match="give a .png"):
        draw_curves(compare([a, b]), tmp_path / "c.docx")

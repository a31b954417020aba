"""The benchmark of the automatic settings: what it runs next, what it calls regret, and what it takes as its rival."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

dials = pytest.importorskip("scripts.bench.dials", reason="no scripts here")

SMALL = dials.Task("trec6", "minilm", "small")


def entry(arm: str, score: float, *, task: str = SMALL.name, loss: float = 1.0, **settings: Any) -> dict[str, Any]:
    """A run with the same scores on validation and test."""
    figures = {"score": score, "log_loss": loss}
    chosen = {"epochs": 5, "span": 10.0, "cycles": 2 if "/small" in task else 1, "batch_size": 16}
    return {"task": task, "arm": arm, "dials": settings, "seed": 0, "valid": figures, "test": figures,
            "cpu_seconds": 10.0, "chosen": chosen}  # fmt: skip


def test_a_grid_is_run_rung_by_rung_and_goes_on_where_it_stopped() -> None:
    found: list[dict[str, Any]] = []
    seen = []
    best = {3: 3e-4, 10: 1e-3, 30: 3e-4}  # the rate that does best at each length
    while cells := dials.wanted(SMALL, found, "grid"):
        arm, settings = cells[0]
        seen.append(settings)
        score = -abs(math.log10(settings["lr"] / best[settings["epochs"]]))
        found.append(json.loads(json.dumps(entry(arm, score, **settings))))
    epochs = [settings["epochs"] for settings in seen]
    assert epochs == [3] * 18 + [10] * 4 + [30] + [3] * 2
    assert len({dials.key(run) for run in found}) == len(found)
    assert [settings["lr"] for settings in seen[18:]] == [3e-4, 3e-4, 3e-4, 1e-4, 3e-4, 3e-4, 3e-4]
    assert [settings.get("weight_decay") for settings in seen[-3:]] == [None, 0.0, 0.05]
    assert dials.wanted(SMALL, found[:-1], "grid") == [("grid", seen[-1])]


def test_what_has_failed_is_neither_run_again_nor_promoted() -> None:
    cells = dials.wanted(SMALL, [], "grid")
    failed = [{"task": SMALL.name, "arm": arm, "dials": settings, "seed": 0, "error": "x"} for arm, settings in cells]
    assert dials.wanted(SMALL, failed, "grid") == []
    nan = entry("grid", math.nan, lr=1.0)
    assert dials.pick([nan, entry("grid", 0.1, lr=2.0), *failed], 9) == [entry("grid", 0.1, lr=2.0)]


def test_rivals_see_as_many_examples_as_ours() -> None:
    def cells(task: Any) -> dict[str, dict[str, Any]]:
        return dict(both(task, [entry("ours", 0.5, task=task.name)]))

    def both(task: Any, found: list[dict[str, Any]]) -> list[Any]:
        return [*dials.wanted(task, found, "rivals"), *dials.wanted(task, found, "ablations")]

    assert both(SMALL, []) == []  # how many is not known yet
    assert dials.wanted(SMALL, [], "ours") == [("ours", {})]
    texts, images = cells(SMALL), cells(dials.Task("dogs_cats", "torch", "large"))
    assert texts["fastai"] == texts["autogluon"] == texts["no solved head"] == texts["one cycle"] == {"epochs": 5}
    assert texts["no one-cycle"] == {"epochs": 5, "cycles": 2} and texts["hf, 3 epochs"] == texts["one rate"] == {}
    assert texts["no momentum cycle"] == texts["no one-cycle"]
    assert texts["peak rate of 3e-4"] == {"lr": 3e-4, "span": 10.0}  # a given rate would bring the default span along
    of_images, of_large = {"bit", "one view"}, {"no patience", "no average", "no doublings"}
    assert {"stem open", "adapters"} <= set(texts) and not (of_images | of_large) & set(texts)
    assert of_images | of_large <= set(images)
    assert not {"stem open", "one cycle", "adapters"} & set(images)


def test_the_halves_are_apart_and_every_set_is_in_one() -> None:
    assert not set(dials.DEVELOP) & set(dials.HELD_OUT)
    assert len(dials.DEVELOP | dials.HELD_OUT) == 13
    assert [task.name for task in dials.tasks(dials.DEVELOP, "small")][:2] == [
        "hymenoptera/torch/small", "cifar10_small/torch/small",
    ]  # fmt: skip
    assert dials.Task("banking77", "minilm", "small").rows == 400 and SMALL.rows == 200


def test_the_tuned_cell_is_the_best_by_validation_and_of_equal_ones_the_surest() -> None:
    good, sure = entry("grid", 0.9, loss=0.5, lr=1), entry("grid", 0.9, loss=0.4, lr=2)
    assert dials.pick([good, sure, entry("grid", 0.8, loss=0.1, lr=3)], 1) == [sure]
    better_on_test = entry("grid", 0.5, lr=4) | {"test": {"score": 0.99}}
    assert dials.pick([good, better_on_test], 1) == [good]


def test_the_fixed_configuration_never_looks_at_the_set_that_it_is_judged_on() -> None:
    scores = {"a/1": {"x": 1.0, "y": 0.0, "z": 9.0}, "a/2": {"x": 1.0, "y": 0.0}, "b": {"x": 0.2, "y": 0.4}}
    groups = {"a/1": "a", "a/2": "a", "b": "b"}
    assert dials.leave_one_out(scores, groups) == {"a/1": "y", "a/2": "y", "b": "x"}
    assert dials.leave_one_out({"a/1": {"x": 1.0}}, groups) == dials.leave_one_out({}, {}) == {}


def test_regret_is_in_points_and_normalised_by_what_the_grid_has_to_give() -> None:
    found = dials.summary([2.0, -1.0, 0.1], [4.0, 2.0, 0.2])
    normalised = {"normalised": 0.0, "of means": pytest.approx(1.1 / 6.2)}
    assert found == {"mean": pytest.approx(1.1 / 3), "worst": 2.0, "share": 2 / 3} | normalised
    assert math.isnan(dials.summary([2.0], [0.0])["normalised"])


def test_the_bootstrap_draws_sets_and_not_tasks() -> None:
    mean, low, high = dials.bootstrap([1.0, 1.0, 1.0, -1.0], ["a", "a", "a", "b"])
    assert (mean, low, high) == (0.5, -1.0, 1.0)  # a quarter of the draws is b alone
    assert dials.bootstrap([2.0, 2.0], ["a", "b"]) == (2.0, 2.0, 2.0)


def test_the_file_is_whole_and_a_run_stands_in_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dials, "RESULTS", tmp_path / "results" / "dials.json")
    monkeypatch.setattr(dials.tempfile, "gettempdir", lambda: str(tmp_path))
    dials.keep([entry("ours", 0.5), entry("grid", 0.5, lr=1e-3, span=1)])
    dials.keep([entry("grid", 0.6, span=1, lr=1e-3)])
    assert [(run["arm"], run["test"]["score"]) for run in dials.read()] == [("ours", 0.5), ("grid", 0.6)]
    dials.keep([], drop=["ours"])
    assert [run["arm"] for run in dials.read()] == ["grid"]


def test_the_report_compares_ours_with_what_is_chosen_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    runs = []
    for name, best in (("trec6", 3), ("cr", 3), ("sts", 3), ("sst2", 10)):
        task = f"{name}/minilm/small"
        runs += [entry("ours", 0.8, task=task), entry("probe", 0.85, task=task), entry("hf", 0.7, task=task)]
        runs += [entry("grid", 0.9 if cell["epochs"] == best else 0.6, task=task, **cell)
                 for cell in dials.candidates("small")]  # fmt: skip
    cells = dials.candidates("small")  # of two tasks that are not done: one lacks a cell, one the probe
    first, second = "hymenoptera/torch/small", "trec6/llama/small"
    runs += [entry(arm, 0.1, task=first) for arm in ("ours", "probe")] + [entry("ours", 0.1, task=second)]
    runs += [entry("grid", 0.1, task=first, **cell) for cell in cells[1:]]
    runs += [entry("grid", 0.1, task=second, **cell) for cell in cells]
    rows = dials.table_of(runs, "small", dials.DEVELOP)
    assert {unit: row["fixed"]["test"]["score"] for unit, row in rows.items()} == {
        "trec6/minilm/small 0": 0.9, "cr/minilm/small 0": 0.9, "sts/minilm/small 0": 0.9, "sst2/minilm/small 0": 0.6,
    }  # fmt: skip
    dials.report(runs)
    said = capsys.readouterr().out
    assert "### Development, small: 4 tasks, 4 with their seeds" in said and "Held out" not in said
    assert "| ours | 4 | +10.00 | +10.0 | 0.00 | +0.67 | +0.67 | +0.00 | 1.000 | 0 | 4 (4) | 1.00 |" in said


def test_the_seeds_of_a_task_are_averaged_before_anything_is_said_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    runs = []
    for seed, ours, best in ((0, 0.78, 0.8), (1, 0.84, 0.9)):  # probes at 0.8: below by two points, above by four
        of_seed = [entry("ours", ours), entry("probe", 0.8)]
        of_seed += [entry("grid", best if cell["epochs"] == 3 else 0.6, **cell) for cell in dials.candidates("small")]
        runs += [run | {"seed": seed} for run in of_seed]
    rows = dials.table_of(runs, "small", dials.DEVELOP)
    assert dials.by_task({unit: dials.points(row, "ours") for unit, row in rows.items()}) == {
        SMALL.name: pytest.approx(81)
    }
    dials.arm_table(rows)
    said = capsys.readouterr().out
    assert "| ours | 1 | +4.00 | +4.0 | 0.00 | +0.32 | +0.32 | +0.00 | 1.000 | 0 | 0 (1) |" in said
    assert "Ours, run by run: normalised regret +0.30" in said  # 2 of 10 and 6 of 15; together 4 of 12.5
    assert "Ours minus *tuned*: -4.00 points (95 % -4.00 to -4.00, 1 tasks)" in said


def test_later_seeds_have_larger_tests() -> None:
    assert [dials.test_rows(seed) for seed in (0, 1, 2)] == [400, 1000, 1000]


def test_a_choice_that_is_off_is_set_against_ours_where_both_are(capsys: pytest.CaptureFixture[str]) -> None:
    other = "dogs_cats/torch/small"
    runs = [entry("ours", 0.5), entry("ours", 0.8, task=other, loss=0.5), entry("no fallback", 0.4)]
    runs += [entry("no fallback", 0.85, task=other, loss=0.7), entry("no fallback", 0.1, task="cr/minilm/small")]
    dials.ablation_table(runs)
    assert "| no fallback | 2 | -2.50 | -10.0 | +5.0 | +0.100 | 1.00 |" in capsys.readouterr().out

"""Dials: what is given wins, what is not is chosen with a reason, and what makes no sense is refused by name."""

import inspect
import json
import math
from typing import Any

import pytest

from finetune.errors import PlanError
from finetune.plan.onecycle import OneCycle
from finetune.plan.settings import DEFAULTS, DIALS, Settings, choose_settings, for_network, from_solved_head, open_ended


def test_the_dials_are_these() -> None:
    """A new dial needs a measurement that calls for it."""
    assert DIALS == (
        "lr", "span", "head_lr", "weight_decay", "betas", "eps", "batch_size", "accumulation", "epochs", "head_epochs",
        "cycles", "doublings", "clip", "freeze_batchnorm", "pct_start", "div_factor", "ema", "calibrate", "balance",
        "augment", "unfreezing", "lora", "precision", "solve_head", "patience", "replay", "replay_views",
        "replay_memory",
    )  # fmt: skip


@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize("rows", [1, 30, 300, 3_000, 1_000_000])
def test_every_dial_has_a_value_and_a_reason(modality: str, rows: int) -> None:
    table = choose_settings(modality, rows).table()
    assert tuple(table) == DIALS
    for name, entry in table.items():
        assert entry["value"] is not None and entry["by"] == "rule" and len(entry["reason"]) > 5, name
        if name in DEFAULTS:
            assert (entry["value"], entry["reason"]) == DEFAULTS[name][modality]
    assert 16 <= table["batch_size"]["value"] <= 32 and 3 <= table["epochs"]["value"] <= 30
    assert 0 < table["head_epochs"]["value"] <= table["epochs"]["value"] / 2
    json.dumps(table)


def test_small_data_gets_smaller_batches_and_more_epochs() -> None:
    chosen = [choose_settings("image", rows) for rows in (100, 400, 2_000, 50_000)]
    assert [s.batch_size for s in chosen] == [16, 16, 32, 32]
    assert [s.epochs for s in chosen] == [20.0, 8.0, 3.0, 3.0]


GIVEN: dict[str, Any] = {
    "lr": 7e-4, "span": 3.0, "head_lr": 2e-3, "weight_decay": 0.2, "betas": (0.8, 0.95), "eps": 1e-6, "batch_size": 5,
    "accumulation": 4, "epochs": 1.5, "head_epochs": 0.25, "cycles": 1, "doublings": 1, "clip": 0.0,
    "freeze_batchnorm": False, "pct_start": 0.45, "div_factor": 2.0, "ema": False, "calibrate": False, "balance": True,
    "augment": "none", "unfreezing": "none", "lora": 0,
    "precision": "bf16",
    "solve_head": False, "patience": 3, "replay": "off", "replay_views": 2, "replay_memory": 0.5,
}  # fmt: skip


def test_a_given_value_wins_and_is_marked() -> None:
    table = choose_settings("image", 500, precision=("fp32", "why"), given=GIVEN).table()
    assert {name: entry["value"] for name, entry in table.items()} == GIVEN
    assert {entry["by"] for entry in table.values()} == {"user"}
    one = choose_settings("image", 500, given={"clip": 0.0}).table()
    assert {name for name, entry in one.items() if entry["by"] == "user"} == {"clip"}


def test_none_is_not_given() -> None:
    assert choose_settings("text", 500, given=dict.fromkeys(DIALS)) == choose_settings("text", 500)


def test_a_given_rate_takes_the_heads_own_stage_along() -> None:
    plain, given = choose_settings("text", 500), choose_settings("text", 500, given={"lr": 1e-4})
    assert given.head_lr / given.lr == pytest.approx(plain.head_lr / plain.lr)
    assert given.table()["head_lr"]["by"] == "rule" and "given lr" in given.table()["head_lr"]["reason"]
    assert choose_settings("text", 500, given={"lr": 1e-4, "head_lr": 3e-3}).head_lr == 3e-3


@pytest.mark.parametrize(("epochs", "head"), [(0.5, 0.25), (1.0, 0.5), (2.0, 1.0), (4.0, 1.0), (12.0, 3.0)])
def test_the_heads_share_of_given_epochs(epochs: float, head: float) -> None:
    assert choose_settings("image", 500, given={"epochs": epochs}).head_epochs == head


def test_the_machines_precision_and_its_reason() -> None:
    entry = choose_settings("image", 500, precision=("bf16", "the chip can")).table()["precision"]
    assert entry == {"value": "bf16", "reason": "the chip can", "by": "rule"}


def test_an_unknown_dial() -> None:
    with pytest.raises(PlanError, match="^settings: no dial named decay, learning_rate; there are lr, span, head_lr"):
        choose_settings("image", 500, given={"learning_rate": 1e-3, "decay": 0.1, "lr": 1e-3})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", 0.0, "must be above 0"),
        ("lr", math.nan, "must be above 0"),
        ("head_lr", -1.0, "must be above 0"),
        ("eps", 0.0, "must be above 0"),
        ("epochs", 0, "must be above 0"),
        ("batch_size", 0, "must be a whole number of at least 1"),
        ("batch_size", 2.5, "must be a whole number of at least 1"),
        ("accumulation", 0, "must be a whole number of at least 1"),
        ("weight_decay", -0.1, "must not be below 0"),
        ("clip", -1.0, "must not be below 0"),
        ("head_epochs", -1.0, "must not be below 0"),
        ("span", 0.9, "the head's rate over the stem's must be at least 1"),
        ("lora", -1, "must be the rank of the adapters, a whole number, or 0 for none"),
        ("lora", 2.5, "must be the rank of the adapters, a whole number, or 0 for none"),
        ("precision", "fp16", "must be 'fp32' or 'bf16'"),
    ],
)
def test_a_value_outside_its_range(name: str, value: Any, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        choose_settings("image", 500, given={name: value})
    assert str(caught.value) == f"{name}={value!r}: {message}"


def test_more_micro_batches_than_examples() -> None:
    with pytest.raises(PlanError, match="^accumulation=8: more micro-batches than the 4 examples of a step$"):
        choose_settings("image", 500, given={"batch_size": 4, "accumulation": 8})
    assert choose_settings("image", 500, given={"batch_size": 8, "accumulation": 8}).accumulation == 8


@pytest.mark.parametrize(
    ("name", "value"), [("unfreezing", "all"), ("pct_start", 0.0), ("pct_start", 1.0), ("div_factor", 0.5)]
)
def test_what_a_plan_refuses_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(PlanError, match=f"^{name}="):
        choose_settings("image", 500, given={name: value}).default_plan(5)


def test_the_plan_that_the_settings_name() -> None:
    chosen = choose_settings(
        "image", 500, given={"epochs": 4.0, "head_epochs": 0.5, "lr": 1e-3, "head_lr": 2e-3, "pct_start": 0.2,
                             "div_factor": 5.0}
    )  # fmt: skip
    first, second = chosen.default_plan(5)
    assert (first.open_from, first.epochs, first.lr_scale) == (-1, 0.5, 2.0)
    assert (second.open_from, second.epochs, second.lr_scale) == (0, 3.5, 1.0)
    assert first.shape == second.shape == OneCycle(pct_start=0.2, div_factor=5.0)
    alone = choose_settings("image", 500, given={"unfreezing": "one_at_a_time"}).default_plan(5)
    assert [int(stage.open_from) % 5 for stage in alone] == [4, 3, 2, 1, 0]


def test_no_stage_for_the_head_alone() -> None:
    plan = choose_settings("image", 500, given={"epochs": 4.0, "head_epochs": 0.0}).default_plan(5)
    assert [(stage.open_from, stage.epochs) for stage in plan] == [(0, 4.0)]


def test_changed() -> None:
    plain = choose_settings("image", 500, given={"lr": 1e-3})
    changed = plain.changed("12 minutes are left", epochs=2.0)
    assert changed.epochs == 2.0 and plain.epochs != 2.0
    assert changed.table()["epochs"] == {"value": 2.0, "reason": "12 minutes are left", "by": "measured"}
    assert changed.table()["lr"]["by"] == "user"
    with pytest.raises(PlanError, match="^epochs=-1.0: must be above 0$"):
        plain.changed("no reason", epochs=-1.0)


def test_printing() -> None:
    lines = str(choose_settings("image", 500, given={"lr": 1.5e-3})).splitlines()
    assert [line.split()[0] for line in lines] == list(DIALS)
    assert lines[0].split(maxsplit=3) == ["lr", "0.0015", "user", "given by the user"]


def test_every_field_is_documented() -> None:
    assert [name for name in DIALS if f"\n    {name}: " not in str(inspect.getdoc(Settings))] == []


@pytest.mark.parametrize(
    ("modality", "rows", "width", "groups", "lr"),
    [
        ("text", 200, 384, 8, 3 / (384 * 8)),  # MiniLM
        ("text", 200, 768, 14, 3 / (768 * 14)),  # BERT
        ("text", 200, 64, 7, 1e-3),
        ("text", 5_000, 384, 8, 0.3 * 3 / (384 * 8)),
        ("text", 5_000, 64, 7, 1e-3),
        ("image", 5_000, 1280, 19, 3 / (1280 * 19)),
    ],
)
def test_the_rate_falls_with_width_and_depth(modality: str, rows: int, width: int, groups: int, lr: float) -> None:
    chosen = for_network(
        from_solved_head(choose_settings(modality, rows), modality, rows), modality, rows, width=width, groups=groups
    )
    assert chosen.lr == pytest.approx(lr, rel=1e-3)
    assert f"{groups} layer groups, {width} wide" in chosen.reasons["lr"][0]
    given = choose_settings(modality, rows, given={"lr": 0.5})
    assert for_network(given, modality, rows, width=width, groups=groups).lr == 0.5


def test_images_with_a_head_that_is_not_solved_keep_the_published_rate() -> None:
    chosen = choose_settings("image", 200, given={"solve_head": False})
    assert for_network(chosen, "image", 200, width=1280, groups=19).lr == DEFAULTS["lr"]["image"][0]


def test_few_rows_are_trained_on_twice() -> None:
    few, many = (from_solved_head(choose_settings("text", rows), "text", rows) for rows in (200, 700))
    assert (few.cycles, many.cycles) == (2, 1)
    assert few.epochs == 2 * 10 and len(few.default_plan(8)) == 2 and len(many.default_plan(8)) == 1
    one = from_solved_head(choose_settings("text", 200, given={"cycles": 1}), "text", 200)
    assert one.cycles == 1 and one.epochs == 10
    three = from_solved_head(choose_settings("text", 200, given={"epochs": 5.0}), "text", 200)
    assert (three.cycles, three.epochs) == (1, 5.0), "the user's epochs are one training"
    adapters = choose_settings("text", 200, given={"lora": 8})
    adapters = for_network(from_solved_head(adapters, "text", 200), "text", 200, width=384, groups=8)
    assert (adapters.cycles, adapters.epochs) == (1, 10) and adapters.lr == pytest.approx(10 * 0.3 * 3 / 384 / 8)


def test_a_plan_of_the_users_own_takes_its_span_from_the_solved_head_and_nothing_else() -> None:
    plain = choose_settings("image", 200, given={"solve_head": True})
    solved = from_solved_head(plain, "image", 200, planned=True)
    assert (plain.span, solved.span) == (100.0, 2.0)
    assert {dial for dial in DIALS if solved.table()[dial] != plain.table()[dial]} == {"span"}
    given = choose_settings("image", 200, given={"span": 7.0})
    assert from_solved_head(given, "image", 200, planned=True) == given


@pytest.mark.parametrize(("rows", "doublings"), [(200, 0), (699, 0), (700, 2), (1_300, 2), (2_600, 1), (2_700, 0)])
def test_runs_of_middling_size_may_go_on(rows: int, doublings: int) -> None:
    """3 epochs of batches of 32, up to 500 steps."""

    def chosen(**given: Any) -> Settings:
        settings = from_solved_head(choose_settings("image", rows, given=given), "image", rows)
        return open_ended(settings, rows)

    assert chosen().doublings == doublings
    assert chosen(epochs=4.0).doublings == 0, "the length is the user's"
    assert chosen(doublings=1).doublings == 1 and chosen(doublings=1).cycles == 1
    assert chosen(cycles=2).doublings == 0
    with pytest.raises(PlanError, match="cycles=1"):
        chosen(cycles=2, doublings=1)
    with pytest.raises(PlanError, match="whole number"):
        chosen(doublings=1.5)


@pytest.mark.parametrize(("rows", "doublings"), [(200, 0), (699, 0), (700, 1), (3_000, 0)])
def test_a_head_that_is_not_solved_changes_nothing_of_that(rows: int, doublings: int) -> None:
    """There is one cycle then, also of few rows."""
    settings = open_ended(choose_settings("text", rows, given={"solve_head": False}), rows)
    assert (settings.cycles, settings.doublings) == (1, doublings)

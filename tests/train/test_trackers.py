"""Trackers get the run's own numbers at their steps, once each, over interruptions; one that fails never ends a run."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

import finetune
from finetune import preparing, verbs_train
from finetune.data.splits import Splits
from finetune.errors import PlanError
from finetune.plan.stages import Point
from finetune.train.folder import release
from finetune.train.processes import Processes
from finetune.train.progress import Progress
from finetune.train.steplog import READ_BACK, StepLog
from finetune.train.trackers import Trackers, check_names
from tests.test_fit import Ctrl
from tests.train.runs import steps

pytest.importorskip("tensorboard", reason="tensorboard is not installed; it is in the extra [dev]")

ASKED: dict[str, Any] = {"epochs": 4, "batch_size": 8, "seed": 1, "save_steps": 4}
CURVES = {
    "train/loss": lambda line: line["loss"],
    "train/lr_head": lambda line: line["rates"][-1],
    "train/lr_stem": lambda line: line["rates"][0],
    "train/momentum": lambda line: line["momentum"],
    "train/grad_norm": lambda line: line["grad_norm"],
}


def tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves in a folder of event files: name -> (step, value)."""
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", exc_type=ImportError)
    events = loading.EventAccumulator(str(folder))
    events.Reload()
    return {name: [(p.step, p.value) for p in events.Scalars(name)] for name in events.Tags()["scalars"]}


def same(found: list[tuple[int, float]], expected: list[tuple[int, float]]) -> bool:
    return found == [(step, pytest.approx(value, rel=1e-5)) for step, value in expected]


def test_tensorboard_has_the_run(square_splits: Splits, resnet: Path, tmp_path: Path) -> None:
    run = finetune.fit(square_splits, resnet, out=tmp_path / "run", trackers="tensorboard", **ASKED)
    curves, lines = tensorboard(run.folder / "tensorboard"), steps(run.folder)
    assert len(lines) >= 12
    for name, value in CURVES.items():
        assert same(curves[name], [(line["step"], value(line)) for line in lines]), name
    assert curves["train/lr_head"][0] != curves["train/lr_stem"][0]
    for metric in ("loss", "accuracy", "f1_macro"):
        expected = [(max(0, entry["step"] - 1), entry["valid"][metric]) for entry in run.history]
        assert same(curves[f"valid/{metric}"], expected), metric
        assert same(curves[f"test/{metric}"], [(len(lines) - 1, run.metrics["test"][metric])]), metric
    assert not [name for name in curves if "confusion" in name]
    (table,) = (run.folder / "tensorboard").glob("*/hparams.yml")
    config = yaml.safe_load(table.read_text())
    assert config["backbone"] == str(resnet) and config["seed"] == 1 and config["batch_size"] == 8
    assert set(config) >= set(run.record["settings"])
    again = finetune.fit(
        square_splits, resnet, out=tmp_path / "run", trackers="tensorboard", overwrite=True, **{**ASKED, "epochs": 1}
    )
    assert len(tensorboard(again.folder / "tensorboard")["train/loss"]) == len(steps(again.folder)) < len(lines)


def test_trackio_has_the_run(
    square_splits: Splits, resnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed; it needs Pillow below 13")
    from trackio import sqlite_storage

    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "db")
    run = finetune.fit(square_splits, resnet, out=tmp_path / "run", trackers=["trackio"], **ASKED)
    rows = sqlite_storage.SQLiteStorage.get_logs("finetune", "run")
    lines = steps(run.folder)
    for name, value in CURVES.items():
        found = [(row["step"], row[name]) for row in rows if name in row]
        assert same(found, [(line["step"], value(line)) for line in lines]), name
    assert [row["test/accuracy"] for row in rows if "test/accuracy" in row] == [run.metrics["test"]["accuracy"]]
    config = sqlite_storage.SQLiteStorage.get_run_config("finetune", "run")
    assert config is not None and config["batch_size"] == 8 and config["backbone"] == str(resnet)


def test_an_interrupted_run_has_each_step_once(
    square_splits: Splits, resnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"out": tmp_path / "run", "trackers": "tensorboard", **ASKED}
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "default_loss", lambda _: Ctrl(square_splits, 11))  # the checkpoint is of step 8
        with pytest.raises(KeyboardInterrupt):
            finetune.fit(square_splits, resnet, **options)
    before = tensorboard(tmp_path / "run" / "tensorboard")["train/loss"]
    run = finetune.fit(square_splits, resnet, **options)
    lines = steps(run.folder)
    found = tensorboard(run.folder / "tensorboard")
    assert 8 < len(before) < len(lines)
    assert same(found["train/loss"], [(line["step"], line["loss"]) for line in lines])
    assert [step for step, _ in found["valid/loss"]] == [max(0, entry["step"] - 1) for entry in run.history]


class Noting(GeneralTracker):
    """Keeps what it is told, and fails where it is told to."""

    name, requires_logging_directory = "noting", False
    fails, told = "", []  # type: ignore[var-annotated]

    def __init__(self, run_name: str) -> None:
        super().__init__()
        self.note("made")

    @property
    def tracker(self) -> list[Any]:
        return self.told

    def note(self, what: str, *values: Any) -> None:
        if what == self.fails:
            raise RuntimeError("https://me:secret@tracker.example is away\n and more")
        type(self).told.append((what, *values))

    def start(self) -> None:
        self.note("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.note("config", values)

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.note("log", values, step)

    def finish(self) -> None:
        self.note("finish")


@pytest.fixture
def noting(monkeypatch: pytest.MonkeyPatch) -> type[Noting]:
    """A tracker of one's own, as `accelerate.tracking.register_tracker_class` makes it known."""
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "noting", Noting)  # type: ignore[arg-type]
    monkeypatch.setattr(Noting, "told", [])
    monkeypatch.setattr(Noting, "fails", "")
    return Noting


@pytest.mark.parametrize("where", ["made", "start", "config", "log", "finish"])
def test_a_tracker_that_fails_ends_no_run(
    where: str, noting: type[Noting], square_splits: Splits, resnet: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(noting, "fails", where)
    asked = {**ASKED, "epochs": 1}
    run = finetune.fit(square_splits, resnet, out=tmp_path / "run", trackers=["noting", "tensorboard"], **asked)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Warning")]
    assert warnings == ["Warning   noting: https://***@tracker.example is away; training goes on without it"]
    assert run.record["status"] == "finished"
    assert len(tensorboard(run.folder / "tensorboard")["train/loss"]) == len(steps(run.folder)) > 2


def test_a_run_that_ends_early_closes_its_trackers(
    noting: type[Noting], square_splits: Splits, resnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "default_loss", lambda _: Ctrl(square_splits, 3))
    with pytest.raises(KeyboardInterrupt):
        finetune.fit(square_splits, resnet, out=tmp_path / "run", trackers="noting", **ASKED)
    release(tmp_path / "run")
    assert [what for what, *_ in noting.told][-1] == "finish"


def test_only_the_first_process_tracks(
    noting: type[Noting], square_splits: Splits, resnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Seen(Exception):
        """Training would begin here."""

    def begun(self: Any) -> None:
        self.trackers.start(0)
        self.trackers.log("valid", {"loss": 1.0}, 0)
        raise Seen

    monkeypatch.setattr("finetune.train.trainer.Trainer.run", begun)
    monkeypatch.setattr(Processes, "is_main", property(lambda self: False))
    with pytest.raises(Seen):
        finetune.fit(square_splits, resnet, out=tmp_path / "run", trackers="noting", **ASKED)
    assert noting.told == []


def test_what_is_no_number_is_left_out(noting: type[Noting], tmp_path: Path) -> None:
    curves = Trackers(["noting"], tmp_path, print, {"betas": (0.9, 0.99), "lr": None, "epochs": 2})
    curves.start(0)
    curves.log("valid", {"loss": float("nan"), "accuracy": 0.5, "confusion": [[1]]}, 3)
    curves.step({"step": 4, "loss": None, "rates": [0.0, 0.1], "momentum": None, "grad_norm": None})
    assert noting.told[2] == ("config", {"betas": "(0.9, 0.99)", "lr": "None", "epochs": 2})
    assert noting.told[3:] == [
        ("log", {"valid/accuracy": 0.5}, 2), ("log", {"train/lr_head": 0.1, "train/lr_stem": 0.0}, 4),
    ]  # fmt: skip


def test_nothing_waits_for_a_gpu() -> None:
    """Lines reach a tracker where losses are read back anyway, once in so many steps."""

    class OnDevice:
        device, reads = SimpleNamespace(type="cuda"), 0

        def __float__(self) -> float:
            OnDevice.reads += 1
            return 1.0

    told: list[dict[str, Any]] = []
    value: Any = OnDevice()
    log, progress = StepLog(None, also=told.append), Progress()
    for step in range(READ_BACK):
        assert not told and not OnDevice.reads
        progress.step = step
        log.add(progress, Point(0, 0, (0.1,), 0.9), value, value, value, 0.1)
    assert [line["step"] for line in told] == list(range(READ_BACK)) and told[0]["loss"] == 1.0


def test_names_are_checked_before_anything_is_done(noting: type[Noting], tmp_path: Path) -> None:
    assert check_names(None) == () == check_names([])
    assert check_names(["noting", "noting"]) == ("noting",) == check_names("noting")
    with pytest.raises(PlanError, match=r"^trackers: 'tensorbord' is not one of aim, .*, tensorboard, .*wandb$"):
        finetune.fit("no data", "no backbone", out=tmp_path / "run", trackers=["tensorbord"])
    with pytest.raises(PlanError, match=r"^trackers: dvclive is not installed; pip install dvclive"):
        check_names("dvclive")
    assert not (tmp_path / "run").exists() and json.dumps(noting.told) == "[]"


def test_the_command_line_takes_them(squares: Path, resnet: Path, tmp_path: Path) -> None:
    verbs_train.fit(str(squares), str(resnet), out=tmp_path / "run", epochs=1, batch_size=8, trackers=("tensorboard",))
    assert tensorboard(tmp_path / "run" / "tensorboard")["test/accuracy"]


def test_plain_runs_track_nothing(square_splits: Splits, resnet: Path, tmp_path: Path) -> None:
    run = finetune.fit(square_splits, resnet, out=tmp_path / "run", **{**ASKED, "epochs": 1})
    assert not list(run.folder.rglob("*tfevents*")) and torch.isfinite(torch.tensor(steps(run.folder)[-1]["loss"]))

"""The whole line on tiny data and models: what a run leaves behind, for each kind of task, and what stops it."""

import ast
import csv
import inspect
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForSequenceClassification

import finetune
from finetune import fitting, preparing
from finetune.data.splits import Splits
from finetune.data.task import default_loss
from finetune.errors import DataError, PlanError, RunError
from finetune.plan.settings import DIALS
from finetune.run import Run
from finetune.train.folder import LOCK
from tests.tiny import vit_folder

FAST: dict[str, Any] = {"epochs": 2, "batch_size": 8}


def record_of(folder: Path) -> dict[str, Any]:
    """run.json as any reader sees it: NaN and Infinity are not JSON."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in run.json")

    return json.loads((folder / "run.json").read_text(), parse_constant=refuse)


def steps_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


# Images: one run, looked at from all sides


@pytest.fixture(scope="module")
def photos(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The squares, and two files that are no images."""
    folder = shutil.copytree(squares, tmp_path_factory.mktemp("photos") / "data")
    (folder / "train" / "red" / "bad.png").write_text("no image")
    (folder / "test" / "blue" / "empty.png").write_bytes(b"")
    return folder


ASKED: dict[str, Any] = {"epochs": 6, "lr": 0.01, "batch_size": 8, "seed": 3}


@pytest.fixture(scope="module")
def run(photos: Path, resnet: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finetune.fit(photos, resnet, out=tmp_path_factory.mktemp("runs") / "deep" / "run", **ASKED)


def test_the_run_folder(run: Run) -> None:
    names = {str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.is_file()}
    assert names >= {
        "run.json", "steps.jsonl", "left_out.csv", "predictions/test.csv", "model/config.json",
        "model/model.safetensors",
    }  # fmt: skip
    assert not [name for name in names if name.startswith((".", "checkpoints"))]
    assert not [name for name in names if name.endswith((".pt", ".pkl", ".bin"))]


def test_run_json_has_what_scripts_read(run: Run, photos: Path, resnet: Path) -> None:
    record = record_of(run.folder)
    assert record["schema"] == 1 and record["status"] == "finished" and record["why"] == ""
    assert set(record) >= {
        "schema", "task", "data", "backbone", "settings", "stages", "metrics", "seconds", "peak_memory_bytes",
        "processes", "seed", "versions", "command", "status",
    }  # fmt: skip
    assert record["task"] == {
        "kind": "single_label_classification", "modality": "image", "labels": ["blue", "green", "red"],
    }  # fmt: skip
    data = record["data"]
    assert data["source"] == str(photos) and data["left_out"] == 2
    assert data["counts"]["test"] == 12 and data["counts"]["train"] + data["counts"]["valid"] == 36
    assert sum(data["classes"].values()) == data["counts"]["train"] and len(data["fingerprint"]) == 16
    assert record["backbone"]["name"] == str(resnet) and record["backbone"]["family"] == "timm"
    assert set(record["settings"]) == set(DIALS)
    for name, entry in record["settings"].items():
        assert set(entry) == {"value", "reason", "by"} and entry["reason"], name
        assert entry["by"] == ("user" if name in ASKED else "rule"), name
    assert record["settings"]["epochs"]["value"] == 6
    assert (record["seed"], record["processes"]) == (3, 1)
    assert set(record["versions"]) >= {"python", "torch", "timm", "transformers", "finetune-onecycle"}
    assert torch.__version__.startswith(record["versions"]["torch"])
    assert record["peak_memory_bytes"] > 50_000_000
    assert record["command"] and record["kept"] == "last" or record["kept"].startswith(("average", "epoch "))
    assert record == json.loads(json.dumps(run.record)) and run.metrics == record["metrics"]


def test_seconds_add_up(run: Run) -> None:
    seconds = record_of(run.folder)["seconds"]
    parts = {name: seconds[name] for name in ("setup", "probes", "head", "train", "evaluate", "export")}
    assert set(seconds) == {"total", *parts} and min(parts.values()) >= 0.0
    assert sum(parts.values()) == pytest.approx(seconds["total"], abs=0.5 + 0.05 * seconds["total"])


def test_stages_and_steps_agree(square_splits: Splits, resnet: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {**ASKED, "settings": {"solve_head": False}}
    run = finetune.fit(square_splits, resnet, out=tmp_path / "run", **options)
    record, steps = record_of(run.folder), steps_of(run.folder)
    stages = record["stages"]
    assert [stage["name"] for stage in stages] == ["head", "all"]
    for stage in stages:
        assert set(stage) == {
            "name", "open_from", "steps", "peak_rates", "seconds", "examples_per_second", "replayed", "why",
        }  # fmt: skip
        assert stage["seconds"] > 0 and stage["examples_per_second"] > 0
        assert len(stage["peak_rates"]) == len(record["groups"])
    head, everything = stages
    settings = {name: entry["value"] for name, entry in record["settings"].items()}
    assert head["open_from"] == len(record["groups"]) - 1 and everything["open_from"] == 0
    assert [rate > 0 for rate in head["peak_rates"]] == [False] * head["open_from"] + [True]
    assert head["peak_rates"][-1] == pytest.approx(settings["head_lr"], rel=1e-5)
    assert everything["peak_rates"][-1] == pytest.approx(settings["lr"], rel=1e-5)
    assert everything["peak_rates"][0] == pytest.approx(settings["lr"] / settings["span"], rel=1e-5)
    per_epoch = math.ceil(record["data"]["counts"]["train"] / settings["batch_size"] - 0.5)
    assert head["steps"] + everything["steps"] == 6 * per_epoch == len(steps)
    assert [line["step"] for line in steps] == list(range(len(steps)))
    assert [line["stage"] for line in steps] == [0] * head["steps"] + [1] * everything["steps"]
    assert run.steps()[0].keys() == {"step", "stage", "loss", "rates", "momentum", "grad_norm", "seconds"}
    assert [entry["epoch"] for entry in run.history] == [1, 2, 3, 4, 5, 6]
    assert run.history[-1]["step"] == len(steps) and record["history"] == run.history


def test_a_solved_head_is_what_training_begins_with(run: Run) -> None:
    record, steps = record_of(run.folder), steps_of(run.folder)
    assert [(stage["name"], stage["open_from"]) for stage in record["stages"]] == [("all", 0)]
    assert record["settings"]["solve_head"] == {
        "value": True, "by": "rule", "reason": "a linear head on frozen features has an optimum: no rate, no epochs",
    }  # fmt: skip
    assert record["settings"]["head_epochs"]["value"] == 0.0 and record["seconds"]["head"] > 0
    assert [entry["epoch"] for entry in run.history] == [0, 1, 2, 3, 4, 5, 6]
    assert (run.history[0]["stage"], run.history[0]["step"]) == ("head", 0)
    assert run.history[0]["valid"]["accuracy"] > 0.5 and steps[0]["loss"] < 0.5 < np.log(3)  # a fresh one: log 3


def test_a_solved_head_may_be_asked_for_with_a_plan_of_ones_own(
    square_splits: Splits, resnet: Path, tmp_path: Path
) -> None:
    plan = finetune.Plan(finetune.Stage(0, steps=2))
    run = finetune.fit(square_splits, resnet, out=tmp_path / "run", plan=plan, settings={"solve_head": True})
    assert run.record["settings"]["span"]["value"] == 2.0 and run.record["seconds"]["head"] > 0
    (stage,) = run.record["stages"]
    assert stage["steps"] == 2
    assert stage["peak_rates"][-1] / stage["peak_rates"][0] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"loss": torch.nn.functional.cross_entropy}, "a loss of one's own is trained by gradients"),
        ({"settings": {"head_epochs": 1.0}}, "the user gives the head a stage of its own"),
        ({"plan": finetune.Plan(finetune.Stage(0, steps=2))}, "the user gives the head a stage of its own"),
        ({"head": lambda width: torch.nn.Sequential(torch.nn.Linear(width, 4), torch.nn.Linear(4, 3))},
         "the head is not one linear layer"),
    ],
)  # fmt: skip
def test_a_head_that_is_not_solved_says_why(
    square_splits: Splits, resnet: Path, tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    run = finetune.fit(square_splits, resnet, out=tmp_path / "run", epochs=None if "plan" in options else 2, **options)
    assert run.record["settings"]["solve_head"] == {"value": False, "reason": reason, "by": "rule"}
    assert run.history[0]["epoch"] == 1 and run.record["seconds"]["head"] == 0.0


def test_left_out_rows_are_named(run: Run) -> None:
    assert rows_of(run.folder / "left_out.csv") == [
        {"id": "train/red/bad.png", "split": "train", "reason": "not an image"},
        {"id": "test/blue/empty.png", "split": "test", "reason": "empty file"},
    ]


def test_predictions_are_the_models_and_the_metrics_those_of_the_predictions(run: Run, photos: Path) -> None:
    rows = rows_of(run.folder / "predictions" / "test.csv")
    assert len(rows) == 12 and set(rows[0]) == {"id", "target", "prediction", "probability"}
    assert sorted(row["id"] for row in rows) == sorted(
        f"test/{label}/{i}.png" for label in ("blue", "green", "red") for i in range(4)
    )
    assert all(row["target"] == row["id"].split("/")[1] for row in rows)
    right = np.mean([row["prediction"] == row["target"] for row in rows])
    assert run.metrics["test"]["accuracy"] == pytest.approx(right) and right > 0.5  # three coloured noises
    names = {"accuracy", "f1_macro", "log_loss", "confusion", "loss"}
    assert set(run.metrics["test"]) == set(run.metrics["valid"]) == names
    assert run.metrics["test"]["log_loss"] == pytest.approx(run.metrics["test"]["loss"], rel=1e-3, abs=1e-6)
    predicted = run.predict([photos / row["id"] for row in rows])
    assert [one.label for one in predicted] == [row["prediction"] for row in rows]
    assert [one.score for one in predicted] == pytest.approx([float(row["probability"]) for row in rows], abs=1e-3)


def test_the_model_loads_without_the_toolkit_and_with_it(run: Run, photos: Path) -> None:
    image = photos / "test" / "red" / "0.png"
    plain = timm.create_model(f"local-dir:{run.folder / 'model'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=plain), is_training=False)
    with torch.no_grad():
        expected = plain(transform(Image.open(image).convert("RGB"))[None]).softmax(-1)[0].tolist()
    for predictor in (run, finetune.load(run.folder)):
        probabilities = predictor.predict(image)[0].probabilities
        assert list((probabilities or {}).values()) == pytest.approx(expected, abs=1e-4)
    copy = run.save_pretrained(run.folder.parent / "copy")
    assert (copy / "model.safetensors").read_bytes() == (run.folder / "model" / "model.safetensors").read_bytes()


def test_what_the_console_says(photos: Path, resnet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finetune.fit(photos, resnet, out=tmp_path / "run", **FAST)
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines if line[:1].strip()} == {
        "Data", "Backbone", "Chosen", "Plan", "Baseline", "all", "Result", "Saved",
    }  # fmt: skip
    assert "left out: 2 rows" in "\n".join(lines)
    assert max(map(len, lines)) < 200 and lines[-1].split() == ["Saved", str(tmp_path / "run" / "model")]


def test_the_weights_are_those_of_the_seed(square_splits: Splits, resnet: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        finetune.fit(square_splits, resnet, out=tmp_path / name, seed=seed, **FAST)
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]
    assert steps_of(tmp_path / "a") == steps_of(tmp_path / "b") != steps_of(tmp_path / "c")


def test_the_seed_is_that_of_the_head_and_of_the_order(square_splits: Splits, resnet: Path, tmp_path: Path) -> None:
    still: dict[str, Any] = {**FAST, "lr": 1e-9, "settings": {"ema": False, "solve_head": False}}
    heads = [
        finetune.fit(square_splits, resnet, out=tmp_path / f"head{seed}", seed=seed, **still)
        .pretrained.model.get_parameter("fc.weight")
        .detach()
        for seed in (5, 6)
    ]
    assert float((heads[0] - heads[1]).abs().max()) > 1e-2
    for seed in (5, 6):  # the same head, other rows in the first batch
        loaded = finetune.load_backbone(resnet, square_splits.task)
        finetune.fit(square_splits, loaded, out=tmp_path / f"order{seed}", seed=seed, **still)
    first = [steps_of(tmp_path / f"order{seed}")[0]["loss"] for seed in (5, 6)]
    assert abs(first[0] - first[1]) > 1e-6


# Other kinds of tasks


def reviews(count: int) -> list[dict[str, Any]]:
    """Texts, each different, with everything that can be said of them."""
    rows = []
    for i in range(count):
        words = ["good", "very", "bad"][i % 3 : i % 3 + 1] + ["film"] * (1 + i % 4) + list(f"{i:02}".translate(DIGITS))
        rows.append({"text": " ".join(words), "label": ["up", "even", "down"][i % 3], "good": int(i % 3 == 0),
                     "long": int(i % 4 > 1), "score": 1000.0 + 50.0 * (i % 3) + 0.5 * (i % 4)})  # fmt: skip
    return rows


DIGITS = str.maketrans("0123456789", "abcdefghij")


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    rows = reviews(48)
    write_rows(folder / "train.csv", rows[:36])
    write_rows(folder / "test.csv", rows[36:])
    for name, part in (("tags", rows[:36]), ("tags_test", rows[36:])):
        lines = []
        for row in part:
            words = row["text"].split()
            tags = [{"good": "B-X", "film": "B-Y"}.get(word, "O") for word in words]
            lines.append(json.dumps({"tokens": words, "ner_tags": tags}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def test_one_label_a_text(tables: Path, bert: Path, tmp_path: Path) -> None:
    splits = finetune.load_table(tables, label="label", text="text")
    run = finetune.fit(splits, bert, out=tmp_path / "run", **FAST)
    rows = rows_of(run.folder / "predictions" / "test.csv")
    assert [row["id"] for row in rows] == [f"test.csv:{line}" for line in range(2, 14)]
    assert {row["target"] for row in rows} == {"up", "even", "down"}
    assert run.metrics["test"]["accuracy"] == pytest.approx(np.mean([r["target"] == r["prediction"] for r in rows]))
    model = AutoModelForSequenceClassification.from_pretrained(run.folder / "model")
    assert model.config.id2label == {0: "down", 1: "even", 2: "up"}
    assert run.predict("good film")[0].label == finetune.load(run.folder).predict("good film")[0].label


def test_a_path_is_data_too(tables: Path, bert: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.csv", [{"text": r["text"], "label": r["label"]} for r in reviews(30)])
    run = finetune.fit(str(tmp_path / "rows.csv"), str(bert), out=str(tmp_path / "run"), **FAST)
    assert "test" not in run.metrics and not (tmp_path / "run" / "predictions" / "test.csv").exists()
    assert record_of(run.folder)["data"]["counts"].keys() == {"train", "valid"}


def test_several_labels_a_text(tables: Path, bert: Path, tmp_path: Path) -> None:
    splits = finetune.load_table(tables, text="text", label=["good", "long"])
    assert splits.task.kind == "multi_label_classification"
    run = finetune.fit(splits, bert, out=tmp_path / "run", **FAST)
    assert set(run.metrics["test"]) == {"accuracy", "f1_macro", "f1_micro", "log_loss", "loss"}
    rows = rows_of(run.folder / "predictions" / "test.csv")
    assert len(rows) == 12 and {row["target"] for row in rows} == {"", "good", "long", "good long"}
    assert run.metrics["test"]["accuracy"] == pytest.approx(np.mean([r["target"] == r["prediction"] for r in rows]))


def test_a_number_a_text(tables: Path, bert: Path, tmp_path: Path) -> None:
    """Far from 0, where a new layer that starts there would need thousands of steps."""
    splits = finetune.load_table(tables, text="text", label="score", task="regression")
    run = finetune.fit(splits, bert, out=tmp_path / "run", **FAST, settings={"precision": "fp32"})
    assert set(run.metrics["test"]) == {"mae", "rmse", "spearman", "r2", "loss"}
    assert run.metrics["test"]["rmse"] < 100.0
    rows = rows_of(run.folder / "predictions" / "test.csv")
    assert len(rows) == 12 and set(rows[0]) == {"id", "target score", "score"}
    errors = [float(row["score"]) - float(row["target score"]) for row in rows]
    assert run.metrics["test"]["mae"] == pytest.approx(np.abs(errors).mean(), rel=1e-3)
    texts = [row["text"] for row in reviews(48)[36:]]
    for predictor in (run, finetune.load(run.folder)):  # the saved model is plain, and answers in the data's units
        values = [one.value for one in predictor.predict(texts)]
        assert values == pytest.approx([float(row["score"]) for row in rows], rel=1e-2)


def test_a_tag_a_word(tables: Path, bert: Path, tmp_path: Path) -> None:
    splits = finetune.load_table(tables / "tags.jsonl", test=tables / "tags_test.jsonl")
    assert splits.task.kind == "token_classification"
    run = finetune.fit(splits, bert, out=tmp_path / "run", **FAST)
    assert set(run.metrics["test"]) == {"f1", "precision", "recall", "accuracy", "loss"}
    rows = rows_of(run.folder / "predictions" / "test.csv")
    pairs = [(row["target"].split(), row["prediction"].split()) for row in rows]
    assert len(rows) == 12 and all(len(target) == len(chosen) for target, chosen in pairs)
    assert [target for target, _ in pairs] == [
        [{"good": "B-X", "film": "B-Y"}.get(word, "O") for word in row["text"].split()] for row in reviews(48)[36:]
    ]
    right = [one == other for target, chosen in pairs for one, other in zip(target, chosen, strict=True)]
    assert run.metrics["test"]["accuracy"] == pytest.approx(np.mean(right))


class Colour(nn.Module):
    """Features [B, F] -> {"name": logits [B, 3], "warmth": [B]}."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.name, self.warmth = nn.Linear(features, 3), nn.Linear(features, 1)

    def forward(self, x_BF: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"name": self.name(x_BF), "warmth": self.warmth(x_BF).squeeze(-1)}


def colour_loss(outputs: dict[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    warmth = (targets == 2).float()
    return nn.functional.cross_entropy(outputs["name"], targets) + (outputs["warmth"] - warmth).square().mean()


def colour_metrics(outputs: dict[str, np.ndarray], targets: np.ndarray) -> dict[str, float]:
    return {"right": float((outputs["name"].argmax(1) == targets).mean()), "rows": len(targets)}


def test_a_head_a_loss_and_metrics_of_ones_own(square_splits: Splits, resnet: Path, tmp_path: Path) -> None:
    run = finetune.fit(
        square_splits, resnet, head=Colour, loss=colour_loss, metrics=colour_metrics, out=tmp_path / "run", **FAST
    )
    assert set(run.metrics["test"]) == {"right", "rows", "loss"} and run.metrics["test"]["rows"] == 12
    assert set(run.history[0]["valid"]) == {"right", "rows", "loss"}
    rows = rows_of(run.folder / "predictions" / "test.csv")
    assert len(rows) == 12 and set(rows[0]) == {"id", "name", "warmth"} and len(json.loads(rows[0]["name"])) == 3
    image = square_splits.test["image"][0]["path"]  # type: ignore[index]
    one, other = run.predict(image)[0].values, finetune.load(run.folder, head=Colour).predict(image)[0].values
    assert one is not None and other is not None and one["name"] == pytest.approx(other["name"], abs=1e-4)
    assert json.loads(rows[0]["name"]) == pytest.approx(one["name"], abs=1e-3)


class Small(nn.Module):
    """A network of one's own: two convolutions with a batch norm each, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(a, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU()) for a in (3, 8)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.body(x))


def test_a_module_of_ones_own_with_groups_and_a_plan(square_splits: Splits, tmp_path: Path) -> None:
    pretrained = finetune.load_backbone(
        Small(), square_splits.task, processor=finetune.Preprocessing(size=(32, 32)), modality="image"
    )
    groups = finetune.layer_groups(pretrained, spec=[r"body\.0", r"body\.1", "classifier"])
    plan = finetune.Plan(
        finetune.Stage(-1, steps=3, shape=finetune.Flat()), finetune.Stage(1, epochs=1, lr_scale=0.5, name="upper")
    )
    before = {name: tensor.clone() for name, tensor in pretrained.model.state_dict().items()}
    run = finetune.fit(
        square_splits, pretrained, groups=groups, plan=plan, out=tmp_path / "run", lr=1e-2, batch_size=8,
        settings={"ema": False, "span": 4.0},
    )  # fmt: skip
    record = record_of(run.folder)
    assert record["backbone"]["name"] == "Small" and record["groups"] == [group.name for group in groups]
    assert [(s["name"], s["open_from"], s["peak_rates"]) for s in record["stages"]] == [
        ("head", 2, [0, 0, pytest.approx(1e-2)]),
        ("upper", 1, [0, pytest.approx(2.5e-3), pytest.approx(5e-3)]),
    ]
    changed = {name for name, tensor in pretrained.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "classifier.weight" in changed and not [name for name in changed if name.startswith("body.0.")]
    assert record["settings"]["span"] == {"value": 4.0, "reason": "given by the user", "by": "user"}
    assert record["identity"]["plan"] == json.loads(json.dumps(plan.to_json()))


# Time


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the whole network takes a second, one of the head a tenth."""
    monkeypatch.setattr(preparing, "seconds_per_step", lambda *_, open_from, **__: 1.0 if open_from == 0 else 0.1)


@pytest.mark.usefixtures("measured")
def test_minutes_set_the_epochs(square_splits: Splits, resnet: Path, tmp_path: Path) -> None:
    record = finetune.fit(
        square_splits, resnet, out=tmp_path / "run", minutes=0.5, batch_size=8, settings={"solve_head": False}
    ).record
    epochs, head = record["settings"]["epochs"], record["settings"]["head_epochs"]
    counts = record["data"]["counts"]
    per_epoch = math.ceil(counts["train"] / 8 - 0.5)
    an_epoch = per_epoch * (0.75 * 1.0 + 0.25 * 0.1) + 0.1 * counts["valid"] / 8
    left = 30.0 - record["seconds"]["setup"]
    assert epochs["value"] == pytest.approx(0.9 * left / an_epoch, rel=0.02) and epochs["value"] > 5
    assert head["value"] == pytest.approx(epochs["value"] / 4, abs=1e-3)
    assert epochs["by"] == head["by"] == "measured"
    assert epochs["reason"] == head["reason"] == f"1 s a step, {left / 60:.2g} minutes left for training"
    assert sum(stage["steps"] for stage in record["stages"]) == pytest.approx(epochs["value"] * per_epoch, abs=1)


@pytest.mark.usefixtures("measured")
def test_minutes_count_what_solving_the_head_takes(square_splits: Splits, resnet: Path, tmp_path: Path) -> None:
    record = finetune.fit(square_splits, resnet, out=tmp_path / "run", minutes=0.5, batch_size=8).record
    counts = record["data"]["counts"]
    validation, per_epoch = 0.1 * counts["valid"] / 8, math.ceil(counts["train"] / 8 - 0.5)
    left = 30.0 - record["seconds"]["setup"] - 0.1 * counts["train"] / 8 - validation
    expected = 0.9 * left / (per_epoch + validation)
    assert record["settings"]["epochs"]["value"] == pytest.approx(expected, rel=0.02)
    assert record["settings"]["head_epochs"]["value"] == 0.0


@pytest.mark.usefixtures("measured")
def test_minutes_leave_what_was_given(square_splits: Splits, resnet: Path, tmp_path: Path) -> None:
    settings = finetune.fit(
        square_splits, resnet, out=tmp_path / "run", minutes=0.3, settings={"head_epochs": 0.25}
    ).record["settings"]
    assert settings["head_epochs"] == {"value": 0.25, "reason": "given by the user", "by": "user"}
    assert settings["epochs"]["by"] == "measured"


@pytest.mark.parametrize("asked", [{"epochs": 2}, {"settings": {"epochs": 2}}])
def test_minutes_and_epochs_contradict_each_other(
    square_splits: Splits, resnet: Path, tmp_path: Path, asked: dict[str, Any]
) -> None:
    with pytest.raises(PlanError, match="minutes.*epochs|epochs.*minutes"):
        finetune.fit(square_splits, resnet, out=tmp_path / "run", minutes=0.1, **asked)


def test_the_measured_time_is_real(square_splits: Splits, resnet: Path, tmp_path: Path) -> None:
    record = finetune.fit(square_splits, resnet, out=tmp_path / "run", minutes=0.02).record
    assert record["settings"]["epochs"]["by"] == "measured" and " s a step, " in record["settings"]["epochs"]["reason"]
    assert record["status"] == "finished"


# Interruptions


class Ctrl:
    """The task's own loss, which Ctrl-C meets at its nth call in training."""

    def __init__(self, splits: Splits, number: int) -> None:
        self.plain, self.left = default_loss(splits.task), number

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if outputs.requires_grad:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return self.plain(outputs, targets)


def test_the_same_command_goes_on_and_ends_the_same(
    square_splits: Splits, resnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    options: dict[str, Any] = {"epochs": 4, "batch_size": 8, "seed": 1, "save_steps": 4}
    finetune.fit(square_splits, resnet, out=tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "default_loss", lambda _: Ctrl(square_splits, 9))
        with pytest.raises(KeyboardInterrupt):
            finetune.fit(square_splits, resnet, out=tmp_path / "parts", **options)
    assert record_of(tmp_path / "parts")["status"] == "running"
    with pytest.raises(RunError, match="holds another run .*seed 1 -> 2"):
        finetune.fit(square_splits, resnet, out=tmp_path / "parts", **{**options, "seed": 2})
    capsys.readouterr()
    finetune.fit(square_splits, resnet, out=tmp_path / "parts", **options)
    assert "Resumed   from step " in capsys.readouterr().out
    for name in ("model/model.safetensors", "model/config.json", "predictions/test.csv", "left_out.csv"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert steps_of(tmp_path / "parts") == steps_of(tmp_path / "whole")
    one, other = record_of(tmp_path / "parts"), record_of(tmp_path / "whole")
    assert {key: one[key] for key in ("metrics", "history", "kept", "settings", "status")} == {
        key: other[key] for key in ("metrics", "history", "kept", "settings", "status")
    }
    assert not (tmp_path / "parts" / "checkpoints").exists()


def test_another_request_goes_on_only_when_told_to(
    square_splits: Splits, resnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    options: dict[str, Any] = {"epochs": 4, "batch_size": 8, "save_steps": 4, "out": tmp_path / "run"}
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "default_loss", lambda _: Ctrl(square_splits, 9))
        with pytest.raises(KeyboardInterrupt):
            finetune.fit(square_splits, resnet, **options)
    said = refused(RunError, square_splits, resnet, **{**options, "epochs": 6})
    assert "options" in said and '"epochs": 4' in said and said.endswith("all the same with --resume-anyway")
    vit = vit_folder(tmp_path / "vit")
    said = refused(RunError, square_splits, vit, **options, resume_anyway=True)
    assert f"{tmp_path / 'run' / 'checkpoints' / 'step-0000008'}: does not fit this run (" in said
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "default_loss", lambda _: Ctrl(square_splits, 0))
        with pytest.raises(KeyboardInterrupt):  # the attempt above left the request of another backbone
            finetune.fit(square_splits, resnet, **options, resume_anyway=True)
    capsys.readouterr()
    run = finetune.fit(square_splits, resnet, **{**options, "epochs": 6}, resume_anyway=True)
    assert "Resumed   from step 8 of 24" in capsys.readouterr().out
    assert run.record["status"] == "finished" and run.record["identity"]["options"]["epochs"] == 6
    assert [line["step"] for line in steps_of(tmp_path / "run")] == list(range(24))


def test_a_disk_that_is_full_at_the_export(
    square_splits: Splits, resnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"epochs": 2, "batch_size": 8, "save_steps": 4, "out": tmp_path / "run"}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "save_pretrained", full)
        said = refused(RunError, square_splits, resnet, **options)
    assert said.endswith("make room, and give the same command again: it goes on from the last checkpoint")
    assert finetune.fit(square_splits, resnet, **options).record["status"] == "finished"


@pytest.mark.usefixtures("measured")
def test_a_run_of_measured_length_goes_on_with_the_same_plan(
    square_splits: Splits, resnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"minutes": 1.0, "batch_size": 16, "settings": {"solve_head": False}}
    assert len(square_splits.train) in range(24, 40)  # two steps an epoch
    monkeypatch.setattr(preparing, "epochs_in", lambda *_, **__: 5.0014)  # a quarter of it lies by half a step
    whole = finetune.fit(square_splits, resnet, out=tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "default_loss", lambda _: Ctrl(square_splits, 3))
        with pytest.raises(KeyboardInterrupt):
            finetune.fit(square_splits, resnet, out=tmp_path / "parts", **options)
    monkeypatch.setattr(preparing, "epochs_in", lambda *_, **__: 20.0)  # the machine is idle now
    parts = finetune.fit(square_splits, resnet, out=tmp_path / "parts", **options)
    assert [stage["steps"] for stage in parts.record["stages"]] == [stage["steps"] for stage in whole.record["stages"]]
    for name in ("epochs", "head_epochs"):
        assert parts.record["settings"][name]["value"] == whole.record["settings"][name]["value"]
        assert parts.record["settings"][name]["by"] == "measured"
    assert steps_of(tmp_path / "parts") == steps_of(tmp_path / "whole")


@pytest.mark.parametrize("options", [{}, {"settings": {"unfreezing": "chain"}}, {"lr": -1.0}])
def test_a_run_that_fails_leaves_ones_own_model_usable(
    tables: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """In a notebook the same loaded backbone is given again, after Ctrl-C or a mended option."""
    splits = finetune.load_table(tables, text="text", label="score", task="regression")
    pretrained = finetune.load_backbone(bert, splits.task)
    plain = finetune.load_backbone(bert, splits.task).model
    monkeypatch.setattr(preparing, "scaled_loss", lambda _: Ctrl(splits, 0))
    with pytest.raises(PlanError if options else KeyboardInterrupt):
        finetune.fit(splits, pretrained, out=tmp_path / "run", **{**FAST, **options})
    assert [len(module._forward_hooks) for module in pretrained.model.modules()] == [
        len(module._forward_hooks) for module in plain.modules()
    ]
    assert not (tmp_path / "run" / ".finetune-lock").exists()  # another process may go on with it


def test_a_run_that_diverges_says_why_and_keeps_weights_that_are_finite(
    square_splits: Splits, resnet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, calls = default_loss(square_splits.task), [0]

    def sick(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls[0] += outputs.requires_grad
        return plain(outputs, targets) * (math.nan if calls[0] > 4 and outputs.requires_grad else 1.0)

    run = finetune.fit(square_splits, resnet, loss=sick, out=tmp_path / "run", **FAST)
    record = record_of(tmp_path / "run")
    assert record["status"] == "diverged" and record["kept"] == "epoch 1"
    assert record["why"].startswith("epoch 1 of 1: no step had a loss and a gradient that are numbers, 3 times at ever")
    assert [rewind["step"] for rewind in record["rewinds"]] == [8, 8, 8] and record["skipped_steps"] == 16
    assert f"Stopped   {record['why']}; the weights of epoch 1 are kept" in capsys.readouterr().out
    assert all(bool(torch.isfinite(tensor).all()) for tensor in run.pretrained.model.state_dict().values())
    assert math.isfinite(record["metrics"]["test"]["log_loss"]) and steps_of(tmp_path / "run")[-1]["loss"] is None
    with pytest.raises(RunError, match="holds a run that is diverged; give another folder with --out, or replace"):
        finetune.fit(square_splits, resnet, loss=sick, out=tmp_path / "run", **FAST)


def test_a_run_that_diverges_at_once_leaves_a_record_that_can_be_read(
    square_splits: Splits, resnet: Path, tmp_path: Path
) -> None:
    finetune.fit(square_splits, resnet, loss=lambda z, y: z.sum() * math.nan, out=tmp_path / "run", **FAST)
    record = record_of(tmp_path / "run")
    assert record["status"] == "diverged" and record["why"].startswith("epoch 1 of 1: no step had a loss")


# Folders and options that cannot be used


def refused(kind: type[Exception], data: Any, backbone: Any, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        finetune.fit(data, backbone, **options)
    return str(caught.value)


def test_a_folder_that_cannot_be_made(square_splits: Splits, resnet: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "run"
    assert refused(RunError, square_splits, resnet, out=out) == (
        f"{out}: cannot be made (Not a directory); give another folder with --out"
    )


def test_a_folder_of_a_finished_run(run: Run, photos: Path, resnet: Path) -> None:
    before = (run.folder / "run.json").read_bytes()
    assert refused(RunError, photos, resnet, out=run.folder, **ASKED) == (
        f"{run.folder}: holds a run that is finished; give another folder with --out, or replace it with --overwrite"
    )
    assert (run.folder / "run.json").read_bytes() == before and not (run.folder / LOCK).exists()


def test_a_folder_of_another_run(run: Run, photos: Path, resnet: Path) -> None:
    assert refused(RunError, photos, resnet, out=run.folder, **{**ASKED, "epochs": 7}) == (
        f'{run.folder}: holds another run (options {{"epochs": 6, "lr": 0.01, "batch_size": 8}} -> '
        '{"epochs": 7, "lr": 0.01, "batch_size": 8}); '
        "give another folder with --out, or replace it with --overwrite"
    )
    assert "; seed 3 -> 4); " in refused(RunError, photos, resnet, out=run.folder, **{**ASKED, "seed": 4})


def test_a_folder_with_files_of_ones_own(square_splits: Splits, resnet: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert refused(RunError, square_splits, resnet, out=tmp_path, overwrite=True) == (
        f"{tmp_path}: holds files that are not of a run (notes.txt); give another folder with --out"
    )
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_overwrite(square_splits: Splits, resnet: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        finetune.fit(square_splits, resnet, out=tmp_path, seed=seed, overwrite=seed > 0, **FAST)
    assert record_of(tmp_path)["seed"] == 1
    assert len(steps_of(tmp_path)) == sum(stage["steps"] for stage in record_of(tmp_path)["stages"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": {"learning_rate": 1e-3}}, "settings: no dial named learning_rate; there are lr, span, head_lr"),
        ({"lr": 0.0}, "lr=0.0: must be above 0"),
        ({"batch_size": 0}, "batch_size=0: must be a whole number of at least 1"),
        ({"epochs": -1}, "epochs=-1: must be above 0"),
        ({"settings": {"precision": "fp16"}}, "precision='fp16': must be 'fp32' or 'bf16'"),
        ({"settings": {"unfreezing": "chain"}}, "unfreezing='chain': must be one of none, head_then_all"),
        ({"settings": {"pct_start": 1.0}}, "pct_start=1.0: must lie above 0 and below 1"),
        ({"plan": finetune.Plan(finetune.Stage("layer9", epochs=1))}, "'layer9': no such layer group"),
        ({"batch_size": 8, "settings": {"accumulation": 8}}, "batch_size=8: the shortest batch has 5 examples, too"),
    ],
)
def test_options_that_make_no_sense(
    square_splits: Splits, resnet: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    assert refused(PlanError, square_splits, resnet, out=tmp_path / "run", **options).startswith(message)
    assert not (tmp_path / "run" / "run.json").exists()  # the mended command can use the same folder


def test_a_loaded_backbone_has_its_head(square_splits: Splits, resnet: Path, tmp_path: Path) -> None:
    loaded = finetune.load_backbone(resnet, square_splits.task)
    for options in ({"head": Colour}, {"image_size": 64}):
        assert refused(DataError, square_splits, loaded, out=tmp_path, **options) == (
            "fit: a loaded backbone has its head and image size already; give them to load_backbone"
        )


# Few dials


def test_the_options_of_fit_are_these() -> None:
    """A new one needs a measurement that calls for it."""
    assert list(inspect.signature(finetune.fit).parameters) == [
        "data", "backbone", "out", "head", "loss", "metrics", "plan", "groups", "minutes", "epochs", "lr",
        "batch_size", "image_size", "settings", "seed", "save_minutes", "save_steps", "trackers", "overwrite",
        "resume_anyway",
    ]  # fmt: skip


SHARED = {"data", "backbone", "out", "minutes", "epochs", "lr", "batch_size", "seed", "test",
          "save_minutes", "overwrite", "resume_anyway"}  # fmt: skip
RECIPES = {
    "image_classification": SHARED | {"push_to_hub"},
    "text_classification": SHARED | {"push_to_hub", "text", "label"},
    "token_classification": SHARED | {"push_to_hub"},
    "custom_head": SHARED,
    "demo": {"out", "seed"},
    "super_convergence": {"size", "data", "results", "out", "seeds", "shorten", "minutes"},
    "k_fold": SHARED - {"test", "resume_anyway"} | {"folds", "group"},
}
FOLDER = Path(__file__).parents[1] / "recipes"


@pytest.mark.skipif(not FOLDER.is_dir(), reason="no recipes here")
def test_the_options_of_the_recipes_are_these() -> None:
    found = {}
    for path in FOLDER.glob("*.py"):
        functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        arguments = next(function.args for function in functions if function.name == "main")
        found[path.stem] = {argument.arg for argument in [*arguments.args, *arguments.kwonlyargs]}
        required = len(arguments.args) - len(arguments.defaults)
        assert [argument.arg for argument in arguments.args][:required] in ([], ["data"], ["size"])
        assert None not in arguments.kw_defaults
    assert found == RECIPES


class LeNet(nn.Module):
    """A module as people write it: `.view` behind a convolution works in one layout of memory only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 5, stride=3), nn.Linear(4 * 100, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.conv(x))
        return self.fc(y.view(y.size(0), -1))


def test_a_module_of_ones_own_keeps_its_layout_of_memory(square_splits: Splits, tmp_path: Path) -> None:
    run = finetune.fit(square_splits, LeNet(), out=tmp_path / "run", image_size=32, **FAST)
    assert run.record["status"] == "finished"

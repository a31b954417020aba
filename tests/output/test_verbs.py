"""`finetune predict` and `finetune evaluate`: a row for every input, and the same scores as training counts."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from sklearn.metrics import accuracy_score, f1_score, root_mean_squared_error
from torch import nn

import finetune
from finetune import verbs_cli
from finetune.data.task import Task
from finetune.errors import DataError, RunError
from finetune.model.backbones import load_backbone
from finetune.output.export import save_pretrained
from finetune.output.interval import wilson
from finetune.output.predict import Predictor, load
from finetune.output.verbs import evaluate_on
from tests.output.test_export import shaken

SINGLE, MULTI, VALUE, TAGS = (
    "single_label_classification", "multi_label_classification", "regression", "token_classification",
)  # fmt: skip


def table(path: Path, *rows: list[object]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture(scope="module")
def colours(resnet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: an image model of three colours, of random weights."""
    of = Task(SINGLE, "image", ("blue", "green", "red"))
    folder = tmp_path_factory.mktemp("colours") / "run"
    return save_pretrained(shaken(load_backbone(resnet, of)), of, folder / "model").parent


def text_model(bert: Path, folder: Path, kind: str, *labels: str) -> Path:
    of = Task(kind, "text", labels)
    return save_pretrained(shaken(load_backbone(bert, of)), of, folder / "model")


def printed(capsys: pytest.CaptureFixture[str]) -> tuple[list[dict[str, str]], str]:
    out, err = capsys.readouterr()
    return list(csv.DictReader(io.StringIO(out))), err


def test_a_row_for_each_image(colours: Path, squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    for name, source in (("a.png", squares / "test" / "red" / "0.png"), ("c.png", squares / "test" / "blue" / "0.png")):
        (folder / name).write_bytes(source.read_bytes())
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:60])
    listed = table(tmp_path / "list.csv", ["file_name", "n"], ["new/c.png", 1], ["new/gone.png", 2], ["", 3])
    verbs_cli.predict(str(colours), (str(folder / "c.png"), str(tmp_path / "no.jpg"), str(folder), str(listed)))
    rows, said = printed(capsys)
    assert [(Path(row["input"]).name, bool(row["label"]), row["error"]) for row in rows] == [
        ("c.png", True, ""),
        ("no.jpg", False, "file not found"),
        ("a.png", True, ""),
        ("b.png", False, "truncated or damaged image"),
        ("c.png", True, ""),
        ("c.png", True, ""),
        ("gone.png", False, "file not found"),
        ("list.csv:4", False, "nothing given"),
    ]
    expected = load(colours).predict(folder / "a.png")[0]
    assert rows[2]["label"] == expected.label and float(rows[2]["score"]) == pytest.approx(expected.score, abs=1e-5)
    assert rows[0]["score"] == rows[4]["score"] == rows[5]["score"]
    assert said == "8 inputs, 4 without a prediction (file not found)\n"


def test_texts_files_tables_and_json_lines(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = text_model(bert, tmp_path, SINGLE, "bad", "good")
    (tmp_path / "one.txt").write_text("a very good film")
    reviews = table(tmp_path / "reviews.csv", ["text", "n"], ["dull, bad", 1], ["", 2])
    inputs = ("a very good film", str(tmp_path / "one.txt"), str(reviews), str(tmp_path / "gone.txt"), "the end.")
    verbs_cli.predict(str(model), inputs)
    rows, _ = printed(capsys)
    assert [row["input"] for row in rows[:3]] == ["a very good film", str(tmp_path / "one.txt"), "dull, bad"]
    assert rows[0]["score"] == rows[1]["score"] and rows[3]["error"] == "empty text"
    assert rows[4]["error"] == "file not found" and rows[5]["input"] == "the end." and rows[5]["label"]
    pairs = table(tmp_path / "pairs.csv", ["text", "text_pair"], ["dull", "film"])
    verbs_cli.predict(str(model), (str(pairs),))
    assert [(row["input"], row["input_pair"]) for row in printed(capsys)[0]] == [("dull", "film")]
    verbs_cli.predict(str(model), inputs, out=tmp_path / "out" / "said.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out" / "said.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and sum(lines[0]["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert "-> " in printed(capsys)[1]
    before = reviews.read_text()
    with pytest.raises(RunError, match="reviews.csv: is one of the inputs; give another file with --out"):
        verbs_cli.predict(str(model), (str(reviews),), out=reviews)
    with pytest.raises(RunError, match="^inputs: none"):
        verbs_cli.predict(str(model), ())
    assert reviews.read_text() == before


@pytest.mark.parametrize(
    ("kind", "names"), [(MULTI, {"labels", "score"}), (VALUE, {"size", "age"}), (TAGS, {"tags", "score"})]
)
def test_columns_of_the_other_tasks(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, names: set[str]
) -> None:
    labels = {MULTI: ("a", "b"), VALUE: ("size", "age"), TAGS: ("O", "B-place")}[kind]
    verbs_cli.predict(str(text_model(bert, tmp_path, kind, *labels)), ("marie visited paris",))
    (row,), _ = printed(capsys)
    assert row.keys() == {"input", "error"} | names and row["error"] == ""
    if kind == TAGS:
        assert len(row["tags"].split()) == 3


def test_scores_of_images(colours: Path, squares: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    verbs_cli.evaluate(str(colours), str(squares), out=tmp_path / "scores.json")
    predictor = load(colours)
    files = sorted((squares / "test").rglob("*.png"))
    said = [one.label for one in predictor.predict(files)]
    true = [file.parent.name for file in files]
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["metrics"]["accuracy"] == accuracy_score(true, said)
    assert found["metrics"]["f1_macro"] == pytest.approx(f1_score(true, said, average="macro"))
    assert found["interval"] == pytest.approx(wilson(accuracy_score(true, said), 12)) and found["rows"] == 12
    out = capsys.readouterr().out
    assert f"12 rows of {squares / 'test'}" in out and "95 % interval" in out and "confusion" not in out


def test_labels_keep_the_models_order_and_unknown_ones_are_left_out(
    colours: Path, squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    red = squares / "test" / "red"
    rows = [[str(red / f"{i}.png"), "red"] for i in range(4)]
    data = table(red / "listed.csv", ["file_name", "label"], *[[Path(file).name, label] for file, label in rows],
                 ["0.png", "mauve"], ["gone.png", "red"])  # fmt: skip
    try:
        verbs_cli.evaluate(str(colours), str(data), out=tmp_path / "scores.json")
    finally:
        data.unlink()
    found = json.loads((tmp_path / "scores.json").read_text())
    said = [one.label for one in load(colours).predict([red / f"{i}.png" for i in range(4)])]
    assert found["rows"] == 4 and found["metrics"]["accuracy"] == said.count("red") / 4
    assert [sum(row) for row in found["metrics"]["confusion"]] == [0, 0, 4]
    assert {entry["reason"] for entry in found["left_out"]} == {
        "label 'mauve' is not one of the model's", "file not found: gone.png",
    }  # fmt: skip
    assert "Left out  2 rows, such as listed.csv:6: label 'mauve'" in capsys.readouterr().out


def measured(predictor: Predictor, data: Path, **options: object) -> object:
    return evaluate_on(predictor, str(data), **options)  # type: ignore[arg-type]


def test_scores_of_texts(bert: Path, tmp_path: Path) -> None:
    texts = ["a good film", "dull and bad", "the story of marie", "a bright film", "paris", "not very good"]
    several = load(text_model(bert, tmp_path / "multi", MULTI, "short", "long"))
    said = several.predict(texts)
    true = [(i % 2, i % 3 == 0) for i in range(6)]
    rows = [[text, int(a), int(b)] for text, (a, b) in zip(texts, true, strict=True)]
    found = measured(several, table(tmp_path / "multi.csv", ["text", "short", "long"], *rows))
    guess = [("short" in (one.labels or ()), "long" in (one.labels or ())) for one in said]
    assert found.metrics["f1_macro"] == pytest.approx(f1_score(true, guess, average="macro", zero_division=0))  # type: ignore[attr-defined]

    value = load(text_model(bert, tmp_path / "value", VALUE, "size"))
    sizes = [float(len(text)) for text in texts]
    data = table(tmp_path / "value.csv", ["words", "size"], *zip(texts, sizes, strict=True))  # type: ignore[arg-type]
    found = measured(value, data, usual={"text": "words", "label": "size"})
    answers = [one.value for one in value.predict(texts)]
    rmse = root_mean_squared_error(sizes, answers)
    assert found.metrics["rmse"] == pytest.approx(rmse, rel=1e-4)  # type: ignore[attr-defined]
    low, high = found.interval  # type: ignore[attr-defined]
    assert low < rmse < high

    tagger = load(text_model(bert, tmp_path / "tags", TAGS, "O", "B-place"))
    words = ["marie", "visited", "paris"]
    (tmp_path / "tags.jsonl").write_text(json.dumps({"tokens": words, "tags": ["O", "O", "B-place"]}) + "\n")
    found = measured(tagger, tmp_path / "tags.jsonl")
    (one,) = tagger.predict([words])
    right = np.mean([tag == want for tag, want in zip(one.tags or (), ["O", "O", "B-place"], strict=True)])
    assert found.metrics["accuracy"] == pytest.approx(right) and found.main == "f1"  # type: ignore[attr-defined]


def test_pictures_with_their_mirror_images(colours: Path, squares: Path) -> None:
    """The mean of the logits of both; of pictures that are their own mirror image, the same."""
    predictor = load(colours)
    files = [squares / "test" / name / f"{i}.png" for name in ("red", "blue") for i in range(4)]
    listed = [[str(file.relative_to(squares)), file.parent.name] for file in files]
    data = table(squares / "mirrored.csv", ["file_name", "label"], *listed)
    found = measured(predictor, data, flip=True)
    logits = []
    for file in files:
        picture = Image.open(file).convert("RGB")
        for each in (picture, ImageOps.mirror(picture)):
            share = predictor.predict(each)[0].probabilities or {}
            logits.append(np.log([share[name] for name in ("blue", "green", "red")]))
    means = np.array(logits).reshape(len(files), 2, 3).mean(axis=1)
    expected = np.mean(
        [("blue", "green", "red")[row.argmax()] == f.parent.name for row, f in zip(means, files, strict=True)]
    )
    true = [("blue", "green", "red").index(file.parent.name) for file in files]
    surprise = -np.mean([row[t] - np.log(np.exp(row).sum()) for row, t in zip(means, true, strict=True)])
    assert found.mirrored["accuracy"] == pytest.approx(expected)  # type: ignore[attr-defined]
    assert found.mirrored["log_loss"] == pytest.approx(surprise, rel=1e-3)  # type: ignore[attr-defined]
    assert found.mirrored["log_loss"] != found.metrics["log_loss"]  # type: ignore[attr-defined]
    assert any("with its mirror image" in line for line in found.lines())  # type: ignore[attr-defined]
    assert measured(predictor, data).mirrored is None  # type: ignore[attr-defined]


def test_what_cannot_be_scored(bert: Path, tmp_path: Path) -> None:
    predictor = load(text_model(bert, tmp_path, SINGLE, "bad", "good"))
    data = table(tmp_path / "d.csv", ["text", "label"], ["a film", "yes"], ["the story", "no"])
    with pytest.raises(
        DataError, match=r"no row can be scored \(d.csv:2: label 'yes' is not one.*knows bad, good; name"
    ):
        measured(predictor, data)
    own = Predictor(load_backbone(bert, head=lambda features: nn.Linear(features, 2), modality="text"), predictor.task)
    with pytest.raises(RunError, match="^evaluate: the head is its maker's own"):
        measured(own, data)
    with pytest.raises(DataError, match="flip: only pictures have a mirror image"):
        measured(predictor, table(tmp_path / "e.csv", ["text", "label"], ["a film", "good"]), flip=True)


def command(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(finetune.__file__).parents[1]), "COLUMNS": "120"}
    words = [sys.executable, "-X", "importtime", "-m", "finetune.verbs_cli", *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment)


def test_the_command_line(tmp_path: Path) -> None:
    done = command("--help")
    assert done.returncode == 0 and all(word in done.stdout for word in ("push", "predict", "evaluate"))
    imported = {line.rsplit("|")[-1].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "tyro" in imported and not imported & {
        "torch",
        "timm",
        "transformers",
        "datasets",
        "numpy",
        "huggingface_hub",
    }
    done = command("push", str(tmp_path), "me/new", "--dry-run")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path}: no model here that finetune wrote")

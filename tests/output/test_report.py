"""The report page: true to the run folder, whole for every kind of run, and safe with names that people give."""

import csv
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support, root_mean_squared_error

from finetune.errors import RunError
from finetune.output.plots import COLOURS, Curves, rates_curve
from finetune.output.report import duration, lasting, number, write_report

SINGLE, MULTI, VALUE, TAGS = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
    "token_classification",
)
NASTY = ['<script>alert("x")</script>', '"><img src=x onerror=alert(1)>', "$\\frac{a}{b}$ & co", "_hidden", "日本語"]


def make_run(
    folder: Path,
    kind: str = SINGLE,
    labels: list[str] | None = None,
    *,
    header: list[str] | None = None,
    rows: list[list[Any]] | None = None,
    metrics: dict[str, Any] | None = None,
    classes: dict[str, int] | None = None,
    groups: int = 4,
    steps: int = 0,
    **changes: Any,
) -> Path:
    """A run folder as `fit` leaves it, of two stages; `rows` are those of predictions/test.csv."""
    labels = labels or ["cat", "dog", "owl"]
    folder.mkdir(parents=True, exist_ok=True)
    half, peaks = steps // 2, [1e-3 / 10 ** (1 - i / max(1, groups - 1)) for i in range(groups)]
    frozen = [0.0] * (groups - 1) + [5e-3]
    with (folder / "steps.jsonl").open("w") as file:
        for step in range(steps):
            stage, share = int(step >= half), 0.05 + math.sin(math.pi * (step % half) / half)
            entry = {
                "step": step,
                "stage": stage,
                "loss": 2.0 * 0.9**step,
                "rates": [share * rate for rate in (peaks if stage else frozen)],
                "momentum": 0.95 - 0.1 * share,
                "grad_norm": 1.0,
                "seconds": 0.1,
            }
            file.write(json.dumps(entry) + "\n")
    if rows is not None:
        (folder / "predictions").mkdir(exist_ok=True)
        with (folder / "predictions" / "test.csv").open("w", newline="") as file:
            csv.writer(file).writerows([header or ["id", "target", "prediction", "probability"], *rows])
    with (folder / "left_out.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "split", "reason"], ["train.csv:7", "train", "empty text"]])
    if metrics is None:
        metrics = {"valid": {"accuracy": 0.75, "loss": 0.6}, "test": {"accuracy": 0.5, "loss": 0.7}}
    numbers = {name: value for name, value in metrics.get("valid", {}).items() if isinstance(value, float)}
    stage = {"steps": half, "seconds": 61.5, "examples_per_second": 12.5, "replayed": False, "why": ""}
    record = {
        "schema": 1,
        "task": {"kind": kind, "modality": "text", "labels": labels},
        "data": {
            "source": "data/pets",
            "counts": {"train": 30, "valid": 8, "test": len(rows or [])},
            "classes": classes if classes is not None else {label: 10 for label in labels},
            "fingerprint": "cafe",
            "left_out": 1,
            "duplicates": 2,
            "leaks": 3,
            "conflicts": 0,
            "columns": {"text": "review"},
            "warnings": ["class 'owl' has few rows"],
        },
        "backbone": {"name": "tiny", "family": "transformers", "architecture": "Bert", "base_model": None},
        "settings": {
            "lr": {"value": 1e-3, "reason": "given by the user", "by": "user"},
            "betas": {"value": [0.9, 0.99], "reason": "ULMFiT", "by": "rule"},
        },
        "stages": [
            {"name": "head", "open_from": groups - 1, "peak_rates": frozen, **stage},
            {"name": "all", "open_from": 0, "peak_rates": peaks, **stage},
        ],
        "groups": ["stem", *(f"block_{i}" for i in range(1, groups - 1)), "head"][-groups:],
        "history": [
            {"epoch": 1, "step": half, "stage": "head", "train_loss": 1.5, "valid": numbers},
            {"epoch": 2, "step": steps, "stage": "all", "train_loss": 0.9, "valid": numbers},
        ],
        "kept": "last",
        "metrics": metrics,
        "seconds": {"total": 123.4, "train": 100.0},
        "peak_memory_bytes": 1_500_000_000,
        "device": "cpu",
        "processes": 1,
        "seed": 0,
        "versions": {"torch": "2.14.1"},
        "command": "text_classification.py --data data/pets",
        "status": "finished",
        "why": "",
    }
    (folder / "run.json").write_text(json.dumps(record | changes))
    return folder


class Page(HTMLParser):
    """Tags, texts of table rows, and all text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.text, self.tags = html, "", set()
        self.rows, self.labels, self.drawn, self.ids, self.open = [], [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not [name for name, _ in attributes if name.startswith("on")]
        self.labels += [value for name, value in attributes if name == "aria-label"]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "text" in self.open:
            self.drawn.append(data)
        if "style" not in self.open:
            self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def row(self, *start: str) -> list[str]:
        """The one table row that begins so."""
        (found,) = [row for row in self.rows if row[: len(start)] == list(start)]
        return found


def report(folder: Path) -> Page:
    page = write_report(folder, folder / "report.html")
    return Page(page.read_text(encoding="utf-8"))


def classified(labels: list[str], count: int = 60, seed: int = 0) -> tuple[list[list[Any]], list[str], list[str]]:
    """Rows of a test table in which about two in three are right."""
    rng = np.random.default_rng(seed)
    true = [labels[i] for i in rng.integers(len(labels), size=count)]
    guess = [t if rng.random() < 0.66 else labels[rng.integers(len(labels))] for t in true]
    return (
        [[f"test.csv:{i + 2}", t, g, round(rng.random(), 4)] for i, (t, g) in enumerate(zip(true, guess, strict=True))],
        true,
        guess,
    )


def test_page_and_plots_of_a_finished_run(tmp_path):
    rows, *_ = classified(["cat", "dog", "owl"])
    page = report(make_run(tmp_path / "run", rows=rows, steps=12))
    assert page.row("lr") == ["lr", "0.001", "user", "given by the user"]
    assert page.row("betas") == ["betas", "0.9, 0.99", "rule", "ULMFiT"]
    assert page.row("head", "1 of 4: head") == ["head", "1 of 4: head", "6", "frozen", "0.005", "1 min 2 s", "12.5"]
    assert page.row("all", "4 of 4: stem to head") == [
        "all",
        "4 of 4: stem to head",
        "6",
        "0.0001",
        "0.001",
        "1 min 2 s",
        "12.5",
    ]
    assert page.row("train.csv:7") == ["train.csv:7", "train", "empty text"]
    for text in ("class 'owl' has few rows", "--data data/pets", "torch 2.14.1", "2 min 3 s", "train 30, valid 8"):
        assert text in page.text
    names = ["confusion", "loss", "metric", "momentum", "rates"]
    assert sorted(file.stem for file in (tmp_path / "run" / "plots").glob("*.png")) == names
    assert sorted(file.stem for file in (tmp_path / "run" / "plots").glob("*.csv")) == ["classes", "history"]
    for name in names:
        with Image.open(tmp_path / "run" / "plots" / f"{name}.png") as image:
            assert image.width > 400
    assert len([label for label in page.labels if label != "Headline"]) == len(names)
    assert any("ended at 0.628" in label for label in page.labels)
    assert len(page.ids) == len(set(page.ids)) > 0
    drawn = page.html.partition("</style>")[2]
    assert not [colour for colour in COLOURS.values() if colour in drawn]  # a dark page has its own


def test_nothing_is_loaded_and_nothing_runs(tmp_path):
    rows, *_ = classified(NASTY)
    folder = make_run(tmp_path / "run", labels=NASTY, rows=rows, command='--data "<b>"')
    page = report(folder)
    assert not page.tags & {"script", "img", "link", "iframe", "b>"}
    assert "<script" not in page.html and "<img" not in page.html
    assert all(label in page.text for label in NASTY)
    assert set(NASTY[2:]) <= set(page.drawn)  # as they are, not as formulas
    assert "default-src 'none'" in page.html
    for outside in ("http://", "https://", "@import", "url("):
        others = [part for part in page.html.split(outside)[1:] if not part.startswith(("www.w3.org/", "#"))]
        assert not others


def test_scores_of_each_class_agree_with_scikit_learn(tmp_path):
    labels = ["cat", "dog", "owl"]
    rows, true, guess = classified(labels, count=120)
    page = report(make_run(tmp_path / "run", rows=rows, classes={"cat": 5, "dog": 20, "owl": 5}))
    expected = precision_recall_fscore_support(true, guess, labels=labels)
    for i, label in enumerate(labels):
        figures = [f"{expected[k][i]:.3f}" for k in range(3)]
        assert page.row(label, *figures)[-2:] == [str(expected[3][i]), "20" if label == "dog" else "5"]
    always = ["dog"] * len(true)
    assert page.row("accuracy")[-1] == f"{accuracy_score(true, always):.4g}"
    wrong = [row for row in rows if row[1] != row[2]]
    surest = max(wrong, key=lambda row: row[3])
    assert len(wrong) > 15
    assert page.row(surest[0]) == [*surest[:3], f"{surest[3]:.3f}"]


def test_majority_class_f1_leaves_out_absent_classes(tmp_path):
    rows = [["a", "cat", "cat", 0.9], ["b", "cat", "dog", 0.8], ["c", "dog", "dog", 0.7]]
    metrics = {"valid": {"f1_macro": 0.5}, "test": {"f1_macro": 0.5}}
    page = report(make_run(tmp_path / "run", rows=rows, metrics=metrics, classes={"cat": 9, "dog": 2, "owl": 1}))
    expected = f1_score(["cat", "cat", "dog"], ["cat"] * 3, average="macro", zero_division=0)
    assert page.row("f1_macro") == ["f1_macro", "0.5", "0.5", f"{expected:.4g}"]


def test_77_classes_stay_small(tmp_path):
    labels = [f"a_rather_long_intent_name_{i}" for i in range(77)]
    rows, *_ = classified(labels, count=3080)
    folder = make_run(tmp_path / "run", labels=labels, rows=rows, steps=600)
    page = report(folder)
    assert len(page.html) < 1_000_000
    assert all(page.html.count(label + "<") >= 3 for label in labels[:9])  # table, and both axes of the matrix


@pytest.mark.parametrize(("metrics", "source"), [(True, "validation"), (False, "")])
def test_run_without_test_rows(tmp_path, metrics, source):
    valid = {"accuracy": 0.75, "loss": 0.5} | ({"confusion": [[3, 1], [1, 3]]} if metrics else {})
    page = report(make_run(tmp_path / "run", labels=["cat", "dog"], metrics={"valid": valid}))
    assert "There were no test rows" in page.text
    assert "accuracy on 8 validation rows, 95 % interval 0.4093 to 0.9285" in page.text
    assert (tmp_path / "run" / "plots" / "confusion.png").exists() == metrics
    if metrics:
        assert page.row("accuracy") == ["accuracy", "0.75", "0.5"]
        assert page.row("cat", "0.750")


def test_regression(tmp_path):
    rng = np.random.default_rng(0)
    target = rng.normal(size=(40, 2))
    value = target + 0.1 * rng.normal(size=(40, 2))
    rows = [[f"t:{i}", *t.tolist(), *v.tolist()] for i, (t, v) in enumerate(zip(target, value, strict=True))]
    header = ["id", "target age", "target size", "age", "size"]
    metrics = {"valid": {"rmse": 0.1, "loss": 0.01}, "test": {"rmse": 0.1, "loss": 0.01}}
    page = report(make_run(tmp_path / "run", VALUE, ["age", "size"], header=header, rows=rows, metrics=metrics))
    mean = np.broadcast_to(target.mean(axis=0), target.shape)
    assert page.row("rmse") == ["rmse", "0.1", "0.1", f"{root_mean_squared_error(target, mean):.4g}"]
    assert {"scatter1.png", "scatter2.png"} <= {file.name for file in (tmp_path / "run" / "plots").iterdir()}
    assert "confusion" not in page.text.lower()


def test_several_labels(tmp_path):
    labels = ["New York", "New", "rain"]  # names may hold spaces, and each other
    cells = [("New York rain", "New York"), ("New", "New"), ("", "rain"), ("New York New", "New York New")]
    rows = [[f"t:{i}", *cell] for i, cell in enumerate(cells)]
    true, guess = [[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 0]], [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]]
    metrics = {"valid": {"f1_macro": 0.5}, "test": {"f1_macro": 0.5, "f1_micro": 0.4, "accuracy": 0.5}}
    classes = {"New York": 20, "New": 16, "rain": 3}
    page = report(
        make_run(
            tmp_path / "run", MULTI, labels, header=["id", "target", "prediction"], rows=rows, metrics=metrics,
            classes=classes,
        )
    )  # fmt: skip
    expected = precision_recall_fscore_support(true, guess, zero_division=0)
    for i, label in enumerate(labels):
        assert page.row(label, *(f"{expected[k][i]:.3f}" for k in range(3)))[-2:] == [
            str(expected[3][i]),
            str(classes[label]),
        ]
    always = [[1, 1, 0]] * 4
    for name, same in (
        ("f1_macro", f1_score(true, always, average="macro", zero_division=0)),
        ("f1_micro", f1_score(true, always, average="micro", zero_division=0)),
        ("accuracy", accuracy_score(true, always)),
    ):
        assert page.row(name)[-1] == f"{same:.4g}"


def test_tags(tmp_path):
    rows = [["t:1", "O B-PER I-PER O", "O B-PER O O"], ["t:2", "O O", "O B-PER"]]
    metrics = {"valid": {"f1": 0.5, "accuracy": 0.7}, "test": {"f1": 0.0, "accuracy": 0.6667}}
    page = report(
        make_run(
            tmp_path / "run", TAGS, ["O", "B-PER", "I-PER"], header=["id", "target", "prediction"], rows=rows,
            metrics=metrics, classes={"O": 90, "B-PER": 9, "I-PER": 1},
        )
    )  # fmt: skip
    assert page.row("O", "0.750", "0.750", "0.750")[-2:] == ["4", "90"]
    assert page.row("B-PER", "0.500", "1.000")[-2:] == ["1", "9"]
    assert page.row("accuracy")[-1] == f"{4 / 6:.4g}"
    assert "one word at a time" in page.text


def test_custom_head_and_own_metrics(tmp_path):
    rows = [["t:1", "[0.1, 0.9]", "3.5"], ["t:2", "[0.8, 0.2]", "1.0"]]
    metrics = {"valid": {"loss": 0.5, "years": 2.25}, "test": {"loss": 0.6, "years": 2.5}}
    folder = make_run(tmp_path / "run", header=["id", "species", "age"], rows=rows, metrics=metrics)
    page = report(folder)
    assert page.row("years") == ["years", "2.5", "2.25"]
    assert "What it gets right" not in page.text
    metrics = {"valid": {"loss": 0.5}}
    page = report(make_run(tmp_path / "other", metrics=metrics))
    assert "0.5loss on 8 validation rows" in page.text


def test_runs_that_did_not_finish(tmp_path):
    folder = make_run(tmp_path / "begun", status="running", stages=[], metrics={}, seconds={}, steps=12)
    record = json.loads((folder / "run.json").read_text())
    for key in ("groups", "history", "kept", "peak_memory_bytes", "device", "versions", "why"):
        del record[key]
    (folder / "run.json").write_text(json.dumps(record))
    with (folder / "steps.jsonl").open("a") as file:
        file.write('{"step": 12, "sta')
    page = report(folder)
    assert "has not finished" in page.text and (folder / "plots" / "rates.png").exists()
    (folder / "steps.jsonl").unlink()
    assert "<svg" not in report(folder).html

    why = "step 3: the loss is nan; try a lower rate (lr=3e-4)"
    metrics = {"valid": {"accuracy": 0.5, "log_loss": math.nan, "loss": math.nan}}
    folder = make_run(tmp_path / "diverged", status="diverged", why=why, kept="none", metrics=metrics, steps=4)
    log = (folder / "steps.jsonl").read_text().splitlines()
    entry = json.loads(log[-1]) | {"loss": None, "grad_norm": None}
    (folder / "steps.jsonl").write_text("\n".join([*log[:-1], json.dumps(entry)]) + "\n")
    page = report(folder)
    assert why in page.text and page.row("log_loss")[1] == "not a number"


def test_what_training_got_over_is_said(tmp_path):
    rewind = {"stage": 1, "step": 30, "factor": 0.25, "why": "step 30: the loss rose from 0.7 to 6.7"}
    run = make_run(tmp_path, steps=40, rewinds=[rewind], skipped_steps=3, unreadable={NASTY[0]: "file not found"})
    page = write_report(run, tmp_path / "report.html").read_text()
    assert "went back to the best weights so far and on at 0.25 of the rate: step 30: the loss rose" in page
    assert "3 steps were left out" in page and "1 training rows became unreadable" in page and NASTY[0] not in page
    assert "were left out" not in write_report(make_run(tmp_path / "b", steps=40), tmp_path / "b.html").read_text()


def test_validations_that_were_given_up_are_not_drawn():
    entries = [{"epoch": number, "step": step} for number, step in enumerate((10, 20, 30, 20, 30))]
    assert [entry["epoch"] for entry in lasting(entries)] == [0, 3, 4]
    assert lasting(entries[:3]) == entries[:3] and lasting([]) == []


def test_few_groups_and_no_momentum(tmp_path):
    folder = make_run(tmp_path / "run", groups=2, steps=12, history=[])
    lines = [json.loads(line) | {"momentum": None} for line in (folder / "steps.jsonl").read_text().splitlines()]
    (folder / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(folder)
    assert "middle:" not in page.html
    assert not (folder / "plots" / "momentum.png").exists()
    curves = Curves.of([line | {"rates": line["rates"][-1:]} for line in lines])
    (axes,) = rates_curve(curves, ["head"], ["head", "all"]).axes
    assert [line.get_label() for line in axes.lines] == ["head"]


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(RunError, match="run.json: .*give the folder of a run"):
        write_report(tmp_path, tmp_path / "report.html")
    folder = make_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="another path"):
        write_report(folder, tmp_path / "file" / "report.html")
    assert write_report(folder, tmp_path / "new" / "page.html").is_file()


def test_numbers_as_people_read_them():
    values = [None, True, 3080, 0.00012345, 12345.6, math.nan, [0.9, 0.99], "bf16", 2.0]
    assert [number(value) for value in values] == [
        "–", "yes", "3,080", "0.0001234", "12,346", "not a number", "0.9, 0.99", "bf16", "2",
    ]  # fmt: skip
    assert [duration(seconds) for seconds in (0.42, 59.4, 61, 3725)] == ["0.42 s", "59.4 s", "1 min 1 s", "1 h 2 min"]


def test_the_probe_the_gradients_and_the_calibration(tmp_path):
    groups = {"gradient": [0.0, 0.1, 0.2, 3.0], "moved": [0.0, 1e-4, 1e-3, 0.5]}
    history = [
        {"epoch": 0, "step": 0, "stage": "head", "train_loss": 0.4, "valid": {"accuracy": 0.625, "loss": 0.5}},
        {
            "epoch": 1,
            "step": 10,
            "stage": "all",
            "train_loss": 0.2,
            "valid": {"accuracy": 0.75, "loss": 0.6},
            "groups": groups,
        },
    ]
    bins = {"ece": 0.1234, "log_loss": 0.7, "bins": [[0.55, 0.4, 3], [0.9, 1.0, 5]]}
    calibration = {"temperature": 1.5, "test": {"before": bins | {"ece": 0.2345}, "after": bins}}
    rows = [["a", "cat", "cat", 0.9]] * 9 + [["b", "cat", "dog", 0.8]]
    folder = make_run(tmp_path / "run", steps=20, rows=rows, history=history, calibration=calibration)
    page = report(folder)
    assert "0.625" in page.text
    assert "of a linear probe on frozen features, validation rows; the model there: 0.75" in page.text
    assert ["expected calibration error", "0.2345", "0.1234"] in page.rows
    assert "divided by 1.5" in page.text
    for name in ("gradient", "moved", "reliability"):
        assert (folder / "plots" / f"{name}.png").stat().st_size > 2_000, name
    told = (folder / "plots" / "history.csv").read_text().splitlines()
    assert told == ["epoch,step,stage,train_loss,accuracy,loss", "0,0,head,0.4,0.625,0.5", "1,10,all,0.2,0.75,0.6"]
    assert (folder / "plots" / "classes.csv").read_text().splitlines()[0] == "label,precision,recall,f1,rows,train"
    plain = report(make_run(tmp_path / "plain", steps=20, rows=rows))
    assert "linear probe" not in plain.text and "What the gradients said" not in plain.text
    assert "probabilities can be trusted" not in plain.text


def test_mistakes_with_their_texts_are_escaped(tmp_path):
    folder = make_run(tmp_path / "run", rows=[["a", "cat", "dog", 0.8]])
    entry = {"split": "valid", "id": NASTY[1], "label": NASTY[0], "prediction": "dog", "probability": 0.987,
             "probability_of_label": 0.001, "text": NASTY[0], "picture": "../../secret.jpg"}  # fmt: skip
    (folder / "predictions" / "mistakes.json").write_text(json.dumps([entry]))
    page = report(folder)
    assert "<script>alert" not in page.html and NASTY[0] in page.text and "answered dog (0.987)" in page.text
    assert "secret" not in page.html

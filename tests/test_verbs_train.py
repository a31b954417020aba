"""The verbs around a run: it is made, looked at, and compared from the command line alone."""

import json
import sys
from pathlib import Path

import pytest

from finetune import verbs_cli
from finetune.plan.settings import DIALS


def words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *given: object) -> str:
    """What `finetune GIVEN` prints; its errors and its status are of the text."""
    monkeypatch.setattr(sys, "argv", ["finetune", *map(str, given)])
    status = 0
    try:
        verbs_cli.main()
    except SystemExit as end:
        status = int(end.code or 0)
    captured = capsys.readouterr()
    return captured.out + captured.err + f"status {status}"


@pytest.fixture(scope="module")
def runs(squares: Path, resnet: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs that `finetune fit` made."""
    made, root = [], tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for seed in (0, 1):
            out = root / f"seed{seed}"
            options = ["--epochs", "2", "--batch-size", "8", "--seed", str(seed), "--out", str(out)]
            patch.setattr(sys, "argv", ["finetune", "fit", str(squares), str(resnet), *options])
            verbs_cli.main()
            made.append(out)
    return made[0], made[1]


def test_fit_writes_model_and_report(runs: tuple[Path, Path]) -> None:
    record = json.loads((runs[1] / "run.json").read_text())
    assert record["status"] == "finished" and record["seed"] == 1 and record["task"]["modality"] == "image"
    assert (runs[1] / "report.html").is_file() and (runs[1] / "model" / "model.safetensors").is_file()


def test_fit_takes_columns(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        f"{i},the film was {('good', 'bad')[i % 2]} {chr(97 + i % 26)}{i // 26},{('yes', 'no')[i % 2]},{i}"
        for i in range(40)
    ]
    (tmp_path / "rows.csv").write_text("\n".join(["n,said,liked,other", *lines]))
    options = ["--text", "said", "--label", "liked", "--epochs", "1", "--out", tmp_path / "run"]
    said = words(monkeypatch, capsys, "fit", tmp_path / "rows.csv", bert, *options)
    assert f"Next      finetune predict {tmp_path / 'run'} NEW_DATA" in said and said.endswith("status 0"), said
    assert json.loads((tmp_path / "run" / "run.json").read_text())["task"]["labels"] == ["no", "yes"]
    said = words(monkeypatch, capsys, "fit", tmp_path / "rows.csv", bert, "--label", "absent", "--out", tmp_path / "b")
    assert "error: " in said and "absent" in said and said.endswith("status 2")


def test_inspect(resnet: Path, bert: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = words(monkeypatch, capsys, "inspect", resnet, "--span", 100, "--lr", 0.01)
    lines = [line.split() for line in said.splitlines()]
    assert ["0", "stem"] in [line[:2] for line in lines] and "timm, image" in said
    rates = [line[3] for line in lines if line and line[0].isdigit()]
    assert (rates[0], rates[-1]) == ("1.0e-04", "1.0e-02")
    assert "transformers, text" in words(monkeypatch, capsys, "inspect", bert, "--task", "tokens", "--labels", 5)
    assert "task: 'boxes' is not one of" in words(monkeypatch, capsys, "inspect", bert, "--task", "boxes")
    assert "error: " in words(monkeypatch, capsys, "inspect", "no/such/folder/here")


def test_range_test(
    squares: Path, resnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "range.png"
    said = words(
        monkeypatch, capsys, "range-test", squares, resnet, "--steps", 12, "--batch-size", 8, "--out", picture,
    )  # fmt: skip
    assert "steps from 1e-07 to" in said and "a peak rate of" in said and picture.stat().st_size > 5000


def test_report_and_compare(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert words(monkeypatch, capsys, "report", runs[0], "--out", page).startswith(str(page)) and page.is_file()
    said = words(monkeypatch, capsys, "compare", *runs, "--out", tmp_path / "curves.png")
    assert "seed1 against seed0: better on" in said and (tmp_path / "curves.png").is_file()
    assert "at least two" in words(monkeypatch, capsys, "compare", runs[0])


def test_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    said = words(monkeypatch, capsys, "doctor", "--out", tmp_path)
    assert "! threads" in said and "to mend, marked !" in said and said.endswith("status 1")


@pytest.mark.parametrize("verb", ["fit", "inspect", "range-test", "report", "compare", "doctor"])
def test_help_says_all_of_it_in_a_screen(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = words(monkeypatch, capsys, verb, "--help")
    assert said.endswith("status 0") and len(said.splitlines()) <= 60


def test_plan_says_everything_and_trains_nothing(
    squares: Path, resnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = words(monkeypatch, capsys, "plan", squares, resnet, "--epochs", "2", "--lr", "0.002")
    begins = [line[:9].strip() for line in said.splitlines() if line[:1].strip()]
    assert begins[:6] == ["Data", "Backbone", "Chosen", "Plan", "Time", "Baseline"], said
    assert "peak rate 0.002 head" in said and "as asked for  (--lr)" in said
    assert all(f"\n  {dial}" in said for dial in DIALS) and said.endswith("status 0")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "verb",
    [
        "fit",
        "plan",
        "inspect",
        "range-test",
        "predict",
        "evaluate",
        "report",
        "compare",
        "push",
        "doctor",
        "onnx",
        None,
    ],
)
def test_help_fits_a_screen(
    verb: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", ["finetune", *([verb] if verb else []), "--help"])
    with pytest.raises(SystemExit):
        verbs_cli.main()
    said = capsys.readouterr().out
    assert 5 < len(said.strip().splitlines()) <= 40, said

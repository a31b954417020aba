"""What a run says: lines everywhere, a bar on a terminal alone."""

import io
from typing import Any

import pytest
import rich.console

from finetune.console import Console, headline, shown


def test_lines_and_no_bar_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console("Data      12 rows")
    for step in range(1, 4):
        console.step("all", step, 3)
    console("Result    [bold]good[/bold]")
    console.close()
    assert capsys.readouterr().out == "Data      12 rows\nResult    [bold]good[/bold]\n"


def test_other_processes_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(silent=True)
    console("Data")
    console.step("all", 1, 3)
    console.close()
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal_goes_when_its_stage_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    real = rich.console.Console
    monkeypatch.setattr(rich.console, "Console", lambda: real(file=stream, force_terminal=True, width=100))
    console = Console()
    console.step("head", 1, 2)
    assert console.live is not None
    console("head      1/1   [markup] stays")
    console.step("head", 2, 2)
    assert console.live is None
    console.step("all", 1, 9)
    assert [task.description for task in console.live.tasks] == ["all"]
    console.close()
    said = stream.getvalue()
    assert "[markup] stays" in said and "2/2" in said and "1/9" in said and "to go" in said


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"accuracy": 0.8812, "log_loss": 1.0}, "accuracy 88.1 %"),
        ({"loss": 0.5, "f1_macro": 0.5}, "f1 macro 50.0 %"),
        ({"spearman": 0.73, "mae": 0.2}, "spearman 0.73"),
        ({"confusion": [[1]], "loss": 0.5}, None),
    ],
)
def test_the_metric_that_counts(metrics: dict[str, Any], expected: str | None) -> None:
    found = headline(metrics)
    assert (None if found is None else shown(*found)) == expected
    assert headline({"accuracy": 0.1, "f1_macro": 0.2}, "f1_macro") == ("f1_macro", 0.2)
    assert headline({"accuracy": 0.1}, "f1_macro") == ("accuracy", 0.1)

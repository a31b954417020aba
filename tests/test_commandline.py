"""A typed function on the command line: options, help, and errors in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import finetune

RECIPE = '''
import sys
from pathlib import Path

import finetune


def main(
    data: str, *, out: Path = Path("runs/x"), lr: float | None = None, epochs: int = 3, overwrite: bool = False
) -> None:
    """Do next to nothing.

    Args:
        data: Folder with one sub-folder a class.
        out: Run folder.
        lr: Peak rate of the head.
        epochs: Passes over the rows.
        overwrite: Replace another run.
    """
    if data == "missing":
        raise finetune.DataError("missing: no such folder; check the path")
    if data == "broken":
        raise ZeroDivisionError("a mistake of the program")
    if data == "ctrl-c":
        raise KeyboardInterrupt
    print(f"data={data!r} out={out!r} lr={lr!r} epochs={epochs!r} overwrite={overwrite!r}")
    print("torch" in sys.modules)


if __name__ == "__main__":
    finetune.cli(main)
'''


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "recipe.py"
    path.write_text(RECIPE)
    return path


def call(
    recipe: Path, *arguments: str, flags: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the recipe in an interpreter with `flags`, as one process alone unless `environment` has a RANK."""
    names = {name: value for name, value in os.environ.items() if name != "RANK"}
    names |= {"PYTHONPATH": str(Path(finetune.__file__).parents[1]), "COLUMNS": "120", "NO_COLOR": "1", **environment}
    return subprocess.run(
        [sys.executable, *flags, str(recipe), *arguments], capture_output=True, text=True, timeout=120, env=names
    )


def test_options_reach_the_function_with_their_types(recipe: Path) -> None:
    done = call(recipe, "--data", "photos", "--out", "runs/y", "--lr", "1e-3", "--epochs", "5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == ("data='photos' out=PosixPath('runs/y') lr=0.001 epochs=5 overwrite=False")


def test_a_switch_is_given_by_its_name(recipe: Path) -> None:
    """As the errors about run folders say: "replace it with --overwrite"."""
    done = call(recipe, "--data", "photos", "--overwrite")
    assert done.returncode == 0, done.stderr
    assert "overwrite=True" in done.stdout


def test_what_is_not_given_has_its_default(recipe: Path) -> None:
    done = call(recipe, "--data", "photos")
    assert done.stdout.splitlines() == [
        "data='photos' out=PosixPath('runs/x') lr=None epochs=3 overwrite=False",
        "False",
    ]
    assert done.stderr == "" and done.returncode == 0


def test_help_says_everything_without_torch(recipe: Path) -> None:
    done = call(recipe, "--help", flags=("-X", "importtime"))
    assert done.returncode == 0
    for words in ("Do next to nothing.", "--data", "--out", "--lr", "--overwrite", "Peak rate of the head.", "runs/x"):
        assert words in done.stdout, words
    imported = {line.rsplit("|")[-1].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "finetune" in imported and "tyro" in imported  # the list is there
    assert not imported & {"torch", "timm", "transformers", "datasets", "numpy", "sklearn"}


def test_a_typo_ends_with_status_2_and_a_suggestion(recipe: Path) -> None:
    done = call(recipe, "--data", "photos", "--epoch", "5")
    assert done.returncode == 2
    assert "--epochs" in done.stderr and "--epoch" in done.stderr and "Traceback" not in done.stderr
    assert "data=" not in done.stdout


def test_a_value_of_the_wrong_type_ends_with_status_2(recipe: Path) -> None:
    done = call(recipe, "--data", "photos", "--lr", "fast")
    assert done.returncode == 2 and "--lr" in done.stderr and "Traceback" not in done.stderr


def test_a_missing_option_ends_with_status_2(recipe: Path) -> None:
    done = call(recipe)
    assert done.returncode == 2 and "--data" in done.stderr and "Traceback" not in done.stderr


def test_an_error_for_the_user_is_one_line(recipe: Path) -> None:
    done = call(recipe, "--data", "missing")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: missing: no such folder; check the path\n"


def test_a_mistake_of_the_program_has_its_traceback(recipe: Path) -> None:
    done = call(recipe, "--data", "broken")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ZeroDivisionError: a mistake of the program" in done.stderr


def test_ctrl_c_ends_with_status_130(recipe: Path) -> None:
    done = call(recipe, "--data", "ctrl-c")
    assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.parametrize("arguments", [["--data", "missing"], ["--data", "photos", "--epoch", "5"], ["--help"]])
def test_other_processes_are_silent(recipe: Path, arguments: list[str]) -> None:
    first, second = call(recipe, *arguments, RANK="0"), call(recipe, *arguments, RANK="1")
    assert (second.stdout, second.stderr) == ("", "")
    assert first.stdout + first.stderr and first.returncode == second.returncode

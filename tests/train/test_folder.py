"""A run folder is made, goes on, or is refused in words that say why and what to do."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import RunError
from finetune.train.folder import open_folder, read_record, release, take, write_record

ASKED: dict[str, Any] = {"data": "abc", "options": {"lr": 1e-3, "betas": (0.9, 0.99)}, "plan": None, "seed": 0}


def held(folder: Path, status: str = "running", **changed: Any) -> Path:
    """A folder with a run, as `fit` leaves it."""
    folder.mkdir(exist_ok=True)
    write_record(folder, {"identity": {**ASKED, **changed}, "status": status})
    (folder / "steps.jsonl").write_text("{}\n")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    return folder


def refused(folder: Path, **options: Any) -> str:
    with pytest.raises(RunError) as caught:
        open_folder(folder, ASKED, **options)
    return str(caught.value)


def test_a_new_folder_is_made(tmp_path: Path) -> None:
    assert open_folder(tmp_path / "deep" / "runs", ASKED) is False
    assert list((tmp_path / "deep" / "runs").iterdir()) == []


def test_hidden_files_do_not_count(tmp_path: Path) -> None:
    (tmp_path / ".DS_Store").write_text("")
    assert open_folder(tmp_path, ASKED) is False
    assert (tmp_path / ".DS_Store").exists()


def test_an_unfinished_run_of_the_same_request_goes_on(tmp_path: Path) -> None:
    held(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert open_folder(tmp_path, ASKED) is True
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("status", ["finished", "diverged"])
def test_a_run_that_ended_is_refused(tmp_path: Path, status: str) -> None:
    held(tmp_path, status)
    assert refused(tmp_path) == (
        f"{tmp_path}: holds a run that is {status}; give another folder with --out, or replace it with --overwrite"
    )
    assert (tmp_path / "model" / "config.json").exists()


@pytest.mark.parametrize("status", ["running", "finished"])
def test_another_run_is_refused_with_the_difference(tmp_path: Path, status: str) -> None:
    held(tmp_path, status, seed=4, options={"lr": 0.002})
    assert refused(tmp_path) == (
        f'{tmp_path}: holds another run (options {{"lr": 0.002}} -> {{"lr": 0.001, "betas": [0.9, 0.99]}}; '
        "seed 4 -> 0); give another folder with --out, "
        + ("" if status == "running" else "or ")
        + "replace it with --overwrite"
        + (", or go on with it all the same with --resume-anyway" if status == "running" else "")
    )


def test_another_run_goes_on_all_the_same(tmp_path: Path) -> None:
    held(tmp_path, "running", seed=4)
    (tmp_path / ".model.new-17").mkdir()  # what a run that was killed in its export leaves
    assert open_folder(tmp_path, ASKED, resume_anyway=True) is True
    assert (tmp_path / "model" / "config.json").exists() and not (tmp_path / ".model.new-17").exists()
    held(tmp_path / "ended", "finished", seed=4)
    assert "holds another run" in refused(tmp_path / "ended", resume_anyway=True)


def test_long_differences_are_cut(tmp_path: Path) -> None:
    held(tmp_path, plan=[{"open_from": -1, "epochs": number} for number in range(100)])
    message = refused(tmp_path)
    assert len(message) < 300 and "... -> null" in message


def test_a_damaged_record(tmp_path: Path) -> None:
    held(tmp_path)
    (tmp_path / "run.json").write_text('{"identity": {"data"')
    assert "holds another run (data null -> abc; " in refused(tmp_path)
    assert open_folder(tmp_path, ASKED, overwrite=True) is False


@pytest.mark.parametrize("status", ["running", "finished"])
def test_overwrite_empties_the_folder(tmp_path: Path, status: str) -> None:
    held(tmp_path, status, seed=4)
    assert open_folder(tmp_path, ASKED, overwrite=True) is False
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_that_are_not_of_a_run_are_never_touched(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert refused(tmp_path, overwrite=overwrite) == (
        f"{tmp_path}: holds files that are not of a run (thesis.tex); give another folder with --out"
    )
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "run"
    assert refused(below) == f"{below}: cannot be made (Not a directory); give another folder with --out"
    assert refused(tmp_path / "file") == (
        f"{tmp_path / 'file'}: cannot be made (File exists); give another folder with --out"
    )


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = f"{tmp_path}: cannot be written to; give another folder with --out, or mend its permissions"
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        assert refused(tmp_path) == expected

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        assert refused(tmp_path) == expected


HOLD = """
import sys, time
from pathlib import Path
from finetune.train.folder import take
take(Path(sys.argv[1]))
print("taken", flush=True)
time.sleep(60)
"""


def test_a_folder_that_another_process_writes_to(tmp_path: Path) -> None:
    """A launcher that was killed leaves its processes at work."""
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "taken\n"
        with pytest.raises(
            RunError, match=f"run: process {other.pid} is writing to it; wait until it ends, end it, or"
        ):
            take(folder)
        other.kill()
    take(folder)
    take(folder)  # this process has it already, as after an error in a notebook
    assert open_folder(folder, ASKED) is False
    release(folder)
    assert list(folder.iterdir()) == []


def test_the_record_there_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_record(tmp_path, {"folder": tmp_path, "seconds": 1.5})
    assert read_record(tmp_path) == {"folder": str(tmp_path), "seconds": 1.5}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_record(tmp_path, {"seconds": 2.5})
    assert json.loads((tmp_path / "run.json").read_text())["seconds"] == 1.5


def test_overwrite_touches_nothing_that_is_not_of_a_run(tmp_path: Path) -> None:
    held(tmp_path, "finished")
    (tmp_path / "thesis.tex").write_text("precious")
    assert refused(tmp_path, overwrite=True) == (
        f"{tmp_path}: beside the run there are files that are not of it (thesis.tex); move them out, or give another "
        "folder with --out"
    )
    assert (tmp_path / "thesis.tex").read_text() == "precious" and (tmp_path / "run.json").exists()

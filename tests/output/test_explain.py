"""A run told at length."""

import json
from pathlib import Path

import pytest

import finetune
from finetune.data.splits import Splits
from finetune.output.explain import meanings
from finetune.output.summary import kept_weights
from finetune.plan.settings import DIALS


def test_every_dial_has_a_meaning() -> None:
    found = meanings()
    assert set(DIALS) <= set(found)
    assert found["span"].startswith("`lr` over the stem's peak rate") and "  " not in " ".join(found.values())


def test_a_run_and_its_folder(square_splits: Splits, resnet: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = finetune.fit(square_splits, resnet, out=out, settings={"span": 3.0, "epochs": 2})
    said = finetune.explain(run)
    assert said == finetune.explain(out)
    assert "you set epochs, span, and the rest was set to suit" in said.splitlines()[0].replace(
        "span, epochs", "epochs, span"
    )
    assert "span = 3   (given by you)" in said
    record = run.record["settings"]
    for dial in DIALS:
        assert f"\n{dial} = " in said
        reason = " ".join(record[dial]["reason"].split())
        assert (f"Why: {reason}." in " ".join(said.split())) == (record[dial]["by"] != "user")
    assert "The head was solved in " in said and f"Stage all: {run.record['stages'][0]['steps']} steps" in said
    assert f"Kept: {kept_weights(run.record)}." in " ".join(said.split())
    assert "lr = " in said and "(by rule; --lr)" in said


def test_what_went_wrong_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(
        """{"backbone": {"name": "b"}, "data": {"counts": {"train": 9}}, "settings": {}, "status": "diverged",
        "groups": ["stem", "head"], "why": "the loss ran away", "kept": "epoch 3", "skipped_steps": 2,
        "stages": [{"name": "all", "open_from": 0, "steps": 4, "seconds": 1.0, "peak_rates": [1e-5, 1e-3],
                    "replayed": false, "why": ""}],
        "rewinds": [{"stage": 0, "step": 3, "factor": 0.25, "why": "the loss rose"}]}"""
    )
    said = finetune.explain(folder)
    for words in (
        "went back at step 3, to 0.25 of the rate: the loss rose", "2 steps without a usable gradient",
        "ended before its time: the loss ran away", "Kept: those of epoch 3, clearly better on validation",
    ):  # fmt: skip
        assert words in said
    told = json.loads((folder / "run.json").read_text()) | {
        "kept": "average",
        "settings": {"cycles": {"value": 2, "by": "rule", "reason": "few"}},
    }
    (folder / "run.json").write_text(json.dumps(told))
    assert "Kept: the average of the ends of 2 cycles." in finetune.explain(folder)
    (folder / "run.json").write_text(
        '{"backbone": {"name": "b"}, "data": {"counts": {"train": 9}}, "settings": {}, "status": "running"}'
    )
    assert "has not finished: running" in finetune.explain(folder)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(finetune.RunError, match="give the folder of a run"):
        finetune.explain(tmp_path)

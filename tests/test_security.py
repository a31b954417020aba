"""What comes from others is data and never code, stays in its folder, and secrets stay where they are."""

import json
import sys
from pathlib import Path

import datasets
import pytest
from PIL import Image

import finetune
from finetune.data.images import BadImage, open_image
from finetune.data.sources import load_dataset
from finetune.data.splits import Splits
from finetune.errors import BackboneError, DataError, FinetuneError, RunError, without_secrets
from finetune.model.backbones import load_backbone

TOKEN = "hf_" + "AbCdEfGhIjKlMnOp"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"--token {TOKEN} --lr 1", "--token *** --lr 1"),
        ("https://me:pass@hub.example/x", "https://***@hub.example/x"),
        ("a shelf_life of 3, hf_short", "a shelf_life of 3, hf_short"),
    ],
)
def test_secrets_are_taken_out_and_nothing_else(text: str, kept: str) -> None:
    assert without_secrets(text) == kept
    assert str(RunError(f"{text}; try again")) == f"{kept}; try again" and isinstance(RunError(text), FinetuneError)


def test_no_file_of_a_run_has_a_token(
    square_splits: Splits, resnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--data", "x", "--token", TOKEN])
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    run = finetune.fit(square_splits, resnet, out=tmp_path / "run", epochs=1, batch_size=16)
    run.write_report()
    run.push_to_hub("me/x", dry_run=True)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 5 and not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert "***" in json.loads((tmp_path / "run" / "run.json").read_text())["command"]


def test_a_command_line_with_a_token_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--token", TOKEN])

    def main(data: str) -> None:
        """Nothing."""

    with pytest.raises(SystemExit) as ended:
        finetune.cli(main)
    said = capsys.readouterr()
    assert ended.value.code == 2 and TOKEN not in said.out + said.err and "holds a token" in said.err


def test_pictures_that_are_programs_or_lines(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    with pytest.raises(BadImage, match="EPS is not supported; convert it to PNG"):
        open_image(tmp_path / "a.eps")
    Image.new("L", (4000, 2)).save(tmp_path / "line.png")
    with pytest.raises(BadImage, match="more than 300 times as long as wide"):
        open_image(tmp_path / "line.png")


def test_a_saved_data_set_that_names_files_elsewhere(tmp_path: Path) -> None:
    rows = {"text": ["good"] * 8 + ["bad"] * 8, "label": ["a"] * 8 + ["b"] * 8}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "set")
    state = json.loads((tmp_path / "set" / "state.json").read_text())
    state["_data_files"][0]["filename"] = "../other/data-00000-of-00001.arrow"
    (tmp_path / "set" / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match="which lies elsewhere; do not use this data set"):
        load_dataset(tmp_path / "set")


def test_an_adapter_beside_a_model_is_not_followed(bert: Path, review_task: finetune.Task, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in bert.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/else"}))
    with pytest.raises(BackboneError, match="lies an adapter"):
        load_backbone(folder, review_task)


@pytest.fixture
def review_task() -> finetune.Task:
    return finetune.Task("single_label_classification", "text", ("bad", "good"))

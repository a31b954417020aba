"""Data that nobody would train on: sane settings, no crash, plain words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from datasets import Dataset
from PIL import Image

import finetune

QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 8}


def pictures(rows: int, classes: int, paint: Callable[[int, int], np.ndarray]) -> Dataset:
    """`paint` gives the pixels [16, 16, 3] for a row and its class."""
    made = [Image.fromarray(paint(row, row % classes).astype(np.uint8)) for row in range(rows)]
    return Dataset.from_dict({"image": made, "label": [f"c{row % classes}" for row in range(rows)]})


def noise(row: int, label: int) -> np.ndarray:
    return np.random.default_rng(row).integers(0, 255, (16, 16, 3))


def coloured(row: int, label: int) -> np.ndarray:
    return np.clip(noise(row, label) * 0.3 + 150 * (np.arange(3) == label % 3), 0, 255)


def fit(data: Any, backbone: Any, out: Path, **options: Any) -> finetune.Run:
    return finetune.fit(finetune.load_dataset(data), backbone, out=out, **{**QUICK, **options})


def test_constant_pictures(resnet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All equal: rows of both classes are the same input, and nothing can be told from it."""
    run = fit(pictures(40, 2, lambda row, label: np.full((16, 16, 3), 90 + row % 20)), resnet, tmp_path / "run")
    assert run.record["status"] == "finished" and np.isfinite(run.metrics["valid"]["loss"])
    with pytest.raises(finetune.DataError, match="several labels|different examples|spared for validation"):
        fit(pictures(40, 2, lambda row, label: np.full((16, 16, 3), 90)), resnet, tmp_path / "same")


def test_one_example_a_class(resnet: Path, tmp_path: Path) -> None:
    with pytest.raises(finetune.DataError, match="no row can be spared for validation"):
        fit(pictures(6, 6, noise), resnet, tmp_path / "run")


def test_many_classes(bert: Path, tmp_path: Path) -> None:
    rows = {
        "text": [f"word {i} {j} story" for i in range(500) for j in range(3)],
        "label": [f"k{i}" for i in range(500) for _ in range(3)],
    }
    run = fit(Dataset.from_dict(rows), bert, tmp_path / "run", epochs=0.05, batch_size=32)
    assert len(run.task.labels) == 500 and np.isfinite(run.metrics["valid"]["log_loss"])
    assert run.write_report().stat().st_size < 3e6


def test_duplicated_rows_do_not_leak(resnet: Path, tmp_path: Path) -> None:
    data = pictures(60, 3, lambda row, label: coloured(row % 12, row % 3))
    splits = finetune.load_dataset(data)
    seen = {np.array(image).tobytes() for image in _decoded(splits.train)}
    assert not any(np.array(image).tobytes() in seen for image in _decoded(splits.valid))
    assert finetune.fit(splits, resnet, out=tmp_path / "run", **QUICK).record["data"]["duplicates"] == 48


def _decoded(data: Dataset) -> list[Image.Image]:
    from finetune.data.images import open_image

    return [open_image(cell["bytes"] or cell["path"]) for cell in data["image"]]


def test_shuffled_labels_are_said_to_be_unlearnable(
    resnet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(pictures(160, 2, noise), resnet, tmp_path / "run")
    assert "Warning   nothing learnable found" in capsys.readouterr().out
    assert "Nothing learnable found" in run.write_report().read_text()
    learnt = fit(pictures(90, 3, coloured), resnet, tmp_path / "learnt")
    assert "nothing learnable" not in capsys.readouterr().out and learnt.metrics["valid"]["accuracy"] > 0.9


@pytest.mark.parametrize("scale", [1, 257])
def test_sixteen_bits_and_eight_are_the_same_picture(resnet: Path, tmp_path: Path, scale: int) -> None:
    """Inputs in a scale of their own: 16-bit grey as microscopes and scanners write it."""
    folder = tmp_path / "data"
    for row in range(24):
        place = folder / f"c{row % 2}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = (np.random.default_rng(row).integers(0, 60, (16, 16)) + 150 * (row % 2)).astype(np.uint16) * scale
        Image.fromarray(pixels if scale > 1 else pixels.astype(np.uint8)).save(place / f"{row}.png")
    run = finetune.fit(finetune.load_images(folder), resnet, out=tmp_path / "run", **QUICK)
    assert run.metrics["valid"]["accuracy"] == 1.0


def test_a_backbone_that_has_learnt_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = timm.create_model("resnet10t", num_classes=3)
    run = fit(pictures(60, 3, coloured), made, tmp_path / "run", image_size=32)
    assert run.record["status"] == "finished" and np.isfinite(run.metrics["valid"]["loss"])

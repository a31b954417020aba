"""The recipe as a real command: pictures in the wrong folder are found, and a second start trains nothing again."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.recipes.test_recipes import command

pytestmark = pytest.mark.recipe


def test_pictures_in_the_wrong_folder_are_found(tmp_path: Path) -> None:
    rng, photos = np.random.default_rng(0), tmp_path / "photos"
    for label, axis in (("across", 0), ("down", 1)):
        (photos / label).mkdir(parents=True)
        for number in range(40):
            stripes = (np.arange(64) + rng.integers(8)) // 8 % 2 * 180
            pixels = rng.integers(0, 60, (64, 64, 3)) + (stripes[:, None] if axis == 0 else stripes[None, :])[..., None]
            Image.fromarray(pixels.astype(np.uint8)).save(photos / label / f"{label}{number}.png")
    wrong = {"across/down3.png", "across/down7.png", "down/across5.png", "down/across30.png"}  # 5 %
    for folder, name in (place.split("/") for place in wrong):
        shutil.move(photos / {"across": "down", "down": "across"}[folder] / name, photos / folder / name)
    out = tmp_path / "run"
    words = ["recipes/k_fold.py", "--data", photos, "--backbone", "fractals", "--out", out, "--folds", "3",
             "--epochs", "4"]  # fmt: skip
    printed = command(*words)
    assert "Result    out-of-fold accuracy 9" in printed and "over 80 rows" in printed
    with (out / "label_errors.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert {row["id"] for row in found[:4]} == wrong, found
    assert {(row["given"], row["likely"]) for row in found[:4]} == {("across", "down"), ("down", "across")}
    with (out / "out_of_fold.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 80
    again = command(*words)
    assert again.count("is there already") == 3 and "Backbone" not in again
    assert again.split("Result")[1] == printed.split("Result")[-1]
    printed = command(*words, "--group", "patient", status=2)
    assert printed.startswith("error: ") and "no column 'patient' to group by" in printed

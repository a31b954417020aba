"""Small data and backbones that several parts train on."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.data.sources import load_images
from finetune.data.splits import Splits
from tests.hub_client import Client
from tests.hub_server import Hub
from tests.tiny import bert_folder, timm_folder

torch.set_num_threads(1)

COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of coloured noise, 32 x 32: train/ with 12 images a class, test/ with 4."""
    root = tmp_path_factory.mktemp("squares")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for label, colour in COLOURS.items():
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(colour, 60, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def square_splits(squares: Path) -> Splits:
    """The squares as `Splits`: a part of train is drawn for validation."""
    return load_images(squares)


@pytest.fixture(scope="session")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A timm folder: a small ResNet with statistics in its batch norms, for 32 x 32 pixels."""
    return timm_folder(tmp_path_factory.mktemp("resnet") / "m", "test_resnet", cfg={"input_size": [3, 32, 32]})


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder: a small BERT, with its dropout, without a classifier."""
    return bert_folder(tmp_path_factory.mktemp("bert") / "m")


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    """A Hub on loopback."""
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def client(server: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A process with the real client, whose Hub is `server`."""
    with Client(server.url, tmp_path_factory.mktemp("client")) as client:
        yield client

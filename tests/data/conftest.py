"""Small data sets, made up on the spot."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = "the cat sat on a mat and dog ran out of big red house good bad film un ##believ ##able".split()


@pytest.fixture
def picture() -> Callable[..., Image.Image]:
    """Make an image of random pixels; another seed, another image."""

    def make(seed: int = 0, size: tuple[int, int] = (40, 32), mode: str = "RGB") -> Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        return Image.fromarray(pixels).convert(mode)

    return make


@pytest.fixture
def folder(tmp_path: Path, picture: Callable[..., Image.Image]) -> Callable[..., Path]:
    """Make class folders of different images: folder(cat=6, dog=6)."""
    made = [0]

    def make(name: str = "photos", **classes: int) -> Path:
        for label, count in classes.items():
            (tmp_path / name / label).mkdir(parents=True)
            for i in range(count):
                made[0] += 1
                picture(made[0]).save(tmp_path / name / label / f"{i}.png")
        return tmp_path / name

    return make


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    """Write a text file."""

    def make(text: str, name: str = "reviews.csv", encoding: str = "utf-8") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode(encoding))
        return path

    return make


@pytest.fixture
def reviews(table: Callable[..., Path]) -> Callable[..., Path]:
    """Write a CSV file of n different rows with columns text and label, labels taking turns."""

    def make(
        n: int = 20, labels: tuple[str, ...] = ("neg", "pos"), name: str = "reviews.csv", word: str = "row"
    ) -> Path:
        rows = [f"{word} number {i},{labels[i % len(labels)]}" for i in range(n)]
        return table("\n".join(["text,label", *rows, ""]), name)

    return make


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer in the manner of BERT, of a few words."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip

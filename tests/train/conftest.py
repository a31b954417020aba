"""Small data for trainers: squares, sentences of different lengths, lists of words with tags."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import BertModel

from finetune.data.sources import load_images, load_table
from finetune.data.splits import Splits
from tests.tiny import bert_config, tokenizer

GOOD, BAD = "good bright very", "bad dull not"


def sentence(i: int) -> tuple[str, int]:
    """A sentence of 4 to 9 words, different for each i below 1000, and whether it praises."""
    label = i % 2
    words = [*"the film was".split(), (GOOD, BAD)[label].split()[i % 3], *["very"] * (i % 5)]
    return " ".join([*words, *(chr(97 + int(digit)) for digit in f"{i:03}")]), label


def tagged(i: int) -> tuple[list[str], list[str]]:
    """1 to 12 words with a tag each, so that micro-batches differ in their number of tags."""
    words = ["marie", *(["visited", "paris", "and"] * 4)][: 1 + 5 * i % 12] + [chr(97 + int(digit)) for digit in str(i)]
    return words, [{"marie": "B-PER", "paris": "B-LOC"}.get(word, "O") for word in words]


@pytest.fixture(scope="session")
def review_splits() -> Splits:
    """40 sentences to train on, 20 to validate, of different lengths."""
    parts = {"train": range(40), "valid": range(40, 60)}
    return load_table(
        DatasetDict({
            name: Dataset.from_dict({
                "text": [sentence(i)[0] for i in rows], "label": [("good", "bad")[sentence(i)[1]] for i in rows],
            })
            for name, rows in parts.items()
        })
    )  # fmt: skip


@pytest.fixture(scope="session")
def tag_splits() -> Splits:
    """16 lists of words with tags to train on, 7 to validate."""
    parts = {"train": range(16), "valid": range(16, 23)}
    return load_table(
        DatasetDict({
            name: Dataset.from_dict({
                "tokens": [tagged(i)[0] for i in rows], "ner_tags": [tagged(i)[1] for i in rows],
            })
            for name, rows in parts.items()
        }),
        task="tokens",
    )  # fmt: skip


@pytest.fixture(scope="session")
def plain_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder without dropout, so that a sum over micro-batches has one right value."""
    folder = tmp_path_factory.mktemp("plain_bert") / "m"
    torch.manual_seed(0)
    config = bert_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def twelve(squares: Path) -> Splits:
    """12 squares to train on, the test folder to validate."""
    whole = load_images(squares / "train", valid=squares / "test")
    return Splits(whole.train.select(range(0, 36, 3)), whole.valid, None, whole.task, whole.report, whole.source)

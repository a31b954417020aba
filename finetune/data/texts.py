"""Texts: rows and a tokenizer go in, padded tensors [B, T] come out; each text is tokenised once.

Shapes: B texts of a batch, T tokens of the longest of them.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import datasets
import numpy as np
import torch
from torch import Tensor

from finetune.data.task import IGNORED, Task
from finetune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_TOKENS = 512  # a text is cut off here, or where the tokenizer's model ends
CHUNK = 1000  # texts that are tokenised at once


@dataclass(frozen=True)
class Tokens:
    """All texts of a Dataset as token numbers: flat arrays, text i at offsets[i] to offsets[i + 1]."""

    columns: dict[str, np.ndarray]  # "input_ids", maybe "token_type_ids"; for the tokens task "targets"
    offsets: np.ndarray
    padding: dict[str, int]  # what a column is filled up with
    left: bool  # whether the tokenizer fills up on the left

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text, special ones included."""
        return np.diff(self.offsets).tolist()

    def batch(self, rows: list[int]) -> dict[str, Tensor]:
        """Pad texts to the longest of them: int64 [B, T] for each column, and "attention_mask"."""
        starts, ends = self.offsets[rows], self.offsets[np.asarray(rows) + 1]
        sizes = ends - starts
        longest = int(sizes.max(initial=0))
        mask = np.arange(longest) < sizes[:, None]
        if self.left:
            mask = mask[:, ::-1]
        where = np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)])
        tensors = {"attention_mask": torch.from_numpy(mask.astype(np.int64))}
        for name, column in self.columns.items():
            padded = np.full(mask.shape, self.padding[name], dtype=np.int64)
            padded[mask] = column[where]
            tensors[name] = torch.from_numpy(padded)
        return tensors


# Tokenizer -> {(fingerprint of the Dataset, kind of task): its tokens}; an entry goes when its tokenizer goes.
cache: "WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[str, str], Tokens]]" = WeakKeyDictionary()


def tokenized(data: datasets.Dataset, task: Task, tokenizer: "PreTrainedTokenizerBase") -> Tokens:
    """Tokenise a Dataset, or give what an earlier call made of it."""
    known, key = cache.setdefault(tokenizer, {}), (data._fingerprint, task.kind)
    if key not in known:
        known[key] = tokenize(data, task, tokenizer)
    return known[key]


def tokenize(data: datasets.Dataset, task: Task, tokenizer: "PreTrainedTokenizerBase") -> Tokens:
    """Tokenise every text; in the tokens task the first piece of a word carries its label, other pieces -100.

    Raises:
        DataError: The tokens task with a tokenizer that cannot say which word a piece belongs to.
    """
    tags = task.kind == "token_classification"
    if tags and not tokenizer.is_fast:
        raise DataError(
            "tokens: this tokenizer does not tell which word a piece belongs to; take a backbone with a fast one"
        )
    most = min(tokenizer.model_max_length, MOST_TOKENS)
    flat: dict[str, list[np.ndarray]] = {}
    sizes: list[int] = []
    for start in range(0, len(data), CHUNK):
        rows: dict[str, list[Any]] = data[start : start + CHUNK]
        pair = rows.get("text_pair")
        encoded = tokenizer(
            rows["tokens" if tags else "text"],
            pair,
            truncation=True,
            max_length=most,
            is_split_into_words=tags,
            return_attention_mask=False,
        )
        columns = {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}
        if tags:
            columns["targets"] = [first_pieces(encoded.word_ids(i), row) for i, row in enumerate(rows["target"])]
        sizes += map(len, columns["input_ids"])
        for name, column in columns.items():
            flat.setdefault(name, []).append(np.concatenate([np.asarray(row, dtype=np.int32) for row in column]))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    padding = {"input_ids": int(pad), "token_type_ids": tokenizer.pad_token_type_id, "targets": IGNORED}
    return Tokens(
        {name: np.concatenate(chunks) for name, chunks in flat.items()},
        np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64),
        padding,
        tokenizer.padding_side == "left",
    )


def first_pieces(words: list[int | None], labels: list[int]) -> list[int]:
    """Put each word's label on its first piece."""
    before = [None, *words[:-1]]
    return [
        labels[word] if word is not None and word != last else IGNORED for word, last in zip(words, before, strict=True)
    ]

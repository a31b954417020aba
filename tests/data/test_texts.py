from typing import Any

import datasets
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from finetune.data import texts
from finetune.data.task import Task, default_loss, units
from finetune.data.texts import tokenized
from finetune.errors import DataError

SINGLE = Task("single_label_classification", "text", ("a", "b"))
TAGS = Task("token_classification", "text", ("O", "X"))
Tokenizer = PreTrainedTokenizerFast


def make(**columns: list[Any]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


def plain(tokenizer: Tokenizer, *arguments: Any, **options: Any) -> dict[str, torch.Tensor]:
    """What the tokenizer itself makes of a batch."""
    return dict(tokenizer(*arguments, truncation=True, max_length=512, padding=True, return_tensors="pt", **options))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pair", [False, True])
def test_batches_equal_the_tokenizers_own(tokenizer: Tokenizer, side: str, pair: bool):
    tokenizer.padding_side = side
    try:
        columns = {"text": ["the cat", "a big red dog ran out", "mat"]}
        if pair:
            columns["text_pair"] = ["good film", "bad", "the house and the mat"]
        rows = [2, 0]
        expected = plain(tokenizer, *([column[row] for row in rows] for column in columns.values()))
        tokens = texts.tokenize(make(**columns), SINGLE, tokenizer)
        found = tokens.batch(rows)
        assert found.keys() == expected.keys() >= {"input_ids", "attention_mask", "token_type_ids"}
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor) and found[name].dtype == torch.int64, name
        assert tokens.lengths[0] == (7 if pair else 4)
    finally:
        tokenizer.padding_side = "right"


def test_long_texts_are_cut_off(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    data = make(text=["cat " * 2000, "dog"])
    assert texts.tokenize(data, SINGLE, tokenizer).lengths == [512, 3]
    monkeypatch.setattr(tokenizer, "model_max_length", 16)
    assert texts.tokenize(data, SINGLE, tokenizer).lengths == [16, 3]


def test_labels_go_to_the_first_piece_of_a_word(tokenizer: Tokenizer):
    data = make(tokens=[["the", "unbelievable", "cat"], ["dog"]], target=[[0, 1, 0], [1]])
    batch = texts.tokenize(data, TAGS, tokenizer).batch([0, 1])
    pieces = tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    assert pieces == ["[CLS]", "the", "un", "##believ", "##able", "cat", "[SEP]"]
    assert batch["targets"].tolist() == [[-100, 0, 1, -100, -100, 0, -100], [-100, 1, *[-100] * 5]]
    assert units(TAGS, batch["targets"]) == 4
    assert torch.isfinite(default_loss(TAGS)(torch.randn(2, 7, 2), batch["targets"]))


def test_a_word_twice_in_a_row_has_two_labels(tokenizer: Tokenizer):
    data = make(tokens=[["cat", "cat"]], target=[[0, 1]])
    assert texts.tokenize(data, TAGS, tokenizer).batch([0])["targets"].tolist() == [[-100, 0, 1, -100]]


def test_tokens_need_a_fast_tokenizer(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    with pytest.raises(DataError, match="^tokens: this tokenizer does not tell which word a piece belongs to"):
        texts.tokenize(make(tokens=[["cat"]], target=[[0]]), TAGS, tokenizer)


def test_texts_are_tokenised_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    calls = []
    real = texts.tokenize
    monkeypatch.setattr(texts, "tokenize", lambda *arguments: calls.append(1) or real(*arguments))
    data = make(text=["the cat", "dog"])
    assert tokenized(data, SINGLE, tokenizer) is tokenized(data, SINGLE, tokenizer)
    assert len(calls) == 1
    other = make(text=["the dog", "cat"])
    assert tokenized(other, SINGLE, tokenizer) is not tokenized(data, SINGLE, tokenizer)
    assert len(calls) == 2

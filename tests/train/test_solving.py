"""The head of a decoder, which answers every token of a sentence: solved for the one that the model takes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import finetune
from finetune import preparing
from finetune.data.splits import Splits
from finetune.model.convex import LinearHead, linear_head, solve_head
from finetune.plan.settings import choose_settings
from tests.tiny import llama_folder
from tests.train.runs import cool_and_plain

STILL: dict[str, Any] = {"plan": finetune.Plan(finetune.Stage(-1, steps=1)), "lr": 1e-12}
ASKED: dict[str, Any] = {"solve_head": True, "ema": False, "calibrate": False, "precision": "fp32"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_folder(tmp_path_factory.mktemp("llama") / "m")


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_decoder_answers_at_the_last_token_of_each_row(llama: Path, review_splits: Splits, side: str) -> None:
    loaded = finetune.load_backbone(llama, review_splits.task)
    texts = ["good", "the film was very very dull"]
    batch = loaded.processor(texts, padding=True, return_tensors="pt", padding_side=side)
    assert linear_head(loaded, finetune.layer_groups(loaded), dict(batch)) == LinearHead("score", "", of_tokens=True)


def test_its_head_is_the_optimum_on_these_features(llama: Path, review_splits: Splits, tmp_path: Path) -> None:
    run = finetune.fit(review_splits, llama, out=tmp_path / "run", settings=ASKED, **STILL)
    assert run.record["seconds"]["head"] > 0 and run.history[0]["stage"] == "head"
    model = AutoModelForSequenceClassification.from_pretrained(run.folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "model")
    assert model.score.bias is None
    with torch.no_grad():  # one row at a time, without any padding
        features = [
            model.model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False))[0][0, -1].numpy()
            for text in review_splits.train["text"]
        ]
    solved = solve_head(np.stack(features), np.array(review_splits.train["target"]), review_splits.task, bias=False)
    np.testing.assert_allclose(model.score.weight.detach().numpy(), solved.weight_CF, rtol=0.02, atol=2e-3)


def test_its_temperature_is_folded_into_its_head(llama: Path, review_splits: Splits, tmp_path: Path) -> None:
    cool, _ = cool_and_plain(review_splits, llama, tmp_path, "score")
    reason = "40 rows: of so few, the optimum on one token's features is no better a start"
    assert cool.record["settings"]["solve_head"] == {"value": False, "by": "rule", "reason": reason}


@pytest.mark.parametrize(
    ("rows", "given", "name"), [(699, {}, None), (700, {}, "score"), (40, {"solve_head": True}, "score")]
)
def test_it_is_solved_where_rows_are_many_or_the_user_asks(rows: int, given: dict[str, Any], name: str | None) -> None:
    decoder, encoder = LinearHead("score", "", of_tokens=True), LinearHead("classifier", "")
    chosen = choose_settings("text", rows, given=given)
    assert preparing._solvable(decoder, chosen, None, None, rows)[0] == name
    assert preparing._solvable(encoder, chosen, None, None, rows) == ("classifier", "")


def test_classes_cannot_be_weighed_alike_without_a_bias(llama: Path, review_splits: Splits, tmp_path: Path) -> None:
    with pytest.raises(finetune.PlanError, match="balance=True: is folded into the bias"):
        finetune.fit(review_splits, llama, out=tmp_path / "run", epochs=1, settings={"balance": True})

"""The solved head equals scikit-learn's at the same strength, and stays sane where data is thin or odd."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from scipy.special import expit, softmax
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from finetune.data.task import Task
from finetune.errors import BackboneError
from finetune.model import convex
from finetune.model.backbones import load_backbone
from finetune.model.convex import (
    SolvedHead,
    capture_calls,
    features_of,
    linear_head,
    positions,
    set_head,
    solve_head,
)
from finetune.model.groups import layer_groups
from finetune.model.outputs import scale_outputs
from finetune.model.pretrained import Preprocessing, Pretrained
from tests.tiny import timm_folder, tokenizer


def task(outputs: int, kind: str = "single_label_classification") -> Task:
    return Task(kind, "image", tuple(f"label {i}" for i in range(outputs)))


def blobs(n: int, f: int, c: int, *, apart: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Classes with means `apart`, features of unequal scale and offset, correlated."""
    rng = np.random.default_rng(seed)
    y_N = np.concatenate([np.arange(c), rng.integers(0, c, n - c)])
    noise_NF = rng.normal(size=(n, f)) @ (rng.normal(size=(f, f)) / np.sqrt(f) + np.eye(f))
    x_NF = noise_NF + apart * rng.normal(size=(c, f))[y_N]
    return (x_NF * rng.uniform(0.5, 5, f) + rng.normal(size=f)).astype(np.float32), y_N


def logits(solved: SolvedHead, x_NF: np.ndarray) -> np.ndarray:
    return x_NF @ solved.weight_CF.T + solved.bias_C


def standardised(x_NF: np.ndarray) -> np.ndarray:
    x_NF = x_NF.astype(np.float64)
    return (x_NF - x_NF.mean(0)) / x_NF.std(0)


# ---- The plain twins


@pytest.mark.parametrize(("n", "f", "c"), [(200, 12, 2), (300, 20, 5), (60, 150, 3)], ids=["two", "five", "wide"])
def test_softmax_is_that_of_scikit_learn(n: int, f: int, c: int) -> None:
    x_NF, y_N = blobs(n, f, c, apart=0.4)
    solved = solve_head(x_NF, y_N, task(c))
    assert solved.weight_CF.dtype == solved.bias_C.dtype == np.float32
    assert solved.folds == 5 and solved.log_loss == min(solved.tried.values())
    strength = solved.strength / (2 if c == 2 else 1)
    twin = LogisticRegression(C=1 / strength, tol=1e-8, max_iter=10_000).fit(standardised(x_NF), y_N)
    expected_NC = twin.predict_proba(standardised(x_NF))
    np.testing.assert_allclose(softmax(logits(solved, x_NF), axis=1), expected_NC, atol=2e-3)


def test_each_label_is_a_logistic_regression_of_its_own() -> None:
    x_NF, _ = blobs(300, 15, 2)
    rng = np.random.default_rng(1)
    y_NC = (standardised(x_NF) @ rng.normal(size=(15, 4)) + 4 * rng.normal(size=(300, 4)) > 2).astype(np.float32)
    solved = solve_head(x_NF, y_NC, task(4, "multi_label_classification"))
    for label in range(4):
        twin = LogisticRegression(C=1 / solved.strength, tol=1e-8, max_iter=10_000)
        expected_N = twin.fit(standardised(x_NF), y_NC[:, label]).predict_proba(standardised(x_NF))[:, 1]
        np.testing.assert_allclose(expit(logits(solved, x_NF))[:, label], expected_N, atol=2e-3)
    assert solved.log_loss < 0.6 and 0.7 < solved.score < 1  # the mean over labels, and the share of them


@pytest.mark.parametrize(("n", "f"), [(120, 10), (40, 90)], ids=["tall", "wide"])
def test_ridge_is_that_of_scikit_learn_and_leaves_out_each_example(n: int, f: int) -> None:
    x_NF, _ = blobs(n, f, 2)
    rng = np.random.default_rng(1)
    y_NK = standardised(standardised(x_NF)[:, :5] @ rng.normal(size=(5, 2)) + rng.normal(size=(n, 2)))
    solved = solve_head(x_NF, y_NK, task(2, "regression"))
    twin = Ridge(alpha=solved.strength).fit(standardised(x_NF), y_NK)
    np.testing.assert_allclose(logits(solved, x_NF), twin.predict(standardised(x_NF)), atol=1e-4)
    z_NF, errors = standardised(x_NF), []
    for i in range(n):
        rest = np.arange(n) != i
        left = Ridge(alpha=solved.strength).fit(z_NF[rest], y_NK[rest])
        errors.append((left.predict(z_NF[i : i + 1])[0] - y_NK[i]) ** 2)
    assert solved.log_loss == pytest.approx(np.mean(errors), rel=1e-6) == -solved.score
    assert solved.folds == n and len(solved.tried) == len(convex.STRENGTHS)


def test_without_a_bias_nothing_is_taken_off_the_features() -> None:
    x_NF, y_N = blobs(300, 20, 3)
    solved = solve_head(x_NF, y_N, task(3), bias=False)
    assert not solved.bias_C.any()
    z_NF = x_NF / np.sqrt((x_NF.astype(np.float64) ** 2).mean(0))
    twin = LogisticRegression(C=1 / solved.strength, fit_intercept=False, tol=1e-8, max_iter=10_000).fit(z_NF, y_N)
    np.testing.assert_allclose(softmax(logits(solved, x_NF), axis=1), twin.predict_proba(z_NF), atol=2e-3)


# ---- The strength


def test_the_strength_is_the_one_that_generalises() -> None:
    x_NF, y_N = blobs(2200, 60, 3, apart=0.25)
    train, test = slice(0, 200), slice(200, None)
    solved = solve_head(x_NF[train], y_N[train], task(3))
    z_NF = (x_NF - x_NF[train].mean(0)) / x_NF[train].std(0)
    losses = {}
    for strength in (60 * s for s in convex.STRENGTHS):
        twin = LogisticRegression(C=1 / strength, max_iter=5000).fit(z_NF[train], y_N[train])
        losses[strength] = -twin.predict_log_proba(z_NF[test])[np.arange(2000), y_N[test]].mean()
    at_hand = losses[min(losses, key=lambda s: abs(np.log(s / solved.strength)))]
    assert at_hand < 1.02 * min(losses.values()) < max(losses.values()) / 1.5
    assert solved.log_loss == pytest.approx(at_hand, rel=0.15)
    assert solved.score == pytest.approx((logits(solved, x_NF[test]).argmax(1) == y_N[test]).mean(), abs=0.08)
    assert len(solved.tried) < len(convex.STRENGTHS)  # it stops behind the minimum


def test_noise_gets_the_strongest() -> None:
    rng = np.random.default_rng(0)
    x_NF, y_N = rng.normal(size=(100, 50)).astype(np.float32), rng.integers(0, 2, 100)
    assert solve_head(x_NF, y_N, task(2)).strength > 50
    assert solve_head(x_NF, rng.normal(size=(100, 1)), task(1, "regression")).strength > 50


def test_a_large_problem_is_held_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x_NF, y_N = blobs(300, 20, 3, apart=0.4)
    five = solve_head(x_NF, y_N, task(3))
    monkeypatch.setattr(convex, "LARGE", 1000)
    one = solve_head(x_NF, y_N, task(3))
    assert (five.folds, one.folds) == (5, 1)
    assert one.score == pytest.approx(five.score, abs=0.1)


def test_a_seed_gives_the_same_head() -> None:
    x_NF, y_N = blobs(150, 20, 3, apart=0.3)
    first, same, other = (solve_head(x_NF, y_N, task(3), seed=seed) for seed in (0, 0, 1))
    assert first.tried == same.tried != other.tried
    assert np.array_equal(first.weight_CF, same.weight_CF) and np.array_equal(first.bias_C, same.bias_C)


# ---- Thin and odd data


def test_separable_data_gives_finite_weights() -> None:
    x_NF, y_N = blobs(60, 100, 3, apart=10.0)
    solved = solve_head(x_NF, y_N, task(3))
    assert np.isfinite(solved.weight_CF).all() and np.abs(logits(solved, x_NF)).max() < 100
    assert solved.score == 1 and solved.log_loss < 0.01


def test_a_class_without_examples_is_never_chosen_and_costs_little() -> None:
    x_NF, y_N = blobs(100, 10, 3, apart=0.5)
    with_gap = solve_head(x_NF, y_N + (y_N > 0), task(4))  # nothing of class 1
    without = solve_head(x_NF, y_N, task(3))
    assert not with_gap.weight_CF[1].any()
    far_NF = np.concatenate([x_NF, 100 * x_NF, -100 * x_NF])
    assert 1 not in logits(with_gap, far_NF).argmax(1)
    p_NC = softmax(logits(with_gap, x_NF), axis=1)
    assert 0 < p_NC[:, 1].min() and p_NC[:, 1].max() < 1 / 100
    np.testing.assert_allclose(p_NC[:, [0, 2, 3]], softmax(logits(without, x_NF), axis=1), atol=0.01)
    only = solve_head(x_NF, np.full(100, 2), task(3))
    assert (logits(only, far_NF).argmax(1) == 2).all() and not only.weight_CF.any()


def test_a_label_that_never_changes_keeps_its_value() -> None:
    x_NF, y_N = blobs(100, 10, 2)
    y_NC = np.stack([np.zeros(100), y_N, np.ones(100)], axis=1).astype(np.float32)
    solved = solve_head(x_NF, y_NC, task(3, "multi_label_classification"))
    p_NC = expit(logits(solved, 100 * x_NF))
    assert p_NC[:, 0].max() < 1 / 100 and p_NC[:, 2].min() > 1 - 1 / 100
    assert solved.score > 0.9


def test_one_example_a_class() -> None:
    x_NF, y_N = blobs(4, 30, 4, apart=2.0)
    solved = solve_head(x_NF, y_N, task(4))
    assert (logits(solved, x_NF).argmax(1) == y_N).all()
    assert solved.folds == 0 and solved.tried == {} and np.isnan([solved.score, solved.log_loss]).all()


def test_one_example() -> None:
    x_NF, _ = blobs(2, 30, 2)
    for kind in ("single_label_classification", "multi_label_classification", "regression"):
        target = np.array([1]) if kind.startswith("single") else np.zeros((1, 2))
        solved = solve_head(x_NF[:1], target, task(2, kind))
        assert not solved.weight_CF.any() and np.isfinite(solved.bias_C).all()


def test_the_parts_hold_each_class_alike() -> None:
    classes_N = np.repeat([0, 1, 2], [50, 10, 3])
    part_N = convex._parts(classes_N, True, np.random.default_rng(0))
    assert [np.bincount(part_N[classes_N == label], minlength=5).tolist() for label in (0, 1)] == [[10] * 5, [2] * 5]
    assert len(set(part_N[classes_N == 2])) == 3  # so that no fit is without this class


def test_a_class_with_one_example_is_always_trained_on() -> None:
    x_NF, y_N = blobs(50, 10, 2, apart=3.0)
    y_N[0] = 2
    x_NF[0] = 30
    solved = solve_head(x_NF, y_N, task(3))
    assert logits(solved, x_NF[:1]).argmax() == 2
    assert solved.log_loss < 0.2  # were it held out, the loss on it alone would be 5 / 50


def test_constant_features_get_no_weight() -> None:
    x_NF, y_N = blobs(100, 10, 3)
    constant_N2 = np.stack([np.zeros(100), np.float32(12345.678) + np.float32(1e-3) * (y_N == 0)], axis=1)
    solved = solve_head(np.concatenate([x_NF, constant_N2.astype(np.float32)], axis=1), y_N, task(3))
    assert not solved.weight_CF[:, 10:].any()
    plain = solve_head(x_NF, y_N, task(3))
    strength = min(plain.tried, key=lambda s: abs(np.log(s / solved.strength)))
    assert strength == plain.strength
    nothing = solve_head(np.full((100, 3), 7.0, np.float32), y_N, task(3))
    np.testing.assert_allclose(softmax(nothing.bias_C), np.bincount(y_N) / 100, atol=1e-3)


@pytest.mark.parametrize("kind", ["single_label_classification", "regression"])
@pytest.mark.parametrize("scale", [1e4, 1e-4, "mixed"])
def test_scale_and_offset_of_features_do_not_matter(kind: str, scale: float | str) -> None:
    x_NF, y_N = blobs(100, 10, 3)
    y = standardised(y_N[:, None].astype(np.float32)) if kind == "regression" else y_N
    c = 1 if kind == "regression" else 3
    scale_F = np.where(np.arange(10) < 3, 1e4, 1) if scale == "mixed" else np.full(10, scale)
    moved_NF = ((x_NF + np.where(np.arange(10) % 3, 0, 300)) * scale_F).astype(np.float32)
    plain, moved = solve_head(x_NF, y, task(c, kind)), solve_head(moved_NF, y, task(c, kind))
    assert moved.strength == plain.strength
    np.testing.assert_allclose(logits(moved, moved_NF), logits(plain, x_NF), atol=0.02)


def test_features_that_hardly_move_get_no_huge_weights() -> None:
    """Training moves them, and the huge weights with them would throw the outputs anywhere."""
    x_NF, y_N = blobs(100, 10, 2, apart=0.3)
    faint_N = 1e-9 * (y_N + np.random.default_rng(0).normal(size=100))
    solved = solve_head(np.column_stack([x_NF, faint_N]).astype(np.float32), y_N, task(2))
    assert np.abs(solved.weight_CF[:, 10]).max() < np.abs(solved.weight_CF[:, :10]).max()


def test_features_that_are_not_finite_are_refused() -> None:
    x_NF, y_N = blobs(20, 5, 2)
    x_NF[7, 2] = np.nan
    with pytest.raises(BackboneError, match=r"^features: not finite in 1 of 20 rows, the first of them row 8; look at"):
        solve_head(x_NF, y_N, task(2))


def test_tokens_are_drawn_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    x_MF, y_M = blobs(600, 10, 3, apart=0.5)
    tokens = Task("token_classification", "text", ("O", "B-x", "I-x"))
    all_of_them = solve_head(x_MF, y_M, tokens)
    same = solve_head(x_MF, y_M, task(3))
    assert np.array_equal(all_of_them.weight_CF, same.weight_CF)
    monkeypatch.setattr(convex, "TOKENS", 400)
    first, again, other = (solve_head(x_MF, y_M, tokens, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.weight_CF, again.weight_CF)
    assert not np.allclose(first.weight_CF, other.weight_CF, atol=1e-3)
    assert not np.allclose(first.weight_CF, all_of_them.weight_CF, atol=1e-3)


# ---- The layer


def test_the_layer_answers_what_was_solved() -> None:
    x_NF, y_N = blobs(100, 10, 3)
    solved = solve_head(x_NF, y_N, task(3))
    layer = nn.Linear(10, 3)
    weight = layer.weight
    set_head(layer, solved)
    assert layer.weight is weight and weight.requires_grad and weight.is_leaf
    np.testing.assert_allclose(layer(torch.from_numpy(x_NF)).detach().numpy(), logits(solved, x_NF), atol=1e-4)
    half = nn.Linear(10, 3, bias=False, dtype=torch.bfloat16)
    set_head(half, solved)
    assert half.weight.dtype == torch.bfloat16
    torch.testing.assert_close(half.weight.float(), layer.weight, rtol=0.01, atol=1e-6)


def test_what_enters_a_layer_is_kept_alone() -> None:
    layer, other = nn.Linear(6, 2).double(), nn.Linear(6, 2).double()
    tokens_BTF = torch.randn(3, 50, 6, dtype=torch.float64, requires_grad=True)
    with capture_calls(layer) as calls:
        layer(tokens_BTF[:, 0])
        other(tokens_BTF[:, 1])
        answer = layer(tokens_BTF[:, 2])
    layer(tokens_BTF[:, 3])
    assert len(calls) == 2
    features = features_of(calls[1], answer)
    torch.testing.assert_close(features, tokens_BTF[:, 2].float().detach())
    assert features.dtype == torch.float32 and not features.requires_grad
    single = tokens_BTF.detach().float()
    layer.float()
    with capture_calls(layer) as calls:
        answer = layer(single[:, 0])
    assert features_of(calls[0], answer).untyped_storage().nbytes() == 3 * 6 * 4  # not the whole of the tokens


def test_of_answers_for_every_token_those_of_the_output_count() -> None:
    layer, tokens_BTF = nn.Linear(6, 3, bias=False), torch.randn(4, 9, 6)
    last_B = torch.tensor([8, 2, 0, 5])
    with capture_calls(layer) as calls:
        answers_BTC = layer(tokens_BTF)
    rows_B = torch.arange(4)
    output_BC = answers_BTC[rows_B, last_B]
    assert positions(answers_BTC, output_BC).tolist() == last_B.tolist()
    torch.testing.assert_close(features_of(calls[0], output_BC), tokens_BTF[rows_B, last_B])
    assert positions(answers_BTC, output_BC.bfloat16()).tolist() == last_B.tolist(), "as mixed precision hands it out"
    assert positions(answers_BTC, answers_BTC.mean(dim=1)) is None
    assert positions(answers_BTC, answers_BTC) is None and positions(output_BC, output_BC) is None
    torch.testing.assert_close(features_of(calls[0], answers_BTC), tokens_BTF)
    with pytest.raises(BackboneError, match="solve_head"):
        features_of(calls[0], answers_BTC.mean(dim=1))


IMAGES = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
TEXTS: dict[str, Any] = {"input_ids": torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(0))}
TEXTS["attention_mask"] = torch.ones_like(TEXTS["input_ids"])


def named(pretrained: Pretrained, inputs: dict[str, Tensor]) -> tuple[str | None, str]:
    return linear_head(pretrained, layer_groups(pretrained), inputs)[:2]


def test_timm(resnet: Path, tmp_path: Path) -> None:
    loaded = load_backbone(resnet, task(3))
    loaded.model.train()
    loaded.model.layer1.eval()
    assert named(loaded, IMAGES) == ("fc", "")
    assert loaded.model.training and not loaded.model.layer1.training  # as it was
    assert not any(module._forward_hooks for module in loaded.model.modules())
    own = load_backbone(timm_folder(tmp_path / "own", "test_resnet", labels=["a", "b"], num_classes=2))
    assert named(own, IMAGES) == (None, "the head is the checkpoint's own, not a new one")


def test_a_convolution_is_no_linear_layer() -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    model.fc = nn.Sequential(nn.Unflatten(1, (-1, 1, 1)), nn.Conv2d(model.num_features, 3, 1), nn.Flatten())
    new = frozenset({"fc.1.weight", "fc.1.bias"})
    loaded = Pretrained(model, Preprocessing((32, 32)), "timm", "m", new, "image")
    assert named(loaded, IMAGES) == (None, "the head is not one linear layer")


def test_bert_has_one_behind_its_pooler(bert: Path) -> None:
    loaded = load_backbone(bert, Task("single_label_classification", "text", ("a", "b", "c")))
    assert named(loaded, TEXTS) == ("classifier", "")
    tags = load_backbone(bert, Task("token_classification", "text", ("O", "B-x", "I-x")))
    assert named(tags, TEXTS) == ("classifier", "")


def test_two_layers_are_refused(tmp_path: Path) -> None:
    config = RobertaConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, num_labels=3
    )
    model = RobertaForSequenceClassification(config)
    new = frozenset(name for name, _ in model.named_parameters() if name.startswith("classifier"))
    loaded = Pretrained(model, tokenizer(), "transformers", "m", new, "text")
    assert named(loaded, TEXTS) == (None, "the head is not one linear layer")


class Body(nn.Module):
    """Features [B, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 8, stride=8), nn.ReLU(), nn.Conv2d(6, 6, 4), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Bounded(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.out = nn.Linear(features, 3)

    def forward(self, x_BF: Tensor) -> Tensor:
        return self.out(x_BF).sigmoid()


class Named(Bounded):
    def forward(self, x_BF: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"species": self.out(x_BF)}


class Twice(Bounded):
    def forward(self, x_BF: Tensor) -> Tensor:
        return self.out(-x_BF) + self.out(x_BF)


class Doubling(nn.Linear):
    def forward(self, x_BF: Tensor) -> Tensor:
        return 2 * super().forward(x_BF)


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (Bounded, "the model's output is not that of the head's linear layer, but computed from it"),
        (Named, "the model's output is not one tensor"),
        (Twice, "the head's linear layer runs 2 times in a forward pass"),
        (lambda width: Doubling(width, 3), "the head is not one linear layer"),
        (
            lambda width: nn.Sequential(nn.Linear(width, 5), nn.ReLU(), nn.Linear(5, 3)),
            "the head is not one linear layer",
        ),
    ],
    ids=["bounded", "named", "twice", "subclass", "deep"],
)
def test_custom_heads_that_are_more_than_a_layer(head: Any, reason: str) -> None:
    loaded = load_backbone(Body(), head=head, processor=Preprocessing((32, 32)))
    assert named(loaded, IMAGES) == (None, reason)


def test_custom_heads_that_are_one_layer() -> None:
    pre = Preprocessing((32, 32))
    loaded = load_backbone(Body(), task(2), processor=pre)  # gets the default head
    assert named(loaded, IMAGES) == ("head", "")
    inside = load_backbone(Body(), head=lambda width: nn.Sequential(nn.Linear(width, 3, bias=False)), processor=pre)
    assert named(inside, IMAGES) == ("head.0", "")


def test_a_regression_is_solved_in_units_of_its_deviation() -> None:
    """As `outputs.scale_outputs` has it while a model trains: its hook is part of the layer."""
    loaded = load_backbone(Body(), task(1, "regression"), processor=Preprocessing((32, 32)))
    fold = scale_outputs(loaded, torch.tensor([250.0]), torch.tensor([40.0]))
    assert fold is not None
    name, _ = named(loaded, IMAGES)
    assert name == "head"
    layer = loaded.model.get_submodule(name)
    images = {"pixel_values": torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
    with torch.no_grad(), capture_calls(layer) as calls:
        output = loaded.forward(images)
    features_NF = features_of(calls[0], output).numpy()
    y_NK = standardised(features_NF @ np.arange(1.0, 7.0)[:, None])
    set_head(layer, solve_head(features_NF, y_NK, task(1, "regression")))
    fold()
    with torch.no_grad():
        np.testing.assert_allclose(loaded.forward(images).numpy(), 250 + 40 * y_NK, atol=2)

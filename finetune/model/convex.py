"""Features and targets go in; the linear head that fits them best comes out: solved to its optimum, not trained.

A linear layer on fixed features is a convex problem: it has one minimum for each strength of the penalty, and
cross-validation says which strength. That needs no learning rate, no schedule, and seconds.

Shapes: N examples (or tokens), F features, R directions, C classes or regression targets.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
import torch
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor, nn

from finetune.data.task import Task, per_example_score
from finetune.errors import BackboneError
from finetune.model.groups import LayerGroups
from finetune.model.heads import TokenLinear
from finetune.model.pretrained import Pretrained
from finetune.model.sharding import spread

PLAIN = ("torch.nn.modules.linear.Linear", "timm.layers.linear.Linear")  # by name: timm costs seconds to import
STRENGTHS = tuple(np.geomspace(30, 3e-4, 11).tolist())  # times F, strongest first; chosen on real data: 0.01 to 0.7
FLOOR = 0.1  # times the median deviation: MiniLM has features that move by 1e-9, whose weights would be 1e8
FOLDS = 5
TOKENS = 20_000  # more labelled tokens than that are drawn from
LARGE = 5e7  # N·R·C above which one fold is held out instead of each in turn
LOOSE, TIGHT = (1e-5, 1e-4, 100), (1e-10, 1e-6, 500)  # of L-BFGS: change of the loss, gradient, iterations

Loss = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]  # logits, targets -> loss [N], mean [N, C]


class LinearHead(NamedTuple):
    """The linear layer that is the whole head: its name, or None and why there is no such layer; and whether it answers
    each token of a row, of which the model takes one (a decoder)."""

    name: str | None
    why_not: str
    of_tokens: bool = False


def linear_head(pretrained: Pretrained, groups: LayerGroups, inputs: dict[str, Tensor]) -> LinearHead:
    """Find the linear layer that is the whole head.

    The head is one layer where its group holds the weight (and bias) of one `nn.Linear` and nothing else, all of it is
    new, and what the model answers in evaluation mode is what that layer answers, in one call: all of it, or, of one
    answer for each token, the one at some position of each row (a decoder's last token).

    Args:
        pretrained: The model; its training flags are left as they were.
        groups: Its layer groups.
        inputs: One small real batch.
    """
    model, head = pretrained.model, set(groups.head.parameters)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [
        (name, module)
        for name, module in model.named_modules()
        if _is_plain(module) and {names[id(parameter)] for parameter in module.parameters()} == head
    ]
    if len(found) != 1:
        return LinearHead(None, "the head is not one linear layer")
    if not head <= pretrained.new_parameters:
        return LinearHead(None, "the head is the checkpoint's own, not a new one")
    [(name, layer)] = found
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), capture_calls(layer) as calls:
            output = pretrained.forward({key: tensor.to(layer.weight.device) for key, tensor in inputs.items()})
    finally:
        for module, flag in training:
            module.training = flag
    if not isinstance(output, Tensor):
        return LinearHead(None, "the model's output is not one tensor")
    if len(calls) != 1:
        return LinearHead(None, f"the head's linear layer runs {len(calls)} times in a forward pass")
    [(_, answer)] = calls
    of_tokens = positions(answer, output) is not None
    if not of_tokens and not torch.equal(answer, output):
        return LinearHead(None, "the model's output is not that of the head's linear layer, but computed from it")
    return LinearHead(name, "", of_tokens)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is `nn.Linear`, and no subclass that may compute something else."""
    kind = type(module)
    return kind is TokenLinear or f"{kind.__module__}.{kind.__qualname__}" in PLAIN


@contextmanager
def capture_calls(layer: nn.Linear) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect what enters `layer`, [..., F], and what it answers, [..., C], at each call, without gradients."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_layer: nn.Module, args: tuple[Any, ...], answer: Tensor) -> None:
        seen.append((args[0].detach(), answer.detach()))

    hook = layer.register_forward_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()


def positions(answers: Tensor, output: Tensor) -> Tensor | None:
    """Position [B] in each row of answers [B, T, C] at which the model took its output [B, C]; None where it did
    not."""
    if answers.ndim != 3 or output.shape != answers[:, 0].shape:
        return None
    same_BT = (answers.to(output.dtype) == output[:, None]).all(dim=-1)
    return same_BT.int().argmax(dim=1) if bool(same_BT.any(dim=1).all()) else None


def features_of(call: tuple[Tensor, Tensor], output: Tensor) -> Tensor:
    """What entered the head for the output that the model gave, of a call of `capture_calls`: float32, on the CPU.

    Args:
        call: Features [B, ..., F] and answers [B, ..., C] of the head.
        output: [B, C], or [B, T, C] for tokens.

    Raises:
        BackboneError: It is not one of the answers.
    """
    features, answers = call
    if answers.shape != output.shape:
        where_B = positions(answers, output)
        if where_B is None:
            raise BackboneError(
                "the model's output is not an answer of its head for every row, so the head cannot be solved for; "
                'give settings={"solve_head": False}'
            )
        features = features[torch.arange(len(where_B), device=features.device), where_B]
    # A copy: the first token of [B, T, F] is a view, which would keep all tokens alive.
    return features.to("cpu", torch.float32, copy=True)


@dataclass(frozen=True)
class SolvedHead:
    """A linear head at its optimum: outputs = features @ weight.T + bias, in the order of the task's labels.

    Attributes:
        weight_CF: float32.
        bias_C: float32; zeros where it was solved without one.
        strength: Of the penalty: half of it times the sum of the squared weights on standardised features is added to
            the loss summed over the examples. It is scikit-learn's 1 / C (2 / C for two classes of a single label,
            which have two rows here), and `Ridge`'s alpha.
        score: Mean of `per_example_score` over held-out examples (tokens: whether each is right); NaN where no example
            could be held out.
        log_loss: Mean loss of held-out examples; for regression their squared error. NaN likewise.
        folds: How many parts were held out in turn: N for regression, 1 for large problems, 0 where none could be.
        seconds: Time that it took.
        tried: Strength -> mean loss of held-out examples, strongest first.
    """

    weight_CF: np.ndarray
    bias_C: np.ndarray
    strength: float
    score: float
    log_loss: float
    folds: int
    seconds: float
    tried: dict[float, float]


def set_head(layer: nn.Linear, solved: SolvedHead) -> None:
    """Copy a solved head into a layer, in place, whatever its device and precision, spread over processes or not."""
    with torch.no_grad():
        for parameter, found in ((layer.weight, solved.weight_CF), (layer.bias, solved.bias_C)):
            if parameter is not None:
                parameter.copy_(spread(torch.from_numpy(found).to(parameter.dtype), parameter))


def solve_head(
    features_NF: np.ndarray, targets: np.ndarray, task: Task, *, bias: bool = True, seed: int = 0
) -> SolvedHead:
    """Solve the linear head for these features: logistic regression (softmax, or one for each label), or ridge.

    The strength is the one with the smallest loss on held-out examples, from strong to weak until the loss has grown
    twice. A class (or a value of a label) without an example gets no weights, and less probability than one in N + 1.

    Args:
        features_NF: What enters the layer. Of tokens only the labelled ones; 20,000 of them are drawn.
        targets: Classes, int [N]; labels, 0 or 1 [N, C]; or standardised regression targets [N, C].
        task: Its kind and labels.
        bias: Whether the layer has one.
        seed: For the draw of tokens and of the folds.

    Raises:
        BackboneError: A feature is not finite.
    """
    start = time.perf_counter()
    x_NF, y = np.asarray(features_NF), np.asarray(targets)
    rng = np.random.default_rng(seed)
    if task.kind == "token_classification":
        task = replace(task, kind="single_label_classification")
        if len(x_NF) > TOKENS:
            drawn = np.sort(rng.permutation(len(x_NF))[:TOKENS])
            x_NF, y = x_NF[drawn], y[drawn]
    if (wrong := ~np.isfinite(x_NF).all(axis=1)).any():
        raise BackboneError(
            f"features: not finite in {wrong.sum()} of {len(wrong)} rows, the first of them row {wrong.argmax() + 1}; "
            "look at this example, or give another backbone"
        )
    regression = task.kind == "regression"
    basis = _basis(x_NF, bias, np.dtype(np.float64 if regression else np.float32))
    found = _ridge(basis, y, task) if regression else _logistic(basis, y, task, rng)
    weight_CF = (basis.axes_FR @ found.solution_RC[: basis.axes_FR.shape[1]]).T.astype(np.float32)
    # With the weights as they are after rounding: a large mean would show the difference.
    bias_C = found.solution_RC[-1] - weight_CF @ basis.mean_F if bias else np.zeros(task.outputs)
    log_loss, seconds = found.tried.get(found.strength, np.nan), time.perf_counter() - start
    return SolvedHead(
        weight_CF, bias_C.astype(np.float32), found.strength, found.score, log_loss, found.folds, seconds, found.tried
    )


@dataclass(frozen=True)
class _Basis:
    """Standardised features in their principal directions, which leaves the penalty as it is.

    Attributes:
        rows_NR: (features - mean) @ axes; with a bias, a last column of ones.
        variance_R: Mean square of each column.
        penalised_R: 1 for directions, 0 for the ones.
        axes_FR: Directions, divided by the deviation of each feature (the ones have no axis).
        mean_F: Mean of each feature; 0 without a bias, for nothing could make up for it then.
    """

    rows_NR: np.ndarray
    variance_R: np.ndarray
    penalised_R: np.ndarray
    axes_FR: np.ndarray
    mean_F: np.ndarray

    @property
    def strengths(self) -> list[float]:
        return [len(self.mean_F) * strength for strength in STRENGTHS]


def _basis(x_NF: np.ndarray, bias: bool, dtype: np.dtype) -> _Basis:
    """Standardise (by a tenth of the median deviation at least) and rotate; N < F costs what N features cost."""
    n, f = x_NF.shape
    mean_F = (x_NF.mean(axis=0, dtype=np.float64) if bias else np.zeros(f)).astype(dtype)
    z_NF = x_NF.astype(dtype) - mean_F
    deviation_F = np.sqrt((z_NF * z_NF).mean(axis=0, dtype=np.float64))
    alive_F = deviation_F > 1e-6 * np.abs(mean_F)  # below, it is rounding
    least = FLOOR * np.median(deviation_F[alive_F]) if alive_F.any() else 1.0
    inverse_F = np.where(alive_F, 1 / np.maximum(deviation_F, least), 0).astype(dtype)
    z_NF *= inverse_F
    gram = z_NF @ z_NF.T if n < f else z_NF.T @ z_NF
    squares_R, vectors = scipy.linalg.eigh(gram, driver="evd", overwrite_a=True, check_finite=False)
    kept = squares_R > squares_R[-1] * 10 * np.finfo(dtype).eps
    squares_R, vectors = squares_R[kept], vectors[:, kept]
    axes_FR = z_NF.T @ (vectors / np.sqrt(squares_R)) if n < f else vectors
    rows_NR, ones = z_NF @ axes_FR, int(bias)
    return _Basis(
        np.concatenate([rows_NR, np.ones((n, ones), dtype)], axis=1),
        np.concatenate([squares_R / n, np.ones(ones)]),
        np.concatenate([np.ones(len(squares_R)), np.zeros(ones)]),
        axes_FR * inverse_F[:, None],
        mean_F.astype(np.float64),
    )


@dataclass(frozen=True)
class _Found:
    """The solution in the basis, and what `SolvedHead` says of the search."""

    solution_RC: np.ndarray
    strength: float
    score: float
    folds: int
    tried: dict[float, float]


def _ridge(basis: _Basis, targets_NC: np.ndarray, task: Task) -> _Found:
    """Least squares in closed form: each example is left out in turn, at the cost of one fit for all."""
    n, rows_NR = len(basis.rows_NR), basis.rows_NR
    y_NC = targets_NC.reshape(n, -1).astype(np.float64)
    found: list[_Found] = []
    tried: dict[float, float] = {}
    for strength in basis.strengths:
        shrunk_NR = rows_NR / (n * basis.variance_R + strength * basis.penalised_R)
        solution_RC = shrunk_NR.T @ y_NC
        own_N = np.minimum((shrunk_NR * rows_NR).sum(axis=1), 1 - 1e-9)  # part of an example in its own prediction
        left_out_NC = y_NC - (y_NC - rows_NR @ solution_RC) / (1 - own_N)[:, None]
        score = float(per_example_score(task, left_out_NC, y_NC).mean())
        tried[strength] = -score
        found.append(_Found(solution_RC, strength, score, n, tried))
    return max(found, key=lambda one: one.score)


def _logistic(basis: _Basis, targets: np.ndarray, task: Task, rng: np.random.Generator) -> _Found:
    """Cross-validate along the strengths, each fit starting from the one before; then fit all at the best."""
    single = task.kind == "single_label_classification"
    y_NC = np.eye(task.outputs, dtype=np.float32)[targets] if single else targets.astype(np.float32)
    n, (r, c) = len(y_NC), (len(basis.variance_R), task.outputs)
    loss = _softmax_loss if single else _sigmoid_loss
    part_N = _parts(targets if single else np.unique(y_NC, axis=0, return_inverse=True)[1].ravel(), single, rng)
    folds = [part_N == part for part in range(part_N.max() + 1)] if n > 1 else []
    folds = folds[:1] if n * r * c > LARGE else folds
    solutions = [np.zeros((r, c)) for _ in folds]
    best = _Found(np.zeros((r, c)), basis.strengths[len(STRENGTHS) // 2], np.nan, len(folds), {})
    tried: dict[float, float] = {}
    for strength in basis.strengths if folds else []:
        lost, scored = [], []
        for i, out_N in enumerate(folds):
            solutions[i] = _fit(basis, ~out_N, y_NC, loss, strength, solutions[i], LOOSE)
            logits = basis.rows_NR[out_N] @ solutions[i].astype(np.float32)
            scored.append(per_example_score(task, logits, targets[out_N]))
            lost.append(loss(logits, y_NC[out_N])[0])
        tried[strength] = float(np.concatenate(lost).mean(dtype=np.float64)) / (1 if single else c)
        if tried[strength] <= min(tried.values()):
            score = float(np.concatenate(scored).mean())
            best = _Found(np.mean(solutions, axis=0), strength, score, len(folds), tried)
        elif best.strength not in list(tried)[-2:]:
            break
    exact, all_N = replace(basis, rows_NR=basis.rows_NR.astype(np.float64)), np.ones(n, dtype=bool)
    return replace(best, solution_RC=_fit(exact, all_N, y_NC, loss, best.strength, best.solution_RC, TIGHT))


def _parts(kinds_N: np.ndarray, keep_single: bool, rng: np.random.Generator) -> np.ndarray:
    """Part of each example, 0 to 4, dealt out kind by kind; -1, never held out, where `keep_single` and it is alone."""
    order = rng.permutation(len(kinds_N))
    order = order[np.argsort(kinds_N[order], kind="stable")]
    if keep_single:  # a fit without its class says nothing about the strength
        order = order[np.bincount(kinds_N)[kinds_N[order]] > 1]
    part_N = np.full(len(kinds_N), -1)
    part_N[order] = np.arange(len(order)) % FOLDS
    return part_N


def _softmax_loss(logits_NC: np.ndarray, onehot_NC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    z_NC = logits_NC - logits_NC.max(axis=1, keepdims=True)
    right_N = np.einsum("nc,nc->n", z_NC, onehot_NC)
    np.exp(z_NC, out=z_NC)
    total_N1 = z_NC.sum(axis=1, keepdims=True)
    return np.log(total_N1[:, 0]) - right_N, z_NC / total_N1


def _sigmoid_loss(logits_NC: np.ndarray, labels_NC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    loss_NC = np.log1p(np.exp(-np.abs(logits_NC))) + np.maximum(logits_NC, 0) - logits_NC * labels_NC
    return loss_NC.sum(axis=1), expit(logits_NC)


def _fit(
    basis: _Basis,
    chosen_N: np.ndarray,
    targets_NC: np.ndarray,
    loss: Loss,
    strength: float,
    start_RC: np.ndarray,
    limits: tuple[float, float, int],
) -> np.ndarray:
    """Minimise the penalised loss of the chosen examples by L-BFGS, in the precision of the basis; [R, C].

    Each direction is measured in units in which the curvature is about 1, which takes far fewer steps: the curvature is
    close to (mean of p(1 - p)) times the sum of squares, plus the strength.
    """
    rows_NR, targets_NC = basis.rows_NR[chosen_N], targets_NC[chosen_N]
    n, c = targets_NC.shape
    seen_C = targets_NC.min(axis=0) != targets_NC.max(axis=0)
    y_NC, start_RC, solution_RC = targets_NC[:, seen_C], start_RC[:, seen_C], np.zeros_like(start_RC)
    if start_RC.size:
        dtype, penalty_R = rows_NR.dtype, strength * basis.penalised_R
        p_NC = loss(rows_NR @ start_RC.astype(dtype), y_NC)[1]
        unit_R = 1 / np.sqrt(max(float((p_NC * (1 - p_NC)).mean()), 1e-4) * n * basis.variance_R + penalty_R)
        rows_NR *= unit_R.astype(dtype)
        penalty_R1 = (penalty_R * unit_R**2)[:, None]

        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            weights_RC = flat.reshape(start_RC.shape)
            loss_N, mean_NC = loss(rows_NR @ weights_RC.astype(dtype), y_NC)
            pull_RC = penalty_R1 * weights_RC
            value = loss_N.sum(dtype=np.float64) + 0.5 * (pull_RC * weights_RC).sum()
            return value / n, ((rows_NR.T @ (mean_NC - y_NC) + pull_RC) / n).ravel()

        options = dict(zip(("ftol", "gtol", "maxiter"), limits, strict=True))
        result = minimize(objective, (start_RC / unit_R[:, None]).ravel(), jac=True, method="L-BFGS-B", options=options)
        solution_RC[:, seen_C] = result.x.reshape(start_RC.shape) * unit_R[:, None]
    if not basis.penalised_R.all():
        # There is a bias. The logits of the other classes sum to 0, so one of them is above: this one is never chosen.
        solution_RC[-1, ~seen_C] = np.where(targets_NC[0, ~seen_C] > 0, 1, -1) * np.log((n + 1) * c)
    return solution_RC

"""Rows of train go in; which of them to validate on comes out: stratified, seeded, repeats kept together."""

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from finetune.data.labels import classes_of
from finetune.data.task import Task

SHARE, SHARE_SMALL, SMALL, MOST = 0.15, 0.20, 200, 2000  # 15 % of the rows; 20 % of fewer than 200; at most 2000
VALID_PARTS = 6  # with groups, one part of so many is for validation


def draw(keys: Sequence[str], targets: list[Any], task: Task, seed: int) -> set[int]:
    """Choose rows for validation; train keeps an example of every class. Empty where none can be spared.

    scikit-learn's stratified splits refuse classes with one example, and fewer rows than classes: small data has both.

    Args:
        keys: Hash of the input of each row; rows with equal keys stay together.
        targets: Target of each row.
        task: The task.
        seed: Same seed, same rows.
    """
    n = len(keys)
    wanted = max(1, min(MOST, round(n * (SHARE_SMALL if n < SMALL else SHARE))))
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        groups[key].append(row)
    names = stratum_of_rows(targets, task, bins=min(10, wanted))
    strata: defaultdict[Any, list[list[int]]] = defaultdict(list)
    for members in groups.values():
        strata[names[members[0]]].append(members)
    # A crowd of copies stays in train, unless all there is are crowds.
    drawn = (
        stratified(strata, wanted / n, wanted, np.random.default_rng(seed), most) for most in (wanted // 10, wanted)
    )
    chosen = set(next(filter(None, drawn), []))
    if task.kind != "regression":
        keep_classes(targets, task, chosen, keys)
    return chosen


def stratum_of_rows(targets: list[Any], task: Task, bins: int) -> list[Any]:
    """Name the stratum of each row: its class; one of `bins` ranges of the first target; the rarest tag that it has."""
    if task.kind == "single_label_classification":
        return targets
    if task.kind == "regression":
        first = np.array([target[0] for target in targets])
        return np.searchsorted(np.quantile(first, np.arange(1, bins) / bins), first).tolist()
    sets = [set(classes_of(target, task)) for target in targets]
    counts = Counter(i for row in sets for i in row)
    return [min(row, key=lambda i: (counts[i], i), default=-1) for row in sets]


def stratified(
    strata: dict[Any, list[list[int]]], share: float, wanted: int, rng: np.random.Generator, most: int
) -> list[int]:
    """Draw groups of at most `most` rows: about `share` of each stratum, `wanted` in all, and never the last group of a
    stratum."""
    quotas = {name: len(groups) * share for name, groups in strata.items()}
    counts = {name: int(quota) for name, quota in quotas.items()}
    spare = min(round(sum(quotas.values())) or 1, wanted) - sum(counts.values())
    by_rest = sorted(quotas, key=lambda name: (counts[name] - quotas[name], rng.random()))
    for name in [name for name in by_rest if counts[name] < len(strata[name]) - 1][: max(0, spare)]:
        counts[name] += 1
    chosen: list[int] = []
    for name, groups in strata.items():
        order = rng.permutation(len(groups))
        small = [groups[i] for i in order if len(groups[i]) <= max(1, most)]
        chosen += [k for members in small[: counts[name]] for k in members]
    return chosen


def keep_classes(targets: list[Any], task: Task, chosen: set[int], keys: Sequence[str]) -> None:
    """Give rows back to train until it has every class that there is."""
    rows = [set(classes_of(target, task)) for target in targets]
    kept = set().union(*(row for k, row in enumerate(rows) if k not in chosen))
    for k in sorted(chosen):
        if k in chosen and not rows[k] <= kept:
            back = {j for j in chosen if keys[j] == keys[k]}
            chosen -= back
            kept |= set().union(*(rows[j] for j in back))


def tied(keys: list[str], groups: list[Any] | None) -> list[int]:
    """A number for each row; rows with the same key or the same group, or tied by others that are, have the same."""
    ties = [np.unique(keys, return_inverse=True)[1]]
    if groups is not None:
        ties.append(np.unique(list(map(str, groups)), return_inverse=True)[1])
    n, nodes, edges = len(keys), len(keys), []
    for tie in ties:
        edges.append((np.arange(n), nodes + tie))
        nodes += int(tie.max()) + 1
    ends = [np.concatenate([edge[side] for edge in edges]) for side in (0, 1)]
    links = coo_array((np.ones(len(ends[0])), (ends[0], ends[1])), shape=(nodes, nodes))
    return connected_components(links, directed=False)[1][:n].tolist()


def divided(strata: list[Any], together: list[int], count: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rest, held out) of each fold, as positions."""
    names = {name: number for number, name in enumerate(dict.fromkeys(strata))}
    numbers = np.array([names[name] for name in strata])
    if np.bincount(numbers).max() < count:  # scikit-learn refuses that: no class is in every fold
        numbers = np.zeros_like(numbers)
    from sklearn.model_selection import StratifiedGroupKFold

    divider = StratifiedGroupKFold(n_splits=count, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")
        yield from divider.split(np.zeros(len(strata)), numbers, together)

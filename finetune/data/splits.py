"""Parts as read go in; `Splits` come out: checked, with targets, a drawn validation split and a report."""

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from typing import Any

import datasets

from finetune.data.checks import (
    DataReport,
    LeftOut,
    Scan,
    find_duplicates,
    find_leaks,
    scan,
    some,
    word_lengths,
)
from finetune.data.draw import VALID_PARTS, divided, draw, stratum_of_rows, tied
from finetune.data.labels import as_list, as_number, classes_of, count_classes, encode_cell, make_task, multi_hot, tags
from finetune.data.shards import is_member, is_remote, read_member
from finetune.data.tables import Part, Roles
from finetune.data.task import Task
from finetune.errors import DataError

MOST_ALONE = 3  # classes with one example that are named


@dataclass(frozen=True)
class Splits:
    """Data that is ready to train on.

    Every Dataset has the columns "id"; "image" ({"path", "bytes"}), "text" (and "text_pair"), or "tokens"; and
    "target": a class index, a list of 0/1 [C], a list of values [K], or a list of class indices, one a token.
    """

    train: datasets.Dataset
    valid: datasets.Dataset
    test: datasets.Dataset | None
    task: Task
    report: DataReport
    source: str  # what the user gave

    @property
    def n(self) -> dict[str, int]:
        """Rows a split."""
        return {name: len(data) for name, data in self.named.items()}

    @property
    def named(self) -> dict[str, datasets.Dataset]:
        """The splits that are there, by name."""
        named = {"train": self.train, "valid": self.valid, "test": self.test}
        return {name: data for name, data in named.items() if data is not None}

    @cached_property
    def fingerprint(self) -> str:
        """Short hash of ids, inputs and targets of all splits: the same for the same data in any process and run."""
        digest = sha256(repr(self.task).encode())
        for name, data in self.named.items():
            digest.update(name.encode())
            for row in data:
                row = dict(row)
                if "image" in row:
                    row["image"] = image_digest(row["image"])
                digest.update(repr(sorted(row.items())).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:16]


def image_digest(cell: dict[str, Any]) -> str:
    """Hash of an image's bytes; of its name, place and size where reading it goes over a network."""
    content = cell["bytes"]
    if is_remote(cell["path"]) and content is None:
        content = cell["path"].encode()
    elif is_member(cell["path"]) and content is None:
        content = read_member(cell["path"])
    elif content is None:
        with open(cell["path"], "rb") as file:
            content = file.read()
    return sha256(content).hexdigest()


@dataclass
class Encoded:
    """Rows of one part that are used, with their targets."""

    part: Part
    scan: Scan
    rows: list[int]
    targets: list[Any]


def build(
    parts: dict[str, Part], roles: Roles, *, task: str | None, seed: int, source: str, group: str | None = None
) -> Splits:
    """Check parts ("train" and maybe "valid", "test") and turn them into splits.

    Raises:
        DataError: The data cannot be trained on; the text names the file, row or column, and the mend.
    """
    scans: dict[str, Scan] = {}
    for name, part in parts.items():
        parts[name], scans[name] = scan(part, roles)
    left = [LeftOut(row_id, name, reason) for name, part in parts.items() for row_id, reason in part.left_out]
    notes = [note for part in parts.values() for note in part.notes]
    leaks = find_leaks(scans)
    train = scans["train"]
    for row, (split, other) in leaks.items():
        train.reasons[row] = f"also in {split}: {parts[split].ids[other]}"
    if not train.rows:
        held = " or ".join(sorted(parts.keys() - {"train"}))
        raise DataError(f"{parts['train'].where}: every row is in {held} too; give other data to test on")

    the_task = make_task(
        [train.cells[row] for row in train.rows],
        columns=roles.labels,
        modality=roles.modality,
        tokens="tokens" in roles.inputs,
        names=train.names,
        kind=task,
    )
    encoded = {name: encode(parts[name], scans[name], the_task, roles) for name in parts}
    check_labels(encoded, the_task)
    for name, found in encoded.items():
        left += [LeftOut(found.part.ids[row], name, reason) for row, reason in sorted(found.scan.reasons.items())]
    if group is not None:
        notes += shared_groups(encoded, group)
    report = describe(encoded, the_task, roles, left, len(leaks), notes)

    if "valid" not in encoded:
        encoded["train"], encoded["valid"] = take_valid(encoded["train"], the_task, seed, group)
    done = {name: canonical(found, roles, the_task) for name, found in encoded.items()}
    report = replace(
        report,
        counts={name: len(done[name]) for name in ("train", "valid", "test") if name in done},
        classes=count_classes(encoded["train"].targets, the_task),
    )
    return Splits(done["train"], done["valid"], done.get("test"), the_task, report, source)


# Targets


def encode(part: Part, found: Scan, task: Task, roles: Roles) -> Encoded:
    """Turn the labels of a part's usable rows into targets; labels that cannot be one are left out with the reason.

    Raises:
        DataError: A label that train lacks (the rows are listed); no row has a usable label.
    """
    index = {name: i for i, name in enumerate(task.labels)}
    hot = (
        not roles.several
        and task.kind == "multi_label_classification"
        and task.labels == tuple(map(str, range(task.outputs)))
        and multi_hot([tags(found.cells[row]) for row in found.rows])
    )
    rows, targets = [], []
    unknown: defaultdict[str, list[str]] = defaultdict(list)
    for row in found.rows:
        cell = found.cells[row]
        try:
            target = encode_cell(cell, task, index, roles.several, hot)
        except KeyError as error:
            unknown[str(error.args[0])].append(part.ids[row])
        except ValueError as error:
            found.reasons[row] = str(error)
        else:
            rows.append(row)
            targets.append(target)
    refuse_unknown(part, unknown)
    if not rows:
        row, reason = next(iter(found.reasons.items()))
        raise DataError(f"{part.where}: no row has a usable label ({part.ids[row]}: {reason}); check label= and task=")
    return Encoded(part, found, rows, targets)


def check_labels(encoded: dict[str, Encoded], task: Task) -> None:
    """Refuse labels from which nothing can be learned, and classes that are held out but not trained on.

    Raises:
        DataError: As above.
    """
    train = encoded["train"]
    where, n = train.part.where, len(train.rows)
    if task.kind == "regression":
        if len({tuple(target) for target in train.targets}) < 2:
            raise DataError(f"{where}: all {n} targets are {train.targets[0]}; there is nothing to learn, check label=")
        return
    counts = count_classes(train.targets, task)
    present = [label for label, count in counts.items() if count]
    if len(present) < 2 and task.kind != "multi_label_classification":
        raise DataError(f"{where}: only one class, {present[0]!r}, in {n} rows; add examples of another class")
    for found in encoded.values():
        absent: defaultdict[str, list[str]] = defaultdict(list)
        for row, target in zip(found.rows, found.targets, strict=True):
            for label in {task.labels[i] for i in classes_of(target, task)}:
                if not counts[label]:
                    absent[label].append(found.part.ids[row])
        refuse_unknown(found.part, absent)


def refuse_unknown(part: Part, labels: dict[str, list[str]]) -> None:
    """Raise a DataError if there are labels, each with the rows that have it, that train lacks."""
    if labels:
        listed = some([f"{label!r} ({some(ids, 3)})" for label, ids in labels.items()])
        raise DataError(f"{part.where}: train lacks the labels {listed}; add examples to train, or remove these rows")


# Report


def describe(
    encoded: dict[str, Encoded], task: Task, roles: Roles, left: list[LeftOut], leaks: int, notes: list[str]
) -> DataReport:
    """Gather the report; `counts` and `classes` are filled in once a validation split is drawn."""
    train = encoded["train"]
    ids = [train.part.ids[row] for row in train.rows]
    duplicates, conflicts = find_duplicates([train.scan.keys[row] for row in train.rows], train.targets)
    warnings = [*notes]
    if leaks:
        warnings.append(f"{leaks} train rows are in valid or test too; they were left out of train.")
    if conflicts:
        first = conflicts[0][0]
        other = next(row for row in conflicts[0] if train.targets[row] != train.targets[first])
        warnings.append(f"{len(conflicts)} inputs have several labels, for instance {ids[first]} and {ids[other]}.")
    by_class = count_classes(train.targets, task)
    numbers = all(as_number(label) is not None for label in task.labels)
    if task.kind == "single_label_classification" and numbers and 2 * len(by_class) > len(ids):
        warnings.append(
            f"{len(by_class)} different numbers in {len(ids)} rows look like quantities, not classes; "
            'task="regression" predicts them.'
        )
    if task.kind == "regression" and all(float(v).is_integer() for row in train.targets for v in row):
        warnings.append(
            "The labels are taken as quantities (regression); if they are classes, give task='single_label'."
        )
    alone = [label for label, count in by_class.items() if count == 1 and task.kind != "token_classification"]
    for label, count in by_class.items():
        if count == 1 and label in alone[MOST_ALONE:]:
            continue
        if count == 1 and task.kind != "token_classification":
            i = task.labels.index(label)
            only = next(ids[k] for k, target in enumerate(train.targets) if i in classes_of(target, task))
            warnings.append(f"Class {label!r} has one example ({only}); it stays in train, so no score covers it.")
        elif count == 0:
            warnings.append(f"Class {label!r} has no example in train; it will never be predicted.")
        elif task.kind == "multi_label_classification" and count == len(ids):
            warnings.append(f"Label {label!r} is on in every row of train; nothing is learned about it.")
    if len(alone) > MOST_ALONE:
        warnings.append(f"{len(alone) - MOST_ALONE} more classes have one example.")
    if task.kind == "single_label_classification":
        counts = sorted((count, label) for label, count in count_classes(train.targets, task).items() if count)
        if counts[-1][0] >= 20 * counts[0][0]:
            most, least = (f"{count} of {label!r}" for count, label in (counts[-1], counts[0]))
            warnings.append(f"Classes are uneven ({most}, {least}); look at f1_macro beside accuracy.")
    held = {"valid", "test"} & encoded.keys()
    if len(held) == 2:
        keys = {encoded["valid"].scan.keys[row] for row in encoded["valid"].rows}
        both = sum(encoded["test"].scan.keys[row] in keys for row in encoded["test"].rows)
        if both:
            warnings.append(f"{both} test rows are in valid too; the test score may be a little high.")
    words = [train.scan.words[row] for row in train.rows] if train.scan.words else []
    return DataReport(
        {},
        {},
        tuple(left),
        duplicates,
        leaks,
        len(conflicts),
        tuple(warnings),
        roles.columns,
        word_lengths(words),
    )


# Splits


def take_valid(train: Encoded, task: Task, seed: int, group: str | None = None) -> tuple[Encoded, Encoded]:
    """Take a validation split out of train; of rows with the same `group`, all or none.

    Raises:
        DataError: No row can be spared.
    """
    keys = [train.scan.keys[row] for row in train.rows]
    if group is None:
        chosen = draw(keys, train.targets, task, seed)
    else:
        together = tied(keys, groups_of(train, group))
        count = len(set(together))
        if count < 2:
            raise DataError(
                f"{train.part.where}: all rows are of one {group!r}; give valid=, or another column to group by"
            )
        strata = stratum_of_rows(train.targets, task, 10)
        chosen = set(next(divided(strata, together, min(VALID_PARTS, count), seed))[1].tolist())
    if not chosen:
        raise DataError(
            f"{train.part.where}: no row can be spared for validation, as no class has two different examples; "
            "add examples, or give valid="
        )
    sides = [[k for k in range(len(train.rows)) if (k in chosen) == side] for side in (False, True)]
    rest, valid = (
        replace(train, rows=[train.rows[k] for k in side], targets=[train.targets[k] for k in side]) for side in sides
    )
    return rest, valid


def groups_of(found: Encoded, group: str) -> list[str]:
    """What the column of groups says for each row that is used; a row without is a group of its own."""
    column = found.part.data[group][:]
    return [str(column[row]) if column[row] not in (None, "") else f" row {row}" for row in found.rows]


def shared_groups(encoded: dict[str, Encoded], group: str) -> list[str]:
    """Notes on groups of train that valid or test has too: scores there are then of what was seen."""
    notes, own = [], set(groups_of(encoded["train"], group))
    for name in encoded.keys() - {"train"}:
        if group in encoded[name].part.data.column_names and (both := own & set(groups_of(encoded[name], group))):
            notes.append(
                f"{len(both)} of the {group!r} groups of train are in {name} too ({min(both)} among them): "
                "its score is partly of what was seen."
            )
    return notes


def canonical(found: Encoded, roles: Roles, task: Task) -> datasets.Dataset:
    """Reduce a part to its canonical columns and the rows that are used."""
    # Columns are added before rows are chosen: adding to a selection would copy every image in it.
    data = found.part.data.select_columns(list(roles.inputs.values()))
    if list(roles.inputs.values()) != list(roles.inputs):
        data = data.rename_columns({column: role for role, column in roles.inputs.items() if column != role})
    data = data.add_column("id", list(found.part.ids), feature=datasets.Value("string"))
    if "tokens" in roles.inputs:
        words = [[str(word) for word in as_list(cell) or []] for cell in data["tokens"][:]]
        data = data.remove_columns("tokens").add_column(
            "tokens", words, feature=datasets.List(datasets.Value("string"))
        )
    for name in ("text", "text_pair"):
        if name in data.column_names and data.features[name] != datasets.Value("string"):
            data = data.cast_column(name, datasets.Value("string"))
    kinds = {"multi_label_classification": "float32", "regression": "float64"}
    shape = datasets.Value(kinds.get(task.kind, "int64"))
    single = task.kind == "single_label_classification"
    targets: list[Any] = [0 if single else []] * len(data)
    for row, target in zip(found.rows, found.targets, strict=True):
        targets[row] = target
    data = data.add_column("target", targets, feature=shape if single else datasets.List(shape))
    return data.select(found.rows)

"""Batches: a Dataset, a processor and an order of rows go in, an iterable of `Batch` comes out.

Shapes: B examples of a batch, C classes, K regression targets, T tokens.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from finetune.data.checks import usable_cores
from finetune.data.decoded import DecodedCache
from finetune.data.images import BadImage, ImageInputs
from finetune.data.task import Task
from finetune.data.texts import tokenized
from finetune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune.model.pretrained import Preprocessing

POOL = 50  # batches among which examples are sorted by length


@dataclass(frozen=True)
class Batch:
    """Inputs for the model, targets [B], [B, C], [B, K] or [B, T] (None in prediction), and row numbers [B].

    `unreadable` has the rows that are missing in it, and why.
    """

    inputs: dict[str, Tensor]
    targets: Tensor | None
    index: Tensor
    unreadable: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.index)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Batch":
        """Move inputs and targets to a device; the row numbers stay."""
        return replace(
            self,
            inputs={name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.inputs.items()},
            targets=None if self.targets is None else self.targets.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Batch":
        """Move inputs and targets to page-locked memory, from which copying to a GPU need not wait."""
        return replace(
            self,
            inputs={name: tensor.pin_memory() for name, tensor in self.inputs.items()},
            targets=None if self.targets is None else self.targets.pin_memory(),
        )


def epoch_order(
    n: int, batch_size: int, *, seed: int, epoch: int | None, lengths: Sequence[int] | None = None
) -> list[list[int]]:
    """Row numbers of each batch of an epoch: a pure function, every row once, the short batch last.

    Args:
        n: Number of rows.
        batch_size: Examples a batch.
        seed: Same seed, same order.
        epoch: Number of the epoch; None for evaluation, in order of the rows, or of the lengths.
        lengths: Tokens of each row. Rows of like length then share a batch: shuffled, sorted inside pools of 50
            batches, batches shuffled (as transformers' LengthGroupedSampler); the short batch is of any length.
    """
    if epoch is None:
        order = np.arange(n) if lengths is None else np.argsort(np.asarray(lengths), kind="stable")
        return chop(order, batch_size)
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(n)
    if lengths is None:
        return chop(order, batch_size)
    sizes, pool = np.asarray(lengths), POOL * batch_size
    pools = [order[start : start + pool] for start in range(0, n, pool)]
    pools = [rows[np.argsort(-sizes[rows], kind="stable")] for rows in pools]
    shuffled, short = rng.permutation(n // batch_size), n % batch_size
    if short:
        # Out of anywhere in the last pool: were it always its shortest rows, a trainer that passes over a short batch
        # would never see the shortest rows of a data set of one pool.
        at = int(rng.integers(len(pools[-1]) - short + 1))
        rest, pools[-1] = pools[-1][at : at + short], np.delete(pools[-1], np.s_[at : at + short])
    batches = [batch for rows in pools for batch in chop(rows, batch_size)]
    return [batches[i] for i in shuffled] + ([rest.tolist()] if short else [])


def token_batches(lengths: Sequence[int], most_tokens: int, most_rows: int) -> list[list[int]]:
    """Row numbers of each batch for a pass without training: every row once, in order of length.

    Args:
        lengths: Tokens of each row.
        most_tokens: Tokens that a batch may have with its padding. A row that is longer has a batch of its own.
        most_rows: Rows that a batch may have.
    """
    batches: list[list[int]] = []
    for row in np.argsort(np.asarray(lengths), kind="stable").tolist():
        # Rows come ever longer, so this one says how far the batch would be filled up.
        fits = batches and len(batches[-1]) < most_rows and (len(batches[-1]) + 1) * lengths[row] <= most_tokens
        if fits:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def chop(order: np.ndarray, batch_size: int) -> list[list[int]]:
    """Cut an order into batches, the last one maybe short."""
    return [order[start : start + batch_size].tolist() for start in range(0, len(order), batch_size)]


class Batches(torch.utils.data.Dataset[Batch]):
    """Makes a whole batch from a list of rows, which saves a Python call and a copy an example."""

    def __init__(self, inputs: Any, targets: Tensor | None):
        self.inputs, self.targets = inputs, targets

    def __getitem__(self, row: int) -> Batch:
        """Make a batch of one."""
        return self.__getitems__([row])

    def __getitems__(self, rows: list[int]) -> Batch:
        """Make a batch; torch's DataLoader calls this with all rows at once. Rows that cannot be read are left out."""
        unreadable: dict[int, str] = {}
        try:
            inputs = self.inputs(rows)
        except (BadImage, OSError):
            for row in rows:
                try:
                    self.inputs([row])
                except (BadImage, OSError) as error:
                    unreadable[row] = str(error)
            rows = [row for row in rows if row not in unreadable]
            inputs = self.inputs(rows) if rows else {}
        targets = inputs.pop("targets", None) if self.targets is None else self.targets[rows]
        return Batch(inputs, targets, torch.tensor(rows), unreadable)


class Loader:
    """Gives the batches of a DataLoader, and goes on by itself when one of its processes dies.

    Args:
        batches: Makes them.
        rows: Row numbers of each batch.
        workers: Processes that load.
        skip: Leave out rows that cannot be read, so long as some of their batch can be.
        name: Of a row, for errors.
    """

    def __init__(
        self, batches: Batches, rows: list[list[int]], *, workers: int, skip: bool, name: Callable[[int], str]
    ) -> None:
        self.batches, self.rows, self.workers, self.skip, self.name = batches, rows, workers, skip, name

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.rows)

    def __iter__(self) -> Iterator[Batch]:
        """Make the batches, in order.

        Raises:
            DataError: A row that cannot be read, and may not be left out.
        """
        loading, done = None, 0
        while done < len(self.rows):
            try:
                loading = iter(self.loader(self.rows[done:])) if loading is None else loading
                batch = next(loading)
            except (RuntimeError, OSError, EOFError) as error:
                # How the death of a process shows depends on what it was doing: a closed pipe, torch's own error, or
                # first the one and then, from torch's handler of the signal, the other.
                dead = "DataLoader worker" in str(error)
                if not dead and (self.workers == 0 or isinstance(error, RuntimeError)):
                    raise
                if self.workers > 0:
                    print("Warning   a loading process died; loading goes on in the main process", file=sys.stderr)
                self.workers, loading = 0, None
                continue
            done += 1
            yield self.checked(batch)

    def loader(self, rows: list[list[int]]) -> DataLoader[Batch]:
        """Torch's own."""
        return DataLoader(
            self.batches,
            batch_sampler=rows,
            num_workers=self.workers,
            collate_fn=as_is,
            pin_memory=torch.cuda.is_available(),
        )

    def checked(self, batch: Batch) -> Batch:
        """The batch, if it can be used."""
        if batch.unreadable and not (self.skip and len(batch)):
            row, why = next(iter(batch.unreadable.items()))
            raise DataError(
                f"{self.name(row)}: {why}; it could be read when the run began. Put it back, and give the same command "
                "again to go on"
            )
        return batch


def as_is(batch: Any) -> Any:
    """Collate nothing: `Batches` gives whole batches."""
    return batch


def make_loader(
    dataset: datasets.Dataset,
    task: Task,
    processor: "Preprocessing | PreTrainedTokenizerBase",
    batches: list[list[int]],
    *,
    train: bool,
    seed: int = 0,
    epoch: int = 0,
    workers: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    augment: str = "default",
    cache: DecodedCache | None = None,
) -> Iterable[Batch]:
    """Return an iterable of one `Batch` for each list of rows in `batches`, in this order.

    Args:
        dataset: A split of `Splits`; without a "target" column, batches have no targets.
        task: The task.
        processor: The backbone's Preprocessing, or its tokenizer.
        batches: Row numbers of each batch, from `epoch_order`; the rest of them to go on in the middle of an epoch.
        train: Augment images. Otherwise they are transformed exactly as the backbone's authors evaluate it.
        seed: With `epoch` and the row, what the augmentation of an example depends on, and nothing else.
        epoch: Number of the epoch.
        workers: Processes that load; by default 0 for text and on two cores, else up to 8 for images.
        image_size: Side in pixels, or (H, W), in place of the backbone's own.
        augment: "default" (random crop, left and right swapped half the time) or "none".
        cache: Keeps decoded images for the loaders that come after; the batches are the same with and without.

    Rows that cannot be read any more are left out of training batches, which say so, and are an error otherwise.

    Raises:
        ValueError: `augment` is something else.
    """
    if augment not in ("default", "none"):
        raise ValueError(f"augment: {augment!r}; give 'default' or 'none'")
    inputs: Any
    if task.modality == "image":
        pre: Any = processor
        if image_size is not None:
            pre = replace(pre, size=(image_size, image_size) if isinstance(image_size, int) else tuple(image_size))
        inputs = ImageInputs(dataset, pre, augment=train and augment == "default", seed=seed, epoch=epoch, cache=cache)
    else:
        text: Any = processor
        inputs = tokenized(dataset, task, text).batch
    count = min(default_workers(task) if workers is None else workers, len(batches))
    names = "id" if "id" in dataset.column_names else None
    return Loader(
        Batches(inputs, target_tensor(dataset, task)),
        batches,
        workers=count,
        skip=train,
        name=lambda row: str(dataset[names][row]) if names else f"row {row}",
    )


def target_tensor(dataset: datasets.Dataset, task: Task) -> Tensor | None:
    """Targets of all rows: int64 [N], float [N, C] or [N, K]; None for tokens, whose targets go with the pieces."""
    if "target" not in dataset.column_names or task.kind == "token_classification":
        return None
    kind = torch.int64 if task.kind == "single_label_classification" else torch.float32
    return torch.tensor(dataset["target"][:], dtype=kind)


def default_workers(task: Task) -> int:
    """Loading processes: none for text, which is tokenised up front, nor on two cores; else up to 8 for images."""
    cores = usable_cores()
    if task.modality == "text" or cores <= 2:
        return 0
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(0, min(8, cores // processes - 1))


def text_lengths(dataset: datasets.Dataset, task: Task, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Tokens of each text, special ones included; the tokens themselves are kept for `make_loader`."""
    return tokenized(dataset, task, tokenizer).lengths

"""A stage whose lower groups are frozen goes in; the rows' activations above them come out, or why not.

What it costs is one pass of the frozen part over the training rows (per view of an image) and the validation rows; what
it saves is that pass in every epoch and every validation.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode

from finetune.data.decoded import DecodedCache
from finetune.data.loaders import Batch, epoch_order, make_loader, target_tensor
from finetune.data.splits import Splits
from finetune.model.boundary import Boundary, NoBoundary, find_boundary
from finetune.model.pretrained import Pretrained
from finetune.model.replay import NotEqual, Replay, check, crossing
from finetune.model.store import Store, make_store, plan_store
from finetune.plan.settings import Settings
from finetune.plan.stages import PlannedStage
from finetune.train.evaluate import Loss, ordered_batches
from finetune.train.processes import Processes

DISK_SHARE = 0.5  # of the disk space that is free
FILL_BATCH = 32
LEAST_SHARE = 0.1  # of a forward pass; below it, keeping costs as much as computing


@dataclass(frozen=True)
class Replayed:
    """Rows of one data set in a store: gives the batches and the forward passes of a trainer or an evaluation.

    Attributes:
        replay: The network above its frozen prefix.
        dataset: The rows.
        splits: For the task.
        first: Where in the store its rows begin.
        views: How many times each row is there.
        epoch: The epoch whose augmentation the first view has; the second has the next one's.
    """

    replay: Replay
    dataset: Dataset
    splits: Splits
    first: int
    views: int = 1
    epoch: int = 0

    def loader(self, batches: list[list[int]]) -> Iterable[Batch]:
        """Batches with what the part above the prefix needs of the inputs: nothing of images, all of texts."""
        task, pretrained = self.splits.task, self.replay.pretrained
        if task.modality == "text":
            return make_loader(self.dataset, task, cast(Any, pretrained.processor), batches, train=False)
        targets = target_tensor(self.dataset, task)
        assert targets is not None
        return (Batch({}, targets[rows], torch.tensor(rows)) for rows in batches)

    def forward(self, batch: Batch, epoch: int = 0, model: torch.nn.Module | None = None) -> Any:
        """The model's outputs for a batch of `loader`; from epoch to epoch the views take turns."""
        begin = self.first + (epoch - self.epoch) % self.views * len(self.dataset)
        return self.replay.forward(batch.inputs, [begin + row for row in batch.index.tolist()], model)


@dataclass(frozen=True)
class StageReplay:
    """What a stage replays: its training rows and its validation rows."""

    train: Replayed
    valid: Replayed
    store: Store
    said: str

    def close(self) -> None:
        """Give back memory or disk."""
        if self.store.path is not None:
            _remove(self.store.path.parent)


@dataclass(frozen=True)
class Request:
    """All that `open_stage` looks at."""

    pretrained: Pretrained
    splits: Splits
    settings: Settings
    processes: Processes
    lengths: dict[str, list[int] | None]
    folder: Path
    loss: Loss
    seed: int
    cache: DecodedCache | None = None


def open_stage(ask: Request, stage: PlannedStage, steps_per_epoch: int, epoch: int) -> tuple[StageReplay | None, str]:
    """Compute what crosses the boundary of a stage once; (None, why) where the stage is better trained plainly.

    The model must be in the mode, and its parameters open, as the stage will train; `epoch` is the number of its first.
    """
    if stage.open_from == 0:
        return None, "everything trains"
    if ask.settings.replay == "off":
        return None, "switched off"
    if ask.processes.sharded:
        return None, "the network is spread over the processes"
    epochs = math.ceil(stage.steps / steps_per_epoch)
    augmented = ask.splits.task.modality == "image" and ask.settings.augment != "none"
    views = min(epochs, ask.settings.replay_views) if augmented else 1
    # Each validation costs a pass of the prefix too.
    train, valid = len(ask.splits.train), len(ask.splits.valid)
    if views * train + valid >= epochs * (train + valid):
        return None, "too short to gain from it"
    if ask.processes.count > 1 and ask.processes.count != _here(ask.processes):
        return None, "the processes run on several machines"
    with torch.random.fork_rng(devices=[]):
        try:
            found = _agreed(ask.processes, lambda: _prepared(ask, views, augmented, epoch))
            _agreed(ask.processes, lambda: _fill(ask, found, views))
            _agreed(ask.processes, lambda: _note(ask, found.store))
            _agreed(ask.processes, lambda: check(found.train.replay, _check_batches(ask, found), ask.loss,
                                                 ask.processes.autocast))  # fmt: skip
        except Refused as error:
            _remove(ask.folder / "cache")
            return None, str(error)
    return found, found.said


class Refused(Exception):
    """The stage trains plainly; the text says why."""


def _remove(folder: Path) -> None:
    """Delete the stores in a folder, and the folder if nothing else is in it."""
    for path in folder.glob("replay-*"):
        path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _agreed(processes: Processes, action: Callable[[], Any]) -> Any:
    """Do something on every process; if it fails on any, it is refused on all, for they have to do the same."""
    result, why = None, ""
    try:
        result = action()
    except (NoBoundary, NotEqual, Refused) as error:
        why = str(error)
    except OSError as error:
        why = f"no space for what crosses ({error.strerror or error})"
    except (RuntimeError, IndexError, TypeError, ValueError, KeyError, AttributeError, AssertionError) as error:
        # A network that cannot be run in parts shows itself in any of these; training plainly is always right.
        why = f"the network cannot be run from its boundary ({type(error).__name__}: {str(error)[:120]})"
    if refused := [reason for reason in processes.gather([why]) if reason]:
        raise Refused(refused[0])
    return result


def _prepared(ask: Request, views: int, augmented: bool, epoch: int) -> StageReplay:
    """The boundary, and an empty store for what crosses it."""
    train, valid = len(ask.splits.train), len(ask.splits.valid)
    samples = _samples(ask)
    boundary = find_boundary(ask.pretrained.model, _forward(ask), samples)
    if ask.splits.task.modality == "image" and boundary.inputs:
        raise Refused("the images themselves are read above the frozen part")
    if (share := _share(ask, boundary, samples[-1])) < LEAST_SHARE:
        raise Refused(f"not worth keeping: the frozen part is {share:.0%} of a forward pass")
    lengths = _row_lengths(ask, views)
    kept = torch.bfloat16 if ask.settings.replay == "bf16" else None
    shapes, dtypes, size = plan_store(boundary, views * train + valid, lengths, kept)
    path = _place(ask, boundary, views, epoch, size)
    made = make_store(shapes, dtypes, views * train + valid, path)
    replay = Replay(ask.pretrained, boundary, made, getattr(ask.pretrained.processor, "padding_side", "") == "left")
    return StageReplay(
        Replayed(replay, ask.splits.train, ask.splits, 0, views, epoch),
        Replayed(replay, ask.splits.valid, ask.splits, views * train),
        made,
        f"{size / 2**20:.0f} MiB" + (f", {views} views" if augmented else "") + (" on disk" if path else ""),
    )


def _share(ask: Request, boundary: Boundary, inputs: dict[str, torch.Tensor]) -> float:
    """Part of the multiplications of a forward pass that the frozen part has.

    Counted and not timed: a run that is taken up again must decide as it did before.
    """

    def flops(run: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter, ask.processes.autocast():
            run()
        return counter.get_total_flops()

    with torch.no_grad():
        prefix = flops(lambda: crossing(ask.pretrained, boundary, inputs))
        return prefix / max(1, flops(lambda: ask.pretrained.forward(inputs)))


def _place(ask: Request, boundary: Boundary, views: int, epoch: int, size: int) -> Path | None:
    """The file for a store, or None for memory."""
    if size <= psutil.virtual_memory().available * ask.settings.replay_memory and ask.processes.count == 1:
        return None
    disk = shutil.disk_usage(ask.folder).free
    if size > disk * DISK_SHARE:
        raise Refused(f"what crosses takes {size / 2**30:.1f} GiB, and {disk / 2**30:.1f} GiB of disk are free")
    return ask.folder / "cache" / f"replay-{_key(ask, boundary, views, epoch)}.bin"


def _key(ask: Request, boundary: Boundary, views: int, epoch: int) -> str:
    """Hash of all that the stored activations depend on."""
    digest = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(ask.pretrained.model.state_dict().items()):
        if name not in _open(ask.pretrained):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    settings = (ask.settings.augment, ask.settings.precision, ask.settings.replay, views, epoch, ask.seed)
    digest.update(repr((boundary, settings, ask.splits.fingerprint, str(ask.pretrained.processor))).encode())
    return digest.hexdigest()


def _open(pretrained: Pretrained) -> set[str]:
    return {name for name, parameter in pretrained.model.named_parameters() if parameter.requires_grad}


def _fill(ask: Request, found: StageReplay, views: int) -> None:
    """Run the prefix over every row, or find in the file that this was done."""
    note = found.store.path.with_suffix(".json") if found.store.path is not None else None
    # Each process looks for itself: they map the same file, and an unfinished one has no note.
    if note is not None and _whole(note, found.store):
        return
    passes = [(found.train, ask.lengths["train"], view, "train") for view in range(views)]
    passes.append((found.valid, ask.lengths["valid"], 0, "valid"))
    for replayed, lengths, view, part in passes:
        data = replayed.dataset
        mine = ordered_batches(len(data), FILL_BATCH, lengths)[ask.processes.rank :: ask.processes.count]
        for batch in _loader(ask, data, mine, found.train.epoch + view if part == "train" else None):
            if batch.unreadable:
                raise Refused("some rows have become unreadable")
            begin = replayed.first + view * len(data)
            rows = batch.index.tolist()
            with ask.processes.autocast():
                replayed.replay.fill(
                    batch.to(ask.processes.device).inputs,
                    [begin + row for row in rows],
                    None if lengths is None else [lengths[row] for row in rows],
                )


def _note(ask: Request, store: Store) -> None:
    """Once all processes have filled their share of a file, say so beside it."""
    if store.path is not None and ask.processes.is_main:
        store.path.with_suffix(".json").write_text(json.dumps({"checksum": store.checksum()}))


def _whole(note: Path, store: Store) -> bool:
    """Whether an earlier process filled the file, and nothing has happened to it since."""
    try:
        return bool(json.loads(note.read_text())["checksum"] == store.checksum())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _loader(ask: Request, data: Dataset, batches: list[list[int]], epoch: int | None) -> Iterable[Batch]:
    options: dict[str, Any] = {"train": False, "cache": ask.cache}
    if epoch is not None:
        options |= {"train": True, "seed": ask.seed, "epoch": epoch, "augment": ask.settings.augment}
    return make_loader(data, ask.splits.task, cast(Any, ask.pretrained.processor), batches, **options)


def _samples(ask: Request) -> list[dict[str, torch.Tensor]]:
    """Batches of two, three and five examples, of different lengths where the texts are."""
    data, lengths = ask.splits.train, ask.lengths["train"]
    order = list(range(len(data))) if lengths is None else sorted(range(len(data)), key=lambda row: lengths[row])
    cut = [order[0:2], order[len(order) // 2 :][:3], order[-5:]]
    rows = [[part[i % len(part)] for i in range(size)] for part, size in zip(cut, (2, 3, 5), strict=True)]
    rows = rows if lengths is not None else rows[:2]
    return [batch.to(ask.processes.device).inputs for batch in _loader(ask, data, rows, None)]


def _forward(ask: Request) -> Callable[[dict[str, torch.Tensor]], Any]:
    def forward(inputs: dict[str, torch.Tensor]) -> Any:
        with ask.processes.autocast():
            return ask.pretrained.forward(inputs)

    return forward


def _row_lengths(ask: Request, views: int) -> list[int] | None:
    train, valid = ask.lengths["train"], ask.lengths["valid"]
    return None if train is None or valid is None else [*train * views, *valid]


def _check_batches(ask: Request, found: StageReplay) -> Iterator[tuple[Any, Any, Sequence[int], torch.Tensor]]:
    """The first two batches of the first epoch, small ones."""
    order = epoch_order(len(ask.splits.train), min(8, len(ask.splits.train)), seed=ask.seed, epoch=0)[:2]
    plain = _loader(ask, ask.splits.train, order, found.train.epoch)
    for batch, light in zip(plain, found.train.loader(order), strict=True):
        batch, light = batch.to(ask.processes.device), light.to(ask.processes.device)
        assert batch.targets is not None
        yield batch.inputs, light.inputs, light.index.tolist(), batch.targets


def _here(processes: Processes) -> int:
    """Processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(processes.count)))

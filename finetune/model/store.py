"""Pieces of tensors go in by row and come out by row: in memory where they fit, else in a file mapped into memory."""

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from finetune.model.boundary import Boundary

SLICE = 1 << 26  # bytes that a checksum reads at once
ALIGNED = 64  # bytes at a multiple of which each leaf begins in a file


@dataclass
class Store:
    """Rows of flat tensors, one flat tensor a stored leaf.

    Attributes:
        flat: By leaf: all rows one after the other.
        offsets: By leaf: int64 [rows + 1], where each row begins.
        shapes: By leaf: the sizes of a row, as a function of its tokens, see `Leaf`.
        dtypes: By leaf.
        path: The file, if it is in one.
    """

    flat: list[Tensor]
    offsets: list[np.ndarray]
    shapes: list[list[tuple[int, ...]]]
    dtypes: list[torch.dtype]
    path: Path | None = None
    _views: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @property
    def bytes(self) -> int:
        """What it takes."""
        return sum(flat.numel() * flat.element_size() for flat in self.flat)

    def put(self, number: int, row: int, piece: Tensor) -> None:
        """Keep a row of a leaf."""
        begin, end = self.offsets[number][row], self.offsets[number][row + 1]
        self.flat[number][begin:end].view(self.shape(number, row)).copy_(piece)

    def get(self, number: int, row: int) -> Tensor:
        """A row of a leaf, not copied."""
        begin, end = self.offsets[number][row], self.offsets[number][row + 1]
        return self.flat[number][begin:end].view(self.shape(number, row))

    def rows(self, number: int, rows: Sequence[int]) -> Tensor:
        """Rows of a leaf that all have one shape, as a batch."""
        if number not in self._views:
            self._views[number] = self.flat[number].view(-1, *self.shape(number, 0))
        return self._views[number][torch.as_tensor(rows)]

    def shape(self, number: int, row: int) -> tuple[int, ...]:
        """Sizes of a row of a leaf."""
        shapes = self.shapes[number]
        return shapes[row] if len(shapes) > 1 else shapes[0]

    def checksum(self) -> int:
        """CRC-32 of everything in it."""
        value = 0
        for flat in self.flat:
            view = flat.view(torch.uint8).numpy()
            for begin in range(0, len(view), SLICE):
                value = zlib.crc32(view[begin : begin + SLICE].data, value)
        return value


def plan_store(
    boundary: Boundary, rows: int, lengths: Sequence[int] | None, dtype: torch.dtype | None = None
) -> tuple[list[list[tuple[int, ...]]], list[torch.dtype], int]:
    """(shapes, dtypes, bytes) of a store for so many rows; `lengths` are the tokens of each, `dtype` the one in which
    floating-point numbers are kept."""
    shapes: list[list[tuple[int, ...]]] = []
    dtypes: list[torch.dtype] = []
    total = 0
    for call, number in boundary.stored:
        leaf = boundary.skipped[call].leaves[number]
        ragged = any(size.tokens for size in leaf.sizes)
        assert leaf.dtype is not None and (lengths is not None or not ragged)
        per_row = [tuple(size.of_row(t) for size in leaf.sizes) for t in (lengths or [0])[: None if ragged else 1]]
        if leaf.channels_last:
            per_row = [(each, height, width, channels) for each, channels, height, width in per_row]
        kept = dtype if dtype is not None and leaf.dtype.is_floating_point else leaf.dtype
        shapes.append(per_row)
        dtypes.append(kept)
        numbers = sum(int(np.prod(shape)) for shape in per_row) * (1 if ragged else rows)
        total += numbers * kept.itemsize
    return shapes, dtypes, total


def make_store(
    shapes: list[list[tuple[int, ...]]], dtypes: list[torch.dtype], rows: int, path: Path | None = None
) -> Store:
    """An empty store, in memory or in a file whose space on the disk is taken at once.

    Raises:
        OSError: The disk has not enough space, or the file cannot be made.
    """
    offsets = []
    for per_row in shapes:
        sizes = [int(np.prod(shape)) for shape in per_row]
        offsets.append(np.concatenate([[0], np.cumsum(sizes if len(sizes) > 1 else sizes * rows)]).astype(np.int64))
    lengths = [int(offset[-1]) for offset in offsets]
    if path is None:
        return Store(
            [torch.empty(n, dtype=dtype) for n, dtype in zip(lengths, dtypes, strict=True)], offsets, shapes, dtypes
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    spans = [-(-n * dtype.itemsize // ALIGNED) * ALIGNED for n, dtype in zip(lengths, dtypes, strict=True)]
    total = sum(spans)
    if not path.exists() or path.stat().st_size != total:
        with path.open("wb") as file:
            # Without this a full disk would show itself only as a bus error, in the middle of an epoch.
            os.posix_fallocate(file.fileno(), 0, max(1, total))
    mapped = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="r+", shape=(max(1, total),)))
    flat, begin = [], 0
    for n, dtype, span in zip(lengths, dtypes, spans, strict=True):
        flat.append(mapped[begin : begin + n * dtype.itemsize].view(dtype))
        begin += span
    return Store(flat, offsets, shapes, dtypes, path)

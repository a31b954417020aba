"""Small sets of pictures as tensors: a name or a folder -> rows to train on and to test on."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.errors import DataError


@dataclass(frozen=True)
class Rows:
    """Normalised pictures [N, C, H, W] and classes [N] of both parts, and how they are moved in training.

    Attributes:
        shift: Pixels by which a picture is moved at most, up or down and left or right.
        mirror: Whether half of the pictures are mirrored.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    shift: int
    mirror: bool

    @property
    def classes(self) -> int:
        return int(self.test_y.max()) + 1

    def to(self, device: torch.device) -> "Rows":
        return replace(self, train_x=self.train_x.to(device), train_y=self.train_y.to(device),
                       test_x=self.test_x.to(device), test_y=self.test_y.to(device))  # fmt: skip


def digits(rows: int, seed: int, *, side: int = 8, channels: int = 1) -> Rows:
    """`rows` of scikit-learn's 1,797 handwritten digits to train on, drawn by `seed`, and all others to test on.

    With another `side` the 8x8 pictures are enlarged, bilinearly, and normalised as the fractal backbone wants it.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    x_NCHW = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16.0
    if side != 8:
        x_NCHW = F.interpolate(x_NCHW, size=side, mode="bilinear")
    x_NCHW = ((x_NCHW - 0.5) / 0.25 if channels == 3 else (x_NCHW - 0.3) / 0.37).repeat(1, channels, 1, 1)
    y_N = torch.tensor(data.target)
    train, test = train_test_split(np.arange(len(y_N)), train_size=rows, stratify=data.target, random_state=seed)
    return Rows(x_NCHW[train], y_N[train], x_NCHW[test], y_N[test], shift=side // 8, mirror=False)


def cifar10(folder: Path, rows: int | None = None, *, side: int = 32) -> Rows:
    """CIFAR-10 as published (a folder with `cifar-10-batches-py`), or any folder `train/CLASS/*`, `test/CLASS/*` of
    pictures of 32x32; `rows` of its training part (the first of a fixed draw), reduced to `side` pixels.

    Raises:
        DataError: Neither is there.
    """
    from torchvision.datasets import CIFAR10, ImageFolder

    if (folder / "cifar-10-batches-py").is_dir():
        parts = [CIFAR10(str(folder), train=train, download=False) for train in (True, False)]
        arrays = [(part.data, part.targets) for part in parts]
    elif (folder / "train").is_dir() and (folder / "test").is_dir():
        arrays = []
        for name in ("train", "test"):
            part = ImageFolder(str(folder / name))
            arrays.append((np.stack([np.asarray(picture) for picture, _ in part]), part.targets))
    else:
        raise DataError(f"{folder}: neither cifar-10-batches-py nor train/ and test/ in it; give CIFAR-10 with --data")
    tensors = []
    for pixels_NHWC, targets in arrays:
        x_NCHW = torch.from_numpy(pixels_NHWC).permute(0, 3, 1, 2).float() / 255.0
        x_NCHW = F.adaptive_avg_pool2d(x_NCHW, side) if side != 32 else x_NCHW
        mean_C, std_C = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.247, 0.2435, 0.2616])
        tensors += [(x_NCHW - mean_C[:, None, None]) / std_C[:, None, None], torch.tensor(targets)]
    train_x, train_y, test_x, test_y = tensors
    chosen = torch.randperm(len(train_y), generator=torch.Generator().manual_seed(0))[:rows]
    return Rows(train_x[chosen], train_y[chosen], test_x, test_y, shift=side // 8, mirror=True)


def moved(x_BCHW: Tensor, rows: Rows, generator: torch.Generator) -> Tensor:
    """Each picture shifted by up to `rows.shift` pixels, what comes in filled from its border, and perhaps mirrored."""
    batch, _, height, width = x_BCHW.shape
    padded = F.pad(x_BCHW, [rows.shift] * 4, mode="replicate")
    down, right = torch.randint(0, 2 * rows.shift + 1, (2, batch), generator=generator)
    columns = right[:, None] + torch.arange(width)
    if rows.mirror:
        columns = torch.where(torch.rand(batch, generator=generator)[:, None] < 0.5, columns.flip(1), columns)
    lines = down[:, None] + torch.arange(height)
    device = x_BCHW.device
    index = (torch.arange(batch)[:, None, None], lines[:, :, None], columns[:, None, :])
    moved_BHWC = padded.permute(0, 2, 3, 1)[tuple(part.to(device) for part in index)]
    return moved_BHWC.permute(0, 3, 1, 2)  # channels last, as the network wants it

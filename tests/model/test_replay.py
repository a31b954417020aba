"""A replayed pass is the plain one: outputs, gradients, for images and for texts of any length; else it is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from finetune.model.backbones import load_backbone
from finetune.model.boundary import find_boundary
from finetune.model.groups import layer_groups, set_mode, set_trainable
from finetune.model.pretrained import Preprocessing, Pretrained
from finetune.model.replay import NotEqual, Replay, check
from finetune.model.store import make_store, plan_store
from tests.tiny import bert_folder, timm_folder, vit_folder

LENGTHS = [5, 9, 3, 7, 9, 4]


def texts(rows: list[int], width: int | None = None) -> dict[str, Tensor]:
    """Tokens of some rows, padded on the right to the longest."""
    width = width or max(LENGTHS[row] for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : LENGTHS[row]] = torch.arange(LENGTHS[row]) * 7 % 80 + row + 5
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def images(rows: list[int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(6, 3, 32, 32, generator=generator)[rows]}


def replay_of(pretrained: Pretrained, open_from: int | str, **store: Any) -> Replay:
    """A replay with a full store of six rows."""
    groups = layer_groups(pretrained)
    set_trainable(pretrained.model, groups, open_from)
    set_mode(pretrained.model, groups, open_from)
    batch = texts if pretrained.modality == "text" else images
    traced = [batch([2, 0]), batch([3, 4, 1]), batch([5, 5, 2, 2, 2])]
    boundary = find_boundary(pretrained.model, pretrained.forward, traced)
    lengths = LENGTHS if pretrained.modality == "text" else None
    shapes, dtypes, _ = plan_store(boundary, 6, lengths, store.pop("dtype", None))
    replay = Replay(pretrained, boundary, make_store(shapes, dtypes, 6, **store))
    for rows in ([1, 4, 0], [3, 5, 2]):
        replay.fill(batch(rows), rows, lengths and [lengths[row] for row in rows])
    return replay


def batches(pretrained: Pretrained) -> list[Any]:
    out = []
    for rows in ([2, 4], [0, 5, 3]):
        inputs = texts(rows) if pretrained.modality == "text" else images(rows)
        rest = inputs if pretrained.modality == "text" else {}
        out.append((inputs, rest, rows, torch.tensor([row % 2 for row in rows])))
    return out


def backbone(kind: str, folder: Path) -> Pretrained:
    made = {
        "resnet": lambda: timm_folder(folder / "m", "test_resnet", num_classes=2, cfg={"input_size": [3, 32, 32]}),
        "vit": lambda: vit_folder(folder / "m", num_labels=2),
        "bert": lambda: bert_folder(folder / "m", labels=["a", "b"]),
    }[kind]()
    return load_backbone(str(made))


@pytest.mark.parametrize("kind", ["resnet", "vit", "bert"])
@pytest.mark.parametrize("open_from", [2, -1])
def test_replayed_equals_computed(kind: str, open_from: int, tmp_path: Path) -> None:
    pretrained = backbone(kind, tmp_path)
    replay = replay_of(pretrained, open_from)
    check(replay, batches(pretrained), nn.functional.cross_entropy, torch.enable_grad)
    frozen = [module for call in replay.boundary.skipped for module in [pretrained.model.get_submodule(call[0])]]
    called: list[nn.Module] = []
    handles = [
        child.register_forward_hook(lambda m, i, o: called.append(m))
        for module in frozen for child in module.modules() if child is not module
    ]  # fmt: skip
    for _, rest, rows, _ in batches(pretrained):
        replay.forward(rest, rows)
    assert not called, "the frozen part was run"
    for inputs, *_ in batches(pretrained):
        pretrained.forward(inputs)
    assert called
    for handle in handles:
        handle.remove()


def test_a_store_in_a_file_and_one_in_bf16_give_the_same(tmp_path: Path) -> None:
    pretrained = backbone("bert", tmp_path)
    path = tmp_path / "cache" / "store.bin"
    plain, filed = replay_of(pretrained, -1), replay_of(pretrained, -1, path=path)
    assert path.stat().st_size >= filed.store.bytes == plain.store.bytes
    half = replay_of(pretrained, -1, dtype=torch.bfloat16)
    assert 2 * half.store.bytes == plain.store.bytes
    rows = [3, 0, 4]
    pretrained.model.eval()
    expected = plain.forward(texts(rows), rows)
    assert torch.equal(expected, filed.forward(texts(rows), rows))
    assert torch.allclose(expected, half.forward(texts(rows), rows), atol=2e-2)
    assert filed.store.checksum() == plain.store.checksum()
    filed.store.flat[0][3] += 1.0
    assert filed.store.checksum() != plain.store.checksum()


def test_padding_further_than_when_stored_changes_nothing(tmp_path: Path) -> None:
    pretrained = backbone("bert", tmp_path)
    replay = replay_of(pretrained, 2)
    pretrained.model.eval()
    rows = [2, 5]
    short, long = replay.forward(texts(rows), rows), replay.forward(texts(rows, width=9), rows)
    assert torch.allclose(short, long, atol=1e-6)
    assert torch.allclose(short, pretrained.forward(texts(rows)), atol=1e-6)


class Shared(nn.Module):
    """One module that a frozen block, and the network above it, both call."""

    def __init__(self) -> None:
        super().__init__()
        self.common = nn.Linear(32, 32)
        self.block = nn.Sequential(self.common, nn.Tanh(), self.common)
        self.middle, self.head = nn.Linear(32, 32), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x.mean((1, 2)))
        return self.head(torch.relu(self.common(y)) * self.middle(y))


def test_calls_that_are_not_made_count_all_the_same() -> None:
    pretrained = Pretrained(
        Shared(), Preprocessing((32, 32)), "module", "shared", frozenset({"head.weight", "head.bias"}), "image"
    )
    for name, parameter in pretrained.model.named_parameters():
        parameter.requires_grad_(name.startswith(("head", "middle")))
    boundary = find_boundary(pretrained.model, pretrained.forward, [images([0, 1]), images([2, 3, 4])])
    assert [call for call, _ in boundary.stored] == [("block", 0), ("common", 2)]
    shapes, dtypes, _ = plan_store(boundary, 6, None)
    replay = Replay(pretrained, boundary, make_store(shapes, dtypes, 6))
    replay.fill(images([0, 1, 2, 3, 4, 5]), list(range(6)))
    check(replay, batches(pretrained), nn.functional.cross_entropy, torch.enable_grad)


class Leaky(nn.Module):
    """A network that hides a value from whoever follows tensors: a number read out of one, which is different each
    time."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.middle, self.head = nn.Linear(32, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x.mean((1, 2)))
        self.scale = float(y.detach().abs().mean())
        return self.head(self.middle(y) * self.scale)


def test_a_network_that_breaks_it_is_caught() -> None:
    pretrained = Pretrained(
        Leaky(), Preprocessing((32, 32)), "module", "leaky", frozenset({"head.weight", "head.bias"}), "image"
    )
    for name, parameter in pretrained.model.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    boundary = find_boundary(pretrained.model, pretrained.forward, [images([0, 1]), images([2, 3, 4])])
    shapes, dtypes, _ = plan_store(boundary, 6, None)
    replay = Replay(pretrained, boundary, make_store(shapes, dtypes, 6))
    replay.fill(images([0, 1, 2, 3, 4, 5]), list(range(6)))
    with pytest.raises(NotEqual, match=r"outputs differ by .* of their size between replayed and computed"):
        check(replay, batches(pretrained), nn.functional.cross_entropy, torch.enable_grad)


def test_a_damaged_store_is_caught(tmp_path: Path) -> None:
    pretrained = backbone("vit", tmp_path)
    replay = replay_of(pretrained, -1)
    replay.store.flat[0].mul_(1.5)
    with pytest.raises(NotEqual):
        check(replay, batches(pretrained), nn.functional.cross_entropy, torch.enable_grad)


def test_rows_of_a_store() -> None:
    store = make_store([[(2, 3)], [(1,), (4,), (2,)]], [torch.float32, torch.int64], 3)
    for row in range(3):
        store.put(0, row, torch.full((2, 3), float(row)))
        store.put(1, row, torch.arange(store.shape(1, row)[0]))
    assert store.rows(0, [2, 0]).tolist() == [[[2.0] * 3] * 2, [[0.0] * 3] * 2]
    assert [store.get(1, row).tolist() for row in range(3)] == [[0], [0, 1, 2, 3], [0, 1]]
    assert store.bytes == 18 * 4 + 7 * 8
    assert np.array_equal(store.offsets[1], [0, 1, 5, 7])

"""Replay in a loop of one's own trains as a plain loop does, leaves all as it was, and says why where it cannot."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import finetune
from finetune.errors import DataError, PlanError
from finetune.model.groups import set_mode, set_trainable
from finetune.model.own_loop import RowForward
from tests.model.test_replay import Leaky, backbone, images, texts

TARGETS = torch.tensor([0, 1, 1, 0, 1, 0])


def train(pretrained: finetune.Pretrained, forward: Any) -> list[Tensor]:
    """Six steps; the losses."""
    torch.manual_seed(3)  # for dropout
    optimizer = torch.optim.SGD([p for p in pretrained.model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for rows in [[2, 4, 0], [5, 3, 1], [1, 0], [4, 2], [3, 5], [0, 1, 2, 3, 4, 5]]:
        loss = cross_entropy(forward(rows), TARGETS[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("kind", ["resnet", "vit", "bert"])
@pytest.mark.parametrize("open_from", [2, -1])
def test_it_trains_as_the_plain_loop(kind: str, open_from: int, tmp_path: Path) -> None:
    plain, pretrained = backbone(kind, tmp_path / "plain"), backbone(kind, tmp_path / "replayed")
    batch = texts if kind == "bert" else images
    groups = finetune.layer_groups(plain)
    set_trainable(plain.model, groups, open_from)
    set_mode(plain.model, groups, open_from)
    expected = train(plain, lambda rows: plain.forward(batch(rows)))

    asked: list[list[int]] = []

    def inputs(rows: list[int]) -> dict[str, Tensor]:
        asked.append(rows)
        return batch(rows)

    with finetune.replay(pretrained, groups, open_from, inputs, rows=6) as forward:
        assert forward.why == "" and forward.bytes > 0
        asked.clear()
        found = train(pretrained, forward)
    assert kind == "bert" or len(asked) <= 3, "images are loaded again"  # one, for the size of each batch
    assert torch.allclose(torch.stack(found), torch.stack(expected), rtol=1e-4)
    assert found[-1] != found[0]
    for (name, one), other in zip(pretrained.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-6), name


def test_the_model_is_as_it_was_afterwards(tmp_path: Path) -> None:
    pretrained = backbone("bert", tmp_path)
    pretrained.model.eval()
    next(pretrained.model.parameters()).requires_grad_(False)
    state = [p.requires_grad for p in pretrained.model.parameters()], [m.training for m in pretrained.model.modules()]
    torch.manual_seed(0)
    expected = torch.rand(1)

    def inputs(rows: list[int]) -> dict[str, Tensor]:
        torch.rand(1)  # a loader that shuffles, or a transform
        return texts(rows)

    torch.manual_seed(0)
    with pytest.raises(KeyError), finetune.replay(pretrained, finetune.layer_groups(pretrained), -1, inputs, 6):
        assert torch.equal(torch.rand(1), expected), "it draws random numbers"
        assert sum(p.requires_grad for p in pretrained.model.parameters()) == 2
        raise KeyError
    assert state == (
        [p.requires_grad for p in pretrained.model.parameters()], [m.training for m in pretrained.model.modules()]
    )  # fmt: skip


def test_frozen_dropout_stays_off_after_train(tmp_path: Path) -> None:
    pretrained = backbone("bert", tmp_path)
    with finetune.replay(pretrained, finetune.layer_groups(pretrained), -1, texts, 6) as forward:
        forward.replay = None  # as where it cannot be done
        outputs = []
        for _ in range(2):
            pretrained.model.train()
            torch.manual_seed(1)
            outputs.append(forward([0, 2]))
        assert (
            not pretrained.model.get_submodule("bert").training
            and pretrained.model.get_submodule("classifier").training
        )
        pretrained.model.eval()
        assert torch.equal(forward([0, 2]), forward([0, 2]))
    assert torch.equal(*outputs)


class Steeper(nn.Module):
    """Gives the same each time, with gradients that grow from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.calls = nn.Linear(32, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.head[0](self.body(x.mean((1, 2))))
        self.calls += 1
        return self.head[1](y + self.calls * (y - y.detach()))


def own(module: nn.Module) -> finetune.Pretrained:
    new = frozenset(name for name, _ in module.named_parameters() if name.startswith("head"))
    return finetune.Pretrained(module, finetune.Preprocessing((32, 32)), "module", "own", new, "image")


def tried(pretrained: finetune.Pretrained, open_from: int = -1) -> RowForward:
    """What a loop would be given, once the passes have been seen to be the plain ones."""
    with finetune.replay(pretrained, finetune.layer_groups(pretrained), open_from, images, 6) as forward:
        pretrained.model.eval()
        assert torch.equal(forward([3, 1]), pretrained.forward(images([3, 1]))) and forward.bytes == 0
    return forward


def test_what_cannot_be_replayed_is_computed_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "outputs differ by" in tried(own(Leaky())).why
    assert "gradients of head.0" in tried(own(Steeper())).why
    assert tried(own(Leaky()), 0).why == "everything trains"
    monkeypatch.setattr("finetune.model.own_loop.psutil.virtual_memory", lambda: SimpleNamespace(available=100))
    assert "GiB of memory are free" in tried(backbone("resnet", tmp_path)).why


def test_what_is_refused(tmp_path: Path) -> None:
    pretrained = own(Leaky())
    groups = finetune.layer_groups(pretrained)
    with pytest.raises(DataError, match="^replay: rows=0, and there is nothing"):
        with finetune.replay(pretrained, groups, -1, images, 0):
            pass
    with pytest.raises(PlanError, match="'absent': no such layer group"):
        with finetune.replay(pretrained, groups, "absent", images, 6):
            pass

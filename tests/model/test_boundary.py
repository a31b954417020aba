"""What crosses from the frozen part of a network, told by following tensors through one forward pass."""

import pytest
import torch
from torch import Tensor, nn

from finetune.model.boundary import Boundary, NoBoundary, Size, find_boundary, patched


class Block(nn.Module):
    """A residual block whose sum stands in the module above it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x))


class Residual(nn.Module):
    """stem -> three blocks, each added to what came before by the network itself -> dropout -> head."""

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(Block(6) for _ in range(3))
        self.norm = nn.LayerNorm(6)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.dropout(self.norm(x)))


def boundary_of(model: nn.Module, opened: str, *shapes: tuple[int, ...]) -> Boundary:
    """The boundary below the modules whose names begin with `opened`."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(opened.split())))
    batches = [{"pixel_values": torch.randn(shape)} for shape in shapes or ((2, 4), (3, 4))]
    return find_boundary(model, lambda batch: model(batch["pixel_values"]), batches)


def stored(boundary: Boundary) -> list[str]:
    return [call[0] for call, _ in boundary.stored]


def test_only_the_last_call_before_the_head_is_stored_and_dropout_stays_above() -> None:
    boundary = boundary_of(Residual(), "head")
    assert stored(boundary) == ["norm"]
    assert {call[0] for call in boundary.skipped} == {"stem", "blocks.0", "blocks.1", "blocks.2", "norm"}
    assert not boundary.inputs


def test_sums_outside_of_modules_need_all_their_terms() -> None:
    assert stored(boundary_of(Residual(), "blocks.2 norm head")) == ["stem", "blocks.0", "blocks.1"]


def test_dropout_that_drops_nothing_belongs_to_the_frozen_part() -> None:
    model = Residual().eval()
    boundary = boundary_of(model, "head")
    assert stored(boundary) == ["norm"]  # an identity in evaluation: it hands on what the norm gave


def test_inputs_that_are_read_above_are_named() -> None:
    class Skip(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.sum()

    assert boundary_of(Skip(), "head").inputs == {"pixel_values"}


def test_what_has_no_batch_dimension_is_computed_each_time() -> None:
    class Table(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2.0, torch.arange(4.0) * 0.1

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.body, self.head = Table(), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y, table = self.table(x)
            return self.head(self.body(y) + table)

    boundary = boundary_of(Two(), "head")
    assert stored(boundary) == ["body"]
    assert "table" not in {call[0] for call in boundary.skipped}


def test_values_left_beside_the_returned_one_are_followed() -> None:
    class Leaves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.kept: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.kept = [self.inner(x)]
            return self.kept[0] * 3.0

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Leaves(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x) + self.body.kept[0])

    assert stored(boundary_of(Reads(), "head")) == ["body.inner"]


def test_the_same_module_called_twice_is_two_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.middle, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(self.middle(self.body(x))))

    assert boundary_of(Twice(), "head").stored == ((("body", 1), 0),)


@pytest.mark.parametrize(
    ("opened", "message"),
    [("stem blocks norm head", "nothing is frozen"), ("nothing", "nothing trains")],
)
def test_no_boundary(opened: str, message: str) -> None:
    with pytest.raises(NoBoundary, match=message):
        boundary_of(Residual(), opened)


def test_what_runs_must_not_depend_on_the_batch() -> None:
    class Moody(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.blocks[0].linear(x[:, [0, 1, 2, 3, 0, 1]])[:, :4] if len(x) > 2 else x)

    with pytest.raises(NoBoundary, match="depends on the batch"):
        boundary_of(Moody(), "head")


@pytest.mark.parametrize(
    ("size", "batch", "tokens", "value", "row"),
    [
        (Size(7), 3, 5, 7, 7),
        (Size(4, batch=True), 3, 5, 12, 4),
        (Size(1, 2, tokens=True), 3, 5, 7, 7),
        (Size(2, batch=True, tokens=True), 3, 5, 30, 10),
    ],
)
def test_sizes_follow_batch_and_tokens(size: Size, batch: int, tokens: int, value: int, row: int) -> None:
    assert size.at(batch, tokens) == value
    assert size.of_row(tokens) == row


def test_patched_modules_are_their_own_again_afterwards() -> None:
    model = Residual()
    with pytest.raises(KeyError), patched(model, {"stem": lambda original: lambda x: original(x) * 0.0}):
        assert not model.stem(torch.ones(1, 4)).any()
        raise KeyError
    assert model.stem(torch.ones(1, 4)).any()
    assert "forward" not in model.stem.__dict__

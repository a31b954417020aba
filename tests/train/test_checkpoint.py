"""A checkpoint is whole or not there, and brings back what went in."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from finetune.train import checkpoint
from finetune.train.checkpoint import load, newest, restore, save, snapshot


def tied() -> nn.Module:
    """Two layers that share their weights, a buffer, a number of whole steps, and a tensor with its channels last."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Conv2d(2, 4, 3))
    model[1].weight = model[0].weight
    return model.to(memory_format=torch.channels_last)


def write(folder: Path, step: int, model: nn.Module | None = None) -> Path:
    weights = {"model": snapshot(model if model is not None else nn.Linear(1, 1))}
    return save(folder, step, weights=weights, optimizer={}, progress={"history": []})


def test_a_snapshot_does_not_change_with_the_model() -> None:
    model = tied()
    before = snapshot(model)
    with torch.no_grad():
        model[0].weight.zero_()
    assert before["0.weight"].abs().sum() > 0 and before["0.weight"].is_contiguous()
    assert torch.equal(before["0.weight"], before["1.weight"])
    restore(model, before)
    assert torch.equal(model[0].weight, before["0.weight"]) and model[1].weight is model[0].weight


def test_there_and_back(tmp_path: Path) -> None:
    model, average = tied(), nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model[2](model[1](model[0](torch.randn(4, 3)))).square().sum().backward()
    optimizer.step()
    progress = {"history": [{"epoch": 1, "valid": {"loss": 0.1 + 0.2}}], "best": None, "first_loss": 1 / 3}
    path = save(
        tmp_path / "checkpoints", 12, weights={"model": snapshot(model), "average": snapshot(average)},
        optimizer=optimizer.state_dict(), progress={"step": 12, **progress},
    )  # fmt: skip
    assert path == newest(tmp_path / "checkpoints", print) == tmp_path / "checkpoints" / "step-0000012"
    weights, state, found = load(path)
    assert set(weights) == {"model", "average"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights["model"][name], tensor) and weights["model"][name].dtype == tensor.dtype
    fresh = torch.optim.AdamW(tied().parameters(), lr=0.5, fused=True)
    fresh.load_state_dict(state)
    assert fresh.param_groups[0]["lr"] == 0.1
    for index, tensors in optimizer.state_dict()["state"].items():
        assert all(torch.equal(fresh.state_dict()["state"][index][name], value) for name, value in tensors.items())
    assert found == {"step": 12, **progress}


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    assert newest(tmp_path, print) is None
    for step in (9, 99, 100, 1000):
        write(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000100", "step-0001000"]
    assert newest(tmp_path, print) == tmp_path / "step-0001000"


def test_one_that_was_cut_off_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.torch, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 2)
    assert newest(tmp_path, print) == tmp_path / "step-0000001"
    write(tmp_path, 2)
    assert newest(tmp_path, print) == tmp_path / "step-0000002"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000001", "step-0000002"]


def test_written_again(tmp_path: Path) -> None:
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    write(tmp_path, 1, first)
    path = write(tmp_path, 1, second)
    assert torch.equal(load(path)[0]["model"]["weight"], second.weight)


def test_nothing_in_it_needs_code_to_be_run(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    assert sorted(file.name for file in path.iterdir()) == [
        "checksums.json", "model.safetensors", "optimizer.pt", "progress.json",
    ]  # fmt: skip
    torch.load(path / "optimizer.pt", weights_only=True)
    assert json.loads((path / "progress.json").read_text()) == {"step": 3, "history": []}


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "progress.json", "checksums.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_one_falls_back_to_the_one_before_and_says_so(tmp_path: Path, file: str, damage: str) -> None:
    older, newer = write(tmp_path, 1), write(tmp_path, 2)
    content = bytearray((newer / file).read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        (newer / file).unlink()
    else:
        (newer / file).write_bytes(content if damage == "flipped" else content[:-1])
    said: list[str] = []
    assert newest(tmp_path, said.append) == older
    assert len(said) == 1 and said[0].startswith(f"Damaged   {newer}: ") and "going back" in said[0]
    assert not newer.exists()


def test_a_checksum_is_of_a_file_inside(tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoints", 1)
    (tmp_path / "secret").write_bytes(b"")
    (path / "checksums.json").write_text(json.dumps({"../../secret": "cae66941d9efbd404e4d88758ea67670"}))
    assert newest(tmp_path / "checkpoints", print) is None


def test_a_full_disk_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = write(tmp_path, 1)

    def full(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.torch, "save", full)
        with pytest.raises(OSError, match="failed writing file"):
            write(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == [older.name]


def test_after_going_back_the_later_ones_are_of_no_use(tmp_path: Path) -> None:
    for step in (10, 20, 5):
        write(tmp_path, step)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000005"]

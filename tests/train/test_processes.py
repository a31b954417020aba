"""One process, and what it takes to be one of several; the precision that a machine is good at."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from finetune.errors import RunError
from finetune.train.processes import Processes, native_precision, start_processes
from tests.tiny import vit_folder


@pytest.fixture
def one() -> Processes:
    return start_processes()


def test_one_process(one: Processes) -> None:
    model = nn.Linear(2, 2)
    assert (one.rank, one.count, one.is_main) == (0, 1, True)
    assert one.wrap(model) is model
    assert one.gather([1, "two"]) == [1, "two"]
    assert one.total(3.5) == 3.5
    one.wait()
    with one.sync_gradients(model, now=False):
        model(torch.zeros(1, 2)).sum().backward()
    assert model.bias.grad is not None


def test_what_the_first_process_does_and_cannot_do(one: Processes, tmp_path: Path) -> None:
    assert one.first(lambda: 7) == 7

    def fail() -> None:
        raise RunError(f"{tmp_path}: no")

    with pytest.raises(RunError, match=": no$"):
        one.first(fail)


def test_a_launcher_that_did_not_join_the_processes(one: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="^WORLD_SIZE=2: the launcher started 2 processes, and each would train alone;"):
        start_processes()


# Precision

LINEAR = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
CONVOLUTIONS = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Flatten(), nn.Linear(4, 4))


class Texts(nn.Module):
    """A small body under a table of words that holds most of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.body = nn.Embedding(1000, 8), nn.Linear(8, 8)


def machine(patch: pytest.MonkeyPatch, *, cuda: bool | None = None, mps: bool = False, cpu: bool = False) -> None:
    """Pretend: `cuda` says whether there is a GPU and whether it computes in bf16; `cpu` whether the processor does."""
    patch.setattr(torch.cuda, "is_available", lambda: cuda is not None)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bool(cuda) or including_emulation)
    patch.setattr(torch.cuda, "get_device_name", lambda: "Chip")
    patch.setattr(torch.backends.mps, "is_available", lambda: mps)
    patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: cpu)
    patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


def test_a_gpus_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cuda=True)
    assert native_precision(CONVOLUTIONS) == ("bf16", "Chip computes in bf16")
    machine(monkeypatch, cuda=False, cpu=True)
    assert native_precision(LINEAR) == ("fp32", "Chip has no bf16")


def test_a_macs_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, mps=True, cpu=True)
    assert native_precision(LINEAR)[0] == "fp32"


def test_a_processors_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cpu=False)
    assert native_precision(LINEAR) == ("fp32", "the processor has no bf16 instructions")
    machine(monkeypatch, cpu=True)
    assert native_precision(LINEAR) == ("bf16", "the processor has bf16 instructions")
    assert native_precision(CONVOLUTIONS)[0] == "fp32" and "convolutions" in native_precision(CONVOLUTIONS)[1]
    assert native_precision(Texts())[0] == "bf16"  # a table of words costs no time
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert native_precision(LINEAR)[0] == "fp32"


def test_autocast_is_the_precision(one: Processes) -> None:
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    with Processes(one.accelerator, "bf16").autocast():
        assert layer(x).dtype == torch.bfloat16
    with Processes(one.accelerator, "fp32").autocast():
        assert layer(x).dtype == torch.float32


# Several processes


@pytest.mark.recipe
def test_two_processes_are_one(squares: Path, tmp_path: Path) -> None:
    """At the same global batch: the head that is solved, each process's share of a store, and every loss after it."""
    backbone = vit_folder(tmp_path / "vit")
    program, found = Path(__file__).parent / "two_processes.py", {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    for count in (1, 2):
        out = tmp_path / f"run{count}"
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if count == 2 else []
        arguments = [sys.executable, *launch, str(program), str(squares), str(backbone), str(out)]
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        found[count] = json.loads((out / "found.json").read_text())
    for kind, replayed in (("solved", [False]), ("replayed", [True, True, False])):
        one, two = found[1][kind], found[2][kind]
        assert (one["processes"], two["processes"]) == (1, 2)
        assert one["replayed"] == two["replayed"] == replayed
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-4, abs=1e-6)

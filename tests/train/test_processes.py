"""One process, and what it takes to be one of several; the precision that a machine is good at."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from finetune.errors import RunError
from finetune.train import processes
from finetune.train.processes import Processes, native_precision, start_processes


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


@pytest.mark.parametrize(
    ("words", "launched"),
    [
        (["/bin/python", "/env/bin/accelerate", "launch", "--cpu", "--num_processes", "2", "recipe.py"], 2),
        (["/env/bin/accelerate-launch", "launch", "--num-processes=3", "recipe.py"], 3),
        (["accelerate", "launch", "-n", "4", "recipe.py", "-n", "5"], 4),
        (["accelerate", "launch", "--num_processes", "1", "recipe.py"], 1),
        (["accelerate", "launch", "recipe.py", "--num_processes", "2"], 1),
        (["bash", "-c", "accelerate launch --num_processes 2"], 1),
    ],
)
def test_a_launcher_that_starts_one_process_whatever_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, words: list[str], launched: int
) -> None:
    """accelerate #2741."""
    monkeypatch.setattr(processes.psutil.Process, "parent", lambda _: SimpleNamespace(cmdline=lambda: words))
    if launched == 1:
        start_processes()
        return
    with pytest.raises(RunError, match=f"--num_processes {launched}: one process was started, not {launched}; start"):
        start_processes()


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported; take FSDP2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version must be 2"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version must be 2"),
    ],
)
def test_configurations_that_are_not_supported(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], said: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=said):
        start_processes()


def test_a_launcher_that_did_not_join_the_processes(one: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="^WORLD_SIZE=2: the launcher started 2 processes, and each would train alone;"):
        start_processes()


def test_weights_that_have_drifted_apart(one: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning #20340: what is unfrozen behind a wrap differs silently from process to process."""
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    sums = {True: model, False: other}
    monkeypatch.setattr(Processes, "count", 2)
    for same in (True, False):
        theirs = torch.stack([parameter.detach().double().sum() for parameter in sums[same].parameters()])
        monkeypatch.setattr(Processes, "gather", lambda _, mine, theirs=theirs: [*mine, theirs])
        if same:
            one.check_same(model, "head")
        else:
            with pytest.raises(RunError, match="^head: the weights of process 1 differ from those of process 0;"):
                one.check_same(model, "head")


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


PROJECT = Path(__file__).parents[2]


@pytest.mark.recipe
@pytest.mark.skipif(not (PROJECT / "scripts").is_dir(), reason="no scripts here")
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_are_one(tmp_path: Path, way: str) -> None:
    """At the same global batch: the head that is solved, each process's share of a store, and every loss after it."""
    table = tmp_path / "table.json"
    command = [
        sys.executable,
        PROJECT / "scripts" / "equivalence.py",
        "--processes",
        "2",
        "--ways",
        way,
        "--json",
        table,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = {row["run"]: row for row in json.loads(table.read_text())}
    assert {run: row["replayed"] for run, row in rows.items()} == {
        "solved head": 0, "three stages": 2 if way == "ddp" else 0, "texts": 0,
    }  # fmt: skip
    assert all(row["steps"] < 1e-4 and row["weights"] < 1e-4 for row in rows.values())

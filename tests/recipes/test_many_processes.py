"""Several processes as one starts them: configurations, signals, a process that dies, and kills at any instant."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

PROJECT = Path(__file__).parents[2]
SCRIPTS = PROJECT / "scripts"
CONFIGS = PROJECT / "recipes" / "configs"
pytestmark = pytest.mark.skipif(not SCRIPTS.is_dir() or not CONFIGS.is_dir(), reason="no scripts and recipes here")
CPU = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}


@pytest.mark.parametrize("name", ["multi_gpu", "fsdp2", "two_nodes"])
def test_configurations_are_accelerates(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIGS / f"{name}.yaml"), "recipe.py"])
    found = _validate_launch_command(arguments)[0]
    assert found.num_processes == config.num_processes and found.num_machines == config.num_machines
    assert bool(found.use_fsdp) == (name == "fsdp2")
    if name == "fsdp2":
        assert int(found.fsdp_version) == 2


def test_the_slurm_script_is_a_script() -> None:
    subprocess.run(["bash", "-n", CONFIGS / "slurm.sh"], check=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures and the network of scripts/equivalence.py."""
    folder = tmp_path_factory.mktemp("chaos") / "data"
    program = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import pathlib, equivalence; "
    program += f"equivalence.make_data(pathlib.Path({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, **CPU}, capture_output=True)
    return folder


def launch(data: Path, out: Path, config: str = "") -> subprocess.Popen[str]:
    """Two processes of the run of scripts/chaos.py, by accelerate's own command."""
    way = ["--config_file", str(CONFIGS / f"{config}.yaml")] if config else ["--multi_gpu"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *way, "--num_processes", "2"]
    command += [str(SCRIPTS / "chaos.py"), "--rows", str(data / "pictures"), "--into", str(out)]
    return subprocess.Popen(
        command, env={**os.environ, **CPU}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def steps(out: Path) -> list[dict[str, object]]:
    path = out / "steps.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def wait_for_steps(process: subprocess.Popen[str], out: Path, number: int) -> None:
    begin = time.monotonic()
    while len(steps(out)) < number:
        assert process.poll() is None and time.monotonic() - begin < 120, process.communicate()[0][-3000:]
        time.sleep(0.02)


def workers(process: subprocess.Popen[str]) -> Iterator[psutil.Process]:
    for child in psutil.Process(process.pid).children(recursive=True):
        if "--into" in child.cmdline() and "RANK" in child.environ():
            yield child


@pytest.mark.recipe
def test_signals_and_deaths_of_two_processes(data: Path, tmp_path: Path) -> None:
    whole = launch(data, tmp_path / "whole", "fsdp2")
    said = whole.communicate(timeout=240)[0]
    assert whole.returncode == 0, said[-3000:]
    out = tmp_path / "parts"

    stopped = launch(data, out, "fsdp2")
    wait_for_steps(stopped, out, 4)
    stopped.send_signal(signal.SIGTERM)
    said = stopped.communicate(timeout=60)[0]
    assert stopped.returncode != 0 and "saved: the same command goes on from there" in said
    assert json.loads((out / "run.json").read_text())["status"] == "running"

    bereft = launch(data, out, "fsdp2")
    wait_for_steps(bereft, out, 14)
    (second,) = (process for process in workers(bereft) if process.environ()["RANK"] == "1")
    second.kill()
    begin = time.monotonic()
    said = bereft.communicate(timeout=60)[0]
    assert bereft.returncode != 0 and time.monotonic() - begin < 60
    assert "rank      : 1 (local_rank: 1)" in said and "SIGKILL" in said
    assert "Resumed   from step" in said

    ended = launch(data, out, "fsdp2")
    said = ended.communicate(timeout=240)[0]
    assert ended.returncode == 0 and "Resumed   from step" in said, said[-3000:]
    assert steps(out) == steps(tmp_path / "whole")
    for name in ("model/model.safetensors", "predictions/test.csv"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.recipe
@pytest.mark.parametrize("run", ["pictures/1", "texts/2"])
def test_five_kills(tmp_path: Path, run: str) -> None:
    command = [sys.executable, str(SCRIPTS / "chaos.py"), "--kills", "5", "--runs", run, "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]

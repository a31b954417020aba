"""The pieces in other people's loops: each example as a real command, in a process of its own, offline."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.recipe

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "recipes" / "elsewhere"


def printed(name: str, folder: Path) -> str:
    """What an example prints; it is run elsewhere than in the repository."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / name)], cwd=folder, capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def figure(text: str, output: str) -> float:
    (found,) = re.findall(rf"{text} ([\d.e-]+\d)", output)
    return float(found)


@pytest.mark.parametrize("name", ["torch_loop.py", "hf_trainer.py", "lightning_module.py"])
def test_training(name: str, tmp_path: Path) -> None:
    if name.startswith("lightning") and not find_spec("lightning"):
        pytest.skip("lightning is not installed; it is in the extra [dev]")
    assert figure("test accuracy", printed(name, tmp_path)) > 0.9
    assert not list(tmp_path.iterdir()), "it leaves files behind"


def test_replay(tmp_path: Path) -> None:
    output = printed("replay_context.py", tmp_path)
    assert re.search(r"^replayed, [1-9]\d* MiB$", output, re.M)
    assert figure("test accuracy", output) > 0.7


def test_range_test(tmp_path: Path) -> None:
    output = printed("find_rate.py", tmp_path)
    assert output.count("the loss runs away at") == 2
    assert 1e-3 < figure("peak rate of the head", output) < 0.1
    assert figure("of the stem", output) == pytest.approx(figure("peak rate of the head", output) / 10, rel=0.1)


def test_they_are_short() -> None:
    found = sorted(FOLDER.glob("*.py"))
    assert len(found) == 5
    for path in found:
        assert len(path.read_text().splitlines()) <= 60, path
        assert "finetune.fit(" not in path.read_text()

"""A short run of the script that makes bad inputs: none may end in a traceback, a hang, or a changed file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "fuzz_inputs.py"


@pytest.mark.recipe
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the script measures memory as Linux tells it")
def test_some_of_each_kind_of_bad_input(tmp_path: Path) -> None:
    """Others than those of the whole run, which begins at 0."""
    kept = str(tmp_path / "found.json")
    command = [sys.executable, str(SCRIPT), "--share", "0.035", "--seed", "1000", "--json", kept]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["inputs"] >= 40 and found["bad"] == []
    totals = {outcome: sum(row[outcome] for row in found["table"].values()) for outcome in ("fine", "skip", "error")}
    assert all(totals.values()), totals  # each way to end is there

"""The list of faults against the code of today: what it would take out is there."""

import pytest

faults = pytest.importorskip("scripts.faults", reason="no scripts here")


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.name)
def test_the_handling_of_each_fault_is_in_the_code(fault) -> None:
    source = (faults.ROOT / fault.file).read_text()
    assert fault.handling in source, f"{fault.file} no longer has it: scripts/faults.py is out of date"
    assert (faults.ROOT / fault.test).exists()

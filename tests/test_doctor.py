"""What will go wrong on a machine is said before it does."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import doctor
from finetune.doctor import examine, said


def found(subject: str, **options: Any) -> doctor.Finding:
    (one,) = [finding for finding in examine(**options) if finding.subject == subject]
    return one


def test_a_machine_on_which_nothing_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_launch", list)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    findings = examine(tmp_path / "not" / "yet")
    assert {finding.subject for finding in findings} == {
        "python", "packages", "extras", "device", "memory", "disk", "threads", "hub",
    }  # fmt: skip
    assert not [finding for finding in findings if finding.state == "problem"]
    assert said(findings).endswith("nothing stands in the way") and f"torch {version('torch')}, " in said(findings)
    assert str(tmp_path) in found("disk", folder=tmp_path / "not" / "yet").said


def test_a_package_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.importlib.import_module

    def broken(name: str) -> Any:
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist\nmore")
        return real(name)

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    one = found("packages")
    assert one.state == "problem" and one.said == (
        "torchvision cannot be imported: operator torchvision::nms does not exist"
    )
    assert said(examine()).endswith("1 to mend, marked !")


def test_a_driver_without_a_torch_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    one = found("device")
    assert one.state == "problem" and "sees no GPU" in one.said and "pytorch.org" in one.advice


def test_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    assert found("threads").state == "problem"


@pytest.mark.parametrize(
    ("config", "state", "advice"),
    [
        ("distributed_type: DEEPSPEED\nnum_processes: 2", "problem", "DeepSpeed is not supported"),
        ("distributed_type: FSDP\nnum_processes: 2\nfsdp_config:\n  fsdp_version: 1", "problem", "fsdp_version: 2"),
        ("distributed_type: MULTI_GPU\nnum_processes: 512", "problem", "lower num_processes"),
        ("distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true", "problem", "torchrun"),
        ("distributed_type: 'NO'\nnum_processes: 1", "ok", ""),
    ],
)
def test_configurations_of_accelerate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str, state: str, advice: str
) -> None:
    from accelerate.commands.config import config_args

    place = tmp_path / "default_config.yaml"
    place.write_text(
        f"compute_environment: LOCAL_MACHINE\nnum_machines: 1\nmixed_precision: 'no'\ndebug: false\n"
        f"{config}\n" + ("" if "use_cpu" in config else "use_cpu: false\n")
    )
    for name in ("default_config_file", "default_yaml_config_file", "default_json_config_file"):
        if hasattr(config_args, name):
            monkeypatch.setattr(config_args, name, str(place))
    one = found("accelerate")
    assert one.state == state and advice in one.advice, one


def test_a_token_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    text = said(examine())
    assert "a token" in text and "secret" not in text

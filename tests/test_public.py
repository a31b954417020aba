"""The public names, and what importing them costs."""

import ast
import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import finetune


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120,
        cwd=Path(finetune.__file__).parents[1],
    )  # fmt: skip
    return done.stdout.strip()


NAMES = [
    "BackboneError", "DataError", "DataReport", "FinetuneError", "Flat", "GradientReport", "LayerGroup", "LayerGroups",
    "LinearDecay", "OneCycle", "Plan", "PlanError", "Preprocessing", "Pretrained", "RangeTest", "Run", "RunError",
    "Settings", "Splits", "Stage", "Task", "choose_settings", "cli", "explain", "fit", "geometric_rates",
    "gradient_report", "gradual_unfreezing", "layer_groups", "load", "load_backbone", "load_dataset", "load_images",
    "load_table", "param_groups", "range_test", "replay",
]  # fmt: skip


def test_the_public_names_are_these() -> None:
    assert finetune.__all__ == NAMES == sorted(NAMES)
    assert dir(finetune) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_can_be_imported_and_is_documented(name: str) -> None:
    value = getattr(finetune, name)
    assert callable(value) and value.__name__ == name
    text = inspect.getdoc(value) or ""
    assert text and not text.startswith(f"{name}("), name  # a dataclass without a docstring gets its signature
    assert value.__module__.startswith("finetune.")


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(finetune.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert sorted(seen) == NAMES
    for name, module in seen.items():
        assert getattr(import_module(str(module)), name) is getattr(finetune, name)


def test_no_other_name_is_there() -> None:
    with pytest.raises(AttributeError, match="^module 'finetune' has no attribute 'learner'$"):
        finetune.learner  # type: ignore[attr-defined]  # noqa: B018


def test_importing_is_quick_and_imports_no_torch() -> None:
    code = "import sys; import finetune; dir(finetune); print(*{name.partition('.')[0] for name in sys.modules})"
    imported = python(code)
    assert "finetune" in imported.split()
    assert not set(imported.split()) & {"torch", "timm", "transformers", "datasets", "numpy", "sklearn", "tyro"}


def test_what_needs_no_torch_does_not_wait_for_it() -> None:
    code = "import sys, finetune; finetune.cli; finetune.PlanError; print('torch' in sys.modules)"
    assert python(code) == "False"


def test_a_name_is_never_hidden_by_a_module() -> None:
    """Importing `finetune.x` sets the attribute x of the package: a module fit.py would become `finetune.fit`."""
    import finetune.fitting
    import finetune.output.predict
    import finetune.run  # noqa: F401

    assert inspect.isfunction(finetune.fit) and inspect.isfunction(finetune.load) and inspect.isclass(finetune.Run)
    inside = {path.stem for path in Path(finetune.__file__).parent.iterdir()}
    assert {"fitting", "run", "plan"} <= inside and not inside & set(NAMES)


def test_the_version_is_the_distributions() -> None:
    import tomllib

    project = tomllib.loads((Path(finetune.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert finetune.__version__ == project["version"]

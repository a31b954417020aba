"""Transfer learning without dials: a pretrained backbone and your data go in, a plain checkpoint comes out.

Names are imported when they are first used, so that `import finetune` and `--help` do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "fit": "finetune.fitting",
    "Run": "finetune.run",
    "load": "finetune.output.predict",
    "explain": "finetune.output.explain",
    "cli": "finetune.commandline",
    "load_images": "finetune.data.sources",
    "load_table": "finetune.data.sources",
    "load_dataset": "finetune.data.sources",
    "Splits": "finetune.data.splits",
    "Task": "finetune.data.task",
    "DataReport": "finetune.data.checks",
    "load_backbone": "finetune.model.backbones",
    "Pretrained": "finetune.model.pretrained",
    "Preprocessing": "finetune.model.pretrained",
    "layer_groups": "finetune.model.groups",
    "LayerGroup": "finetune.model.groups",
    "LayerGroups": "finetune.model.groups",
    "replay": "finetune.model.own_loop",
    "geometric_rates": "finetune.plan.rates",
    "param_groups": "finetune.plan.rates",
    "OneCycle": "finetune.plan.onecycle",
    "LinearDecay": "finetune.plan.onecycle",
    "Flat": "finetune.plan.onecycle",
    "Stage": "finetune.plan.stages",
    "Plan": "finetune.plan.stages",
    "gradual_unfreezing": "finetune.plan.stages",
    "range_test": "finetune.plan.range_test",
    "RangeTest": "finetune.plan.range_test",
    "gradient_report": "finetune.plan.gradients",
    "GradientReport": "finetune.plan.gradients",
    "Settings": "finetune.plan.settings",
    "choose_settings": "finetune.plan.settings",
    "FinetuneError": "finetune.errors",
    "DataError": "finetune.errors",
    "BackboneError": "finetune.errors",
    "PlanError": "finetune.errors",
    "RunError": "finetune.errors",
}
__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from finetune.commandline import cli
    from finetune.data.checks import DataReport
    from finetune.data.sources import load_dataset, load_images, load_table
    from finetune.data.splits import Splits
    from finetune.data.task import Task
    from finetune.errors import BackboneError, DataError, FinetuneError, PlanError, RunError
    from finetune.fitting import fit
    from finetune.model.backbones import load_backbone
    from finetune.model.groups import LayerGroup, LayerGroups, layer_groups
    from finetune.model.own_loop import replay
    from finetune.model.pretrained import Preprocessing, Pretrained
    from finetune.output.explain import explain
    from finetune.output.predict import load
    from finetune.plan.gradients import GradientReport, gradient_report
    from finetune.plan.onecycle import Flat, LinearDecay, OneCycle
    from finetune.plan.range_test import RangeTest, range_test
    from finetune.plan.rates import geometric_rates, param_groups
    from finetune.plan.settings import Settings, choose_settings
    from finetune.plan.stages import Plan, Stage, gradual_unfreezing
    from finetune.run import Run


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

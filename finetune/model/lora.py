"""A pretrained network and its layer groups go in; the same groups come out, in which low-rank adapters train in place
of the body's own weights. At the end they are merged, and the network is a plain one again.

LoRA (Hu et al. 2022): a layer computes W x + alpha / r · B A x, with W as it was, A [r, in] drawn and B [out, r] zero
at first. The adapters are `peft`'s; they belong to the layer group of the layer that they are in, so that stages,
rates, decay, checkpoints and replay see nothing new. What is new in the network, its head above all, trains whole.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from finetune.errors import PlanError
from finetune.model.division import prefixes
from finetune.model.fetch import locate
from finetune.model.groups import LayerGroup, LayerGroups
from finetune.model.heads import WithHead, seeded
from finetune.model.pretrained import Pretrained
from finetune.model.tracing import trace

if TYPE_CHECKING:
    from peft import LoraConfig, LoraModel

# Layers that compute `weight` times their input and nothing else, by name: importing timm costs seconds. A subclass may
# standardise its weights or pad by itself, which an adapter beside it would not follow.
ADAPTED = (
    "torch.nn.modules.linear.Linear",
    "timm.layers.linear.Linear",
    "transformers.pytorch_utils.Conv1D",
    "torch.nn.modules.conv.Conv2d",
)
# Names that peft takes for the heads of transformers' text classifiers, whatever is asked for.
HEADS = ("classifier", "score")
# Over the rank, the same for every rank: one rate then serves all ("LoRA Without Regret", Schulman et al. 2025). At
# the rate for rank 8, trec6 with 300 rows, two seeds: ranks 2, 8 and 32 have 86.7, 86.8 and 86.0; with alpha = 2 r they
# have 85.0, 86.8 and 81.2 (scripts/bench/lora.py).
ALPHA = 16
NAME = "default"  # peft's, of the only adapter


@dataclass(frozen=True)
class Adapter:
    """Adapters in a network.

    Attributes:
        rank: r.
        layers: Names of the layers that have one, as in the network that `PeftModel` takes.
        whole: Names of modules in that network that train whole: peft's `modules_to_save`.
        trained: Weights that train.
        weights: Weights in all.
        config: peft's.
        base: Where the weights are that the adapters stand on, see `base_of`.
        tensors: The adapters' own, by the names that peft saves them under; there once they have been merged.
    """

    rank: int
    layers: tuple[str, ...]
    whole: tuple[str, ...]
    trained: int
    weights: int
    config: "LoraConfig"
    base: str | None
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        share = self.trained / self.weights
        return (
            f"rank {self.rank} in {len(self.layers)} layers; {self.trained / 1e6:.3g} of {self.weights / 1e6:.3g} M "
            f"parameters train ({share:.1%})"
        )

    def to_json(self) -> dict[str, Any]:
        """For `run.json`."""
        return {
            "rank": self.rank,
            "alpha": self.config.lora_alpha,
            "layers": len(self.layers),
            "trained": self.trained,
            "weights": self.weights,
        }


def adapted_part(pretrained: Pretrained) -> nn.Module:
    """The network that `PeftModel` takes: all of it, or what is below a custom head."""
    return cast(WithHead, pretrained.model).backbone if pretrained.custom_head else pretrained.model


@contextmanager
def adapters(
    pretrained: Pretrained, groups: LayerGroups, rank: int, inputs: dict[str, Tensor], *, seed: int = 0
) -> Iterator[tuple[LayerGroups, Adapter | None]]:
    """Inside, adapters train in place of the body's weights; afterwards, also after an error, they are merged.

    The layers with an adapter are the linear layers and ungrouped convolutions of the body that a forward pass calls.

    Args:
        pretrained: Its model is changed in place.
        groups: Its layer groups.
        rank: Of the adapters; 0: none, and everything stays as it is.
        inputs: One small batch, on the model's device.
        seed: For the adapters' first weights.

    Yields:
        (groups, adapter): The groups with the adapters in them, the same in number, order and names; None without.

    Raises:
        PlanError: peft is not installed; nothing in the body can have an adapter; or what trains whole is not a module.
    """
    if rank == 0:
        yield groups, None
        return
    _require(rank)
    from peft import get_peft_model_state_dict

    model, part, base = pretrained.model, adapted_part(pretrained), base_of(pretrained)
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    whole = {*groups.head.parameters, *pretrained.new_parameters} - groups.fixed
    own = "backbone." if pretrained.custom_head else ""
    modules = _modules(part, {name.removeprefix(own) for name in whole if name.startswith(own)}, rank)
    called = trace(model, lambda: pretrained.forward(inputs), inputs).called
    usable = {name.removeprefix(own) for name in trains.keys() - groups.fixed}
    layers = _layers(part, {name.removeprefix(own) for name in called if name.startswith(own)}, usable, modules)
    with seeded(seed):
        tuner, layers = _inject(pretrained, part, layers, rank, inputs)
    try:
        changed = _with_adapters(groups, model, {own + name for name in layers}, whole)
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        trained = sum(size for name, size in sizes.items() if name not in changed.fixed)
        adapter = Adapter(rank, layers, modules, trained, sum(sizes.values()), cast(Any, tuner.peft_config[NAME]), base)
        yield changed, adapter
        found = get_peft_model_state_dict(tuner, save_embedding_layers=False)
        # Copied, and in the usual layout: images train with the channels last, which safetensors does not take.
        for name, tensor in found.items():
            adapter.tensors[f"base_model.{name}"] = tensor.cpu().clone(memory_format=torch.contiguous_format)
    finally:
        _take_out(part, merge=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trains[name])


def base_of(pretrained: Pretrained) -> str | None:
    """Where the weights of a network are: Hub id, else folder; None where nothing tells, or training has changed them.

    A model that was fine-tuned and is trained on is its own base, whatever it had come from.
    """
    name, info = pretrained.name, pretrained.info
    if info.get("trained"):
        return None
    if info.get("revision") or name == "minilm":
        return info["base_model"]
    if name == "fractals" or Path(name.removeprefix("local-dir:")).expanduser().is_dir():
        return str(locate(name, allow_pickle=True, trust_remote_code=True).folder.resolve())
    built_from = adapted_part(pretrained).__dict__.get("name_or_path")
    if built_from and Path(built_from).is_dir():
        return str(Path(built_from).resolve())
    return info.get("base_model") or built_from or None


def _require(rank: int) -> None:
    if find_spec("peft") is None:
        raise PlanError(f'lora={rank}: peft is not installed; pip install "finetune-onecycle[lora]"')


def _inject(
    pretrained: Pretrained, part: nn.Module, layers: tuple[str, ...], rank: int, inputs: dict[str, Tensor]
) -> tuple["LoraModel", tuple[str, ...]]:
    """Put adapters into the layers, but for those of which the network reads what peft's layers have not (the size of a
    kernel): what holds the adapters, and the names of the layers that have one."""
    from peft import LoraConfig, LoraModel

    names = [name for name, _ in part.named_modules()]
    while layers:
        # A list means all names that end so; where another layer's does, an expression names them whole.
        also = [name for name in names if name not in layers and name.endswith(tuple(f".{layer}" for layer in layers))]
        config = LoraConfig(
            r=rank,
            lora_alpha=ALPHA,
            target_modules="|".join(map(re.escape, layers)) if also else list(layers),
            fan_in_fan_out=type(part.get_submodule(layers[0])).__name__ == "Conv1D",
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of two kinds of layers, or of experts: seen to by peft, or below
                tuner = LoraModel(part, config, NAME)
            left = tuple(name for name in layers if name in tuner.targeted_module_names)
            if left == layers:
                assert len(tuner.targeted_module_names) == len(layers)
                trace(pretrained.model, lambda: pretrained.forward(inputs), inputs)
                return tuner, layers
            # Of mixtures of experts peft adapts fused weights in place of some layers: those go without.
        except Exception as error:
            refused = getattr(error, "obj", None)  # whose attribute it was
            left = tuple(name for name in layers if part.get_submodule(name) is not refused)
            if left == layers:
                _take_out(part, merge=False)
                said = f"{type(error).__name__}: {str(error)[:120]}"
                raise PlanError(
                    f"lora={rank}: {pretrained.name} cannot be run with adapters ({said}); leave lora out"
                ) from error
        _take_out(part, merge=False)
        layers = left
    raise PlanError(
        f"lora={rank}: {pretrained.name} has no linear layer or plain convolution below its head that could have an "
        "adapter; leave lora out"
    )


def _take_out(part: nn.Module, *, merge: bool) -> None:
    """Make the network plain again. peft's own way to do so takes any module that has a `base_layer` for an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    done: tuple[str, ...] = ()
    for name, layer in list(part.named_modules()):
        if isinstance(layer, BaseTunerLayer) and not name.startswith(done):
            if merge:
                layer.merge()
            around, _, last = name.rpartition(".")
            setattr(part.get_submodule(around), last, layer.get_base_layer())
            done += (f"{name}.",)
    part.__dict__.pop("peft_config", None)


def _modules(part: nn.Module, names: set[str], rank: int) -> tuple[str, ...]:
    """The largest modules that hold nothing but the parameters `names`, and together all of them."""
    found: list[str] = []
    left = set(names)
    for name, module in part.named_modules():  # outer ones come first
        held = {f"{name}.{key}" for key, _ in module.named_parameters()}
        inside = any(name.startswith(f"{outer}.") for outer in found)
        # peft saves whole what is called so, and all whose names end so: a head in a head it would take twice.
        twice = any(key and f"{name}.{key}".endswith(name) for key, _ in module.named_modules())
        usable = not twice and not isinstance(module, nn.ModuleList | nn.ModuleDict)
        if name and held and held <= names and not inside and usable:
            found.append(name)
            left -= held
    if left:
        raise PlanError(
            f"lora={rank}: {min(left)} trains whole, but lies in no module of its own, which is what an adapter can "
            "hold; leave lora out"
        )
    return tuple(found)


def _layers(part: nn.Module, called: set[str], usable: set[str], modules: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the layers that get an adapter, in order of registration."""
    holders: dict[int, int] = {}
    for _, parameter in part.named_parameters(remove_duplicate=False):
        holders[id(parameter)] = holders.get(id(parameter), 0) + 1

    def fits(name: str, module: nn.Module) -> bool:
        kind = type(module)
        if f"{kind.__module__}.{kind.__qualname__}" not in ADAPTED or name not in called:
            return False
        if any(holders[id(parameter)] > 1 for parameter in module.parameters()):
            return False  # tied to another layer, which merging would change
        if f"{name}.weight" not in usable:  # off by design, or no parameter (weight norm computes it)
            return False
        if isinstance(module, nn.Conv2d):  # peft's has no groups to merge, no dilation, and pads with zeros
            return module.groups == 1 and module.dilation == (1, 1) and module.padding_mode == "zeros"
        return True

    return tuple(name for name, module in part.named_modules() if fits(name, module) and not _is_whole(name, modules))


def _is_whole(name: str, modules: tuple[str, ...]) -> bool:
    """Whether peft takes a module for one of those that it saves whole: it goes by the ends of names."""
    keys = (*modules, *HEADS)
    return any(name.endswith(key) or re.match(rf"(.*\.)?{re.escape(key)}(\.|$)", name) for key in keys)


def _with_adapters(groups: LayerGroups, model: nn.Module, layers: set[str], whole: set[str]) -> LayerGroups:
    """The groups by the names that parameters and modules have now; all but adapters and `whole` is fixed."""
    parameters, modules = dict(model.named_parameters()), [name for name, _ in model.named_modules()]
    own: set[str] = set()  # of the adapters

    def renamed(name: str) -> list[str]:
        layer, _, last = name.rpartition(".")
        if layer not in layers:
            return [name]
        pair = [f"{layer}.lora_{side}.{NAME}.weight" for side in "AB"] if last == "weight" else []
        own.update(pair)
        return [f"{layer}.base_layer.{last}", *pair]

    found = []
    for group in groups:
        names = tuple(new for name in group.parameters for new in renamed(name))
        found.append(LayerGroup(group.name, names, sum(parameters[name].numel() for name in names)))
    inside: dict[str, list[str]] = {layer: [] for layer in layers}
    for name in modules:
        layer = next((outer for outer in prefixes(name) if outer in layers), None)
        if layer is not None:
            inside[layer].append(name)
    return replace(
        groups,
        groups=tuple(found),
        modules=tuple(tuple(n for name in part for n in (name, *inside.get(name, ()))) for part in groups.modules),
        fixed=frozenset(parameters) - own - whole,
    )

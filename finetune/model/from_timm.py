"""A checked timm folder and a Task go in; the model with a fitting classifier comes out."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config
from torch import nn

from finetune.data.task import Task
from finetune.model.fetch import Source, loading, quiet, refuse_outsized, refuse_unfit
from finetune.model.heads import Head, reset, seeded
from finetune.model.pretrained import Preprocessing, Pretrained, with_head


def load(
    source: Source, name: str, task: Task | None, *, head: Head | None, image_size: int | None, seed: int
) -> Pretrained:
    """Load the model; its new parameters are those that timm's own loading reports missing.

    Raises:
        BackboneError: timm cannot build it, or not at this image size.
    """
    config = source.config
    cfg = config.get("pretrained_cfg", config)
    labels = checkpoint_labels(source)
    arguments: dict[str, Any] = {}
    if head is not None or task is not None:
        arguments["num_classes"] = 0 if head is not None or task is None else task.outputs
    if image_size and cfg.get("fixed_input_size"):
        arguments["img_size"] = image_size
    # The file is named, so that timm cannot prefer a pickled one that lies beside it.
    overlay = {"source": "", "file": str(source.weights), "custom_load": False}
    _refuse_outsized(source, name, arguments)
    advice = "check the image size and the files in the folder, or update timm"
    with loading(f"{name}: timm {timm.__version__} cannot load it", advice):
        with quiet(), seeded(seed), _record_missing() as missing:
            model = timm.create_model(
                f"local-dir:{source.folder}", pretrained=True, pretrained_cfg_overlay=overlay, **arguments
            )
        elements = {key: parameter.numel() for key, parameter in model.named_parameters()}
        refuse_unfit(name, missing, elements, classifier_parameters(model))
        pre = preprocessing(cfg, image_size)
    new = {key for key, _ in model.named_parameters() if key in missing}
    if task is not None and head is None and not new and labels != task.labels:
        new = classifier_parameters(model)
    reset(model, new, seed)
    model_args = {key: value for key, value in config.get("model_args", {}).items() if key != "num_classes"}
    info = {
        "architecture": config["architecture"],
        "base_model": source.base_model,
        "revision": source.revision,
        "licence": source.licence,
        "labels": labels,
        "model_args": model_args | {key: value for key, value in arguments.items() if key != "num_classes"},
    }
    loaded = Pretrained(model, pre, "timm", name, frozenset(new), "image", info)
    return loaded if head is None else with_head(loaded, head, seed)


def _refuse_outsized(source: Source, name: str, arguments: dict[str, Any]) -> None:
    try:
        with quiet(), torch.device("meta"):
            model = timm.create_model(f"local-dir:{source.folder}", **arguments)
    except Exception:  # some cannot be built without memory, and what cannot be built at all says so when it is
        return
    refuse_outsized(name, sum(parameter.numel() for parameter in model.parameters()), source)


def adapt(
    model: nn.Module, task: Task | None, *, head: Head | None, image_size: int | None, seed: int, processor: Any
) -> Pretrained:
    """The same for a timm model that the user has built: its classifier is replaced where its width does not fit."""
    timm_model = cast(Any, model)
    cfg, new = timm_model.pretrained_cfg, set[str]()
    width = 0 if head is not None else task.outputs if task is not None else timm_model.num_classes
    if width != timm_model.num_classes:
        with seeded(seed):
            timm_model.reset_classifier(width)
        new = classifier_parameters(model)
        reset(model, new, seed)
    arguments = {k: v for k, v in getattr(model, "_model_args", {}).items() if k != "num_classes"}
    info = {"architecture": cfg["architecture"], "licence": cfg.get("license"), "model_args": arguments}
    name = f"timm/{cfg['architecture']}" + (f".{cfg['tag']}" if cfg.get("tag") else "")
    info["base_model"] = name if cfg.get("tag") else None
    built_for = arguments.get("img_size")
    size = built_for if built_for is None or isinstance(built_for, int) else built_for[0]
    processor = processor or preprocessing(cfg, size or image_size)
    loaded = Pretrained(model, processor, "timm", name, frozenset(new), "image", info)
    return loaded if head is None else with_head(loaded, head, seed)


@contextmanager
def _record_missing() -> Iterator[list[str]]:
    """Collect what `load_state_dict` reports missing while timm builds a model; timm itself only logs it."""
    missing: list[str] = []
    original = nn.Module.load_state_dict

    def recording(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        missing[:] = result.missing_keys  # the call for the whole model ends last
        return result

    nn.Module.load_state_dict = recording  # type: ignore[method-assign]
    try:
        yield missing
    finally:
        nn.Module.load_state_dict = original  # type: ignore[method-assign]


def checkpoint_labels(source: Source) -> tuple[str, ...] | None:
    """Class names of a timm folder: its config's, its labels.txt's, or ImageNet's; None when nothing tells."""
    config = source.config
    cfg = config.get("pretrained_cfg", config)
    names = config.get("label_names") or cfg.get("label_names") or cfg.get("labels")
    if names is None and (source.folder / "labels.txt").is_file():
        names = (source.folder / "labels.txt").read_text(encoding="utf-8").splitlines()
    if names is None:
        subset = infer_imagenet_subset({"num_classes": config.get("num_classes", cfg.get("num_classes"))})
        if subset is None:
            return None
        imagenet = ImageNetInfo(subset)
        names = [imagenet.index_to_description(i) for i in range(imagenet.num_classes())]
    with loading(f"{source.folder}: its label_names cannot be read", "fetch or save the model again"):
        if isinstance(names, dict):
            names = [names[key] for key in sorted(names, key=int)]
        return tuple(map(str, names))


def classifier_parameters(model: nn.Module) -> set[str]:
    """Parameters of timm's classifier: of the modules that pretrained_cfg names, else of `get_classifier`."""
    names = cast(Any, model).pretrained_cfg.get("classifier")
    names = (names,) if isinstance(names, str) else tuple(names or ())
    modules = [model.get_submodule(name) for name in names]
    if not modules:
        found = cast(Any, model).get_classifier()
        modules = list(found) if isinstance(found, tuple | list) else [found]
    ids = {id(parameter) for module in modules for parameter in module.parameters()}
    return {key for key, parameter in model.named_parameters() if id(parameter) in ids}


def preprocessing(cfg: dict[str, Any], image_size: int | None = None) -> Preprocessing:
    """timm's pretrained_cfg as a Preprocessing, at the size of its training unless `image_size` is given."""
    data = resolve_data_config(pretrained_cfg=cfg)
    return Preprocessing(
        size=(image_size, image_size) if image_size else (data["input_size"][1], data["input_size"][2]),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation=data["interpolation"],
        crop_pct=data["crop_pct"],
        crop_mode=data["crop_mode"],
    )

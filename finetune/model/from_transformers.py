"""A checked transformers folder and a Task go in; the model with a fitting classifier, and its processor, come out."""

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto import modeling_auto

from finetune.data.task import Task
from finetune.errors import BackboneError
from finetune.model.fetch import Source, loading, quiet, refuse_outsized, refuse_unfit
from finetune.model.heads import Head, reset, seeded
from finetune.model.pretrained import Preprocessing, Pretrained, with_head

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "*.model")
INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # PIL's numbers


def modalities(config: dict[str, Any]) -> tuple[str, ...]:
    """What a transformers config.json can classify: ("image",), ("text",), or both (some, such as data2vec)."""
    kind = config.get("model_type")
    images = modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    sequences = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    tokens = modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES
    found = ("image",) * (kind in images or str(kind).endswith("_vision_model")) + ("text",) * (
        kind in sequences or kind in tokens
    )
    return found or (("image", "text") if "auto_map" in config else ())


def load(
    source: Source,
    name: str,
    task: Task | None,
    modality: str,
    *,
    head: Head | None,
    image_size: int | None,
    trust_remote_code: bool,
    seed: int,
) -> Pretrained:
    """Load the model; its new parameters are those that transformers reports missing or of another shape.

    Raises:
        BackboneError: transformers cannot load it, or tokenizer or image processor are missing.
    """
    folder, trust = str(source.folder), {"trust_remote_code": trust_remote_code}
    advice = "check the files in the folder, or give another backbone"
    auto = AutoModel if head is not None else auto_class(source.config, task, modality)
    safe = source.weights is None or source.weights.suffix == ".safetensors"
    options = {
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
        "use_safetensors": safe,
        "dtype": torch.float32,
        **trust,
    }
    with loading(f"{name}: transformers cannot load it", advice), quiet(), seeded(seed):
        config = AutoConfig.from_pretrained(folder, **trust)
        labels = tuple(str(config.id2label[i]) for i in range(config.num_labels))
        if task is not None and head is None:
            set_labels(config, task)
        _refuse_deep(config, name, source)
        shapes = _shapes(auto, config, trust)
        refuse_outsized(name, sum(shape.numel() for shape in shapes.values()), source)
        if head is None:
            model, told = auto.from_pretrained(folder, config=config, **options)
        else:
            model, told = _base_model(folder, config, modality, options)
        output_layer = _output_layer(auto, config, trust, shapes) if head is None else set()
    elements = {key: parameter.numel() for key, parameter in model.named_parameters()}
    mismatched = {key if isinstance(key, str) else key[0] for key in told["mismatched_keys"]}
    if mismatched - (output_layer if task is not None else set()):
        odd = min(mismatched - output_layer, default=min(mismatched))
        raise BackboneError(
            f"{name}: its weights are not those of its config.json, {odd} is of another shape; {advice}"
        )
    refuse_unfit(name, [*told["missing_keys"]], elements, output_layer)
    new = {*told["missing_keys"], *mismatched} & elements.keys()
    if task is not None and head is None:
        same_head = type(model).__name__ in (source.config.get("architectures") or ())
        if not (same_head and labels == task.labels) and not new & output_layer:
            reset(model, output_layer, seed)
            new |= output_layer
    processor: Preprocessing | PreTrainedTokenizerBase
    if modality == "text":
        with loading(f"{name}: its tokenizer cannot be loaded", "save it there with tokenizer.save_pretrained"):
            processor = _tokenizer(source, name, model, trust)
    else:
        with loading(f"{name}: its image processor cannot be loaded", "save it there with processor.save_pretrained"):
            processor = _image_preprocessing(source, name, image_size, trust)
        if image_size is not None:
            _check_size(model, name, processor)
    info = {
        "architecture": type(model).__name__,
        "base_model": source.base_model,
        "revision": source.revision,
        "licence": source.licence,
        "labels": labels if "Classification" in str(source.config.get("architectures")) else None,
    }
    loaded = Pretrained(model, processor, "transformers", name, frozenset(new), modality, info)
    return loaded if head is None else with_head(loaded, head, seed)


def adapt(model: PreTrainedModel, task: Task | None, *, head: Head | None, processor: Any, seed: int) -> Pretrained:
    """The same for a transformers model that the user has built; its tokenizer or image processor must come along.

    Raises:
        BackboneError: no processor; or the model's own head does not fit the task.
    """
    name = type(model).__name__
    if processor is None:
        raise BackboneError(f"{name}: a model without tokenizer or image processor; pass it as processor=")
    if not isinstance(processor, Preprocessing | PreTrainedTokenizerBase):
        processor = from_image_processor(processor)
    modality = "text" if isinstance(processor, PreTrainedTokenizerBase) else "image"
    if head is not None:
        model = getattr(model, model.base_model_prefix, model)
    elif task is not None:
        if model.config.num_labels != task.outputs:
            raise BackboneError(
                f"{name}: has {model.config.num_labels} outputs, the task {task.outputs}; build it with "
                f"num_labels={task.outputs}, or give a head"
            )
        set_labels(model.config, task)
    if isinstance(processor, PreTrainedTokenizerBase):
        _pad_and_limit(processor, model)
    info = {"architecture": name, "base_model": None, "licence": None}
    loaded = Pretrained(model, processor, "transformers", name, frozenset(), modality, info)
    return loaded if head is None else with_head(loaded, head, seed)


def set_labels(config: Any, task: Task) -> None:
    """Write the labels, and what transformers calls the problem type, into a model config."""
    config.id2label = dict(enumerate(task.labels))
    config.label2id = {label: i for i, label in enumerate(task.labels)}
    config.problem_type = None if task.kind == "token_classification" else task.kind


def auto_class(config: dict[str, Any], task: Task | None, modality: str) -> Any:
    """The Auto class for the task; without one, for the head that the checkpoint says it has."""
    architecture = (config.get("architectures") or [""])[0]
    tokens = task.kind == "token_classification" if task else architecture.endswith("ForTokenClassification")
    if modality == "image":
        return AutoModelForImageClassification
    return AutoModelForTokenClassification if tokens else AutoModelForSequenceClassification


def _base_model(folder: str, config: Any, modality: str, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The model without a head, and without a pooling layer, which would be new and is not used."""
    if config.is_encoder_decoder:
        raise ValueError(f"{config.model_type} is an encoder with a decoder, whose features no custom head can take")
    if modality == "image" and hasattr(config, "vision_config"):  # CLIP and its kin: the half that sees
        config = config.vision_config
    try:
        return AutoModel.from_pretrained(folder, config=config, add_pooling_layer=False, **options)
    except TypeError:  # not every architecture has that option
        return AutoModel.from_pretrained(folder, config=config, **options)


def _refuse_deep(config: Any, name: str, source: Source) -> None:
    """Refuse layers without end before they are built: each has a weight or more for each of its features."""
    layers, width = (getattr(config, key, None) for key in ("num_hidden_layers", "hidden_size"))
    if isinstance(layers, int) and isinstance(width, int) and layers * max(1, width) > source.size:
        raise BackboneError(
            f"{name}/config.json: {layers} layers are more than its weights hold; fetch or save it again"
        )


def _shapes(auto: Any, config: Any, trust: dict[str, Any]) -> dict[str, torch.Size]:
    """Parameter -> its shape, found by building the model without memory."""
    with quiet(), torch.device("meta"):
        model = auto.from_config(deepcopy(config), **trust)
    return {key: parameter.shape for key, parameter in model.named_parameters()}


def _output_layer(auto: Any, config: Any, trust: dict[str, Any], shapes: dict[str, torch.Size]) -> set[str]:
    """Parameters whose shape depends on the number of labels: `shapes` is of the model as it is."""
    larger = deepcopy(config)
    larger.num_labels = config.num_labels + 1
    others = _shapes(auto, larger, trust)
    return {key for key, shape in shapes.items() if others.get(key) != shape}


# Processors


def _tokenizer(source: Source, name: str, model: nn.Module, trust: dict[str, Any]) -> PreTrainedTokenizerBase:
    if not any(any(source.folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise BackboneError(f"{name}: no tokenizer in this folder; save it there with tokenizer.save_pretrained")
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(str(source.folder), **trust)
    _pad_and_limit(tokenizer, model)
    if tokenizer.model_max_length < 4:  # room for two words between the first and the last token
        raise ValueError(f"its model_max_length is {tokenizer.model_max_length}")
    words = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    if isinstance(words, nn.Embedding) and tokenizer.vocab_size > words.num_embeddings:
        raise ValueError(f"it has {tokenizer.vocab_size} tokens, but the model {words.num_embeddings}")
    return tokenizer


def _pad_and_limit(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> None:
    """Give decoders a padding token (their end-of-text), and the tokenizer the length that the model can take."""
    config: Any = model.config
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and longest > 0:
        for module_name, module in model.named_modules():
            if module_name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                longest -= int(module.padding_idx) + 1  # RoBERTa and its kin number the positions from there
                break
        tokenizer.model_max_length = min(tokenizer.model_max_length, longest)


def _image_preprocessing(source: Source, name: str, image_size: int | None, trust: dict[str, Any]) -> Preprocessing:
    try:
        with quiet():
            processor = AutoImageProcessor.from_pretrained(str(source.folder), **trust)
    except (OSError, ValueError) as error:
        raise BackboneError(
            f"{name}: no image processor in this folder ({str(error).strip().splitlines()[0]}); "
            "save it there with processor.save_pretrained"
        ) from error
    if image_size is None:
        return from_image_processor(processor)
    size, crop = processor.size, processor.crop_size if getattr(processor, "do_center_crop", False) else None
    scale = image_size / (crop["height"] if crop else min(dict(size).values()))  # the margin stays in proportion
    processor.size = type(size)(**{edge: round(pixels * scale) for edge, pixels in dict(size).items()})
    if crop:
        processor.crop_size = type(crop)(height=image_size, width=image_size)
    return from_image_processor(processor)


def _check_size(model: nn.Module, name: str, processor: Preprocessing) -> None:
    """Try whether the model takes images of a size other than its own; what its config says of it is not reliable."""
    model.eval()
    try:
        with torch.no_grad():
            model(pixel_values=torch.zeros(1, 3, *processor.size))
    except (ValueError, RuntimeError) as error:
        raise BackboneError(
            f"image_size: {name} takes no {processor.size[0]} pixels ({str(error).strip().splitlines()[0]}); "
            "leave it out, or give a timm backbone, which can be resized"
        ) from error


def from_image_processor(processor: Any) -> Preprocessing:
    """What a transformers image processor does, in the terms of Preprocessing; the processor goes along for the
    evaluation.
    """
    if hasattr(processor, "data_config"):  # a timm model in transformers' wrapper
        data = processor.data_config
        size, crop_pct, crop_mode = tuple(data["input_size"][1:]), data["crop_pct"], data["crop_mode"]
        mean, std, interpolation = tuple(data["mean"]), tuple(data["std"]), data["interpolation"]
    else:
        given: Any = processor.size or {}
        crop = processor.crop_size if getattr(processor, "do_center_crop", False) else None
        edge = given.get("shortest_edge")
        if crop:
            size = (crop["height"], crop["width"])
            resized = edge or given.get("height") or crop["height"]
            crop_pct, crop_mode = crop["height"] / resized, "center"
        elif edge:
            size, crop_mode = (edge, edge), "center"
            crop_pct = getattr(processor, "crop_pct", None) or 1.0
        else:
            size, crop_pct, crop_mode = (given["height"], given["width"]), 1.0, "squash"
        normalises = getattr(processor, "do_normalize", True)
        mean = tuple(processor.image_mean) if normalises else (0.0,) * 3
        std = tuple(processor.image_std) if normalises else (1.0,) * 3
        interpolation = INTERPOLATIONS.get(int(processor.resample), "bicubic")
    return Preprocessing(size, mean, std, interpolation, crop_pct, crop_mode, processor)

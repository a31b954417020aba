"""Does `layer_groups` hold for timm and transformers? A table, and scripts/results/architectures.json.

    python scripts/check_architectures.py
    python scripts/check_architectures.py --family transformers --only 'bert|t5'

Built with random weights: of every module of `timm.models` its smallest variant, and of every model type that
transformers maps to a sequence or image classifier a tiny configuration. The check does not share code with what it
checks: plain forward hooks note in which order the modules that own parameters are called, and along that order the
groups may never fall back; the head comes last, each parameter lies in exactly one group, and there are at least two
groups, four for a network with a stack of four blocks or more. Exit status 1 below 95 % of what could be built.
"""

import argparse
import gc
import inspect
import json
import logging
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from finetune.model.groups import LayerGroups, layer_groups  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "architectures.json"
CLASSES = 3
SIZES = "test atto femto pico nano xxt xxs xs tiny mini xt t s small - m medium b base l large xl huge giant".split()


@dataclass(frozen=True)
class Network:
    """What `layer_groups` needs to know of a loaded backbone."""

    name: str
    model: nn.Module
    new_parameters: frozenset[str]
    batch: dict[str, Tensor]
    modality: str = "image"
    processor: Any = None

    def forward(self, batch: dict[str, Tensor], model: nn.Module | None = None) -> Any:
        """Run the model on one batch: positional for timm, by name for transformers."""
        model = self.model if model is None else model
        return model(**batch) if hasattr(model, "config") else model(batch["pixel_values"])


@dataclass
class Result:
    """One row of the table."""

    family: str
    name: str
    variant: str
    built: bool
    groups: int = 0
    in_order: bool = False
    names: list[str] = field(default_factory=list)
    why: str = ""
    cpu_seconds: float = 0.0


def main() -> int:
    """Check the networks that the command line asks for; print and write the table; the exit status."""
    options = asked(__doc__)
    started = time.process_time()
    results = []
    for family, name, build in cases():
        if options.family in (None, family) and re.search(options.only, name):
            results.append(run(family, name, build))
            print(line(results[-1]), flush=True)
    built = [result for result in results if result.built]
    good = [result for result in built if result.in_order]
    share = len(good) / len(built) if built else 0.0
    print(f"\n{len(good)} of {len(built)} in order ({share:.1%}), {len(results) - len(built)} could not be built.")
    for result in results:
        if not (result.built and result.in_order):
            print(line(result))
    if not (options.family or options.only):
        write(results, share, time.process_time() - started)
    return 0 if share >= 0.95 else 1


def asked(about: str) -> argparse.Namespace:
    """Which networks the command line asks for; what building them would print is switched off."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--family", choices=["timm", "transformers"])
    parser.add_argument("--only", default="", help="regular expression over the names")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return parser.parse_args()


def line(result: Result) -> str:
    """One row for the console."""
    state = "ok" if result.in_order else "FAILS" if result.built else "not built"
    return f"{result.family:13}{result.name:26}{state:10}{result.groups or '':>4}  {result.why or result.variant}"


def write(results: list[Result], share: float, seconds: float) -> None:
    """The table as JSON, failures and what could not be built listed apart."""
    built = [result for result in results if result.built]
    summary = {
        "schema": 1,
        "script": "scripts/check_architectures.py",
        "versions": {lib.__name__: lib.__version__ for lib in (torch, timm, transformers)},
        "built": len(built),
        "in_order": sum(result.in_order for result in built),
        "share": round(share, 4),
        "cpu_seconds": round(seconds),
        "failures": {f"{r.family}/{r.name}": r.why for r in built if not r.in_order},
        "not_built": {f"{r.family}/{r.name}": r.why for r in results if not r.built},
        "results": [asdict(result) for result in built],
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(summary, indent=1) + "\n")


def cases() -> Iterator[tuple[str, str, Callable[[], Network]]]:
    """Everything that should be tried: family, name, how to build it."""
    for module in timm.list_modules():
        if timm.list_models(module=module):
            yield "timm", module, lambda module=module: build_timm(module)
    for task, mapping in (
        ("SequenceClassification", modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
        ("ImageClassification", modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
    ):
        for model_type, classes in sorted(mapping.items()):
            # Perceiver has three image classifiers; the last one listed is the convolutional.
            for class_name in classes if isinstance(classes, tuple) else (classes,):
                name = model_type if isinstance(classes, str) else f"{model_type}:{class_name}"
                yield (
                    "transformers",
                    f"{name} ({task[:3].lower()})",
                    lambda m=model_type, c=class_name, t=task: build_transformers(m, c, t),
                )


def run(family: str, name: str, build: Callable[[], Network]) -> Result:
    """Build one network, divide it, check the division."""
    started = time.process_time()
    result = Result(family, name, "", built=False)
    torch.manual_seed(0)
    try:
        network = build()
        network.model.eval()
        with torch.no_grad():
            network.forward(network.batch)
    except Exception as error:
        result.why = reason(error)
        return result
    result.built, result.variant = True, network.name
    try:
        groups = layer_groups(network, network.batch)  # type: ignore[arg-type]
        result.groups, result.names = len(groups), [group.name for group in groups]
        result.why = "; ".join(problems(network, groups))
        result.in_order = not result.why
    except Exception as error:
        result.why = "layer_groups: " + reason(error)
    result.cpu_seconds = round(time.process_time() - started, 2)
    del network
    gc.collect()
    return result


def reason(error: BaseException) -> str:
    """An error in one line, with the place where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:160]
    return f"{type(error).__name__}: {text} ({Path(frame.filename).name}:{frame.lineno})"


# ---- The check, independent of how groups are found


def problems(network: Network, groups: LayerGroups) -> list[str]:
    """What is wrong with a division; nothing, when it holds."""
    model, found = network.model, []
    position = {name: i for i, group in enumerate(groups) for name in group.parameters}
    names = [name for group in groups for name in group.parameters]
    if sorted(names) != sorted(name for name, _ in model.named_parameters()):
        found.append("not every parameter in exactly one group")
        return found

    calls: list[nn.Module] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, _: calls.append(module))
        for module in model.modules()
        if not list(module.children()) and list(module.parameters())
    ]
    with torch.no_grad():
        network.forward(network.batch)
    for hook in hooks:
        hook.remove()
    group_of = {id(parameter): position[name] for name, parameter in model.named_parameters()}
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    met: set[int] = set()
    reached, where, back = 0, "", []
    for module in calls:
        for parameter in module.parameters():
            if id(parameter) in met:  # called again, or tied: only the first use counts
                continue
            met.add(id(parameter))
            if group_of[id(parameter)] < reached:
                back.append(f"{name_of[id(parameter)]} (group {group_of[id(parameter)]}) after {where} ({reached})")
            elif group_of[id(parameter)] > reached:
                reached, where = group_of[id(parameter)], name_of[id(parameter)]
    if back:
        found.append(f"{len(back)} parameters out of order, such as {back[0]}")
    if not network.new_parameters:
        found.append("the loading report names no new parameter")
    if outside := network.new_parameters - set(groups[-1].parameters):
        found.append(f"new parameters outside the head: {', '.join(sorted(outside)[:4])}")
    if old := set(groups[-1].parameters) - network.new_parameters:
        found.append(f"pretrained parameters in the head: {', '.join(sorted(old)[:4])}")
    least = 4 if longest_stack(model) >= 4 else 2
    if len(groups) < least:
        found.append(f"{len(groups)} groups only")
    return found


def longest_stack(model: nn.Module) -> int:
    """Most modules of one class, with modules inside, in one container."""
    longest = 0
    for module in model.modules():
        if isinstance(module, (nn.Sequential, nn.ModuleList)):
            kinds = [type(child) for child in module if list(child.children()) and list(child.parameters())]
            longest = max([longest, *(kinds.count(kind) for kind in set(kinds))])
    return longest


# ---- timm


def build_timm(module: str) -> Network:
    """The smallest model of a module of timm.models."""

    def guess(name: str) -> tuple[int, int]:
        words = re.split(r"[_\d.]+", name.replace("xx_small", "xxs").replace("x_small", "xs"))
        size = min((SIZES.index(word) for word in words if word in SIZES), default=SIZES.index("-"))
        return size, int((re.findall(r"\d+", name) or ["0"])[0])

    weights: dict[str, int] = {}
    for name in sorted(timm.list_models(module=module), key=guess)[:4]:
        try:
            model = on_meta(name, CLASSES)
            if hasattr(model, "get_classifier"):  # a few are encoders only
                weights[name] = sum(p.numel() for p in model.parameters())
        except (RuntimeError, NotImplementedError, TypeError, ValueError):
            weights[name] = 10**9  # builds on a real device only
    name = min(weights, key=lambda name: weights[name])
    model = timm.create_model(name, num_classes=CLASSES).eval()
    channels, height, width = model.default_cfg["input_size"]
    batch = {"pixel_values": torch.randn(2, channels, height, width)}
    if not model.default_cfg.get("fixed_input_size"):  # smaller is faster; not every network can
        try:
            smaller = torch.randn(2, channels, min(height, 128), min(width, 128))
            with torch.no_grad():
                model(smaller)
            batch = {"pixel_values": smaller}
        except (RuntimeError, AssertionError, ValueError):
            pass
    # New is what timm leaves out of a checkpoint with other classes: the classifier, and whatever changes its shape.
    classifier = model.get_classifier()
    heads = classifier if isinstance(classifier, (tuple, list)) else (classifier,)
    new_ids = {id(parameter) for head in heads for parameter in head.parameters()}
    try:
        twin = on_meta(name, CLASSES + 2)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        twin = timm.create_model(name, num_classes=CLASSES + 2)
    shapes = {key: p.shape for key, p in twin.named_parameters()}
    new = {key for key, p in model.named_parameters() if id(p) in new_ids or p.shape != shapes[key]}
    return Network(name, model, frozenset(new), batch)


def on_meta(name: str, classes: int) -> nn.Module:
    """A timm model without memory for its weights."""
    with torch.device("meta"):
        return timm.create_model(name, num_classes=classes)


# ---- transformers

# (pattern of the option's name, value): the first that matches shrinks an integer option, if it is larger.
SHRINK = (
    (r"^(num_experts_per_tok|moe_topk|num_experts_per_token|moe_k|top_k_experts|num_shared_experts)$", 2),
    (r"(num|n)_?(local_|routed_)?experts$|^num_local_experts$", 4),
    (r"^(n_group|topk_group)$", 1),
    (r"vocab.*size$|^vocab_size|^entity_vocab_size$", 128),
    (r"head_dim$|^d_kv$|^d_head$|^kv_channels$|_head_size$", 8),
    (r"^rotary_dim$", 4),
    (r"heads$|^n_?head$|_head$", 4),
    (r"(layers|n_layer|num_blocks|_layer_num)$|^num_hidden_groups$", 4),
    (r"lora_rank$", 16),
    (r"(intermediate|ffn|_inner|feed_forward|d_ff|feedforward|mlp_hidden|hidden_dim).*|^ffn_dim$|^d_ff$", 64),
    (r"^(hidden_size|d_model|n_embd|dim|embed_dim|emb_dim|embedding_size|word_embed_proj_dim|projection_dim)$", 32),
    (r"(hidden_size|embed_dim|embedding_size|hidden_dim|d_model|_dim|_embd|width)$", 32),
    (r"^(max_position_embeddings|n_positions|max_source_positions|max_seq_len|n_ctx|seq_length)$", 64),
    (r"^image_size$", 64),
    (r"(bos|eos|pad|cls|sep|mask|decoder_start|image|video|boi|eoi|vision_start|vision_end|audio).*_(id|index)$", 3),
)
KEEP = re.compile(r"mamba|ssm|conv_dim|type_vocab|period|offset|chunk_size|num_channels|rotary_pct|partial")

# Options that the general rule cannot know, and why.
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SPECIAL: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},  # no default
    "efficientnet": {"hidden_dim": 1280, "width_coefficient": 1.0, "depth_coefficient": 1.0},  # B0: widths must agree
    "deepseek_v2": {"num_experts_per_tok": 2},  # no default
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},  # no default
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},  # spells out every layer
    "hunyuan_v1_dense": {"head_dim": 8},  # no default
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},  # else four layers hold no attention
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},  # four and two of them make up the hidden size
    "lilt": {"hidden_size": 48},  # to be divided by six and by sixteen
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 4},
    "perceiver": {"num_cross_attention_heads": 1},  # the width of its inputs is odd
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 8)},  # they make up hidden size and length
    "t5": {"decoder_start_token_id": 0},  # every checkpoint has it, the class does not
    "timm_wrapper": {"architecture": "resnet10t"},  # the class has no default
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],  # the tied block has to occur twice
        "attention_hidden_size": 64,  # twice the hidden size
        "attention_head_dim": 16,
    },
}


NO_CLASSIFIER = {
    "shieldgemma2": "no classifier: asks a language model about an image and a written policy",
}


def shrink(config_class: type, special: dict[str, Any]) -> Any:
    """A small configuration of a class: its integer options made small by name, nested configurations too."""
    defaults = config_class()
    options: dict[str, Any] = {}
    nested = getattr(config_class, "sub_configs", {})
    accepted = set(inspect.signature(config_class).parameters)
    layers = getattr(defaults, "num_hidden_layers", None)
    heads = getattr(defaults, "num_attention_heads", None)
    # A pyramid states widths and heads stage by stage; they have to fit each other, and are small as they are.
    pyramid = any(isinstance(getattr(defaults, key, None), (list, tuple)) and key.endswith("heads") for key in accepted)
    for key in sorted(accepted):
        value = getattr(defaults, key, None)
        if key in nested:
            inner = type(value) if isinstance(value, transformers.PreTrainedConfig) else nested[key]
            if inner is not transformers.AutoConfig:
                options[key] = shrink(inner, {})
        elif isinstance(value, list) and key in ("depths", "layers_per_stage", "num_blocks"):
            options[key] = [min(n, 2) for n in value]
        elif isinstance(value, list) and isinstance(layers, int) and len(value) == layers > 4:
            options[key] = value[-4:] if len(set(map(str, value[-4:]))) > 1 else value[:4]
        elif type(value) is int and re.search(r"(key_value|kv)_heads$|^multi_query_group_num$", key):
            options[key] = 4 if value == heads else min(value, 2)
        elif type(value) is int and not KEEP.search(key) and not (pyramid and re.search("dim|size", key)):
            for pattern, small in SHRINK:
                if re.search(pattern, key):
                    options[key] = min(value, small)
                    break
    return config_class(**{**options, **special})


def build_transformers(model_type: str, class_name: str, task: str) -> Network:
    """A tiny classifier as loading leaves it: the base model is saved, the classifier loaded from it."""
    if model_type in NO_CLASSIFIER:
        raise ValueError(NO_CLASSIFIER[model_type])
    config_class = transformers.CONFIG_MAPPING[model_type]
    special = SPECIAL.get(model_type, {})
    config = shrink(config_class, special)
    text = config.get_text_config()
    if task == "SequenceClassification" and getattr(text, "pad_token_id", None) is None:
        config.pad_token_id = text.pad_token_id = 0
    classifier = getattr(transformers, class_name)
    with tempfile.TemporaryDirectory() as folder:
        config.num_labels = CLASSES + 2
        model = classifier(config)
        base = model.base_model
        (base if isinstance(base, transformers.PreTrainedModel) else model).save_pretrained(folder)
        config.num_labels = CLASSES
        model, report = classifier.from_pretrained(
            folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True
        )
    new = set(report["missing_keys"]) | {entry[0] for entry in report["mismatched_keys"]}
    names = {name for name, _ in model.named_parameters()}
    return Network(class_name, model, frozenset(new & names), inputs_for(model, config, task), task)


def inputs_for(model: nn.Module, config: Any, task: str) -> dict[str, Tensor]:
    """Two examples of noise: [2, C, H, W], or eight token ids each that end in the end of the sentence."""
    accepted = inspect.signature(model.forward).parameters
    if "spatial_shapes" in accepted:  # SigLIP 2 takes patches, already cut
        width = config.vision_config.num_channels * config.vision_config.patch_size**2
        shapes, mask = torch.full((2, 2), 4), torch.ones(2, 16, dtype=torch.long)
        return {"pixel_values": torch.randn(2, 16, width), "pixel_attention_mask": mask, "spatial_shapes": shapes}
    if task == "ImageClassification" and "pixel_values" in accepted:
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None) or 64
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return {"pixel_values": torch.randn(2, getattr(vision, "num_channels", 3), height, width)}
    text = config.get_text_config()
    ids = torch.randint(5, min(100, getattr(text, "vocab_size", 100)), (2, 8))
    if isinstance(getattr(text, "eos_token_id", None), int):
        ids[:, -1] = text.eos_token_id
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {key: value for key, value in inputs.items() if key in accepted}  # ImageGPT takes no mask


if __name__ == "__main__":
    sys.exit(main())

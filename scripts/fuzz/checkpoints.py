"""Configs, weights, tokenizers and image processors: spoilt."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz.made import Made, Random, bend_file, chosen, damage_file, write_evil

Way = Callable[[Random, Path, Path], Any]  # gets the folder, and the place around it


def setting(file: str, *keys: str, to: Any) -> Way:
    """Write a value into a JSON file."""

    def way(rng: Random, folder: Path, place: Path) -> None:
        path = folder / file
        content = json.loads(path.read_text()) if path.is_file() else {}
        inner = content
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        inner[keys[-1]] = to
        path.write_text(json.dumps(content))

    return way


def without(file: str, key: str) -> Way:
    """Take a value out of a JSON file."""

    def way(rng: Random, folder: Path, place: Path) -> None:
        content = json.loads((folder / file).read_text())
        content.pop(key, None)
        (folder / file).write_text(json.dumps(content))

    return way


def content(file: str, *choices: bytes) -> Way:
    """Write other bytes."""
    return lambda rng, folder, place: (folder / file).write_bytes(rng.choice(choices))


def gone(file: str) -> Way:
    """Delete a file."""
    return lambda rng, folder, place: (folder / file).unlink()


def header(change: Callable[[dict[str, Any]], Any]) -> Way:
    """Change what the weights' header says of the first tensor of more than one dimension."""

    def way(rng: Random, folder: Path, place: Path) -> None:
        file = folder / "model.safetensors"
        raw = file.read_bytes()
        size = struct.unpack("<Q", raw[:8])[0]
        told = json.loads(raw[8 : 8 + size])
        change(next(entry for entry in told.values() if len(entry.get("shape", ())) > 1))
        new = json.dumps(told).encode()
        file.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + size :])

    return way


def weights(change: Callable[[dict[str, Any]], Any]) -> Way:
    """Change the tensors."""

    def way(rng: Random, folder: Path, place: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors")

    return way


def largest(tensors: dict[str, Any]) -> str:
    """Name of the largest tensor."""
    return max(tensors, key=lambda name: tensors[name].numel())


def length_of(value: int) -> Way:
    """Another length of the header of the weights."""
    return lambda rng, folder, place: (folder / "model.safetensors").write_bytes(
        struct.pack("<Q", value) + (folder / "model.safetensors").read_bytes()[8:]
    )


def pickles(beside: bool) -> Way:
    """Evil pickles: in place of the weights, under their name, or beside them."""

    def way(rng: Random, folder: Path, place: Path) -> None:
        if not beside:
            (folder / "model.safetensors").unlink()
        for name in ("pytorch_model.bin", "model.pth", "optimizer.pt", "training_args.bin"):
            write_evil(place, folder / name)
        if not beside and rng.random() < 0.5:
            (folder / "pytorch_model.bin").rename(folder / "model.safetensors")

    return way


def remote_code(*files: str) -> Way:
    """Code beside the weights, which configs ask to be run."""

    def way(rng: Random, folder: Path, place: Path) -> None:
        (folder / "evil.py").write_text(f"open({str(place / 'ran')!r}, 'w')\nclass Evil: pass\n")
        names = {
            "AutoConfig": "evil.Evil",
            "AutoModel": "evil.Evil",
            "AutoTokenizer": ["evil.Evil", "evil.Evil"],
            "AutoModelForSequenceClassification": "evil.Evil",
            "AutoModelForImageClassification": "evil.Evil",
            "AutoImageProcessor": "evil.Evil",
            "AutoProcessor": "evil.Evil",
        }
        for file in files:
            setting(file, "auto_map", to=names)(rng, folder, place)
        if rng.random() < 0.5:
            setting("config.json", "model_type", to="homemade")(rng, folder, place)

    return way


def adapter(rng: Random, folder: Path, place: Path) -> None:
    """An adapter beside the model, of a base that lies elsewhere."""
    other = place / "elsewhere"
    shutil.copytree(folder, other)
    told = {"peft_type": "LORA", "base_model_name_or_path": str(other), "task_type": "SEQ_CLS", "r": 2}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    write_evil(place, folder / "adapter_model.bin")


def shards(rng: Random, folder: Path, place: Path) -> None:
    """An index that names other files."""
    file = folder / "model.safetensors"
    os.rename(file, place / "secret.safetensors")
    names = (str(place / "secret.safetensors"), "../../secret.safetensors", "gone.safetensors", "model.safetensors")
    told: Any = {"metadata": {}, "weight_map": {"a": rng.choice(names)}}
    (folder / "model.safetensors.index.json").write_text(rng.choice((json.dumps(told), "[]", "{", '{"weight_map": 1}')))
    shutil.copy(place / "secret.safetensors", folder / "model-00001-of-00002.safetensors")


def evil_arguments(name: str) -> Way:
    """A file elsewhere, in the arguments of a timm model."""

    def way(rng: Random, folder: Path, place: Path) -> None:
        write_evil(place, place / "evil.pth")
        setting("config.json", "model_args", name, to=str(place / "evil.pth"))(rng, folder, place)

    return way


def as_wrapper(rng: Random, folder: Path, place: Path) -> None:
    """A timm folder that transformers should load, with a file of its own choice."""
    write_evil(place, place / "evil.pth")
    setting("config.json", "model_type", to="timm_wrapper")(rng, folder, place)
    setting("config.json", "architectures", to=["TimmWrapperForImageClassification"])(rng, folder, place)
    more = rng.choice(
        ({"checkpoint_path": str(place / "evil.pth")}, {"pretrained_cfg": {"file": str(place / "evil.pth")}})
    )
    setting("config.json", "model_args", to=more)(rng, folder, place)
    if rng.random() < 0.3:
        setting("config.json", "architecture", to=f"local-dir:{place / 'in' / 'other'}")(rng, folder, place)


BOTH: dict[str, Way] = {
    "config that is damaged": lambda rng, folder, place: damage_file(rng, folder / "config.json"),
    "config that is bent": lambda rng, folder, place: bend_file(rng, folder / "config.json"),
    "config that is bent twice": lambda rng, folder, place: bend_file(rng, folder / "config.json", 3),
    "config that is no object": content("config.json", b"[]", b"3", b"null", b'"x"', b"", b"[" * 5000, b"\xff\xfe"),
    "no config": gone("config.json"),
    "no weights": gone("model.safetensors"),
    "weights that are damaged": lambda rng, folder, place: damage_file(rng, folder / "model.safetensors"),
    "weights that are cut off": lambda rng, folder, place: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[: rng.choice((0, 4, 8, 100, 9000))]
    ),
    "no header": content("model.safetensors", b"", b"\0" * 8, b"\0" * 100, b"{}", b"PK\x03\x04" + b"\0" * 100),
    "huge header": length_of(2**62),
    "long header": length_of(2**26),
    "header of nothing": length_of(2),
    "huge shape": header(lambda entry: entry.update(shape=[2**40, 2**20])),
    "negative shape": header(lambda entry: entry.update(shape=[-1, 4])),
    "shape of another size": header(lambda entry: entry.update(shape=[entry["shape"][0] + 1, *entry["shape"][1:]])),
    "offsets beyond": header(lambda entry: entry.update(data_offsets=[0, 2**60])),
    "offsets in reverse": header(lambda entry: entry.update(data_offsets=entry["data_offsets"][::-1])),
    "unknown numbers": header(lambda entry: entry.update(dtype="F7")),
    "other numbers": header(lambda entry: entry.update(dtype="I32")),
    "nan weights": weights(lambda tensors: tensors[largest(tensors)].fill_(float("nan"))),
    "an infinite weight": weights(lambda tensors: tensors[largest(tensors)].view(-1)[:1].fill_(float("inf"))),
    "turned weights": weights(lambda tensors: tensors.update({largest(tensors): tensors[largest(tensors)].mT})),
    "narrower weights": weights(lambda tensors: tensors.update({largest(tensors): tensors[largest(tensors)][:1]})),
    "a weight too few": weights(lambda tensors: tensors.pop(largest(tensors))),
    "other names": weights(
        lambda tensors: [tensors.update({f"x.{name}": tensors.pop(name)}) for name in list(tensors)]
    ),
    "no tensor": weights(lambda tensors: tensors.clear()),
    "pickles for weights": pickles(beside=False),
    "pickles beside": pickles(beside=True),
    "a folder for weights": lambda rng, folder, place: (
        (folder / "model.safetensors").unlink(),
        (folder / "model.safetensors").mkdir(),
    ),
    "links in a circle": lambda rng, folder, place: (
        (folder / "model.safetensors").unlink(),
        (folder / "model.safetensors").symlink_to("model.safetensors"),
    ),
    "a device for weights": lambda rng, folder, place: (
        (folder / "model.safetensors").unlink(),
        (folder / "model.safetensors").symlink_to("/dev/zero"),
    ),
    "card that is broken": content("README.md", b"---\n\xff\n---", b"---\nlicense: [\n---\n", b"\0"),
    "notes that are broken": content(
        "finetune.json", b"{", b"[]", b"\xff", b'{"task": 1}', b'{"task": {}}', b'{"head": 1}'
    ),
    "remote code": remote_code("config.json"),
    "an adapter beside": adapter,
    "an index of other files": shards,
    "a script for a model type": setting("config.json", "model_type", to="<script>alert(1)</script>"),
    "a list for a model type": setting("config.json", "model_type", to=["bert"]),
}
TIMM: dict[str, Way] = {
    "no architecture": without("config.json", "architecture"),
    "unknown architecture": setting("config.json", "architecture", to="resnet_of_tomorrow"),
    "architecture of a number": setting("config.json", "architecture", to=7),
    "architecture elsewhere": setting("config.json", "architecture", to="hf-hub:evil/model"),
    "architecture of a path": setting("config.json", "architecture", to="local-dir:/tmp"),
    "another architecture": setting("config.json", "architecture", to="test_vit"),
    "fewer classes": setting("config.json", "num_classes", to=2),
    "no classes": setting("config.json", "num_classes", to=0),
    "negative classes": setting("config.json", "num_classes", to=-3),
    "many classes": setting("config.json", "num_classes", to=10**8),
    "classes of a word": setting("config.json", "num_classes", to="five"),
    "labels of a number": setting("config.json", "label_names", to=5),
    "labels too few": setting("config.json", "label_names", to=["a"]),
    "labels of dictionaries": setting("config.json", "label_names", to=[{}, [], None, 1, "a"]),
    "labels by words": setting("config.json", "label_names", to={"a": "b"}),
    "no pretrained_cfg": without("config.json", "pretrained_cfg"),
    "pretrained_cfg of a word": setting("config.json", "pretrained_cfg", to="x"),
    "empty pretrained_cfg": setting("config.json", "pretrained_cfg", to={}),
    "mean too short": setting("config.json", "pretrained_cfg", "mean", to=[0.5]),
    "mean of words": setting("config.json", "pretrained_cfg", "mean", to=["a", "b", "c"]),
    "deviation of zero": setting("config.json", "pretrained_cfg", "std", to=[0, 0, 0]),
    "size of zero": setting("config.json", "pretrained_cfg", "input_size", to=[3, 0, 0]),
    "negative size": setting("config.json", "pretrained_cfg", "input_size", to=[3, -32, -32]),
    "enormous size": setting("config.json", "pretrained_cfg", "input_size", to=[3, 100_000, 100_000]),
    "size of one number": setting("config.json", "pretrained_cfg", "input_size", to=[32]),
    "one channel": setting("config.json", "pretrained_cfg", "input_size", to=[1, 32, 32]),
    "unknown interpolation": setting("config.json", "pretrained_cfg", "interpolation", to="magic"),
    "crop of zero": setting("config.json", "pretrained_cfg", "crop_pct", to=0),
    "tiny crop": setting("config.json", "pretrained_cfg", "crop_pct", to=1e-6),
    "unknown crop": setting("config.json", "pretrained_cfg", "crop_mode", to="x"),
    "unknown classifier": setting("config.json", "pretrained_cfg", "classifier", to="no.such"),
    "classifier of a number": setting("config.json", "pretrained_cfg", "classifier", to=1),
    "first layer unknown": setting("config.json", "pretrained_cfg", "first_conv", to="no.such"),
    "label offset": setting("config.json", "pretrained_cfg", "label_offset", to=-1),
    "weights of an address": setting("config.json", "pretrained_cfg", "url", to="http://127.0.0.1:9/evil.pth"),
    "weights by their own code": setting("config.json", "pretrained_cfg", "custom_load", to=True),
    "arguments that are none": setting("config.json", "model_args", to=[1, 2]),
    "unknown arguments": setting("config.json", "model_args", "no_such", to=1),
    "wide arguments": setting("config.json", "model_args", "base_width", to=100_000),
    "a layer of a word": setting("config.json", "model_args", "act_layer", to="os.system"),
    "features alone": setting("config.json", "model_args", "features_only", to=True),
    "a checkpoint elsewhere": evil_arguments("checkpoint_path"),
    "a cache elsewhere": evil_arguments("cache_dir"),
    "a configuration in the arguments": evil_arguments("pretrained_cfg"),
    "for transformers": as_wrapper,
}
TEXT: dict[str, Way] = {
    "no architecture": without("config.json", "architectures"),
    "architecture of a number": setting("config.json", "architectures", to=7),
    "unknown architecture": setting("config.json", "architectures", to=["BertForDreams"]),
    "no model type": without("config.json", "model_type"),
    "unknown model type": setting("config.json", "model_type", to="bert_of_tomorrow"),
    "another model type": setting("config.json", "model_type", to="vit"),
    "width of zero": setting("config.json", "hidden_size", to=0),
    "negative width": setting("config.json", "hidden_size", to=-32),
    "other width": setting("config.json", "hidden_size", to=64),
    "enormous width": setting("config.json", "hidden_size", to=10**9),
    "many words": setting("config.json", "vocab_size", to=30_000_000),
    "no words": setting("config.json", "vocab_size", to=0),
    "few words": setting("config.json", "vocab_size", to=3),
    "no layers": setting("config.json", "num_hidden_layers", to=0),
    "many layers": setting("config.json", "num_hidden_layers", to=10_000),
    "heads that do not fit": setting("config.json", "num_attention_heads", to=7),
    "no places": setting("config.json", "max_position_embeddings", to=0),
    "many places": setting("config.json", "max_position_embeddings", to=10**9),
    "unknown activation": setting("config.json", "hidden_act", to="os.system"),
    "width of a word": setting("config.json", "hidden_size", to="wide"),
    "labels without numbers": setting("config.json", "id2label", to={"a": "b"}),
    "labels with gaps": setting("config.json", "id2label", to={"0": "a", "7": "b"}),
    "labels of all kinds": setting("config.json", "id2label", to={"0": None, "1": [1]}),
    "labels of a list": setting("config.json", "id2label", to=["a", "b"]),
    "many labels": setting("config.json", "num_labels", to=10**8),
    "unknown problem": setting("config.json", "problem_type", to="dreams"),
    "numbers of half": setting("config.json", "torch_dtype", to="float7"),
    "numbers of half, newer": setting("config.json", "dtype", to="system"),
    "an unknown attention": setting("config.json", "_attn_implementation", to="evil/kernels"),
    "quantised": setting(
        "config.json", "quantization_config", to={"quant_method": "bitsandbytes", "load_in_4bit": True}
    ),
    "odd quantisation": setting("config.json", "quantization_config", to={"quant_method": "x"}),
    "padding beyond": setting("config.json", "pad_token_id", to=10**6),
    "no tokenizer": lambda rng, folder, place: [
        (folder / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")
    ],
    "no tokenizer.json": gone("tokenizer.json"),
    "tokenizer that is damaged": lambda rng, folder, place: damage_file(rng, folder / "tokenizer.json"),
    "tokenizer that is bent": lambda rng, folder, place: bend_file(rng, folder / "tokenizer.json"),
    "tokenizer that is none": content("tokenizer.json", b"", b"{}", b"[]", b"\xff", b'{"version": "1.0", "model": {}}'),
    "tokenizer config that is damaged": lambda rng, folder, place: damage_file(rng, folder / "tokenizer_config.json"),
    "tokenizer config that is bent": lambda rng, folder, place: bend_file(rng, folder / "tokenizer_config.json", 2),
    "tokenizer config that is none": content("tokenizer_config.json", b"", b"[]", b"3", b"\xff"),
    "unknown tokenizer": setting("tokenizer_config.json", "tokenizer_class", to="DreamTokenizer"),
    "no padding": setting("tokenizer_config.json", "pad_token", to=None),
    "a padding of its own": setting("tokenizer_config.json", "pad_token", to="[NEVER SEEN]"),
    "negative length": setting("tokenizer_config.json", "model_max_length", to=-5),
    "length of zero": setting("tokenizer_config.json", "model_max_length", to=0),
    "length of a word": setting("tokenizer_config.json", "model_max_length", to="long"),
    "words elsewhere": setting("tokenizer_config.json", "vocab_file", to="/etc/passwd"),
    "tokenizer elsewhere": setting("tokenizer_config.json", "tokenizer_file", to="/etc/passwd"),
    "names elsewhere": setting("config.json", "_name_or_path", to="/etc"),
    "remote tokenizer": remote_code("tokenizer_config.json"),
    "remote everything": remote_code("config.json", "tokenizer_config.json"),
    "words beyond the table": weights(
        lambda tensors: tensors.update({k: v[:20] for k, v in tensors.items() if "word_embeddings" in k})
    ),
    "generation that is broken": content("generation_config.json", b"{", b"[]"),
    "special words that are broken": content("special_tokens_map.json", b"{", b"[]", b'{"pad_token": 3}'),
    "added words that are broken": content("added_tokens.json", b"{", b"[]", b'{"a": "b"}'),
    "a template of code": content("chat_template.jinja", b"{{ cycler.__init__.__globals__.os.system('touch ran') }}"),
}
VISION: dict[str, Way] = {
    "patches that do not fit": setting("config.json", "patch_size", to=7),
    "patches of zero": setting("config.json", "patch_size", to=0),
    "size of zero": setting("config.json", "image_size", to=0),
    "enormous size": setting("config.json", "image_size", to=10**6),
    "another size": setting("config.json", "image_size", to=64),
    "one channel": setting("config.json", "num_channels", to=1),
    "labels with gaps": setting("config.json", "id2label", to={"0": "a", "7": "b"}),
    "no processor": gone("preprocessor_config.json"),
    "processor that is damaged": lambda rng, folder, place: damage_file(rng, folder / "preprocessor_config.json"),
    "processor that is bent": lambda rng, folder, place: bend_file(rng, folder / "preprocessor_config.json", 2),
    "processor that is none": content("preprocessor_config.json", b"", b"[]", b"{}", b"3"),
    "mean too short": setting("preprocessor_config.json", "image_mean", to=[0.5]),
    "mean of words": setting("preprocessor_config.json", "image_mean", to=["a", "b", "c"]),
    "deviation of zero": setting("preprocessor_config.json", "image_std", to=[0, 0, 0]),
    "no size": setting("preprocessor_config.json", "size", to={}),
    "size of one": setting("preprocessor_config.json", "size", to=1),
    "edge of zero": setting("preprocessor_config.json", "size", to={"height": 0, "width": 0}),
    "negative edge": setting("preprocessor_config.json", "size", to={"height": -3, "width": 3}),
    "enormous edge": setting("preprocessor_config.json", "size", to={"height": 10**6, "width": 10**6}),
    "unknown resampling": setting("preprocessor_config.json", "resample", to=99),
    "unknown processor": setting("preprocessor_config.json", "image_processor_type", to="DreamProcessor"),
    "remote processor": remote_code("preprocessor_config.json"),
}


def of(name: str, ways: dict[str, Way]) -> Callable[[Random, Path, Path, int], Made]:
    """Spoil a checkpoint in one or two ways, then give it as a backbone, or as a model that is ready."""

    def made(rng: Random, place: Path, base: Path, number: int) -> Made:
        folder = place / "in" / name
        shutil.copytree(base / name, folder)
        done = chosen(rng, number, ways)
        for way in done:
            try:
                ways[way](rng, folder, place)
            except Exception:  # the first has left nothing to spoil
                continue
        ready = number % 2 == 1

        def act() -> int:
            return predicted(folder, name) if ready else adapted(folder, name)

        return Made(f"{' + '.join(done)} ({'model' if ready else 'backbone'})", act, (str(folder), "image_size"))

    return made


def predicted(folder: Path, name: str) -> int:
    """Load a ready model, and use it."""
    from PIL import Image

    import finetune

    predictor = finetune.load(folder)
    found = predictor.predict([Image.new("RGB", (40, 40)) if name != "bert" else "the film was good"])
    return sum(one.error is not None for one in found)


def adapted(folder: Path, name: str) -> int:
    """Load a backbone for other labels, and use it and its preprocessing once."""
    import torch
    from PIL import Image

    import finetune
    from finetune.data.images import eval_transform
    from finetune.data.task import Task
    from finetune.model.groups import layer_groups
    from finetune.model.pretrained import Preprocessing

    modality = "text" if name == "bert" else "image"
    found = finetune.load_backbone(folder, Task("single_label_classification", modality, ("cat", "dog", "mouse")))
    assert len(layer_groups(found)) > 1  # what a run does first: a forward pass
    found.model.eval()
    with torch.no_grad():
        if isinstance(found.processor, Preprocessing):
            picture = eval_transform(found.processor)(Image.new("RGB", (40, 40)))
            output = found.forward({"pixel_values": picture[None]})
        else:
            output = found.forward(dict(found.processor(["the film was good"], return_tensors="pt")))
    assert output.shape == (1, 3), output.shape
    assert torch.isfinite(output).all(), "outputs that are no numbers"
    return 0


timm = of("timm", BOTH | TIMM)
transformers_text = of("bert", BOTH | TEXT)
transformers_images = of("vit", {**{name: BOTH[name] for name in list(BOTH)[::3]}, **VISION})

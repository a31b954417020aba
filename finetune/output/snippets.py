"""What is known of a model goes in; programs that use it, to copy and run, come out."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune.output.card_facts import Facts

if TYPE_CHECKING:
    from finetune.output.card_examples import Example

PHOTO = "photo.jpg"


def snippets(facts: Facts, repo_id: str, shown: "Sequence[Example]" = ()) -> list[tuple[str, str]]:
    """(title, Python) of each way to use the model. They read an example of the repository, where it has one."""
    if facts.adapter:
        return [_adapter(facts, repo_id, shown)]
    if not facts.plain:
        return [("Its head, or all of it, is a module of its maker's own: give it to `load`.", _own(facts, repo_id))]
    found = [("With transformers:", _pipeline(facts, repo_id, shown))]
    if facts.notes["family"] == "timm":
        found.insert(0, ("With timm:", _timm(facts, repo_id, shown)))
    return found


def _photo(repo_id: str, shown: "Sequence[Example]") -> tuple[str, str]:
    """An image as Python names it, and what to say of it."""
    path = next((each.path for each in shown if each.path), None)
    if path is None:
        return json.dumps(PHOTO), "  # your own"
    return json.dumps(f"https://huggingface.co/{repo_id}/resolve/main/{path}"), ""


def _pipeline(facts: Facts, repo_id: str, shown: "Sequence[Example]") -> str:
    made = f'model = pipeline("{facts.pipeline}", model="{repo_id}")'
    return "\n".join(["from transformers import pipeline", "", made, _call(facts, repo_id, shown)])


def _call(facts: Facts, repo_id: str, shown: "Sequence[Example]") -> str:
    """The line that shows what a pipeline answers."""
    if facts.modality == "image":
        photo, note = _photo(repo_id, shown)
        return f"print(model({photo})){note}"
    text = json.dumps(next((each.text for each in shown if each.single and each.text), "Put your text here."))
    if "text_pair" in facts.data.get("columns", {}):
        return 'print(model({"text": "The first text.", "text_pair": "The second."}))'
    options = {
        "token_classification": ', aggregation_strategy="first"',
        "multi_label_classification": ", top_k=None",
    }.get(facts.kind, "")
    return f"print(model({text}{options}))"


def _timm(facts: Facts, repo_id: str, shown: "Sequence[Example]") -> str:
    made = [
        f'model = timm.create_model("hf-hub:{repo_id}", pretrained=True).eval()',
        "config = timm.data.resolve_model_data_config(model)",
    ]
    imports = ["import timm", "import torch", "from PIL import Image"]
    return _timm_program(facts, repo_id, shown, imports, made, 'model.pretrained_cfg["label_names"]')


def _timm_program(
    facts: Facts, repo_id: str, shown: "Sequence[Example]", imports: list[str], made: list[str], names: str
) -> str:
    """A program on one image, given how it comes by `model` and `config`, and Python for the names of the labels."""
    photo, note = _photo(repo_id, shown)
    opened = [f'image = Image.open({photo}).convert("RGB"){note}']
    if photo.startswith('"http'):
        imports = ["from urllib.request import urlopen\n", *imports]
        opened = [f'image = Image.open(urlopen({photo})).convert("RGB")']
    function = {"multi_label_classification": ".sigmoid()", "regression": ""}.get(facts.kind, ".softmax(-1)")
    return "\n".join([
        *imports,
        "",
        *made,
        "transform = timm.data.create_transform(**config, is_training=False)",
        *opened,
        "with torch.inference_mode():",
        f"    answer = model(transform(image)[None]){function}[0]",
        f"print(dict(zip({names}, answer.tolist())))",
    ])  # fmt: skip


def _adapter(facts: Facts, repo_id: str, shown: "Sequence[Example]") -> tuple[str, str]:
    """(title, Python) that loads an adapter on its backbone."""
    loaded = f'PeftModel.from_pretrained(base, "{repo_id}")'
    family, base = facts.notes["family"], facts.adapter_base or "path/of/the/backbone"
    if family == "timm":
        base = f"hf-hub:{base}" if facts.adapter_base else f"local-dir:{base}"
    base = json.dumps(base)
    if facts.plain:
        program = _adapter_on_timm if family == "timm" else _adapter_on_transformers
        return f"With peft and {family}:", program(facts, repo_id, shown, base, loaded)
    made = {
        "timm": ["import timm", "", f"base = timm.create_model({base}, pretrained=True, num_classes=0)"],
        "transformers": ["from transformers import AutoModel", "", f"base = AutoModel.from_pretrained({base})"],
        "module": ["", "base = ..."],
    }[family]
    title = "Its head, or all of it, is a module of its maker's own; with peft, what lies below the head:"
    return title, "\n".join(["from peft import PeftModel", *made, f"model = {loaded}"])


def _adapter_on_timm(facts: Facts, repo_id: str, shown: "Sequence[Example]", base: str, loaded: str) -> str:
    config = json.loads((facts.folder / "config.json").read_text(encoding="utf-8"))
    arguments = {"num_classes": config["num_classes"], **config.get("model_args", {})}
    given = "".join(f", {name}={value!r}" for name, value in arguments.items())
    imports = ["import json\n", "import timm", "import torch", "from huggingface_hub import hf_hub_download"]
    made = [
        f'about = json.loads(open(hf_hub_download("{repo_id}", "config.json")).read())',
        f"base = timm.create_model({base}, pretrained=True{given})",
        f"model = {loaded}.eval()",
        'config = timm.data.resolve_data_config(pretrained_cfg=about["pretrained_cfg"])',
    ]
    imports += ["from peft import PeftModel", "from PIL import Image"]
    return _timm_program(facts, repo_id, shown, imports, made, 'about["label_names"]')


def _adapter_on_transformers(facts: Facts, repo_id: str, shown: "Sequence[Example]", base: str, loaded: str) -> str:
    auto = {
        "image-classification": "AutoModelForImageClassification",
        "text-classification": "AutoModelForSequenceClassification",
        "token-classification": "AutoModelForTokenClassification",
    }[str(facts.pipeline)]
    image = facts.modality == "image"
    processor, option = ("AutoImageProcessor", "image_processor") if image else ("AutoTokenizer", "tokenizer")
    return "\n".join([
        "from peft import PeftModel",
        f"from transformers import AutoConfig, {', '.join(sorted((auto, processor)))}, pipeline",
        "",
        f'config = AutoConfig.from_pretrained("{repo_id}")  # with the names of the labels',
        f"base = {auto}.from_pretrained({base}, config=config, ignore_mismatched_sizes=True)",
        f"merged = {loaded}.merge_and_unload()",
        f'{option} = {processor}.from_pretrained("{repo_id}")',
        f'model = pipeline("{facts.pipeline}", model=merged, {option}={option})',
        _call(facts, repo_id, shown),
    ])  # fmt: skip


def _own(facts: Facts, repo_id: str) -> str:
    head = facts.notes.get("head")
    own = [f"head={head['class']}"] if head and not head.get("linear") else []
    own += ["module=..."] if facts.notes["family"] == "module" else []
    arguments = "".join(f", {argument}" for argument in own)
    return (
        "import finetune\nfrom huggingface_hub import snapshot_download\n\n"
        f'model = finetune.load(snapshot_download("{repo_id}"){arguments})'
    )

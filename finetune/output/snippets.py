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
    lines = ["from transformers import pipeline", "", f'model = pipeline("{facts.pipeline}", model="{repo_id}")']
    if facts.modality == "image":
        photo, note = _photo(repo_id, shown)
        return "\n".join([*lines, f"print(model({photo})){note}"])
    text = json.dumps(next((each.text for each in shown if each.single and each.text), "Put your text here."))
    if "text_pair" in facts.data.get("columns", {}):
        return "\n".join([*lines, 'print(model({"text": "The first text.", "text_pair": "The second."}))'])
    options = {
        "token_classification": ', aggregation_strategy="first"',
        "multi_label_classification": ", top_k=None",
    }.get(facts.kind, "")
    return "\n".join([*lines, f"print(model({text}{options}))"])


def _timm(facts: Facts, repo_id: str, shown: "Sequence[Example]") -> str:
    photo, note = _photo(repo_id, shown)
    opened = [f'image = Image.open({photo}).convert("RGB"){note}']
    imports = ["import timm", "import torch", "from PIL import Image"]
    if photo.startswith('"http'):
        imports.insert(0, "from urllib.request import urlopen\n")
        opened = [f'image = Image.open(urlopen({photo})).convert("RGB")']
    function = {"multi_label_classification": ".sigmoid()", "regression": ""}.get(facts.kind, ".softmax(-1)")
    return "\n".join([
        *imports,
        "",
        f'model = timm.create_model("hf-hub:{repo_id}", pretrained=True).eval()',
        "config = timm.data.resolve_model_data_config(model)",
        "transform = timm.data.create_transform(**config, is_training=False)",
        *opened,
        "with torch.inference_mode():",
        f"    answer = model(transform(image)[None]){function}[0]",
        'print(dict(zip(model.pretrained_cfg["label_names"], answer.tolist())))',
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

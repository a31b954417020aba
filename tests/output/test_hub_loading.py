"""What was pushed is loaded from the Hub by timm and transformers, in a process without finetune: same logits, labels.

Every kind of task and family of backbones goes through the real clients of the stand-in: `push_to_hub` on one side,
`timm.create_model("hf-hub:…")`, Auto classes, pipelines and the programs of the card on the other.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

from finetune.data.images import eval_transform
from finetune.model.backbones import load_backbone
from finetune.output.export import save_pretrained
from tests.hub_client import Client, hub_environment
from tests.hub_server import Hub
from tests.output.test_export import JOBS, SENTENCE, TEXTS, Case, cases, photo, probabilities, shaken, task  # noqa: F401
from tests.tiny import tokenizer

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TEXT = SMALL | {"vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": 0}
FAMILIES: dict[str, Any] = {
    "roberta": lambda: transformers.RobertaConfig(**TEXT),
    "modernbert": lambda: transformers.ModernBertConfig(
        **TEXT, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3, reference_compile=False
    ),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=96, dim=32, n_layers=2, n_heads=2, hidden_dim=48, max_position_embeddings=64
    ),
    "deberta": lambda: transformers.DebertaV2Config(**TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "dinov2": lambda: transformers.Dinov2Config(**SMALL, image_size=32, patch_size=8, mlp_ratio=2),
    "convnext": lambda: transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=4),
    "swin": lambda: transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4
    ),
}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def pushed(hub: Hub, cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:  # noqa: F811
    """Every case, under its own name on the Hub."""
    root = tmp_path_factory.mktemp("families")
    made = dict(cases)
    for name, config in FAMILIES.items():
        made[name] = family(root, name, config())
    with Client(hub.url, root) as client:
        for name, case in made.items():
            client.value("finetune.output.hub:push_to_hub", case.folder, f"me/{name}")
    for name, case in made.items():
        assert f"me/{name}" in hub.repository(f"me/{name}").files["README.md"].decode(), case
    return made


def family(root: Path, name: str, config: Any) -> Case:
    torch.manual_seed(0)
    if hasattr(config, "vocab_size"):
        of = task("single", "text", "bad", "good", "so so")
        transformers.AutoModel.from_config(config).save_pretrained(root / "from" / name)
        tokenizer().save_pretrained(root / "from" / name)
    else:
        of = task("single", "image", "cat", "dog", "eel")
        config.num_labels = 4
        transformers.AutoModelForImageClassification.from_config(config).save_pretrained(root / "from" / name)
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / "from" / name)
    loaded = shaken(load_backbone(root / "from" / name, of))
    folder = save_pretrained(loaded, of, root / name)
    if of.modality == "image":
        inputs = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    else:
        inputs = dict(loaded.processor(TEXTS, padding=True, return_tensors="pt"))  # type: ignore[operator]
    save_file(inputs, root / f"{name}.inputs")
    return Case(folder, loaded, of, inputs, root / f"{name}.inputs")


def auto_of(case: Case) -> str:
    return "AutoModelForImageClassification" if case.task.modality == "image" else "AutoModelForSequenceClassification"


MORE = [(name, "auto") for name in FAMILIES] + [(name, "pipeline") for name in FAMILIES]
PROGRAMS = [(name, "program") for name in ("vit", "vit96", "resnet", "hf_vit", "single", "multi", "regression", "gpt2")]
PROGRAMS += [("token_classification", "program"), ("roberta", "program")]


@pytest.fixture(scope="module")
def loaded(
    hub: Hub, pushed: dict[str, Case], photo: Path, tmp_path_factory: pytest.TempPathFactory  # noqa: F811
) -> dict[tuple[str, str], Any]:  # fmt: skip
    """What a process without finetune makes of every repository."""
    root, jobs, keys = tmp_path_factory.mktemp("plain"), [], []
    for name, how in [*(job for job in JOBS if job[0] != "bare"), *MORE]:
        case = pushed[name]
        kind = "image-classification" if case.task.modality == "image" else "text-classification"
        real = {"auto": auto_of(case), "pipeline": f"pipeline:{kind}"}.get(how, how)
        text = SENTENCE if "token" in real else TEXTS[0]
        given = str(case.file)
        if real.startswith("pipeline:"):
            given = str(photo) if case.task.modality == "image" else text
        options = {"ignore_labels": []} if "token" in real else {"top_k": 9}
        jobs.append({"folder": f"me/{name}", "how": real, "input": given, "options": options})
        keys.append((name, how))
    for name, how in PROGRAMS:
        card = hub.repository(f"me/{name}").files["README.md"].decode()
        for i, program in enumerate(re.findall(r"```python\n(.*?)\n```", card, re.S)):
            program = program.replace('"photo.jpg"', json.dumps(str(photo))).replace("Put your text here.", TEXTS[0])
            jobs.append({"folder": f"me/{name}", "how": how, "input": program})
            keys.append((name, f"{how} {i}"))
    (root / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-I", str(Path(__file__).with_name("plain_process.py")), str(root / "jobs.json"),
         str(root / "results.json")],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, **hub_environment(hub.url, root / "hf"), "TRANSFORMERS_VERBOSITY": "error"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(keys, json.loads((root / "results.json").read_text()), strict=True))


def test_logits_and_label_names(pushed: dict[str, Case], loaded: dict[tuple[str, str], Any]) -> None:
    compared = 0
    for (name, how), got in loaded.items():
        if "pipe" in how or "program" in how:
            continue
        case = pushed[name]
        # Sums of another process are rounded otherwise: 1.8e-5 of 3.6 has been seen.
        torch.testing.assert_close(torch.tensor(got["logits"]), case.logits, atol=1e-5, rtol=1e-5, msg=f"{name}: {how}")
        assert got["labels"] == list(case.task.labels), name
        compared += 1
    assert compared >= len(FAMILIES) + 12


def expected(case: Case, photo: Path) -> dict[str, float]:  # noqa: F811
    """Label -> probability (or value) of the photo, or the first text, by finetune itself."""
    if case.task.modality == "image":
        inputs = {"pixel_values": eval_transform(case.loaded.processor)(Image.open(photo).convert("RGB"))[None]}  # type: ignore[arg-type]
    else:
        inputs = dict(case.loaded.processor([TEXTS[0]], return_tensors="pt"))  # type: ignore[operator]
    with torch.no_grad():
        found = probabilities(case.task, replace(case, inputs=inputs).logits)[0]
    return dict(zip(case.task.labels, found.tolist(), strict=True))


def test_pipelines(pushed: dict[str, Case], loaded: dict[tuple[str, str], Any], photo: Path) -> None:  # noqa: F811
    compared = 0
    for (name, how), got in loaded.items():
        if "pipe" in how and "token" not in how:
            found = {one["label"]: one["score"] for one in got}
            assert found == pytest.approx(expected(pushed[name], photo), abs=1e-5), (name, how)
            compared += 1
    assert compared >= len(FAMILIES) + 8


def test_the_programs_of_the_card_run(
    pushed: dict[str, Case], loaded: dict[tuple[str, str], Any], photo: Path  # noqa: F811
) -> None:  # fmt: skip
    assert sum("program" in how for _, how in loaded) == len(PROGRAMS) + 3  # timm's have two
    for (name, how), printed in loaded.items():
        if "program" in how and "token" not in name:
            answer, want = eval(printed), expected(pushed[name], photo)
            found = answer if isinstance(answer, dict) else {one["label"]: one["score"] for one in answer}
            assert found and found == pytest.approx({label: want[label] for label in found}, abs=1e-4), (name, how)
            assert max(found, key=lambda label: found[label]) == max(want, key=lambda label: want[label])
    assert all({"entity_group", "word"} <= one.keys() for one in eval(loaded["token_classification", "program 0"]))

"""What is saved loads in timm and transformers, in a process that has no finetune, with equal logits and labels."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification

from finetune.data.images import eval_transform
from finetune.data.task import Task
from finetune.errors import RunError
from finetune.model.backbones import load_backbone
from finetune.model.pretrained import Preprocessing, Pretrained
from finetune.output.export import save_pretrained
from tests.tiny import bert_folder, timm_folder, tokenizer, vit_folder

DATA = Path(os.environ.get("FINETUNE_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
TEXTS = ["a very good film", "bad and dull story"]
SENTENCE = "marie visited paris"


@dataclass
class Case:
    """A saved model, and what it gives here."""

    folder: Path
    loaded: Pretrained
    task: Task
    inputs: dict[str, torch.Tensor]
    file: Path

    @property
    def logits(self) -> torch.Tensor:
        self.loaded.model.eval()
        with torch.no_grad():
            return self.loaded.forward(self.inputs)


def shaken(loaded: Pretrained) -> Pretrained:
    """As if trained: every weight a little elsewhere."""
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
    return loaded


def task(kind: str, modality: str, *labels: str) -> Task:
    return Task(
        {"single": "single_label_classification", "multi": "multi_label_classification"}.get(kind, kind),
        modality,
        labels,
    )


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    root = tmp_path_factory.mktemp("export")
    made: dict[str, Case] = {}

    def add(name: str, loaded: Pretrained, of: Task) -> None:
        if loaded.modality == "image":
            size = loaded.processor.size  # type: ignore[union-attr]
            inputs = {"pixel_values": torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))}
        else:
            inputs = dict(loaded.processor(TEXTS, padding=True, return_tensors="pt"))  # type: ignore[operator]
        folder = save_pretrained(shaken(loaded), of, root / name)
        save_file(inputs, root / f"{name}.inputs")
        made[name] = Case(folder, loaded, of, inputs, root / f"{name}.inputs")

    single = task("single", "image", "cat", "dog", "eel")
    vit = timm_folder(root / "from" / "vit", "test_vit", cfg={"test_input_size": [3, 192, 192], "crop_pct": 0.95})
    add("vit", load_backbone(vit, single), single)
    add(
        "vit96",
        load_backbone(vit, task("multi", "image", "cat", "dog"), image_size=96),
        task("multi", "image", "cat", "dog"),
    )
    resnet = timm_folder(
        root / "from" / "resnet", "test_resnet", cfg={"mean": [0.4, 0.5, 0.6], "interpolation": "bicubic"}
    )
    add(
        "resnet",
        load_backbone(resnet, task("regression", "image", "age"), image_size=64),
        task("regression", "image", "age"),
    )
    same = timm_folder(root / "from" / "same", "mobilenetv2_035", pad_type="same")
    add("same", load_backbone(same, single, image_size=97), single)
    built = timm.create_model("test_vit", num_classes=3, img_size=80, global_pool="avg")
    add("built", load_backbone(built, single), single)
    add("bare", load_backbone(vit, head=lambda features: nn.Linear(features, 2)), single)
    bert = bert_folder(root / "from" / "bert")
    for kind in ("single", "multi", "regression", "token_classification"):
        labels = ("rating",) if kind == "regression" else ("O", "B-place", "B-person")
        add(kind, load_backbone(bert, task(kind, "text", *labels)), task(kind, "text", *labels))
    add("hf_vit", load_backbone(vit_folder(root / "from" / "hf_vit"), single), single)
    GPT2ForSequenceClassification(
        GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=3, eos_token_id=3)
    ).save_pretrained(root / "from" / "gpt2")
    fast = tokenizer()
    fast.eos_token, fast.pad_token = "[SEP]", None
    fast.save_pretrained(root / "from" / "gpt2")
    add(
        "gpt2",
        load_backbone(root / "from" / "gpt2", task("single", "text", "bad", "good")),
        task("single", "text", "bad", "good"),
    )
    return made


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("photo") / "photo.png"
    x = torch.randint(0, 255, (12, 9, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(x.numpy()).resize((210, 150), Image.Resampling.BICUBIC).save(file)
    return file


JOBS = (
    ("vit", "timm"),
    ("vit", "AutoModelForImageClassification"),
    ("vit", "pipeline:image-classification"),
    ("vit96", "timm"),
    ("vit96", "AutoModelForImageClassification"),
    ("vit96", "pipeline:image-classification"),
    ("resnet", "timm"),
    ("resnet", "AutoModelForImageClassification"),
    ("resnet", "pipeline:image-classification"),
    ("same", "timm"),
    ("same", "AutoModelForImageClassification"),
    ("same", "pipeline:image-classification"),
    ("built", "timm"),
    ("built", "AutoModelForImageClassification"),
    ("built", "pipeline:image-classification"),
    ("hf_vit", "AutoModelForImageClassification"),
    ("hf_vit", "pipeline:image-classification"),
    ("single", "AutoModelForSequenceClassification"),
    ("single", "pipeline:text-classification"),
    ("multi", "AutoModelForSequenceClassification"),
    ("multi", "pipeline:text-classification"),
    ("regression", "AutoModelForSequenceClassification"),
    ("regression", "pipeline:text-classification"),
    ("token_classification", "AutoModelForTokenClassification"),
    ("token_classification", "pipeline:token-classification"),
    ("gpt2", "AutoModelForSequenceClassification"),
    ("gpt2", "pipeline:text-classification"),
    ("bare", "AutoModel"),
)


@pytest.fixture(scope="module")
def plain(cases: dict[str, Case], photo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """What a process without finetune makes of every case."""
    jobs = []
    for name, how in JOBS:
        case = cases[name]
        pipe = how.startswith("pipeline:")
        text = SENTENCE if "token" in how else TEXTS[0]
        given = str(case.file) if not pipe else str(photo) if case.task.modality == "image" else text
        folder = case.folder / "backbone" if name == "bare" else case.folder
        options = {"ignore_labels": []} if "token" in how else {"top_k": 9}
        jobs.append({"folder": str(folder), "how": how, "input": given, "options": options})
    root = tmp_path_factory.mktemp("plain")
    (root / "jobs.json").write_text(json.dumps(jobs))
    program = Path(__file__).with_name("plain_process.py")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, "-I", str(program), str(root / "jobs.json"), str(root / "results.json")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(JOBS, json.loads((root / "results.json").read_text()), strict=True))


def probabilities(of: Task, logits: torch.Tensor) -> torch.Tensor:
    return {"multi_label_classification": logits.sigmoid(), "regression": logits}.get(of.kind, logits.softmax(-1))


@pytest.mark.parametrize(
    ("name", "how"), [job for job in JOBS if not job[1].startswith("pipeline:") and job[0] != "bare"]
)
def test_logits_and_labels(cases: dict[str, Case], plain: dict[tuple[str, str], Any], name: str, how: str) -> None:
    case, got = cases[name], plain[name, how]
    torch.testing.assert_close(torch.tensor(got["logits"]), case.logits, atol=1e-5, rtol=1e-5)
    assert got["labels"] == list(case.task.labels)
    if how != "timm":
        assert got["problem_type"] == (None if name == "token_classification" else case.task.kind)


@pytest.mark.parametrize(
    ("name", "how"), [job for job in JOBS if job[1].startswith("pipeline:") and "token" not in job[1]]
)
def test_pipelines(cases: dict[str, Case], plain: dict[tuple[str, str], Any], photo: Path, name: str, how: str) -> None:
    case, got = cases[name], plain[name, how]
    if case.task.modality == "image":
        pixels = eval_transform(case.loaded.processor)(Image.open(photo).convert("RGB"))  # type: ignore[arg-type]
        inputs = {"pixel_values": pixels[None]}
    else:
        inputs = dict(case.loaded.processor([TEXTS[0]], return_tensors="pt"))  # type: ignore[operator]
    with torch.no_grad():
        expected = probabilities(case.task, replace(case, inputs=inputs).logits)[0]
    found = {one["label"]: one["score"] for one in got}
    assert set(found) == set(case.task.labels)
    torch.testing.assert_close(
        torch.tensor([found[label] for label in case.task.labels]), expected, atol=1e-5, rtol=1e-5
    )


def test_token_pipeline(cases: dict[str, Case], plain: dict[tuple[str, str], Any]) -> None:
    case, got = cases["token_classification"], plain["token_classification", "pipeline:token-classification"]
    inputs = dict(case.loaded.processor([SENTENCE], return_tensors="pt"))  # type: ignore[operator]
    expected = replace(case, inputs=inputs).logits.softmax(-1)[0]
    assert len(got) == inputs["input_ids"].shape[1] - 2
    for one in got:
        score, index = expected[one["index"]].max(-1)
        assert one["entity"] == case.task.labels[int(index)] and float(one["score"]) == pytest.approx(
            float(score), abs=1e-5
        )


def test_bare_backbone(cases: dict[str, Case], plain: dict[tuple[str, str], Any]) -> None:
    case = cases["bare"]
    with torch.no_grad():
        expected = case.loaded.model.backbone.forward_features(case.inputs["pixel_values"]).flatten(1)  # type: ignore[operator]
    torch.testing.assert_close(torch.tensor(plain["bare", "AutoModel"]["features"]), expected, atol=1e-5, rtol=1e-5)
    assert {file.name for file in case.folder.iterdir()} == {"backbone", "head.safetensors", "finetune.json"}


def test_the_folder_is_plain(cases: dict[str, Case]) -> None:
    for case in cases.values():
        files = [file for file in case.folder.rglob("*") if file.is_file()]
        assert {file.suffix for file in files} <= {".json", ".safetensors", ".txt", ".jinja"}
        for file in files:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as opened:
                    assert opened.metadata() == {"format": "pt"}
            else:
                assert str(case.folder.parent) not in file.read_text()  # nobody's paths are published
    files = {file.name for file in cases["single"].folder.iterdir()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "finetune.json"}


def test_timm_config_says_what_evaluation_used(cases: dict[str, Case]) -> None:
    config = json.loads((cases["vit96"].folder / "config.json").read_text())
    assert config["model_args"] == {"img_size": [96, 96]}
    assert config["label_names"] == ["cat", "dog"] and config["num_classes"] == 2
    assert config["id2label"] == {"0": "cat", "1": "dog"} and config["label2id"] == {"cat": 0, "dog": 1}
    assert config["problem_type"] == "multi_label_classification"
    cfg = config["pretrained_cfg"]
    assert cfg["input_size"] == [3, 96, 96] and cfg["crop_pct"] == 0.95 and "test_input_size" not in cfg
    same = json.loads((cases["same"].folder / "config.json").read_text())
    assert same["model_args"] == {"pad_type": "same"} and same["pretrained_cfg"]["input_size"] == [3, 97, 97]


def test_notes(cases: dict[str, Case]) -> None:
    notes = json.loads((cases["hf_vit"].folder / "finetune.json").read_text())
    assert notes["schema"] == 1 and notes["family"] == "transformers" and notes["base_model"] is None
    assert notes["task"] == {
        "kind": "single_label_classification",
        "modality": "image",
        "labels": ["cat", "dog", "eel"],
    }
    assert notes["preprocessing"]["by"] == "transformers" and notes["preprocessing"]["size"] == [32, 32]
    assert json.loads((cases["bare"].folder / "finetune.json").read_text())["head"] == {
        "class": "Linear",
        "linear": False,
    }


def test_a_saved_folder_is_a_backbone_again(cases: dict[str, Case]) -> None:
    for name in ("vit", "vit96", "same", "single", "hf_vit"):
        case = cases[name]
        again = load_backbone(case.folder, case.task)
        assert again.new_parameters == frozenset()
        torch.testing.assert_close(replace(case, loaded=again).logits, case.logits, atol=1e-6, rtol=0)
    assert load_backbone(cases["bare"].folder, cases["bare"].task).new_parameters == {"head.weight", "head.bias"}


def test_saving_again_replaces_and_failing_leaves_what_was(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases["vit"]
    folder = save_pretrained(case.loaded, case.task, tmp_path / "model")
    (folder / "old").write_text("gone after the next save")
    save_pretrained(case.loaded, case.task, folder)
    before = sorted(tmp_path.rglob("*"))
    assert not (folder / "old").exists()

    def fails(*args: Any, **options: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("finetune.output.export.save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(case.loaded, case.task, folder)
    assert sorted(tmp_path.rglob("*")) == before


def test_other_folders_are_left_alone(cases: dict[str, Case], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError) as caught:
        save_pretrained(cases["vit"].loaded, cases["vit"].task, tmp_path)
    assert str(caught.value) == f"{tmp_path}: exists and is not a model folder written by finetune; give another folder"
    assert (tmp_path / "thesis.txt").exists()


def test_shared_memory_and_odd_arguments(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(3, 3)
            self.two = nn.Linear(3, 3)
            self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x.mean((2, 3))))

    of = task("single", "image", "cat", "dog", "eel")
    folder = save_pretrained(load_backbone(Tied(), of, processor=Preprocessing((8, 8))), of, tmp_path / "tied")
    with safe_open(folder / "model.safetensors", "pt") as opened:
        assert set(opened.keys()) == {"one.weight", "one.bias", "two.weight", "two.bias"}
    odd = timm.create_model("test_vit", num_classes=3, norm_layer=nn.LayerNorm)
    with pytest.raises(
        RunError, match=r"^config.json: .*is not JSON serializable; build the backbone with plain numbers"
    ):
        save_pretrained(load_backbone(odd, of), of, tmp_path / "odd")
    assert [file.name for file in tmp_path.iterdir()] == ["tied"]


@pytest.mark.data
def test_shared_mobilenet_keeps_its_padding(tmp_path: Path) -> None:
    folder = DATA / "weights" / "mobilenetv2_100_tf"
    if not folder.is_dir():
        pytest.skip(f"no weights at {folder}; set FINETUNE_DATA to the folder of the test data")
    of = task("single", "image", "ant", "bee")
    loaded = load_backbone(folder, of)
    saved = save_pretrained(loaded, of, tmp_path / "m")
    again = timm.create_model(f"local-dir:{saved}", pretrained=True).eval()
    x = torch.randn(2, 3, 224, 224)
    loaded.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(again(x), loaded.model(x), atol=1e-5, rtol=0)

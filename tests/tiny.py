"""Tiny random models, saved as timm and transformers save theirs, for tests without network or weights."""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

WORDS = "the a good bad film was not very dull bright story of and paris visited marie in ##s ##ed ##er ##ing".split()


SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
}  # fmt: skip
TEXT_SIZES: dict[str, Any] = {**SIZES, "vocab_size": 96, "max_position_embeddings": 64}


def timm_folder(
    folder: Path,
    architecture: str,
    *,
    num_classes: int = 5,
    labels: list[str] | None = None,
    cfg: dict[str, Any] | None = None,
    **model_args: Any,
) -> Path:
    """A timm checkpoint with random weights whose batch norms have statistics of their own."""
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=num_classes, **model_args)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    folder.mkdir(parents=True)
    keep = ("input_size", "fixed_input_size", "interpolation", "crop_pct", "mean", "std", "first_conv", "classifier")
    pretrained_cfg = {key: model.pretrained_cfg[key] for key in keep if key in model.pretrained_cfg} | (cfg or {})
    config = {
        "architecture": architecture,
        "num_classes": num_classes,
        "model_args": model_args,
        "pretrained_cfg": pretrained_cfg | {"num_classes": num_classes},
    }
    config |= {"label_names": labels} if labels else {}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """A real WordPiece tokenizer of a few words."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = list("abcdefghijklmnopqrstuvwxyz") + [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {word: i for i, word in enumerate([*special, *dict.fromkeys(WORDS + letters)])}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def bert_config(**options: Any) -> BertConfig:
    return BertConfig(**TEXT_SIZES, **options)


def bert_folder(folder: Path, labels: list[str] | None = None) -> Path:
    """A transformers text encoder: without a classifier, or with one for `labels`."""
    torch.manual_seed(0)
    if labels is None:
        BertModel(bert_config()).save_pretrained(folder)
    else:
        named = dict(enumerate(labels))
        BertForSequenceClassification(bert_config(id2label=named)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def llama_folder(folder: Path) -> Path:
    """A transformers decoder, which answers a sentence at its last token, from a head without a bias."""
    torch.manual_seed(0)
    LlamaModel(LlamaConfig(**TEXT_SIZES, num_key_value_heads=2, pad_token_id=0)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def vit_folder(folder: Path, num_labels: int = 4) -> Path:
    """A transformers vision model with its image processor."""
    torch.manual_seed(0)
    config = ViTConfig(**SIZES, image_size=32, patch_size=8, num_labels=num_labels)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25]
    ).save_pretrained(folder)
    return folder

"""A job goes in; what the peers train comes out: rows, collation, and a pretrained model with a fresh head.

A job is a plain object: data (folder with train and test), modality, backbone (folder), rival, rate, seed, image_size,
out (folder for what the run saves). A batch is ({name: tensor}, labels).
"""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the timm checkpoint
BATCH_SIZE = 16  # that of the transformers examples; for all peers that do not run on their defaults
EPOCHS = {"image": 5, "text": 4}
Collate = Callable[[Sequence[Any]], tuple[dict[str, torch.Tensor], torch.Tensor]]


class Classifier(nn.Module):
    """The inputs of a batch go in, logits come out, whichever library the body is from."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body = body
        head.reset_parameters()  # type: ignore[operator]  # as nn.Linear does: timm starts some heads far too large
        self.head_parameters = list(head.parameters())

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.body(batch["pixel_values"]) if "pixel_values" in batch else self.body(**batch).logits


def load(job: Any, *, smallest_crop: float = 1.0) -> tuple[Classifier, Any, Any, Collate]:
    """Model, training rows, test rows, collation. `smallest_crop` is the least share of an image that is kept."""
    return images(job, smallest_crop) if job.modality == "image" else texts(job)


def images(job: Any, smallest_crop: float) -> tuple[Classifier, Any, Any, Collate]:
    """As in the image classification examples of transformers and torchvision."""
    import timm
    from torchvision import transforms as t
    from torchvision.datasets import ImageFolder

    end = [t.ToTensor(), t.Normalize(MEAN, STD)]
    crop = t.RandomResizedCrop(job.image_size, scale=(smallest_crop, 1.0))
    train = ImageFolder(job.data / "train", t.Compose([crop, t.RandomHorizontalFlip(), *end]))
    middle = [t.Resize(job.image_size), t.CenterCrop(job.image_size)]
    test = ImageFolder(job.data / "test", t.Compose([*middle, *end]))
    model = timm.create_model(f"local-dir:{job.backbone}", pretrained=True, num_classes=len(train.classes))

    def collate(rows: Sequence[Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return {"pixel_values": torch.stack([image for image, _ in rows])}, torch.tensor([label for _, label in rows])

    return Classifier(model, model.get_classifier()), train, test, collate


def texts(job: Any) -> tuple[Classifier, Any, Any, Collate]:
    """As in the text classification example of transformers: cut at the tokenizer's limit, padded by batch."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.backbone)
    parts = [table(job.data / f"{part}.csv") for part in ("train", "test")]
    classes = sorted(set(parts[0][1]))
    rows = []
    for words, labels in parts:
        tokens = tokenizer(words, truncation=True, return_token_type_ids=False)
        columns = zip(tokens["input_ids"], tokens["attention_mask"], labels, strict=True)
        rows.append([{"input_ids": i, "attention_mask": m, "labels": classes.index(label)} for i, m, label in columns])
    model = AutoModelForSequenceClassification.from_pretrained(job.backbone, num_labels=len(classes))

    def collate(rows: Sequence[Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        batch = dict(tokenizer.pad(rows, return_tensors="pt"))
        return batch, batch.pop("labels")

    return Classifier(model, model.classifier), *rows, collate


def table(path: Path) -> tuple[list[str], list[str]]:
    """Texts and labels of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row["text"] for row in rows], [row["label"] for row in rows]


@torch.no_grad()
def accuracy(model: nn.Module, rows: Any, collate: Collate) -> float:
    """Share of rows that are right, in evaluation mode and fp32."""
    training = model.training
    model.eval()
    loader = DataLoader(rows, batch_size=64, collate_fn=collate)
    right = [(model(batch).argmax(1) == labels).float() for batch, labels in loader]
    model.train(training)
    return float(torch.cat(right).mean())


def bf16_pays(job: Any) -> bool:
    """For matrix products on a processor that has it; elsewhere bf16 is slower than fp32."""
    return job.modality == "text" and torch.cpu._is_avx512_bf16_supported()

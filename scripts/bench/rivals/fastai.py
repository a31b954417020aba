"""A job goes in; fastai's `fine_tune` runs: one epoch of the head, four of everything, one-cycle, rates by group.

Images as its documentation has them: `vision_learner` with fastai's own head and its initialisation, presizing,
`aug_transforms`. Texts: a `Learner` around the transformers model, split into body and head;
in fp32, as fastai's mixed precision is for CUDA alone.
"""

from typing import Any

import fastai.callback.schedule  # noqa: F401  # gives Learner its fine_tune
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from torch.utils.data import DataLoader

from . import inputs
from .meter import Meter


def run(job: Any, meter: Meter) -> float:
    """The test split stands where fastai wants a validation part; validations are off the clock."""
    set_seed(job.seed)
    learner = image_learner(job) if job.modality == "image" else text_learner(job)
    validate = learner._do_epoch_validate

    def measured() -> float:
        validate()
        return float(learner.recorder.metrics[0].value)

    learner._do_epoch_validate = lambda: meter.point(measured)
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(4, base_lr=job.rate)
    learner.save("model")
    return meter.curve[-1][2]


def image_learner(job: Any) -> Learner:
    from fastai.vision import all as vision

    block = vision.DataBlock(
        blocks=(vision.ImageBlock, vision.CategoryBlock),
        get_items=vision.get_image_files,
        splitter=vision.GrandparentSplitter("train", "test"),
        get_y=vision.parent_label,
        item_tfms=vision.Resize(job.image_size * 5 // 4),
        batch_tfms=vision.aug_transforms(size=job.image_size, min_scale=0.75),
    )
    loaders = block.dataloaders(job.data, bs=inputs.BATCH_SIZE, num_workers=0)
    return vision.vision_learner(loaders, f"local-dir:{job.backbone}", metrics=accuracy, path=job.out)


def text_learner(job: Any) -> Learner:
    model, train, test, collate = inputs.load(job)

    def split(model: inputs.Classifier) -> list[list[Any]]:
        head = {id(parameter) for parameter in model.head_parameters}
        return [[p for p in model.parameters() if id(p) not in head], model.head_parameters]

    loaders = DataLoaders(
        DataLoader(train, inputs.BATCH_SIZE, shuffle=True, collate_fn=collate), DataLoader(test, 64, collate_fn=collate)
    )
    return Learner(loaders, model, CrossEntropyLossFlat(), splitter=split, metrics=accuracy, path=job.out)

"""A job goes in; AutoGluon's MultiModalPredictor runs on its defaults, told only the backbone and the image size."""

import json
from pathlib import Path
from typing import Any

import pandas
import torch
from autogluon.multimodal import MultiModalPredictor
from safetensors.torch import load_file

from .inputs import table
from .meter import Meter

ONE_PROCESS = {"env.num_gpus": 0, "env.num_workers": 0, "env.num_workers_inference": 0}


def run(job: Any, meter: Meter) -> float:
    """Final test accuracy; the curve is its end alone."""
    if job.modality == "text":
        train, test = (pandas.DataFrame(zip(*table(job.data / f"{part}.csv"), strict=True), columns=["x", "label"])
                       for part in ("train", "test"))  # fmt: skip
        model = {"model.names": ["hf_text"], "model.hf_text.checkpoint_name": str(job.backbone)}
    else:
        train, test = (pandas.DataFrame([(str(p), p.parent.name) for p in sorted((job.data / part).glob("*/*"))],
                                        columns=["x", "label"]) for part in ("train", "test"))  # fmt: skip
        with meter.pause():
            folder = as_autogluon_reads(job.backbone, job.out / "backbone")
        model = {"model.names": ["timm_image"], "model.timm_image.checkpoint_name": str(folder),
                 "model.timm_image.image_size": job.image_size}  # fmt: skip
    predictor = MultiModalPredictor(label="label", path=str(job.out / "run"))
    predictor.fit(train, hyperparameters=model | ONE_PROCESS, seed=job.seed)
    meter.point(lambda: float(predictor.evaluate(test, metrics=["accuracy"])["accuracy"]))
    return meter.curve[-1][2]


def as_autogluon_reads(backbone: Path, folder: Path) -> Path:
    """The timm checkpoint as a pickle in fp32, and without its classifier: what AutoGluon takes from a folder."""
    folder.mkdir()
    config = json.loads((backbone / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    classifier = config["pretrained_cfg"]["classifier"]
    weights = load_file(backbone / "model.safetensors")
    kept = {name: tensor.float() for name, tensor in weights.items() if not name.startswith(classifier)}
    torch.save(kept, folder / "pytorch_model.bin")
    return folder

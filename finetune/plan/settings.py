"""Size of the data, task and backbone go in; every dial with its value, its reason and who set it comes out.

The fixed defaults stand in one table, `DEFAULTS`, each with its source. None means that the toolkit decides; a value
that the user gives always wins and is marked as theirs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from finetune.errors import PlanError
from finetune.plan.onecycle import OneCycle
from finetune.plan.stages import Plan, Unfreezing, gradual_unfreezing

# name: {modality: (value, source)}. The rates are for AdamW.
DEFAULTS: dict[str, dict[str, tuple[Any, str]]] = {
    "lr": {
        "image": (1e-3, "fastai fine_tune: 2e-3, halved once the body opens"),
        "text": (2e-4, "BERT's 2e-5 to 5e-5 for the body (Devlin et al. 2019), ten times that for the head"),
    },
    "span": {
        "image": (100.0, "fastai fine_tune: lr_mult=100; other published spans run from 10 to 200 (BEiT 176)"),
        "text": (10.0, "published spans from head to stem run from 10 to 200 (ULMFiT 18, ELECTRA 12 to 24)"),
    },
    "head_lr": {
        "image": (5e-3, "a new linear layer on frozen features bears ten times the body's rate (SetFit: 1e-2)"),
        "text": (5e-3, "a new linear layer on frozen features bears ten times the body's rate (SetFit: 1e-2)"),
    },
    "weight_decay": {
        "image": (0.01, "fastai's AdamW; next to nothing in a short fine-tuning, where sum(lr) * decay < 0.05"),
        "text": (0.01, "ELECTRA, Mosbach et al. 2021"),
    },
    "betas": {
        "image": ((0.9, 0.99), "fastai's Adam; beta1 is cycled from 0.95 to 0.85 and back (Smith 2018)"),
        "text": ((0.9, 0.99), "ULMFiT and fastai: a short memory for short runs; beta1 is cycled"),
    },
    "eps": {
        "image": (1e-8, "AdamW as published, with bias correction (Zhang et al. 2021)"),
        "text": (1e-8, "AdamW as published, with bias correction (Zhang et al. 2021)"),
    },
    "clip": {
        "image": (1.0, "gradient norm, as transformers and AutoGluon do"),
        "text": (1.0, "gradient norm, as transformers and AutoGluon do"),
    },
    "freeze_batchnorm": {
        "image": (True, "statistics of the pretraining are kept: batches are small (BiT and detection practice)"),
        "text": (True, "text encoders have none"),
    },
    "pct_start": {
        "image": (0.3, "fastai fine_tune"),
        "text": (0.1, "ULMFiT's slanted triangle and BERT's warm-up"),
    },
    "div_factor": {
        "image": (25.0, "OneCycleLR and fastai"),
        "text": (25.0, "OneCycleLR and fastai"),
    },
    "ema": {
        "image": (True, "weights averaged over the end of the last stage, kept only where validation prefers them"),
        "text": (True, "weights averaged over the end of the last stage, kept only where validation prefers them"),
    },
    "augment": {
        "image": ("default", "random crops of a third of the area or more, and flips (ImageNet practice)"),
        "text": ("none", "texts are taken as they are"),
    },
    "unfreezing": {
        "image": ("head_then_all", "fastai fine_tune"),
        "text": ("head_then_all", "ULMFiT's gain from one group at a time is within its noise (Table 7)"),
    },
}

# Where the head is solved, it needs no high rate, and bears none.
SOLVED: dict[str, dict[str, tuple[Any, str]]] = {
    "unfreezing": {
        "image": ("head_then_all", "the head is solved, then everything trains"),
        "text": ("all_but_stem", "the table of embeddings is a fifth of a step and changes next to nothing"),
    },
    "span": {
        "image": (2.0, "from a solved head it is the body that needs the rate: spans of 10 and more were worse"),
        "text": (10.0, "published spans from head to stem run from 10 to 200 (ULMFiT 18, ELECTRA 12 to 24)"),
    },
}

# 100 digits on the fractal backbone: 10 epochs, 50 steps, 0.706; 25 epochs, 125 steps, 0.837 (test of 1,697, one seed).
# BiT's rule gives even the smallest set 500 steps.
FEWEST_STEPS, MOST_EPOCHS = 125, 30
PATIENT_ROWS = 700  # 50 digits from scratch, 10 of them to validate: cut short 0.73, whole 0.82
SOLVED_SHARE = 0.4  # of the epochs, where they need not teach the head
# Of a cycle. 68 steps took the 12 intents to 0.73, 125 and more to 0.79; two cycles of 102 to 0.747, of 136 to 0.774
# (two seeds each).
SOLVED_STEPS = {"image": 60, "text": FEWEST_STEPS}
# The peak rate that a network bears falls with its width and depth: ELECTRA's are 3e-4, 1e-4 and 5e-5 at widths of 256,
# 768 and 1,024 (Clark et al. 2020, table 7). The constant is from 200 rows and two cycles, test accuracy (one or two
# seeds): MobileNetV2 (1,280 wide, 19 groups) is best at 1e-4, at 3e-4 it loses what the head had; MiniLM (384, 8) at
# 1e-3 against 3e-4: sts .496, .416; trec6 80.2, 78.0; cr 83.8, 82.8; sst2 73.2, 74.5; the fractals (192, 6) at 7e-4
# against 1e-4: cifar10_small 38.1, 35.9; a Llama (64, 7) at 1e-3 against 2e-4: trec6 53.9, 44.6, and at 3e-3 49.5.
# It with 1,000 rows, its head solved: at 3e-4 trec6 (three seeds) 67.1, cr 68.5, sst2 57.5; at 1e-3 68.8, 68.8, 56.8.
RATE_BY_SHAPE, HIGHEST_RATE = 3.0, 1e-3
LONGER = 0.3  # of that rate where texts are many and steps too
# Of the rate of all weights in a long run ("LoRA Without Regret", Schulman et al. 2025). Rank 8, MiniLM, 300 rows of
# trec6 and of cr, two seeds, times 3e-4: x1 62.5 and 79.1, x3 85.3 and 81.8, x10 86.8 and 85.4, x30 82.4 and 80.9; all
# weights 87.0 and 83.4.
LORA_RATE = 10.0
# Two trainings from the same solved head, their ends averaged, instead of one as long; 200 rows, test accuracy and
# log-loss at the best temperature (one seed): trec6 2 x 12 epochs 79.5, .76, 1 x 24 78.5, .91; 2 x 8 78.5, .64; cr
# 2 x 8 83.2, .45, 1 x 24 82.5, .60; cifar10_small 2 x 6 64.0, 1.07, 1 x 12 61.5, 1.16.
CYCLES = 2
# A run of 1,000 rows may go on, while that helps, up to the fewest steps that BiT's rule gives any set (Kolesnikov et
# al. 2020); the figures are in `train.lengthening`.
LONGEST_STEPS = 500


@dataclass(frozen=True)
class Settings:
    """Every dial of a run.

    Attributes:
        lr: Peak learning rate of the head once the body is open.
        span: `lr` over the stem's peak rate; groups between decay geometrically.
        head_lr: Peak rate of the stage in which the head trains alone.
        weight_decay: AdamW's, decoupled; none on norms, biases and what the model exempts.
        betas: Adam's; the first is cycled against the rate by the plan's shape.
        eps: Adam's epsilon.
        batch_size: Examples an optimizer step, over all processes.
        accumulation: Micro-batches that make up one optimizer step on each process.
        epochs: Passes over the training rows, all stages together.
        head_epochs: Of these, passes with the head alone.
        cycles: Trainings from the same start that share the other epochs; the average of their ends is kept.
        doublings: Times that training may go on for as long as all of it so far, while validation gains by that.
        clip: Largest gradient norm; 0 switches clipping off.
        freeze_batchnorm: Keep the statistics of pretrained BatchNorm layers.
        pct_start: Share of a stage spent climbing.
        div_factor: Peak rate over first rate.
        ema: Also try averaged weights at the end.
        calibrate: Fold the temperature that suits the validation rows into the head.
        balance: Weigh all classes alike, however many rows they have, see `finetune.train.balance`.
        unfreezing: Named plan, see `gradual_unfreezing`.
        lora: Rank of the adapters that train in place of the body's weights, see `finetune.model.lora`; 0: none.
        augment: "default": random crops and horizontal flips of training images; "none": as they are, which is also
            chosen where such views mislead the solved head, see `finetune.train.views`.
        precision: "fp32" or "bf16" (autocast).
        solve_head: Start from the optimal linear head on the frozen features, in place of a stage for the head.
        patience: Validations in a row without a gain after which a stage is brought to its end in one epoch; 0: never.
        replay: What crosses from frozen groups is computed once and kept: "auto" as computed, "bf16" in half the
            space, "off" not at all.
        replay_views: Augmented views of each training image that are kept.
        replay_memory: Share of the free memory that it may take; what needs more goes to the disk.
        reasons: Dial -> (reason, "user" | "measured" | "rule").
    """

    lr: float
    span: float
    head_lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    batch_size: int
    accumulation: int
    epochs: float
    head_epochs: float
    cycles: int
    doublings: int
    clip: float
    freeze_batchnorm: bool
    pct_start: float
    div_factor: float
    ema: bool
    calibrate: bool
    balance: bool
    augment: Literal["default", "none"]
    unfreezing: Unfreezing
    lora: int
    precision: str
    solve_head: bool
    patience: int
    replay: Literal["auto", "bf16", "off"]
    replay_views: int
    replay_memory: float
    reasons: Mapping[str, tuple[str, str]]

    def __post_init__(self) -> None:
        for name in ("lr", "head_lr", "eps", "epochs"):
            if not getattr(self, name) > 0:
                raise PlanError(f"{name}={getattr(self, name)}: must be above 0")
        for name in ("batch_size", "accumulation", "cycles", "replay_views"):
            if getattr(self, name) < 1 or getattr(self, name) != int(getattr(self, name)):
                raise PlanError(f"{name}={getattr(self, name)}: must be a whole number of at least 1")
        for name in ("weight_decay", "clip", "head_epochs", "patience"):
            if getattr(self, name) < 0:
                raise PlanError(f"{name}={getattr(self, name)}: must not be below 0")
        if self.doublings < 0 or self.doublings != int(self.doublings):
            raise PlanError(f"doublings={self.doublings}: must be a whole number, or 0 for none")
        if self.doublings and self.cycles > 1:
            raise PlanError(f"doublings={self.doublings}: of a single training; give cycles=1 too, or leave it out")
        if not isinstance(self.lora, int) or self.lora < 0:
            raise PlanError(f"lora={self.lora}: must be the rank of the adapters, a whole number, or 0 for none")
        if self.lora and not self.freeze_batchnorm:
            raise PlanError("freeze_batchnorm=False: an adapter holds no statistics; leave it, or lora, out")
        if self.span < 1:
            raise PlanError(f"span={self.span}: the head's rate over the stem's must be at least 1")
        if self.precision not in ("fp32", "bf16"):
            raise PlanError(f"precision={self.precision!r}: must be 'fp32' or 'bf16'")
        if self.augment not in ("default", "none"):
            raise PlanError(f"augment={self.augment!r}: must be 'default' or 'none'")
        if self.replay not in ("auto", "bf16", "off"):
            raise PlanError(f"replay={self.replay!r}: must be 'auto', 'bf16' or 'off'")
        if not 0 <= self.replay_memory <= 1:
            raise PlanError(f"replay_memory={self.replay_memory}: must be a share of the free memory, from 0 to 1")
        if self.accumulation > self.batch_size:
            raise PlanError(
                f"accumulation={self.accumulation}: more micro-batches than the {self.batch_size} examples of a step"
            )

    def default_plan(self, groups: int) -> Plan:
        """The stages that these settings name, for `groups` layer groups."""
        shape = OneCycle(pct_start=self.pct_start, div_factor=self.div_factor)
        return gradual_unfreezing(
            groups,
            self.epochs,
            style=self.unfreezing,
            head_epochs=self.head_epochs,
            shape=shape,
            head_lr_scale=self.head_lr / self.lr,
            cycles=self.cycles,
        )

    def changed(self, reason: str, by: str = "measured", **values: Any) -> "Settings":
        """A copy with some dials set anew and why."""
        return replace(self, **values, reasons={**self.reasons, **{name: (reason, by) for name in values}})

    def table(self) -> dict[str, dict[str, Any]]:
        """{dial: {"value", "reason", "by"}}, for `run.json` and reports."""
        return {
            name: {"value": getattr(self, name), "reason": reason, "by": by}
            for name, (reason, by) in self.reasons.items()
        }

    def __str__(self) -> str:
        rows = [
            (
                name,
                f"{entry['value']:g}" if isinstance(entry["value"], float) else str(entry["value"]),
                entry["by"],
                entry["reason"],
            )
            for name, entry in self.table().items()
        ]
        return "\n".join(f"{name:<17} {value:<14} {by:<9} {reason}" for name, value, by, reason in rows)


DIALS = tuple(field.name for field in fields(Settings) if field.name != "reasons")
OPTIONS = {"lr": "--lr", "epochs": "--epochs", "batch_size": "--batch-size"}  # dials that have one on the command line


def choose_settings(
    modality: str,
    rows: int,
    *,
    precision: tuple[str, str] = ("fp32", "the processor's native precision"),
    given: Mapping[str, Any] | None = None,
) -> Settings:
    """Settings for `rows` training examples of a modality ("image", "text"); what is `given` (not None) is taken as
    it is.

    Raises:
        PlanError: A dial that does not exist, or a value outside its range.
    """
    given = {name: value for name, value in (given or {}).items() if value is not None}
    unknown = sorted(set(given) - set(DIALS))
    if unknown:
        raise PlanError(f"settings: no dial named {', '.join(unknown)}; there are {', '.join(DIALS)}")
    endless = next((name for name, value in given.items() if isinstance(value, float) and math.isinf(value)), None)
    if endless is not None:
        raise PlanError(f"{endless}={given[endless]}: must be a finite number")
    rows = max(1, rows)
    chosen = {name: (*by_modality[modality], "rule") for name, by_modality in DEFAULTS.items()}
    batch = _batch_size(rows)
    epochs = _epochs(rows, int(given.get("batch_size", batch)))
    total = float(given.get("epochs", epochs))
    chosen |= {
        "batch_size": (batch, f"{rows} rows: about 16 steps an epoch or more, between 16 and 32", "rule"),
        "accumulation": (1, "a step fits into memory at once", "rule"),
        "epochs": (
            epochs,
            f"{rows} rows: 150 / sqrt(rows), between 3 and 10, or more for {FEWEST_STEPS} steps",
            "rule",
        ),
        "head_epochs": (
            max(1.0, round(total / 4.0)) if total >= 2.0 else total / 2.0,
            "a quarter of the epochs, the rest for all groups",
            "rule",
        ),
        "cycles": (1, "one training", "rule"),
        "doublings": (0, "training has the length that was planned", "rule"),
        "lora": (0, "all weights train: adapters were level with them, and no faster", "rule"),
        "precision": (*precision, "rule"),
        "calibrate": (
            True,
            "probabilities as the validation rows have them (Guo et al. 2017); no answer changes",
            "rule",
        ),
        "balance": (
            False,
            "classes count as often as they occur; where they are uneven, the run says what weighing them alike does",
            "rule",
        ),
        "solve_head": (True, "a linear head on frozen features has an optimum: no rate, no epochs", "rule"),
        "patience": (
            (2, "two validations without a gain in score or loss, past the middle of a stage", "rule")
            if rows >= PATIENT_ROWS
            else (
                0,
                f"fewer than {PATIENT_ROWS} rows: the validation part is too small to tell when it is enough",
                "rule",
            )
        ),
        "replay": ("auto", "what does not change is computed once", "rule"),
        "replay_views": (3, "three random crops of each image", "rule"),
        "replay_memory": (0.25, "a quarter of the free memory; the rest goes to the disk", "rule"),
    }
    chosen |= {name: (value, "given by the user", "user") for name, value in given.items()}
    if "lr" in given and "head_lr" not in given:
        ratio = DEFAULTS["head_lr"][modality][0] / DEFAULTS["lr"][modality][0]
        chosen["head_lr"] = (given["lr"] * ratio, f"{ratio:g} times the given lr", "rule")
    values = {name: chosen[name][0] for name in DIALS}
    return Settings(**values, reasons={name: chosen[name][1:] for name in DIALS})


def for_network(settings: Settings, modality: str, rows: int, *, width: int, groups: int) -> Settings:
    """The settings for a network of this shape, its adapters if there are any; what the user gave stays.

    The peak rate of texts, and of images whose head is solved, is 3 / (width x groups), 1e-3 at most.

    Args:
        settings: After `from_solved_head`, where that is called.
        modality: "image" or "text".
        rows: Training examples.
        width: Features that enter the head.
        groups: Layer groups, the head among them.
    """
    if settings.lora > 0 and settings.cycles > 1 and settings.reasons["cycles"][1] != "user":
        reason = "adapters: the average of two products is not the product of the averages"
        settings = settings.changed(reason, by="rule", cycles=1, epochs=settings.epochs / settings.cycles)
    if settings.reasons["lr"][1] == "user":
        return settings
    if modality == "text" or settings.solve_head:
        rate, formula = RATE_BY_SHAPE / (width * groups), f"{RATE_BY_SHAPE:g} / (width x groups)"
        adapted = modality == "text" and settings.lora > 0
        if modality == "text" and rows >= PATIENT_ROWS and not adapted:
            rate, formula = LONGER * rate, f"{LONGER:g} x {formula} in a long run"
        rate = min(HIGHEST_RATE, rate) * (LONGER if adapted else 1.0)
        reason = f"{groups} layer groups, {width} wide: {formula}, {HIGHEST_RATE:g} at most"
        reason += f"; {LONGER:g} of it, as in a long run" if adapted else ""
        settings = settings.changed(reason, by="rule", lr=rate)
    if settings.lora > 0:
        reason = f"adapters bear {LORA_RATE:g} times the rate of all weights, which is {settings.lr:.2g} here"
        settings = settings.changed(reason, by="rule", lr=LORA_RATE * settings.lr)
    return settings


def from_solved_head(settings: Settings, modality: str, rows: int, *, planned: bool = False) -> Settings:
    """The settings for a run that begins with a solved head; what the user gave stays. With stages of the user's own
    (`planned`), only the span of the rates follows from the head."""

    def free(name: str) -> bool:
        return settings.reasons[name][1] != "user"

    for name, by_modality in SOLVED.items():
        if planned and name != "span":
            continue
        if free(name) and (free("lr") or name == "unfreezing"):
            value, reason = by_modality[modality]
            settings = settings.changed(reason, by="rule", **{name: value})
    if planned:
        return settings
    if free("epochs"):
        if free("cycles") and rows < PATIENT_ROWS and not settings.doublings:
            reason = f"{rows} rows: twice from the solved head; the average of both ends is steadier than either"
            settings = settings.changed(reason, by="rule", cycles=CYCLES)
        by_steps = math.ceil(SOLVED_STEPS[modality] * settings.batch_size / max(1, rows))
        epochs = float(max(3, round(SOLVED_SHARE * settings.epochs), min(MOST_EPOCHS, by_steps)))
        settings = settings.changed(f"{rows} rows, and a head that is solved: 3 a cycle or more",
                                    by="rule", epochs=settings.cycles * epochs)  # fmt: skip
    return settings.changed("none: the head is solved", by="rule", head_epochs=0.0)


def open_ended(settings: Settings, rows: int) -> Settings:
    """The settings for a run whose length is nobody's wish: validation may make it longer.

    Args:
        settings: After `for_network`.
        rows: Training examples.
    """
    if any(settings.reasons[dial][1] == "user" for dial in ("epochs", "doublings")) or settings.cycles > 1:
        return settings
    if rows < PATIENT_ROWS:
        return settings.changed(
            f"fewer than {PATIENT_ROWS} rows: the validation part is too small to tell", by="rule", doublings=0
        )
    steps = settings.epochs * rows / settings.batch_size
    doublings = max(0, int(math.log2(LONGEST_STEPS / steps)))
    reason = f"{steps:.0f} steps; as long again while validation gains by it, up to {LONGEST_STEPS} steps"
    return settings.changed(reason, by="rule", doublings=doublings)


def _batch_size(rows: int) -> int:
    return 2 ** int(math.log2(min(32, max(16, rows / 16))))


def _epochs(rows: int, batch_size: int) -> float:
    by_rows = min(10, max(3, round(150 / math.sqrt(rows))))
    by_steps = min(MOST_EPOCHS, math.ceil(FEWEST_STEPS * batch_size / rows))
    return float(max(by_rows, by_steps))

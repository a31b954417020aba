"""Random seeds in, a small pretrained vision backbone out: no photograph, no download, only formulas.

    python scripts/pretrain_fractals.py --epochs 26 --out finetune/assets/fractals

The classes are iterated function systems: a few random affine maps, kept when the points that they attract fill enough
of the picture (Kataoka et al. 2020, "Pre-training without Natural Images", FractalDB). The pictures of a class vary
the coefficients and the stamp drawn at every point; training varies direction, crop, thickness, colours, background
and resolution. What is written is a folder in timm's own format, weights in half precision:
`timm.create_model("local-dir:finetune/assets/fractals", pretrained=True)`.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

ARCHITECTURE = "resnet10t"
MODEL_ARGS: dict[str, Any] = {"channels": [32, 64, 128, 192], "stem_width": 16}  # 0.9 M weights, 1.8 MB as float16
DRAWN, SEEN, EARLY = 72, 64, 48  # pixels a side: of the cached drawings, of the views, of those of the first epochs
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
BURN_IN = 15  # steps of the chaos game before its points are drawn


# --- drawing ----------------------------------------------------------------------------------------------------------


def chaos_game(maps_SM6: np.ndarray, rng: np.random.Generator, walkers: int, steps: int) -> np.ndarray:
    """Play the chaos game for S systems of M affine maps at once; float32 points [S, walkers * steps, 2].

    A map (a, b, c, d, e, f) sends (x, y) to (ax + by + e, cx + dy + f) and is drawn with a chance proportional to
    |ad - bc|. Maps that are all zero are never drawn, which is how systems of fewer than M maps are stored.
    """
    systems = len(maps_SM6)
    a, b, c, d = (maps_SM6[..., i] for i in range(4))
    area_SM = np.abs(a * d - b * c) + np.where(np.any(maps_SM6 != 0, axis=-1), 1e-3, 0.0)
    cumulative_SM = np.cumsum(area_SM / area_SM.sum(1, keepdims=True), axis=1)
    points_SW2 = np.zeros((systems, walkers, 2), np.float32)
    row_S1 = np.arange(systems)[:, None]
    kept = []
    with np.errstate(over="ignore", invalid="ignore"):
        for step in range(BURN_IN + steps):
            draw_SW = rng.random((systems, walkers), np.float32)
            which_SW = (draw_SW[..., None] > cumulative_SM[:, None, :-1]).sum(-1)
            m = maps_SM6[row_S1, which_SW]
            x, y = points_SW2[..., 0], points_SW2[..., 1]
            points_SW2 = np.stack(
                [m[..., 0] * x + m[..., 1] * y + m[..., 4], m[..., 2] * x + m[..., 3] * y + m[..., 5]], axis=-1
            )
            if step >= BURN_IN:
                kept.append(points_SW2)
    return np.concatenate(kept, axis=1)


def rasterise(points_SP2: np.ndarray, side: int, stamps_S33: np.ndarray | None = None) -> np.ndarray:
    """Points [S, P, 2] -> uint8 pictures [S, side, side]: from 0 without a point to 255 where they are dense.

    Each figure is fitted to the frame, the outermost hundredth of the points aside; a 3x3 stamp thickens its points.
    Systems that run away to infinity come out empty.
    """
    systems = len(points_SP2)
    finite_S = np.isfinite(points_SP2).all(axis=(1, 2)) & (np.abs(np.nan_to_num(points_SP2)).max(axis=(1, 2)) < 1e4)
    points = np.where(finite_S[:, None, None], points_SP2, 0)
    sample = np.sort(points[:, ::7], axis=1)  # every seventh point is enough to find the frame
    cut = sample.shape[1] // 100
    low, high = sample[:, None, cut], sample[:, None, -1 - cut]
    scale = np.maximum((high - low).max(axis=2, keepdims=True), 1e-6)
    margin = 3
    cells = ((points - (low + high) / 2) / scale + 0.5) * (side - 1 - 2 * margin) + margin
    cells = np.clip(np.rint(cells), 0, side - 1).astype(np.int64)
    index = (np.arange(systems)[:, None] * side + cells[..., 1]) * side + cells[..., 0]
    counts = np.bincount(index.ravel(), minlength=systems * side * side).reshape(systems, side, side)
    counts[:, [0, -1]] = 0  # where the points outside the frame were clipped to
    counts[:, :, [0, -1]] = 0
    counts[~finite_S] = 0
    share = np.log1p(counts) / np.log1p(np.maximum(counts.max(axis=(1, 2), keepdims=True), 1))
    pictures = np.where(counts > 0, 55 + 200 * share, 0).astype(np.uint8)
    if stamps_S33 is not None:
        stamped = np.zeros_like(pictures)
        for i in range(3):
            for j in range(3):
                shifted = np.roll(pictures, (i - 1, j - 1), axis=(1, 2))  # nothing wraps: the border is empty
                stamped = np.maximum(stamped, shifted * stamps_S33[:, i, j][:, None, None])
        pictures = stamped
    return pictures


def outline(filled_SHW: np.ndarray) -> np.ndarray:
    """Share of the filled cells [S, H, W] that touch an empty one, [S]: low for a blob, high for branches."""
    inner = filled_SHW[:, 1:-1, 1:-1].copy()
    for i, j in ((0, 1), (2, 1), (1, 0), (1, 2)):
        inner &= filled_SHW[:, i : i + inner.shape[1], j : j + inner.shape[2]]
    return 1 - inner.sum((1, 2)) / np.maximum(filled_SHW.sum((1, 2)), 1)


def find_classes(count: int, rng: np.random.Generator) -> np.ndarray:
    """Random systems of 2 to 6 maps [count, 6, 6], kept when they cover 12 to 60 % of the picture with much outline.

    At this resolution covering alone, which is the test of FractalDB, lets through mostly round blobs.
    """
    found: list[np.ndarray] = []
    while len(found) < count:
        maps = rng.uniform(-1, 1, (512, 6, 6)).astype(np.float32)
        maps *= (np.arange(6)[None] < rng.integers(2, 7, (512, 1)))[..., None]
        filled = rasterise(chaos_game(maps, rng, 64, 60), 48) > 0
        covered = filled.mean((1, 2))
        found.extend(maps[(covered > 0.12) & (covered < 0.6) & (outline(filled) > 0.4)])
    return np.stack(found[:count])


def draw_class(maps_M6: np.ndarray, images: int, rng: np.random.Generator) -> np.ndarray:
    """Variations of one system [M, 6] as pictures [images, DRAWN, DRAWN]: a coefficient is weighted, a stamp drawn."""
    variations = np.repeat(maps_M6[None], images, axis=0)
    which = rng.integers(0, 6, images)
    variations[np.arange(images), :, which] *= rng.uniform(0.8, 1.2, (images, 1)).astype(np.float32)
    points = chaos_game(variations, rng, 128, 30)
    points = points[:, : int(points.shape[1] * rng.uniform(0.5, 1.0))]
    stamps = rng.random((images, 3, 3)) < rng.uniform(0.15, 0.8, (images, 1, 1))
    stamps[:, 1, 1] = True
    pictures = rasterise(points, DRAWN, stamps)
    empty = pictures.max((1, 2)) == 0  # a variation that runs away: keep the system as it is
    if empty.any():
        pictures[empty] = rasterise(chaos_game(np.repeat(maps_M6[None], empty.sum(), 0), rng, 128, 30), DRAWN)
    return pictures


def drawings(classes: int, images: int, seed: int, folder: Path) -> np.ndarray:
    """All pictures as a memory map [classes, images, DRAWN, DRAWN] of uint8, drawn on the first call and kept."""
    path = folder / f"drawings-{classes}x{images}-{DRAWN}px-seed{seed}.npy"
    if not path.exists():
        start = time.time()
        folder.mkdir(parents=True, exist_ok=True)
        systems = find_classes(classes, np.random.default_rng(seed))
        print(f"{classes} systems found in {time.time() - start:.0f} s", flush=True)
        part = path.with_suffix(".part")
        store = np.lib.format.open_memmap(part, "w+", np.uint8, (classes, images, DRAWN, DRAWN))
        for label, maps in enumerate(systems):
            store[label] = draw_class(maps, images, np.random.default_rng((seed, label)))
        store.flush()
        part.rename(path)
        print(f"{classes * images} pictures drawn in {time.time() - start:.0f} s", flush=True)
    return np.load(path, mmap_mode="r")


# --- views ------------------------------------------------------------------------------------------------------------


def uniform(g: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=g) * (high - low) + low


def chance(g: torch.Generator, p: float, batch: int) -> Tensor:
    return (torch.rand(batch, 1, 1, 1, generator=g) < p).float()


def views(pictures_BHW: Tensor, g: torch.Generator, side: int = SEEN) -> Tensor:
    """Random views of drawings, uint8 [B, H, W] -> normalised float [B, 3, side, side]."""
    batch = len(pictures_BHW)
    density = pictures_BHW[:, None].float() / 255
    flat = chance(g, 0.5, batch)  # half of them with every point alike
    mask = torch.maximum(density, flat * (density > 0))
    # geometry: turn, mirror, crop or shrink (a factor below 1 looks closer), stretch, shift
    angle = uniform(g, -math.pi / 6, math.pi / 6, batch)
    scale = torch.exp(uniform(g, math.log(0.6), math.log(1.3), batch))
    stretch = torch.exp(uniform(g, -0.25, 0.25, batch))
    mirror = torch.where(torch.rand(batch, generator=g) < 0.5, -1.0, 1.0)
    room = (1.05 - scale).abs()
    shift = uniform(g, -1, 1, batch, 2) * room[:, None]
    theta = torch.stack(
        [
            torch.stack([mirror * angle.cos() * scale * stretch, -angle.sin() * scale, shift[:, 0]], 1),
            torch.stack([mirror * angle.sin() * scale, angle.cos() * scale / stretch, shift[:, 1]], 1),
        ],
        1,
    )
    mask = F.grid_sample(mask, F.affine_grid(theta, [batch, 1, side, side], False), "bilinear", "zeros", False)

    # strokes: thicker, blurred, or at a half or a quarter of the resolution, each for some of the pictures
    def some(p: float, change: Callable[[Tensor], Tensor]) -> None:
        rows = (torch.rand(batch, generator=g) < p).nonzero()[:, 0]
        if len(rows):
            mask[rows] = change(mask[rows])

    some(0.4, lambda m: F.max_pool2d(m, 3, 1, 1))
    some(0.3, lambda m: F.avg_pool2d(m, 3, 1, 1))
    some(0.15, lambda m: F.interpolate(F.avg_pool2d(m, 2), size=side, mode="bilinear"))
    some(0.15, lambda m: F.interpolate(F.avg_pool2d(m, 4), size=side, mode="bilinear"))
    # colours: figure against ground, in grey or in colour, either the brighter; smooth texture on both
    grey = chance(g, 0.5, batch)[:, :, 0, 0]
    ground, figure = uniform(g, 0, 1, batch, 3), uniform(g, 0, 1, batch, 3)
    ground = grey * ground[:, :1] + (1 - grey) * ground
    figure = grey * figure[:, :1] + (1 - grey) * figure
    gap = (figure - ground).mean(1, keepdim=True)
    figure = figure + torch.where(gap < 0, -1.0, 1.0) * (0.4 - gap.abs()).clamp(min=0)  # else there is nothing to see
    plain = chance(g, 0.3, batch)[:, :, 0, 0]  # white on black
    ground, figure = ground * (1 - plain), figure * (1 - plain) + plain
    texture = torch.randn(batch, 3, 8, 8, generator=g) * uniform(g, 0, 0.12, batch, 1, 1, 1)
    texture = F.interpolate(texture, size=side, mode="bilinear") * (1 - plain[..., None, None])
    image = ground[..., None, None] * (1 - mask) + figure[..., None, None] * mask + texture
    image = image + torch.randn(batch, 1, side, side, generator=g) * uniform(g, 0, 0.06, batch, 1, 1, 1)
    # erase a rectangle of a quarter of the pictures
    y0, x0 = uniform(g, 0, 0.8, batch, 1, 1, 1), uniform(g, 0, 0.8, batch, 1, 1, 1)
    h, w = uniform(g, 0.1, 0.4, batch, 1, 1, 1), uniform(g, 0.1, 0.4, batch, 1, 1, 1)
    at = torch.linspace(0, 1, side)
    hole = ((at.view(1, 1, -1, 1) - y0 - h / 2).abs() < h / 2) & ((at.view(1, 1, 1, -1) - x0 - w / 2).abs() < w / 2)
    hole = hole.float() * chance(g, 0.25, batch)
    image = image * (1 - hole) + ground[..., None, None] * hole
    image = (image.clamp(0, 1) - MEAN[0]) / STD[0]
    return image.to(memory_format=torch.channels_last)


# --- training ---------------------------------------------------------------------------------------------------------


def build(classes: int) -> nn.Module:
    model = timm.create_model(ARCHITECTURE, num_classes=classes, **MODEL_ARGS)
    model.get_classifier().reset_parameters()  # type: ignore[operator]  # timm starts it larger than torch does
    return model.to(memory_format=torch.channels_last)


def export(model: nn.Module, classes: int, folder: Path) -> None:
    """Write config.json and model.safetensors (half precision) as timm reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": classes,
        "num_features": model.num_features,
        "global_pool": "avg",
        "model_args": MODEL_ARGS,
        "pretrained_cfg": {
            "tag": "fractals",
            "custom_load": False,
            "input_size": [3, SEEN, SEEN],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(MEAN),
            "std": list(STD),
            "num_classes": classes,
            "pool_size": [SEEN // 32, SEEN // 32],
            "first_conv": cfg["first_conv"],
            "classifier": cfg["classifier"],
            "license": "apache-2.0",
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--classes", type=int, default=500, help="iterated function systems")
    parser.add_argument("--images", type=int, default=80, help="drawings of each, of which one in 20 is held out")
    parser.add_argument("--epochs", type=int, help="by default, what fits into --minutes on this machine")
    parser.add_argument("--minutes", type=float, default=50, help="of training, used where --epochs is not given")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/fractals/model"))
    parser.add_argument("--cache", type=Path, default=Path("runs/fractals"), help="drawings and the checkpoint")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    store = drawings(args.classes, args.images, args.seed, args.cache)
    held = max(1, args.images // 20)
    per_class = args.images - held
    rows = args.classes * per_class
    steps = rows // args.batch_size
    model = build(args.classes)
    model.train()
    # twice as fast where the processor knows bfloat16, much slower where it does not
    half = torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())

    def pictures(index: Tensor, first: int) -> Tensor:
        width = per_class if first == 0 else held
        return torch.from_numpy(store[(index // width).numpy(), (first + index % width).numpy()])

    def loss_of(index: Tensor, g: torch.Generator, side: int = SEEN) -> Tensor:
        images, labels = views(pictures(index, 0), g, side), index // per_class
        with half:
            logits = model(images)
        return F.cross_entropy(logits.float(), labels, label_smoothing=0.1)

    checkpoint_path = args.cache / f"checkpoint-{args.classes}x{args.images}-seed{args.seed}.pt"
    saved = torch.load(checkpoint_path, weights_only=True) if checkpoint_path.exists() else None
    epochs = args.epochs or (saved["epochs"] if saved else None)
    if epochs is None:
        probe = torch.Generator().manual_seed(args.seed)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        for step in range(25):
            if step == 5:
                start = time.time()
            loss_of(torch.randint(rows, (args.batch_size,), generator=probe), probe).backward()
        seconds = (time.time() - start) / 20
        model.load_state_dict(state)
        model.zero_grad()
        epochs = max(1, int(args.minutes * 60 / (0.8 * seconds * steps)))  # 0.8: half of them at EARLY pixels
        print(f"{args.batch_size / seconds:.0f} pictures a second: --epochs {epochs}", flush=True)

    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=epochs * steps + 1, pct_start=0.2)
    first = 0
    if saved:
        if saved["epochs"] != epochs:
            raise SystemExit(f"{checkpoint_path}: of a run of {saved['epochs']} epochs; remove it or give them")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        first = saved["epoch"]
        print(f"going on after epoch {first}", flush=True)

    for epoch in range(first, epochs):
        g = torch.Generator().manual_seed(args.seed * 100_003 + epoch)  # so that a run that goes on sees the same
        order = torch.randperm(rows, generator=g)
        start, total = time.time(), 0.0
        side = EARLY if epoch < epochs // 2 else SEEN  # smaller pictures first: as good and half as dear
        model.train()
        for step in range(steps):
            loss = loss_of(order[step * args.batch_size : (step + 1) * args.batch_size], g, side)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        model.eval()
        look = torch.Generator().manual_seed(args.seed)
        right = 0
        index = torch.randperm(args.classes * held, generator=look)[:2000]
        with torch.no_grad():
            for part in index.split(250):
                right += int((model(views(pictures(part, per_class), look)).argmax(1) == part // held).sum())
        print(
            f"epoch {epoch + 1}/{epochs}  loss {total / steps:.3f}  held-out accuracy {right / len(index):.3f}  "
            f"{steps * args.batch_size / (time.time() - start):.0f} pictures/s",
            flush=True,
        )
        state = {"epoch": epoch + 1, "epochs": epochs, "model": model.state_dict()}
        state |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        part = checkpoint_path.with_suffix(".part")
        torch.save(state, part)
        part.replace(checkpoint_path)
    model.eval()
    export(model, args.classes, args.out)
    print(f"written: {args.out} ({sum(f.stat().st_size for f in args.out.iterdir()) / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()

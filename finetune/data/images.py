"""Images: a file or bytes in, an RGB picture, a tensor [3, H, W] or a `Batch` out.

Shapes: B images of a batch, H and W pixels.
"""

import hashlib
import io
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from finetune.data.decoded import DecodedCache
from finetune.data.shards import is_member, is_remote, read_member

if TYPE_CHECKING:
    from finetune.model.pretrained import Preprocessing

CROP_SCALE = (0.35, 1.0)  # share of the area that a training crop keeps
CROP_RATIO = (3 / 4, 4 / 3)
RESAMPLE = {mode.name.lower(): mode for mode in Image.Resampling}  # torchvision's and timm's names
TOO_LARGE = "more pixels than can be read safely; make it smaller"
STRETCHED = (
    300  # Sides in a greater proportion than this: made as high as a backbone wants it, a line fills the memory.
)
RUN = ("EPS", "WMF")  # Pillow hands these to other programs, such as Ghostscript, which run what is in them.
ORIENTATION = 0x0112  # EXIF tag
REDUCING_GAP = 3.0  # Pillow then averages whole pixels before it resamples, which cannot be told from resampling alone


class BadImage(Exception):
    """An image that cannot be used; the text says why."""


@contextmanager
def quiet() -> Iterator[None]:
    """Hide Pillow's warnings, of corrupt EXIF data for instance, which are no reason to lose a picture.

    Python's warning filters belong to the whole process, so this goes around threads and not into them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def open_image(source: str | Path | bytes, size: tuple[int, int] | None = None) -> Image.Image:
    """Read an image fully as RGB, upright by its EXIF tag, transparency over white, 16-bit grey scaled to 8.

    Args:
        source: Path, place in a shard, or the file's bytes.
        size: (H, W) at least needed: a much larger JPEG is then decoded at 1/2, 1/4 or 1/8, which is faster.

    Raises:
        BadImage: Missing, empty, not an image, damaged, too large, or a line.
    """
    if is_member(source):
        try:
            source = read_member(str(source))
        except OSError as error:
            raise BadImage(f"cannot be read ({error.strerror or error})") from None
    if not isinstance(source, bytes) and not os.path.isfile(source):  # of a pipe, opening would wait for ever
        raise BadImage("file not found")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.format in RUN:
                raise BadImage(f"{image.format} is not supported; convert it to PNG")
            check_size(image)
            if size is not None:
                draft(image, max(size))
            image.load()
            return to_rgb(image)
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage(TOO_LARGE) from None
    except Exception as error:  # Pillow's decoders raise about everything on damaged files
        raise BadImage(reason_unreadable(source, error)) from None


def check_size(image: Image.Image) -> None:
    """Refuse what would take memory out of all proportion.

    Raises:
        BadImage: Too many pixels, none, or a line.
    """
    width, height = image.size
    if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
        raise BadImage(TOO_LARGE)
    if max(width, height) > STRETCHED * min(width, height):
        raise BadImage(f"more than {STRETCHED} times as long as wide; cut it into pieces")


def draft(image: Image.Image, side: int) -> None:
    """Have a much larger JPEG decoded smaller, no side of it shorter than `side`: its EXIF tag may turn it."""
    if image.format == "JPEG":
        image.draft(None, (side, side))


def open_for_crops(source: str | Path | bytes, size: tuple[int, int]) -> Image.Image:
    """Read an image as `open_image` does, at most twice as wide as crops of `size` (H, W) need on its shorter side.

    The smallest crop is about half as wide as the image: at twice the size it still has every pixel it needs.
    """
    side = 2 * max(size)
    image = open_image(source, (side, side))
    small = shrunk(image.size, side)
    if small == image.size:
        return image
    return image.resize(small, Image.Resampling.BICUBIC, reducing_gap=REDUCING_GAP)


def shrunk(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Sizes in proportion whose shorter one is at most `side`."""
    shorter = min(size)
    return size if shorter <= side else (round(size[0] * side / shorter), round(size[1] * side / shorter))


def pixels_for_crops(source: str | Path | bytes, size: tuple[int, int]) -> int:
    """Number of pixels of what `open_for_crops` will give, from the header alone; 0 if that cannot be read."""
    side = 2 * max(size)
    try:
        source = read_member(str(source)) if is_member(source) else source
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            draft(image, side)
            return math.prod(shrunk(image.size, side))
    except Exception:  # opening it fully, later, says what is wrong
        return 0


def reason_unreadable(source: str | Path | bytes, error: Exception) -> str:
    """Say in a few words what is wrong with a file that did not open."""
    if isinstance(error, PermissionError):
        return "permission denied"
    if (len(source) if isinstance(source, bytes) else os.path.getsize(source)) == 0:
        return "empty file"
    if isinstance(error, UnidentifiedImageError):
        suffix = "" if isinstance(source, bytes) else os.path.splitext(source)[1].lower()
        return f"{suffix} is not supported; convert it to JPEG" if suffix in (".heic", ".heif") else "not an image"
    return "truncated or damaged image"


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn a loaded image of any mode upright and into RGB."""
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return grey_to_8_bit(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def grey_to_8_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey by 1/257, the same for every image; other deep modes by what their range tells."""
    values = np.asarray(image).astype(np.float32)
    top = float(values.max(initial=0))
    if image.mode == "F":
        scale = 255 if top <= 1 else 1 if top <= 255 else 255 / top
    elif image.mode.startswith("I;16"):
        scale = 1 / 257
    else:
        scale = 1 if top <= 255 else 1 / 257 if top <= 65535 else 255 / top
    return Image.fromarray(np.clip(values * scale + 0.5, 0, 255).astype(np.uint8))


def pixel_key(image: Image.Image) -> str:
    """Hash of the decoded pixels: equal for equal pictures, whatever the file."""
    return hashlib.blake2b(image.tobytes(), digest_size=16, key=f"{image.width}x{image.height}".encode()).hexdigest()


def train_transform(image: Image.Image, pre: "Preprocessing", generator: torch.Generator) -> Image.Image:
    """Take a random crop at `pre.size`, and swap left and right half the time.

    The same crop, to the pixel, as torchvision's v2.RandomResizedCrop and v2.RandomHorizontalFlip make of the same
    random numbers, without their overhead, which on small images is as much as decoding.
    """
    left, top, width, height = random_box(image.width, image.height, generator)
    resample = RESAMPLE.get(pre.interpolation, Image.Resampling.BILINEAR)
    image = image.crop((left, top, left + width, top + height)).resize(pre.size[::-1], resample)
    swap = torch.rand(1, generator=generator).item() < 0.5
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if swap else image


def random_box(width: int, height: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Draw (left, top, width, height) of a crop with a share of the area in `CROP_SCALE` and sides in `CROP_RATIO`."""
    low, high = (math.log(ratio) for ratio in CROP_RATIO)
    for _ in range(10):
        area = width * height * torch.empty(1).uniform_(*CROP_SCALE, generator=generator).item()
        ratio = torch.empty(1).uniform_(low, high, generator=generator).exp().item()
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(0, height - h + 1, (1,), generator=generator).item())
            left = int(torch.randint(0, width - w + 1, (1,), generator=generator).item())
            return left, top, w, h
    w, h = min(width, round(height * CROP_RATIO[1])), min(height, round(width / CROP_RATIO[0]))  # very long or tall
    return (width - w) // 2, (height - h) // 2, w, h


def eval_transform(pre: "Preprocessing") -> Callable[[Image.Image], Tensor]:
    """PIL -> normalised float [3, H, W], exactly as timm or the backbone's image processor does it."""
    if pre.processor is not None:
        return ProcessorTransform(pre)
    from timm.data import create_transform

    return create_transform(
        (3, *pre.size), is_training=False, interpolation=pre.interpolation, mean=pre.mean, std=pre.std,
        crop_pct=pre.crop_pct, crop_mode=pre.crop_mode,
    )  # fmt: skip


class ProcessorTransform:
    """A transformers image processor as a function of one picture."""

    def __init__(self, pre: "Preprocessing"):
        self.processor, self.options = pre.processor, size_options(pre.processor, pre.size)

    def __call__(self, image: Image.Image) -> Tensor:
        """Return pixel values [3, H, W]."""
        return self.processor(images=image, return_tensors="pt", **self.options)["pixel_values"][0]


def size_options(processor: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Options that make a processor give `size` (H, W) where it is set to another size; empty where it is not."""
    own = dict(processor.size or {})
    crop = dict(getattr(processor, "crop_size", None) or {}) if getattr(processor, "do_center_crop", False) else {}
    wanted = {"height": size[0], "width": size[1]}
    if (own if not crop else crop) == wanted:
        return {}
    if not crop:
        return {"size": wanted}
    if own.get("shortest_edge"):  # keep the margin around the crop as it was in proportion
        edge = round(own["shortest_edge"] * min(size) / min(crop["height"], crop["width"]))
        return {"size": {"shortest_edge": edge}, "crop_size": wanted}
    scale_h, scale_w = size[0] / crop["height"], size[1] / crop["width"]
    enlarged = {"height": round(own["height"] * scale_h), "width": round(own["width"] * scale_w)}
    return {"size": enlarged, "crop_size": wanted}


def eval_picture(pre: "Preprocessing") -> Callable[[Image.Image], Any]:
    """The part of `eval_transform` before it turns to floating-point numbers, where timm's is used: PIL -> PIL."""
    from torchvision.transforms import Compose

    return Compose(eval_transform(pre).transforms[:-2])  # type: ignore[attr-defined]  # the last are ToTensor, Normalize


class ImageInputs:
    """Rows of a Dataset -> {"pixel_values": float [B, 3, H, W]}.

    In training, the crop of an example is a pure function of (seed, epoch, row), whichever process makes it. With a
    cache, what comes before the crop, or in evaluation before the normalisation, is done once; the result is the same.
    """

    def __init__(
        self,
        data: datasets.Dataset,
        pre: "Preprocessing",
        *,
        augment: bool,
        seed: int,
        epoch: int,
        cache: DecodedCache | None = None,
    ):
        self.data, self.pre, self.augment, self.seed, self.epoch = data, pre, augment, seed, epoch
        # Paths are taken out of the Dataset once: reading one cell of Arrow takes as long as decoding a small image.
        in_files = len(data) > 0 and data[0]["image"]["bytes"] is None
        self.paths = [cell["path"] for cell in data["image"][:]] if in_files else None
        self.floats = not augment and pre.processor is not None  # a processor gives nothing to keep before its floats
        self.eval = None if augment else eval_transform(pre) if self.floats else eval_picture(pre)
        key = f"{'crops' if augment else 'evaluation'} {data._fingerprint} {pre!r}"
        dtype = np.float32 if self.floats else np.uint8
        far = self.paths is not None and is_remote(self.paths[0])  # to ask for every size would read all once more
        with quiet():
            self.shelf = None if cache is None or far else cache.shelf(key, len(data), self.room, dtype)

    def __call__(self, rows: list[int]) -> dict[str, Tensor]:
        """Read, transform and stack the images of `rows`."""
        with quiet():
            if self.floats:
                return {"pixel_values": torch.stack([torch.from_numpy(self.kept(row)) for row in rows])}
            pictures = [self.augmented(row) if self.augment else self.kept(row) for row in rows]
            return {"pixel_values": normalised(pictures, self.pre, as_timm=not self.augment)}

    def source(self, row: int) -> str | bytes:
        """Path or bytes of the image of a row."""
        return self.paths[row] if self.paths is not None else self.data[row]["image"]["bytes"]

    def room(self, row: int) -> int:
        """Bytes of what is kept of a row."""
        if self.augment:
            return 3 * pixels_for_crops(self.source(row), self.pre.size)
        return math.prod(self.pre.size) * (12 if self.floats else 3)

    def kept(self, row: int) -> np.ndarray:
        """What is the same in every epoch: uint8 [h, w, 3], to be cropped or normalised, or a processor's floats."""
        found = None if self.shelf is None else self.shelf.get(row)
        if found is None:
            if self.eval is None:
                found = np.array(open_for_crops(self.source(row), self.pre.size))
            else:
                found = np.array(self.eval(open_image(self.source(row))))
            if self.shelf is not None:
                self.shelf.put(row, found)
        return found

    def augmented(self, row: int) -> np.ndarray:
        """The image of one row, cropped at random: uint8 [H, W, 3]."""
        if self.shelf is None:  # there is no use then in an array on the way to the crop
            image = open_for_crops(self.source(row), self.pre.size)
        else:
            image = Image.fromarray(self.kept(row))
        mixed = hashlib.blake2b(f"{self.seed}:{self.epoch}:{row}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(mixed, "little", signed=True))
        return np.array(train_transform(image, self.pre, generator))


def normalised(pictures: Sequence[np.ndarray], pre: "Preprocessing", *, as_timm: bool) -> Tensor:
    """uint8 [H, W, 3], B of them -> float [B, 3, H, W] with the backbone's mean and standard deviation taken out.

    Picture by picture, while it is in the processor's cache: half the time of whole batches. `as_timm` divides by 255
    first, as timm does, which differs in the last bit.
    """
    scale = 1 if as_timm else 255
    mean, std = (torch.tensor(values).view(-1, 1, 1) * scale for values in (pre.mean, pre.std))
    images_BCHW = torch.empty(len(pictures), 3, *pictures[0].shape[:2])
    for image, picture in zip(images_BCHW, pictures, strict=True):
        image.copy_(torch.from_numpy(picture).permute(2, 0, 1))
        if as_timm:
            image.div_(255)
        image.sub_(mean).div_(std)
    return images_BCHW

import errno
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from finetune.data import decoded, images
from finetune.data.decoded import DecodedCache
from finetune.data.images import (
    CROP_RATIO,
    CROP_SCALE,
    BadImage,
    ImageInputs,
    eval_transform,
    normalised,
    open_for_crops,
    open_image,
    pixel_key,
    pixels_for_crops,
    quiet,
    size_options,
    to_rgb,
    train_transform,
)
from finetune.model.pretrained import Preprocessing

Picture = Callable[..., Image.Image]
PRE = Preprocessing(size=(24, 24), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation="bicubic")


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "TIFF", "GIF", "JPEG"])
def test_formats(picture: Picture, kind: str):
    image = picture(0).quantize(8).convert("RGB")
    opened = open_image(saved(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert (opened.mode, opened.size) == ("RGB", image.size)
    assert np.abs(np.asarray(opened).astype(int) - np.asarray(image)).mean() < (40 if kind == "JPEG" else 1e-9)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(picture: Picture, orientation: int):
    turned = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, -1)[:, ::-1],
        8: lambda a: np.rot90(a),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = np.asarray(open_image(saved(picture(0), "PNG", exif=exif)))
    expected = turned(np.asarray(picture(0)))
    if orientation == 7:
        expected = np.asarray(picture(0))[::-1, ::-1].transpose(1, 0, 2)
    assert (opened == expected).all()


def test_transparency_goes_over_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("LA", (4, 4), (0, 128))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert open_image(saved(clear, "PNG")).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(saved(half, "PNG")).getpixel((0, 0)) == (127, 127, 127)
    assert open_image(saved(palette, "PNG")).getpixel((0, 0)) == (10, 20, 30)
    assert open_image(saved(palette, "PNG", transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(saved(palette, "GIF", transparency=1)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB", "HSV", "RGBA", "LA"])
def test_modes(picture: Picture, mode: str):
    image = picture(0)
    image = image.convert("RGB").convert("LAB") if mode == "LAB" else image.convert(mode)
    assert to_rgb(image).mode == "RGB" if mode != "LAB" else True


def test_deep_grey_is_scaled():
    values = np.array([[0, 257, 257 * 200, 65535]], dtype=np.uint16)
    opened = open_image(saved(Image.fromarray(values), "PNG"))
    assert np.asarray(opened)[0, :, 0].tolist() == [0, 1, 200, 255]
    floats = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert np.asarray(open_image(saved(floats, "TIFF")))[0, :, 0].tolist() == [0, 128, 255]
    integers = Image.fromarray(np.array([[0, 7, 255]], dtype=np.int32))
    assert np.asarray(to_rgb(integers))[0, :, 0].tolist() == [0, 7, 255]


def test_bad_bytes_and_files(tmp_path: Path, picture: Picture):
    whole = saved(picture(0, (64, 64)), "JPEG")
    cases: list[tuple[bytes | str | Path, str]] = [
        (b"", "empty file"),
        (b"hello", "not an image"),
        (whole[:-300], "truncated or damaged image"),
        (tmp_path / "none.jpg", "file not found"),
        (str(tmp_path), "file not found"),
        ("a\0b.jpg", "file not found"),
    ]
    for source, reason in cases:
        with pytest.raises(BadImage, match=f"^{reason}$"):
            open_image(source)


def test_corrupt_exif_does_not_lose_the_picture(picture: Picture):
    with quiet():
        assert open_image(saved(picture(0), "JPEG", exif=b"Exif\0\0II*\0garbage")).size == (40, 32)


def test_a_much_larger_jpeg_is_decoded_smaller(picture: Picture):
    big = saved(picture(0, (800, 600)), "JPEG")
    assert open_image(big).size == (800, 600)
    assert open_image(big, (100, 100)).size == (200, 150)
    assert open_image(big, (500, 500)).size == (800, 600)


@pytest.mark.parametrize("kind", ["JPEG", "BMP"])
@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((900, 600), (60, 40)),
        ((90, 700), (40, 311)),
        ((41, 90), (40, 88)),
        ((40, 500), (40, 500)),
        ((30, 20), (30, 20)),
    ],
)
def test_a_picture_for_crops_is_at_most_twice_as_large(
    picture: Picture, kind: str, size: tuple[int, int], expected: tuple[int, int]
):
    source = saved(picture(0, size), kind)
    assert open_for_crops(source, (16, 20)).size == expected
    assert pixels_for_crops(source, (16, 20)) == expected[0] * expected[1]


def test_shrinking_is_close_to_resampling_at_once(picture: Picture):
    image = picture(0, (30, 20)).resize((1200, 800), Image.Resampling.BICUBIC)  # something smooth
    small = np.asarray(open_for_crops(saved(image, "BMP"), (40, 40))).astype(int)
    plain = np.asarray(image.resize((120, 80), Image.Resampling.BICUBIC))
    assert np.abs(small - plain).max() <= 3


@pytest.mark.parametrize("orientation", [1, 6])
def test_the_size_is_foretold_of_turned_pictures_too(picture: Picture, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = saved(picture(0, (333, 777)), "JPEG", exif=exif)
    found = open_for_crops(source, (20, 20))
    assert found.size == ((40, 93) if orientation == 1 else (93, 40))
    assert pixels_for_crops(source, (20, 20)) == 40 * 93
    assert pixels_for_crops(b"no picture", (20, 20)) == 0


def test_pixel_key_is_of_the_picture_not_the_file(picture: Picture):
    image = picture(0)
    assert pixel_key(open_image(saved(image, "PNG"))) == pixel_key(open_image(saved(image, "BMP")))
    assert pixel_key(image) != pixel_key(picture(1))
    black = [Image.new("RGB", size) for size in ((4, 2), (2, 4))]
    assert pixel_key(black[0]) != pixel_key(black[1])


@pytest.mark.parametrize("size", [(60, 40), (300, 20), (20, 300)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_training_crop_equals_torchvision(picture: Picture, size: tuple[int, int], interpolation: str):
    pre = Preprocessing(size=(16, 24), mean=PRE.mean, std=PRE.std, interpolation=interpolation)
    plain = v2.Compose([
        v2.RandomResizedCrop(pre.size, CROP_SCALE, CROP_RATIO, interpolation=InterpolationMode(interpolation)),
        v2.RandomHorizontalFlip(),
    ])  # fmt: skip
    image = picture(0, size)
    for seed in range(30):
        torch.manual_seed(seed)
        expected = plain(image)
        assert train_transform(image, pre, torch.Generator().manual_seed(seed)).tobytes() == expected.tobytes()


def test_evaluation_is_timms_own(picture: Picture):
    from timm.data import create_transform

    pre = Preprocessing(size=(24, 20), mean=PRE.mean, std=PRE.std, interpolation="bicubic", crop_pct=0.875)
    expected = create_transform((3, 24, 20), is_training=False, interpolation="bicubic", mean=pre.mean, std=pre.std,
                                crop_pct=0.875, crop_mode="center")(picture(0))  # fmt: skip
    assert torch.equal(eval_transform(pre)(picture(0)), expected) and expected.shape == (3, 24, 20)


def test_evaluation_is_the_processors_own(picture: Picture):
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(size={"height": 24, "width": 24})
    pre = Preprocessing(size=(24, 24), mean=PRE.mean, std=PRE.std, processor=processor)
    expected = processor(images=picture(0), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(eval_transform(pre)(picture(0)), expected)
    other = Preprocessing(size=(16, 20), mean=PRE.mean, std=PRE.std, processor=processor)
    assert eval_transform(other)(picture(0)).shape == (3, 16, 20)


def test_options_that_change_a_processors_size():
    plain = SimpleNamespace(size={"height": 24, "width": 24})
    assert size_options(plain, (24, 24)) == {}
    assert size_options(plain, (32, 16)) == {"size": {"height": 32, "width": 16}}
    crop = {"height": 224, "width": 224}
    edge = SimpleNamespace(size={"shortest_edge": 256}, crop_size=crop, do_center_crop=True)
    assert size_options(edge, (224, 224)) == {}
    assert size_options(edge, (112, 112)) == {
        "size": {"shortest_edge": 128}, "crop_size": {"height": 112, "width": 112}
    }  # fmt: skip
    both = SimpleNamespace(size={"height": 256, "width": 256}, crop_size=crop, do_center_crop=True)
    assert size_options(both, (112, 224))["size"] == {"height": 128, "width": 256}


def rows_of(*sources: bytes) -> datasets.Dataset:
    cells = [{"path": None, "bytes": source} for source in sources]
    return datasets.Dataset.from_dict({"image": cells}, datasets.Features({"image": datasets.Image(decode=False)}))


def test_training_values_are_normalised_as_in_evaluation():
    data = rows_of(saved(Image.new("RGB", (40, 40), (200, 100, 50)), "PNG"))
    train, plain = (
        ImageInputs(data, PRE, augment=augment, seed=0, epoch=0)([0])["pixel_values"] for augment in (True, False)
    )
    torch.testing.assert_close(train, plain, rtol=0, atol=1e-6)


def test_normalised_is_to_the_bit_what_it_is_of_whole_batches(picture: Picture):
    pictures = [np.array(picture(seed)) for seed in range(3)]
    batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (PRE.mean, PRE.std))
    assert torch.equal(normalised(pictures, PRE, as_timm=False), batch.float().sub_(mean * 255).div_(std * 255))
    assert torch.equal(normalised(pictures, PRE, as_timm=True), batch.float().div(255).sub_(mean).div_(std))
    assert normalised(pictures, PRE, as_timm=False).is_contiguous()


def kinds(picture: Picture) -> datasets.Dataset:
    """Pictures of many kinds, small and large, one with a corrupt EXIF tag."""
    turned = Image.Exif()
    turned[0x0112] = 6
    clear = picture(5, (50, 40)).convert("RGBA")
    clear.putalpha(picture(6, (50, 40)).convert("L"))
    deep = Image.fromarray(np.random.default_rng(7).integers(0, 65536, (40, 50), dtype=np.uint16))
    return rows_of(
        saved(picture(0), "PNG"),
        saved(picture(1, (400, 300)), "JPEG"),
        saved(picture(2, (300, 200)), "JPEG", exif=turned),
        saved(picture(3, (90, 200)), "PNG", exif=turned),
        saved(clear, "PNG"),
        saved(picture(4, (200, 20)).convert("P"), "GIF"),
        saved(deep, "PNG"),
        saved(picture(8), "JPEG", exif=b"Exif\0\0II*\0garbage"),
        saved(picture(9, (64, 48)).convert("CMYK"), "JPEG"),
    )


def inputs(data: datasets.Dataset, how: str, cache: DecodedCache | None, epoch: int = 0) -> ImageInputs:
    from transformers import ViTImageProcessor

    pre = Preprocessing((24, 20), PRE.mean, PRE.std, "bicubic", 0.9, how if how in ("squash", "border") else "center")
    if how == "processor":
        pre = Preprocessing((24, 20), processor=ViTImageProcessor(size={"height": 24, "width": 20}))
    return ImageInputs(data, pre, augment=how == "train", seed=3, epoch=epoch, cache=cache)


HOW = ["train", "center", "squash", "border", "processor"]


@pytest.fixture(params=["memory", "file"])
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DecodedCache]:
    if request.param == "file":
        monkeypatch.setattr(decoded, "MEMORY_SHARE", 0.0)
    made = DecodedCache(tmp_path / "cache", 2**24)
    yield made
    made.close()


@pytest.mark.parametrize("how", HOW)
def test_batches_are_to_the_bit_the_same_with_a_cache(
    picture: Picture, cache: DecodedCache, how: str, monkeypatch: pytest.MonkeyPatch
):
    data, rows = kinds(picture), list(range(9))
    plain = [inputs(data, how, None, epoch)(rows)["pixel_values"] for epoch in (0, 1)]
    assert torch.equal(inputs(data, how, cache)(rows)["pixel_values"], plain[0])  # which fills it
    monkeypatch.setattr(images, "open_image", None)  # no picture is opened any more
    assert torch.equal(inputs(data, how, cache)(rows)["pixel_values"], plain[0])
    assert torch.equal(inputs(data, how, cache, epoch=1)(rows[::-1])["pixel_values"], plain[1].flip(0))
    assert torch.equal(*plain) == (how != "train")


@pytest.mark.parametrize("how", HOW[1:])
def test_evaluation_is_to_the_bit_that_of_single_pictures(picture: Picture, how: str):
    data = kinds(picture)
    of_all = inputs(data, how, None)
    with quiet():
        expected = [eval_transform(of_all.pre)(open_image(data[row]["image"]["bytes"])) for row in range(9)]
    assert torch.equal(of_all(list(range(9)))["pixel_values"], torch.stack(expected))


def test_parts_and_sizes_do_not_share_rows(picture: Picture, cache: DecodedCache):
    one, two = rows_of(saved(picture(0), "PNG")), rows_of(saved(picture(1), "PNG"))
    for _ in range(2):
        for data in (one, two):
            for how in HOW:
                found = inputs(data, how, cache)([0])["pixel_values"]
                assert torch.equal(found, inputs(data, how, None)([0])["pixel_values"]), how


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("trouble", ["damaged", "vanished", "full", "small"])
def test_whatever_happens_to_the_cache_the_batches_are_right(
    picture: Picture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, trouble: str
):
    monkeypatch.setattr(decoded, "MEMORY_SHARE", 0.0)
    data, rows = kinds(picture), list(range(9))
    plain = [inputs(data, how, None, epoch)(rows)["pixel_values"] for epoch in (0, 1)]
    room = inputs(data, how, None).room
    cache = DecodedCache(tmp_path, sum(room(row) for row in range(4)) + 100 if trouble == "small" else 2**24)
    kept = inputs(data, how, cache)
    if trouble == "full":
        real, written = os.pwritev, []

        def full(*arguments: int) -> int:
            if len(written) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(1)
            return real(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "pwritev", full)
    assert torch.equal(kept(rows)["pixel_values"], plain[0])
    path = tmp_path / "decoded-0.bin"
    if trouble == "damaged":
        content = bytearray(path.read_bytes())
        for start in range(50, len(content), 3000):
            content[start] ^= 1
        path.write_bytes(content[: len(content) * 3 // 4])
    if trouble == "vanished":
        path.unlink()
    opened = []
    really = images.open_image
    monkeypatch.setattr(images, "open_image", lambda *arguments: opened.append(1) or really(*arguments))
    assert torch.equal(inputs(data, how, cache, epoch=1)(rows)["pixel_values"], plain[1])
    assert {"damaged": len(opened) > 5, "vanished": not opened, "full": len(opened) == 6, "small": len(opened) == 5}[
        trouble
    ]
    cache.close()

"""Class folders of pictures, spoilt."""

import io
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from fuzz.made import Made, Random, as_csv, chosen, chunk, damaged, looked_at, png

Way = Callable[[Random, Path, Path], None]  # gets the file of a picture, and the folder around train/ and test/
Content = Callable[[Random, bytes], bytes]  # a picture's bytes -> others


def photos(rng: Random, place: Path, base: Path, number: int) -> Made:
    """Spoil class folders in one or two ways."""
    folder = place / "in" / "photos"
    shutil.copytree(base / "photos", folder)
    ways = chosen(rng, number, WAYS)
    for way in ways:
        pictures = sorted((folder / "train").rglob("[0-9].png")) or sorted(folder.rglob("*.png"))
        if pictures:
            WAYS[way](rng, rng.choice(pictures), folder)
    return Made(" + ".join(ways), lambda: looked_at(folder, place, "image"), (str(folder),))


def saved(mode: str, file: str, **options: object) -> Content:
    """The picture in another mode and format."""

    def content(rng: Random, old: bytes) -> bytes:
        import numpy as np
        from PIL import Image

        image, out = Image.open(io.BytesIO(old)), io.BytesIO()
        if mode in ("I;16", "I", "F"):
            types = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
            image = Image.fromarray(np.asarray(image.convert("L")).astype(types[mode]))
        elif mode == "LAB":
            image = Image.frombytes("LAB", image.size, image.convert("RGB").tobytes())
        else:
            image = image.convert(mode)
        more = {"append_images": [image.rotate(90), image.rotate(180)]} if options.get("save_all") else {}
        image.save(out, file, **options, **more)
        return out.getvalue()

    return content


def then(first: Content, second: Content) -> Content:
    """One after the other."""
    return lambda rng, old: second(rng, first(rng, old))


def claims(start: int, form: str, width: int, height: int) -> Content:
    """Another size in the header."""
    size = struct.pack(form, width, height)
    return lambda rng, old: old[:start] + size + old[start + len(size) :]


def broken_exif(rng: Random, jpeg: bytes) -> bytes:
    """EXIF data that is none."""
    ways = (b"", b"MM", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff" + rng.randbytes(40))
    body = b"Exif\0\0" + rng.choice(ways)
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


def long_comment(rng: Random, old: bytes) -> bytes:
    """A comment of 200 MB, packed into 200 kB."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(b"\0" * 2**20) for _ in range(200)) + packer.flush()
    return png(8, 8, extra=chunk(b"zTXt", b"Comment\0\0" + packed))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 24\n%%EndComments\n(ran) (w) file closefile\nshowpage\n%%EOF\n"
CONTENTS: dict[str, Content] = {
    "cut off": lambda rng, old: old[: rng.randrange(1, len(old))],
    "empty file": lambda rng, old: b"",
    "zero bytes": lambda rng, old: b"\0" * len(old),
    "damaged png": damaged,
    "a text": lambda rng, old: b"not a picture\n" * 10,
    "a page": lambda rng, old: b"<html><script>alert(1)</script></html>",
    "svg": lambda rng, old: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>',
    "eps": lambda rng, old: EPS,
    "pdf": lambda rng, old: b"%PDF-1.4\n%%EOF\n",
    "jpeg named png": saved("RGB", "JPEG"),
    "huge claim": lambda rng, old: png(8, 8, claimed=(100_000, 100_000)),
    "huge and empty": lambda rng, old: png(40_000, 40_000),
    "just below the limit": lambda rng, old: png(12_000, 7_000),
    "a line": lambda rng, old: png(1, 60_000),
    "a long line": lambda rng, old: png(80_000_000, 1),
    "a strip": lambda rng, old: png(20, 3_000),
    "one pixel": lambda rng, old: png(1, 1),
    "no pixel": lambda rng, old: png(1, 1, claimed=(0, 0)),
    "huge gif": then(saved("P", "GIF"), claims(6, "<HH", 65_535, 65_535)),
    "long gif": then(saved("P", "GIF"), claims(6, "<HH", 65_535, 1)),
    "huge bmp": then(saved("RGB", "BMP"), claims(18, "<ii", 2**31 - 1, 2**31 - 1)),
    "negative bmp": then(saved("RGB", "BMP"), claims(18, "<ii", -24, -24)),
    "long comment": long_comment,
    "cmyk": saved("CMYK", "JPEG"),
    "palette": saved("P", "PNG", transparency=3),
    "16 bit": saved("I;16", "PNG"),
    "32 bit": saved("I", "TIFF"),
    "float": saved("F", "TIFF"),
    "lab": saved("LAB", "TIFF"),
    "animated gif": saved("P", "GIF", save_all=True),
    "animated webp": saved("RGB", "WEBP", save_all=True),
    "damaged webp": then(saved("RGB", "WEBP"), damaged),
    "damaged jpeg": then(saved("RGB", "JPEG"), damaged),
    "damaged gif": then(saved("P", "GIF", save_all=True), damaged),
    "damaged tiff": then(saved("RGB", "TIFF", compression="tiff_lzw"), damaged),
    "damaged avif": then(saved("RGB", "AVIF"), damaged),
    "damaged float": then(saved("F", "TIFF"), damaged),
    "broken exif": then(saved("RGB", "JPEG"), broken_exif),
}


def written(content: Content) -> Way:
    """Write other bytes into the picture's file."""

    def way(rng: Random, one: Path, folder: Path) -> None:
        one.write_bytes(content(rng, one.read_bytes()))

    return way


def renamed(name: str | bytes, levels: int = 0) -> Way:
    """Give a picture another name, or the class above it."""

    def way(rng: Random, one: Path, folder: Path) -> None:
        path = one if levels == 0 else one.parent
        os.rename(os.fsencode(path), os.path.join(os.fsencode(path.parent), os.fsencode(name)))

    return way


def circles(rng: Random, one: Path, folder: Path) -> None:
    (one.parent / "again").symlink_to(one.parent)
    (one.parent / "loop.png").symlink_to("loop.png")
    (folder / "loop").symlink_to("loop")


def dangling(rng: Random, one: Path, folder: Path) -> None:
    (one.parent / "gone.png").symlink_to("/nowhere/at/all.png")
    (one.parent.parent / "gone").symlink_to("/nowhere/at/all")


def device(rng: Random, one: Path, folder: Path) -> None:
    (one.parent / "zero.png").symlink_to("/dev/zero")


def pipe(rng: Random, one: Path, folder: Path) -> None:
    os.mkfifo(one.parent / "pipe.png")


def folders_like_pictures(rng: Random, one: Path, folder: Path) -> None:
    (one.parent / "folder.png").mkdir()
    one.rename(one.parent / "folder.png" / one.name)
    (one.parent.parent / "class.jpg").mkdir()


def empty_class(rng: Random, one: Path, folder: Path) -> None:
    (one.parent.parent / "nothing").mkdir(exist_ok=True)


def class_of_one(rng: Random, one: Path, folder: Path) -> None:
    (one.parent.parent / "lonely").mkdir(exist_ok=True)
    one.rename(one.parent.parent / "lonely" / one.name)


def one_class(rng: Random, one: Path, folder: Path) -> None:
    for each in list(one.parent.parent.iterdir()):
        if each != one.parent and each.is_dir():
            shutil.rmtree(each)


def nothing_in_train(rng: Random, one: Path, folder: Path) -> None:
    shutil.rmtree(folder / "train", ignore_errors=True)
    (folder / "train").mkdir()


def nested(rng: Random, one: Path, folder: Path) -> None:
    (folder / "train" / "more").mkdir(parents=True)
    for each in list((folder / "train").iterdir()):
        if each.name != "more":
            each.rename(folder / "train" / "more" / each.name)


def unknown_in_test(rng: Random, one: Path, folder: Path) -> None:
    shutil.copytree(folder / "test" / "red", folder / "test" / "purple")


def loose(rng: Random, one: Path, folder: Path) -> None:
    for i, each in enumerate(sorted(folder.rglob("*.png"))):
        each.rename(folder / f"{i}.png")
    for each in (folder / "train", folder / "test"):
        shutil.rmtree(each, ignore_errors=True)


def all_alike(rng: Random, one: Path, folder: Path) -> None:
    content = one.read_bytes()
    for each in folder.rglob("[0-9].png"):
        each.write_bytes(content)


def broken_metadata(rng: Random, one: Path, folder: Path) -> None:
    found = sorted((folder / "train").rglob("[0-9].png"))
    rows = [{"file_name": str(each.relative_to(folder / "train")), "label": each.parent.name} for each in found]
    (folder / "train" / "metadata.csv").write_bytes(damaged(rng, as_csv(rows).encode()))


def odd_file(rng: Random, one: Path, folder: Path) -> None:
    names = ("train.csv", "data.json", "train.parquet", "dataset_dict.json", "state.json", "dataset_info.json")
    content = rng.choice(("", "{}", "[]", "a,b\n1,2\n", '{"splits": ["train"]}', '{"splits": ["../../../x"]}'))
    (folder / rng.choice(names)).write_text(content)


def many_classes(rng: Random, one: Path, folder: Path) -> None:
    for i in range(300):
        (one.parent.parent / f"class {i}").mkdir()


WAYS: dict[str, Way] = {
    **{name: written(content) for name, content in CONTENTS.items()},
    "name not utf-8": renamed(b"caf\xe9.png"),
    "name of two lines": renamed("two\nlines.png"),
    "name with a command": renamed("$(touch ran);`touch ran`.png"),
    "name with escapes": renamed("\x1b[31mred\x1b]0;x\x07.png"),
    "long name": renamed("n" * 250 + ".png"),
    "wrong suffix": renamed("one.jpg.txt"),
    "no suffix": renamed("one"),
    "class not utf-8": renamed(b"caf\xe9", 1),
    "class of a script": renamed("<script>alert(1)<", 1),
    "class of two lines": renamed("two\nlines", 1),
    "class of many signs": renamed("a\"b'c,d;e|f=1", 1),
    "class of a formula": renamed("=cmd|' C'!A0", 1),
    "class called train": renamed("train", 1),
    "links in a circle": circles,
    "dangling links": dangling,
    "a link to a device": device,
    "a pipe": pipe,
    "folders like pictures": folders_like_pictures,
    "an empty class": empty_class,
    "a class of one": class_of_one,
    "one class": one_class,
    "nothing in train": nothing_in_train,
    "classes in classes": nested,
    "an unknown class in test": unknown_in_test,
    "all in one folder": loose,
    "all pictures alike": all_alike,
    "broken metadata": broken_metadata,
    "an odd file beside": odd_file,
    "many empty classes": many_classes,
}

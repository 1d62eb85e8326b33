"""Images of each format that Pillow writes, and TIFFs of several pages, against what Pillow reads of them."""

import io
import math
import random
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from fuzz_kinds import EXTREMES, damage
from PIL import Image, ImageOps

from metaembed_jax.data import documents
from metaembed_jax.data.sources import image_files
from metaembed_jax.errors import UserError
from metaembed_jax.inputs.image_formats import FORMATS
from metaembed_jax.inputs.images import MAX_ASPECT_RATIO, image_size, memory_limit, open_image

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F")
OTHERS = ("ICO", "TGA", "EPS", "PCX", "DDS", "SGI", "DIB", "ICNS", "IM", "SPIDER", "MPO", "PDF", "QOI", "XBM", "MSP")
REDUCED_OR_MASK = 5  # bits of the tag 254 of a TIFF's frame
ORIENTATION = 0x0112
TURNS = dict(zip(range(2, 9), (0, 3, 1, 5, 4, 6, 2), strict=True))  # values of the tag, and Pillow's transpositions
Image.init()
Image.MAX_IMAGE_PIXELS = None  # of the reference


def make_image(random: random.Random, folder: Path) -> bytes:
    """Write an image, most often damaged."""
    data = base(random)
    for _ in range(random.choice((0, 1, 1, 1, 2, 3))):
        change = random.choice((damage, damage, damage, add_exif, add_chunk, resize_header))
        data = damage(random, data, base(random)) if change is damage else change(random, data)
    (folder / "image.bin").write_bytes(data)
    return data


def check_image(_: Path, data: bytes) -> str | None:
    """Compare the readers with each other and with Pillow."""
    opened, reason = read(data)
    expected = reference(data, size=opened and opened.size)
    if opened is not None:
        assert expected is not None, "accepted, but Pillow refuses it"
        assert_equal(opened, expected)
        return None
    is_large = "MiB in memory" in reason
    assert expected is None or is_large or not is_known(data), f"refused, but Pillow reads it: {reason}"
    return reason


def make_tiff(random: random.Random, folder: Path) -> bytes:
    """Write a TIFF of several pages, most often damaged."""
    pages = [picture(random, random.choice(("1", "L", "RGB", "RGBA", "CMYK", "I;16"))) for _ in range(random.randint(2, 4))]
    file, compression = io.BytesIO(), random.choice((None, "tiff_lzw", "tiff_deflate", "packbits", "tiff_adobe_deflate"))
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:], compression=compression)
    data = file.getvalue()
    for _ in range(random.choice((0, 1, 1, 2))):
        data = damage(random, data, base(random, "TIFF"))
    (folder / "scan.tif").write_bytes(data)
    return data


def check_tiff(folder: Path, data: bytes) -> str | None:
    """Compare each page with the frame that Pillow reads."""
    pages, reasons = documents.open_documents(folder / "scan.tif"), []
    expected = frames(data)
    for number in range(min(len(pages), 6)):
        try:
            opened = pages[number]["image"]
        except UserError as error:
            reasons.append(str(error))
            continue
        assert pages.describe(number)["image"] == opened.size, f"page {number} is {opened.size}, described otherwise"
        assert number < len(expected), f"page {number} is accepted; Pillow finds {len(expected)} pages"
        image = reference(data, expected[number])
        assert image is not None, f"page {number} is accepted, but Pillow refuses it"
        assert_equal(opened, image)
    return reasons[0] if reasons else None


def read(data: bytes) -> tuple[Image.Image | None, str]:
    """Return what `open_image` reads, or the reason why it is refused; all readers must agree."""
    answers = {}
    for name, reader in (("open", open_image), ("size", image_size), ("check", image_files.check_image)):
        try:
            answers[name] = reader(data, "x"), ""
        except UserError as error:
            answers[name] = None, str(error)
    (opened, reason), (size, _), (checked, objection) = answers["open"], answers["size"], answers["check"]
    if opened is None:
        assert checked is None, f"checked, but refused when opened: {reason}"
        return None, reason
    is_thin = max(opened.size) > MAX_ASPECT_RATIO * min(opened.size)
    assert opened.mode == "RGB" and size == opened.size, f"opened {opened.mode} {opened.size}; its header says {size}"
    assert checked is not None or is_thin, f"opened, but refused when checked: {objection}"
    return opened, ""


def reference(data: bytes, frame: int = 0, size: tuple[int, int] | None = None) -> np.ndarray | None:
    """Return the pixels that Pillow reads, upright, scaled from 16 bits, and on white; None if it refuses them.

    Args:
      size: expected, of a JPEG that is over the memory limit.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data))
            if frame:
                image.seek(frame)
            if image.width * image.height * 4 > memory_limit():
                scale = image.width * image.height / max(math.prod(size or ()), 1)
                image.draft(image.mode, tuple(side // round(math.sqrt(scale)) for side in image.size))
                if sorted(image.size) != sorted(size or ()):
                    return None
            image.load()
        except Exception:  # of any parser
            return None
        return np.asarray(to_rgb(upright(image)))


def upright(image: Image.Image) -> Image.Image:
    """Return an image as viewers show it, also with EXIF data that cannot be written again."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # of any parser
        try:
            turn = image.getexif().get(ORIENTATION, 1)
        except Exception:
            turn = 1
        return image.transpose(TURNS[turn]) if type(turn) is int and turn in TURNS else image


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image in RGB."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(float).clip(0, 65_535)
        scaled = np.floor(grey / 257 + 0.5).astype(np.uint8)
        if isinstance(key := image.info.get("transparency"), int):
            scaled[grey == key] = 255
        return Image.fromarray(scaled).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or image.info.get("transparency") is not None:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def assert_equal(opened: Image.Image, expected: np.ndarray) -> None:
    """Compare pixels with those of Pillow."""
    pixels = np.asarray(opened)
    assert pixels.shape == expected.shape, f"{pixels.shape} pixels; Pillow reads {expected.shape}"
    different = int((pixels != expected).any(axis=-1).sum())
    assert not different, f"{different} pixels differ from those of Pillow"


def is_known(data: bytes) -> bool:
    """Return whether Pillow opens the data as one of the formats that are read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (Image.open(io.BytesIO(data)).format or "") in (*FORMATS, "MPO")


def frames(data: bytes) -> list[int]:
    """Return the frames of a TIFF that are pages, by Pillow."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pages = [0]
        try:
            image, frame = Image.open(io.BytesIO(data)), 1
            while True:
                image.seek(frame)
                pages += [] if int(image.tag_v2.get(254, 0)) & REDUCED_OR_MASK else [frame]
                frame += 1
        except Exception:  # EOFError at the end, or of any parser
            return pages


def picture(random: random.Random, mode: str) -> Image.Image:
    """Return a small picture: noise, a gradient or one colour."""
    width, height = random.randint(1, 50), random.randint(1, 50)
    numbers = np.random.default_rng(random.randrange(2**32))
    if mode in ("I;16", "I", "F"):
        grey = numbers.integers(0, 65_536, (height, width))
        return Image.fromarray(grey.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    noise = Image.fromarray(numbers.integers(0, 256, (height, width, 3), np.uint8))
    if mode in ("RGBA", "LA"):
        noise.putalpha(Image.fromarray(numbers.integers(0, 256, (height, width), np.uint8)))
    image = noise.convert(mode)
    if mode in ("P", "L", "RGB") and random.random() < 0.2:
        image.info["transparency"] = random.randrange(256) if mode != "RGB" else (1, 2, 3)
    return image


def base(random: random.Random, format: str = "") -> bytes:
    """Return an encoded picture of a format in a mode that it has."""
    while True:
        kind = format or random.choice((*FORMATS * 6, *OTHERS))
        options: dict = {
            "JPEG": {"progressive": random.random() < 0.4, "quality": random.randint(1, 100), "subsampling": random.randrange(3)},
            "PNG": {"compress_level": 1},
            "TIFF": {"compression": random.choice((None, "tiff_lzw", "tiff_deflate", "packbits", "jpeg", "group4"))},
            "WEBP": {"lossless": random.random() < 0.5, "method": 0},
            "AVIF": {"speed": 10},
        }.get(kind, {})
        image = picture(random, random.choice(MODES))
        if kind in ("PNG", "GIF", "WEBP", "MPO") and random.random() < 0.2:
            options |= {"save_all": True, "append_images": [picture(random, image.mode).resize(image.size) for _ in range(2)]}
        if kind in ("JPEG", "PNG", "TIFF", "WEBP", "AVIF", "JPEG2000") and random.random() < 0.3:
            exif = Image.Exif()
            exif[ORIENTATION] = random.randrange(10)
            options |= {"exif": exif} if kind != "JPEG2000" else {}
        file = io.BytesIO()
        try:
            image.save(file, kind, **options)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # the format lacks the mode
            continue
        return file.getvalue()


def add_exif(random: random.Random, data: bytes) -> bytes:
    """Put EXIF data with random fields, one of them an orientation, in a JPEG, PNG or WebP; else damage the data."""
    order = random.choice("<>")
    fields = [struct.pack(order + "HHI2sxx", ORIENTATION, 3, 1, struct.pack(order + "H", random.randrange(10)))]
    for _ in range(random.randint(0, 3)):
        count = random.choice((0, 1, 3, 9, 2**31))
        fields.append(struct.pack(order + "HHI", random.randrange(2**16), random.randrange(20), count) + random.randbytes(4))
    random.shuffle(fields)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(fields))
    exif = head + b"".join(fields) + bytes(4)
    if data[:3] == b"\xff\xd8\xff":
        body = b"Exif\0\0" + exif
        return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]
    if data[:4] == b"\x89PNG":
        return insert_chunk(random, data, b"eXIf", exif)
    return damage(random, data)


def add_chunk(random: random.Random, data: bytes) -> bytes:
    """Put a chunk of a known or unknown kind in a PNG, a segment in a JPEG; else damage the data."""
    content = random.randbytes(random.randint(0, 60))
    if data[:4] == b"\x89PNG":
        kinds = [b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"tRNS", b"gAMA", b"PLTE", b"acTL"]
        kinds += [b"fcTL", b"abCD", b"IHDR", b"IDAT", b"pHYs"]
        return insert_chunk(random, data, random.choice(kinds), content)
    if data[:3] == b"\xff\xd8\xff":
        marker = random.choice((0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xDB, 0xC4, 0xDD, 0xFE, 0xC0))
        return data[:2] + bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content + data[2:]
    return damage(random, data)


def insert_chunk(random: random.Random, data: bytes, kind: bytes, content: bytes) -> bytes:
    """Put a chunk with a right checksum before or after another one of a PNG."""
    offsets, offset = [], 8
    while offset + 12 <= len(data):
        offsets.append(offset)
        offset += 12 + int.from_bytes(data[offset : offset + 4], "big")
    offset = random.choice(offsets or [len(data)])
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return data[:offset] + chunk + data[offset:]


def resize_header(random: random.Random, data: bytes) -> bytes:
    """Write another size to a header, with its checksum; else damage the data."""
    content = bytearray(data)
    width, height = (random.choice((random.randint(1, 80), 4000, *EXTREMES)) for _ in range(2))
    if data[:4] == b"\x89PNG" and len(data) > 33:
        content[16:24] = struct.pack(">II", width, height)
        content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    elif data[:3] == b"GIF" and len(data) > 10:
        content[6:10] = struct.pack("<HH", width % 65_536, height % 65_536)
    elif data[:2] == b"BM" and len(data) > 26:
        content[18:26] = struct.pack("<II", width, height)
    elif data[:3] == b"\xff\xd8\xff" and (offset := max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))) > 0:
        content[offset + 5 : offset + 9] = struct.pack(">HH", height % 65_536, width % 65_536)
    else:
        return damage(random, data)
    return bytes(content)

"""Opening of images, against the pixels that transformers reads."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from metaembed_jax.errors import UserError
from metaembed_jax.inputs import images
from metaembed_jax.inputs.images import image_size, open_image


def noise(width, height, mode="RGB", seed=0):
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    layers = [Image.fromarray(pixels[..., band]) for band in range(bands)]
    return Image.merge(mode, layers) if bands > 1 else layers[0]


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def reference(image):
    """Return the pixels of an open image or a file from which every image processor of transformers starts."""
    pytest.importorskip("torch")
    transforms, utils = (pytest.importorskip(f"transformers.{name}") for name in ("image_transforms", "image_utils"))
    return np.asarray(utils.load_image(image)) if isinstance(image, str) else transforms.convert_to_rgb(image, return_numpy=True)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "1", "P", "palette with transparency"])
def test_every_mode_is_converted_as_by_transformers(mode):
    image = noise(83, 47)
    if mode == "palette with transparency":
        image = image.quantize(16)
        image.info["transparency"] = 3
    elif mode in ("1", "P"):
        image = image.convert(mode)
    else:
        image = noise(83, 47, mode)
    opened = open_image(image, "x")
    assert opened.mode == "RGB"
    np.testing.assert_array_equal(opened, reference(image))


def test_files_are_turned_upright_and_open_images_are_not(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    data = encode(noise(90, 40), "JPEG", exif=exif)
    path = tmp_path / "turned.jpg"
    path.write_bytes(data)
    for image in (data, path, str(path)):
        assert open_image(image, "x").size == (40, 90)
        np.testing.assert_array_equal(open_image(image, "x"), reference(str(path)))
    assert open_image(Image.open(path), "x").size == (90, 40)
    np.testing.assert_array_equal(open_image(Image.open(path), "x"), reference(Image.open(path)))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP"])
def test_sizes_are_those_of_the_opened_image_without_decoding_it(tmp_path, monkeypatch, format):
    encoded = [encode(noise(9, 4), format)]
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        encoded.append(encode(noise(9, 4), format, exif=exif))
    expected = [open_image(image, "x").size for image in encoded]
    assert set(expected) == ({(9, 4)} if format in ("GIF", "BMP") else {(9, 4), (4, 9)})
    (tmp_path / "image").write_bytes(encoded[6])
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert [image_size(image, "x") for image in encoded] == expected
    assert image_size(tmp_path / "image", "x") == image_size(str(tmp_path / "image"), "x") == expected[6]


def test_a_png_may_say_behind_its_pixels_that_it_is_turned():
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(noise(9, 4))
    end = data.index(b"IEND") - 4
    for late, size in (
        (chunk(b"tEXt", b"date:create\0today"), (9, 4)),
        (chunk(b"eXIf", exif.tobytes()[6:]), (4, 9)),
        (chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b'<x tiff:Orientation="6"/>'), (4, 9)),
    ):
        image = data[:end] + late + data[end:]
        assert image_size(image, "x") == open_image(image, "x").size == size


def test_broken_pixels_before_late_metadata_are_an_error():
    exif = Image.Exif()
    exif[0x0112] = 6
    data, late = encode(noise(60, 40)), b"eXIf" + exif.tobytes()[6:]
    end, middle = data.index(b"IEND") - 4, len(data) // 2
    late = struct.pack(">I", len(late) - 4) + late + struct.pack(">I", zlib.crc32(late))
    for broken in (
        data[:middle] + bytes(8) + data[middle + 8 : end] + late + data[end:],
        data[:60] + bytes(9) + data[69:end] + late,
    ):
        with pytest.raises(UserError, match="^x: the image cannot be read"):
            open_image(broken, "x")


def test_what_cannot_be_read_is_named(tmp_path):
    whole = encode(noise(200, 100), "JPEG")
    for image in (whole[: len(whole) // 2], b"", b"not an image", tmp_path / "absent.png", encode(noise(99, 99))[:3000]):
        with pytest.raises(UserError, match="^icons row 7: the image cannot be read") as error:
            open_image(image, "icons row 7")
        assert "\n" not in str(error.value) and " at 0x" not in str(error.value)


def test_size_is_bounded_before_decoding(monkeypatch):
    data = encode(noise(50, 40))
    monkeypatch.setattr(images, "PIXEL_BYTES", 4 << 20)  # a pixel is as large as a megapixel
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    message = "^row 3: the image is 50x40 pixels, 8,000 MiB in memory; expected at most 512 MiB; .* set --image-mib=8000 "
    for read in (open_image, image_size):
        with pytest.raises(UserError, match=message):
            read(data, "row 3")
    monkeypatch.setenv("METAEMBED_IMAGE_MIB", "8000")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)  # Pillow's own limit is of no concern
    assert image_size(data, "row 3") == (50, 40)
    monkeypatch.setenv("METAEMBED_IMAGE_MIB", "many")
    with pytest.raises(UserError, match="'many': expected the MiB of a decoded image, 1 to 1048575"):
        image_size(data, "row 3")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_over_the_limit_is_decoded_smaller(monkeypatch, mode):
    turned = Image.Exif()
    turned[0x0112] = 6
    data = encode(noise(90, 61, mode), "JPEG", exif=turned)
    monkeypatch.setattr(images, "PIXEL_BYTES", 4 << 20)
    for limit, size in ((90 * 61, (61, 90)), (90 * 61 - 1, (31, 45)), (45 * 31 - 1, (16, 23)), (8 * 12, (8, 12))):
        monkeypatch.setenv("METAEMBED_IMAGE_MIB", str(4 * limit))
        assert open_image(data, "x").size == image_size(data, "x") == size
    monkeypatch.setenv("METAEMBED_IMAGE_MIB", str(4 * (8 * 12 - 1)))
    with pytest.raises(UserError, match="^x: the image is 12x8 pixels"):
        open_image(data, "x")


def test_the_coefficients_of_a_progressive_jpeg_count(monkeypatch):
    monkeypatch.setattr(images, "_coefficient_bytes", lambda image, f=images._coefficient_bytes: f(image) << 20)
    monkeypatch.setattr(images, "PIXEL_BYTES", 4 << 20)
    for subsampling, samples in (("4:4:4", 3), ("4:2:0", 1.5)):
        data = encode(noise(80, 60), "JPEG", progressive=True, subsampling=subsampling)
        needed = int(2 * samples * 80 * 60)
        for limit, size in ((needed + 4 * 80 * 60, (80, 60)), (needed + 4 * 80 * 60 - 1, (40, 30)), (needed + 4 * 10 * 8, (10, 8))):
            monkeypatch.setenv("METAEMBED_IMAGE_MIB", str(limit))
            assert open_image(data, "x").size == size
        monkeypatch.setenv("METAEMBED_IMAGE_MIB", str(needed))
        with pytest.raises(UserError, match=f"set --image-mib={needed + 4 * 10 * 8} "):
            open_image(data, "x")


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bits_of_grey_are_scaled(format):
    grey = np.array([[0, 128, 129, 600, 32896], [257, 40_000, 65_406, 65_407, 65_535]], np.uint16)
    opened = np.asarray(open_image(encode(Image.fromarray(grey), format), "x"))
    np.testing.assert_array_equal(opened, np.repeat(np.rint(grey / 257).astype(np.uint8)[..., None], 3, axis=2))


def exif_with(*fields, order="<"):
    """EXIF data of fields (tag, type, count, four bytes)."""
    packed = [struct.pack(order + "HHI", *field[:3]) + field[3].ljust(4, b"\0") for field in fields]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(packed))
    return b"Exif\0\0" + head + b"".join(packed) + bytes(4)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "YCbCr", "1", "P", "I;16", "I"])
def test_strips_are_converted_as_the_whole(monkeypatch, mode):
    if mode.startswith("I"):
        image = Image.fromarray(
            np.random.default_rng(0).integers(0, 65_536, (31, 23)).astype(np.uint16 if ";" in mode else np.int32)
        )
    else:
        image = noise(23, 31).convert(mode) if mode in "1P" else noise(23, 31, mode)
    image.info["transparency"] = 3 if mode in ("L", "P") else None
    whole = open_image(image, "x")
    monkeypatch.setattr(images, "STRIP_PIXELS", 23 * 4)
    np.testing.assert_array_equal(open_image(image, "x"), whole)


@pytest.mark.parametrize("format", ["PNG", "GIF", "WEBP", "AVIF", "TIFF", "MPO"])
def test_the_first_frame_is_read(format):
    if format not in Image.SAVE and not Image.init() and format not in Image.SAVE:
        pytest.skip(f"Pillow is built without {format}")
    colours = [Image.new("RGB", (40, 30), colour) for colour in ("red", "lime", "blue")]
    data = encode(colours[0], format, save_all=True, append_images=colours[1:])
    opened = open_image(data, "x")
    assert opened.size == image_size(data, "x") == (40, 30) and np.abs(np.asarray(opened).mean((0, 1)) - (255, 0, 0)).max() < 3


@pytest.mark.parametrize("format", ["ICO", "TGA", "EPS", "PCX", "HEIC"])
def test_other_formats_are_named_as_such(format):
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" if format == "HEIC" else encode(noise(32, 32), format)
    expected = "it is HEIC, which is not read; convert it to JPEG" if format == "HEIC" else "its format is none of JPEG, PNG, WEBP"
    for read in (open_image, image_size):
        with pytest.raises(UserError, match=f"^row 3: the image cannot be read: {expected}"):
            read(data, "row 3")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_metadata_never_cost_the_picture(format):
    turned = (0x0112, 3, 1, b"\6\0")
    for number in range(300):
        random = np.random.default_rng(number)
        tag, kind, count = int(random.integers(0x100, 0x9300)), int(random.integers(0, 20)), int(random.choice([0, 1, 3, 9, 2**31]))
        field = (0x11B, 2, 3, b"72\0") if number == 0 else (tag, kind, count, random.bytes(4))
        data = encode(noise(9, 4), format, exif=exif_with(turned, field))
        opened = open_image(data, "x")
        assert opened.size == image_size(data, "x") == (4, 9), field
        assert opened.getexif().get(0x0112, 1) == 1
    for exif in (b"Exif\0\0nonsense", exif_with((0x0112, 2, 3, b"up\0")), exif_with((0x0112, 3, 1, b"\x63\0"))):
        data = encode(noise(9, 4), format, exif=exif)
        assert open_image(data, "x").size == image_size(data, "x") == (9, 4)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [12_000, 60_000])
def test_a_decompression_bomb_is_refused(side):
    data = bytearray(encode(Image.new("L", (5, 5))))
    data[16:24] = struct.pack(">II", side, side)  # the size in the header of a PNG, and its checksum
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(UserError, match="^row 3: the image .*pixels"):
        open_image(bytes(data), "row 3")


def test_an_open_rgb_image_comes_back_itself():
    image = noise(30, 20)
    assert open_image(image, "x") is image
    np.testing.assert_array_equal(open_image(encode(image), "x"), image)


def test_images_without_pixels_are_refused_by_name():
    with pytest.raises(UserError, match="^row 3: the image is 0x5"):
        open_image(Image.new("RGB", (0, 5)), "row 3")


@pytest.mark.parametrize("side", [1448, 1449, 1456])
def test_a_jpeg_is_decoded_at_the_largest_scale_that_fits(side, monkeypatch):
    """Its sides are rounded up: an eighth of 1449 pixels is 182, whose memory is above that of 181."""
    monkeypatch.setattr(images, "memory_limit", lambda: 181 * 181 * images.PIXEL_BYTES)
    content = encode(noise(side, side, "L"), "JPEG", quality=30)
    if side == 1448:
        assert open_image(content, "x").size == (181, 181)
    else:
        with pytest.raises(UserError, match="x: the image is 182x182 pixels"):
            open_image(content, "x")

"""Images against transformers' Pillow processor and window index, and as properties."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from metaembed_jax.data.images import ImageConfig, patchify, smart_resize, window_layout
from metaembed_jax.errors import UserError
from metaembed_jax.inputs import images
from metaembed_jax.inputs.images import open_image

CONFIG = ImageConfig(min_pixels=56 * 56, max_pixels=40 * 28 * 28)
MEAN, STD = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
SIDES = st.integers(1, 400)


def noise(width, height, mode="RGB", seed=0):
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    layers = [Image.fromarray(pixels[..., band]) for band in range(bands)]
    return Image.merge(mode, layers) if bands > 1 else layers[0]


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def reference(image, config=CONFIG):
    """Pixels [P, 3, 2, 196] in raster order of units, normalised, and the grid of patches."""
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    processor = module.Qwen2VLImageProcessorPil(size={"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels})
    output = processor(image, return_tensors="np")
    return output["pixel_values"].reshape(-1, 3, 2, 196), output["image_grid_thw"][0]


def normalised(patches):
    """Our patches in raster order of units, with the arithmetic of the device."""
    raster = patches.patches.reshape(-1, 4, 588)[patches.raster].reshape(-1, 3, 196)
    return (raster.astype(np.float32) / 255 - np.float32(MEAN)[:, None]) / np.float32(STD)[:, None]


def assert_equals_reference(image, opened, config=CONFIG):
    expected, grid = reference(image, config)
    patches = patchify(opened, config)
    assert (1, 2 * patches.grid[0], 2 * patches.grid[1]) == tuple(grid)
    ours = normalised(patches)
    for frame in range(2):
        np.testing.assert_allclose(ours, expected[:, :, frame], rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(37, 91), (301, 203), (28, 28), (1, 1), (1, 200), (199, 1), (800, 61), (113, 560), (57, 56)])
def test_patches_equal_the_pillow_processor_of_transformers(size):
    image = noise(*size)
    assert_equals_reference(image, open_image(image, "x"))
    assert_equals_reference(image, open_image(encode(image), "x"))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "1", "P", "I;16", "palette with transparency"])
def test_every_mode_is_converted_as_by_transformers(mode):
    image = noise(83, 47)
    if mode == "I;16":
        image = Image.fromarray(np.random.default_rng(0).integers(0, 600, (47, 83)).astype(np.uint16))
    elif mode == "palette with transparency":
        image = image.quantize(16)
        image.info["transparency"] = 3
    elif mode in ("1", "P"):
        image = image.convert(mode)
    else:
        image = noise(83, 47, mode)
    assert_equals_reference(image, open_image(image, "x"))
    assert open_image(image, "x").mode == "RGB"


def test_files_are_turned_upright_and_open_images_are_not(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    data = encode(noise(90, 40), "JPEG", exif=exif)
    path = tmp_path / "turned.jpg"
    path.write_bytes(data)
    for image in (data, path, str(path)):
        assert open_image(image, "x").size == (40, 90)
        assert_equals_reference(str(path), open_image(image, "x"))
    assert open_image(Image.open(path), "x").size == (90, 40)
    assert_equals_reference(Image.open(path), open_image(Image.open(path), "x"))


@settings(max_examples=200, deadline=None)
@given(SIDES, SIDES, st.integers(1, 60), st.integers(0, 60))
def test_smart_resize_equals_transformers(height, width, smallest, more):
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    bounds = (28, smallest * 784 - 5, (smallest + more) * 784 + 3)
    try:
        expected = module.smart_resize(height, width, *bounds)
    except ValueError:
        with pytest.raises(UserError, match="over 200 times"):
            smart_resize(height, width, *bounds)
    else:
        assert smart_resize(height, width, *bounds) == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 14), st.integers(1, 14), st.sampled_from([56, 84, 112]))
def test_windows_hold_every_unit_once_and_its_own_neighbours(rows, columns, window_size):
    config = ImageConfig(1, 10**6, window_size=window_size)
    side = window_size // 28
    layout = window_layout(rows, columns, config)
    assert sorted(layout[layout >= 0]) == list(range(rows * columns))
    windows = layout.reshape(-1, side * side)
    assert len(windows) == -(-rows // side) * -(-columns // side)
    across = -(-columns // side)
    for number, window in enumerate(windows):
        for slot, unit in enumerate(window):
            row, column = number // across * side + slot // side, number % across * side + slot % side
            assert unit == (row * columns + column if row < rows and column < columns else -1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 13), st.integers(1, 13))
def test_window_order_is_that_of_transformers_without_the_padding(rows, columns):
    torch = pytest.importorskip("torch")
    vision = pytest.importorskip("transformers.vision_utils")
    index, bounds = vision.get_vision_window_index(torch.tensor([[1, 2 * rows, 2 * columns]]), 2, 112, 14)
    layout = window_layout(rows, columns, CONFIG)
    np.testing.assert_array_equal(layout[layout >= 0], index.numpy())
    filled = (layout.reshape(-1, 16) >= 0).sum(axis=1) * 4
    np.testing.assert_array_equal(np.cumsum(filled), torch.unique_consecutive(torch.as_tensor(bounds))[1:].numpy())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 11), st.integers(1, 11), st.integers(0, 2**31))
def test_each_patch_is_the_square_of_the_image_that_its_position_names(rows, columns, seed):
    config = ImageConfig(1, 10**7)
    image = noise(columns * 28, rows * 28, seed=seed)  # so that nothing is resized
    patches = patchify(image, config)
    assert patches.grid == (rows, columns)
    assert len(patches.mask) % 64 == 0
    assert patches.mask.sum() == rows * columns * 4
    assert len(np.unique(patches.positions[patches.mask], axis=0)) == rows * columns * 4
    assert not patches.patches[~patches.mask].any() and not patches.positions[~patches.mask].any()
    pixels = np.asarray(image)
    for patch, (row, column) in zip(patches.patches[patches.mask], patches.positions[patches.mask], strict=True):
        square = pixels[row * 14 : row * 14 + 14, column * 14 : column * 14 + 14]
        np.testing.assert_array_equal(patch.reshape(3, 14, 14), square.transpose(2, 0, 1))
    for unit, slot in enumerate(patches.raster):
        corner = (unit // columns * 2, unit % columns * 2)
        expected = np.array(corner) + [(0, 0), (0, 1), (1, 0), (1, 1)]
        np.testing.assert_array_equal(patches.positions[4 * slot : 4 * slot + 4], expected)


def test_dtypes_of_patches():
    patches = patchify(noise(90, 61), CONFIG)
    dtypes = [patches.patches.dtype, patches.positions.dtype, patches.mask.dtype, patches.raster.dtype]
    assert dtypes == [np.uint8, np.int32, np.bool_, np.int32]


def test_what_cannot_be_read_is_named(tmp_path):
    whole = encode(noise(200, 100), "JPEG")
    for image in (whole[: len(whole) // 2], b"", b"not an image", tmp_path / "absent.png", encode(noise(99, 99))[:3000]):
        with pytest.raises(UserError, match="^icons row 7: the image cannot be read") as error:
            open_image(image, "icons row 7")
        assert "\n" not in str(error.value)


def test_size_is_bounded_before_decoding(monkeypatch):
    data = encode(noise(50, 40))
    monkeypatch.setattr(images, "MAX_SOURCE_PIXELS", 1999)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UserError, match="^row 3: the image is 50x40 pixels"):
        open_image(data, "row 3")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_000, 60_000])
def test_a_decompression_bomb_is_refused(side):
    data = bytearray(encode(Image.new("L", (5, 5))))
    data[16:24] = struct.pack(">II", side, side)  # the size in the header of a PNG, and its checksum
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(UserError, match="^row 3: the image .*pixels"):
        open_image(bytes(data), "row 3")


def test_empty_and_thin_images_are_refused_by_name():
    with pytest.raises(UserError, match="^row 3: the image is 0x5"):
        open_image(Image.new("RGB", (0, 5)), "row 3")
    with pytest.raises(UserError, match="^row 3: one side of a 201x1 image is over 200 times"):
        patchify(noise(201, 1), CONFIG, "row 3")


@pytest.mark.parametrize(
    "preprocessor, expected",
    [
        ({"min_pixels": 3136, "max_pixels": 12845056}, (3136, 1024 * 784)),
        ({"size": {"shortest_edge": 784, "longest_edge": 7840}}, (784, 7840)),
        ({"size": {"shortest_edge": 1, "longest_edge": 2}, "min_pixels": 784, "max_pixels": 7840, "merge_size": 2}, (784, 7840)),
        ({}, (3136, 1024 * 784)),
    ],
)
def test_bounds_come_from_the_preprocessor(preprocessor, expected):
    config = ImageConfig.from_preprocessor(preprocessor)
    assert (config.min_pixels, config.max_pixels) == expected
    assert ImageConfig.from_preprocessor(preprocessor, max_visual_tokens=5).max_pixels == 5 * 784


@pytest.mark.parametrize("preprocessor", [{"min_pixels": 10**9}, {"resample": 2}, {"do_resize": False}])
def test_a_preprocessor_of_another_kind_is_refused(preprocessor):
    with pytest.raises(UserError):
        ImageConfig.from_preprocessor(preprocessor)

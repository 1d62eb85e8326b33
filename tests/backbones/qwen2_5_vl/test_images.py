"""Images against transformers' Pillow processor and window index, and as properties."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from metaembed_jax.backbones.qwen.images import fit_grid, smart_resize
from metaembed_jax.backbones.qwen2_5_vl.config import Config
from metaembed_jax.backbones.qwen2_5_vl.inputs import Images, Processor
from metaembed_jax.errors import UserError
from tests.backbones.qwen2_5_vl.reference import CONFIGURATIONS, tokenizer

CONFIG = Images(min_pixels=56 * 56, max_pixels=40 * 28 * 28)
ARCHITECTURE = Config.from_huggingface(CONFIGURATIONS["grouped"])
MEAN, STD = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
SIDES = st.integers(1, 400)


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def reference(image, config=CONFIG):
    """Pixels [P, 3, 2, 196] in raster order of units, normalised, and the grid of patches."""
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    processor = module.Qwen2VLImageProcessorPil(size={"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels})
    output = processor(image, return_tensors="np")
    return output["pixel_values"].reshape(-1, 3, 2, 196), output["image_grid_thw"][0]


def cut(image, config=CONFIG, name="image"):
    """An image's grid, its arrays, and the place of each unit in raster order."""
    example = Processor(tokenizer(), config).document({"image": image}, name=name)
    return config.grid(*image.size, None, None, name), example, example.visual[example.visual >= 0]


def normalised(example, raster):
    """Our patches in raster order of units, with the arithmetic of the device."""
    raster = example.patch_arrays["patches"].reshape(-1, 4, 588)[raster].reshape(-1, 3, 196)
    return (raster.astype(np.float32) / 255 - np.float32(MEAN)[:, None]) / np.float32(STD)[:, None]


def assert_equals_reference(image, config=CONFIG):
    expected, grid = reference(image, config)
    ours, example, raster = cut(image, config)
    assert (1, 2 * ours.rows, 2 * ours.columns) == tuple(grid)
    ours = normalised(example, raster)
    for frame in range(2):
        np.testing.assert_allclose(ours, expected[:, :, frame], rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(37, 91), (301, 203), (28, 28), (1, 1), (1, 200), (199, 1), (800, 61), (113, 560), (57, 56)])
def test_patches_equal_the_pillow_processor_of_transformers(size):
    assert_equals_reference(noise(*size))


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
def test_slots_hold_every_unit_once_beside_its_window(rows, columns, window_size):
    config = Images(1, 10**6, window_size=window_size)
    side = window_size // 28
    units, windows = config.order(rows, columns)
    assert units.shape == windows.shape and units.shape[1] == side**2
    assert config.patches(rows, columns) == 4 * units.size
    assert sorted(units[units >= 0]) == list(range(rows * columns))
    assert ((units < 0) == (windows < 0)).all()
    known = {}
    for slot, place in np.argwhere(units >= 0):
        row, column = divmod(int(units[slot, place]), columns)
        window = row // side, column // side
        assert known.setdefault(window, (slot, windows[slot, place])) == (slot, windows[slot, place])
    assert len(set(known.values())) == len(known)  # no two windows of one slot and number
    assert len(units) <= 1.7 * rows * columns / side**2 + 1  # first fit, largest first


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 13), st.integers(1, 13))
def test_windows_are_those_of_transformers(rows, columns):
    torch = pytest.importorskip("torch")
    vision = pytest.importorskip("transformers.vision_utils")
    index, bounds = vision.get_vision_window_index(torch.tensor([[1, 2 * rows, 2 * columns]]), 2, 112, 14)
    bounds = torch.unique_consecutive(torch.as_tensor(bounds)).numpy() // 4
    expected = {tuple(index.numpy()[first:last]) for first, last in itertools.pairwise(bounds)}
    units, windows = CONFIG.order(rows, columns)
    keys = np.arange(len(units))[:, None] * 16 + windows
    assert {tuple(units[(keys == key) & (units >= 0)]) for key in np.unique(keys[units >= 0])} == expected


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 11), st.integers(1, 11), st.integers(0, 2**31))
def test_each_patch_is_the_square_of_the_image_that_its_position_names(rows, columns, seed):
    config = Images(1, 10**7)
    image = noise(columns * 28, rows * 28, seed=seed)  # so that nothing is resized
    grid, example, raster = cut(image, config)
    patches, positions, mask = example.patch_arrays["patches"], example.patch_arrays["patch_positions"], example.patch_mask
    assert (grid.rows, grid.columns, grid.patches) == (rows, columns, len(mask))
    assert len(mask) % 64 == 0
    assert mask.sum() == rows * columns * 4
    assert len(np.unique(positions[mask], axis=0)) == rows * columns * 4
    assert not patches[~mask].any() and not positions[~mask].any()
    pixels = np.asarray(image)
    for patch, (row, column) in zip(patches[mask], positions[mask], strict=True):
        square = pixels[row * 14 : row * 14 + 14, column * 14 : column * 14 + 14]
        np.testing.assert_array_equal(patch.reshape(3, 14, 14), square.transpose(2, 0, 1))
    for unit, slot in enumerate(raster):
        corner = (unit // columns * 2, unit % columns * 2)
        expected = np.array(corner) + [(0, 0), (0, 1), (1, 0), (1, 1)]
        np.testing.assert_array_equal(positions[4 * slot : 4 * slot + 4], expected)
    dtypes = {name: array.dtype.name for name, array in example.patch_arrays.items()}
    assert dtypes == {"patches": "uint8", "patch_positions": "int32", "windows": "int32"}


@settings(max_examples=200, deadline=None)
@example(12, 12, 49)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 200))
def test_the_largest_grid_of_a_shape_that_fits(rows, columns, most):
    fitted = fit_grid(rows, columns, most)
    assert min(fitted) >= 1 and np.prod(fitted) <= most
    if rows * columns <= most:
        assert fitted == (rows, columns)
    elif min(fitted) > 1:  # of a side, less than one unit is lost, and the other side's loss of that
        shrink = (most / (rows * columns)) ** 0.5
        assert all(side * shrink - 1 < kept <= side * shrink + 1e-9 for side, kept in zip((rows, columns), fitted, strict=True))


def test_thin_images_are_refused_by_name():
    with pytest.raises(UserError, match="^row 3: one side of a 201x1 image is over 200 times"):
        cut(noise(201, 1), CONFIG, "row 3")


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
    images = Images.from_preprocessor(preprocessor, ARCHITECTURE, 1024)
    assert (images.min_pixels, images.max_pixels) == expected
    assert Images.from_preprocessor(preprocessor, ARCHITECTURE, 5).max_pixels == 5 * 784
    again = images.to_preprocessor(ARCHITECTURE)
    assert Images.from_preprocessor(again, ARCHITECTURE.with_preprocessor(again, "here"), 10**6) == images


@pytest.mark.parametrize("preprocessor", [{"min_pixels": 10**9}, {"resample": 2}, {"do_resize": False}, {"size": 784}])
def test_a_preprocessor_of_another_kind_is_refused(preprocessor):
    with pytest.raises(UserError):
        Images.from_preprocessor(preprocessor, ARCHITECTURE, 1024)

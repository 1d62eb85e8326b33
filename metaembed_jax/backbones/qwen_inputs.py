"""What the families of Qwen-VL share on the host: prompts, images in units of patches, M-RoPE positions.

    text          <|im_start|>user\\n{prefix}{text}<|im_end|><|endoftext|>
    image + text  <|im_start|>user\\n<|vision_start|><|image_pad|>...<|vision_end|>{prefix}{text}<|im_end|><|endoftext|>
    image         the same, with "Describe the image." for the text

`prefix` is "Query: " for queries, which end with ten more <|endoftext|> and "\\n", and empty for candidates. Meta Tokens are no
part of it: the network appends them.

S tokens, P patches, U units (merged 2x2 patches, each one visual token), X numbers in a patch.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import Bool, Int, UInt8
from PIL import Image
from tokenizers import Tokenizer

from metaembed_jax.errors import UserError
from metaembed_jax.inputs.examples import ArraySpec, Example, Layout
from metaembed_jax.inputs.images import open_image
from metaembed_jax.inputs.texts import PromptTokenizer, read_item

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
PAD_TOKEN = "<|endoftext|>"
IMAGE_ALONE = "Describe the image."
MAX_ASPECT_RATIO = 200  # beyond it transformers' processor refuses an image


def layout(patch_size: int) -> Layout:
    """The arrays of a batch.

    `positions` are those of M-RoPE; `visual_index` is of image tokens the slot of their unit, and -1 elsewhere; `patches` are
    pixels, one frame in (channel, y, x) order; `patch_positions` are row and column in the image's grid of patches.
    """
    tokens = {"positions": ArraySpec((3,), "int32"), "visual_index": ArraySpec((), "int32", -1)}
    patches = {
        "patches": ArraySpec((3 * patch_size**2,), "uint8"),
        "patch_positions": ArraySpec((2,), "int32"),
        "patch_mask": ArraySpec((), "bool"),
    }
    return Layout(tokens, patches)


class Patches(NamedTuple):
    """One image; P counts padding too.

    Attributes:
      patches: pixels, zero in padding.
      positions: row and column of each patch in the image's grid of patches, zero in padding.
      mask: true for patches of the image.
      grid: rows and columns of units.
      raster: for each unit in raster order, its slot among the units of `patches`.
    """

    patches: UInt8[np.ndarray, "P X"]
    positions: Int[np.ndarray, "P 2"]
    mask: Bool[np.ndarray, "P"]
    grid: tuple[int, int]
    raster: Int[np.ndarray, "U"]


@dataclasses.dataclass(frozen=True)
class QwenImages:
    """How images become patches: resized and normalised as transformers' `Qwen2VLImageProcessorPil` does.

    Attributes:
      min_pixels, max_pixels: bounds of the resized area (kept where `smart_resize` can keep them).
      patch_size: side of a patch, in pixels.
      merge_size: side of a unit, in patches.
    """

    min_pixels: int
    max_pixels: int
    patch_size: int
    merge_size: int

    processor_class = ""  # in transformers, of the family

    def __post_init__(self):
        if not 1 <= self.min_pixels <= self.max_pixels:
            raise UserError(f"image sizes: min_pixels={self.min_pixels} must be between 1 and max_pixels={self.max_pixels}")

    @property
    def unit_size(self) -> int:
        """Side of a unit, in pixels."""
        return self.patch_size * self.merge_size

    @classmethod
    def of(cls, min_pixels: int, max_pixels: int, config: object, max_visual_tokens: int | None) -> "QwenImages":
        """With the sizes of a family's `Config`, and a cap on the visual tokens of an image."""
        vision = config.vision_config
        chosen = cls(min_pixels, max_pixels, vision.patch_size, vision.spatial_merge_size)
        if max_visual_tokens is None:
            return chosen
        return dataclasses.replace(chosen, max_pixels=min(max_pixels, max_visual_tokens * chosen.unit_size**2))

    @classmethod
    def from_preprocessor(cls, preprocessor: dict, config: object, max_visual_tokens: int) -> "QwenImages":
        """From the content of preprocessor_config.json, where sizes stand as `min_pixels` or as `size.shortest_edge`.

        Raises:
          UserError: bounds that exclude each other, or a processing that is not Qwen's.
        """
        fixed = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3}
        for key, value in fixed.items():
            if preprocessor.get(key, value) != value:
                raise UserError(f"preprocessor_config.json: {key}={preprocessor[key]!r} is not supported, only {value!r}")
        size = preprocessor.get("size") or {}
        whole = {key: preprocessor[key] for key in ("min_pixels", "max_pixels") if key in preprocessor}
        for key, value in (whole | size if isinstance(size, dict) else {"size": size}).items():
            if value is not None and (type(value) is not int or value < 1):
                raise UserError(f"preprocessor_config.json: {key} is {value!r}, not a positive whole number")
        smallest = preprocessor.get("min_pixels") or size.get("min_pixels") or size.get("shortest_edge") or 56 * 56
        largest = preprocessor.get("max_pixels") or size.get("max_pixels") or size.get("longest_edge") or 1280 * 28 * 28
        return cls.of(smallest, largest, config, max_visual_tokens)

    @classmethod
    def from_run(cls, data: object, config: object, max_visual_tokens: int | None) -> "QwenImages":
        """From the `data` of a run's config, with its `min_pixels` and `max_pixels`."""
        return cls.of(data.min_pixels, data.max_pixels, config, max_visual_tokens)

    def to_preprocessor(self, config: object) -> dict:
        """The content of a preprocessor_config.json that transformers reads."""
        vision = config.vision_config
        return {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": self.processor_class,
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            "patch_size": self.patch_size,
            "temporal_patch_size": 2,
            "merge_size": self.merge_size,
            "image_mean": list(vision.image_mean),
            "image_std": list(vision.image_std),
            "rescale_factor": 1 / 255,
        }

    def order(self, rows: int, columns: int) -> Int[np.ndarray, "slots"]:
        """The raster number of the unit in each slot, -1 in padding; raster order, where a family has no windows."""
        return np.arange(rows * columns, dtype=np.int32)

    def patchify(self, image: Image.Image, name: str = "image") -> Patches:
        """Resizes an RGB image and cuts it into patches, unit by unit.

        Raises:
          UserError: the aspect ratio is out of bounds; names `name`.
        """
        try:
            height, width = smart_resize(image.height, image.width, self.unit_size, self.min_pixels, self.max_pixels)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
        rows, columns = height // self.unit_size, width // self.unit_size
        merge = {"m": self.merge_size, "n": self.merge_size}
        units = rearrange(pixels, "(r m y) (c n x) k -> (r c) (m n) (k y x)", y=self.patch_size, x=self.patch_size, **merge)
        places = np.indices((rows * self.merge_size, columns * self.merge_size), np.int32)
        places = rearrange(places, "k (r m) (c n) -> (r c) (m n) k", **merge)

        order = self.order(rows, columns)
        raster = np.empty(rows * columns, np.int32)
        slots = np.flatnonzero(order >= 0)
        raster[order[slots]] = slots

        def place(values):
            ordered = np.zeros((len(order), *values.shape[1:]), values.dtype)
            ordered[raster] = values
            return ordered.reshape(-1, values.shape[-1])

        mask = np.repeat(order >= 0, self.merge_size**2)
        return Patches(place(units), place(places), mask, (rows, columns), raster)


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size to resize to: multiples of `factor`, the aspect ratio about kept, the area within bounds where both allow it.

    The rule of `transformers.models.qwen2_vl`, rounding included; thin images and narrow bounds can exceed `max_pixels`.

    Raises:
      UserError: one side is more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise UserError(f"one side of a {width}x{height} image is over {MAX_ASPECT_RATIO} times the other; crop or pad it")
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(1, math.floor(side / shrink / factor)) for side in (height, width))
    elif rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / factor) for side in (height, width))
    return rows * factor, columns * factor


class QwenProcessor:
    """Turns items into examples with a checkpoint's tokenizer. Survives pickling, for worker processes."""

    title = ""  # of the family, for errors

    def __init__(self, tokenizer: Tokenizer, images: QwenImages):
        self.images = images
        self._tokenizer = PromptTokenizer(tokenizer, SPECIAL_TOKENS, self.title)
        self._newline = self._tokenizer.encode("\n")

    def query(self, item: dict, *, max_tokens: int | None = None, name: str = "query") -> Example:
        """An item of the query side: {"text": str, "image": PIL image or encoded bytes}, either or both.

        Args:
          item: text that is empty beside an image counts as absent. Special strings in it are plain text.
          max_tokens: what is longer loses the end of the user's text, never prompt or image tokens.
          name: of the item, for errors.

        Raises:
          UserError: nothing to encode, an unreadable image, or no room for prompt and image.
        """
        suffix = [self._tokenizer.ids["<|endoftext|>"]] * 10 + self._newline
        return self._example(item, "Query: ", suffix, max_tokens, name)

    def candidate(self, item: dict, *, max_tokens: int | None = None, name: str = "candidate") -> Example:
        """An item of the candidate side; otherwise as `query`."""
        return self._example(item, "", [], max_tokens, name)

    def _example(self, item: dict, prefix: str, suffix: list[int], max_tokens: int | None, name: str) -> Example:
        text, image = read_item(item, name)
        ids = self._tokenizer.ids
        patches = None if image is None else self.images.patchify(open_image(image, name), name)
        if patches is None:
            head, prompt, visual = [ids["<|im_start|>"]], f"user\n{prefix}", slice(0, 0)
        else:
            head = [ids["<|im_start|>"], *self._tokenizer.encode("user\n"), ids["<|vision_start|>"]]
            visual = slice(len(head), len(head) + len(patches.raster))
            head += [ids["<|image_pad|>"]] * len(patches.raster) + [ids["<|vision_end|>"]]
            prompt = prefix if text else prefix + IMAGE_ALONE
        tail = [ids["<|im_end|>"], ids["<|endoftext|>"], *suffix]

        room = None if max_tokens is None else max_tokens - len(head) - len(tail)
        tokens = np.array(head + self._tokenizer.fit(prompt, text, "", room, name) + tail, np.int32)
        visual_index, arrays = np.full(len(tokens), -1, np.int32), {}
        if patches is not None:
            visual_index[visual] = patches.raster
            arrays = {"patches": patches.patches, "patch_positions": patches.positions, "patch_mask": patches.mask}
        positions = rope_positions(len(tokens), visual.start, None if patches is None else patches.grid)
        return Example(tokens, {"positions": positions, "visual_index": visual_index}, arrays)


def rope_positions(length: int, start: int, grid: tuple[int, int] | None) -> Int[np.ndarray, "3 S"]:
    """M-RoPE: text counts on alike on three axes; an image from `start` holds time, and spans its rows and columns.

    After the image, text goes on past its larger side. The values of `get_rope_index` in transformers' models.
    """
    if grid is None:
        return np.tile(np.arange(length, dtype=np.int32), (3, 1))
    rows, columns = grid
    before, after = np.arange(start), np.arange(length - start - rows * columns) + start + max(rows, columns)
    image = np.stack([np.zeros(rows * columns, int), *np.indices((rows, columns)).reshape(2, -1)]) + start
    return np.concatenate([np.tile(before, (3, 1)), image, np.tile(after, (3, 1))], axis=1).astype(np.int32)

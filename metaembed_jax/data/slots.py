"""The rows of a batch: which shape class and row each item of a side takes, and the arrays that come of it.

N items of a side, C shape classes, M microbatches, b items of a microbatch.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from ml_collections import ConfigDict

from metaembed_jax.errors import UserError
from metaembed_jax.inputs.examples import Example, Layout, ShapeClass, blank, collate


class Slots(NamedTuple):
    """The rows that one side of every batch has.

    Attributes:
      shapes: the shape classes, in the config's order (smallest first).
      places: rows of each class that items can take, whatever the size of a microbatch.
      microbatches: M of each class, as many as hold these rows; the rest of the last one stays empty.
      size: items of a microbatch, over all hosts.
      rows: of each microbatch, those that this host makes.
    """

    shapes: tuple[ShapeClass, ...]
    places: tuple[int, ...]
    microbatches: tuple[int, ...]
    size: int
    rows: Int[np.ndarray, " n"]

    def offered(self, pictured: bool) -> list[int]:
        """The classes meant for an item with an image, or for one without; all, if there are none."""
        found = [number for number, shape in enumerate(self.shapes) if bool(shape.patches) == pictured]
        return found or list(range(len(self.shapes)))

    def longest(self, pictured: bool) -> int:
        """The most tokens that such an item may have: the end of a longer text is cut off."""
        return max(self.shapes[number].tokens for number in self.offered(pictured))

    @property
    def room(self) -> tuple[int, int]:
        """Rows of a step for images, and for all items."""
        return sum(count for count, shape in zip(self.places, self.shapes, strict=True) if shape.patches), sum(self.places)


def slots(config: ConfigDict, key: str, items: int, multiple: int, here: Int[np.ndarray, " n"]) -> Slots:
    """Reads shape classes (tokens, patches) or (tokens, patches, share); `items` are those of a side.

    A step has rows of a class for that share of the items, and `mixture` sees to it that they suffice. Without a share there are
    rows for all: any mixture fits, at the price of empty rows where there are several classes.

    Args:
      multiple: an image has a multiple of so many patches.
      here: of each microbatch, the rows that this host makes.

    Raises:
      UserError: no such number of patches, a share of nothing, or a microbatch that does not divide the items.
    """
    shapes, size = config.data[key], config.microbatch_size
    if items % size:
        raise UserError(f"config.data.{key}: {items} items are no whole microbatches of config.microbatch_size={size}")
    for _, patches, *_ in shapes:
        if patches % multiple:
            raise UserError(f"config.data.{key}: {patches} patches are no multiple of {multiple}, as this model has them")
    shares = [shape[2] if len(shape) == 3 else 1.0 for shape in shapes]
    if wrong := [share for share in shares if not 0 < share <= 1]:
        raise UserError(f"config.data.{key}: the share {wrong[0]} of a class must be above 0, and at most 1")
    places = tuple(math.ceil(round(share * items, 6)) for share in shares)  # 7/12 of 384 is 224
    microbatches = tuple(math.ceil(count / size) for count in places)
    return Slots(tuple(ShapeClass(*shape[:2]) for shape in shapes), places, microbatches, size, here)


def place(fits_NC: Bool[np.ndarray, "N C"], room: Sequence[int]) -> Int[np.ndarray, "N 2"]:
    """Gives every item a class that fits and a row in it: the first such class with room, choosiest items first.

    Returns:
      (class, row in the class) of each item; class -1 for an item that finds no place.
    """
    places_N2 = np.full((len(fits_NC), 2), -1)
    taken = [0] * len(room)
    for item in np.argsort(fits_NC.sum(axis=1), kind="stable"):
        for shape in np.flatnonzero(fits_NC[item]):
            if taken[shape] < room[shape]:
                places_N2[item] = shape, taken[shape]
                taken[shape] += 1
                break
    return places_N2


def fill(items: list[tuple[dict, str] | None], encode: Callable[..., Example], slots: Slots, layout: Layout) -> dict:
    """Puts the items of one side into rows, and collates those rows of each shape class that this host makes.

    Every host knows all places: where one class is for images and at most one for texts, without decoding what the others make.

    Args:
      items: (item, its name in errors) in order; None has any place, and there is nothing for it.
      encode: an item to an example: `query` or `candidate` of the family's `Processor`.
      layout: of a batch.

    Returns:
      {"groups": (dict of [M, b, ...] arrays of each class, ...), "order": int32 [N]}; see `pipeline.training_batches`. Beside the
      arrays of the layout is `item`: the number among `items` of what a row holds.

    Raises:
      UserError: an item does not fit, or its classes are full.
    """
    present = [number for number, one in enumerate(items) if one is not None]
    room = list(slots.places)
    limits = {number: slots.longest(_has_image(items[number])) for number in present}
    examples: dict[int, Example] = {}

    def example(number: int) -> Example:
        if number not in examples:
            content, name = items[number]
            examples[number] = encode(content, max_tokens=limits[number], name=name)
        return examples[number]

    def fits(number: int) -> list[bool]:
        pictured = _has_image(items[number])
        offered = slots.offered(pictured)
        if len(offered) == 1:
            return [n in offered or not pictured and shape.tokens >= limits[number] for n, shape in enumerate(slots.shapes)]
        size = _size(example(number))
        return [size.tokens <= shape.tokens and size.patches <= shape.patches for shape in slots.shapes]

    places_N2 = np.zeros((len(items), 2), int)
    places_N2[present] = place(np.array([fits(number) for number in present]).reshape(-1, len(room)), room)
    if lost := [number for number in present if places_N2[number, 0] < 0]:
        raise UserError(_no_place(items[lost[0]][1], example(lost[0]), slots, room))
    taken = {tuple(places_N2[number].tolist()): number for number in present}
    groups = []
    for number, (shape, microbatches) in enumerate(zip(slots.shapes, slots.microbatches, strict=True)):
        rows = np.arange(microbatches * slots.size).reshape(microbatches, slots.size)[:, slots.rows]
        chosen = [taken.get((number, row)) for row in rows.ravel().tolist()]
        made = [blank(layout) if one is None else example(one) for one in chosen]
        for one, found in zip(chosen, made, strict=True):
            if one is not None and any(np.array(_size(found)) > shape):
                raise UserError(_no_place(items[one][1], found, slots, room))
        arrays = collate(made, shape, layout) | {"item": np.array([0 if one is None else one for one in chosen], np.int32)}
        groups.append({key: value.reshape(*rows.shape, *value.shape[1:]) for key, value in arrays.items()})
    first_row = np.concatenate([[0], np.cumsum(slots.microbatches) * slots.size])
    return {"groups": tuple(groups), "order": (first_row[places_N2[:, 0]] + places_N2[:, 1]).astype(np.int32)}


def padding(batch: dict) -> dict[str, float]:
    """The fraction of each shape class of a batch that is empty: {"padding/{side}/{tokens}:{patches}/tokens" or "/patches"}."""
    found = {}
    for side in ("query", "candidate"):
        for group in batch[side]["groups"]:
            patches = group["patch_mask"].shape[-1] if "patch_mask" in group else 0
            name = f"padding/{side}/{group['mask'].shape[-1]}:{patches}"
            found[f"{name}/tokens"] = 1 - float(group["mask"].mean())
            if patches:
                found[f"{name}/patches"] = 1 - float(group["patch_mask"].mean())
    return found


def _has_image(named_item: tuple[dict, str]) -> bool:
    return named_item[0].get("image") is not None


def _size(example: Example) -> ShapeClass:
    return ShapeClass(len(example.tokens), example.patches)


def _no_place(name: str, example: Example, slots: Slots, room: list[int]) -> str:
    tokens, patches = _size(example)
    classes = zip(slots.shapes, room, strict=True)
    held = ", ".join(f"{shape.tokens} tokens and {shape.patches} patches x {rows} rows" for shape, rows in classes)
    return (
        f"{name}: {tokens} tokens and {patches} patches find no place in the batch's shape classes ({held}): "
        "enlarge one, or lower max_pixels (some families ignore it)"
    )

"""What the families of Qwen-VL share on the device: pixels, the tower's angles, and where units and appended rows go.

B batch, S tokens, P patches, X numbers in a patch, U units (merged 2x2 patches), D width, K head width, R appended rows.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from metaembed_jax.backbones.layers import inverse_frequencies


def normalised(patches_BPX: UInt8[Array, "B P X"], mean: Sequence[float], std: Sequence[float]) -> Float[Array, "B P X"]:
    """uint8 pixels in (channel, y, x) order as the floats that the patch kernel reads; mean and std of each channel."""
    pixels = patches_BPX.astype(jnp.float32).reshape(*patches_BPX.shape[:2], 3, -1) / 255.0
    mean, std = (jnp.asarray(values, jnp.float32)[:, None] for values in (mean, std))
    return ((pixels - mean) / std).reshape(patches_BPX.shape)


def patch_angles(positions_BP2: Int[Array, "B P 2"], head_width: int) -> tuple[Float[Array, "B P K"], Float[Array, "B P K"]]:
    """Cosines and sines of the tower: half of the angles turn with the row of a patch, half with its column."""
    half = head_width // 2
    angles = positions_BP2[..., None].astype(jnp.float32) * inverse_frequencies(half, 10000.0)
    angles = angles.reshape(*positions_BP2.shape[:2], half)
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def place_units(units_BUD: Float[Array, "B U D"], index_BS: Int[Array, "B S"], x_BSD: Float[Array, "B S D"]) -> Array:
    """x, with the unit that `index_BS` points at where it is not negative."""
    placed_BSD = jnp.take_along_axis(units_BUD, jnp.maximum(index_BS, 0)[..., None], axis=1)
    return jnp.where(index_BS[..., None] >= 0, placed_BSD, x_BSD)


def extend_positions(positions_B3S: Int[Array, "B 3 S"], rows: int) -> Int[Array, "B 3 S+rows"]:
    """Appended rows count on as text: one past the largest position of the prompt, alike on all three axes."""
    start_B11 = positions_B3S.max(axis=(1, 2), keepdims=True) + 1
    suffix = jnp.broadcast_to(start_B11 + jnp.arange(rows), (positions_B3S.shape[0], 3, rows))
    return jnp.concatenate([positions_B3S, suffix], axis=-1)

"""Attention inside windows as one kernel of a TPU, forward and backward, with the rotation of queries and keys inside.

It reads [N, D] as the projections leave it, heads side by side in D = H * K lanes, and writes the same; scores never leave the
chip, and the backward pass computes them again. A step of the grid takes a few tiles of 128 patches. Several windows share a tile:
scores of patches of different windows are masked.

Heads are not cut out. A head of width 80 starts in the middle of a register, and moving it to the start of one takes longer than to
multiply whole registers: lanes of other heads are zero in one factor where lanes are summed over, and dropped from the result where
they are kept.

    lanes           0       128      256     384
    registers       |   0   |   1    |   2   |
    heads           |  0 |  1  |  2  |  3 | ...
    head 1 reads    |===============|          zeros outside of head 1 in one factor

Scores are [keys, queries]: the softmax then reduces over sublanes, which is cheaper than over lanes, and two of the three products
with them in the backward pass need no transposition.

N patches, D width, H heads, K head width; L lanes of the registers that a head lies in; k keys and q queries of a tile.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

LANES = 128  # of a vector register
TILE = 128  # patches of a product: as many as a matrix unit has rows
TILES = {jnp.dtype("bfloat16"): 2, jnp.dtype("float32"): 1}  # of a step of the grid; the largest that fit v5e's memory on the chip
MASKED = -1e30  # score of a pair that is not in one window


def takes(heads: int, width: int, window: int, dtype) -> bool:
    """Return whether the kernel takes so many heads of this width, and windows of this size."""
    return TILE % window == 0 and heads * width % LANES == 0 and width % 2 == 0 and jnp.dtype(dtype) in TILES


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def attend(
    query_ND: Float[Array, "N D"],
    key_ND: Float[Array, "N D"],
    value_ND: Float[Array, "N D"],
    cos_NK: Float[Array, "N K"],
    sin_NK: Float[Array, "N K"],
    group_N: Int[Array, "N"],
    interpret: bool,
) -> Float[Array, "N D"]:
    """Attention of each patch to the patches of its group.

    Args:
      query_ND, key_ND: not rotated yet.
      group_N: equal for the patches of a window; no group lies in two tiles of 128 patches. Patches fill whole tiles.
      interpret: run by Pallas' interpreter, on any device.
    """
    arrays = (query_ND, key_ND, value_ND)
    (mixed_ND,) = _call(_forward, arrays, (cos_NK, sin_NK), group_N, results=1, products=2, interpret=interpret)
    return mixed_ND


def _attend_forward(query_ND, key_ND, value_ND, cos_NK, sin_NK, group_N, interpret):
    residuals = (query_ND, key_ND, value_ND, cos_NK, sin_NK, group_N)
    return attend(*residuals, interpret), residuals


def _attend_backward(interpret, residuals, cotangent_ND):
    *arrays, cos_NK, sin_NK, group_N = residuals
    arrays = (*arrays, cotangent_ND)
    gradients = _call(_backward, arrays, (cos_NK, sin_NK), group_N, results=3, products=5, interpret=interpret)
    return *gradients, None, None, None


attend.defvjp(_attend_forward, _attend_backward)


def _call(body, arrays, angles, group_N, *, results: int, products: int, interpret: bool):
    """Run a kernel over all tiles; `products` of [TILE, K] and [K, TILE], or of that size, for a tile and head."""
    (N, D), dtype = arrays[0].shape, arrays[0].dtype
    tiles, heads = N // TILE, D // angles[0].shape[1]
    step = math.gcd(tiles, TILES[dtype])

    def rows(width):
        return pl.BlockSpec((step * TILE, width), lambda i: (i, 0))

    read = sum(x.size * x.dtype.itemsize for x in (*arrays, *angles, group_N))
    cost = pl.CostEstimate(
        flops=2 * products * N * TILE * D,
        bytes_accessed=read + results * N * D * dtype.itemsize,
        transcendentals=N * TILE * heads,
    )
    return pl.pallas_call(
        partial(body, heads=heads),
        grid=(tiles // step,),
        in_specs=[pl.BlockSpec((step, 1, TILE), lambda i: (i, 0, 0)), *[rows(x.shape[1]) for x in (*angles, *arrays)]],
        out_specs=[rows(D)] * results,
        out_shape=[jax.ShapeDtypeStruct((N, D), dtype)] * results,
        scratch_shapes=[pltpu.VMEM((TILE, D), jnp.float32)] * results,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=cost,
        interpret=interpret,
        name=f"window_attention{body.__name__}",
    )(group_N.reshape(tiles, 1, TILE), *angles, *arrays)


def _forward(group_ref, cos_ref, sin_ref, query_ref, key_ref, value_ref, out_ref, mixed_ref, *, heads):
    width = query_ref.shape[1] // heads

    @pl.loop(0, query_ref.shape[0] // TILE)
    def _(tile):
        rows = _rows(tile)
        visible = _same_group(group_ref[tile])
        rotation = _Rotation(cos_ref[rows, :], sin_ref[rows, :], heads)
        query, key = (rotation.apply(ref[rows, :]) for ref in (query_ref, key_ref))
        value = value_ref[rows, :]
        for head in range(heads):
            lanes = _registers(head, width)
            weights_kq = _weights(key[:, lanes], _only(query[:, lanes], head, width), visible, width)
            _put(mixed_ref, head, width, _dot(weights_kq.astype(value.dtype), value[:, lanes], 0, 0))
        out_ref[rows, :] = mixed_ref[...].astype(out_ref.dtype)


def _backward(group_ref, cos_ref, sin_ref, *refs, heads):
    query_ref, key_ref, value_ref, cotangent_ref, *gradient_refs = refs
    gradient_refs, (query32_ref, key32_ref, value32_ref) = gradient_refs[:3], gradient_refs[3:]
    width, dtype = query_ref.shape[1] // heads, query_ref.dtype

    @pl.loop(0, query_ref.shape[0] // TILE)
    def _(tile):
        rows = _rows(tile)
        visible = _same_group(group_ref[tile])
        rotation = _Rotation(cos_ref[rows, :], sin_ref[rows, :], heads)
        query, key = (rotation.apply(ref[rows, :]) for ref in (query_ref, key_ref))
        value, cotangent = value_ref[rows, :], cotangent_ref[rows, :]
        for head in range(heads):
            lanes = _registers(head, width)
            own_query, own_cotangent = (_only(x[:, lanes], head, width) for x in (query, cotangent))
            weights_kq = _weights(key[:, lanes], own_query, visible, width)
            toward_kq = _dot(value[:, lanes], own_cotangent, 1, 1)
            toward_kq = weights_kq * (toward_kq - (weights_kq * toward_kq).sum(axis=0, keepdims=True)) * width**-0.5
            weights_kq, toward_kq = weights_kq.astype(dtype), toward_kq.astype(dtype)
            _put(query32_ref, head, width, _dot(toward_kq, key[:, lanes], 0, 0))
            _put(key32_ref, head, width, _dot(toward_kq, own_query, 1, 0))
            _put(value32_ref, head, width, _dot(weights_kq, own_cotangent, 1, 0))
        gradients = rotation.transpose(query32_ref[...]), rotation.transpose(key32_ref[...]), value32_ref[...]
        for ref, gradient in zip(gradient_refs, gradients, strict=True):
            ref[rows, :] = gradient.astype(dtype)


class _Rotation:
    """Rotary embedding in the two-halves convention, of all heads at once, in float32; see `layers.rotate`.

    The partner of a lane is half a head after it or before it. Each has its own sines, 0 where the other is the partner.
    """

    def __init__(self, cos_qK: Array, sin_qK: Array, heads: int):
        width = cos_qK.shape[1]
        self._half = width // 2
        period = math.lcm(width, LANES)  # heads repeat so, register by register
        second = jax.lax.broadcasted_iota(jnp.int32, (1, width), 1) >= self._half

        def every_head(x_qK):
            x = jnp.concatenate([x_qK] * (period // width), axis=1)
            return jnp.concatenate([x] * (heads * width // period), axis=1)

        self._cos = every_head(cos_qK)
        self._sin_first, self._sin_second = every_head(jnp.where(second, 0.0, -sin_qK)), every_head(jnp.where(second, sin_qK, 0.0))

    def apply(self, x_qD: Array) -> Array:
        x32 = x_qD.astype(jnp.float32)
        rotated = x32 * self._cos + self._after(x32) * self._sin_first + self._before(x32) * self._sin_second
        return rotated.astype(x_qD.dtype)

    def transpose(self, x_qD: Array) -> Array:
        return x_qD * self._cos + self._before(x_qD * self._sin_first) + self._after(x_qD * self._sin_second)

    def _after(self, x_qD: Array) -> Array:
        return pltpu.roll(x_qD, x_qD.shape[1] - self._half, 1)

    def _before(self, x_qD: Array) -> Array:
        return pltpu.roll(x_qD, self._half, 1)


def _rows(tile) -> pl.Slice:
    return pl.ds(pl.multiple_of(tile * TILE, TILE), TILE)


def _same_group(group_1q: Array) -> Array:
    """Return which keys and queries of a tile are of one group, [k, q]."""
    group_kq = jnp.broadcast_to(group_1q, (TILE, TILE))
    return group_kq == group_kq.T


def _weights(key_kL: Array, own_query_qL: Array, visible_kq: Array, width: int) -> Array:
    """Return the softmax over keys, in float32."""
    scores_kq = jnp.where(visible_kq, _dot(key_kL, own_query_qL, 1, 1) * width**-0.5, MASKED)
    weights_kq = jnp.exp(scores_kq - scores_kq.max(axis=0, keepdims=True))
    return weights_kq / weights_kq.sum(axis=0, keepdims=True)


def _dot(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """Return the float32 product over these axes; of float32 factors it does not round them to bfloat16."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    axes = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, axes, precision=precision, preferred_element_type=jnp.float32)


def _registers(head: int, width: int) -> slice:
    """Return the lanes of the registers that a head lies in."""
    return slice(head * width // LANES * LANES, -(-(head + 1) * width // LANES) * LANES)


def _only(x_qL: Array, head: int, width: int) -> Array:
    """Return the registers of a head with zeros in the lanes of other heads."""
    lane = jax.lax.broadcasted_iota(jnp.int32, x_qL.shape, 1) + _registers(head, width).start
    return jnp.where((lane >= head * width) & (lane < (head + 1) * width), x_qL, jnp.zeros_like(x_qL))


def _put(ref, head: int, width: int, x_qL: Array) -> None:
    """Write a head's lanes, and keep those of the heads before it; heads come in order."""
    lanes = _registers(head, width)
    first = head * width - lanes.start
    if first:
        register = slice(lanes.start, lanes.start + LANES)
        lane = jax.lax.broadcasted_iota(jnp.int32, (x_qL.shape[0], LANES), 1)
        ref[:, register] = jnp.where(lane >= first, x_qL[:, :LANES], ref[:, register])
        x_qL, lanes = x_qL[:, LANES:], slice(register.stop, lanes.stop)
    if x_qL.shape[1]:
        ref[:, lanes] = x_qL

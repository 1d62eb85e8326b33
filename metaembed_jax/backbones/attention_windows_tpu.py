"""Attention inside windows as one TPU kernel, forward and backward, with the rotation of queries and keys inside.

It reads and writes [N, D], as the projections do, with heads side by side in D = H * K lanes. Scores stay on the chip, and the
backward pass computes them again. A step of the grid takes a few tiles of 128 patches. Windows share a tile: scores of patches of
different windows are masked.

Heads are not sliced. A head of width 80 starts in the middle of a register, and moving it to the start of one takes longer than
multiplying whole registers. In products that sum over lanes, the lanes of other heads are zero in one factor; in products that keep
lanes, the lanes of other heads are dropped from the result.

    lanes           0       128      256     384
    registers       |   0   |   1    |   2   |
    heads           |  0 |  1  |  2  |  3 | ...
    head 1 reads    |================|         zeros outside of head 1 in one factor

Scores are [keys, queries], because the softmax then reduces over sublanes, which is cheaper than over lanes, and two of the three
products with scores in the backward pass need no transposition.

N patches, D width, H heads, K head width; L lanes of the registers of a head; k keys and q queries of a tile.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

LANES = 128  # of a vector register
TILE = 128  # patches of a product: as many as v5e's matrix unit has rows
TILES = {jnp.dtype("bfloat16"): 2, jnp.dtype("float32"): 1}  # of a step of the grid
MASKED = -1e30  # score of a pair of patches in different windows
# Heads between the stages of `_pipeline`. Instruction bundles for a tile, including waits, as compiled for v5e and v6e: 17,180 and
# 14,784 (forward and backward) with one head after another, 12,179 and 8,651 with 1, 11,238 and 7,589 with 4. Waiting results take
# memory on the chip: in float32 there is room for 1.
AHEAD = {jnp.dtype("bfloat16"): 4, jnp.dtype("float32"): 1}


def takes(heads: int, width: int, window: int, dtype) -> bool:
    """Return whether the kernel takes this number of heads, their width, and the size of windows."""
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
      query_ND, key_ND: queries and keys before the rotation.
      group_N: a number that the patches of a window share; all patches of a group are in one tile of 128. N is a multiple of 128.
      interpret: use Pallas' interpreter, which runs on any device.
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
    """Run a kernel over all tiles. A tile and head take `products` matrix products of the size of [TILE, TILE] x [TILE, K]."""
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
    width, dtype = query_ref.shape[1] // heads, query_ref.dtype

    @pl.loop(0, query_ref.shape[0] // TILE)
    def _(tile):
        rows = pl.ds(pl.multiple_of(tile * TILE, TILE), TILE)
        bias_kq, rotation = _bias(group_ref[tile]), _Rotation(cos_ref[rows, :], sin_ref[rows, :], heads)
        query, key, value = rotation.query(query_ref[rows, :]), rotation.key(key_ref[rows, :]), value_ref[rows, :]

        def score(head):
            lanes = _registers(head, width)
            return _dot(key[:, lanes], _only(query[:, lanes], head, width), 1, 1) + bias_kq

        def mix(head, scores_kq):
            weights_kq = _softmax(scores_kq).astype(dtype)
            _put(mixed_ref, head, width, _dot(weights_kq, value[:, _registers(head, width)], 0, 0))

        _pipeline(heads, AHEAD[dtype], score, mix)
        out_ref[rows, :] = mixed_ref[...].astype(dtype)


def _backward(group_ref, cos_ref, sin_ref, query_ref, key_ref, value_ref, cotangent_ref, *refs, heads):
    gradient_refs, (query32_ref, key32_ref, value32_ref) = refs[:3], refs[3:]
    width, dtype = query_ref.shape[1] // heads, query_ref.dtype

    @pl.loop(0, query_ref.shape[0] // TILE)
    def _(tile):
        rows = pl.ds(pl.multiple_of(tile * TILE, TILE), TILE)
        bias_kq, rotation = _bias(group_ref[tile]), _Rotation(cos_ref[rows, :], sin_ref[rows, :], heads)
        query, key = rotation.query(query_ref[rows, :]), rotation.key(key_ref[rows, :])
        value, cotangent = value_ref[rows, :], cotangent_ref[rows, :]

        def score(head):
            lanes = _registers(head, width)
            own_query, own_cotangent = (_only(x[:, lanes], head, width) for x in (query, cotangent))
            scores_kq = _dot(key[:, lanes], own_query, 1, 1) + bias_kq
            return own_query, own_cotangent, scores_kq, _dot(value[:, lanes], own_cotangent, 1, 1)

        def differentiate(head, scored):
            own_query, own_cotangent, scores_kq, toward_kq = scored
            weights_kq = _softmax(scores_kq)
            toward_kq = weights_kq * (toward_kq - (weights_kq * toward_kq).sum(axis=0, keepdims=True))
            return own_query, own_cotangent, weights_kq.astype(dtype), toward_kq.astype(dtype)

        def multiply(head, differentiated):
            own_query, own_cotangent, weights_kq, toward_kq = differentiated
            _put(query32_ref, head, width, _dot(toward_kq, key[:, _registers(head, width)], 0, 0))
            _put(key32_ref, head, width, _dot(toward_kq, own_query, 1, 0))
            _put(value32_ref, head, width, _dot(weights_kq, own_cotangent, 1, 0))

        _pipeline(heads, AHEAD[dtype], score, differentiate, multiply)
        gradients = rotation.query_gradient(query32_ref[...]), rotation.key_gradient(key32_ref[...]), value32_ref[...]
        for ref, gradient in zip(gradient_refs, gradients, strict=True):
            ref[rows, :] = gradient.astype(dtype)


def _pipeline(heads: int, ahead: int, first: Callable, *stages: Callable) -> None:
    """Run all heads through stages; each stage is `ahead` heads ahead of the next.

    The compiler keeps products in the order of the program. If heads ran one after another, each would wait for its own softmax.

    Args:
      first: a function of the number of a head; later stages also take the result of the stage before.
    """
    results = {}
    for step in range(heads + ahead * len(stages)):
        if step < heads:
            results[step] = first(step)
        for behind, stage in enumerate(stages, start=1):
            head = step - ahead * behind
            if 0 <= head < heads:
                results[head] = stage(head, results[head])


class _Rotation:
    """Rotary embedding in the two-halves convention, of all heads at once, in float32; see `layers.rotate`.

    Queries are also multiplied by the softmax's scale, K**-0.5, and by log2(e), because the softmax has base 2.
    """

    def __init__(self, cos_qK: Array, sin_qK: Array, heads: int):
        self._width, self._half = cos_qK.shape[1], cos_qK.shape[1] // 2
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, heads * self._width), 1)
        self._first = lane % self._width < self._half
        sin_qK = jnp.where(self._first[:, : self._width], -sin_qK, sin_qK)
        self._cos, self._sin = (_for_all_heads(x, heads) for x in (cos_qK, sin_qK))

    def query(self, x_qD: Array) -> Array:
        """Return rotated queries, scaled for a softmax of base 2."""
        return (self._rotate(x_qD) * (self._width**-0.5 * math.log2(math.e))).astype(x_qD.dtype)

    def key(self, x_qD: Array) -> Array:
        """Return rotated keys."""
        return self._rotate(x_qD).astype(x_qD.dtype)

    def query_gradient(self, x_qD: Array) -> Array:
        """Return the gradient of queries from the products with rotated keys."""
        return self._rotate_back(x_qD * self._width**-0.5)

    def key_gradient(self, x_qD: Array) -> Array:
        """Return the gradient of keys from the products with the result of `query`."""
        return self._rotate_back(x_qD * math.log(2))

    def _rotate(self, x_qD: Array) -> Array:
        return x_qD.astype(jnp.float32) * self._cos + self._partners(x_qD).astype(jnp.float32) * self._sin

    def _rotate_back(self, x_qD: Array) -> Array:
        return x_qD * self._cos + self._partners(x_qD * self._sin)

    def _partners(self, x_qD: Array) -> Array:
        """Swap the halves of each head."""
        packed = pltpu.bitcast(x_qD, jnp.int32) if x_qD.dtype == jnp.bfloat16 else x_qD  # two rows a register: half the moves
        after, before = (pltpu.roll(packed, shift, 1) for shift in (x_qD.shape[1] - self._half, self._half))
        swapped = jnp.where(self._first, after, before)
        return pltpu.bitcast(swapped, jnp.bfloat16) if x_qD.dtype == jnp.bfloat16 else swapped


def _for_all_heads(x_qK: Array, heads: int) -> Array:
    """Repeat [q, K] for each head. The registers themselves repeat after a few heads."""
    width = x_qK.shape[1]
    period = math.lcm(width, LANES)
    x_qL = jnp.concatenate([x_qK] * (period // width), axis=1)
    return jnp.concatenate([x_qL] * (heads * width // period), axis=1)


def _bias(group_1q: Array) -> Array:
    """Return the bias of scores: 0 if key and query are of one group, `MASKED` otherwise."""
    group_kq = jnp.broadcast_to(group_1q, (TILE, TILE))
    return jnp.where(group_kq == group_kq.T, 0.0, MASKED)


def _softmax(scores_kq: Array) -> Array:
    """Return the softmax over keys, of base 2."""
    weights_kq = jnp.exp2(scores_kq - scores_kq.max(axis=0, keepdims=True))
    return weights_kq * (1 / weights_kq.sum(axis=0, keepdims=True))


def _dot(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """Return the float32 product over these axes. Float32 factors are not rounded to bfloat16."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    axes = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, axes, precision=precision, preferred_element_type=jnp.float32)


def _registers(head: int, width: int) -> slice:
    """Return the lanes of the registers that hold a head."""
    return slice(head * width // LANES * LANES, -(-(head + 1) * width // LANES) * LANES)


def _only(x_qL: Array, head: int, width: int) -> Array:
    """Return the registers of a head with zeros in the lanes of other heads."""
    lane = jax.lax.broadcasted_iota(jnp.int32, x_qL.shape, 1) + _registers(head, width).start
    return jnp.where((lane >= head * width) & (lane < (head + 1) * width), x_qL, jnp.zeros_like(x_qL))


def _put(ref, head: int, width: int, x_qL: Array) -> None:
    """Write the lanes of a head, and keep those of the heads before it. Heads must come in order."""
    lanes = _registers(head, width)
    first = head * width - lanes.start
    if first:
        register = slice(lanes.start, lanes.start + LANES)
        lane = jax.lax.broadcasted_iota(jnp.int32, (x_qL.shape[0], LANES), 1)
        ref[:, register] = jnp.where(lane >= first, x_qL[:, :LANES], ref[:, register])
        x_qL, lanes = x_qL[:, LANES:], slice(register.stop, lanes.stop)
    if x_qL.shape[1]:
        ref[:, lanes] = x_qL

"""Layers that backbones share: linear maps, norms, feed-forwards, rotary angles, placing of visual tokens, the scan over a stack.

A layer is written for one layer and created for a whole stack: with `layers=L` every parameter has a leading axis L, and
`scan_layers` runs the stack with one compiled body.

B batch, S sequence, D model width, F feed-forward width, H heads, K head width, L layers, P patches, X numbers in a patch, U units
(visual tokens).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int8, Shaped, UInt8

from metaembed_jax.batch.rows import Batch
from metaembed_jax.sharding import constrain

FEW_LAYERS = 8  # in a larger stack, slicing off the last layer copies the weights, which costs more than it saves


def param(
    rngs: nnx.Rngs, initializer: Callable, shape: tuple[int, ...], axes: tuple[str | None, ...], layers: int | None = None
) -> nnx.Param:
    """Create a float32 parameter with logical axes; `layers` puts a stack axis in front."""
    if layers is None:
        return nnx.Param(initializer(rngs.params(), shape), logical_axes=axes)
    keys = jax.random.split(rngs.params(), layers)
    return nnx.Param(jax.vmap(lambda key: initializer(key, shape))(keys), logical_axes=("layers", *axes))


class Linear(nnx.Module):
    """`x @ kernel + bias` in the dtype of x, plus the output of its adapter (see `lora.add_lora`).

    An int8 kernel (see `quantize`) is read as `kernel * kernel_scale`, with one scale for each output.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        axes: tuple[str | None, str | None],
        bias: bool,
        rngs: nnx.Rngs,
        layers: int | None = None,
    ):
        self.kernel = param(rngs, jax.nn.initializers.lecun_normal(), (inputs, outputs), axes, layers)
        self.kernel_scale: nnx.Param | None = nnx.data(None)
        self.bias = param(rngs, jax.nn.initializers.zeros, (outputs,), axes[1:], layers) if bias else None
        self.lora: Callable | None = nnx.data(None)

    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        y = product(x, self.kernel[...].astype(x.dtype))
        if self.kernel_scale is not None:
            y = (y.astype(jnp.float32) * self.kernel_scale[...]).astype(x.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        return y if self.lora is None else y + self.lora(x)


def product(x: Float[Array, "... inputs"], kernel: Float[Array, "inputs outputs"]) -> Float[Array, "... outputs"]:
    """Return x @ kernel, computed as a product of two matrices.

    The gradient of the kernel then sums over one axis. If it sums over several, XLA for CPUs first writes a transposed copy of the
    output's gradient: forward and backward of a gated MLP, 4736 x 256 x 768, took 303 ms, and 223 ms this way.
    """
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[1])


def store_int8(network: nnx.Module) -> None:
    """Change the kernels of all stacked `Linear`s of a network to int8 with float32 scales; `quantize` makes their values."""
    for _, linear in nnx.iter_modules(network):
        if isinstance(linear, Linear) and linear.kernel.ndim == 3:
            layers, inputs, outputs = linear.kernel.shape
            axes = linear.kernel.get_metadata()["logical_axes"]
            linear.kernel = nnx.Param(jnp.zeros((layers, inputs, outputs), jnp.int8), logical_axes=axes)
            linear.kernel_scale = nnx.data(nnx.Param(jnp.ones((layers, outputs)), logical_axes=(axes[0], axes[2])))


def quantize(kernel: Float[np.ndarray, "i o"]) -> tuple[Int8[np.ndarray, "i o"], Float[np.ndarray, "o"]]:
    """Return a kernel as int8 and a scale for each output: kernel = int8 * scale, to half a scale. The largest int8 is 127."""
    kernel = kernel.astype(np.float32)
    scale = np.abs(kernel).max(axis=0) / 127
    safe = np.where(scale > 0, scale, 1)
    return np.rint(kernel / safe).astype(np.int8), scale


class RMSNorm(nnx.Module):
    """Root-mean-square norm, computed in float32 (arXiv 1910.07467)."""

    def __init__(self, width: int, *, epsilon: float, rngs: nnx.Rngs, layers: int | None = None):
        self.scale = param(rngs, jax.nn.initializers.ones, (width,), (None,), layers)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        # A separate array: otherwise a TPU compiles it into each product that reads it, and computes it there.
        return jax.lax.optimization_barrier(x32.astype(x.dtype) * self.scale[...].astype(x.dtype))


class LayerNorm(nnx.Module):
    """Norm of mean and variance, computed in float32 (arXiv 1607.06450)."""

    def __init__(self, width: int, *, epsilon: float, rngs: nnx.Rngs, layers: int | None = None):
        self.scale = param(rngs, jax.nn.initializers.ones, (width,), (None,), layers)
        self.bias = param(rngs, jax.nn.initializers.zeros, (width,), (None,), layers)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        # A separate array, as in RMSNorm.
        return jax.lax.optimization_barrier((x32 * self.scale[...] + self.bias[...]).astype(x.dtype))


class MLP(nnx.Module):
    """down(activation(up(x))), with biases. `activation` must be a function of a module: a new function compiles again."""

    def __init__(self, width: int, hidden: int, *, activation: Callable[[Array], Array], rngs: nnx.Rngs, layers: int | None = None):
        self.activation = activation
        self.up = Linear(width, hidden, axes=("embed", "mlp"), bias=True, rngs=rngs, layers=layers)
        self.down = Linear(hidden, width, axes=("mlp", "embed"), bias=True, rngs=rngs, layers=layers)

    def __call__(self, x_BSD: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return self.down(constrain(self.activation(self.up(x_BSD)), "batch", None, "mlp"))


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) * up(x)), the feed-forward of LLaMA-like models (arXiv 2002.05202); `activation` as in `MLP`."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        bias: bool,
        activation: Callable[[Array], Array] = jax.nn.silu,
        rngs: nnx.Rngs,
        layers: int | None = None,
    ):
        self.activation = activation
        self.gate = Linear(width, hidden, axes=("embed", "mlp"), bias=bias, rngs=rngs, layers=layers)
        self.up = Linear(width, hidden, axes=("embed", "mlp"), bias=bias, rngs=rngs, layers=layers)
        self.down = Linear(hidden, width, axes=("mlp", "embed"), bias=bias, rngs=rngs, layers=layers)

    def __call__(self, x_BSD: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        hidden_BSF = self.activation(self.gate(x_BSD)) * self.up(x_BSD)
        return self.down(constrain(hidden_BSF, "batch", None, "mlp"))


def normalised(patches_BPX: UInt8[Array, "B P X"], mean: Sequence[float], std: Sequence[float]) -> Float[Array, "B P X"]:
    """Return uint8 pixels, in (channel, y, x) order, as floats, less the mean and divided by the deviation of each channel."""
    pixels = patches_BPX.astype(jnp.float32).reshape(*patches_BPX.shape[:2], 3, -1) / 255.0
    mean_C1, std_C1 = (jnp.asarray(values, jnp.float32)[:, None] for values in (mean, std))
    return ((pixels - mean_C1) / std_C1).reshape(patches_BPX.shape)


def embed_tokens(table_ND: Float[Array, "N D"], meta_RD: Float[Array, "R D"], batch: Batch) -> Float[Array, "B S D"]:
    """Look up tokens in the vocabulary, and Meta Tokens where `batch.meta` names one. Both tables have the result's dtype.

    Meta Tokens are placed by a product with zeros and ones, which is exact. Its gradient is a product too, not a scatter.
    """
    x_BSD = jnp.take(table_ND, batch.tokens, axis=0)
    is_meta_BSR = batch.meta[..., None] == jnp.arange(len(meta_RD))
    meta_BSD = is_meta_BSR.astype(meta_RD.dtype) @ meta_RD
    return constrain(jnp.where(batch.meta[..., None] >= 0, meta_BSD, x_BSD), "batch", None, None)


def place_units(units_BUD: Float[Array, "B U D"], visual_BS: Int[Array, "B S"], x_BSD: Float[Array, "B S D"]) -> Array:
    """Replace states by the units with the indices `visual_BS`, where these are not negative."""
    placed_BSD = jnp.take_along_axis(units_BUD, jnp.maximum(visual_BS, 0)[..., None], axis=1)
    return jnp.where(visual_BS[..., None] >= 0, placed_BSD, x_BSD)


def at(x_BSD: Shaped[Array, "B S ..."], positions_BV: Int[Array, "B V"] | None) -> Shaped[Array, "B V ..."]:
    """Return x at these positions of each row; None: x itself."""
    if positions_BV is None:
        return x_BSD
    return jnp.take_along_axis(x_BSD, positions_BV.reshape(*positions_BV.shape, *[1] * (x_BSD.ndim - 2)), axis=1)


def rotate(
    x_BSHK: Float[Array, "B S H K"], cos_BSK: Float[Array, "B S K"], sin_BSK: Float[Array, "B S K"]
) -> Float[Array, "B S H K"]:
    """Rotate heads in the two-halves convention (arXiv 2104.09864, as `apply_rotary_pos_emb` of transformers), in float32.

    A product exchanges the halves, (x1, x2) -> (-x2, x1), which is exact. Slices would be written to memory: a step of
    four vision blocks, 8 images of 5120 patches, compiled for v6e, moves 159 GB with slices and 113 GB this way.
    """
    width = x_BSHK.shape[-1]
    turn_KK = np.eye(width, k=width // 2) - np.eye(width, k=-width // 2)
    turned = jnp.einsum("bshk,kj->bshj", x_BSHK, jnp.asarray(turn_KK, x_BSHK.dtype))
    x32, turned32 = x_BSHK.astype(jnp.float32), turned.astype(jnp.float32)
    # Without it, the conversion of the gradient to float32 would move into the attention, which would then write twice as much.
    return jax.lax.optimization_barrier((x32 * cos_BSK[:, :, None] + turned32 * sin_BSK[:, :, None]).astype(x_BSHK.dtype))


def split_heads(x_BSD: Float[Array, "B S D"], heads: int) -> Float[Array, "B S H K"]:
    """Split states into heads, whole heads on a device: if the tensor axis cut heads, every rotation would exchange halves."""
    return constrain(x_BSD.reshape(*x_BSD.shape[:2], heads, -1), "batch", None, "heads", None)


def inverse_frequencies(width: int, theta: float) -> Float[Array, "half"]:
    """Return theta^(-2i / width) for i < width / 2, float32."""
    # As a float: JAX does not take integers of more than 32 bits, and a config.json may have one.
    return 1.0 / float(theta) ** (jnp.arange(0, width, 2, dtype=jnp.float32) / width)


def cos_sin(angles_BSH: Float[Array, "B S K/2"]) -> tuple[Float[Array, "B S K"], Float[Array, "B S K"]]:
    """Return cosines and sines of angles, for both halves of a head."""
    angles_BSK = jnp.concatenate([angles_BSH, angles_BSH], axis=-1)
    return jnp.cos(angles_BSK), jnp.sin(angles_BSK)


def scan_layers(stack: nnx.Module, x: Array, flags: Any, *context, checkpoint: bool, unroll: int) -> Array:
    """Run `layer(x, flag, *context)` for each layer of a stack, compiled once.

    Args:
      stack: a module in which every parameter has a leading axis of layers.
      flags: arrays with a leading axis of layers (for example, their kinds of attention), or None.
      context: arrays that all layers read (segments, angles).
      checkpoint: compute each layer again in the backward pass, and keep only its input.
      unroll: layers in a turn of the loop.
    """
    graph, state = nnx.split(stack)

    def body(x, layer):
        layer_state, flag = layer
        return nnx.merge(graph, layer_state)(x, flag, *context), None

    if checkpoint:
        body = jax.checkpoint(body)
    return jax.lax.scan(body, x, (state, flags), unroll=unroll)[0]


def scan_and_keep(
    stack: nnx.Module, x: Array, kept: tuple[int, ...], *context, checkpoint: bool, unroll: int
) -> tuple[Array, Float[Array, "kept ..."]]:
    """Run `scan_layers` without flags, and also return the states after the layers `kept`.

    The loop writes them into one array; if every layer returned its states, memory would hold those of all layers.
    """
    graph, state = nnx.split(stack)
    slots = np.full(jax.tree.leaves(state)[0].shape[0], len(kept))  # the last slot takes the states that are not kept
    slots[list(kept)] = np.arange(len(kept))

    def run(x, layer_state):
        return nnx.merge(graph, layer_state)(x, None, *context)

    if checkpoint:
        run = jax.checkpoint(run)

    def body(carry, layer):
        x, states = carry
        layer_state, slot = layer
        x = run(x, layer_state)
        return (x, jax.lax.dynamic_update_index_in_dim(states, x, slot, 0)), None

    states = constrain(jnp.zeros((len(kept) + 1, *x.shape), x.dtype), None, "batch", *[None] * (x.ndim - 1))
    (x, states), _ = jax.lax.scan(body, (x, states), (state, slots), unroll=unroll)
    return x, states[:-1]


def read_at(
    stack: nnx.Module,
    x_BSD: Float[Array, "B S D"],
    flags: Any,
    *context,
    reads_BV: Int[Array, "B V"],
    checkpoint: bool,
    unroll: int,
) -> Float[Array, "B V D"]:
    """Run `scan_layers`, and return the states at the positions `reads_BV`.

    If the stack has few layers, the last is computed only at these positions, because its states are read nowhere else. Its layers
    take `reads_BV` as an option.
    """
    graph, state = nnx.split(stack)
    layers = jax.tree.leaves(state)[0].shape[0]
    if not cuts_last(layers):
        return at(scan_layers(stack, x_BSD, flags, *context, checkpoint=checkpoint, unroll=unroll), reads_BV)
    body, last = (nnx.merge(graph, jax.tree.map(lambda x, index=index: x[index], state)) for index in (slice(-1), -1))
    before, flag = (None, None) if flags is None else (flags[:-1], flags[-1])
    x_BSD = scan_layers(body, x_BSD, before, *context, checkpoint=checkpoint, unroll=unroll)
    return last(x_BSD, flag, *context, reads_BV=reads_BV)


def cuts_last(layers: int) -> bool:
    """Return whether `read_at` computes the last layer separately in a stack of this number of layers."""
    return layers <= FEW_LAYERS

"""The largest arrays of a traced program, inside its loops."""

import jax
import jax.numpy as jnp

from metaembed_jax.planning.traced import largest_arrays


def test_scores_inside_a_loop():
    def attend(x_SD, _):
        with jax.named_scope("scores"):
            scores_SS = x_SD @ x_SD.T
        return scores_SS @ x_SD, None

    traced = jax.jit(lambda x: jax.lax.scan(attend, x, None, length=3)).trace(jax.ShapeDtypeStruct((256, 8), jnp.float32))
    first, second, *_ = largest_arrays(traced.jaxpr)
    assert first == (256 * 256 * 4, "float32[256,256]", 1, "scores/dot_general")
    assert second.bytes == 256 * 8 * 4

"""Functions that layers share."""

import numpy as np

from metaembed_jax.backbones.layers import inverse_frequencies


def test_the_base_of_rotary_angles_may_be_a_whole_number_of_any_size():
    np.testing.assert_array_equal(inverse_frequencies(16, 10**10), inverse_frequencies(16, 1e10))

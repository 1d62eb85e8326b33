"""FLOPs in closed form against counts by hand, and against the program that JAX traces."""

from pathlib import Path

import pytest

from metaembed_jax.config import load_config
from metaembed_jax.inputs.examples import ShapeClass
from metaembed_jax.planning.flops import encode_flops, train_flops
from tests.planning.tracing import traced_flops

ROOT = Path(__file__).parents[2]
SMALL = str(ROOT / "tests" / "training" / "small.py")
LORA = load_config(str(ROOT / "configs" / "7b.py"), {}).trained
MERGER = (("meta_tokens", "full"), ("head.*", "full"), ("backbone.vision.merger_up.kernel", "full"))


def test_hand_count():
    """`small`, everything trained, one microbatch: a query of 32 + 16 rows, a candidate of 36 patches and 21 + 80 rows."""
    config = load_config(SMALL, {"checkpoint_layers": "True", "optimizer.algorithm": "adamw"})
    width, feed_forward, layers, depth, heads = 32, 64, 2, 3, 16  # one key-value head of 16
    layer = 2 * (2 * width * width + 2 * width * heads + 3 * width * feed_forward)
    key_value = 2 * 2 * width * heads

    def language(rows, read):  # the last layer computes only what is read
        first = rows * layer + 4 * rows * rows * width
        last = rows * key_value + read * (layer - key_value) + 4 * read * rows * width
        return first, last

    block = 2 * (4 * width * width + 3 * width * feed_forward)
    attention = 4 * 36 * 36 * width  # one window is the whole image
    vision = 36 * 2 * 588 * width + depth * (36 * block + attention) + 9 * 2 * (128 * 128 + 128 * 32)
    (query_first, query_last), (candidate_first, candidate_last) = language(48, 16), language(101, 64)
    head = 2 * width * 16
    encoders = query_first + query_last + candidate_first + candidate_last + vision + (16 + 64) * head
    loss = 2 * 16 * 16 * 16 * 64 * 16  # 16 pairs, 16 x 64 vectors of 16 numbers
    down = 2 * feed_forward * width
    turn, turn_key, turn_block = 2 * width * 16, 2 * heads * 16, 2 * 2 * width * 16  # heads of 16, and those of vision too
    turns = (48 + 101) * (turn + 2 * turn_key) + (16 + 64) * turn + depth * 36 * turn_block
    again = query_first + candidate_first - (48 + 101) * down + depth * (36 * (block - down) + attention)
    again += (48 + 101) * (turn + turn_key) + depth * 36 * turn_block

    found = train_flops(config)
    assert layers == config.architecture.text_config.num_hidden_layers
    assert found.forward == pytest.approx(16 * encoders + loss, rel=0.01)
    assert found.backward == pytest.approx(2 * (16 * encoders + loss) - 16 * 36 * 2 * 588 * width, rel=0.01)  # not for pixels
    assert found.extra == pytest.approx(16 * (again + 2 * turns), rel=0.01)


@pytest.mark.parametrize("trained", [(("*", "full"),), LORA, MERGER], ids=["full", "lora", "merger"])
@pytest.mark.parametrize("layers, microbatch, checkpoint", [(2, 16, False), (10, 8, True)])
def test_equals_what_jax_traces(trained, layers, microbatch, checkpoint):
    config = load_config(SMALL, {"data.negatives": "1", "microbatch_size": str(microbatch)})
    config.trained, config.checkpoint_layers = trained, checkpoint
    config.architecture.text_config.num_hidden_layers = layers
    assert sum(train_flops(config)) == traced_flops(config)


def test_windows_cost_less_than_whole_images():
    config = load_config(str(ROOT / "configs" / "7b.py"), {})
    all_full = load_config(str(ROOT / "configs" / "7b.py"), {})
    all_full.architecture.vision_config.fullatt_block_indexes = tuple(range(32))
    shape = ShapeClass(1280, 5120)
    saved = encode_flops(all_full, shape, 1).forward - encode_flops(config, shape, 1).forward
    assert saved == 28 * 4 * 5120 * 1280 * (5120 - 64)

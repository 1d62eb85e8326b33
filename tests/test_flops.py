"""FLOPs in closed form against counts by hand, and against the program that JAX traces."""

from pathlib import Path

import pytest

from metaembed_jax.batch.items import Size
from metaembed_jax.batch.training import StepShape
from metaembed_jax.config import RunConfig, load_config, with_keys
from metaembed_jax.flops import encode_flops, train_flops
from tests.planning.tracing import traced_flops

ROOT = Path(__file__).parents[1]
SMALL = str(ROOT / "tests" / "training" / "small.py")
LORA = load_config(str(ROOT / "configs" / "7b.py")).model.trained
MERGER = (("meta_tokens", "full"), ("head.*", "full"), ("backbone.vision.merger_up.kernel", "full"))


ROW = Size(144, 36, 80)


def small(trained=(("*", "full"),), **changes) -> RunConfig:
    return with_keys(load_config(SMALL), {"optimizer.algorithm": "adamw", "model.trained": trained, **changes})


def test_hand_count():
    """`small`, everything trained, one microbatch of 16 rows of 144 tokens, 36 patches and 80 vectors."""
    config = small(**{"rows.recompute": "layers"})
    width, feed_forward, layers, depth, heads, rows = 32, 64, 2, 3, 16, 16  # one key-value head of 16
    tokens, patches, vectors = ROW
    layer = 2 * (2 * width * width + 2 * width * heads + 3 * width * feed_forward)
    key_value = 2 * 2 * width * heads
    first = tokens * layer + 4 * tokens * tokens * width
    last = tokens * key_value + vectors * (layer - key_value) + 4 * vectors * tokens * width  # only the positions that are read
    block = 2 * (4 * width * width + 3 * width * feed_forward)
    attention = 4 * patches * patches * width  # one window is the whole image
    pixels = patches * 2 * 588 * width
    vision = pixels + depth * (patches * block + attention) + patches // 4 * 2 * (128 * 128 + 128 * 32)
    row = first + last + vision + vectors * 2 * width * 16
    loss = 2 * 16 * 16 * 16 * 64 * 16  # 16 pairs, 16 x 64 vectors of 16 numbers
    down = 2 * feed_forward * width
    turn, turn_key, turn_block = 2 * width * 16, 2 * heads * 16, 2 * 2 * width * 16  # heads of 16, and those of vision too
    turns = tokens * (turn + 2 * turn_key) + vectors * turn + depth * patches * turn_block
    again = first - tokens * down + depth * (patches * (block - down) + attention)
    again += tokens * (turn + turn_key) + depth * patches * turn_block
    meta = 2 * 2 * tokens * 80 * width  # placing the rows of their table, and its gradient

    flops = train_flops(config, StepShape(ROW, 1, rows))
    assert layers == config.model.architecture["text_config"]["num_hidden_layers"]
    assert flops.forward == rows * row + loss
    assert flops.backward == 2 * (rows * row + loss) - rows * pixels  # not for pixels
    assert flops.extra == rows * (again + 2 * turns + meta)


@pytest.mark.parametrize("trained", [(("*", "full"),), LORA, MERGER], ids=["full", "lora", "merger"])
@pytest.mark.parametrize(
    "layers, microbatches, recompute", [(2, 1, "nothing"), (10, 2, "everything"), (10, 2, "layers"), (2, 2, "microbatches")]
)
def test_equals_what_jax_traces(trained, layers, microbatches, recompute):
    config = small(
        trained,
        **{"rows.recompute": recompute, "data.negatives": 1, "model.architecture.text_config.num_hidden_layers": layers},
    )
    shape = StepShape(Size(160, 72, 96), microbatches, 4)
    assert sum(train_flops(config, shape)) == traced_flops(config, shape)


def test_windows_cost_less_than_whole_images():
    config = load_config(str(ROOT / "configs" / "7b.py"))
    all_full = load_config(str(ROOT / "configs" / "7b.py"))
    all_full = with_keys(all_full, {"model.architecture.vision_config.fullatt_block_indexes": tuple(range(32))})
    row = Size(1280, 5120, 64)
    saved = encode_flops(all_full, row, 1).forward - encode_flops(config, row, 1).forward
    assert saved == 28 * 4 * 5120 * 1280 * (5120 - 64)

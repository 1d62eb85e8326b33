"""Time a full-training step against the same model, loss and AdamW in transformers and torch: `python benchmarks/train.py`.

Both sides start from the same random weights and read the same batch; their losses must agree before anything is timed. The torch
side appends all 80 Meta Tokens to every input, as the published release does. Ours appends to a query only the Meta Tokens that are
read, and packs a query and a document into each row.

    pairs        32 queries of 24 tokens, 32 images of 112x112 pixels
    model        text 256 wide, 4 layers; vision 128 wide, 4 layers; float32, no recomputation on either side
    step         forward, all groups of the loss, backward, clipping at norm 1, AdamW
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flops import traced_flops
from PIL import Image
from qwen2_5_vl_torch import TorchTrainer, write_checkpoint

from metaembed_jax.backbones.qwen.images import to_units
from metaembed_jax.backbones.qwen.inputs import rope_positions
from metaembed_jax.backbones.qwen2_5_vl import FAMILY as QWEN2_5_VL
from metaembed_jax.batch.items import Example, Size
from metaembed_jax.batch.rows import RowItem, collate
from metaembed_jax.batch.training import TrainingBatch, put
from metaembed_jax.checkpoints.huggingface import read_backbone
from metaembed_jax.config import RunConfig, with_keys
from metaembed_jax.late_interaction.matryoshka import matryoshka_loss
from metaembed_jax.mesh import make_mesh
from metaembed_jax.network import abstract_network
from metaembed_jax.network_config import model_config
from metaembed_jax.training.step import Trainer, make_trainer

PAIRS, QUERY_TOKENS, DOCUMENT_TOKENS, SIDE = 32, 24, 28, 112
IMAGE_TOKEN, VOCABULARY = 5, 512
ARCHITECTURE = dict(
    text_config=dict(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=768,
        mrope_section=(8, 12, 12),
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
    ),
    vision_config=dict(
        hidden_size=128, depth=4, num_heads=2, intermediate_size=384, out_hidden_size=256, fullatt_block_indexes=(1, 3)
    ),
)


def main() -> None:
    """Check that both sides compute the same loss, time them in turns, and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side (default: 7)")
    parser.add_argument("--steps", type=int, default=5, help="steps a turn (default: 5)")
    arguments = parser.parse_args()

    config = run_config()
    pairs, meta_tokens = make_pairs(), np.random.default_rng(1).standard_normal((80, 256), np.float32)
    with tempfile.TemporaryDirectory() as scratch:
        write_checkpoint(Path(scratch), ARCHITECTURE, IMAGE_TOKEN)
        theirs = TorchTrainer(Path(scratch), meta_tokens, pairs, config)
        trainer = make_trainer(config, make_mesh(devices=jax.devices()[:1]))
        backbone = read_backbone(
            Path(scratch), QWEN2_5_VL, model_config(config).architecture, trainer.abstract.parameters["backbone"]
        )
        sharding = trainer.abstract.parameters["meta_tokens"].sharding
    ours = Ours(trainer, {"backbone": backbone, "meta_tokens": jax.device_put(meta_tokens, sharding)}, make_batch(config, pairs))

    flops = {"metaembed_jax": traced_flops(trainer.step, ours.state, ours.batch), "torch": theirs.flops()}
    losses = {"metaembed_jax": ours.step(), "torch": theirs.step()}
    print("first loss: " + ", ".join(f"{name} {loss:.6f}" for name, loss in losses.items()))
    np.testing.assert_allclose(losses["torch"], losses["metaembed_jax"], rtol=1e-4)

    seconds = race({"metaembed_jax": ours.step, "torch": theirs.step}, arguments.rounds, arguments.steps)
    peak = matmul_rate()
    print(f"{'':16}{'ms/step':>10}{'samples/s':>12}{'GFLOP/step':>12}{'GFLOP/s':>10}{'of XLA matmul':>16}")
    for name, step in seconds.items():
        rate = flops[name] / step
        print(f"{name:16}{1e3 * step:10.0f}{PAIRS / step:12.1f}{flops[name] / 1e9:12.2f}{rate / 1e9:10.1f}{rate / peak:16.0%}")
    print(f"XLA's large matmul: {peak / 1e9:.1f} GFLOP/s")
    print(f"ratio of samples/s: {seconds['torch'] / seconds['metaembed_jax']:.2f}x")
    profile(config, ours)


def run_config() -> RunConfig:
    """Return the config of our side: the recipe's AdamW, all groups, and no recomputation."""
    return with_keys(
        RunConfig(),
        {
            "model.architecture": ARCHITECTURE,
            "model.dtype": "float32",
            "rows.recompute": "nothing",
            "rows.unroll_layers": 4,
            "rows.batch_size": PAIRS,
        },
    )


def make_pairs() -> list[tuple[Example, Example]]:
    """Return queries and documents of noise, as a processor makes them."""
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(PAIRS)]
    sizes = QWEN2_5_VL.Images(SIDE * SIDE, SIDE * SIDE)

    def tokens(count: int) -> np.ndarray:
        return random.integers(IMAGE_TOKEN + 1, VOCABULARY, count).astype(np.int32)

    def query() -> Example:
        visual = np.full(QUERY_TOKENS, -1, np.int32)
        return Example(tokens(QUERY_TOKENS), rope_positions(QUERY_TOKENS, 0, None), visual, {}, np.zeros(0, bool))

    def document(image: Image.Image) -> Example:
        grid = sizes.grid(*image.size, None, None, "image")
        patches, positions = (x.reshape(-1, x.shape[-1]) for x in to_units(image, grid, sizes))
        units = slice(4, 4 + grid.rows * grid.columns)
        prompt, visual = tokens(DOCUMENT_TOKENS), np.full(DOCUMENT_TOKENS, -1, np.int32)
        prompt[units], visual[units] = IMAGE_TOKEN, np.arange(grid.rows * grid.columns)
        arrays = {"patches": patches, "patch_positions": positions, "windows": np.zeros(len(patches), np.int32)}
        is_patch = np.ones(len(patches), bool)
        return Example(prompt, rope_positions(DOCUMENT_TOKENS, units.start, (grid.rows, grid.columns)), visual, arrays, is_patch)

    return [(query(), document(image)) for image in images]


def make_batch(config, pairs: list[tuple[Example, Example]]) -> TrainingBatch:
    """Return the pairs as a step's batch: a document and its query in each row."""
    row, vectors = Size(DOCUMENT_TOKENS + 80 + QUERY_TOKENS + 16, 64, 80), np.arange(PAIRS, dtype=np.int32) * 80
    items = [[RowItem(document, 80, 64), RowItem(query, 16, 16)] for query, document in pairs]
    rows = collate(items, row, model_config(config).architecture.layout).map(lambda x: x[None])
    no_negatives, source = np.ones((PAIRS, 0), bool), np.zeros(PAIRS, np.int32)
    digests = np.arange(PAIRS * 2 * row.vectors, dtype=np.int32).reshape(1, PAIRS, 2, row.vectors)  # no two are the same
    return TrainingBatch(rows, vectors + 64, vectors, no_negatives, source, digests)


class Ours:
    """Our side: the training state, and one batch."""

    def __init__(self, trainer: Trainer, parameters: dict, batch: TrainingBatch):
        self.trainer, self.batch = trainer, put(batch, trainer.mesh)
        self.state = trainer.init(parameters)

    def step(self) -> float:
        """Run a step and return its loss."""
        self.state, figures = self.trainer.step(self.state, self.batch)
        return float(figures["loss"])


def race(steps: dict[str, Callable], rounds: int, count: int) -> dict[str, float]:
    """Return seconds a step. Sides take turns, so that load on the machine slows both; the median is over turns after the first."""
    turns = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(count):
                step()
            turns[name].append((time.perf_counter() - start) / count)
    return {name: statistics.median(values[1:]) for name, values in turns.items()}


def seconds_of(function: Callable, *arguments, repeats: int = 9) -> float:
    """Return the median time of a jitted function, after a call that compiles."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def matmul_rate(size: int = 2048) -> float:
    """Return the FLOP/s of a large float32 matmul in XLA on this machine."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((size, size), np.float32))
    return 2 * size**3 / seconds_of(jax.jit(jnp.matmul), x, x)


def profile(config, ours: Ours) -> None:
    """Print the time of forward and backward of our step's rows and of its loss, each jitted alone."""
    graph, _, _ = abstract_network(model_config(config))
    parameters, batch = ours.state.parameters, ours.batch
    random = np.random.default_rng(0)

    def unit(*shape):
        x = random.standard_normal(shape, np.float32)
        return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True))

    def weighted_sum(parameters, weights):
        vectors = nnx.merge(graph, parameters)(jax.tree.map(lambda x: x[0], batch.rows))
        return (vectors * weights).sum()

    functions = {
        "rows (image, 28 + 80 and 24 + 16 tokens)": (jax.jit(jax.grad(weighted_sum)), parameters, unit(PAIRS, 80, 256)),
        "loss": (jax.jit(jax.grad(lambda q, d: matryoshka_loss(q, d)[0], (0, 1))), unit(PAIRS, 16, 256), unit(PAIRS, 64, 256)),
    }
    print("our step, forward and backward, ms:")
    for name, (function, *arguments) in functions.items():
        print(f"  {name:36}{1e3 * seconds_of(function, *arguments):8.0f}{traced_flops(function, *arguments) / 1e9:10.2f} GFLOP")


if __name__ == "__main__":
    main()

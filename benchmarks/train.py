"""Races one full-training step against the same model, loss and AdamW in transformers + torch: `python benchmarks/train.py`.

Both start from the same random weights and see the same batch, so their losses must agree before anything is timed. torch appends
all 80 Meta Tokens to every input, as the published release does; ours appends to each side only the rows that can be read.

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

from metaembed_jax.backbones import qwen2_5_vl
from metaembed_jax.backbones.qwen.images import patchify
from metaembed_jax.backbones.qwen.inputs import rope_positions
from metaembed_jax.checkpoints.huggingface import read_backbone
from metaembed_jax.config import default_config, model_config
from metaembed_jax.inputs.examples import Example, ShapeClass, collate
from metaembed_jax.late_interaction.matryoshka import matryoshka_loss
from metaembed_jax.network import abstract_network
from metaembed_jax.sharding import make_mesh
from metaembed_jax.training.step import Trainer, make_trainer, put_batch

PAIRS, QUERY_TOKENS, CANDIDATE_TOKENS, SIDE = 32, 24, 28, 112
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
    """Checks that both compute the same loss, then times them in turns and prints the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side (default: 7)")
    parser.add_argument("--steps", type=int, default=5, help="steps a turn (default: 5)")
    arguments = parser.parse_args()

    config = run_config()
    batch, meta_tokens = make_batch(config), np.random.default_rng(1).standard_normal((80, 256), np.float32)
    with tempfile.TemporaryDirectory() as scratch:
        write_checkpoint(Path(scratch), ARCHITECTURE, IMAGE_TOKEN)
        theirs = TorchTrainer(Path(scratch), meta_tokens, batch, config)
        trainer = make_trainer(config, make_mesh(devices=jax.devices()[:1]))
        backbone = read_backbone(
            Path(scratch), qwen2_5_vl, model_config(config).architecture, trainer.abstract.parameters["backbone"]
        )
        place = trainer.abstract.parameters["meta_tokens"].sharding
    ours = Ours(trainer, {"backbone": backbone, "meta_tokens": jax.device_put(meta_tokens, place)}, batch)

    flops = {"metaembed_jax": traced_flops(trainer.step, ours.state, ours.batch), "torch": theirs.flops()}
    losses = {"metaembed_jax": ours.step(), "torch": theirs.step()}
    print("first loss: " + ", ".join(f"{name} {loss:.6f}" for name, loss in losses.items()))
    np.testing.assert_allclose(losses["torch"], losses["metaembed_jax"], rtol=1e-4)

    seconds = race({"metaembed_jax": ours.step, "torch": theirs.step}, arguments.rounds, arguments.steps)
    peak = matmul_rate()
    print(f"{'':16}{'ms/step':>10}{'samples/s':>12}{'GFLOP/step':>12}{'GFLOP/s':>10}{'of XLA matmul':>16}")
    for name, one in seconds.items():
        rate = flops[name] / one
        print(f"{name:16}{1e3 * one:10.0f}{PAIRS / one:12.1f}{flops[name] / 1e9:12.2f}{rate / 1e9:10.1f}{rate / peak:16.0%}")
    print(f"XLA's large matmul: {peak / 1e9:.1f} GFLOP/s")
    print(f"ratio of samples/s: {seconds['torch'] / seconds['metaembed_jax']:.2f}x")
    profile(config, ours)


def run_config():
    """The config of the race: the recipe's AdamW, all groups, and no recomputation."""
    config = default_config()
    with config.unlocked():
        config.architecture = ARCHITECTURE
    config.dtype, config.recompute, config.unroll_layers = "float32", "nothing", 4
    config.batch_size = config.microbatch_size = PAIRS
    return config


def make_batch(config) -> dict:
    """One training batch of noise, in the form of `data.pipeline`."""
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(PAIRS)]
    sizes, layout = qwen2_5_vl.Images(SIDE * SIDE, SIDE * SIDE), model_config(config).architecture.layout

    def query() -> Example:
        tokens = random.integers(IMAGE_TOKEN + 1, VOCABULARY, QUERY_TOKENS).astype(np.int32)
        visual = np.full(QUERY_TOKENS, -1, np.int32)
        return Example(tokens, {"positions": rope_positions(QUERY_TOKENS, 0, None), "visual_index": visual}, {})

    def candidate(image: Image.Image) -> Example:
        patches = patchify(image, sizes)
        tokens = random.integers(IMAGE_TOKEN + 1, VOCABULARY, CANDIDATE_TOKENS).astype(np.int32)
        visual = np.full(CANDIDATE_TOKENS, -1, np.int32)
        units = slice(4, 4 + len(patches.raster))
        tokens[units], visual[units] = IMAGE_TOKEN, patches.raster
        positions = rope_positions(CANDIDATE_TOKENS, units.start, patches.grid)
        return Example(tokens, {"positions": positions, "visual_index": visual}, patches.arrays)

    def side(examples: list[Example], shape: ShapeClass) -> dict:
        group = {key: x[None] for key, x in collate(examples, shape, layout).items()}
        return {"groups": (group,), "order": np.arange(PAIRS, dtype=np.int32)}

    queries = side([query() for _ in range(PAIRS)], ShapeClass(QUERY_TOKENS, 0))
    candidates = side([candidate(image) for image in images], ShapeClass(CANDIDATE_TOKENS, 64))
    no_negatives, one_source = np.ones((PAIRS, 0), bool), np.zeros(PAIRS, np.int32)
    return {"query": queries, "candidate": candidates, "negative_mask": no_negatives, "source": one_source}


class Ours:
    """The state of our side."""

    def __init__(self, trainer: Trainer, parameters: dict, batch: dict):
        self.trainer, self.batch = trainer, put_batch(batch, trainer.mesh)
        self.state = trainer.init(parameters)

    def step(self) -> float:
        """One step; waits for its loss."""
        self.state, figures = self.trainer.step(self.state, self.batch)
        return float(figures["loss"])


def race(steps: dict[str, Callable], rounds: int, count: int) -> dict[str, float]:
    """Seconds a step: sides take turns, so that both meet the same machine; the median of the turns after the first counts."""
    turns = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(count):
                step()
            turns[name].append((time.perf_counter() - start) / count)
    return {name: statistics.median(values[1:]) for name, values in turns.items()}


def seconds_of(function: Callable, *arguments, repeats: int = 9) -> float:
    """The median time of a jitted function, compiled before."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def matmul_rate(size: int = 2048) -> float:
    """FLOP/s of one large float32 matmul in XLA on this machine."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((size, size), np.float32))
    return 2 * size**3 / seconds_of(jax.jit(jnp.matmul), x, x)


def profile(config, ours: Ours) -> None:
    """Where our step's time goes: forward and backward of its parts, each jitted alone."""
    from metaembed_jax.training.step import encode

    graph, _, _ = abstract_network(model_config(config))
    parameters, batch = ours.state.parameters, ours.batch
    random = np.random.default_rng(0)

    def unit(*shape):
        x = random.standard_normal(shape, np.float32)
        return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True))

    def side(name, budget):
        def weighted_sum(parameters, weights):
            vectors = encode(lambda key: nnx.merge(graph, parameters), batch[name], name, budget, jax.random.key(0), "float32")
            return (vectors * weights).sum()

        function = jax.jit(jax.grad(weighted_sum))
        return function, parameters, unit(PAIRS, budget, 256)

    parts = {
        "queries (24 + 16 rows)": side("query", 16),
        "candidates (image, 28 + 80 rows)": side("candidate", 64),
        "loss": (jax.jit(jax.grad(lambda q, c: matryoshka_loss(q, c)[0], (0, 1))), unit(PAIRS, 16, 256), unit(PAIRS, 64, 256)),
    }
    print("our step by part, forward and backward, ms:")
    for name, (function, *arguments) in parts.items():
        print(f"  {name:36}{1e3 * seconds_of(function, *arguments):8.0f}{traced_flops(function, *arguments) / 1e9:10.2f} GFLOP")


if __name__ == "__main__":
    main()

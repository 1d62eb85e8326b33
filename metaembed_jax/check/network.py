"""The cases of a whole network: encoding of both sides, gradients, a training step, of a small built-in config or a given one.

A reference is computed on one CPU device in float64: the network by the same code, without mesh or microbatches, and the loss with
its gradient by NumPy. Networks too large for that are timed, and their numbers must be finite.

B pairs, N items of a side, R vectors of an item, D their width.
"""

import copy
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict
from PIL import Image

from metaembed_jax.backbones import family
from metaembed_jax.check import references
from metaembed_jax.check.case import SHORT, Case
from metaembed_jax.checkpoints.loading import run_processor
from metaembed_jax.config import default_config, model_config
from metaembed_jax.data import tokenizer
from metaembed_jax.data.slots import fill, slots
from metaembed_jax.inputs.examples import Example, ShapeClass
from metaembed_jax.model import make_encode
from metaembed_jax.network import SIDES, abstract_network, abstract_parameters, init_parameters
from metaembed_jax.planning.flops import encode_flops, train_flops
from metaembed_jax.planning.measure import shard_bytes
from metaembed_jax.planning.programs import abstract_batch
from metaembed_jax.sharding import named_sharding, put_rows
from metaembed_jax.trained import join, paths, split
from metaembed_jax.training.step import TrainState, make_trainer, put_batch, run_mesh

MAX_FLOPS = 1e12  # of a step whose reference is computed on the CPU
# Of float32: what the CPU's own rounding leaves of a few layers. Of bfloat16: every state is rounded to 8 bits.
VECTOR_TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05}
LOSS_TOLERANCE = {"float32": 1e-5, "bfloat16": 0.03}
GRADIENT_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.2}
WORDS = "a drawing of one small red house under many tall trees by the water in early spring light".split()


def small_config(devices: int, on_chip: bool, dtype: str) -> ConfigDict:
    """Return the config of a Qwen2.5-VL, small enough for a CPU or wide enough for a chip's kernels, on all mesh axes it can."""
    config = default_config()
    config.name, config.dtype = "small", dtype
    width, head, layers = (512, 128, 4) if on_chip else (32, 16, 2)
    with config.unlocked():
        config.architecture = dict(
            text_config=dict(
                vocab_size=512,
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=width // head,
                num_key_value_heads=2,
                intermediate_size=2 * width,
                mrope_section=(head // 8, head * 3 // 16, head * 3 // 16),
                rope_theta=10000.0,
            ),
            vision_config=dict(
                hidden_size=320 if on_chip else 32,
                depth=layers,
                num_heads=4 if on_chip else 2,
                intermediate_size=640 if on_chip else 64,
                out_hidden_size=width,
                fullatt_block_indexes=(1,),
                window_size=112 if on_chip else 84,
            ),
        )
    config.embedding_dim, config.meta_token_scale = 16, 1.0
    config.temperature = 0.15  # of weights that know nothing, so that the loss is of order 1
    config.data.query_shapes = ((64, 0),)
    config.data.candidate_shapes = ((192, 576),) if on_chip else ((48, 36),)
    config.data.max_pixels = 14 * 14 * config.data.candidate_shapes[-1][1]
    config.mesh.tensor = 2 if devices % 2 == 0 else 1
    config.mesh.fsdp = 2 if devices % 4 == 0 else 1
    # In microbatches of half of it, libtpu 0.0.52 fails to compile the step for v5e:2x2 (INTERNAL: overlaps with another chunk).
    config.batch_size = config.microbatch_size = max(8, devices)
    config.optimizer.warmup_steps = 1
    return config


class Expected(NamedTuple):
    """The reference's results for a batch.

    Attributes:
      vectors: of the rows of each shape class, by side.
      loss, losses: of all groups, and of each.
      gradient: of the trained parameters.
    """

    vectors: dict[str, list[np.ndarray]]
    loss: float
    losses: np.ndarray
    gradient: dict


class Subject:
    """A config's network on all devices, its inputs, and the expected results.

    Args:
      config: checked; its architecture is filled.
      devices: of its mesh.
    """

    def __init__(self, config: ConfigDict, devices: list[jax.Device]):
        config = copy.deepcopy(config)
        config.lora.dropout = 0.0  # the reference draws other random numbers
        self.config, self.dtype = config, config.dtype
        self.name = f"{config.name} {SHORT[config.dtype]}"
        self.mesh = run_mesh(config, devices)
        self.trainer = make_trainer(config, self.mesh)
        self.model = model_config(config)
        self.flops = train_flops(config)

    @property
    def has_reference(self) -> bool:
        """True if the network is small enough for a reference on the CPU."""
        return sum(self.flops) <= MAX_FLOPS

    @functools.cached_property
    def batch(self) -> dict:
        """A training batch of random texts, and of as many random images as its shape classes have room for."""
        config, architecture = self.config, self.model.architecture
        items = config.batch_size * (1 + config.data.negatives)
        rng, batch = np.random.default_rng(0), {}
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "tokenizer.json"
            tokenizer.train(WORDS, file, family(config.backbone), vocabulary=min(400, architecture.vocabulary))
            processor = run_processor(config, file)
        for side, count in zip(SIDES, (config.batch_size, items), strict=True):
            rows = slots(config, f"{side}_shapes", count, architecture.patch_multiple, np.arange(config.microbatch_size))
            process, (images, _) = getattr(processor, side), rows.room
            drawn = [random_item(process, rows.shapes[-1 if n < images else 0], rng) for n in range(count)]
            batch[side] = fill([(item, f"random {side}") for item in drawn], process, rows, architecture.layout)
        batch["negative_mask"] = np.ones((config.batch_size, config.data.negatives), bool)
        batch["source"] = np.zeros(config.batch_size, np.int32)
        return batch

    def batch_of(self, side: str) -> tuple[ShapeClass, dict]:
        """The largest shape class of a side, and its first microbatch."""
        arrays = {key: x[0] for key, x in self.batch[side]["groups"][-1].items() if key != "item"}
        return ShapeClass(*max(self.config.data[f"{side}_shapes"])[:2]), arrays

    @functools.cached_property
    def host_parameters(self) -> dict:
        """All parameters on this host, in the dtypes that training keeps them in."""
        with jax.default_device(jax.devices("cpu")[0]):
            parameters = jax.jit(functools.partial(init_parameters, self.model, self.config.seed))()
        return jax.tree.map(lambda x, leaf: np.asarray(x.astype(leaf.dtype)), parameters, self._abstract)

    @property
    def _abstract(self) -> dict:
        return join(self.trainer.abstract.parameters, self.trainer.abstract.frozen)

    def encode_parameters(self) -> dict:
        """The parameters on the devices, in the dtypes that encoding keeps them in; made there if no reference reads them."""
        abstract = abstract_parameters(self.model, self.mesh)
        if self.has_reference:
            return _put(self.host_parameters, abstract)

        def make() -> dict:
            return jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), init_parameters(self.model, self.config.seed), abstract)

        return jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()

    def state(self) -> TrainState:
        """The state before the first step."""
        return self.trainer.init(_put(self.host_parameters, self._abstract) if self.has_reference else None)

    @functools.cached_property
    def expected(self) -> "Expected":
        """The reference, computed once."""
        trained, frozen = split(self.host_parameters, paths(self.trainer.abstract.parameters))
        config, vectors, pulls = self.config, {}, {}
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            trained, frozen = (jax.tree.map(lambda x: np.asarray(x, np.float64), part) for part in (trained, frozen))
            for side in SIDES:
                encode = self._exact(side)
                groups = [{key: x.reshape(-1, *x.shape[2:]) for key, x in group.items()} for group in self.batch[side]["groups"]]
                side_vectors, pulls[side] = jax.vjp(
                    lambda trained, encode=encode, groups=groups: encode(trained, frozen, groups), trained
                )
                vectors[side] = [np.asarray(group, np.float64) for group in side_vectors]
            query, candidate = (np.concatenate(vectors[side])[self.batch[side]["order"]] for side in SIDES)
            pairs = len(query)
            negatives = candidate[pairs:].reshape(pairs, -1, *candidate.shape[1:])
            loss, gradients, losses, _ = references.matryoshka(
                query, candidate[:pairs], negatives, config.groups, config.temperature, config.normalization
            )
            d_vectors = gradients[0], np.concatenate([gradients[1], gradients[2].reshape(-1, *candidate.shape[1:])])
            parts = [pulls[side](self._by_group(side, d))[0] for side, d in zip(SIDES, d_vectors, strict=True)]
            gradient = jax.tree.map(lambda *x: np.asarray(sum(x), np.float64), *parts)
        return Expected(vectors, loss, losses, gradient)

    def _exact(self, side: str) -> Callable:
        """The jitted `(trained, frozen, groups) -> vectors of all rows of each shape class`, in float64."""
        graph, _, _ = abstract_network(dataclasses.replace(self.model, dtype="float64", checkpoint=False))

        def encode(trained: dict, frozen: dict, groups: list[dict]) -> list[jax.Array]:
            network = nnx.merge(graph, join(trained, frozen))
            return [network(group, side, self.budget(side)) for group in groups]

        return jax.jit(encode)

    def _by_group(self, side: str, d_vectors: np.ndarray) -> list[np.ndarray]:
        """The gradient of vectors in pair order, as that of the rows of each shape class."""
        rows = [group["tokens"].shape[0] * group["tokens"].shape[1] for group in self.batch[side]["groups"]]
        d_rows = np.zeros((sum(rows), *d_vectors.shape[1:]), np.float32)
        d_rows[self.batch[side]["order"]] = d_vectors
        return np.split(d_rows, np.cumsum(rows)[:-1])

    def budget(self, side: str) -> int:
        """The most vectors that the loss reads of a side."""
        return max(group[SIDES.index(side)] for group in self.config.groups)


def random_item(process: Callable[..., Example], shape: ShapeClass, rng: np.random.Generator) -> dict:
    """A random image of the first size that a shape class has room for; a text of random length if it has none."""
    for height, width in (*rng.integers(80, 400, (4, 2)), (400, 400), (56, 56)) if shape.patches else ():
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        item = {"text": str(rng.choice(WORDS)), "image": image}
        example = process(item)
        if example.patches <= shape.patches and len(example.tokens) <= shape.tokens:
            return item
    return {"text": " ".join(rng.choice(WORDS, rng.integers(1, max(shape.tokens // 4, 2))))}


def _put(parameters: dict, abstract: dict) -> dict:
    """Parameters of this host, as the abstract ones are on the devices."""
    return jax.tree.map(lambda x, leaf: jax.device_put(x.astype(leaf.dtype), leaf.sharding), parameters, abstract)


def encode_cases(subject: Subject) -> Iterator[Case]:
    """Yield the cases that encode each side, as `MetaEmbed` does."""
    encode, mesh, dtype = make_encode(subject.model, subject.mesh), subject.mesh, subject.dtype
    parameters = abstract_parameters(subject.model, mesh)
    for side in SIDES:
        shape, rows = subject.batch_of(side)
        budget = subject.budget(side)
        abstract_rows = {
            key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=named_sharding(mesh, ("batch",) + (None,) * (x.ndim - 1)))
            for key, x in rows.items()
        }

        def function(parameters, batch, side=side, budget=budget):
            return {"vectors": encode(parameters, batch, side=side, budget=budget)}

        def arguments(rows=rows):
            return subject.encode_parameters(), {key: put_rows(x, mesh) for key, x in rows.items()}

        size = len(rows["tokens"])

        def reference(side=side, size=size):
            return {"vectors": subject.expected.vectors[side][-1][:size]}

        yield Case(
            f"encode {side}, {subject.name}",
            jax.jit(function),
            arguments,
            reference if subject.has_reference else None,
            VECTOR_TOLERANCE[dtype],
            sum(encode_flops(subject.config, shape, size)),
            mesh.size * shard_bytes((parameters, abstract_rows)),
            abstract=(parameters, abstract_rows),
            dtype=dtype,
        )


def step_case(subject: Subject) -> Case:
    """Return the case of a training step, as `train.py` computes it. Its gradient is read from the optimizer's first moments."""
    config, trainer = subject.config, subject.trainer

    def read(result):
        state, metrics = result
        norm = metrics["gradient_norm"]
        outputs = {"loss": metrics["loss"], "losses": group_losses(config, metrics), "gradient norm": norm}
        if config.optimizer.algorithm == "adamw":
            scale = jnp.maximum(norm / config.optimizer.clip_norm, 1) / (1 - config.optimizer.b1)
            moments = optax.tree_utils.tree_get(state.optimizer, "mu")
            outputs["gradient"] = jax.tree.map(lambda moment: moment * scale, moments)
        return outputs

    def reference():
        expected = subject.expected
        norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(expected.gradient)))
        return {"loss": expected.loss, "losses": expected.losses, "gradient norm": norm, "gradient": expected.gradient}

    abstract = (trainer.abstract, abstract_batch(config, subject.mesh))
    return Case(
        f"train step, {subject.name}",
        trainer.step,
        lambda: (subject.state(), put_batch(subject.batch, subject.mesh)),
        reference if subject.has_reference else None,
        LOSS_TOLERANCE[subject.dtype],
        subject.flops.model,
        subject.mesh.size * shard_bytes(abstract),
        tolerances={"gradient": GRADIENT_TOLERANCE[subject.dtype]},
        abstract=abstract,
        read=read,
        carries=True,
        dtype=subject.dtype,
    )


def group_losses(config: ConfigDict, metrics: dict) -> jax.Array:
    """The loss of each group."""
    return jnp.stack([metrics[f"loss/{r_q}:{r_c}"] for r_q, r_c in config.groups])

"""Cases of a whole network: encoding of packed rows, and a training step, of a small built-in config or a given one.

The reference runs on one CPU device in float64: the network by the same code, without a mesh or microbatches, and the loss with its
gradient in NumPy. A network that is too large for a reference is timed, and its numbers must be finite.

B pairs, N documents, n rows of a step, V vectors of a row, R vectors of an item, D their width.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from PIL import Image

from metaembed_jax.backbones.family import family
from metaembed_jax.batch import rows, training
from metaembed_jax.batch.rows import Batch
from metaembed_jax.batch.training import TrainingBatch, put
from metaembed_jax.check.case import SHORT, Case
from metaembed_jax.check.loss_reference import matryoshka
from metaembed_jax.checkpoints.loading import run_processor
from metaembed_jax.config.keys import with_keys
from metaembed_jax.config.objectives import MatryoshkaConfig, ObjectivesConfig
from metaembed_jax.config.run import DataConfig, MeshConfig, ModelSettings, OptimizerConfig, RowsConfig, RunConfig
from metaembed_jax.data import tokenizer
from metaembed_jax.data.pipeline import training_batches
from metaembed_jax.data.row_plan import plan_rows
from metaembed_jax.data.run_items import run_items
from metaembed_jax.flops import encode_flops, train_flops
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.network import abstract_network, abstract_parameters, init_parameters, make_encode
from metaembed_jax.network_config import model_config, row_limits
from metaembed_jax.sharding import batch_shards, shard_bytes
from metaembed_jax.trainable import join, paths, split
from metaembed_jax.training.step import TrainState, make_trainer, run_mesh

MAX_FLOPS = 1e12  # of a step with a reference
# float32: the CPU's own rounding over a few layers. bfloat16: every state is rounded to 8 bits.
VECTOR_TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05}
LOSS_TOLERANCE = {"float32": 1e-5, "bfloat16": 0.03}
GRADIENT_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.2}
WORDS = "a drawing of one small red house under many tall trees by the water in early spring light".split()


def small_config(devices: int, on_chip: bool, dtype: Literal["float32", "bfloat16"]) -> RunConfig:
    """Return the config of a small Qwen2.5-VL: for a CPU, or wide enough for a chip's kernels; on as many mesh axes as possible."""
    width, head, layers = (512, 128, 4) if on_chip else (32, 16, 2)
    architecture = dict(
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
    tokens, patches = (384, 576) if on_chip else (160, 36)
    return RunConfig(
        name="small",
        model=ModelSettings(architecture=architecture, embedding_dim=16, meta_token_scale=1.0, dtype=dtype),
        rows=RowsConfig(size=(tokens, patches), batch_size=max(8, devices)),
        data=DataConfig(max_pixels=14 * 14 * patches),
        # At this temperature, the loss of random weights is of order 1.
        objectives=ObjectivesConfig(matryoshka=MatryoshkaConfig(temperature=0.15)),
        optimizer=OptimizerConfig(warmup_steps=1),
        mesh=MeshConfig(fsdp=2 if devices % 4 == 0 else 1, tensor=2 if devices % 2 == 0 else 1),
    )


class Expected(NamedTuple):
    """The reference of a batch.

    Attributes:
      vectors: vectors of all rows, [n, V, D].
      loss: loss of all groups together.
      losses: loss of each group.
      gradient: gradient of the trained parameters.
    """

    vectors: np.ndarray
    loss: float
    losses: np.ndarray
    gradient: dict


class CheckedNetwork:
    """A config's network on some devices, its inputs, and its reference.

    Args:
      config: a config with an architecture.
      devices: devices of the mesh.
    """

    def __init__(self, config: RunConfig, devices: Sequence):
        one_step = {"schedule.steps": 1, "optimizer.warmup_steps": 0, "data.sources": (("random", 1.0, 0),), "data.sub_batch": 0}
        config = with_keys(config, {"model.lora.dropout": 0.0, **one_step})  # the reference draws other random numbers
        self.config, self.dtype = config, config.model.dtype
        self.name = f"{config.name} {SHORT[config.model.dtype]}"
        self.mesh = run_mesh(config, devices)
        self.trainer = make_trainer(config, self.mesh)
        self.model = model_config(config)
        limits, records = row_limits(config), RandomPairs(config.rows.batch_size, config.data.negatives, config.seed)
        self._items = run_items(config, _processor(config), [records])
        self.shape = plan_rows(self._items, limits).shape(config.rows.microbatch_rows, batch_shards(self.mesh))
        self.flops = train_flops(config, self.shape)

    @property
    def has_reference(self) -> bool:
        """True if the network is small enough for a reference on the CPU."""
        return sum(self.flops) <= MAX_FLOPS

    @functools.cached_property
    def batch(self) -> TrainingBatch:
        """The batch of one step: random texts, and images of random sizes."""
        batches = training_batches(self._items, self.shape, self.model.architecture.layout)
        return batches[0]  # pyright: ignore[reportReturnType]  only a filtered data set has None

    @functools.cached_property
    def host_parameters(self) -> dict:
        """All parameters on this host, in the dtypes of training."""
        with jax.default_device(jax.devices("cpu")[0]):
            parameters = jax.jit(functools.partial(init_parameters, self.model, self.config.seed))()
        return jax.tree.map(lambda x, leaf: np.asarray(x.astype(leaf.dtype)), parameters, self._abstract)

    @property
    def _abstract(self) -> dict:
        return join(self.trainer.abstract.parameters, self.trainer.abstract.frozen)

    def encode_parameters(self) -> dict:
        """Return the parameters on the devices, in the dtypes of encoding; without a reference, they are made there."""
        abstract = abstract_parameters(self.model, self.mesh)
        if self.has_reference:
            return _put(self.host_parameters, abstract)

        def make() -> dict:
            return jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), init_parameters(self.model, self.config.seed), abstract)

        return jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()

    def state(self) -> TrainState:
        """Return the state before the first step."""
        return self.trainer.init(_put(self.host_parameters, self._abstract) if self.has_reference else None)

    @functools.cached_property
    def expected(self) -> Expected:
        """The reference, computed once."""
        trees = split(self.host_parameters, paths(self.trainer.abstract.parameters))
        rows = self.batch.rows.map(lambda x: x.reshape(-1, *x.shape[2:]))
        graph, _, _ = abstract_network(dataclasses.replace(self.model, dtype="float64", checkpoint=False))

        @jax.jit
        def encode(trained: dict, frozen: dict, rows: Batch) -> jax.Array:
            return nnx.merge(graph, join(trained, frozen))(rows)

        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            trained, frozen = (jax.tree.map(lambda x: np.asarray(x, np.float64), tree) for tree in trees)
            vectors, pull = jax.vjp(lambda trained: encode(trained, frozen, rows), trained)
            vectors_nVD = np.asarray(vectors, np.float64)
            loss, losses, d_vectors_nVD = expected_loss(self.config.objectives, self.batch, vectors_nVD)
            (gradient,) = pull(d_vectors_nVD.astype(vectors.dtype))
            gradient = jax.tree.map(lambda x: np.asarray(x, np.float64), gradient)
        return Expected(vectors_nVD, loss, losses, gradient)


def expected_loss(
    objectives: ObjectivesConfig, batch: TrainingBatch, vectors_nVD: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Return the reference of the loss, the loss of each group, and the gradient of the vectors."""
    assert objectives.matryoshka is not None  # the only objective, and a config has at least one
    budgets, starts = objectives.largest_budget, (batch.queries, batch.documents)
    query_BR, document_NR = (starts_N[:, None] + np.arange(budget) for starts_N, budget in zip(starts, budgets, strict=True))
    vectors_TD = vectors_nVD.reshape(-1, vectors_nVD.shape[-1])
    query, documents, pairs = vectors_TD[query_BR], vectors_TD[document_NR], len(query_BR)
    negatives = documents[pairs:].reshape(pairs, -1, *documents.shape[1:])
    loss, (d_query, d_positive, d_negatives), figures = matryoshka(
        query, documents[:pairs], negatives, **dataclasses.asdict(objectives.matryoshka)
    )
    d_vectors_TD = np.zeros_like(vectors_TD)
    np.add.at(d_vectors_TD, query_BR, d_query)
    np.add.at(d_vectors_TD, document_NR, np.concatenate([d_positive, d_negatives.reshape(-1, *documents.shape[1:])]))
    return loss, figures["loss"], d_vectors_TD.reshape(vectors_nVD.shape)


class RandomPairs(Sequence):
    """Records of random texts and images for one step; every second document is a text without an image."""

    def __init__(self, pairs: int, negatives: int, seed: int):
        self._pairs, self._negatives, self._seed = pairs, negatives, seed

    def __len__(self) -> int:
        return self._pairs

    def __getitem__(self, row: int) -> dict:
        rng = np.random.default_rng((self._seed, row))
        documents = [_random_item(rng, with_image=(row + number) % 2 == 0) for number in range(1 + self._negatives)]
        return {"query": _random_item(rng, with_image=False), "positive": documents[0], "negatives": documents[1:]}

    def describe(self, row: int, epoch: int, step: int) -> dict:
        """Return a record with the size of each image instead of the image."""

        def size_of(item: dict) -> dict:
            return item | {"image": item["image"].size} if "image" in item else item

        record = self[row]
        negatives = [size_of(item) for item in record["negatives"]]
        return {"query": size_of(record["query"]), "positive": size_of(record["positive"]), "negatives": negatives}


def _random_item(rng: np.random.Generator, with_image: bool) -> dict:
    if with_image:
        height, width = rng.integers(80, 400, 2)
        return {"text": str(rng.choice(WORDS)), "image": Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))}
    return {"text": " ".join(rng.choice(WORDS, rng.integers(1, 16)))}


def _processor(config: RunConfig):
    """Return the family's processor with a vocabulary of `WORDS`."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "tokenizer.json"
        vocabulary = min(400, model_config(config).architecture.vocabulary)
        tokenizer.train(WORDS, file, family(config.model.backbone), vocabulary=vocabulary)
        return run_processor(config, file)


def _put(parameters: dict, abstract: dict) -> dict:
    """Put parameters of this host on the devices, as the abstract parameters say."""
    return jax.tree.map(lambda x, leaf: jax.device_put(x.astype(leaf.dtype), leaf.sharding), parameters, abstract)


def encode_case(network: CheckedNetwork) -> Case:
    """Return the case of encoding one microbatch of rows, as `MetaEmbed` does."""
    encode, mesh, dtype, shape = make_encode(network.model, network.mesh), network.mesh, network.dtype, network.shape
    parameters = abstract_parameters(network.model, mesh)
    abstract = rows.abstract(shape.size, shape.row, network.model.architecture.layout, mesh)

    def is_vector() -> np.ndarray:
        return np.asarray(network.batch.rows.reads[0]) > 0

    return Case(
        f"encode, {network.name}",
        encode,
        lambda: (network.encode_parameters(), rows.put(network.batch.rows.map(lambda x: x[0]), mesh)),
        (lambda: {"vectors": network.expected.vectors[: shape.size][is_vector()]}) if network.has_reference else None,
        VECTOR_TOLERANCE[dtype],
        sum(encode_flops(network.config, shape.row, shape.size)),
        mesh.size * shard_bytes((parameters, abstract)),
        abstract=(parameters, abstract),
        read=lambda vectors_bVD: {"vectors": vectors_bVD[is_vector()]},
        dtype=dtype,
    )


def step_case(network: CheckedNetwork) -> Case:
    """Return the case of a training step, as in `train.py`. The gradient is read from the first moments of the optimizer."""
    config, trainer = network.config, network.trainer

    def read(result):
        state, metrics = result
        norm = metrics["gradient_norm"]
        outputs = {"loss": metrics["loss"], "losses": group_losses(config.objectives.budgets, metrics), "gradient norm": norm}
        if config.optimizer.algorithm == "adamw":
            scale = jnp.maximum(norm / config.optimizer.clip_norm, 1) / (1 - config.optimizer.b1)
            moments = optax.tree_utils.tree_get(state.optimizer, "mu")
            outputs["gradient"] = jax.tree.map(lambda moment: moment * scale, moments)
        return outputs

    def reference():
        expected = network.expected
        norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(expected.gradient)))
        return {"loss": expected.loss, "losses": expected.losses, "gradient norm": norm, "gradient": expected.gradient}

    batch = training.abstract(
        network.shape, config.rows.batch_size, config.data.negatives, network.model.architecture.layout, network.mesh
    )
    abstract = (trainer.abstract, batch)
    return Case(
        f"train step, {network.name}",
        trainer.step,
        lambda: (network.state(), put(network.batch, network.mesh)),
        reference if network.has_reference else None,
        LOSS_TOLERANCE[network.dtype],
        network.flops.model,
        network.mesh.size * shard_bytes(abstract),
        tolerances={"gradient": GRADIENT_TOLERANCE[network.dtype]},
        abstract=abstract,
        read=read,
        carries=True,
        dtype=network.dtype,
    )


def group_losses(groups: Sequence[Budget], metrics: dict) -> jax.Array:
    """Return the loss of each group."""
    return jnp.stack([metrics[f"loss/{group}"] for group in groups])

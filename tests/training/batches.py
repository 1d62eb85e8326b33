"""Batches of a run's configuration, made as a run makes them."""

from metaembed_jax.checkpoints.loading import run_processor
from metaembed_jax.config import RunConfig
from metaembed_jax.data import sources
from metaembed_jax.data.pipeline import training_batches
from metaembed_jax.data.row_plan import RowPlan, plan_rows
from metaembed_jax.data.run_items import RunItems, run_items
from metaembed_jax.network_config import model_config, row_limits
from metaembed_jax.training.initialize import find_start


def make_plan(config: RunConfig) -> tuple[RunItems, RowPlan]:
    """The items of a run's steps, and their rows."""
    config, start = find_start(config)
    processor = run_processor(config, start.tokenizer)
    items = run_items(config, processor, sources.training_records(config.data, config.seed))
    return items, plan_rows(items, row_limits(config))


def make_dataset(config: RunConfig, planned: tuple[RunItems, RowPlan] | None = None, shards: int = 8):
    """Element n is the whole `TrainingBatch` of step n, for a mesh of at most so many shards."""
    config, _ = find_start(config)
    items, plan = planned or make_plan(config)
    return training_batches(items, plan.shape(config.rows.microbatch_rows, shards), model_config(config).architecture.layout)

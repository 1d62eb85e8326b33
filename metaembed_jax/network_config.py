"""The network and the item limits of a run's config."""

from metaembed_jax.backbones.config import FamilyConfig
from metaembed_jax.backbones.family import family
from metaembed_jax.backbones.lora import LoraConfig
from metaembed_jax.batch.items import Limits
from metaembed_jax.config.run import ModelSettings, RunConfig
from metaembed_jax.errors import UserError
from metaembed_jax.network import ModelConfig


def architecture_of(model: ModelSettings) -> FamilyConfig:
    """Return the architecture of a model, checked by its family."""
    return family(model.backbone).Config.from_huggingface(model.architecture)


def model_config(config: RunConfig, training: bool = False) -> ModelConfig:
    """Return the network of a run; with dropout in training only."""
    model, rows = config.model, config.rows
    dropout = model.lora.dropout if training else 0.0
    return ModelConfig(
        backbone=model.backbone,
        architecture=architecture_of(model),
        query_tokens=model.query_tokens,
        document_tokens=model.document_tokens,
        meta_token_scale=model.meta_token_scale,
        embedding_dim=model.embedding_dim,
        dtype=model.dtype,
        checkpoint=rows.recompute in ("everything", "layers"),
        unroll=rows.unroll_layers,
        lora=LoraConfig(model.lora_patterns, model.lora.rank, model.lora.alpha, dropout),
        int8=model.frozen_dtype == "int8",
    )


def row_limits(config: RunConfig) -> Limits:
    """Return the largest item of a run, which fills a row together with the Meta Tokens of the largest budgets.

    Raises:
      UserError: the row has no room besides Meta Tokens, or its patches are no multiple of the family's.
    """
    network, (query_vectors, document_vectors) = model_config(config), config.objectives.largest_budget
    architecture = network.architecture
    images = family(config.model.backbone).Images.from_run(config.data, architecture, None)
    tokens, patches = config.rows.size or architecture.default_row(images)
    meta = [network.meta_tokens("query", query_vectors), network.meta_tokens("document", document_vectors)]
    if tokens <= max(meta):
        raise UserError(f"config.rows.size={(tokens, patches)}: {max(meta)} of its tokens are Meta Tokens; expected more tokens")
    if patches % (multiple := architecture.layout.multiple):
        raise UserError(
            f"config.rows.size={(tokens, patches)}: expected a multiple of {multiple} patches, as images of this model have"
        )
    return Limits(tokens, patches, config.data.max_text_tokens, *meta)

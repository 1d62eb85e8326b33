"""The network and the item limits of a run's config."""

from typing import NamedTuple

from metaembed_jax.backbones.config import FamilyConfig
from metaembed_jax.backbones.family import family
from metaembed_jax.backbones.lora import LoraConfig
from metaembed_jax.batch.items import Limits
from metaembed_jax.config.run import ModelSettings, RunConfig
from metaembed_jax.errors import UserError
from metaembed_jax.network import SIDES, ModelConfig


class RunVectors(NamedTuple):
    """The vectors of a run's items at its largest budgets: (of a query, of a document).

    Attributes:
      meta: Meta Tokens after a prompt.
      vectors: of an item; None if each of its tokens has one.
    """

    meta: tuple[int, int]
    vectors: tuple[int, int] | None


def architecture_of(model: ModelSettings) -> FamilyConfig:
    """Return the architecture of a model, checked by its family."""
    return family(model.backbone).Config.from_huggingface(model.architecture)


def model_config(config: RunConfig, training: bool = False) -> ModelConfig:
    """Return the network of a run; with dropout in training only."""
    model, rows = config.model, config.rows
    dropout = model.lora.dropout if training else 0.0
    return ModelConfig(
        backbone=model.backbone,
        readout=model.readout,
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

    If all states are read, the largest item has `config.model.query_tokens` or `document_tokens` tokens.

    Raises:
      UserError: the row has no room next to Meta Tokens, or for the largest item, or its patches are not a multiple of
        the family's.
    """
    network = model_config(config)
    architecture = network.architecture
    images = family(config.model.backbone).Images.from_run(config.data, architecture, None)
    tokens, patches = config.rows.size or architecture.default_row(images)
    if network.reads_states:
        prompt_tokens = [network.vectors(side) for side in SIDES]
        if max(prompt_tokens) > tokens:
            raise UserError(
                f"config.rows.size={(tokens, patches)}: expected at least {max(prompt_tokens)} tokens, the larger of "
                "config.model.query_tokens and document_tokens"
            )
        meta = [tokens - number for number in prompt_tokens]  # the tokens that a prompt leaves free, as Meta Tokens do
    else:
        meta = [*run_vectors(config).meta]
    if tokens <= max(meta):
        raise UserError(f"config.rows.size={(tokens, patches)}: {max(meta)} of its tokens are Meta Tokens; expected more tokens")
    if patches % (multiple := architecture.layout.multiple):
        raise UserError(
            f"config.rows.size={(tokens, patches)}: expected a multiple of {multiple} patches, as images of this model have"
        )
    return Limits(tokens, patches, config.data.max_text_tokens, *meta)


def run_vectors(config: RunConfig) -> RunVectors:
    """Return the Meta Tokens and vectors of a run's items."""
    network, largest = model_config(config), config.objectives.largest_budget
    query_meta, document_meta = (network.meta_tokens(side, budget) for side, budget in zip(SIDES, largest, strict=True))
    return RunVectors((query_meta, document_meta), None if network.reads_states else largest)

"""Vectors of a source, encoded by a run."""

import numpy as np
from jaxtyping import Float

import metaembed_jax as me
from metaembed_jax.data import sources
from metaembed_jax.data.sources.records import HELD_OUT_SPLITS, SPLITS


def encode_source(run: str, source: str, data: str) -> tuple[Float[np.ndarray, "N R D"], dict[str, Float[np.ndarray, "Q R D"]]]:
    """Encode the documents of all stored splits of a source, and the queries of each held-out split."""
    model = me.MetaEmbed.from_pretrained(run, dtype="float32")
    splits = HELD_OUT_SPLITS if source == "boards" else SPLITS  # training pages of boards are not stored
    task = {split: sources.retrieval(source, data, split) for split in splits}
    document = model.encode_document([item for split in splits for item in task[split].documents], progress=True)
    return document, {split: model.encode_query(task[split].queries, progress=True) for split in HELD_OUT_SPLITS}

"""MetaEmbed in JAX: multimodal retrieval with nested sets of vectors (arXiv 2509.18095).

import metaembed_jax as me
model = me.MetaEmbed.from_pretrained("runs/tiny")
scores = me.maxsim(model.encode_query(["cloud snow"]), model.encode_document([image]), budget=(4, 8))
"""

__version__ = "0.1.0"

from metaembed_jax.data.documents import open_documents
from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.groups import GROUPS
from metaembed_jax.late_interaction.matryoshka import matryoshka_loss
from metaembed_jax.late_interaction.maxsim import maxsim
from metaembed_jax.late_interaction.prefixes import unit_prefix
from metaembed_jax.model import MetaEmbed
from metaembed_jax.retrieval.build import index_documents
from metaembed_jax.retrieval.index import Index

__all__ = [
    "GROUPS",
    "Index",
    "MetaEmbed",
    "UserError",
    "index_documents",
    "matryoshka_loss",
    "maxsim",
    "open_documents",
    "unit_prefix",
]

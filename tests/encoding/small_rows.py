"""Models with small rows, for fast tests."""

import metaembed_jax as me


def with_small_rows(model: me.MetaEmbed, tokens: int = 256, patches: int = 192) -> me.MetaEmbed:
    """Return the model with rows of so many tokens and patches."""
    model.processor.limits = model.processor.limits._replace(tokens=tokens, patches=patches)
    return me.MetaEmbed(model.config, model.parameters, model.processor, model.mesh)

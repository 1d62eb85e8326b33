"""Models whose rows are small, so that tests compute little."""

import metaembed_jax as me


def with_small_rows(model: me.MetaEmbed, tokens: int = 256, patches: int = 192) -> me.MetaEmbed:
    """The model with rows of so many tokens and patches."""
    model.processor.limits = model.processor.limits._replace(tokens=tokens, patches=patches)
    return me.MetaEmbed(model.config, model.parameters, model.processor, model.mesh)

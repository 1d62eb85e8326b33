"""The stages of a run: configs whose runs start from each other."""

from metaembed_jax.config.files import load_config, names_config
from metaembed_jax.config.keys import with_keys
from metaembed_jax.config.run import RunConfig
from metaembed_jax.errors import UserError


def stage_before(config: RunConfig) -> RunConfig | None:
    """Return the config whose run this one starts from, if `config.init_from` names a config; its folder is `default_workdir`'s."""
    if not names_config(config.init_from):
        return None
    try:
        before = load_config(config.init_from)
    except UserError as error:
        raise UserError(f"config.init_from: {error}") from error
    return with_keys(before, {"data.dir": config.data.dir, "mesh": config.mesh})


def stages(config: RunConfig) -> list[RunConfig]:
    """Return the configs of all stages, this one last: each starts from the one before it.

    Raises:
      UserError: the stages form a circle.
    """
    chain, names = [config], []
    while before := stage_before(chain[0]):
        names.append(chain[0].init_from)
        if names[-1] in names[:-1]:
            raise UserError(f"config.init_from: {' starts from '.join(names)}: a first stage must start from something else")
        chain.insert(0, before)
    return chain


def with_architecture(config: RunConfig) -> RunConfig:
    """Return a config whose architecture, where it is empty, is that of the stage before.

    Raises:
      UserError: no stage has one.
    """
    if config.model.architecture:
        return config
    known = [stage.model.architecture for stage in stages(config) if stage.model.architecture]
    if not known:
        raise UserError("config.model.architecture is empty, and no weights are read to learn it from: set it in the config")
    return with_keys(config, {"model.architecture": known[-1]})

"""The first weights of a run: fresh, of another run, or of a released model. A run that resumes has its own checkpoints."""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from metaembed_jax.backbones.config_checks import differences
from metaembed_jax.backbones.family import family
from metaembed_jax.checkpoints.base_weights import BaseWeights, find, open_base, open_recorded
from metaembed_jax.checkpoints.frozen import is_kept, is_kept_base, kept_base, read_kept, stands_alone
from metaembed_jax.checkpoints.huggingface import read_backbone
from metaembed_jax.checkpoints.loading import base_architecture, best_parameters, exported_parameters, read_metadata
from metaembed_jax.checkpoints.runs import RunCheckpoints
from metaembed_jax.checkpoints.workdir import check_model, default_workdir, has_checkpoints, read_base, read_config
from metaembed_jax.config.keys import with_keys
from metaembed_jax.config.run import ModelSettings, RunConfig
from metaembed_jax.errors import UserError
from metaembed_jax.network import ModelConfig, abstract_parameters
from metaembed_jax.network_config import architecture_of, model_config
from metaembed_jax.trainable import LORA, join, paths
from metaembed_jax.training.stages import stage_before
from metaembed_jax.training.step import Trainer, TrainState

# Keys of config.model that the shapes of Meta Tokens and adapters do not show; two runs must agree on them.
TOKEN_KEYS, LORA_KEYS = ("query_tokens", "document_tokens"), ("lora.rank", "lora.alpha")


class Start(NamedTuple):
    """The weights that `config.init_from` names.

    Attributes:
      run: another run, to read trained parameters from.
      base: released weights, to read frozen parameters from, and all parameters if there is no `run`.
      tokenizer: the file of the vocabulary.
    """

    run: Path | None
    base: BaseWeights | None
    tokenizer: Path


def find_start(config: RunConfig, workdir: Path | None = None) -> tuple[RunConfig, Start]:
    """Return the config of a run and its start. An architecture that is empty in the config is set to that of the start.

    Args:
      workdir: folder of the run. Once it has checkpoints, the first stage is not needed: the folder has all that was taken from it.
        In a bucket this holds for base weights too.

    Raises:
      UserError: the start does not exist, is not a known model, or has another architecture than the config.
    """
    if not config.init_from:
        return config, Start(None, None, _tokenizer(Path(config.data.dir) / config.data.sources[0][0]))
    before = stage_before(config)
    if workdir and has_checkpoints(workdir) and (before or stands_alone(workdir, config.init_from)):
        directory = workdir
    else:
        directory = default_workdir(before.name, workdir) if before else find(config.init_from)
    if (directory / "run.json").is_file():
        other = read_config(directory)
        config = _fill_architecture(config, other.model.backbone, other.model.architecture, directory, but_free=True)
        both_adapted = config.model.lora_patterns and other.model.lora_patterns
        have_tokens = config.model.readout == other.model.readout == "meta_tokens"
        if keys := TOKEN_KEYS * have_tokens + LORA_KEYS * bool(both_adapted):
            check_model(directory, config.model, keys)
        record = read_base(directory)
        open_weights = kept_base if directory == workdir and is_kept(directory) else open_recorded
        return config, Start(directory, open_weights(directory, record) if record else None, _tokenizer(directory))
    base = open_base(config.init_from)
    backbone, architecture, _ = base_architecture(directory)
    config = _fill_architecture(config, backbone, dataclasses.asdict(architecture), directory)
    return config, Start(None, base, _tokenizer(directory))


def initial_state(config: RunConfig, trainer: Trainer, checkpoints: RunCheckpoints, start: Start) -> TrainState:
    """Restore the latest checkpoint; without one, read the parameters of the start and make the others fresh.

    Raises:
      UserError: checkpoints or start are of another model, or there are no base weights to read frozen parameters from.
    """
    abstract = trainer.abstract
    if abstract.frozen and start.base is None:
        raise UserError(
            f"config.model.trained leaves {min(paths(abstract.frozen))} frozen, and config.init_from={config.init_from!r} is not a "
            "Hugging Face directory to read it from; set one (`export --format=transformers` makes one of a run)"
        )
    restored = checkpoints.restore_latest(abstract.parameters, abstract.optimizer, lambda line: print(line, flush=True))
    if restored is not None:
        checkpoints.set_aside_after(restored.step)
        print(f"resuming at step {restored.step} of {config.schedule.steps}", flush=True)
        step = jax.device_put(np.int32(restored.step), abstract.step.sharding)
        return TrainState(step, restored.parameters, _read_base(config.model, start.base, abstract.frozen), restored.optimizer)
    if start.run is not None:
        step, parameters = _read_run(start.run, model_config(config), trainer)
        print(f"starting from step {step} of {start.run}", flush=True)
        return trainer.init(join(parameters, _read_base(config.model, start.base, abstract.frozen)))
    if start.base is not None:
        print(f"starting from {start.base.name}", flush=True)
        expected = abstract.network_parameters()
        return trainer.init(_read_base(config.model, start.base, expected) | _read_exported(config.model, start.base, expected))
    return trainer.init()


def describe(state: TrainState) -> str:
    """Count the numbers of trained parameters, frozen parameters and optimizer, and their bytes."""

    def count(tree) -> str:
        leaves = jax.tree.leaves(tree)
        return f"{sum(leaf.size for leaf in leaves):,} ({sum(leaf.nbytes for leaf in leaves) / 1e6:,.1f} MB)"

    trained, frozen, optimizer = count(state.parameters), count(state.frozen), count(state.optimizer)
    return f"parameters: {trained} trained, {frozen} frozen; numbers of the optimizer: {optimizer}"


def _read_run(run: Path, network: ModelConfig, trainer: Trainer) -> tuple[int, dict]:
    """Return (step, trained parameters) of another run's best checkpoint.

    The head is left out if it has another width, and the Meta Tokens if one of the two runs has none.
    """
    expected, model = trainer.abstract.parameters, read_config(run).model
    fresh = {"head"} if model.embedding_dim != network.embedding_dim else set()
    fresh |= {"meta_tokens"} if model.readout != network.readout else set()
    if not fresh:
        return best_parameters(run, expected)
    keys = {key: getattr(model, key) for key in ("embedding_dim", "readout", *TOKEN_KEYS)}
    abstract = abstract_parameters(dataclasses.replace(network, **keys), trainer.mesh, "float32")
    stored = _without(expected, fresh) | {name: abstract[name] for name in fresh if name in abstract}
    step, parameters = best_parameters(run, stored)
    return step, _without(parameters, fresh)


def _read_base(model: ModelSettings, base: BaseWeights | None, expected: dict) -> dict:
    """Return the expected parameters that base weights have: the backbone, without adapters."""
    flat = flatten_dict(expected, sep=".")
    stored = {path: leaf for path, leaf in flat.items() if path.startswith("backbone.") and LORA not in path}
    if base is None or not stored:
        return {}
    if is_kept_base(base):
        return read_kept(base.directory, expected)
    backbone = unflatten_dict(stored, sep=".")["backbone"]
    return {"backbone": read_backbone(base.directory, family(model.backbone), architecture_of(model), backbone)}


def _read_exported(model: ModelSettings, base: BaseWeights, expected: dict) -> dict:
    """Return the Meta Tokens of base weights that this project exported, and the head unless it has another width.

    A model that reads all states takes neither.
    """
    metadata = read_metadata(base.directory)
    if not metadata or model.readout == "states":
        return {}
    for key in TOKEN_KEYS:
        if metadata[key] != (ours := getattr(model, key)):
            raise UserError(f"{base.name} has {key}={metadata[key]}, and config.model has {ours}")
    if metadata["embedding_dim"] != model.embedding_dim:
        expected = _without(expected, {"head"})
    return exported_parameters(base.directory, model.backbone, metadata, expected)


def _without(parameters: dict, names: Collection[str]) -> dict:
    return {name: leaf for name, leaf in parameters.items() if name not in names}


def _fill_architecture(config: RunConfig, backbone: str, architecture: dict, directory: Path, but_free: bool = False) -> RunConfig:
    """Return the config with the architecture of its start, if its own is empty.

    Args:
      directory: folder of the start, for errors.
      but_free: fields that no parameter depends on may differ.

    Raises:
      UserError: the config has another architecture.
    """
    if not config.model.architecture:
        return with_keys(config, {"model.backbone": backbone, "model.architecture": architecture})
    different = [("backbone", config.model.backbone, backbone)]
    if config.model.backbone == backbone:
        make = family(backbone).Config.from_huggingface
        different = differences(make(config.model.architecture), make(architecture), but_free)
    for key, mine, other in different[:1]:
        raise UserError(
            f"{directory} has {key}={other!r}, and config.model.architecture has {mine!r}; leave the architecture empty"
        )
    return config


def _tokenizer(directory: Path) -> Path:
    if not (directory / "tokenizer.json").is_file():
        raise UserError(
            f"{directory}/tokenizer.json is missing: a source that was prepared from files has no vocabulary; "
            "set config.init_from to a released model or a run"
        )
    return directory / "tokenizer.json"

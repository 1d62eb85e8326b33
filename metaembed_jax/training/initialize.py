"""Where the weights of a run come from: fresh ones, another run's, or a released model's; and after that, its own checkpoints."""

import dataclasses
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
from metaembed_jax.network import abstract_parameters
from metaembed_jax.network_config import architecture_of, model_config
from metaembed_jax.trainable import LORA, join
from metaembed_jax.training.stages import stage_before
from metaembed_jax.training.step import Trainer, TrainState

# What a run's Meta Tokens, and adapters, mean; the shape says it of all else.
TOKEN_KEYS, LORA_KEYS = ("query_tokens", "document_tokens"), ("lora.rank", "lora.alpha")  # of config.model


class Start(NamedTuple):
    """What `config.init_from` names.

    Attributes:
      run: another run, for the parameters that train.
      base: released weights, for the frozen ones, and without `run` for all.
      tokenizer: the file of the vocabulary.
    """

    run: Path | None
    base: BaseWeights | None
    tokenizer: Path


def find_start(config: RunConfig, workdir: Path | None = None) -> tuple[RunConfig, Start]:
    """Find the start of a run, and return it with the config, whose architecture is the start's where it was empty.

    Args:
      workdir: of the run. Once it has checkpoints, it needs no first stage any more: it has all that it took from there. In a
        bucket that is so of any base.

    Raises:
      UserError: it is not there, is no model of ours, or has another architecture than the config.
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
        keys = TOKEN_KEYS + (LORA_KEYS if both_adapted else ())
        check_model(directory, config, tuple(f"model.{key}" for key in keys))
        record = read_base(directory)
        opens = kept_base if directory == workdir and is_kept(workdir) else open_recorded
        return config, Start(directory, opens(directory, record) if record else None, _tokenizer(directory))
    base = open_base(config.init_from)
    backbone, architecture, _ = base_architecture(directory)
    config = _fill_architecture(config, backbone, dataclasses.asdict(architecture), directory)
    return config, Start(None, base, _tokenizer(directory))


def initial_state(config: RunConfig, trainer: Trainer, checkpoints: RunCheckpoints, start: Start) -> TrainState:
    """The latest checkpoint; else the start's parameters, and fresh ones where it has none.

    Raises:
      UserError: checkpoints or start are of another model, or nothing says what frozen parameters are.
    """
    abstract = trainer.abstract
    if abstract.frozen and start.base is None:
        lacking = min(flatten_dict(abstract.frozen, sep="."))
        raise UserError(
            f"config.model.trained leaves {lacking} frozen, and config.init_from={config.init_from!r} is no Hugging Face directory "
            "to read it from; set one (a run becomes one by `export --format=transformers`)"
        )
    restored = checkpoints.restore_latest(abstract.parameters, abstract.optimizer, lambda line: print(line, flush=True))
    if restored is not None:
        step, parameters, optimizer = restored
        checkpoints.set_aside_after(step)
        print(f"resuming at step {step} of {config.schedule.steps}", flush=True)
        frozen = _read(config.model, start.base, abstract.frozen)
        return TrainState(jax.device_put(np.int32(step), abstract.step.sharding), parameters, frozen, optimizer)
    if start.run is not None:
        step, parameters = _read_run(config, start.run, trainer)
        print(f"starting from step {step} of {start.run}", flush=True)
        return trainer.init(join(parameters, _read(config.model, start.base, abstract.frozen)))
    if start.base is not None:
        print(f"starting from {start.base.name}", flush=True)
        wanted = join(abstract.parameters, abstract.frozen)
        return trainer.init(_read(config.model, start.base, wanted) | _read_exported(config.model, start.base, wanted))
    return trainer.init()


def describe(state: TrainState) -> str:
    """How many parameters train and how many are frozen, and what each of them and the optimizer take."""

    def of(tree) -> str:
        leaves = jax.tree.leaves(tree)
        return f"{sum(leaf.size for leaf in leaves):,} ({sum(leaf.nbytes for leaf in leaves) / 1e6:,.1f} MB)"

    trained, frozen, optimizer = of(state.parameters), of(state.frozen), of(state.optimizer)
    return f"parameters: {trained} trained, {frozen} frozen; numbers of the optimizer: {optimizer}"


def _read_run(config: RunConfig, run: Path, trainer: Trainer) -> tuple[int, dict]:
    """(step, parameters) of another run's best checkpoint, of those that train here; without its head if that has another width."""
    wanted, width = trainer.abstract.parameters, read_config(run).model.embedding_dim
    if width == config.model.embedding_dim:
        return best_parameters(run, wanted)
    theirs = abstract_parameters(dataclasses.replace(model_config(config), embedding_dim=width), trainer.mesh, "float32")
    heads = {"head": theirs["head"]} if width else {}
    step, parameters = best_parameters(run, {name: leaf for name, leaf in wanted.items() if name != "head"} | heads)
    return step, {name: leaf for name, leaf in parameters.items() if name != "head"}


def _read(model: ModelSettings, base: BaseWeights | None, wanted: dict) -> dict:
    """What of the wanted parameters a base has: its backbone, without adapters."""
    flat = flatten_dict(wanted, sep=".")
    found = {path: leaf for path, leaf in flat.items() if path.startswith("backbone.") and LORA not in path}
    if not found:
        return {}
    if is_kept_base(base):
        return read_kept(base.directory, wanted)
    backbone = unflatten_dict(found, sep=".")["backbone"]
    return {"backbone": read_backbone(base.directory, family(model.backbone), architecture_of(model), backbone)}


def _read_exported(model: ModelSettings, base: BaseWeights, wanted: dict) -> dict:
    """The Meta Tokens of a base that is one of our exports, and its head unless that has another width."""
    metadata = read_metadata(base.directory)
    if not metadata:
        return {}
    for key in TOKEN_KEYS:
        if metadata[key] != (ours := getattr(model, key)):
            raise UserError(f"{base.name}: has {key}={metadata[key]}, and config.model has {ours}")
    if metadata["embedding_dim"] != model.embedding_dim:
        wanted = {name: leaf for name, leaf in wanted.items() if name != "head"}
    return exported_parameters(base.directory, model.backbone, metadata, wanted)


def _fill_architecture(config: RunConfig, backbone: str, architecture: dict, directory: Path, but_free: bool = False) -> RunConfig:
    """Return a config whose architecture, where it is empty, is that of its start.

    Args:
      directory: of the start, for errors.
      but_free: the two may differ where no parameter depends on it.

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
            f"{directory}: has {key}={other!r}, and config.model.architecture has {mine!r}; leave the architecture empty"
        )
    return config


def _tokenizer(directory: Path) -> Path:
    if not (directory / "tokenizer.json").is_file():
        raise UserError(
            f"{directory}/tokenizer.json is missing: a source that was prepared from files has no vocabulary; "
            "set config.init_from, to a released model or a run"
        )
    return directory / "tokenizer.json"

"""Load a network that encodes: from a run, or from a Hugging Face directory of a vision-language model."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer

from metaembed_jax.backbones.config import FamilyConfig
from metaembed_jax.backbones.config_checks import initializer_range
from metaembed_jax.backbones.family import FamilyImages, family
from metaembed_jax.batch.items import Limits
from metaembed_jax.checkpoints.base_weights import find, open_recorded
from metaembed_jax.checkpoints.frozen import BASE, fits, is_kept, read_kept
from metaembed_jax.checkpoints.huggingface import HEAD, METADATA, read_backbone, read_head, read_vocabulary_rows
from metaembed_jax.checkpoints.runs import RunCheckpoints
from metaembed_jax.checkpoints.workdir import read_base, read_config
from metaembed_jax.config.run import DataConfig, ModelSettings, RunConfig
from metaembed_jax.devices import device_memory
from metaembed_jax.errors import UserError, shortened
from metaembed_jax.files import read_json
from metaembed_jax.inputs.processors import PromptProcessor
from metaembed_jax.inputs.texts import meta_token_names
from metaembed_jax.links import slice_size
from metaembed_jax.mesh import make_mesh, smallest_fsdp
from metaembed_jax.network import SIDES, ModelConfig, abstract_parameters
from metaembed_jax.network_config import architecture_of, model_config, row_limits
from metaembed_jax.sharding import shard_bytes
from metaembed_jax.trainable import join, paths, split, trainable_paths


class Loaded(NamedTuple):
    """A network that encodes.

    Attributes:
      config: configuration of the network.
      parameters: nested dicts of arrays, on the mesh.
      processor: the family's `Processor`, which turns items into tokens and patches.
    """

    config: ModelConfig
    parameters: dict
    processor: PromptProcessor


def load(path: str | Path, dtype: str, mesh: Mesh, seed: int, max_visual_tokens: int) -> Loaded:
    """Load a network.

    Args:
      path: a run (its best checkpoint is read), a Hugging Face directory, or a hub id.
      dtype: type of activations, matmuls and the large parameters, "bfloat16" or "float32".
      seed: seed of fresh Meta Tokens.
      max_visual_tokens: cap on the visual tokens of an image.

    Raises:
      UserError: names the file, key or shape that is wrong.
    """
    directory = find(path)
    if (directory / "run.json").is_file():
        return _load_run(directory, dtype, mesh, max_visual_tokens)
    return _load_huggingface(directory, dtype, mesh, seed, max_visual_tokens)


def default_mesh(path: str | Path, dtype: str) -> Mesh:
    """Return the mesh that encodes with a network by default: data parallel, with the smallest fsdp axis that leaves room.

    Args:
      path, dtype: as for `load`.

    Raises:
      UserError: as `load`.
    """
    mesh, memory = make_mesh(), device_memory()
    if memory is None or mesh.size == 1:
        return mesh
    directory = find(path)
    is_run = (directory / "run.json").is_file()
    config = _run_config(directory, dtype) if is_run else _huggingface_config(directory, dtype)[0]
    weights = shard_bytes(abstract_parameters(config, mesh))
    return make_mesh(fsdp=smallest_fsdp(weights, memory, slice_size(jax.devices())))


def run_processor(run: RunConfig, tokenizer: Path, max_visual_tokens: int | None = None) -> PromptProcessor:
    """Return the family's `Processor`, with prompts and images by the config of a run.

    Args:
      tokenizer: the file of the vocabulary.
      max_visual_tokens: a lower cap on the visual tokens of an image.

    Raises:
      UserError: the vocabulary cannot be read, or is larger than the model's.
    """
    config = model_config(run)
    images = family(config.backbone).Images.from_run(run.data, config.architecture, max_visual_tokens)
    return _processor(tokenizer, images, config, row_limits(run))


def run_parameters(run: Path, model: ModelSettings, abstract: dict, frozen: dict | None = None) -> tuple[int, dict]:
    """Return (step, all parameters) of a run: trained ones from its best checkpoint, frozen ones from its base weights.

    Args:
      model: `config.model` of the run.
      abstract: all parameters as nested dicts of shapes, with dtypes and shardings.
      frozen: as `abstract`, with other dtypes for frozen parameters.

    Raises:
      UserError: the run has no checkpoint, or one of another model; its base weights are missing, or are other weights now.
    """
    trained_paths = trainable_paths(model.trained, paths(abstract))
    trained, frozen = split(abstract, trained_paths)[0], split(frozen or abstract, trained_paths)[1]
    step, parameters = best_parameters(run, trained)
    return step, join(parameters, frozen_parameters(run, model, frozen))


def best_step(path: str | Path) -> int | None:
    """Return the step of a run's best checkpoint; None if the path is another model.

    Raises:
      UserError: the run has no checkpoint.
    """
    directory = find(path)
    if not (directory / "run.json").is_file():
        return None
    with contextlib.closing(RunCheckpoints(directory)) as checkpoints:
        return checkpoints.best_step()


def best_parameters(run: Path, abstract: dict) -> tuple[int, dict]:
    """Return (step, trained parameters) of a run's best checkpoint, with the dtypes and shardings of `abstract`.

    Raises:
      UserError: the run has no checkpoint, or one of another model.
    """
    if not (run / "checkpoints").exists():  # opening the checkpoints would make the folder
        raise UserError(f"{run} has no checkpoints yet; train it first")
    with contextlib.closing(RunCheckpoints(run)) as checkpoints:
        step = checkpoints.best_step()
        return step, checkpoints.restore_parameters(step, abstract)


def frozen_parameters(run: Path, model: ModelSettings, abstract: dict) -> dict:
    """Read the frozen parameters of a run from its base weights; return {} if there are none.

    Raises:
      UserError: the base weights are missing, or are other weights now.
    """
    if not abstract:
        return {}
    record = read_base(run)
    if record is None:
        raise UserError(f"{run} has frozen parameters, and run.json records no base to read them from")
    if is_kept(run) and fits(run / BASE, abstract):
        return read_kept(run / BASE, abstract)
    base = open_recorded(run, record)
    backbone = read_backbone(base.directory, family(model.backbone), architecture_of(model), abstract["backbone"])
    return {"backbone": backbone}


def base_architecture(directory: Path) -> tuple[str, FamilyConfig, dict]:
    """Return (family, architecture, content of the preprocessor's config) of a Hugging Face directory.

    Raises:
      UserError: no such family, or a config that its checkpoints do not have.
    """
    stored = read_json(directory / "config.json")
    backbone = stored.get("model_type", "")
    backbone_family = family(backbone, f"{directory / 'config.json'}: model_type")
    architecture, preprocessor = backbone_family.Config.from_huggingface(stored), _read_preprocessor(directory)
    return backbone, architecture.with_preprocessor(preprocessor, directory), preprocessor


def read_metadata(directory: Path) -> dict:
    """Return the metadata of Meta Tokens and head in the config.json of an export; {} for other Hugging Face directories.

    Raises:
      UserError: the metadata does not fit the tokenizer or the files of the directory.
    """
    metadata, head = read_json(directory / "config.json").get(METADATA, {}), (directory / HEAD).is_file()
    if metadata == {} and not head:
        return {}
    keys = ("query_tokens", "document_tokens", "first_token", "embedding_dim")
    numbers = {key: metadata.get(key) for key in keys} if isinstance(metadata, dict) else metadata
    if not isinstance(numbers, dict) or not all(type(number) is int and number >= 0 for number in numbers.values()):
        raise UserError(
            f"{directory / 'config.json'}: {METADATA}={shortened(numbers)}: expected non-negative integers {', '.join(keys)}"
        )
    if bool(metadata["embedding_dim"]) != head:
        width, state = metadata["embedding_dim"], "is" if head else "is not"
        raise UserError(
            f"{directory}: {METADATA}.embedding_dim of config.json is {width}, and {HEAD} {state} there; export it again"
        )
    tokenizer, counts = _read_tokenizer(directory / "tokenizer.json"), (metadata["query_tokens"], metadata["document_tokens"])
    if sum(counts) > tokenizer.get_vocab_size():
        raise UserError(f"{directory}: {METADATA} of config.json has {counts} Meta Tokens, more than tokenizer.json has tokens")
    for number, name in enumerate(meta_token_names(*counts), metadata["first_token"]):
        if (stored := tokenizer.token_to_id(name)) != number:
            raise UserError(f"{directory}: {METADATA} of config.json has {name} as token {number}, and tokenizer.json as {stored}")
    return metadata


def exported_parameters(directory: Path, backbone: str, metadata: dict, abstract: dict) -> dict:
    """Read the Meta Tokens of an export, and its head if `abstract` has one.

    Args:
      metadata: result of `read_metadata`.
      abstract: parameters as nested dicts of shapes, with dtypes and shardings.
    """
    tokens = abstract["meta_tokens"]
    rows = read_vocabulary_rows(directory, family(backbone), metadata["first_token"], tokens.shape[0])
    parameters: dict[str, Any] = {"meta_tokens": jax.device_put(rows.astype(tokens.dtype), tokens.sharding)}
    if metadata["embedding_dim"] and "head" in abstract:
        parameters["head"] = {"kernel": read_head(directory, abstract["head"]["kernel"])}
    return parameters


def _run_config(directory: Path, dtype: str) -> ModelConfig:
    return dataclasses.replace(model_config(read_config(directory)), dtype=dtype)


def _load_run(directory: Path, dtype: str, mesh: Mesh, max_visual_tokens: int) -> Loaded:
    run, config = read_config(directory), _run_config(directory, dtype)
    processor = run_processor(run, directory / "tokenizer.json", max_visual_tokens)
    return Loaded(config, run_parameters(directory, run.model, abstract_parameters(config, mesh))[1], processor)


def _huggingface_config(directory: Path, dtype: str) -> tuple[ModelConfig, dict, dict]:
    """Return the config of a network, its metadata, and the content of the preprocessor's config."""
    backbone, architecture, preprocessor = base_architecture(directory)
    metadata = read_metadata(directory)
    sizes = {key: metadata[key] for key in ("query_tokens", "document_tokens", "embedding_dim") if metadata}
    return ModelConfig(backbone, architecture, dtype=dtype, **sizes), metadata, preprocessor


def _load_huggingface(directory: Path, dtype: str, mesh: Mesh, seed: int, max_visual_tokens: int) -> Loaded:
    config, metadata, preprocessor = _huggingface_config(directory, dtype)
    backbone, architecture = config.backbone, config.architecture
    images = family(backbone).Images.from_preprocessor(preprocessor, architecture, max_visual_tokens)
    query_tokens, document_tokens = (config.meta_tokens(side, config.vectors(side)) for side in SIDES)
    limits = Limits(*architecture.default_row(images), DataConfig().max_text_tokens, query_tokens, document_tokens)
    processor = _processor(directory / "tokenizer.json", images, config, limits)

    abstract = abstract_parameters(config, mesh)
    parameters = {"backbone": read_backbone(directory, family(backbone), architecture, abstract["backbone"])}
    if metadata:
        return Loaded(config, parameters | exported_parameters(directory, backbone, metadata, abstract), processor)
    tokens, scale = abstract["meta_tokens"], initializer_range(read_json(directory / "config.json"))
    # NumPy's generator gives the same rows on any mesh and with any version of JAX.
    fresh = scale * np.random.default_rng(seed).standard_normal(tokens.shape, np.float32)
    parameters["meta_tokens"] = jax.device_put(fresh.astype(np.float32), tokens.sharding)
    return Loaded(config, parameters, processor)


def _read_preprocessor(directory: Path) -> dict:
    if (directory / "preprocessor_config.json").is_file():
        return read_json(directory / "preprocessor_config.json")
    # transformers 5 saves one file for the tokenizer's and the images' settings.
    if not (directory / "processor_config.json").is_file():
        raise UserError(f"{directory} has no preprocessor_config.json, which says how images are read; download it again")
    content = read_json(directory / "processor_config.json").get("image_processor")
    if not isinstance(content, dict):
        raise UserError(f"{directory / 'processor_config.json'}: image_processor={shortened(content)}: expected a JSON object")
    return content


def _read_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_buffer(path.read_bytes())
    except Exception as error:  # the library raises no narrower class
        raise UserError(f"{path} cannot be read ({error})") from error


def _processor(path: Path, images: FamilyImages, config: ModelConfig, limits: Limits) -> PromptProcessor:
    tokenizer = _read_tokenizer(path)
    highest, rows = max(tokenizer.get_vocab().values(), default=-1), config.architecture.vocabulary
    if highest >= rows:
        raise UserError(
            f"{path} has token {highest}, and the model's vocabulary has {rows} rows; expected the tokenizer of this checkpoint"
        )
    try:
        return family(config.backbone).Processor(tokenizer, images, limits)
    except UserError as error:
        limits_too = " or config.model.query_tokens and document_tokens, which limit all states" if config.reads_states else ""
        raise UserError(f"{path}: {error}{limits_too}") from error

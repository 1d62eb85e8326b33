"""From a path to a network that can encode: runs of `train.py`, and Hugging Face directories of vision-language models."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer

from metaembed_jax.backbones.config_checks import initializer_range
from metaembed_jax.backbones.family import FamilyImages, family
from metaembed_jax.batch.items import Limits
from metaembed_jax.checkpoints.base_weights import find, open_recorded
from metaembed_jax.checkpoints.frozen import BASE, fits, is_kept, read_kept
from metaembed_jax.checkpoints.huggingface import HEAD, METADATA, read_backbone, read_head, read_vocabulary_rows
from metaembed_jax.checkpoints.runs import RunCheckpoints
from metaembed_jax.checkpoints.workdir import read_base, read_config
from metaembed_jax.config.run import DataConfig, ModelSettings, RunConfig
from metaembed_jax.errors import UserError
from metaembed_jax.files import read_json
from metaembed_jax.inputs.texts import meta_token_names
from metaembed_jax.network import SIDES, ModelConfig, abstract_parameters
from metaembed_jax.network_config import architecture_of, model_config, row_limits
from metaembed_jax.trainable import join, paths, split, trainable_paths


def load(path: str | Path, dtype: str, mesh: Mesh, seed: int, max_visual_tokens: int) -> tuple[ModelConfig, dict, object]:
    """The network's config, its parameters on the mesh, and the family's `Processor`, which turns items into its input.

    Args:
      path: a run of `train.py` (its best checkpoint is read), a Hugging Face directory, or the id of one on the hub.
      dtype: of activations, matmuls and the large parameters, "bfloat16" or "float32".
      seed: of fresh Meta Tokens.
      max_visual_tokens: cap on the visual tokens of an image.

    Raises:
      UserError: names the file, key or shape that is wrong.
    """
    directory = find(path)
    if (directory / "run.json").is_file():
        return _load_run(directory, dtype, mesh, max_visual_tokens)
    if (directory / "config.json").is_file():
        return _load_huggingface(directory, dtype, mesh, seed, max_visual_tokens)
    raise UserError(f"{directory}: is neither a run (it has no run.json) nor a Hugging Face model (it has no config.json)")


def run_processor(run: RunConfig, tokenizer: Path, max_visual_tokens: int | None = None):
    """Prompts and images as the config of a run has them: the family's `Processor`.

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
    """(step, all parameters) of a run: what it trained from its best checkpoint, all else from its base.

    Args:
      model: `config.model` of the run.
      abstract: all parameters as nested dicts of shapes, with the dtypes and shardings that they are to have.
      frozen: the same for those that did not train, where they are to have other dtypes.

    Raises:
      UserError: the run has no checkpoint, or none of this model; its base is missing, or another than it was.
    """
    chosen = trainable_paths(model.trained, paths(abstract))
    trained, frozen = split(abstract, chosen)[0], split(frozen or abstract, chosen)[1]
    step, parameters = best_parameters(run, trained)
    return step, join(parameters, frozen_parameters(run, model, frozen))


def best_parameters(run: Path, abstract: dict) -> tuple[int, dict]:
    """(step, trained parameters) of a run's best checkpoint, with the dtypes and shardings of `abstract`.

    Raises:
      UserError: the run has no checkpoint, or none of this model.
    """
    if not (run / "checkpoints").exists():
        raise UserError(f"{run}: has no checkpoints yet; train it first")
    checkpoints = RunCheckpoints(run)
    try:
        step = checkpoints.best_step()
        if step is None:
            raise UserError(f"{run}: has no checkpoints yet; train it first")
        return step, checkpoints.restore_parameters(step, abstract)
    finally:
        checkpoints.close()


def frozen_parameters(run: Path, model: ModelSettings, abstract: dict) -> dict:
    """What a run did not train, read from its base; {} where it trained everything.

    Raises:
      UserError: the base is missing, or another than it was.
    """
    if not abstract:
        return {}
    record = read_base(run)
    if record is None:
        raise UserError(f"{run}: a part of this model was frozen, and run.json records no base to read it from")
    if is_kept(run) and fits(run / BASE, abstract):
        return read_kept(run / BASE, abstract)
    base = open_recorded(run, record)
    backbone = read_backbone(base.directory, family(model.backbone), architecture_of(model), abstract["backbone"])
    return {"backbone": backbone}


def base_architecture(directory: Path) -> tuple[str, object, dict]:
    """(family, the family's `Config`, preprocessor) of a Hugging Face directory.

    Raises:
      UserError: no such family, or a config that it cannot have.
    """
    stored = read_json(directory / "config.json")
    backbone = stored.get("model_type", "")
    architecture, preprocessor = family(backbone).Config.from_huggingface(stored), _read_preprocessor(directory)
    return backbone, architecture.with_preprocessor(preprocessor, directory), preprocessor


def read_metadata(directory: Path) -> dict:
    """What the config.json of one of our exports says of its Meta Tokens and head; {} for any other Hugging Face directory.

    Raises:
      UserError: it does not fit the directory's tokenizer or files, so that it would give wrong vectors.
    """
    metadata, head = read_json(directory / "config.json").get(METADATA, {}), (directory / HEAD).is_file()
    if metadata == {} and not head:
        return {}
    keys = ("query_tokens", "document_tokens", "first_token", "embedding_dim")
    found = {key: metadata.get(key) for key in keys} if isinstance(metadata, dict) else metadata
    if not isinstance(found, dict) or not all(type(number) is int and number >= 0 for number in found.values()):
        raise UserError(f"{directory / 'config.json'}: {METADATA} is {found!r}, which does not say where Meta Tokens and head are")
    if bool(metadata["embedding_dim"]) != head:
        width, there = metadata["embedding_dim"], "is" if head else "is not"
        raise UserError(
            f"{directory}: {METADATA}.embedding_dim of config.json is {width}, and {HEAD} {there} there; export it again"
        )
    tokenizer, counts = _read_tokenizer(directory / "tokenizer.json"), (metadata["query_tokens"], metadata["document_tokens"])
    if sum(counts) > tokenizer.get_vocab_size():
        raise UserError(f"{directory}: {METADATA} of config.json has {counts} Meta Tokens, more than tokenizer.json has tokens")
    for number, name in enumerate(meta_token_names(*counts), metadata["first_token"]):
        if (found := tokenizer.token_to_id(name)) != number:
            raise UserError(f"{directory}: {METADATA} of config.json has {name} as token {number}, and tokenizer.json as {found}")
    return metadata


def exported_parameters(directory: Path, backbone: str, metadata: dict, wanted: dict) -> dict:
    """The Meta Tokens of one of our exports, and its head if it has one and `wanted` has.

    Args:
      metadata: of `read_metadata`.
      wanted: parameters as nested dicts of shapes, with dtypes and shardings.
    """
    tokens = wanted["meta_tokens"]
    rows = read_vocabulary_rows(directory, family(backbone), metadata["first_token"], tokens.shape[0])
    found = {"meta_tokens": jax.device_put(rows.astype(tokens.dtype), tokens.sharding)}
    if metadata["embedding_dim"] and "head" in wanted:
        found["head"] = {"kernel": read_head(directory, wanted["head"]["kernel"])}
    return found


def _load_run(directory: Path, dtype: str, mesh: Mesh, max_visual_tokens: int) -> tuple[ModelConfig, dict, object]:
    run = read_config(directory)
    config = dataclasses.replace(model_config(run), dtype=dtype)
    processor = run_processor(run, directory / "tokenizer.json", max_visual_tokens)
    return config, run_parameters(directory, run.model, abstract_parameters(config, mesh))[1], processor


def _load_huggingface(
    directory: Path, dtype: str, mesh: Mesh, seed: int, max_visual_tokens: int
) -> tuple[ModelConfig, dict, object]:
    backbone, architecture, preprocessor = base_architecture(directory)
    metadata = read_metadata(directory)
    known = {key: metadata[key] for key in ("query_tokens", "document_tokens", "embedding_dim") if metadata}
    config = ModelConfig(backbone, architecture, dtype=dtype, **known)
    images = family(backbone).Images.from_preprocessor(preprocessor, architecture, max_visual_tokens)
    meta = (config.meta_tokens(side, config.vectors(side)) for side in SIDES)
    limits = Limits(*architecture.default_row(images), DataConfig().max_text_tokens, *meta)
    processor = _processor(directory / "tokenizer.json", images, config, limits)

    abstract = abstract_parameters(config, mesh)
    parameters = {"backbone": read_backbone(directory, family(backbone), architecture, abstract["backbone"])}
    if metadata:
        return config, parameters | exported_parameters(directory, backbone, metadata, abstract), processor
    tokens, scale = abstract["meta_tokens"], initializer_range(read_json(directory / "config.json"))
    # NumPy's generator gives the same rows on any mesh and with any version of JAX.
    fresh = scale * np.random.default_rng(seed).standard_normal(tokens.shape, np.float32)
    parameters["meta_tokens"] = jax.device_put(fresh.astype(np.float32), tokens.sharding)
    return config, parameters, processor


def _read_preprocessor(directory: Path) -> dict:
    if (directory / "preprocessor_config.json").is_file():
        return read_json(directory / "preprocessor_config.json")
    # transformers 5 saves one file for all parts of a processor.
    if not (directory / "processor_config.json").is_file():
        raise UserError(f"{directory}: has no preprocessor_config.json, which says how images are read; download it again")
    found = read_json(directory / "processor_config.json").get("image_processor")
    if not isinstance(found, dict):
        raise UserError(f"{directory / 'processor_config.json'}: image_processor is {found!r}, not an object of keys and values")
    return found


def _read_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_buffer(path.read_bytes())
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: cannot be read ({error})") from error


def _processor(path: Path, images: FamilyImages, config: ModelConfig, limits: Limits):
    tokenizer = _read_tokenizer(path)
    highest, rows = max(tokenizer.get_vocab().values(), default=-1), config.architecture.vocabulary
    if highest >= rows:
        raise UserError(
            f"{path}: has token {highest}, and the model's vocabulary has {rows} rows; the two are not of one checkpoint"
        )
    try:
        return family(config.backbone).Processor(tokenizer, images, limits)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error

"""From a path to a network that can encode: runs of `train.py`, and Hugging Face directories of vision-language models."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from huggingface_hub import snapshot_download
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from metaembed_jax.backbones import family
from metaembed_jax.checkpoints.huggingface import read_backbone, read_json
from metaembed_jax.checkpoints.runs import RunCheckpoints
from metaembed_jax.checkpoints.workdir import read_config
from metaembed_jax.config import model_config
from metaembed_jax.data.images import ImageConfig
from metaembed_jax.data.prompts import Processor
from metaembed_jax.errors import UserError
from metaembed_jax.network import ModelConfig, abstract_network
from metaembed_jax.sharding import parameter_shardings


def load(path: str | Path, dtype: str, mesh: Mesh, seed: int, max_visual_tokens: int) -> tuple[ModelConfig, dict, Processor]:
    """The network's config, its parameters on the mesh, and what turns items into its input.

    Args:
      path: a run of `train.py` (its best checkpoint is read), a Hugging Face directory, or the id of one on the hub.
      dtype: of activations, matmuls and the large parameters, "bfloat16" or "float32".
      seed: of fresh Meta Tokens.
      max_visual_tokens: cap on the visual tokens of an image.

    Raises:
      UserError: names the file, key or shape that is wrong.
    """
    directory = Path(path).expanduser()
    if not directory.exists():
        directory = _download(str(path))
    if (directory / "run.json").is_file():
        return _load_run(directory, dtype, mesh, max_visual_tokens)
    if (directory / "config.json").is_file():
        return _load_huggingface(directory, dtype, mesh, seed, max_visual_tokens)
    raise UserError(f"{directory}: is neither a run (it has no run.json) nor a Hugging Face model (it has no config.json)")


def abstract_parameters(config: ModelConfig, mesh: Mesh) -> dict:
    """The parameters as nested dicts of shapes, with their shardings and the dtypes that inference needs.

    Kernels and the vocabulary have the config's dtype, in which they are used anyway; all else stays float32.
    """
    _, state = abstract_network(config)

    def of(path, leaf, sharding):
        large = path[-1].key in ("kernel", "embedding")
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(config.dtype if large else "float32"), sharding=sharding)

    return jax.tree_util.tree_map_with_path(of, nnx.to_pure_dict(state), parameter_shardings(mesh, state))


def run_processor(run: ConfigDict, tokenizer: Path, max_visual_tokens: int | None = None) -> Processor:
    """Prompts and images as the config of a run has them.

    Args:
      tokenizer: the file of the vocabulary.
      max_visual_tokens: a lower cap on the visual tokens of an image.

    Raises:
      UserError: the vocabulary cannot be read, or is larger than the model's.
    """
    config = model_config(run)
    vision, largest = config.architecture.vision_config, run.data.max_pixels
    if max_visual_tokens is not None:
        largest = min(largest, max_visual_tokens * (vision.patch_size * vision.spatial_merge_size) ** 2)
    images = ImageConfig(run.data.min_pixels, largest, vision.patch_size, vision.spatial_merge_size, vision.window_size)
    return _processor(tokenizer, images, config)


def best_parameters(run: Path, abstract: dict) -> tuple[int, dict]:
    """(step, parameters) of a run's best checkpoint, with the dtypes and shardings of `abstract`.

    Raises:
      UserError: the run has no checkpoint, or none of this model.
    """
    if not (run / "checkpoints").is_dir():
        raise UserError(f"{run}: has no checkpoints yet; train it first")
    checkpoints = RunCheckpoints(run)
    try:
        step = checkpoints.best_step()
        if step is None:
            raise UserError(f"{run}: has no checkpoints yet; train it first")
        return step, checkpoints.restore_parameters(step, abstract)
    finally:
        checkpoints.close()


def _download(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"], ignore_patterns=["*/*"]))
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name}: there is no such directory, and the hub gives no model of this id ({reason})") from error


def _load_run(directory: Path, dtype: str, mesh: Mesh, max_visual_tokens: int) -> tuple[ModelConfig, dict, Processor]:
    run = read_config(directory)
    config = dataclasses.replace(model_config(run), dtype=dtype)
    processor = run_processor(run, directory / "tokenizer.json", max_visual_tokens)
    return config, best_parameters(directory, abstract_parameters(config, mesh))[1], processor


def _load_huggingface(
    directory: Path, dtype: str, mesh: Mesh, seed: int, max_visual_tokens: int
) -> tuple[ModelConfig, dict, Processor]:
    stored = read_json(directory / "config.json")
    backbone = stored.get("model_type", "")
    module = family(backbone)
    architecture = module.Config.from_huggingface(stored)
    preprocessor = _read_preprocessor(directory)
    vision = dataclasses.replace(architecture.vision_config, **_normalisation(directory, preprocessor))
    config = ModelConfig(backbone, dataclasses.replace(architecture, vision_config=vision), dtype=dtype)
    images = ImageConfig.from_preprocessor(preprocessor, max_visual_tokens, vision.window_size)
    if (images.patch_size, images.merge_size) != (vision.patch_size, vision.spatial_merge_size):
        ours, theirs = (images.patch_size, images.merge_size), (vision.patch_size, vision.spatial_merge_size)
        raise UserError(f"{directory}: patch and merge sizes are {ours} in preprocessor_config.json and {theirs} in config.json")
    processor = _processor(directory / "tokenizer.json", images, config)

    abstract = abstract_parameters(config, mesh)
    tokens = abstract["meta_tokens"]
    scale = (stored.get("text_config") or {}).get("initializer_range", stored.get("initializer_range", 0.02))
    # NumPy's generator gives the same rows on any mesh and with any version of JAX.
    fresh = scale * np.random.default_rng(seed).standard_normal(tokens.shape, np.float32)
    parameters = {
        "backbone": read_backbone(directory, module, abstract["backbone"]),
        "meta_tokens": jax.device_put(fresh.astype(np.float32), tokens.sharding),
    }
    return config, parameters, processor


def _read_preprocessor(directory: Path) -> dict:
    if (directory / "preprocessor_config.json").is_file():
        return read_json(directory / "preprocessor_config.json")
    # transformers 5 saves one file for all parts of a processor.
    return read_json(directory / "processor_config.json").get("image_processor", {})


def _normalisation(directory: Path, preprocessor: dict) -> dict[str, tuple[float, ...]]:
    """`image_mean` and `image_std`, as far as the preprocessor sets them."""
    chosen = {key: preprocessor[key] for key in ("image_mean", "image_std") if preprocessor.get(key) is not None}
    for key, values in chosen.items():
        numbers = isinstance(values, list) and all(isinstance(value, int | float) for value in values)
        if not numbers or len(values) != 3 or (key == "image_std" and min(values) <= 0):
            raise UserError(f"{directory}: the preprocessor's {key} is {values!r}, not three numbers (above zero for image_std)")
    if not math.isclose(factor := preprocessor.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
        raise UserError(f"{directory}: the preprocessor's rescale_factor is {factor!r}; Qwen2.5-VL has 1/255")
    return {key: tuple(map(float, values)) for key, values in chosen.items()}


def _processor(path: Path, images: ImageConfig, config: ModelConfig) -> Processor:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: cannot be read ({error})") from error
    highest, rows = max(tokenizer.get_vocab().values(), default=-1), config.architecture.text_config.vocab_size
    if highest >= rows:
        raise UserError(
            f"{path}: has token {highest}, and the model's vocabulary has {rows} rows; the two are not of one checkpoint"
        )
    return Processor(tokenizer, images)

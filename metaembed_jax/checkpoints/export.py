"""Export a trained model in the formats of PyTorch libraries.

    transformers            transformers computes the same vectors from a prompt and the strings of Meta Tokens: `torch_export`
    sentence-transformers   the same files, with modules.json and one small module, for MultiVectorEncoder
    peft                    the adapter, for PeftModel.from_pretrained on the base weights, and Meta Tokens and head: `peft_export`

An export is written to a temporary folder and moved, so that an incomplete one is never visible.
"""

import dataclasses
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from metaembed_jax import files
from metaembed_jax.backbones.family import FamilyImages, family
from metaembed_jax.checkpoints import peft_export, torch_export
from metaembed_jax.checkpoints.base_weights import find
from metaembed_jax.checkpoints.card import model_card
from metaembed_jax.checkpoints.loading import load, read_metadata, run_parameters, run_processor
from metaembed_jax.checkpoints.workdir import read_base, read_config
from metaembed_jax.config.files import names_config
from metaembed_jax.config.run import EXPORTS, RunConfig
from metaembed_jax.errors import UserError
from metaembed_jax.mesh import make_mesh
from metaembed_jax.network import ModelConfig, abstract_parameters
from metaembed_jax.network_config import model_config
from metaembed_jax.results import Results, read_results
from metaembed_jax.trainable import LORA, paths, trainable_paths


class Trained(NamedTuple):
    """A model to export.

    Attributes:
      config: configuration of the network; its dtype is that of the tensors to write.
      parameters: parameters of the network, on all devices.
      tokenizer: the file of the vocabulary.
      images: how images become patches: the family's `Images`.
      paths: paths of trained parameters; empty for a Hugging Face directory.
      metadata: groups, temperature, base weights and more, for the exported config.json.
      results: results of the test split; None if there are none.
    """

    config: ModelConfig
    parameters: dict
    tokenizer: Path
    images: FamilyImages
    paths: frozenset[str]
    metadata: dict
    results: Results | None


def export(checkpoint: str | Path, out: Path, kind: str, dtype: str | None = None, replace: bool = False) -> None:
    """Write a run (its best checkpoint), or a Hugging Face directory, in another library's format.

    Args:
      kind: a key of `FORMATS`.
      dtype: type of the stored tensors, "float32" or "bfloat16"; None: the dtype of training.
      replace: replace an export in `out` once the new one is written.

    Raises:
      UserError: `out` is not empty or cannot be written, or the format does not support the model.
    """
    if kind not in FORMATS:
        raise UserError(f"--format={kind}: expected {', '.join(FORMATS)}")
    files.check_bucket(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another --out")
    if out.exists() and not replace and any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose another --out")
    trained, out = read_trained(find(checkpoint), dtype), out if files.is_bucket(out) else out.resolve()
    if trained.config.reads_states:
        raise UserError(f"--format={kind}: {checkpoint} reads all states; only models with Meta Tokens have formats")
    check_format(kind, trained.config.backbone, trained.paths)
    try:
        with files.new_folder(out) as folder:
            FORMATS[kind](folder, trained)
            card = model_card(kind, trained.config, trained.metadata, trained.results)
            (folder / "README.md").write_text(card, encoding="utf-8")
    except SafetensorError as error:
        raise UserError(f"{out} cannot be written ({error})") from error


def check_format(kind: str, backbone: str, trained: Collection[str]) -> None:
    """Refuse a format that does not support a model.

    Args:
      kind: a key of `FORMATS`.
      trained: paths of trained parameters.

    Raises:
      UserError: names the format, and the parameters that it does not support.
    """
    if kind == "sentence-transformers":
        _module_file(backbone)
    if kind != "peft":
        return
    weight_map = family(backbone).weight_map
    adapted = sorted(path for path in trained if path.endswith(LORA + "a"))
    if not adapted:
        raise UserError(
            "--format=peft: this model has no adapters (its config.model.trained has nothing as lora); use transformers"
        )
    for path in adapted:
        key = peft_export.adapted_source(weight_map, path.removeprefix("backbone.")).key
        if sum(source.key == key for source in weight_map.values()) > 1:
            raise UserError(f"--format=peft: {path} adapts only some rows of {key}, which PEFT cannot; use --format=transformers")
    for path in sorted(trained):
        if path.startswith("backbone.") and LORA not in path:
            raise UserError(f"--format=peft: {path} trains in full, and PEFT stores only adapters; use --format=transformers")


def _module_file(backbone: str) -> Path:
    """Return the family's module for sentence-transformers."""
    if (file := family(backbone).sentence_transformers) is None:
        title = family(backbone).title
        raise UserError(f"--format=sentence-transformers: there is no module for {title} models; use --format=transformers")
    return file


def read_trained(directory: Path, dtype: str | None) -> Trained:
    """Read a run or a Hugging Face directory; kernels that were frozen as int8 are read from the base weights."""
    mesh = make_mesh(data=1, fsdp=-1, slices=1)  # weights are read once, so any links between devices are fast enough
    if not (directory / "run.json").exists():
        stored = files.read_json(directory / "config.json")
        stored_dtype = stored.get("dtype") or stored.get("torch_dtype")  # the key since transformers 5, and before
        dtype = dtype or (stored_dtype if stored_dtype in ("float32", "bfloat16") else "float32")
        config, parameters, processor = load(directory, dtype, mesh, 0, 1024)
        metadata = read_metadata(directory)
        return Trained(config, parameters, directory / "tokenizer.json", processor.images, frozenset(), metadata, None)
    run = read_config(directory)
    config = dataclasses.replace(model_config(run), dtype=dtype or run.model.dtype, int8=False)
    abstract = abstract_parameters(config, mesh)
    _, parameters = run_parameters(directory, run.model, abstract)
    images = run_processor(run, directory / "tokenizer.json").images
    metadata = {"groups": [list(budget.sizes) for budget in run.objectives.budgets], "name": run.name, "steps": run.schedule.steps}
    if matryoshka := run.objectives.matryoshka:
        metadata["temperature"] = matryoshka.temperature
    metadata |= {"sources": [list(entry) for entry in run.data.sources]} | _origin(directory, run)
    file, trained = directory / "results.json", trainable_paths(run.model.trained, paths(abstract))
    results = read_results(file) if file.is_file() else None
    return Trained(config, parameters, directory / "tokenizer.json", images, trained, metadata, results)


def _origin(directory: Path, run: RunConfig) -> dict[str, str]:
    """Return {"base": released weights that a run started from}, {"start": another run, or its config}, or {}."""
    if base := read_base(directory):
        return {"base": base.name}
    if not run.init_from:
        return {}
    is_run = names_config(run.init_from) or (files.any_path(run.init_from) / "run.json").is_file()
    return {"start" if is_run else "base": run.init_from}


def _transformers(out: Path, trained: Trained) -> None:
    config = trained.config
    torch_export.write_model(out, config, trained.parameters, trained.tokenizer, trained.images, trained.metadata, config.dtype)


def _sentence_transformers(out: Path, trained: Trained) -> None:
    _transformers(out, trained)
    shutil.copyfile(_module_file(trained.config.backbone), out / "metaembed.py")
    modules = [{"idx": 0, "name": "0", "path": "", "type": "metaembed.MetaEmbed"}]
    settings = {"model_type": "MultiVectorEncoder", "similarity_fn_name": "maxsim", "prompts": {}}
    files.write_json(out / "modules.json", modules)
    files.write_json(out / "config_sentence_transformers.json", settings)


def _peft(out: Path, trained: Trained) -> None:
    peft_export.write_adapter(out, trained.config, trained.parameters, trained.metadata)


FORMATS = dict(zip(EXPORTS, (_transformers, _sentence_transformers, _peft), strict=True))

"""The path of `configs/7b.py` in a minute: a released model (here of random weights, made once), adapters, evaluation, exports."""

import os
import tempfile
from pathlib import Path

from metaembed_jax.backbones.family import family
from metaembed_jax.config import (
    EXPORTS,
    DataConfig,
    EvaluationConfig,
    LoraSettings,
    MatryoshkaConfig,
    ModelSettings,
    ObjectivesConfig,
    OptimizerConfig,
    RowsConfig,
    RunConfig,
    ScheduleConfig,
    load_config,
    with_keys,
)
from metaembed_jax.data import tokenizer
from metaembed_jax.errors import UserError
from metaembed_jax.files import local_path
from metaembed_jax.network_config import model_config

BASE = "runs/smoke_base"


def get_config(arg=None):
    """The argument is where the random model is, or is made; runs/smoke_base by default."""
    make_base(local_path(arg or BASE))
    lora = load_config("7b").model.trained
    return RunConfig(
        name="smoke",
        init_from=arg or BASE,
        model=ModelSettings(embedding_dim=16, dtype="float32", trained=lora, lora=LoraSettings(rank=8)),
        rows=RowsConfig(size=(160, 36), batch_size=16),
        data=DataConfig(min_pixels=84 * 84, max_pixels=84 * 84),
        # As in configs/tiny.py, for weights that know nothing.
        objectives=ObjectivesConfig(matryoshka=MatryoshkaConfig(temperature=0.15)),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=4),
        schedule=ScheduleConfig(steps=40, save_every=20, exports=EXPORTS),
        evaluation=EvaluationConfig(validate_every=20),
    )


def make_base(directory):
    """Make a Qwen2.5-VL directory of random weights, unless it is there."""
    from metaembed_jax.checkpoints.torch_export import write_model
    from metaembed_jax.network import init_parameters

    if (directory / "config.json").is_file():
        return
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: is neither a Hugging Face model nor an empty place to make one")
    text = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "mrope_section": (2, 3, 3)}
    vision = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32}
    sizes = {f"model.architecture.text_config.{key}": value for key, value in text.items()}
    sizes |= {f"model.architecture.vision_config.{key}": value for key, value in vision.items()}
    config = with_keys(load_config("tiny"), sizes | {"data.min_pixels": 28 * 28})
    network = model_config(config)
    parameters = {"backbone": init_parameters(network, seed=0)["backbone"]}
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        words, made = Path(scratch) / "words.json", Path(scratch) / "model"
        tokenizer.train(["cloud snow", "airplane lock"], words, family(network.backbone), vocabulary=500)
        images = family(network.backbone).Images.from_run(config.data, network.architecture, None)
        made.mkdir()
        write_model(made, network, parameters, words, images, {}, "float32")
        try:
            os.replace(made, directory)
        except OSError:  # another host was here first
            if not (directory / "config.json").is_file():
                raise

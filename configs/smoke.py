"""The path of `configs/7b.py` in a minute: a released model (here of random weights, made once), adapters, evaluation, exports."""

import os
import tempfile
from pathlib import Path

from metaembed_jax.backbones.family import family
from metaembed_jax.config import default_config, load_config, model_config
from metaembed_jax.data import tokenizer
from metaembed_jax.errors import UserError
from metaembed_jax.files import local_path

BASE = "runs/smoke_base"


def get_config(arg=None):
    """The argument is where the random model is, or is made; runs/smoke_base by default."""
    config = default_config()
    config.name = "smoke"
    config.init_from = arg or BASE
    config.dtype = "float32"
    config.trained = load_config("7b", {}).trained
    config.lora.rank = 8
    config.embedding_dim = 16
    config.temperature = 0.15  # as configs/tiny.py, for weights that know nothing

    config.data.min_pixels = config.data.max_pixels = 84 * 84
    config.row, config.batch_size = (160, 36), 16
    config.steps, config.optimizer.warmup_steps, config.optimizer.learning_rate = 40, 4, 1e-3
    config.validate_every = config.save_every = 20
    config.exports = ("transformers", "sentence-transformers", "peft")
    make_base(local_path(config.init_from))
    return config


def make_base(directory):
    """A Qwen2.5-VL directory of random weights, unless it is there."""
    from metaembed_jax.checkpoints.torch_export import write_model
    from metaembed_jax.network import init_parameters

    if (directory / "config.json").is_file():
        return
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: is neither a Hugging Face model nor an empty place to make one")
    config = load_config("tiny", {})
    text, vision = config.architecture.text_config, config.architecture.vision_config
    text.vocab_size, text.hidden_size, text.intermediate_size, text.mrope_section = 512, 32, 64, (2, 3, 3)
    vision.hidden_size = vision.out_hidden_size = 32
    vision.intermediate_size = 64
    config.data.min_pixels = 28 * 28
    network = model_config(config)
    parameters = {"backbone": init_parameters(network, seed=0)["backbone"]}
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        words, made = Path(scratch) / "words.json", Path(scratch) / "model"
        tokenizer.train(["cloud snow", "airplane lock"], words, family(config.backbone), vocabulary=500)
        images = family(config.backbone).Images.from_run(config.data, network.architecture, None)
        made.mkdir()
        write_model(made, network, parameters, words, images, {}, "float32")
        try:
            os.replace(made, directory)
        except OSError:  # another host was here first
            if not (directory / "config.json").is_file():
                raise

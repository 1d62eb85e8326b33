"""Safetensors files and config.json, against safetensors and transformers."""

import dataclasses
import functools
import json
import random
import re
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
from fuzz_kinds import EXTREMES, damage

from metaembed_jax.backbones.config_checks import initializer_range
from metaembed_jax.backbones.family import FAMILIES, family
from metaembed_jax.checkpoints.huggingface import list_tensors
from metaembed_jax.checkpoints.loading import base_architecture
from metaembed_jax.config.files import load_config
from metaembed_jax.files import read_json

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
OTHER_DTYPES = ("I8", "F8_E4M3", "BOOL", "U64", "F4", "", "f32", None, 3)
CONFIGS = {"qwen2_5_vl": "3b", "qwen3_vl": "qwen3_vl_2b", "paligemma": "paligemma_3b", "mllama": "llama_vision_11b"}
CONFIGS |= {"idefics3": "smolvlm_256m"}
VALUES: tuple = (None, 0, 1, -1, 7, 3.5, 1e308, float("nan"), float("inf"), 2**31, 10**30)
VALUES += (True, False, "", "x", [], [1], {}, {"a": []})


def make_tensors(random: random.Random, folder: Path) -> bytes:
    """Write a safetensors file, most often damaged."""
    header, body = {}, b""
    for number in range(random.randint(1, 4)):
        dtype, shape = random.choice(list(DTYPES)), [random.randint(1, 5) for _ in range(random.randint(0, 3))]
        data = random.randbytes(int(np.prod(shape)) * np.dtype(DTYPES[dtype]).itemsize)
        header[f"layer.{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    if random.random() < 0.3:
        header["__metadata__"] = random.choice(({"format": "pt"}, {"format": 3}, [], "x"))
    if random.random() < 0.6:
        _change_tensor(random, header[random.choice([key for key in header if key != "__metadata__"])])
    text = json.dumps(header).encode()
    length = len(text) if random.random() < 0.9 else random.choice((*EXTREMES, 2**63 - 1, 2**64 - 1, 10**8 + 1))
    data = length.to_bytes(8, "little") + text + body
    data = damage(random, data, b"{}") if random.random() < 0.4 else data
    (folder / "model.safetensors").write_bytes(data)
    return data


def _change_tensor(random: random.Random, tensor: dict) -> None:
    """Change a field of a tensor's header."""
    field = random.choice(list(tensor))
    if field == "dtype":
        tensor["dtype"] = random.choice((*DTYPES, *OTHER_DTYPES))
    elif random.random() < 0.3:
        tensor[field] = random.choice(VALUES)
    else:
        numbers = tensor[field] or [1]
        numbers[random.randrange(len(numbers))] = random.choice((-1, *EXTREMES, 2**40, 2**64 - 1, 2**64, 1.5, "1", None))


def check_tensors(folder: Path, data: bytes) -> str | None:
    """Compare the tensors with those of the header, which safetensors also accepts."""
    from safetensors.numpy import load

    tensors = {tensor.key: tensor for tensor in list_tensors(folder / "model.safetensors")}
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    header.pop("__metadata__", None)
    assert tensors.keys() == header.keys(), f"{sorted(tensors)}; the header has {sorted(header)}"
    theirs = load(data) if all(fields["dtype"] != "BF16" for fields in header.values()) else {}  # NumPy has no BF16
    for key, fields in header.items():
        start, end = fields["data_offsets"]
        expected = np.frombuffer(body[start:end], DTYPES[fields["dtype"]]).reshape(fields["shape"])
        array = tensors[key].read()
        assert array.dtype == expected.dtype and array.shape == expected.shape == tensors[key].shape, f"{key}: {array.shape}"
        assert array.tobytes() == expected.tobytes() == theirs.get(key, expected).tobytes(), f"{key}: other numbers"
    return None


@functools.cache
def _config(model_type: str) -> dict:
    """Return a config.json of a family."""
    cls, architecture = family(model_type).Config, load_config(CONFIGS[model_type]).model.architecture
    config = cls.from_huggingface({"model_type": model_type, **architecture}) if isinstance(architecture, dict) else architecture
    ids = {token: number for number, token in enumerate(family(model_type).special_tokens)}
    return json.loads(json.dumps(config.to_huggingface(config.vocabulary, ids)))


def make_config(random: random.Random, folder: Path) -> None:
    """Write the config.json and preprocessor_config.json of a family, most often changed."""
    model_type = random.choice(list(FAMILIES))
    config = json.loads(json.dumps(_config(model_type)))
    for _ in range(random.choice((0, 1, 1, 2, 4))):
        _change_config(random, config)
    text = json.dumps(config).encode()
    if random.random() < 0.1:
        text = random.choice((damage(random, text), b"[" * 10**5, text.decode().encode("utf-16"), b"", b"[]", b'"x"'))
    (folder / "config.json").write_bytes(text)
    preprocessor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    for _ in range(random.choice((0, 0, 1))):
        preprocessor[random.choice(("image_mean", "image_std", "rescale_factor", "size", "patch_size"))] = random.choice(VALUES)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))


def _change_config(random: random.Random, config: dict) -> None:
    """Change, remove or add a value anywhere in a config."""
    while True:
        key = random.choice(list(config))
        if not isinstance(config[key], dict) or not config[key] or random.random() < 0.05:
            break
        config = config[key]
    way = random.random()
    if way < 0.25:
        del config[key]
    elif way < 0.3:
        config[random.choice(("rope_scaling", "new", "text_config", "num_channels", "tie_word_embeddings"))] = random.choice(VALUES)
    elif way < 0.6 and type(config[key]) in (int, float):
        config[key] = random.choice(
            (config[key] + 1, config[key] * 2, config[key] // 2, -config[key], float(config[key]), str(config[key]))
        )
    else:
        config[key] = random.choice(VALUES)


def check_config(folder: Path, _: None) -> str | None:
    """Compare the fields of the architecture with those that transformers reads."""
    model_type, architecture, preprocessor = base_architecture(folder)
    initializer_range(read_json(folder / "config.json"))
    images = family(model_type).Images.from_preprocessor(preprocessor, architecture, 1024)
    assert min(architecture.default_row(images)) > 0 and architecture.layout, "no row"
    theirs = _transformers(json.loads((folder / "config.json").read_bytes()))
    if isinstance(theirs, Exception):  # it also checks fields that are not read here, such as ids of tokens
        read = {field.name for part in (architecture.text_config, architecture.vision_config) for field in dataclasses.fields(part)}
        refused = read & set(re.findall(r"field '(\w+)'", str(theirs)))
        if re.search(
            r"NoneType \(value: None\)|expected float, got int", str(theirs)
        ):  # here, null is the same as absent, and 1 as 1.0
            refused = set()
        assert not refused, f"accepted, but transformers refuses {refused}: {' '.join(str(theirs).split())[:150]}"
        return None
    for section in ("text_config", "vision_config"):
        ours, expected = getattr(architecture, section), getattr(theirs, section)
        for field in dataclasses.fields(ours):
            value, known = getattr(ours, field.name), _read(expected, field.name)
            value = list(value) if isinstance(value, tuple) else value
            known = list(known) if isinstance(known, tuple) else known
            assert known in (MISSING, value), f"{section}.{field.name} is {value!r}; transformers reads {known!r}"
    return None


MISSING = object()


def _read(config: object, name: str) -> object:
    """Return a field of a config of transformers."""
    if name == "rope_theta":
        rope = getattr(config, "rope_parameters", None) or {}
        return rope.get("rope_theta", MISSING)
    return MISSING if name in ("image_mean", "image_std") else getattr(config, name, MISSING)


def _transformers(config: dict) -> object:
    """Return the config that transformers reads, or its error."""
    from transformers import CONFIG_MAPPING
    from transformers.utils import logging

    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return CONFIG_MAPPING[config["model_type"]].from_dict(config)
        except Exception as error:  # of any class
            return error

"""Stored vectors of transformers for random checkpoints: torch does not exist for every Python that the package supports.

With METAEMBED_REFERENCES=FOLDER, checkpoints and vectors are written there by a run that has torch, and read from there by one that
has not.
"""

import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock

HAS_TORCH = importlib.util.find_spec("torch") is not None and importlib.util.find_spec("transformers") is not None


def kept(
    name: str,
    scratch: Path,
    configuration: dict,
    write: Callable[[Path, dict], None],
    transformers: Callable[[Path], object],
    items: dict[str, Sequence],
    scale: float = 1.0,
) -> SimpleNamespace:
    """The directory of a checkpoint, Meta Tokens, and the vectors of some items with them.

    Args:
      name: of the folder, under `scratch` where no other is set.
      write: makes the checkpoint.
      transformers: the model in a directory, with `vectors(items, side, meta_tokens)`.
      items: of each side.
      scale: of the Meta Tokens.
    """
    directory = Path(os.environ.get("METAEMBED_REFERENCES", scratch)) / name
    record = directory / "vectors.npz"  # written last
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):  # two files of tests ask for the same
        if not record.is_file():
            if not HAS_TORCH:
                pytest.skip("needs torch and transformers, or METAEMBED_REFERENCES with what a run with them wrote")
            write(directory, configuration)
            model = transformers(directory)
            width = configuration["text_config"]["hidden_size"]
            meta_tokens = scale * np.random.default_rng(7).normal(size=(80, width)).astype(np.float32)
            vectors = {side: model.vectors(some, side, meta_tokens) for side, some in items.items()}
            np.savez(directory / "vectors.tmp.npz", meta_tokens=meta_tokens, **vectors)
            os.replace(directory / "vectors.tmp.npz", record)
    return SimpleNamespace(directory=directory, config=json.loads((directory / "config.json").read_text()), **np.load(record))

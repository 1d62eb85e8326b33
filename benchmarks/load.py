"""Load a random Qwen2.5-VL of full size onto 8 devices, and compare its vectors with those of transformers in bfloat16.

    python benchmarks/load.py [--size=3b] [--dir=runs/random_3b]

The directory (7.5 GB for 3b: bfloat16, several files) is written once. Three processes follow: ours loads it onto 8 devices; ours
loads it onto one device, and encodes a text and a page; transformers does the same. Each prints its time, and its peak memory after
loading. This needs the development requirements, and memory of about twice the directory's size.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from PIL import Image
from safetensors.numpy import save_file

SHARD_BYTES = 2 * 10**9
TEXT = "which page shows the yearly rainfall of the northern provinces?"
PAGE = (1036, 756)  # height and width, 27 x 37 = 999 visual tokens


def main() -> None:
    """Write the directory if it does not exist, run all sides, and print the cosines of their vectors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("3b", "7b", "32b"), default="3b", help="whose shapes (default: 3b)")
    parser.add_argument("--dir", type=Path, help="folder of the random model (default: runs/random_<size>)")
    parser.add_argument("--side", choices=tuple(SIDES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    directory = arguments.dir or Path("runs") / f"random_{arguments.size}"
    if arguments.side:
        SIDES[arguments.side](directory)
        return
    write(directory, arguments.size)
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    print(f"{directory}: {size / 1e9:.2f} GB")
    for side in SIDES:
        # A CPU multiplies bfloat16 as float32; these passes would convert all layers ahead of the loop over them.
        flags = "--xla_disable_hlo_passes=while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion"
        flags += f" --xla_force_host_platform_device_count={8 if side == 'eight devices' else 1}"
        command = [sys.executable, __file__, f"--size={arguments.size}", f"--dir={directory}", f"--side={side}"]
        subprocess.run(command, check=True, env=os.environ | {"XLA_FLAGS": flags})
        figures = json.loads((directory / f"{side}.json").read_text())
        memory = f"peak memory {figures['peak'] / 1e9:.2f} GB, {figures['peak'] / size:.2f} x the files"
        encodes = f"; encodes in {figures['encode']:.1f} s" if "encode" in figures else ""
        print(f"{side:16}loads in {figures['load']:6.1f} s, {memory}{encodes}", flush=True)
    vectors, expected = (np.load(directory / f"{side}.npz") for side in ("metaembed_jax", "transformers"))
    for item in ("text", "page"):
        cosines = (vectors[item] * expected[item]).sum(-1)
        print(f"{item:16}cosine of {len(cosines)} vectors with transformers': least {cosines.min():.6f}, mean {cosines.mean():.6f}")


def write(directory: Path, size: str) -> None:
    """Write random weights with the names and shapes of the released models, scaled to keep states near one."""
    from flax import nnx
    from flax.traverse_util import flatten_dict
    from tqdm import tqdm

    from metaembed_jax.backbones.qwen2_5_vl import FAMILY as QWEN2_5_VL
    from metaembed_jax.config import load_config
    from metaembed_jax.data import tokenizer
    from metaembed_jax.network_config import model_config

    if (directory / "config.json").is_file():
        return
    directory.mkdir(parents=True, exist_ok=True)
    config = model_config(load_config(f"configs/{size}.py"))
    backbone = nnx.eval_shape(lambda: QWEN2_5_VL.Backbone(config.architecture, rngs=nnx.Rngs(0)))
    tensors = {}
    for path, leaf in flatten_dict(nnx.to_pure_dict(nnx.state(backbone)), sep=".").items():
        source = QWEN2_5_VL.weight_map[path]
        layers = range(leaf.shape[0]) if "{}" in source.key else (None,)
        shape = source.shape(leaf.shape if layers == (None,) else leaf.shape[1:])
        tensors |= {QWEN2_5_VL.stored_key(source.key.format(layer)): shape for layer in layers}
    random, shard, number, index = np.random.default_rng(0), {}, 1, {}

    def flush():
        name = f"model-{number:05}.safetensors"
        save_file(shard, directory / name, {"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    for key, shape in tqdm(sorted(tensors.items()), desc=f"writing {directory}", unit="tensor"):
        values = random.standard_normal(shape, np.float32)
        values *= 0.1 if len(shape) == 1 else 1.0 if "embed_tokens" in key else np.prod(shape[1:]) ** -0.5
        values += 1.0 if "norm" in key or "ln_q" in key else 0.0
        shard[key] = values.astype(ml_dtypes.bfloat16)
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            flush()
            number += 1
    flush()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    words = tokenizer.train([TEXT], directory / "tokenizer.json", QWEN2_5_VL, vocabulary=400)
    sizes = {"size": {"shortest_edge": 4 * 784, "longest_edge": 1024 * 784}}
    (directory / "preprocessor_config.json").write_text(json.dumps(sizes))
    ids = {token: words.token_to_id(token) for token in QWEN2_5_VL.special_tokens}
    written = config.architecture.to_huggingface(config.architecture.vocabulary, ids) | {"dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(written))


def page() -> Image.Image:
    """Return an image of noise: its patches all differ."""
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (*PAGE, 3), dtype=np.uint8))


def peak_memory() -> int:
    """Return the peak memory of this process in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB


def record(directory: Path, side: str, vectors: dict[str, np.ndarray], **figures: float) -> None:
    """Write figures and vectors for the first process to read."""
    np.savez(directory / f"{side}.npz", **vectors)
    (directory / f"{side}.json").write_text(json.dumps(figures))


def eight(directory: Path) -> None:
    """Load with our code, the parameters sharded over 8 devices."""
    from metaembed_jax import MetaEmbed
    from metaembed_jax.mesh import make_mesh

    start = time.perf_counter()
    MetaEmbed.from_pretrained(directory, dtype="bfloat16", mesh=make_mesh(data=1, fsdp=8))
    record(directory, "eight devices", {}, load=time.perf_counter() - start, peak=peak_memory())


def ours(directory: Path) -> None:
    """Load and encode with our code, on one device."""
    from metaembed_jax import MetaEmbed
    from metaembed_jax.mesh import make_mesh

    start = time.perf_counter()
    model = MetaEmbed.from_pretrained(directory, dtype="bfloat16", mesh=make_mesh())
    load, peak = time.perf_counter() - start, peak_memory()
    np.save(directory / "meta_tokens.npy", model.meta_tokens)
    start = time.perf_counter()
    vectors = {"text": model.encode_query([TEXT])[0], "page": model.encode_document([page()])[0]}
    record(directory, "metaembed_jax", vectors, load=load, encode=time.perf_counter() - start, peak=peak)


def theirs(directory: Path) -> None:
    """Load and encode with transformers, the Meta Tokens after each prompt's embeddings."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModel
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    start = time.perf_counter()
    model = AutoModel.from_pretrained(directory, dtype="bfloat16").eval()
    load, peak = time.perf_counter() - start, peak_memory()
    words = Tokenizer.from_file(str(directory / "tokenizer.json"))
    meta_tokens = torch.tensor(np.load(directory / "meta_tokens.npy")).to(model.dtype)
    seen = Qwen2VLImageProcessorPil.from_pretrained(directory)([page()], return_tensors="pt")
    units = int(seen["image_grid_thw"].prod()) // 4
    visual = f"<|vision_start|>{'<|image_pad|>' * units}<|vision_end|>"
    prompts = {
        "text": f"<|im_start|>user\nQuery: {TEXT}<|im_end|><|endoftext|>" + "<|endoftext|>" * 10 + "\n",
        "page": f"<|im_start|>user\n{visual}Describe the image.<|im_end|><|endoftext|>",
    }

    def vectors(item: str, images: dict) -> np.ndarray:
        prompt = words.encode(prompts[item], add_special_tokens=False).ids
        tokens = torch.tensor([prompt + [0] * len(meta_tokens)])
        kinds = (tokens == model.config.image_token_id).int()
        positions, _ = model.get_rope_index(tokens, kinds, images.get("image_grid_thw"), attention_mask=torch.ones_like(tokens))
        hook = model.get_input_embeddings().register_forward_hook(
            lambda module, arguments, output: torch.cat([output[:, : len(prompt)], meta_tokens[None]], dim=1)
        )
        with torch.no_grad():
            states = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), position_ids=positions, **images)
        hook.remove()
        states = states.last_hidden_state[0, len(prompt) :].float()
        return torch.nn.functional.normalize(states[:16] if item == "text" else states[16:], dim=-1).numpy()

    start = time.perf_counter()
    encoded = {"text": vectors("text", {}), "page": vectors("page", dict(seen))}
    record(directory, "transformers", encoded, load=load, encode=time.perf_counter() - start, peak=peak)


SIDES = {"eight devices": eight, "metaembed_jax": ours, "transformers": theirs}

if __name__ == "__main__":
    main()

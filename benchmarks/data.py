"""Time training batches against transformers' image processor in a torch DataLoader: `python benchmarks/data.py`.

Both sides read the same JPEG bytes from memory, with the same number of worker processes, one thread each. Ours makes the training
batches of `data.pipeline`: prompts as tokens, pixels as uint8 patches, window by window. Theirs makes `pixel_values` alone, for all
images of a batch at once, as collators do.

    pages        1240x1754 pixels, written text
    photos       640x480 pixels, soft noise

The normalised pixels of one image are compared before anything is timed.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from metaembed_jax.backbones.config import CLIP_MEAN, CLIP_STD
from metaembed_jax.backbones.qwen.images import to_units
from metaembed_jax.backbones.qwen2_5_vl import FAMILY as QWEN2_5_VL
from metaembed_jax.backbones.qwen2_5_vl.inputs import Images
from metaembed_jax.batch.rows import filled_shares
from metaembed_jax.config import RunConfig, load_config, with_keys
from metaembed_jax.data import tokenizer
from metaembed_jax.data.pipeline import iterate, training_batches
from metaembed_jax.data.row_plan import plan_rows
from metaembed_jax.data.run_items import run_items
from metaembed_jax.inputs.images import open_image
from metaembed_jax.network_config import model_config, row_limits

BATCH, SOURCE, WARM = 8, 64, 4  # images of a batch; images of a source; batches that are not timed
MEAN, STD = np.float32(CLIP_MEAN), np.float32(CLIP_STD)


def main() -> None:
    """Compare one image, time both sides in turns, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default: 3)")
    parser.add_argument("--batches", type=int, default=12, help="batches of 8 a turn (default: 12)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="processes (default: 1, then 2)")
    arguments = parser.parse_args()
    sizes = Images(28 * 28, 1024 * 28 * 28)
    with tempfile.TemporaryDirectory() as scratch:
        learned = tokenizer.train(["which page is it?"] * 100, Path(scratch) / "tokenizer.json", QWEN2_5_VL, vocabulary=700)
    for name, draw in (("pages", page), ("photos", photo)):
        encoded = [draw(number) for number in range(SOURCE)]
        config = run_config(name, WARM + arguments.batches)
        records = [{"query": {"text": "which page is it?"}, "positive": {"image": image}, "source": name} for image in encoded]
        items = run_items(config, QWEN2_5_VL.Processor(learned, sizes, row_limits(config)), [records])
        shape = plan_rows(items, row_limits(config)).shape(0, 1)
        dataset = training_batches(items, shape, model_config(config).architecture.layout)
        largest = difference(encoded[0], sizes)
        fractions = ", ".join(f"{100 * value:.0f} % of {key}" for key, value in filled_shares(dataset[0].rows) if key != "vectors")
        size = np.mean([len(image) for image in encoded]) / 1000
        print(f"{name}: {size:.0f} kB of JPEG; largest difference {largest:.1e}; rows hold {fractions}")
        for workers in arguments.workers:
            sides = {
                "metaembed_jax": partial(iterate, dataset, 0, config.schedule.steps, workers),
                "transformers": partial(dataloader, encoded, sizes, workers, config.schedule.steps),
            }
            rates = {side: [] for side in sides}
            for _ in range(arguments.rounds):
                for side, batches in sides.items():
                    rates[side].append(rate(batches(), arguments.batches))
            medians = {side: statistics.median(values) / workers for side, values in rates.items()}
            ratio = medians["metaembed_jax"] / medians["transformers"]
            listed = ", ".join(f"{side} {value:.1f}" for side, value in medians.items())
            print(f"  {workers} worker{'s' * (workers > 1)}, images a second and worker: {listed}; ratio {ratio:.2f}", flush=True)


def run_config(name: str, steps: int) -> RunConfig:
    """Return a config of a source, in rows of the family's default size."""
    return with_keys(
        RunConfig(),
        {
            "model.architecture": load_config(str(Path(__file__).parents[1] / "configs" / "7b.py")).model.architecture,
            "data.sources": ((name, 1.0, 0),),
            "rows.batch_size": BATCH,
            "optimizer.warmup_steps": 0,
            "schedule.steps": steps,
        },
    )


def rate(batches: Iterator, count: int) -> float:
    """Return images a second, after the batches in which workers start."""
    for _ in range(WARM):
        next(batches)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    seconds = time.perf_counter() - start
    assert next(batches, None) is None  # so that the workers end
    return BATCH * count / seconds


class Encoded:
    """A torch data set of decoded images, repeated up to a length."""

    def __init__(self, encoded: list[bytes], count: int):
        self.encoded, self.count = encoded, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Image.Image:
        return Image.open(io.BytesIO(self.encoded[number % len(self.encoded)])).convert("RGB")


class Collator:
    """Processes a batch of images by transformers' Pillow processor."""

    def __init__(self, sizes: Images):
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.processor = Qwen2VLImageProcessorPil(size={"shortest_edge": sizes.min_pixels, "longest_edge": sizes.max_pixels})

    def __call__(self, images: list[Image.Image]) -> dict:
        return dict(self.processor(images, return_tensors="pt"))


def dataloader(encoded: list[bytes], sizes: Images, workers: int, batches: int) -> Iterator[dict]:
    """Return the batches of a torch DataLoader, which keeps two ahead for each worker by default."""
    from torch.utils.data import DataLoader

    images, options = Encoded(encoded, BATCH * batches), dict(num_workers=workers, multiprocessing_context="spawn")
    return iter(DataLoader(images, BATCH, collate_fn=Collator(sizes), **options))


def difference(encoded: bytes, sizes: Images) -> float:
    """Return the largest difference between the normalised pixels of both sides, for one image."""
    theirs = Collator(sizes)([Image.open(io.BytesIO(encoded)).convert("RGB")])["pixel_values"].numpy().reshape(-1, 3, 2, 196)
    image = open_image(encoded, "image")
    units, _ = to_units(image, sizes.grid(*image.size, None, None, "image"), sizes)
    ours = units.reshape(-1, 3, 196)
    ours = (ours.astype(np.float32) / 255 - MEAN[:, None]) / STD[:, None]
    return max(float(np.abs(ours - theirs[:, :, frame]).max()) for frame in range(2))


def page(number: int) -> bytes:
    """Return the JPEG of a white page with lines of words."""
    image = Image.new("RGB", (1240, 1754), "white")
    draw, random = ImageDraw.Draw(image), np.random.default_rng(number)
    for line in range(60):
        words = " ".join("".join(random.choice(list("abcdefghij"), random.integers(2, 9))) for _ in range(18))
        draw.text((80, 80 + 27 * line), words, fill="black", font_size=18)
    return jpeg(image)


def photo(number: int) -> bytes:
    """Return the JPEG of blurred noise."""
    pixels = np.random.default_rng(number).integers(0, 256, (480, 640, 3), np.uint8)
    return jpeg(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(2)))


def jpeg(image: Image.Image) -> bytes:
    """Return an image as JPEG of quality 90."""
    file = io.BytesIO()
    image.save(file, "jpeg", quality=90)
    return file.getvalue()


if __name__ == "__main__":
    main()

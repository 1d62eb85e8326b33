"""Qwen3-VL in the tests of all families."""

from metaembed_jax.config import load_config
from tests.backbones.families import Record
from tests.backbones.qwen2_5_vl.record import stock_vectors
from tests.backbones.qwen2_5_vl.reference import DOCUMENTS, QUERIES, write_checkpoint
from tests.backbones.qwen3_vl.reference import CONFIGURATIONS

RECORD = Record(
    write=lambda directory: write_checkpoint(directory, CONFIGURATIONS["grouped"]),
    queries=QUERIES,
    documents=DOCUMENTS,
    tokens=64,
    patches=256,
    pixels=(4 * 1024, 64 * 1024),
    vectors=stock_vectors,
    lora=load_config("configs/qwen3_vl_8b.py").model.trained,
)

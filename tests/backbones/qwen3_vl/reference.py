"""Random Qwen3-VL checkpoints, with the items and the reference of Qwen2.5-VL, whose prompts they share."""

from pathlib import Path
from types import SimpleNamespace

from tests.backbones.qwen2_5_vl import reference as qwen2_5_vl
from tests.backbones.qwen2_5_vl.reference import DOCUMENTS, QUERIES, VOCABULARY  # noqa: F401  the items are the same


def configuration(
    *, heads, head_dim, sections, width, layers, depth, taken, table, tied, vision_width, vision_heads, eps=1e-6, patch=16
):
    """A config.json. Every size differs from every other, so that no two can be exchanged unseen."""
    text = dict(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, intermediate_size=72, rms_norm_eps=eps,
        num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=head_dim, max_position_embeddings=4096,
        rope_parameters=dict(rope_type="default", rope_theta=100.0, mrope_section=list(sections), mrope_interleaved=True),
    )  # fmt: skip
    vision = dict(
        depth=depth, hidden_size=vision_width, num_heads=vision_heads, intermediate_size=56, out_hidden_size=width,
        deepstack_visual_indexes=list(taken), num_position_embeddings=table**2, patch_size=patch,
    )  # fmt: skip
    return dict(model_type="qwen3_vl", text_config=text, vision_config=vision, tie_word_embeddings=tied)


CONFIGURATIONS = {
    "grouped": configuration(
        heads=(4, 2), head_dim=24, sections=(7, 3, 2), width=64, layers=4, depth=5, taken=(1, 3), table=6, tied=False,
        vision_width=48, vision_heads=3,
    ),
    # So many layers that the last one is not cut off; features from the first layer of the tower and from the last.
    "deep": configuration(
        heads=(6, 1), head_dim=16, sections=(5, 2, 1), width=80, layers=9, depth=4, taken=(0, 2, 3), table=7, tied=True,
        vision_width=32, vision_heads=2, eps=1e-5,
    ),
    # More features than the language model has layers; a table that is smaller than an image's grid on one side only.
    "shallow": configuration(
        heads=(3, 3), head_dim=20, sections=(6, 3, 1), width=36, layers=2, depth=3, taken=(0, 1, 2), table=9, tied=True,
        vision_width=40, vision_heads=5, patch=20,
    ),
}  # fmt: skip


def reference(name: str, scratch: Path) -> SimpleNamespace:
    """Return a reference as `qwen2_5_vl.reference.reference`."""
    return qwen2_5_vl.reference(name, scratch, CONFIGURATIONS)

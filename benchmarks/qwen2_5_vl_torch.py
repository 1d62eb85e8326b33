"""The peer of benchmarks/train.py: Qwen2.5-VL of transformers, trained by torch as the published release of MetaEmbed does."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from metaembed_jax.backbones.config import CLIP_MEAN, CLIP_STD
from metaembed_jax.batch.items import Example

QUERY_ROWS = 16


def write_checkpoint(directory: Path, architecture: dict, image_token: int) -> None:
    """Write a random model with `save_pretrained`."""
    torch.manual_seed(0)
    text = dict(architecture["text_config"])
    text["rope_parameters"] = dict(
        rope_type="default", rope_theta=text.pop("rope_theta"), mrope_section=list(text.pop("mrope_section"))
    )
    vision = dict(architecture["vision_config"], fullatt_block_indexes=list(architecture["vision_config"]["fullatt_block_indexes"]))
    tokens = dict(image_token_id=image_token, bos_token_id=None, eos_token_id=None)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)
    model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # at their usual small scale the vectors of all items are alike, and the losses say little
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    model.save_pretrained(directory)


class TorchTrainer:
    """Trains the model with AdamW on one batch.

    Args:
      directory: folder that `write_checkpoint` wrote.
      meta_tokens: float32 [80, width].
      pairs: (query, document) pairs; all queries have one length, and so have all documents.
      config: for its objective and optimizer.
    """

    def __init__(self, directory: Path, meta_tokens: np.ndarray, pairs: list[tuple[Example, Example]], config):
        self.core = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype="float32").model
        self.meta_tokens = torch.nn.Parameter(torch.tensor(meta_tokens))
        self.config = config
        optimizer = config.optimizer
        self.parameters = [*self.core.parameters(), self.meta_tokens]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=optimizer.learning_rate,
            betas=(optimizer.b1, optimizer.b2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        self.query, self.document = (self._inputs(examples) for examples in zip(*pairs, strict=True))
        self.core.get_input_embeddings().register_forward_hook(self._append_meta_tokens)

    def step(self) -> float:
        """Run a step (forward, backward, clipping, AdamW) and return its loss."""
        loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def flops(self) -> int:
        """Return the FLOPs of the matrix products of forward and backward, as torch counts them."""
        with FlopCounterMode(display=False) as counter:
            self.loss().backward()
        self.optimizer.zero_grad(set_to_none=True)
        return counter.get_total_flops()

    def loss(self) -> torch.Tensor:
        """Return the mean cross-entropy over the groups, from one set of similarities."""
        query_BRD = self._vectors(self.query)[:, :QUERY_ROWS]
        document_NRD = self._vectors(self.document)[:, QUERY_ROWS:]
        similarity_BNij = torch.einsum("bid,njd->bnij", query_BRD, document_NRD)
        target = torch.arange(len(query_BRD))
        losses = []
        for r_q, r_c in self.config.objectives.matryoshka.groups:
            scores = similarity_BNij[:, :, :r_q, :r_c].amax(3).sum(2)
            losses.append(torch.nn.functional.cross_entropy(scores / self.config.objectives.matryoshka.temperature, target))
        return torch.stack(losses).mean()

    def _vectors(self, inputs: dict) -> torch.Tensor:
        states = self.core(**inputs, use_cache=False).last_hidden_state[:, -len(self.meta_tokens) :]
        return torch.nn.functional.normalize(states, dim=-1)

    def _append_meta_tokens(self, module, arguments, output):
        prompt = output[:, : -len(self.meta_tokens)]
        return torch.cat([prompt, self.meta_tokens.expand(len(prompt), -1, -1)], dim=1)

    def _inputs(self, examples: Sequence[Example]) -> dict:
        rows = len(self.meta_tokens)
        tokens, positions = (np.stack([getattr(example, name) for example in examples]) for name in ("tokens", "positions"))
        start = positions.max(axis=(1, 2), keepdims=True) + 1
        suffix = np.broadcast_to(start + np.arange(rows), (len(start), 3, rows))
        positions = np.concatenate([positions, suffix], axis=2)
        input_ids = torch.tensor(np.pad(tokens, ((0, 0), (0, rows)))).long()
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "position_ids": torch.tensor(positions.transpose(1, 0, 2).copy()).long(),
        }
        if examples[0].patches:
            side = int(examples[0].patches ** 0.5)
            pixels = np.concatenate([example.patch_arrays["patches"] for example in examples])
            pixels = pixels.astype(np.float32).reshape(len(pixels), 3, 1, -1) / 255
            mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
            two_frames = np.repeat((pixels - mean) / std, 2, axis=2)
            inputs["pixel_values"] = torch.tensor(two_frames.reshape(len(pixels), -1))
            inputs["image_grid_thw"] = torch.tensor([[1, side, side]] * len(examples))
        return inputs

"""MetaEmbed for sentence-transformers: a stock Qwen-VL with prompts and Meta Tokens, whose states are the vectors.

    from sentence_transformers import MultiVectorEncoder
    model = MultiVectorEncoder(DIRECTORY, trust_remote_code=True)
    queries = model.encode_query(["a red car"])            # a list of [16, D], unit vectors
    documents = model.encode_document([image, "a text", {"text": "a caption", "image": image}])
    model.similarity(queries, documents)

The vectors are nested: the first 4 of a query and the first 8 of a document are embeddings too, as `vectors[:4]`.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers.base.modules import InputModule
from tokenizers import Tokenizer
from transformers import AutoModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


class MetaEmbed(InputModule):
    """The only module of the pipeline, from the files of a directory."""

    forward_kwargs = {"task"}
    tokenizer: Tokenizer

    def __init__(self, directory: str, **model_kwargs):
        super().__init__()
        self.directory = Path(directory)
        self.metadata = json.loads((self.directory / "config.json").read_text(encoding="utf-8"))["metaembed"]
        self.core = AutoModel.from_pretrained(directory, **model_kwargs).eval()
        head = self.directory / "head.safetensors"
        self.head = torch.nn.Parameter(load_file(head)["weight"].to(self.core.dtype)) if head.is_file() else None
        self.images = Qwen2VLImageProcessorPil.from_pretrained(directory)
        self.tokenizer = Tokenizer.from_file(str(self.directory / "tokenizer.json"))
        self.tokenizer.encode_special_tokens = True  # special strings in a user's text are plain text

    @property
    def modalities(self) -> list:
        """The inputs that can be embedded; "message" is a batch that mixes them."""
        return ["text", "image", ("image", "text"), ("text", "image"), "message"]

    def get_embedding_dimension(self) -> int:
        """The width of a vector."""
        return self.metadata["embedding_dim"] or self.core.config.get_text_config().hidden_size

    def preprocess(self, inputs: Sequence, prompt: str | None = None, task: str | None = None, **kwargs) -> dict:
        """Return left-padded prompts with their Meta Tokens. Inputs: texts, PIL images, or {"text", "image"}."""
        items = [item if isinstance(item, dict) else {"text" if isinstance(item, str) else "image": item} for item in inputs]
        for item in items:
            known = item.keys() <= {"text", "image"} and isinstance(item.get("text") or "", str)
            if not known or isinstance(item.get("image"), list) or all(value is None for value in item.values()):
                raise ValueError(f"cannot embed {str(item)[:200]}; expected a text, an image, or {{'text': ..., 'image': ...}}")
        pictures: list = [item["image"] for item in items if item.get("image") is not None]
        features = dict(self.images(pictures, return_tensors="pt")) if pictures else {}
        units = iter((features["image_grid_thw"].prod(-1) // self.images.merge_size**2).tolist() if pictures else ())
        suffix = list(range(self.metadata["first_token"], self.metadata["first_token"] + self._rows(task)))
        rows = [self._tokens(item, prompt or "", task, units) + suffix for item in items]
        length = max(map(len, rows))
        features["input_ids"] = torch.tensor([[0] * (length - len(row)) + row for row in rows])
        features["attention_mask"] = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        return features

    def forward(self, features: dict, task: str | None = None, **kwargs) -> dict:
        """Add `token_embeddings` [B, R, D], unit vectors, none of them masked."""
        tokens, mask = features["input_ids"], features["attention_mask"]
        seen = {key: features[key] for key in ("pixel_values", "image_grid_thw") if key in features}
        kinds = (tokens == self.core.config.image_token_id).int()
        positions, _ = self.core.get_rope_index(tokens, kinds, seen.get("image_grid_thw"), attention_mask=mask)
        states = self.core(input_ids=tokens, attention_mask=mask, position_ids=positions, **seen).last_hidden_state
        vectors = states[:, -self.metadata["query_tokens" if task == "query" else "document_tokens"] :]
        if self.head is not None:
            vectors = vectors @ self.head.T
        features["token_embeddings"] = torch.nn.functional.normalize(vectors.float(), dim=-1)
        features["attention_mask"] = torch.ones(vectors.shape[:2], dtype=torch.long, device=vectors.device)
        return features

    def save(self, output_path: str, *args, **kwargs) -> None:
        """Write the current weights, and copy the other files."""
        for file in self.directory.iterdir():
            weights = file.name.endswith((".safetensors", ".safetensors.index.json"))
            if file.is_file() and not weights and Path(output_path).resolve() != self.directory.resolve():
                shutil.copy(file, output_path)
        self.core.save_pretrained(output_path)
        if self.head is not None:
            save_file({"weight": self.head.detach().contiguous()}, Path(output_path) / "head.safetensors", {"format": "pt"})

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", token=None, cache_folder=None, revision=None,
             local_files_only: bool = False, model_kwargs: dict | None = None, **kwargs) -> "MetaEmbed":  # fmt: skip
        """Load from a directory or a hub id."""
        directory = cls.load_dir_path(
            model_name_or_path,
            subfolder=subfolder,
            token=token,
            cache_folder=cache_folder,
            revision=revision,
            local_files_only=local_files_only,
        )
        return cls(directory or model_name_or_path, **(model_kwargs or {}))  # without a directory, the error names the model

    def _rows(self, task: str | None) -> int:
        return self.metadata["query_tokens"] + (0 if task == "query" else self.metadata["document_tokens"])

    def _tokens(self, item: dict, prompt: str, task: str | None, units) -> list[int]:
        text, special, plain = item.get("text") or "", self.tokenizer.token_to_id, self._encode
        prefix, ends = ("Query: ", 11) if task == "query" else ("", 1)
        if item.get("image") is None:
            tokens = [special("<|im_start|>"), *plain("user\n" + prefix + prompt + text)]
        else:
            visual = [special("<|image_pad|>")] * next(units)
            tokens = [special("<|im_start|>"), *plain("user\n"), special("<|vision_start|>"), *visual, special("<|vision_end|>")]
            tokens += plain(prefix + (prompt + text or "Describe the image."))
        tokens += [special("<|im_end|>")] + [special("<|endoftext|>")] * ends
        return tokens + (plain("\n") if task == "query" else [])

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

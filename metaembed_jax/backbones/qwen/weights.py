"""Exports of the Qwen-VL families: text of the model card, and a module for sentence-transformers."""

from pathlib import Path

UNUSED_KEYS = ("lm_head.weight",)  # predicts tokens; stored where it is not tied to the embedding

# Text of the model card of a transformers export; {query}, {last}, {width} and {head} are filled in.
USAGE = """\
```python
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained(DIRECTORY), AutoModel.from_pretrained(DIRECTORY)
prompt = "<|im_start|>user\\nQuery: a red car<|im_end|><|endoftext|>" + "<|endoftext|>" * 10 + "\\n"
prompt += "".join(f"<|meta_query_{{i}}|>" for i in range({query}))
states = model(**tokenizer([prompt], return_tensors="pt")).last_hidden_state[:, -{query}:]
vectors = torch.nn.functional.normalize(states{head}, dim=-1)  # [1, {query}, {width}], nested
```

A document's prompt is `<|im_start|>user\\n{{text}}<|im_end|><|endoftext|>`, or with an image
`<|im_start|>user\\n<|vision_start|><|image_pad|>...<|vision_end|>Describe the image.<|im_end|><|endoftext|>`, with one
`<|image_pad|>` for each visual token; after it come the {query} query tokens and then `<|meta_document_0|>` to
`<|meta_document_{last}|>`, whose states are its vectors."""

SENTENCE_TRANSFORMERS = Path(__file__).with_name("sentence_transformers_module.py")

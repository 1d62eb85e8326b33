"""What an export of a PaliGemma says to its users."""

# In the model card of a transformers export; {query}, {last}, {width} and {head} are filled in.
USAGE = """\
```python
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained(DIRECTORY), AutoModel.from_pretrained(DIRECTORY)
prompt = "<bos>Query: a red car" + "<pad>" * 10 + "\\n" + "".join(f"<|meta_query_{{i}}|>" for i in range({query}))
batch = tokenizer([prompt], return_tensors="pt", add_special_tokens=False)
batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])  # 0: a prefix, whose tokens see each other
batch["token_type_ids"][:, -{query}:] = 1  # 1: Meta Tokens, which are causal
states = model(**batch).last_hidden_state[:, -{query}:]
vectors = torch.nn.functional.normalize(states{head}, dim=-1)  # [1, {query}, {width}], nested
```

A candidate's prompt is `<bos>{{text}}\\n`, or with an image `<image>...<image><bos>Describe the image.\\n`, with one `<image>` for
each patch; behind it come the {query} query tokens and then `<|meta_candidate_0|>` to `<|meta_candidate_{last}|>`, whose states are
its vectors. Of both kinds of Meta Tokens the type is 1."""

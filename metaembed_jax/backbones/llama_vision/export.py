"""What an export of a Llama-3.2-Vision model says to its users."""

# In the model card of a transformers export; {query}, {last}, {width} and {head} are filled in.
USAGE = """\
```python
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained(DIRECTORY), AutoModel.from_pretrained(DIRECTORY)
prompt = "<|begin_of_text|>Query: a red car<|end_of_text|>" + "<|end_of_text|>" * 10 + "\\n"
prompt += "".join(f"<|meta_query_{{i}}|>" for i in range({query}))
inputs = tokenizer([prompt], return_tensors="pt", add_special_tokens=False)
states = model(**inputs).last_hidden_state[:, -{query}:]
vectors = torch.nn.functional.normalize(states{head}, dim=-1)  # [1, {query}, {width}], nested
```

A candidate's prompt is `<|begin_of_text|>{{text}}<|end_of_text|>`, or with an image
`<|image|><|begin_of_text|>Describe the image.<|end_of_text|>`; behind it come the {query} query tokens and then
`<|meta_candidate_0|>` to `<|meta_candidate_{last}|>`, whose states are its vectors. With an image the model also takes what
`AutoImageProcessor.from_pretrained(DIRECTORY)` gives for `[[image]]`, and a `cross_attention_mask` [1, tokens, 1, tiles], which is
1 for the first `num_tiles` tiles from the image token to the end, Meta Tokens included. Texts without an image belong in batches
of their own."""

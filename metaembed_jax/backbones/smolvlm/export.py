"""What an export of a SmolVLM says to its users."""

# In the model card of a transformers export; {query}, {last}, {width} and {head} are filled in.
USAGE = """\
```python
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained(DIRECTORY), AutoModel.from_pretrained(DIRECTORY)
prompt = "<|im_start|>User: Query: a red car<end_of_utterance>" + "<end_of_utterance>" * 10 + "\\n"
prompt += "".join(f"<|meta_query_{{i}}|>" for i in range({query}))
states = model(**tokenizer([prompt], return_tensors="pt")).last_hidden_state[:, -{query}:]
vectors = torch.nn.functional.normalize(states{head}, dim=-1)  # [1, {query}, {width}], nested
```

A candidate's prompt is `<|im_start|>User: {{text}}<end_of_utterance>`, or with an image
`<|im_start|>User:<image>Describe the image.<end_of_utterance>`, whose `<image>` is replaced by the tiles' as transformers'
`Idefics3Processor` does with the `image_seq_len` of this model; behind it come the {query} query tokens and then
`<|meta_candidate_0|>` to `<|meta_candidate_{last}|>`, whose states are its vectors. With an image the model also takes what
`AutoImageProcessor.from_pretrained(DIRECTORY)` gives for it."""

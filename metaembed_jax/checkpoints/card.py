"""The model card of an export: README.md, with the hub's metadata at the top."""

import json

from metaembed_jax.backbones.family import family
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.network import ModelConfig
from metaembed_jax.results import Results

LOAD = {
    "transformers": """\
The vocabulary has the Meta Tokens: put their strings after a prompt.

{usage}""",
    "sentence-transformers": """\
```python
from sentence_transformers import MultiVectorEncoder

model = MultiVectorEncoder(DIRECTORY, trust_remote_code=True)  # metaembed.py in this directory, a page of code
queries = model.encode_query(["a red car"])  # a list of [{query}, {width}], unit vectors
documents = model.encode_document([image, "a text", {{"text": "a caption", "image": image}}])
model.similarity(queries, documents)
```""",
    "peft": """\
```python
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel

model = PeftModel.from_pretrained(AutoModel.from_pretrained({base}), DIRECTORY)
table = model.get_input_embeddings()
first = len(table.weight)
others = load_file(DIRECTORY + "/metaembed.safetensors")
table.weight = torch.nn.Parameter(torch.cat([table.weight, others["meta_tokens"].to(table.weight.dtype)]))
```

The ids of the Meta Tokens start at `first`: {query} of queries, then those of documents. They are rows of the embedding table,
before any scaling by the model. The README of a `transformers` export has the prompts. If `others` has a `head`, multiply states by
it, `states @ others["head"].T`, and then normalise them to unit vectors.""",
}


def model_card(kind: str, config: ModelConfig, metadata: dict, results: Results | None) -> str:
    """Return the text of README.md.

    Args:
      kind: the format, a key of `LOAD`.
      metadata: name, base or start, groups, sources and steps of the run; unknown ones are missing.
      results: results of the test split; None if there are none.
    """
    width = config.embedding_dim or config.architecture.width
    head = ' @ load_file(f"{DIRECTORY}/head.safetensors")["weight"].T' if config.embedding_dim else ""
    facts = dict(query=config.query_tokens, last=config.document_tokens - 1, width=width, head=head)
    usage = family(config.backbone).usage.format(**facts)
    load = LOAD[kind].format(usage=usage, base=json.dumps(metadata.get("base", "")), **facts)
    lines = ["---", "tags: [metaembed, multi-vector, late-interaction, retrieval]"]
    lines += [
        f"library_name: {kind}",
        *([f"base_model: {json.dumps(metadata['base'])}"] if metadata.get("base") else []),
        "---",
        "",
    ]
    lines += [f"# {metadata.get('name', 'MetaEmbed')}", ""]
    lines += [
        f"A MetaEmbed retriever (arXiv 2509.18095): up to {config.query_tokens} vectors of {width} numbers for a query and "
        f"{config.document_tokens} for a document. Every prefix of them is an embedding by itself, so quality is chosen against "
        "cost when searching. The score is the sum over query vectors of the largest inner product with a document vector.",
        "",
    ]
    lines += [f"- base: {metadata.get('base') or metadata.get('start') or 'none, trained from scratch'}"]
    if "groups" in metadata:
        budgets = [Budget(*group) for group in metadata["groups"]]
        cut = " x numbers of a vector" if any(budget.width for budget in budgets) else ""
        lines += [f"- budgets (query vectors : document vectors{cut}): {', '.join(map(str, budgets))}"]
        lines += ["- a vector that is cut to its first numbers is divided by the length of what is left"] if cut else []
        sources = ", ".join(str(source[0]) for source in metadata["sources"])
        temperature = f" at temperature {metadata['temperature']}" if "temperature" in metadata else ""
        lines += [f"- trained for {metadata['steps']:,} steps{temperature} on: {sources}"]
    return "\n".join([*lines, "", "## Load", "", load, "", *_results(results)])


def _results(results: Results | None) -> list[str]:
    if results is None:
        return []
    lines = ["## Results", "", f"{results.title}:", ""]
    for board in results.boards:
        for task in board.tasks:
            metrics = list(task.searches[0].metrics)
            title = board.name if board.total == 1 else f"{task.name}, {board.name}"
            lines += [f"{title}:", "", f"| budget | {' | '.join(metrics)} |", "|---" * (len(metrics) + 1) + "|"]
            for search in task.searches:
                figures = " | ".join(f"{100 * search.metrics[metric].mean:.1f}" for metric in metrics)
                lines.append(f"| {search.budget} | {figures} |")
            lines.append("")
    return lines

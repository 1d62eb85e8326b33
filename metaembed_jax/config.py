"""The keys of a run's configuration, with their defaults, and the flags that change them.

`configs/*.py` start from `default_config()` and set what differs; the result is locked, so a misspelt key is an error.
"""

import ast
import importlib.util
import math
import operator
from pathlib import Path

from ml_collections import ConfigDict

from metaembed_jax.backbones.family import family
from metaembed_jax.backbones.lora import LoraConfig
from metaembed_jax.batch.items import Limits
from metaembed_jax.errors import UserError
from metaembed_jax.files import check_scheme, local_path
from metaembed_jax.late_interaction.groups import GROUPS, validate_groups
from metaembed_jax.network import ModelConfig
from metaembed_jax.trainable import lora_patterns

# The configs of the package: in it where it is installed, beside it in a checkout.
CONFIGS = next(folder for root in Path(__file__).parents[:2] if (folder := root / "configs").is_dir())
EXPORTS = ("transformers", "sentence-transformers", "peft")  # what `metaembed_jax.checkpoints.export` writes

# Keys, or groups of keys, that determine the numbers of a run: a started run keeps them.
FIXED_KEYS = (
    "seed",
    "init_from",
    "backbone",
    "architecture",
    "query_tokens",
    "candidate_tokens",
    "meta_token_scale",
    "embedding_dim",
    "dtype",
    "trained",
    "frozen_dtype",
    "lora",
    "groups",
    "temperature",
    "normalization",
    "data.sources",
    "data.sub_batch",
    "data.negatives",
    "data.within_source",
    "data.min_pixels",
    "data.max_pixels",
    "data.max_text_tokens",
    "data.augment",
    "data.page_side",
    "data.curriculum",
    "row",
    "batch_size",
    "optimizer",
)
# Keys that change only speed, memory, files and reports, up to the rounding of float sums: each start may change them.
# `validate_every` also determines which steps can be the best.
FREE_KEYS = (
    "name",
    "recompute",
    "unroll_layers",
    "data.dir",
    "data.workers",
    "mesh",
    "microbatch_rows",
    "log_every",
    "validate_every",
    "save_every",
    "save_minutes",
    "keep_checkpoints",
    "trace_steps",
    "exports",
)
# Keys that a start may change while the steps already taken fit them; the rest of the run is planned again.
REPLANNED_KEYS = ("steps",)


def default_config() -> ConfigDict:
    """Every key there is. Values here are the recipe's; what has no sensible default is empty."""
    config = ConfigDict()
    config.name = ""  # names the folder runs/<name>
    config.seed = 0
    # What the weights start from: a run, a Hugging Face directory or hub id, or a config FILE[:ARG], whose run is trained first.
    config.init_from = ""

    config.backbone = "qwen2_5_vl"
    config.architecture = ConfigDict()  # the keys of Hugging Face's config.json; empty: those of init_from
    config.query_tokens = 16
    config.candidate_tokens = 64
    config.meta_token_scale = 0.02  # standard deviation of fresh Meta Tokens
    config.embedding_dim = 0  # width of the head; 0: none
    config.dtype = "bfloat16"  # of activations and matmuls; float32 for parity
    config.recompute = (
        "layers"  # by the backward pass: everything (least memory) to nothing, see metaembed_jax.training.microbatches
    )
    config.unroll_layers = 1  # layers to a turn of the loop over a stack

    config.trained = (("*", "full"),)  # (pattern of parameters, full or lora); all others are frozen: metaembed_jax.trainable
    config.frozen_dtype = ""  # of frozen kernels: bfloat16, float32 or int8; empty: as dtype
    config.lora = ConfigDict(dict(rank=32, alpha=32.0, dropout=0.1))

    config.groups = GROUPS  # budgets trained together, nested
    config.temperature = 0.03
    config.normalization = "code"  # code: mean over groups; paper: sum

    config.data = ConfigDict()
    config.data.dir = "data"  # prepared sources; what is missing is prepared
    config.data.sources = (("icons", 1.0, 0),)  # (name in metaembed_jax.data.sources, weight, at most so many pairs; 0: all)
    config.data.sub_batch = 0  # consecutive pairs of one source; 0: batch_size
    config.data.negatives = 0  # hard negatives a pair, at most
    config.data.within_source = False  # a query's candidates are the positives of its own source only, not of the whole batch
    config.data.min_pixels = 28 * 28
    config.data.max_pixels = 1024 * 28 * 28
    config.data.max_text_tokens = 512  # of the text of an item; what is longer is cut
    config.data.workers = 0  # processes of a host that make batches; 0: a thread
    config.data.augment = False  # icons: random size and place of drawings after the first epochs
    config.data.page_side = 224  # boards: pixels of a training page
    config.data.curriculum = ()  # boards: ((until step, fewest icons, most icons), ...)

    # -1: all devices that the others leave. slices: how many `data` goes over; 0: as the devices report; 1: any axis may cross.
    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1, slices=0))
    config.row = ()  # (tokens, patches) of a row, which several items share; empty: the family's default
    config.batch_size = 32  # pairs a step, over all devices
    config.microbatch_rows = 0  # most rows encoded at once, over all devices; 0: all rows of a step
    config.steps = 1000
    config.optimizer = ConfigDict()
    config.optimizer.algorithm = "adamw"  # or muon
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 500
    config.optimizer.decay = "linear"  # or cosine
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0

    config.log_every = 10  # steps
    config.validate_every = 250
    config.save_every = 250
    config.save_minutes = 15.0  # since the last save, by the first host's clock; 0: by steps only
    config.keep_checkpoints = 2  # besides the best
    config.trace_steps = ()  # (first, last) of the steps to trace for the profiler, into <workdir>/trace
    config.exports = ()  # formats that the best checkpoint is written in at the end, to <workdir>/export
    return config.lock()


def load_config(flag: str, overrides: dict[str, str]) -> ConfigDict:
    """Read `--config=NAME[:ARG]`, a config of the package or a file, and apply `--config.key=value` flags.

    Raises:
      UserError: no such file, none that gives a config, no such key, or a value of another type.
    """
    path, _, argument = flag.partition(":")
    known = config_names()
    if path in known:
        path = str(CONFIGS / f"{path}.py")
    elif not Path(path).is_file():
        raise UserError(f"{path}: no such file, and no config of the package; expected {', '.join(known)}, or a file")
    elif not names_config(flag):
        raise UserError(f"{path}: expected a Python file with get_config(arg), such as {CONFIGS / 'tiny.py'}")
    spec = importlib.util.spec_from_file_location("metaembed_config", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(argument or None)
    except UserError:
        raise
    except Exception as error:  # a config is a program, which can fail in any way
        raise UserError(f"{path}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not isinstance(config, ConfigDict) or not config.keys() >= default_config().keys():
        raise UserError(f"{path}: get_config must return what metaembed_jax.config.default_config() gave, with changes")
    for key, text in overrides.items():
        _override(config, key, text)
    return config


def is_in(key: str, keys: tuple[str, ...]) -> bool:
    """Return whether a key is among `keys`, or in a group among them."""
    return any(key == entry or key.startswith(f"{entry}.") for entry in keys)


def config_names() -> list[str]:
    """Return the names of the package's configs."""
    return sorted(path.stem for path in CONFIGS.glob("*.py"))


def names_config(text: str) -> bool:
    """Return whether a text is NAME[:ARG] of a config, rather than a path or id of weights."""
    name = text.partition(":")[0]
    return name.endswith(".py") or name in config_names()


def _override(config: ConfigDict, key: str, text: str) -> None:
    *parents, leaf = key.split(".")
    node = config
    for parent in parents:
        node = node.get(parent) if isinstance(node, ConfigDict) else None
    if not isinstance(node, ConfigDict) or leaf not in node:
        known = ", ".join(node.keys()) if isinstance(node, ConfigDict) else ", ".join(config.keys())
        raise UserError(f"--config.{key}: no such key; there are {known}")
    old = node[leaf]
    if isinstance(old, ConfigDict):
        raise UserError(f"--config.{key}: is a group of keys; set one of {', '.join(old.keys())}")
    node[leaf] = _parse(key, text, old)


def _parse(key: str, text: str, old):
    if isinstance(old, str):
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        value = text
    if isinstance(old, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(old) or value in (math.inf, -math.inf):  # as of 1e400
        raise UserError(f"--config.{key}={text}: expected {type(old).__name__}, as in {old!r}")
    return value


def model_config(config: ConfigDict, training: bool = False) -> ModelConfig:
    """The network that a run's configuration asks for; with dropout in training only."""
    dropout = config.lora.dropout if training else 0.0
    return ModelConfig(
        backbone=config.backbone,
        architecture=family(config.backbone).Config.from_huggingface(config.architecture.to_dict()),
        query_tokens=config.query_tokens,
        candidate_tokens=config.candidate_tokens,
        meta_token_scale=config.meta_token_scale,
        embedding_dim=config.embedding_dim,
        dtype=config.dtype,
        checkpoint=config.recompute in ("everything", "layers"),
        unroll=config.unroll_layers,
        lora=LoraConfig(lora_patterns(config.trained), config.lora.rank, config.lora.alpha, dropout),
        int8=config.frozen_dtype == "int8",
    )


def largest_budgets(config: ConfigDict) -> tuple[int, int]:
    """Vectors of a query and of a document in training: the largest budget of each side."""
    return max(r_q for r_q, _ in config.groups), max(r_c for _, r_c in config.groups)


def row_limits(config: ConfigDict) -> Limits:
    """The largest item of a run: one that fills a row of `config.row`, with the Meta Tokens of the largest budgets behind it.

    Raises:
      UserError: the row has no room for Meta Tokens, or its patches are not whole images of the family.
    """
    network, (query_vectors, document_vectors) = model_config(config), largest_budgets(config)
    architecture = network.architecture
    images = family(config.backbone).Images.from_run(config.data, architecture, None)
    tokens, patches = config.row or architecture.default_row(images)
    meta = [network.meta_tokens("query", query_vectors), network.meta_tokens("candidate", document_vectors)]
    if tokens <= max(meta):
        raise UserError(f"config.row={(tokens, patches)}: {max(meta)} of its tokens are Meta Tokens; expected more tokens")
    if patches % (multiple := architecture.layout.multiple):
        raise UserError(f"config.row={(tokens, patches)}: expected a multiple of {multiple} patches, as images of this model have")
    return Limits(tokens, patches, config.data.max_text_tokens, *meta)


def check_config(config: ConfigDict) -> None:
    """Refuses what cannot be run, before any work is done.

    Raises:
      UserError: names the key, its value, and what would do.
    """
    check_scheme(config.init_from)
    local_path(config.data.dir)
    validate_groups(config.groups, config.query_tokens, config.candidate_tokens)
    _choice(config, "dtype", ("float32", "bfloat16"))
    _choice(config, "frozen_dtype", ("", "bfloat16", "float32", "int8"))
    _choice(config, "recompute", ("everything", "microbatches", "layers", "nothing"))
    _entries(config, "trained", [(str, str)], "('*', 'full')")
    for pattern, how in config.trained:
        if how not in ("full", "lora"):
            raise UserError(f"config.trained: {(pattern, how)!r} is not (pattern, 'full') or (pattern, 'lora')")
    _entries(config, "data.sources", [(str, int | float, int)], "('icons', 1.0, 0)")
    if config.row:
        _check_row(config.row)
    if not 0 <= config.lora.dropout < 1 or config.lora.rank < 1 or not 0 < config.lora.alpha < math.inf:
        sizes = f"rank={config.lora.rank} and alpha={config.lora.alpha}"
        raise UserError(f"config.lora: {sizes} must be positive, and dropout={config.lora.dropout} in [0, 1)")
    _choice(config, "normalization", ("code", "paper"))
    _choice(config, "optimizer.algorithm", ("adamw", "muon"))
    _choice(config, "optimizer.decay", ("linear", "cosine"))
    if config.trace_steps and not (len(config.trace_steps) == 2 and 1 <= config.trace_steps[0] <= config.trace_steps[1]):
        raise UserError(f"config.trace_steps={config.trace_steps}: expected (first, last) with 1 <= first <= last, or ()")
    for kind in config.exports:
        if kind not in EXPORTS:
            raise UserError(f"config.exports: {kind!r} is no format; expected {', '.join(EXPORTS)}")
    if "peft" in config.exports and not lora_patterns(config.trained):
        raise UserError("config.exports: peft is for adapters, and config.trained has nothing as lora; use transformers")
    for key in (
        "batch_size",
        "data.max_text_tokens",
        "steps",
        "log_every",
        "validate_every",
        "save_every",
        "keep_checkpoints",
        "temperature",
        "unroll_layers",
    ):
        if not operator.attrgetter(key)(config) > 0:
            raise UserError(f"config.{key}={operator.attrgetter(key)(config)} must be positive")
    for key in (
        "embedding_dim",
        "meta_token_scale",
        "data.negatives",
        "data.sub_batch",
        "data.workers",
        "microbatch_rows",
        "save_minutes",
    ):
        if not operator.attrgetter(key)(config) >= 0:
            raise UserError(f"config.{key}={operator.attrgetter(key)(config)} must not be negative")
    if config.optimizer.warmup_steps >= config.steps:
        raise UserError(f"config.optimizer.warmup_steps={config.optimizer.warmup_steps} must be below config.steps={config.steps}")


def _check_row(row: tuple) -> None:
    is_pair = len(row) == 2 and all(type(number) is int for number in row)
    if not is_pair or row[0] < 1 or row[1] < 0:
        raise UserError(f"config.row={row!r}: expected (tokens, patches) such as (1536, 5120), or () for the family's default")


def _entries(config: ConfigDict, key: str, forms: list[tuple], example: str) -> None:
    for entry in operator.attrgetter(key)(config) or [()]:
        fits = [len(entry) == len(form) and all(map(isinstance, entry, form)) for form in forms if isinstance(entry, tuple)]
        if not any(fits) or any(isinstance(part, int | float) and part < 0 for part in entry):
            raise UserError(f"config.{key}: {entry!r} is not of the form {example}")


def _choice(config: ConfigDict, key: str, known: tuple[str, ...]) -> None:
    value = operator.attrgetter(key)(config)
    if value not in known:
        raise UserError(f"config.{key}={value!r}: expected {' or '.join(known)}")

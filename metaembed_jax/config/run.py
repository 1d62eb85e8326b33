"""The keys of a run's configuration, with their defaults.

`configs/*.py` return a `RunConfig`. The defaults are those of the published recipe; keys without a sensible default are empty.
"""

import dataclasses
from typing import ClassVar, Literal, get_args

from metaembed_jax.config.objectives import ObjectivesConfig
from metaembed_jax.config.section import (
    LARGEST_NUMBER,
    NonNegative,
    NonNegativeNumber,
    Positive,
    PositiveNumber,
    Section,
    Share,
)
from metaembed_jax.errors import UserError, shortened
from metaembed_jax.files import check_scheme, local_path
from metaembed_jax.late_interaction.groups import Budget, validate_groups

Recompute = Literal["everything", "microbatches", "layers", "nothing"]  # see metaembed_jax.training.microbatches
Export = Literal["transformers", "sentence-transformers", "peft"]  # what metaembed_jax.checkpoints.export writes
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)
EXPORTS: tuple[Export, ...] = get_args(Export)
LARGEST_SEED = 2**63 - 1  # that jax.random.key takes


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraSettings(Section):
    """Adapters of the kernels that `model.trained` has as "lora"."""

    KEY: ClassVar[str] = "config.model.lora"

    rank: Positive = 32
    alpha: PositiveNumber = 32.0
    dropout: Share = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings(Section):
    """The network, and which of its parameters train; `network_config` makes a `network.ModelConfig` of it."""

    KEY: ClassVar[str] = "config.model"

    backbone: str = "qwen2_5_vl"
    architecture: dict = dataclasses.field(default_factory=dict)  # the keys of Hugging Face's config.json; empty: of init_from
    # meta_tokens: the vectors are the states at Meta Tokens after a prompt; states: those at all tokens of the prompt, without Meta
    # Tokens, as in ColPali: the baseline of nested vectors. Its objective is all_states.
    readout: Literal["meta_tokens", "states"] = "meta_tokens"
    query_tokens: Positive = 16  # Meta Tokens of each side; states: the most tokens of a prompt
    document_tokens: Positive = 64
    meta_token_scale: NonNegativeNumber = 0.02  # standard deviation of fresh Meta Tokens
    embedding_dim: NonNegative = 0  # width of the head; 0: none
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of activations and matmuls; float32 for parity
    # (pattern of parameters, how); all others are frozen: metaembed_jax.trainable
    trained: tuple[tuple[str, Literal["full", "lora"]], ...] = (("*", "full"),)
    frozen_dtype: Literal["", "bfloat16", "float32", "int8"] = ""  # of frozen kernels; empty: as dtype
    lora: LoraSettings = LoraSettings()

    def __post_init__(self):
        super().__post_init__()
        if misfit := not_json(self.architecture):
            raise UserError(f"config.model.architecture{misfit}: expected a value of JSON, as in a config.json")
        if not self.trained:
            raise UserError("config.model.trained=(): expected at least one (pattern, 'full' or 'lora'), such as ('*', 'full')")

    @property
    def lora_patterns(self) -> tuple[str, ...]:
        """The patterns of the kernels that carry an adapter."""
        return tuple(pattern for pattern, how in self.trained if how == "lora")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsConfig(Section):
    """The rows of a step, and how they are computed."""

    KEY: ClassVar[str] = "config.rows"

    size: tuple[()] | tuple[Positive, NonNegative] = ()  # (tokens, patches) of a row of several items; empty: the family's default
    batch_size: Positive = 32  # pairs a step, over all devices
    microbatch_rows: NonNegative = 0  # most rows encoded at once, over all devices; 0: all rows of a step
    recompute: Recompute = "layers"  # by the backward pass: from "everything" (least memory) to "nothing"
    unroll_layers: Positive = 1  # layers in a turn of the loop over a stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """The training pairs, and how they are read."""

    KEY: ClassVar[str] = "config.data"

    dir: str = "data"  # of prepared sources; missing ones are prepared
    # (name in metaembed_jax.data.sources, weight, most pairs to use; 0: all)
    sources: tuple[tuple[str, PositiveNumber, NonNegative], ...] = (("icons", 1.0, 0),)
    sub_batch: NonNegative = 0  # consecutive pairs of one source; 0: rows.batch_size
    negatives: NonNegative = 0  # hard negatives a pair, at most
    within_source: bool = False  # the documents of a query are the positives of its source, not of the whole batch
    min_pixels: Positive = 28 * 28
    max_pixels: Positive = 1024 * 28 * 28
    max_text_tokens: Positive = 512  # of the text of an item; longer texts are cut
    workers: NonNegative = 0  # processes of a host that make batches; 0: a thread
    augment: bool = False  # icons: random size and position of drawings after the first epochs
    page_side: Positive = 224  # boards: pixels of a training page
    # boards: ((until step, fewest icons, most icons), ...)
    curriculum: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self):
        super().__post_init__()
        local_path(self.dir)
        if not self.sources:
            raise UserError("config.data.sources=(): expected at least one (name, weight, most pairs), such as ('icons', 1.0, 0)")
        names = [name for name, *_ in self.sources]
        if twice := [name for number, name in enumerate(names) if name in names[:number]]:
            raise UserError(
                f"config.data.sources has {twice[0]!r} twice, so a step could have a pair twice; expected each source once, with "
                "the sum of its weights"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """AdamW or Muon, its learning rate over the steps, and clipping."""

    KEY: ClassVar[str] = "config.optimizer"

    algorithm: Literal["adamw", "muon"] = "adamw"
    learning_rate: PositiveNumber = 1e-4
    # (pattern of trained parameters, factor of their learning rate), such as (("meta_tokens", 10.0), ("head*", 10.0)); of several
    # patterns that match a parameter, the first counts
    rates: tuple[tuple[str, PositiveNumber], ...] = ()
    warmup_steps: NonNegative = 500
    decay: Literal["linear", "cosine"] = "linear"
    b1: Share = 0.9
    b2: Share = 0.999
    eps: PositiveNumber = 1e-8
    weight_decay: NonNegativeNumber = 0.0
    clip_norm: PositiveNumber = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Section):
    """Sizes of the mesh's axes; -1: all remaining devices."""

    KEY: ClassVar[str] = "config.mesh"

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slices: NonNegative = 0  # slices that the axis `data` spans; 0: as the devices report; 1: any axis may span slices


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Section):
    """The steps of a run, and the steps at which it logs, saves and traces."""

    KEY: ClassVar[str] = "config.schedule"

    steps: Positive = 1000
    log_every: Positive = 10  # steps
    save_every: Positive = 250
    save_minutes: NonNegativeNumber = 15.0  # since the last save, by the first host's clock; 0: by steps only
    keep_checkpoints: Positive = 2  # besides the best
    trace_steps: tuple[()] | tuple[Positive, Positive] = ()  # (first, last) to trace for the profiler, into <workdir>/trace
    exports: tuple[Export, ...] = ()  # formats that the best checkpoint is written in at the end, to <workdir>/export

    def __post_init__(self):
        super().__post_init__()
        if self.trace_steps and self.trace_steps[0] > self.trace_steps[1]:
            raise UserError(f"config.schedule.trace_steps={self.trace_steps}: expected (first, last) with first <= last, or ()")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Section):
    """Validation during training."""

    KEY: ClassVar[str] = "config.evaluation"

    validate_every: Positive = 250  # steps
    # The figure, at the largest budget, that selects the best checkpoint: validation/METRIC, the mean over all sources, or a figure
    # of an evaluation below, mmeb/Precision@1 or mteb/BENCHMARK.
    select: str = "validation/R@10"
    # Benchmarks to run with the validation split, as (name, folder): ("mmeb", "MMEB-eval"), or ("vidore", ""), which mteb fetches.
    evaluations: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """All keys of a run."""

    name: str = ""  # of the folder runs/<name>
    seed: NonNegative = 0
    # The start of the weights: a run, a Hugging Face directory or hub id, or a config NAME[:ARG], whose run is trained first.
    init_from: str = ""
    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    rows: RowsConfig = RowsConfig()
    data: DataConfig = DataConfig()
    objectives: ObjectivesConfig = ObjectivesConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self):
        super().__post_init__()
        check_scheme(self.init_from)
        self._check_readout()
        largest = Budget(self.model.query_tokens, self.model.document_tokens, self.model.embedding_dim)
        for name, objective in self.objectives.used().items():
            try:
                validate_groups(objective.budgets, largest)
            except UserError as error:
                raise UserError(f"config.objectives.{name}: {error}") from error
        if self.seed > LARGEST_SEED:
            raise UserError(f"config.seed={self.seed}: expected at most {LARGEST_SEED}")
        if (warmup := self.optimizer.warmup_steps) >= (steps := self.schedule.steps):
            raise UserError(f"config.optimizer.warmup_steps={warmup}: expected fewer than config.schedule.steps={steps}")
        if "peft" in self.schedule.exports and not self.model.lora_patterns:
            raise UserError(
                "config.schedule.exports: peft stores adapters, and config.model.trained has nothing as lora; use transformers"
            )

    def _check_readout(self) -> None:
        """Check that the objectives, exports and evaluations are those of the readout."""
        reads_states, all_states = self.model.readout == "states", self.objectives.all_states
        if reads_states != (all_states is not None) or (reads_states and len(self.objectives.used()) > 1):
            raise UserError(
                f"config.model.readout={self.model.readout!r} with config.objectives {', '.join(self.objectives.used())}: expected "
                "all_states, and no other, with states only"
            )
        if all_states is None:
            return
        query_tokens, document_tokens = largest = self.model.query_tokens, self.model.document_tokens
        if all_states.evaluated[-1] != largest or any(r_q != query_tokens for r_q, _ in all_states.evaluated):
            raise UserError(
                f"config.objectives.all_states.evaluated={all_states.evaluated}: expected pairs ({query_tokens}, n), the last with "
                f"{document_tokens}: config.model.query_tokens and document_tokens; only documents are pooled"
            )
        for key, used in (("schedule.exports", self.schedule.exports), ("evaluation.evaluations", self.evaluation.evaluations)):
            if used:
                raise UserError(f"config.{key}={used}: expected () with config.model.readout='states'")


def not_json(value, key: str = "") -> str:
    """Return the key and the value of the first entry that JSON, or a float, cannot hold, such as ".rope_theta=nan"; "" if none."""
    if isinstance(value, dict):
        misfits = (not_json(entry, f"{key}.{name}") for name, entry in value.items())
    elif isinstance(value, list | tuple):
        misfits = (not_json(entry, f"{key}[{number}]") for number, entry in enumerate(value))
    elif type(value) in (int, float):
        return "" if abs(value) < LARGEST_NUMBER else f"{key}={shortened(value)}"
    else:
        return "" if value is None or type(value) in (bool, str) else f"{key}={shortened(value)}"
    return next(filter(None, misfits), "")

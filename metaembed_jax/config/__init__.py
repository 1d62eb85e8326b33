"""The configuration of a run: frozen dataclasses, the files and flags that set them, and their record."""

from metaembed_jax.config.files import CONFIGS, config_names, load_config, names_config
from metaembed_jax.config.keys import with_keys
from metaembed_jax.config.objectives import AllStatesConfig, MatryoshkaConfig, ObjectivesConfig
from metaembed_jax.config.run import (
    EXPORTS,
    RECOMPUTE,
    DataConfig,
    EvaluationConfig,
    LoraSettings,
    MeshConfig,
    ModelSettings,
    OptimizerConfig,
    RowsConfig,
    RunConfig,
    ScheduleConfig,
)

__all__ = [
    "CONFIGS",
    "EXPORTS",
    "RECOMPUTE",
    "AllStatesConfig",
    "DataConfig",
    "EvaluationConfig",
    "LoraSettings",
    "MatryoshkaConfig",
    "MeshConfig",
    "ModelSettings",
    "ObjectivesConfig",
    "OptimizerConfig",
    "RowsConfig",
    "RunConfig",
    "ScheduleConfig",
    "config_names",
    "load_config",
    "names_config",
    "with_keys",
]

"""The protocol of evaluators, which measure a model and return `Results`."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from metaembed_jax.config.record import to_record
from metaembed_jax.config.run import RunConfig
from metaembed_jax.evaluation.failures import FailedQuery
from metaembed_jax.model import MetaEmbed
from metaembed_jax.results import Failure, Interval, Results


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to evaluate, and the run that trained it.

    Attributes:
      model: encodes queries and documents.
      name: name of the run's config.
      step: step of the checkpoint.
      config: the run's config as JSON.
    """

    model: MetaEmbed
    name: str
    step: int
    config: dict

    @classmethod
    def of_run(cls, model: MetaEmbed, config: RunConfig, step: int) -> "Subject":
        """Return the subject of a checkpoint."""
        return cls(model=model, name=config.name, step=step, config=to_record(config))

    @cached_property
    def identity(self) -> str:
        """A digest that differs for other weights, to key cached results."""
        record = f"{self.step} {json.dumps(self.config, sort_keys=True)}".encode()
        return hashlib.sha256(record + self.model.meta_tokens.tobytes()).hexdigest()


class Evaluator(Protocol):
    """Measures a model on some data, at some budgets. All hosts of a run must call it alike, and get the same results.

    Attributes:
      name: name of its files, and prefix of its figures.
    """

    name: str

    def figure_names(self) -> list[str]:
        """Return the names of the figures that may select the best checkpoint; `figures` has all of them."""
        ...

    def check(self) -> None:
        """Refuse what cannot be evaluated, before any work is done.

        Raises:
          UserError: data or packages that are missing.
        """
        ...

    def run(self, subject: Subject, cache: Path, progress: bool) -> Results:
        """Evaluate a model.

        Args:
          cache: the folder of results of finished tasks, which are not evaluated again for the same model.
          progress: show bars.

        Raises:
          UserError: malformed data, or a budget beyond the model's.
        """
        ...

    def figures(self, results: Results) -> Mapping[str, Mapping[str, Interval]]:
        """Return the figures of results for a run's metrics, at each budget."""
        ...

    def show(self, failures: Sequence[Failure]) -> list[FailedQuery]:
        """Look up the items of the failures that `run` returned.

        Raises:
          UserError: data that cannot be read again.
        """
        ...

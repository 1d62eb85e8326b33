"""The protocol of an evaluator: anything that measures a model and gives `Results`, which one report shows."""

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
    """A model to evaluate, and the run that it is from.

    Attributes:
      model: what encodes.
      name: of the run's config.
      step: of the checkpoint.
      config: the run's config as JSON.
    """

    model: MetaEmbed
    name: str
    step: int
    config: dict

    @classmethod
    def of_run(cls, model: MetaEmbed, config: RunConfig, step: int) -> "Subject":
        """The model of a run's checkpoint."""
        return cls(model=model, name=config.name, step=step, config=to_record(config))

    @cached_property
    def identity(self) -> str:
        """A digest that differs for other weights: results of one model do not count for another."""
        record = f"{self.step} {json.dumps(self.config, sort_keys=True)}".encode()
        return hashlib.sha256(record + self.model.meta_tokens.tobytes()).hexdigest()


class Evaluator(Protocol):
    """Measures a model on some data, at some budgets. All hosts of a run call it alike, and get the same results.

    Attributes:
      name: of its files, and in front of its figures.
    """

    name: str

    def figure_names(self) -> list[str]:
        """Return the names of figures that may select the best checkpoint, all of them in `figures`."""
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
          cache: a folder for tasks that are finished, which are not evaluated again for the same model.
          progress: show bars.

        Raises:
          UserError: data that makes no sense, or a budget beyond the model's.
        """
        ...

    def figures(self, results: Results) -> Mapping[str, Mapping[str, Interval]]:
        """Return the figures of results for a run's metrics, at each budget."""
        ...

    def show(self, failures: Sequence[Failure]) -> list[FailedQuery]:
        """Look up the items of failures that `run` found.

        Raises:
          UserError: data that cannot be read again.
        """
        ...

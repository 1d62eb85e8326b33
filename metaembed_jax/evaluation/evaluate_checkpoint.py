"""Evaluate the best checkpoint of a run on the test split, or on a benchmark."""

import dataclasses
from pathlib import Path

from metaembed_jax import hosts
from metaembed_jax.checkpoints.loading import run_parameters, run_processor
from metaembed_jax.checkpoints.workdir import check_hosts_agree, check_model, read_config
from metaembed_jax.config.keys import with_keys
from metaembed_jax.config.run import RunConfig
from metaembed_jax.devices import check_devices, describe_devices
from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.benchmarks import FOLDERS, benchmark_evaluator
from metaembed_jax.evaluation.evaluator import Evaluator, Subject
from metaembed_jax.evaluation.held_out import HeldOut
from metaembed_jax.evaluation.report import TEST_SPLIT, benchmark_names, write_report
from metaembed_jax.evaluation.tables import format_tables
from metaembed_jax.files import check_bucket
from metaembed_jax.late_interaction.budgets import parse_budgets, parse_searches
from metaembed_jax.late_interaction.groups import Budget
from metaembed_jax.mesh import make_mesh
from metaembed_jax.model import MetaEmbed
from metaembed_jax.network import abstract_parameters
from metaembed_jax.network_config import model_config


def evaluate_checkpoint(
    config: RunConfig, checkpoint: Path, out: Path, budgets: str | None, benchmark: str | None = None, files: Path | None = None
) -> None:
    """Print the table of the best checkpoint, and write the report to `out`.

    Args:
      benchmark: as for `benchmark_evaluator`; None: the test split of the sources.
      files: the folder of the benchmark.

    Raises:
      UserError: no such run, a run of another model, budgets beyond the model's, or files of another benchmark.
    """
    evaluator = choose_evaluator(config, benchmark, files, budgets)
    check_devices()
    check_hosts_agree(config)
    for folder in (checkpoint, out):
        check_bucket(folder)
    run_config = read_config(checkpoint)
    if not config.model.architecture:  # the run has that of its start
        model = run_config.model
        config = with_keys(config, {"model.backbone": model.backbone, "model.architecture": model.architecture})
    check_model(checkpoint, config.model)
    mesh, network = make_mesh(**dataclasses.asdict(config.mesh)), model_config(config)
    print(describe_devices(mesh), flush=True)
    hosts.first_then_others(evaluator.check)
    abstract, frozen = abstract_parameters(network, mesh), abstract_parameters(network, mesh, config.model.frozen_dtype)
    step, parameters = run_parameters(checkpoint, config.model, abstract, frozen)
    model = MetaEmbed(network, parameters, run_processor(config, checkpoint / "tokenizer.json"), mesh)
    subject = Subject.of_run(model, config, step)
    results = evaluator.run(subject, out, progress=hosts.is_first())
    if hosts.is_first():
        write_report(evaluator, subject, results, out, benchmark_names(evaluator.name) if benchmark else TEST_SPLIT)
        print(f"\n{checkpoint}: {benchmark or 'test split'}, best checkpoint (step {step})\n{format_tables(results)}")
    hosts.wait_for_all("evaluated")


def choose_evaluator(config: RunConfig, benchmark: str | None, files: Path | None, budgets: str | None) -> Evaluator:
    """Return the evaluator that the flags name, at their budgets or at those of the config.

    Raises:
      UserError: flags that exclude each other, or budgets beyond the model's.
    """
    largest = Budget(config.model.query_tokens, config.model.document_tokens, config.model.embedding_dim)
    if benchmark is None and files is not None:
        raise UserError(
            f"--from={files}: expected with --benchmark={' or '.join(FOLDERS)} only; the test split is in config.data.dir"
        )
    if benchmark is not None and config.model.readout == "states":
        raise UserError(f"--benchmark={benchmark}: a model with config.model.readout='states' is evaluated on its test split only")
    if benchmark is None:
        return HeldOut(config.data, "test", config.objectives.budgets if budgets is None else parse_budgets(budgets, largest))
    parse = parse_budgets if benchmark in FOLDERS else parse_searches
    try:
        evaluator = benchmark_evaluator(benchmark, files, config.objectives.budgets if budgets is None else parse(budgets, largest))
        evaluator.check()
    except UserError as error:
        raise UserError(f"--benchmark={benchmark}: {error}") from error
    return evaluator

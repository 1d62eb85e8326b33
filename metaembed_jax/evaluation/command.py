"""What `eval.py` does."""

import hashlib
from pathlib import Path

from ml_collections import ConfigDict

from metaembed_jax import hosts
from metaembed_jax.checkpoints.loading import run_parameters, run_processor
from metaembed_jax.checkpoints.workdir import agree, check_model, read_config
from metaembed_jax.config import check_config, model_config
from metaembed_jax.data import sources
from metaembed_jax.devices import check_devices, describe_devices
from metaembed_jax.errors import UserError
from metaembed_jax.evaluation import run
from metaembed_jax.evaluation.budgets import parse_budgets, parse_searches
from metaembed_jax.evaluation.mmeb import run as mmeb
from metaembed_jax.evaluation.mteb import run as mteb
from metaembed_jax.evaluation.mteb import tasks
from metaembed_jax.files import check_bucket
from metaembed_jax.model import MetaEmbed
from metaembed_jax.network import abstract_parameters
from metaembed_jax.sharding import make_mesh


def evaluate_checkpoint(
    config: ConfigDict, checkpoint: Path, out: Path, budgets: str | None, benchmark: str | None = None, files: Path | None = None
) -> None:
    """Prints the table of the best checkpoint, and writes results to `out`.

    Args:
      benchmark: mmeb, on the `files` it was fetched to, or what `tasks.find` knows; None: the test split of the first source.

    Raises:
      UserError: no such run, one of another model, budgets beyond it, or files that are no such benchmark.
    """
    benchmarks = _of_mteb(benchmark, files)
    check_devices()
    agree(config)
    check_config(config)
    for folder in (checkpoint, out):
        check_bucket(folder)
    run_config = read_config(checkpoint)
    if not config.architecture:  # the run has it from what it started from
        with config.unlocked():
            config.backbone, config.architecture = run_config.backbone, run_config.architecture
    check_model(checkpoint, config)
    chosen = config.groups
    if budgets is not None:
        chosen = (parse_searches if benchmarks else parse_budgets)(budgets, (config.query_tokens, config.candidate_tokens))
    mesh, network = make_mesh(**config.mesh), model_config(config)
    print(describe_devices(mesh), flush=True)
    if benchmark is None:
        hosts.first_then_others(lambda: [sources.prepare(name, config.data.dir) for name, *_ in config.data.sources])
    abstract, frozen = abstract_parameters(network, mesh), abstract_parameters(network, mesh, config.frozen_dtype)
    step, parameters = run_parameters(checkpoint, config, abstract, frozen)
    model = MetaEmbed(network, parameters, run_processor(config, checkpoint / "tokenizer.json"), mesh)
    if benchmark is not None:
        identity = hashlib.sha256(f"{step} {config.to_json()}".encode() + model.meta_tokens.tobytes()).hexdigest()
        about = run.origin(config.name, step)
        if benchmarks:
            table = mteb.evaluate(model, identity, benchmarks, chosen, out, progress=hosts.is_first(), about=about)
        else:
            table = mmeb.evaluate(model, identity, files, chosen, out, progress=hosts.is_first(), about=about)
        if hosts.is_first():
            print(f"\n{checkpoint}: {benchmark}, best checkpoint (step {step})\n{table}")
        hosts.wait_for_all("evaluated")
        return
    results = run.evaluate(model, config, "test", chosen, progress=hosts.is_first())
    if hosts.is_first():
        print(f"\n{checkpoint}: test split, best checkpoint (step {step})\n{run.report(results, config, out, step)}")
    hosts.wait_for_all("evaluated")


def _of_mteb(benchmark: str | None, files: Path | None) -> list[tasks.Benchmark]:
    """The benchmarks of mteb that are meant: none for MMEB and the test split."""
    if benchmark == "mmeb":
        if files is None:
            raise UserError("--benchmark=mmeb: --from is missing, the folder that MMEB-eval was fetched to")
        return []
    if files is not None:
        raise UserError(f"--from={files}: is for --benchmark=mmeb; mteb fetches its own data, and the config names that of a run")
    return [] if benchmark is None else tasks.find(benchmark)

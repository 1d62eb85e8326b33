"""What `eval.py` does."""

from pathlib import Path

from ml_collections import ConfigDict

from metaembed_jax.checkpoints.runs import RunCheckpoints
from metaembed_jax.config import check_config, model_config
from metaembed_jax.data import sources
from metaembed_jax.errors import UserError
from metaembed_jax.evaluation import run
from metaembed_jax.evaluation.sweep import parse_budgets
from metaembed_jax.model import MetaEmbed
from metaembed_jax.sharding import make_mesh
from metaembed_jax.training.loop import make_processor
from metaembed_jax.training.step import make_trainer
from metaembed_jax.training.workdir import read_config


def evaluate_checkpoint(config: ConfigDict, checkpoint: Path, out: Path, budgets: str | None) -> None:
    """Prints the table of the best checkpoint's test split, and writes results.json and quality.png to `out`.

    Raises:
      UserError: no such run, one of another model, or budgets beyond it.
    """
    check_config(config)
    read_config(checkpoint)
    chosen = config.groups
    if budgets is not None:
        chosen = parse_budgets(budgets, (config.query_tokens, config.candidate_tokens))
    mesh = make_mesh(**config.mesh)
    checkpoints = RunCheckpoints(checkpoint)
    step = checkpoints.best_step()
    if step is None:
        raise UserError(f"{checkpoint} has no checkpoint yet: train it with python train.py --workdir={checkpoint}")
    for name, _ in config.data.sources:
        sources.prepare(name, config.data.dir)
    parameters = checkpoints.restore_parameters(step, make_trainer(config, mesh).abstract.parameters)
    model = MetaEmbed(model_config(config), parameters, make_processor(config, checkpoint / "tokenizer.json"), mesh)
    results = run.evaluate(model, config, "test", chosen, progress=True)
    print(f"\n{checkpoint}: test split, best checkpoint (step {step})\n{run.report(results, config, out, step)}")

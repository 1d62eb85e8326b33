"""Evaluates a run on its test split, `python eval.py --config=configs/tiny.py --checkpoint=runs/tiny`, or on a benchmark,
`--benchmark=mmeb --from=MMEB-eval` or `--benchmark=vidore`."""

from collections.abc import Sequence

from metaembed_jax import hosts
from metaembed_jax.config import load_config
from metaembed_jax.evaluation.command import evaluate_checkpoint
from metaembed_jax.flags import Parser, any_path, local_path, parse, run_main
from metaembed_jax.startup import add_device_flags, add_host_flags, start
from metaembed_jax.votes import stop_signal


def main(argv: Sequence[str]) -> None:
    """Flags in, one call out."""
    parser = Parser(prog="eval.py", description=__doc__)
    parser.add_argument("--checkpoint", type=any_path, required=True, help="a run of train.py; its best checkpoint is read")
    parser.add_argument(
        "--out", type=any_path, help="where results.json, quality.png and report.html go (default: <checkpoint>/eval)"
    )
    parser.add_argument(
        "--budgets",
        help="pairs r_q:r_c, such as 1:1,4:8,16:64; the config's groups by default. For mteb also stages, 1:1:1000>16:64",
    )
    parser.add_argument("--benchmark", help="mmeb; vidore, or any benchmark or task of mteb; by default the test split")
    parser.add_argument("--from", dest="files", type=local_path, help="the folder that the files of mmeb were fetched to")
    add_device_flags(parser)
    add_host_flags(parser)
    arguments = parse(parser, argv)
    start(arguments)
    with hosts.speaking_once(), stop_signal() as stop, stop.at_once():
        config = load_config(arguments.config, arguments.overrides)
        out = arguments.out or arguments.checkpoint / "eval"
        evaluate_checkpoint(config, arguments.checkpoint, out, arguments.budgets, arguments.benchmark, arguments.files)


if __name__ == "__main__":
    run_main(main)

# SPDX-License-Identifier: Apache-2.0
"""Command line: ``python -m grng compare | tune | plot | info``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from grng.compare.errors import UsageError

EXIT_USAGE = 2
_EXTRAS = ("rich", "matplotlib")
_OPTIMIZERS = "ring,adamw,sgd"


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument as one line; the whole usage is what ``--help`` is for."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the defaults, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _add_compare(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "compare",
        help="train the same model with several optimizers and compare them",
        description="Trains the same model from the same weights on the same batches with each "
        "optimizer; prints a table and writes JSON and plots.",
        epilog="An optimizer is NAME or NAME:KEY=VALUE:KEY=VALUE, for example adamw:lr=3e-4; "
        "adamw:lr=1e-4|3e-4 is two of them; `python -m grng info` lists names and keys. Exit codes: "
        "0 all runs finished, 1 a run diverged or the data is missing, 2 wrong argument or a missing "
        "package, 130 interrupted.",
        formatter_class=_Formatter,
    )
    add = parser.add_argument
    add(
        "--task",
        default="fashion-mnist",
        help="data set, or an environment of reinforcement learning: cartpole, acrobot, hopper, ...; "
        "there the defaults are 100,000 --steps, 50 --checkpoints, --hidden 64,64",
    )
    add(
        "--optimizers",
        metavar="SPECS",
        help="comma-separated (default: " + _OPTIMIZERS + "; of environments rank1,rmsprop,adamw)",
    )
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, default=0, help="weights and order of the batches")
    seeds.add_argument("--seeds", metavar="S,S,...", help="several seeds: mean and spread")
    add(
        "--reference",
        default="adamw",
        metavar="SPEC",
        help="in what part of its steps do the others reach its final values? one of --optimizers, or "
        "a name: the best of its specs",
    )
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument("--out", type=Path, default=Path("results"), help="folder for the results")
    folder.add_argument(
        "--into",
        type=Path,
        metavar="FOLDER",
        help="write into this folder and not into a new one; what was interrupted there is gone on with, "
        "by the same options",
    )
    _add_runs(parser)


def _add_runs(parser: argparse.ArgumentParser) -> None:
    """Options of how a model is trained, whatever for."""
    add = parser.add_argument
    add(
        "--model",
        help="for fashion-mnist mlp (the default), resnet or vit; for authors and plays minilm (with LoRA, "
        "the default), minilm-full (all its weights) or minilm-scratch (fresh weights); others have one",
    )
    add("--epochs", type=int, help="passes over the training set (default: 10)")
    add("--steps", type=int, metavar="N", help="train for N steps instead of whole epochs")
    add(
        "--stream",
        type=int,
        metavar="N",
        help="learn online instead: one pass over N training samples, one at a time, each predicted "
        "before it is learned from",
    )
    add("--batch-size", type=int, help="samples per step (default: 256)")
    add(
        "--hidden",
        metavar="N,N,...",
        help="sizes of the hidden layers of an mlp (default: the task's)",
    )
    add("--lora-rank", type=int, metavar="R", help="rank of the LoRA matrices (default: 8)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    add("--threads", type=int, help="CPU threads of torch")
    add("--warmup-fraction", type=float, default=0.05, help="part of the steps with rising lr")
    add("--schedule", help="of the lr: cosine or constant (default: cosine, in a stream constant)")
    add("--train-limit", type=int, metavar="N", help="use only the first N training samples")
    add(
        "--per-class",
        type=int,
        metavar="K",
        help="use only the first K training samples of each class",
    )
    add(
        "--validation",
        type=int,
        metavar="N",
        help="training samples held out: of several specs of an optimizer, the best on them is "
        "marked and only its test results are shown (default: the task's)",
    )
    add(
        "--checkpoints",
        type=int,
        metavar="N",
        help="evaluations, evenly spaced (default: epochs; of --steps or --stream 10)",
    )
    add(
        "--data-dir",
        type=Path,
        help="folder of the data files, kept there once fetched; for the tasks of the papers FOLDER/TASK "
        "and FOLDER/models (see the README)",
    )
    add("--no-progress", action="store_true", help="print only the table")


def _add_tune(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "tune",
        help="search for the settings of an optimizer",
        description="Trains the same model with different settings of one optimizer, each chosen by "
        "Optuna from the results so far on held-out samples; the first are the defaults. The test set "
        "is not looked at, unless --seeds asks for runs of the best settings and of the defaults "
        "afterwards. The same command goes on with a search that was interrupted.",
        epilog="Exit codes: 0 done, 1 no trial finished or the data is missing, 2 wrong argument or a "
        "missing package, 130 interrupted.",
        formatter_class=_Formatter,
    )
    add = parser.add_argument
    add("--task", default="fashion-mnist", help="data set")
    add("--optimizer", required=True, metavar="NAME", help="one of those of `python -m grng info`")
    add("--budget", type=int, default=12, metavar="B", help="trials, the defaults among them")
    add(
        "--space",
        metavar="SPACE",
        help='where to search, for example "lr=1e-4..1e-1:weight_decay=0|0.1"; ranges are '
        "logarithmic (default: of each optimizer a factor of 1,000 around its learning rate, or "
        "what it has instead, and three values of another option)",
    )
    add("--seed", type=int, default=100, help="of the search, of weights and order of the batches")
    add(
        "--seeds",
        metavar="S,S,...",
        help="then train the best settings and the defaults with these, and look at the test set",
    )
    add("--out", type=Path, help="folder of the result (default: results/tune-TASK-OPTIMIZER)")
    _add_runs(parser)


def _add_plot(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser("plot", help="draw the plots of saved results again")
    parser.add_argument(
        "results",
        nargs="+",
        type=Path,
        metavar="RESULT",
        help="a result.json, tune.json or study.json, its folder, or a folder above many",
    )


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(prog="python -m grng", description="Natural-gradient optimizers for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    _add_compare(commands)
    _add_tune(commands)
    _add_plot(commands)
    commands.add_parser("info", help="versions, devices, kernel backends, optimizers, tasks")
    return parser


def _require(*modules: str, extra: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f'needs {" and ".join(missing)}: pip install "grng-kernels[{extra}]"')


def _dispatch(arguments: argparse.Namespace, argv: list[str]) -> int:
    if arguments.command == "info":
        from grng.compare.info import lines

        print("\n".join(lines()))
        return 0
    _require(*_EXTRAS, extra="compare")
    # Only now: importing grng must need neither rich nor matplotlib.
    from grng.compare import cli
    from grng.rl.environments import TASKS, find_task

    if arguments.command == "plot":
        return cli.plot(arguments)
    if arguments.command == "tune":
        _require("optuna", extra="tune")
        from grng.tune import cli as tuning

        return tuning.tune(arguments, argv)
    task = find_task(arguments.task)
    if task in TASKS.values():
        _require("gymnasium", extra=task.extra)
        from grng.rl.compare import cli as rl

        return rl.compare(arguments, argv)
    arguments.optimizers = arguments.optimizers or _OPTIMIZERS
    return cli.compare(arguments, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program's name; those of the process if None.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    command = given[0] if given and not given[0].startswith("-") else ""
    try:
        return _dispatch(build_parser().parse_args(given), given)
    except UsageError as error:
        print(f"grng {command}".rstrip() + f": error: {error}", file=sys.stderr)
        return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())

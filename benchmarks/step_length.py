# SPDX-License-Identifier: Apache-2.0
"""Rules for the length of RING's step on four models, at equal steps and schedules.

``step_length.py --models mlp,resnet,vit,plays --seeds 3,4 --rules all``: the runs that the result does not
hold yet, one after another. ``plot_step_length.py`` draws them. The rules are in ``step_lengths/``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from step_lengths import rules, study
from step_lengths.store import Store

from grng.compare import environment
from grng.tasks import LoadRequest

OUT = Path(__file__).resolve().parent / "results" / "step-length"


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--models", default=",".join(study.MODELS), help="of: %(default)s")
    add("--seeds", default="3,4", help="comma-separated (default: %(default)s)")
    names = ", ".join([*rules.GROUPS, *rules.ALL])
    add("--rules", default="all", help=f"comma-separated, of: {names}")
    add("--out", type=Path, default=OUT, help="folder of the results")
    add("--steps", type=int, help="of each run, in place of the model's own")
    add("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    add("--train-limit", type=int, help="use only so many training samples")
    add("--data-dir", type=Path, help="folder with the data, as for grng compare")
    options = parser.parse_args(given)
    try:
        options.models = options.models.split(",")
        unknown = [name for name in options.models if name not in study.MODELS]
        if unknown:
            raise ValueError(f"unknown model {unknown[0]!r}; valid: {', '.join(study.MODELS)}")
        options.seeds = [int(seed) for seed in options.seeds.split(",")]
        options.rules = rules.chosen(options.rules)
        if options.steps is not None and options.steps < 1:
            raise ValueError(f"--steps must be at least 1, got {options.steps}")
    except ValueError as error:
        parser.error(str(error))
    return options


def main(given: Sequence[str] | None = None) -> None:
    """Run the program."""
    options = _arguments(given)
    torch.set_num_threads(options.threads)
    device = torch.device("cpu")
    for name in options.models:
        config = study.settings(name, steps=options.steps, train_limit=options.train_limit)
        store = Store(options.out, name)
        wanted = [
            (rule, seed)
            for seed in options.seeds
            for rule in options.rules
            if not store.has(rule.label, seed, config.steps, study.run_settings(rule, config))
        ]
        print(f"{name}: {len(wanted)} runs of {config.steps} steps to go", flush=True)
        if not wanted:
            continue
        data = config.task_entry.load(
            LoadRequest(
                device=device,
                data_dir=options.data_dir,
                train_limit=options.train_limit,
                validation=config.held_out,
            )
        )
        about = {
            "model": name,
            "task": config.task,
            "network": config.model_entry.describe(config.model_options),
            "batch_size": config.batch_size,
            "train_samples": len(data.train_labels),
            "chance": study.chance(data),
            "environment": environment.describe(device),
        }
        for rule, seed in wanted:
            start = time.perf_counter()
            run = study.run(rule, seed, config, data)
            store.add(about, run)
            print(_line(name, run, time.perf_counter() - start), flush=True)


def _line(name: str, run: dict, seconds: float) -> str:
    loss, accuracy = study.final_loss(run), study.final_accuracy(run)
    ended = "diverged" if loss is None else f"loss {loss:.4f}  test {accuracy:.4f}"
    return f"{name}  seed {run['seed']}  {run['rule']:<26}  {ended}  {seconds:.0f} s"


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""The search: Optuna proposes, the training loop of the comparison answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

from grng.compare.config import CompareConfig
from grng.compare.optimizers import OptionValue, parse_spec
from grng.compare.records import FINISHED, RunRecord
from grng.compare.runs import execute
from grng.tasks import ClassificationData
from grng.tune.records import Trial, TuningResult
from grng.tune.space import Choice, Range, Space, every_setting, spec_text

# Drawn at random before the model of the results takes over, the defaults among them. Not a part of the
# budget: a search that is given more goes on with the trials that it has.
_RANDOM = 5
# A setting that was tried says nothing new: another is asked for, so many times.
_ATTEMPTS = 100


def propose(
    space: Space,
    defaults: Mapping[str, OptionValue],
    seed: int,
    past: Sequence[tuple[Mapping[str, OptionValue], float]],
) -> dict[str, OptionValue] | None:
    """Return the options of the next trial, others than all before; None where the space has no more.

    The first are the defaults, where the space has them; then some at random, then those of Optuna's
    tree-structured Parzen estimator. The answer depends on the arguments alone, so that a search that is
    interrupted goes on as if it had not been.

    Args:
        space: Where to look.
        defaults: The optimizer's own values of these options.
        seed: Of the search.
        past: Options and score of the trials so far; higher is better, minus infinity for none.
    """
    import optuna

    if not past and all(defaults.get(key) in values for key, values in space.items()):
        return {key: defaults[key] for key in space}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(
        # Of each trial its own, and of neighbouring seeds others.
        seed=(seed * 1_000_003 + len(past)) % 2**32,
        n_startup_trials=_RANDOM,
    )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    distributions = {key: _distribution(values) for key, values in space.items()}
    for options, score in past:
        known = {key: _to_optuna(values, options[key]) for key, values in space.items()}
        study.add_trial(
            optuna.trial.create_trial(params=known, distributions=distributions, value=score)
        )
    tried = [dict(options) for options, _ in past]
    for _ in range(_ATTEMPTS):
        found = study.ask(distributions).params
        proposed = {key: _from_optuna(values, found[key]) for key, values in space.items()}
        if proposed not in tried:
            return proposed
    # Where all are choices, it is known what is left.
    return next((left for left in every_setting(space) if left not in tried), None)


def _to_optuna(values: Range | Choice, value: Any) -> Any:
    return value if isinstance(values, Range) else values.values.index(value)


def _from_optuna(values: Range | Choice, found: Any) -> OptionValue:
    return values.round(found) if isinstance(values, Range) else values.values[found]


def _distribution(values: Range | Choice) -> Any:
    import optuna

    if isinstance(values, Range):
        return optuna.distributions.FloatDistribution(values.low, values.high, log=True)
    # Places, not values: Optuna takes no tuples.
    return optuna.distributions.CategoricalDistribution(range(len(values.values)))


class Watch(Protocol):
    """What sees how a trial goes on."""

    def run(self, record: RunRecord) -> AbstractContextManager[None]:
        """Surrounds a trial."""

    def step(self, record: RunRecord) -> None:
        """Is called after each step."""


def _nothing() -> None:
    pass


def search(
    optimizer: str,
    space: Space,
    budget: int,
    config: CompareConfig,
    data: ClassificationData,
    result: TuningResult,
    defaults: Mapping[str, OptionValue],
    on_trial: Callable[[Trial], None],
    watch: Watch,
) -> None:
    """Make the trials that are missing, with the first seed of the settings; fewer where the space ends.

    Args:
        optimizer: Its name.
        space: Where to look.
        budget: Trials in all, those that ``result`` has among them.
        config: Of the runs.
        data: Of which the test samples are not looked at.
        result: Gets the trials.
        defaults: The optimizer's own values.
        on_trial: Called after each.
        watch: Sees how a trial goes on.
    """
    seed = config.seeds[0]
    # Settings are chosen on held-out training samples: nobody sees the test set here, not even by accident.
    unseen = dataclasses.replace(
        data, test_inputs=data.test_inputs[:0], test_labels=data.test_labels[:0]
    )
    while len(result.trials) < budget:
        past = [(trial.options, result.score(trial)) for trial in result.trials]
        options = propose(space, defaults, seed, past)
        if options is None:
            break
        spec = parse_spec(spec_text(optimizer, options))
        spec = spec.for_likelihood(config.task_entry.likelihood)
        record = RunRecord(spec.label, seed)
        with watch.run(record):
            execute(spec, record, config, unseen, partial(watch.step, record), _nothing)
        trial = Trial(
            number=len(result.trials),
            optimizer=spec.label,
            options=options,
            status=record.status,
            values=[config.measure.of(epoch) for epoch in record.epochs],
            steps=[epoch.step for epoch in record.epochs],
            seconds=round(record.train_seconds, 3),
            divergence=record.divergence,
        )
        result.trials.append(trial)
        on_trial(trial)
    result.status = FINISHED

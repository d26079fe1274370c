# SPDX-License-Identifier: Apache-2.0
"""The runs of the study: the tasks, the loop, the schedule and the records of ``grng compare``."""

from __future__ import annotations

import functools
import math
import statistics
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grng.compare import environment
from grng.compare.config import CompareConfig
from grng.compare.records import DIVERGED, FINISHED, Divergence, RunRecord
from grng.compare.runs import build_model, weights_sha256
from grng.compare.training import NonFiniteError, Trainer, learning_rate
from grng.tasks import ClassificationData
from step_lengths.grafting import AdaptiveDamping, loss_on
from step_lengths.rules import Rule

# Part of the steps, at the end, whose mean loss is the final one.
FINAL_PART = 0.1
_SHARED = dict(
    epochs=1,
    seeds=(0,),
    hidden=None,
    device="cpu",
    threads=None,
    warmup_fraction=0.05,
    train_limit=None,
    # One evaluation, at the end.
    checkpoints=1,
)
MODELS: dict[str, CompareConfig] = {
    "mlp": CompareConfig(task="fashion-mnist", model="mlp", batch_size=256, steps=300, **_SHARED),
    "resnet": CompareConfig(
        task="fashion-mnist", model="resnet", batch_size=64, steps=120, **_SHARED
    ),
    "vit": CompareConfig(task="fashion-mnist", model="vit", batch_size=64, steps=200, **_SHARED),
    "plays": CompareConfig(task="plays", batch_size=32, steps=100, **_SHARED),
}
TITLES = {
    "mlp": "Fashion-MNIST, MLP",
    "resnet": "Fashion-MNIST, ResNet",
    "vit": "Fashion-MNIST, ViT",
    "plays": "Plays, MiniLM + LoRA",
}


class StudyTrainer(Trainer):
    """The loop of ``grng compare``, which shows the batch to a rule that judges its steps."""

    def _step(self, inputs: Tensor, labels: Tensor) -> None:
        if isinstance(self._optimizer, AdaptiveDamping):
            self._optimizer.batch_loss = functools.partial(loss_on, self._model, inputs, labels)
        super()._step(inputs, labels)


def settings(name: str, *, steps: int | None, train_limit: int | None) -> CompareConfig:
    """Task, model and budget by the name of the model."""
    config = MODELS[name]
    return replace(config, steps=steps or config.steps, train_limit=train_limit)


def run(rule: Rule, seed: int, config: CompareConfig, data: ClassificationData) -> dict[str, Any]:
    """Train once, and return what is kept of it, fit for JSON."""
    record = RunRecord(rule.label, seed)
    model = build_model(config, seed, data.train_inputs.device)
    record.initial_weights_sha256 = weights_sha256(model)
    optimizer = rule.build(model)
    trainer = StudyTrainer(record, model, optimizer, data, config, protocol=rule.protocol)
    try:
        trainer.train(lambda: None, lambda: None)
        record.status = FINISHED
    # As in grng compare: what torch and the optimizers raise when their numbers fail.
    except (ArithmeticError, RuntimeError) as error:
        bad = error
        if not isinstance(bad, NonFiniteError):
            rate = learning_rate(optimizer)
            bad = NonFiniteError(len(record.step_loss) + 1, str(error), rate)
        last = record.step_loss[-1] if record.step_loss else None
        record.status = DIVERGED
        record.divergence = Divergence(bad.step, bad.what, bad.lr, last)
    # Thousands of digits that nobody reads; the mean is in ms_per_step.
    record.step_seconds = []
    return {
        "rule": rule.label,
        "seed": seed,
        "steps": config.steps,
        "settings": run_settings(rule, config),
        "rate": _rate(rule, optimizer),
        "git": environment.git_state(),
        "noted": summary(getattr(optimizer, "noted", {})),
        "record": record.to_json(),
    }


def run_settings(rule: Rule, config: CompareConfig) -> dict[str, Any]:
    """What a run with the same rule, seed and steps must have in common to be the same run."""
    return {
        **rule.settings(),
        "train_limit": config.train_limit,
        "batch_size": config.batch_size,
        "warmup_fraction": config.warmup_fraction,
    }


def _rate(rule: Rule, optimizer: torch.optim.Optimizer) -> float:
    return float(rule.options.get("lr", optimizer.defaults["lr"]))


def summary(noted: dict[str, list[float]]) -> dict[str, Any]:
    """What a run noted, in numbers; None where it noted nothing."""

    def of(function: Any, values: list[float]) -> float | None:
        finite = [x for x in values if math.isfinite(x)]
        return float(f"{function(finite):.4g}") if finite else None

    found: dict[str, Any] = {
        "kept_mean": of(statistics.fmean, noted.get("kept", [])),
        "kl_largest": of(max, noted.get("kl", [])),
        "form_ratio_median": of(statistics.median, noted.get("form_ratio", [])),
        "form_ratio_largest": of(max, noted.get("form_ratio", [])),
    }
    if "rho" in noted:
        found["rho_last"] = of(lambda x: x[-1], noted["rho"])
        found["reduction_ratio_median"] = of(statistics.median, noted["reduction_ratio"])
    return found


def final_loss(run: dict[str, Any]) -> float | None:
    """Mean training loss of the last tenth of the planned steps; None if the run ended before."""
    losses = run["record"]["step_loss"]
    if run["record"]["status"] != FINISHED:
        return None
    return statistics.fmean(losses[-max(1, round(FINAL_PART * len(losses))) :])


def final_accuracy(run: dict[str, Any]) -> float | None:
    """Test accuracy at the end; None if the run ended before."""
    epochs = run["record"]["epochs"]
    return epochs[-1]["test_accuracy"] if run["record"]["status"] == FINISHED else None


def chance(data: ClassificationData) -> float:
    """Accuracy that a constant prediction reaches, two standard errors up: at most this is a collapse."""
    labels = data.test_labels.flatten()
    share = float(torch.bincount(labels).max()) / len(labels)
    return share + 2 * math.sqrt(share * (1 - share) / len(labels))


def has_collapsed(run: dict[str, Any], at_most: float) -> bool:
    """Whether a run ended early, or where a constant prediction would be as good."""
    accuracy = final_accuracy(run)
    return accuracy is None or accuracy <= at_most

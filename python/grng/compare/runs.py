# SPDX-License-Identifier: Apache-2.0
"""One run: same weights and batches for every optimizer, warm-up steps, memory, how it ended."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import grng
from grng.compare.config import CompareConfig
from grng.compare.memory import PeakMemory, state_bytes
from grng.compare.optimizers import OptimizerSpec
from grng.compare.protocols import take_step
from grng.compare.records import DIVERGED, FINISHED, Divergence, RunRecord
from grng.compare.training import NonFiniteError, Trainer, learning_rate
from grng.tasks import ClassificationData

_PREPARATION_STEPS = 3
# Small enough to change nothing, large enough to take the usual code path.
_PREPARATION_LR = 1e-8


def _numerical_errors() -> tuple[type[Exception], ...]:
    """What an optimizer may raise when its numbers fail, besides letting the loss become NaN.

    torch reports a number that leaves its dtype as a plain RuntimeError.
    """
    raised_by_grng = getattr(grng, "PreconditionerError", None)
    common: tuple[type[Exception], ...] = (ArithmeticError, RuntimeError)
    return common if raised_by_grng is None else (*common, raised_by_grng)


def build_model(config: CompareConfig, seed: int, device: torch.device) -> nn.Module:
    """The model of the task with the weights of this seed, drawn on the CPU for every device.

    Args:
        config: Task and options of the model.
        seed: Seeds torch's global generators.
        device: Where the model goes.

    Returns:
        The model.
    """
    torch.manual_seed(seed)
    return config.model_entry.build(config.model_options).to(device)


def weights_sha256(model: nn.Module) -> str:
    """Checksum of all parameters."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def _prepare(spec: OptimizerSpec, config: CompareConfig, data: ClassificationData) -> None:
    """Throw-away steps: what happens only once in a process must not be charged to a run."""
    model = build_model(config, 0, data.device)
    optimizer = spec.build(model)
    for group in optimizer.param_groups:
        if "lr" in group:
            group["lr"] = _PREPARATION_LR
    inputs = data.train_inputs[: config.batch_size].to(data.device)
    labels = data.train_labels[: config.batch_size]
    protocol, likelihood = spec.entry.protocol, config.task_entry.likelihood
    for _ in range(_PREPARATION_STEPS):
        take_step(model, optimizer, protocol, inputs, labels, lambda: None, likelihood=likelihood)


def _jsonable(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, torch.Tensor):
        return _jsonable(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if hasattr(value, "_asdict"):
        return _jsonable(value._asdict())
    return type(value).__name__


def _diagnostics(optimizer: torch.optim.Optimizer) -> Any:
    ask = getattr(optimizer, "diagnostics", None)
    return _jsonable(ask()) if callable(ask) else None


def execute(
    spec: OptimizerSpec,
    record: RunRecord,
    config: CompareConfig,
    data: ClassificationData,
    on_step: Callable[[], None],
    on_epoch: Callable[[], None],
) -> None:
    """Trains from this seed's weights to the end, and writes into ``record`` how it went.

    Args:
        spec: The optimizer.
        record: Filled as the run goes on.
        config: Shared settings.
        data: Training and test set.
        on_step: Called after each step.
        on_epoch: Called after each epoch.
    """
    device = data.device
    numerical_errors = _numerical_errors()
    try:
        _prepare(spec, config, data)
    except numerical_errors:
        # The run itself will meet the same trouble and report it with its step.
        pass
    model = build_model(config, record.seed, device)
    record.initial_weights_sha256 = weights_sha256(model)
    optimizer = spec.build(model)
    peak = PeakMemory(device)
    trainer = Trainer(record, model, optimizer, data, config, protocol=spec.entry.protocol)

    def finish_epoch() -> None:
        record.peak_memory_bytes = peak.read()
        record.optimizer_state_bytes = state_bytes(optimizer)
        on_epoch()

    try:
        trainer.train(on_step, finish_epoch)
        record.status = FINISHED
    except numerical_errors as error:
        lr = learning_rate(optimizer)
        if not isinstance(error, NonFiniteError):
            error = NonFiniteError(len(record.step_loss) + 1, str(error), lr)
        record.status = DIVERGED
        record.peak_memory_bytes = peak.read()
        record.optimizer_state_bytes = state_bytes(optimizer)
        record.divergence = Divergence(
            step=error.step,
            what=error.what,
            lr=error.lr,
            last_finite_loss=record.step_loss[-1] if record.step_loss else None,
            diagnostics=_diagnostics(optimizer),
        )


def check_specs(
    specs: list[OptimizerSpec], config: CompareConfig, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Builds every optimizer once, so that a wrong value is reported before the first run.

    Args:
        specs: The optimizers.
        config: Task and options of the model.
        device: Device of the runs.

    Returns:
        The hyper-parameters in force, by label.
    """
    resolved = {}
    for spec in specs:
        model = build_model(config, 0, device)
        resolved[spec.label] = spec.hyperparameters(spec.build(model))
    return resolved


def parameter_counts(config: CompareConfig) -> tuple[int, int]:
    """Numbers of all parameters of the model and of those that are trained."""
    parameters = list(build_model(config, 0, torch.device("cpu")).parameters())
    trained = (parameter.numel() for parameter in parameters if parameter.requires_grad)
    return sum(parameter.numel() for parameter in parameters), sum(trained)

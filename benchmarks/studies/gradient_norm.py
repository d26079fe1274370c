# SPDX-License-Identifier: Apache-2.0
"""The norm of the gradient along the way, and how sharp the minimum is that was found.

The trace of the Hessian is an estimate from a few random vectors, drawn with the seed of the run: its spread
over the seeds includes the noise of the estimate.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import nn

from grng.compare.config import CompareConfig
from grng.studies.records import Panel, Value
from studies.definition import Definition, Measured, Options, Planned
from studies.measures import gradient_norm, hessian, mean_loss
from studies.training import about, copied, data_of, fashion_mnist, train

# Training samples that gradient and Hessian are of: the same for all.
_SAMPLES, _CURVED = 2000, 500
_LOOKS = 20
OPTIMIZERS = {
    "adamw": "adamw:lr=3e-3",
    "sgd": "sgd:lr=0.1",
    "ring": "ring",
    "reng": "reng",
    "reng:rho_gr=0.1": "reng:rho_gr=0.1",
    "sophiag": "sophiag",
}
MODELS = {
    "mlp": dict(batch_size=256, steps=645),
    "resnet": dict(batch_size=64, steps=200),
}


def _config(model: str, options: Options) -> CompareConfig:
    own = MODELS[model]
    return fashion_mnist(model, own["batch_size"], own["steps"], is_quick=options.is_quick)


def _run(name: str, model: str, options: Options, seed: int) -> Measured:
    config = _config(model, options)
    assert config.steps is not None, "the settings have a number of steps"
    data = data_of(config, options.data_dir, is_quick=options.is_quick)
    inputs, labels = data.train_inputs[:_SAMPLES], data.train_labels[:_SAMPLES]
    looks = {max(1, round(config.steps * n / _LOOKS)) for n in range(1, _LOOKS + 1)}
    points: list[dict[str, Value]] = []

    def watch(step: int, module: nn.Module) -> None:
        if step in looks:
            twin = copied(module, config)
            norm = gradient_norm(twin, inputs, labels)
            loss = float(mean_loss(twin, inputs, labels).detach())
            points.append({"step": step, "gradient_norm": norm, "loss": loss})

    found = train(OPTIMIZERS[name], config, seed, data, watch=watch)
    few, effort = (50, dict(iterations=3, probes=2)) if options.is_quick else (_CURVED, {})
    eigenvalue, trace = hessian(
        copied(found.model, config), inputs[:few], labels[:few], seed, **effort
    )
    accuracy = found.record.epochs[-1].test_accuracy
    points[-1] |= {
        "optimizer": name,
        "eigenvalue": eigenvalue,
        "trace": trace,
        "test_accuracy": None if accuracy is None else 100 * accuracy,
        "mean_gradient_norm": sum(float(p["gradient_norm"] or 0) for p in points) / len(points),
        "ms_per_step": found.ms_per_step,
    }
    return Measured(points, found.record.train_seconds)


def _plan(model: str, options: Options) -> Iterator[Planned]:
    for seed in options.seeds:
        for name in OPTIMIZERS:
            yield Planned(name, "", seed, functools.partial(_run, name, model, options, seed))


def _about(model: str, options: Options) -> dict[str, Any]:
    return {
        **about(_config(model, options)),
        "optimizers": OPTIMIZERS,
        "gradient_samples": _SAMPLES,
        "hessian_samples": _CURVED,
    }


_ALONG = dict(x="step", x_label="step", y_scale="log")
_END = dict(x="optimizer", x_label="", x_scale="category")
# Curvature may be negative.
_CURVATURE = dict(**_END, y_scale="symlog")


def _study(model: str, subtitle: str) -> Definition:
    return Definition(
        name=f"gradient-norm-{model}",
        title="The gradient along the way, and how sharp the end is",
        subtitle=f"{subtitle}  ·  of 2,000 training samples, the Hessian of 500",
        panels=(
            Panel(y="gradient_norm", title="Norm of the gradient", y_label="norm", **_ALONG),
            Panel(y="loss", title="Training loss", y_label="cross entropy", **_ALONG),
            Panel(y="eigenvalue", title="Largest eigenvalue at the end", y_label="", **_CURVATURE),
            Panel(y="trace", title="Trace of the Hessian at the end", y_label="", **_CURVATURE),
            Panel(
                y="ms_per_step",
                title="Time of a step",
                y_label="milliseconds",
                y_scale="log",
                **_END,
            ),
        ),
        config=functools.partial(_about, model),
        plan=functools.partial(_plan, model),
    )


MLP = _study("mlp", "MLP 784-256-256-10, Fashion-MNIST, 645 steps of 256")
RESNET = _study("resnet", "ResNet, Fashion-MNIST, 200 steps of 64")

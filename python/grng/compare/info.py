# SPDX-License-Identifier: Apache-2.0
"""``python -m grng info``: versions, devices, kernel backends, optimizers and tasks."""

from __future__ import annotations

import importlib

import torch

from grng.compare import environment
from grng.compare.errors import UsageError
from grng.compare.optimizers import OPTIMIZERS, valid_options
from grng.rl.compare.methods import NAMES as METHODS
from grng.rl.compare.methods import valid_options as valid_method_options
from grng.rl.environments import TASKS as ENVIRONMENTS
from grng.rl.errors import EnvironmentUnavailable
from grng.tasks import TASKS


def _backends() -> list[str]:
    try:
        kernels = importlib.import_module("grng_kernels")
        found = kernels.backends()
    except (ImportError, AttributeError) as error:
        return [f"  not available: {error}"]
    report = []
    for name, status in found.items():
        state = "available" if status.available else "not available"
        report.append(f"  {name}: {state}: {status.reason}")
    return report


def lines() -> list[str]:
    """The report, line by line."""
    report = ["versions"]
    for name, version in environment.versions().items():
        report.append(f"  {name}: {version or 'none'}")
    report += ["devices", f"  cpu: {environment.processor()}, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        report.append(f"  cuda:{index}: {torch.cuda.get_device_name(index)}")
    report += ["kernel backends", *_backends(), "optimizers"]
    for name, entry in OPTIMIZERS.items():
        try:
            options = ", ".join(valid_options(name))
        except UsageError as error:
            options = str(error)
        report.append(f"  {name}: {entry.description}; options: {options}")
    report.append("tasks")
    for name, task in TASKS.items():
        report.append(f"  {name}: {task.description}; models: {', '.join(task.models)}")
    report.append("optimizers of reinforcement learning")
    for name in METHODS:
        try:
            options = ", ".join(valid_method_options(name))
        except EnvironmentUnavailable as error:
            options = str(error)
        report.append(f"  {name}: options: {options}")
    report.append("environments of reinforcement learning")
    for name, environment_of in ENVIRONMENTS.items():
        report.append(f"  {name}: {environment_of.title}; extra: {environment_of.extra}")
    return report

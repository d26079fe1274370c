# SPDX-License-Identifier: Apache-2.0
"""The settings, the data and the command of a comparison as its result has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from grng.compare.config import CompareConfig
from grng.compare.memory import peak_memory_kind
from grng.compare.optimizers import OptimizerSpec
from grng.compare.runs import parameter_counts
from grng.tasks import ClassificationData

_SCHEDULES = {
    "cosine": "linear warm-up, then cosine to zero",
    "constant": "constant learning rate",
}


def without_paths(argv: list[str]) -> list[str]:
    """The arguments with folders of this machine replaced by the name of their option."""
    cleaned: list[str] = []
    for argument in argv:
        option, has_value, value = argument.partition("=")
        if has_value and option.startswith("--") and Path(value).expanduser().is_absolute():
            cleaned.append(f"{option}=<{option.lstrip('-')}>")
        elif Path(argument).expanduser().is_absolute():
            cleaned.append(f"<{cleaned[-1].lstrip('-')}>" if cleaned else "<path>")
        else:
            cleaned.append(argument)
    return cleaned


def describe_config(
    config: CompareConfig, specs: list[OptimizerSpec], resolved: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The settings as a result has them.

    Args:
        config: The settings.
        specs: The optimizers.
        resolved: Their hyper-parameters, by label.

    Returns:
        Objects fit for JSON.
    """
    parameters, trained = parameter_counts(config)
    return {
        "task": config.task,
        "mode": {"epoch": "epochs", "step": "steps", "sample": "stream"}[config.counts],
        "optimizers": [
            {
                "label": spec.label,
                "name": spec.name,
                "options": {key: _plain(value) for key, value in spec.options.items()},
                "hyperparameters": resolved[spec.label],
            }
            for spec in specs
        ],
        "epochs": config.epochs if config.steps is None else None,
        "steps": config.steps,
        "seeds": list(config.seeds),
        "batch_size": config.batch_size,
        "stream": config.stream,
        "checkpoints": config.checkpoints,
        "reference": config.reference,
        "measure": config.measure.name,
        "unit": config.task_entry.unit,
        "likelihood": config.task_entry.likelihood,
        "model_name": config.model_name,
        "model": config.model_entry.describe(config.model_options),
        "model_options": _options(config),
        "model_parameters": parameters,
        "trained_parameters": trained,
        "schedule": _SCHEDULES[config.schedule_name],
        "warmup_fraction": config.warmup_fraction if config.schedule_name == "cosine" else 0.0,
        "train_limit": config.train_limit,
        "per_class": config.per_class,
        "validation": config.held_out,
        "device": config.device,
        "threads": config.threads,
    }


def _options(config: CompareConfig) -> dict[str, Any]:
    option = config.model_entry.option
    return {} if option is None else {option[0]: _plain(getattr(config.model_options, option[0]))}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def describe_data(data: ClassificationData, device: torch.device) -> dict[str, Any]:
    """The data as a result has it: sources, checksums, numbers of samples."""
    return {
        "source": data.source,
        "sha256_decompressed": data.checksums,
        "train_samples": len(data.train_labels),
        "validation_samples": 0 if data.validation is None else len(data.validation[1]),
        "test_samples": len(data.test_labels),
        "peak_memory_kind": peak_memory_kind(device),
    }

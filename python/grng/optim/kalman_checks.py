# SPDX-License-Identifier: Apache-2.0
"""Checks of what a Kalman optimizer is given: settings, outputs and targets."""

from typing import Any

import torch
from torch import Tensor

from grng.curvature.jacobian import JACOBIANS
from grng.curvature.observation import BATCHES, LIKELIHOODS
from grng.curvature.prior import PRIORS
from grng.optim.checks import check_hyperparameter

# One filter has one observation: these cannot differ between the groups.
_SHARED = ("rho", "forgetting", "process_noise")
_CHOICES = {
    "prior": PRIORS,
    "likelihood": LIKELIHOODS,
    "form": ("vdekf", "fdekf"),
    "covariance": ("diagonal", "full"),
    "regularization": ("gradient", "noise"),
    "batch": BATCHES,
    "jacobian": JACOBIANS,
}


def check_settings(owner: str, settings: dict[str, Any]) -> None:
    """Check all settings but the noise, which :class:`grng.optim.output_noise.OutputNoise` checks.

    Raises:
        ValueError: One of them is out of range.
    """
    for name in ("lr", "rho", "process_noise"):
        check_hyperparameter(owner, name, settings[name])
    check_hyperparameter(owner, "forgetting", settings["forgetting"], low=1e-3, high=1.0)
    check_hyperparameter(owner, "sigma0", settings["sigma0"], low=1e-15, high=1e15)
    check_hyperparameter(owner, "beta", settings["beta"], high=1.0)
    max_kl = settings["max_kl"]
    if max_kl is not None and max_kl != "auto":
        if isinstance(max_kl, str):
            raise ValueError(f'{owner}: max_kl must be a number, "auto" or None, got {max_kl!r}')
        check_hyperparameter(owner, "max_kl", max_kl, low=1e-12)
    check_hyperparameter(owner, "max_rows", settings["max_rows"], low=1)
    check_hyperparameter(owner, "max_failures", settings["max_failures"])
    check_hyperparameter(owner, "jacobian_budget_mb", settings["jacobian_budget_mb"], low=1e-3)
    for name, choices in _CHOICES.items():
        value = settings[name]
        if value not in choices:
            raise ValueError(f"{owner}: {name} must be one of {', '.join(choices)}, got {value!r}")


def shared_settings(owner: str, groups: list[dict[str, Any]]) -> dict[str, float]:
    """Return what all groups have in common.

    Raises:
        ValueError: They do not.
    """
    first = groups[0]
    for group in groups[1:]:
        for name in _SHARED:
            if group[name] != first[name]:
                raise ValueError(
                    f"{owner}: {name} must be the same in all parameter groups (they are one filter), "
                    f"got {first[name]} and {group[name]}"
                )
    return {name: float(first[name]) for name in _SHARED}


def checked(owner: str, likelihood: str, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs ``[N, C]`` and targets ``[N]`` or ``[N, C]``.

    Raises:
        TypeError: No tensor, or targets of the wrong kind.
        ValueError: A wrong shape, a class out of range, or outputs without a graph.
    """
    where = f"{owner}.observe"
    for name, value in (("outputs", outputs), ("targets", targets)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{where}: {name} must be a tensor, got {type(value).__name__}")
    if not outputs.requires_grad:
        raise ValueError(
            f"{where}: outputs must be attached to the graph of the forward pass; they have none "
            "(no_grad, inference_mode or detach)"
        )
    if likelihood == "gaussian" and outputs.dim() == 1:
        outputs, targets = outputs.unsqueeze(-1), targets.unsqueeze(-1)
    least = 2 if likelihood == "categorical" else 1
    if outputs.dim() < 2 or outputs.numel() == 0 or outputs.shape[-1] < least:
        raise ValueError(
            f"{where}: outputs must have shape [..., C] with samples and C >= {least}; "
            f"got {list(outputs.shape)}"
        )
    flat = outputs.reshape(-1, outputs.shape[-1])
    wanted = outputs.shape[:-1] if likelihood == "categorical" else outputs.shape
    if targets.shape != wanted:
        raise ValueError(
            f"{where}: targets must have shape {list(wanted)} with likelihood={likelihood!r}, "
            f"got {list(targets.shape)}"
        )
    if likelihood == "categorical":
        return flat, _checked_classes(where, targets, outputs.shape[-1]).reshape(-1)
    if not targets.is_floating_point():
        raise TypeError(f"{where}: targets must be of a floating-point dtype, got {targets.dtype}")
    return flat, targets.reshape(flat.shape)


def _checked_classes(where: str, targets: Tensor, classes: int) -> Tensor:
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise TypeError(
            f"{where}: targets must be classes of an integer dtype, got {targets.dtype}"
        )
    if bool(((targets < 0) | (targets >= classes)).any()):
        raise ValueError(
            f"{where}: targets must be classes in [0, {classes}), got "
            f"{int(targets.min())} to {int(targets.max())}"
        )
    return targets.long()

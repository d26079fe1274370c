# SPDX-License-Identifier: Apache-2.0
"""Checks of what the natural policy gradient is given: settings of the groups, log-probabilities."""

from typing import Any

from torch import Tensor

from grng.optim.checks import check_hyperparameter

SCORES = ("sample", "mean")
STEP_LENGTHS = ("kl", "fixed")
# There is one Fisher matrix, and one length: these cannot differ between the groups.
_SHARED = ("damping", "scores", "score", "step_length", "max_kl", "seed")


def check_group(owner: str, group: dict[str, Any]) -> None:
    """Check the settings of a parameter group.

    Raises:
        ValueError: One of them is out of range.
    """
    check_hyperparameter(owner, "damping", group["damping"], low=1e-30)
    check_hyperparameter(owner, "scores", group["scores"], low=1)
    check_hyperparameter(owner, "max_kl", group["max_kl"], low=1e-12)
    check_hyperparameter(owner, "momentum", group["momentum"], high=1 - 1e-9)
    check_hyperparameter(owner, "weight_decay", group["weight_decay"])
    for name, choices in (("score", SCORES), ("step_length", STEP_LENGTHS)):
        if group[name] not in choices:
            raise ValueError(
                f"{owner}: {name} must be one of {', '.join(choices)}, got {group[name]!r}"
            )
    if group["score"] == "mean" and group["scores"] != 1:
        raise ValueError(
            f'{owner}: scores must be 1 with score="mean", which is one score, got {group["scores"]}'
        )


def shared_settings(owner: str, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what all groups have in common.

    Raises:
        ValueError: They do not; or a setting is out of range.
    """
    first = groups[0]
    for group in groups:
        for name in _SHARED:
            if group[name] != first[name]:
                raise ValueError(
                    f"{owner}: {name} must be the same in all parameter groups (they are one vector), "
                    f"got {first[name]!r} and {group[name]!r}"
                )
        check_group(owner, group)
    return {name: first[name] for name in _SHARED}


def check_log_probs(owner: str, log_probs: Any) -> None:
    """Check what ``observe`` is given.

    Raises:
        TypeError: No tensor, or not of a real floating-point dtype.
        ValueError: Empty, or without a graph.
    """
    where = f"{owner}.observe"
    if not isinstance(log_probs, Tensor):
        raise TypeError(f"{where}: log_probs must be a tensor, got {type(log_probs).__name__}")
    if not log_probs.is_floating_point():
        raise TypeError(
            f"{where}: log_probs must be of a real floating-point dtype, got {log_probs.dtype}"
        )
    if log_probs.numel() == 0:
        raise ValueError(
            f"{where}: log_probs must have at least one element, got shape {list(log_probs.shape)}"
        )
    if not log_probs.requires_grad:
        raise ValueError(
            f"{where}: log_probs must be attached to the graph of the forward pass; they have none "
            "(no_grad, inference_mode or detach)"
        )

# SPDX-License-Identifier: Apache-2.0
"""``strict``: no matrix is left to AdamW unasked."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from torch import nn
from torch.nn.parameter import UninitializedParameter

Strict: TypeAlias = bool | tuple[type[nn.Module], ...]
# Names in an error message.
_MOST_NAMES = 8


def check_strict(owner: str, strict: Any) -> None:
    """Check the keyword.

    Raises:
        ValueError: Neither a bool nor a tuple of module classes.
    """
    classes = isinstance(strict, tuple) and all(
        isinstance(c, type) and issubclass(c, nn.Module) for c in strict
    )
    if not isinstance(strict, bool) and not classes:
        raise ValueError(
            f"{owner}: strict must be True, False, or a tuple of module classes whose matrices AdamW may "
            f"train, got {strict!r}"
        )


def is_strict(strict: Strict) -> bool:
    """Return whether fallbacks are errors: an empty tuple allows no class, but is strict."""
    return strict is not False


def check_routes(
    owner: str,
    model: nn.Module,
    reasons: Mapping[nn.Parameter, str],
    names: Mapping[nn.Parameter, str],
    strict: Strict,
) -> None:
    """Check that what AdamW will train are vectors and numbers, or matrices of modules that are allowed.

    Args:
        owner: The optimizer's name.
        model: The model.
        reasons: The parameters that AdamW will train, and why.
        names: Of the parameters.
        strict: The keyword.

    Raises:
        ValueError: Others are among them.
    """
    if not is_strict(strict):
        return
    allowed: set[nn.Parameter] = set()
    if isinstance(strict, tuple):
        for module in model.modules():
            if isinstance(module, strict):
                allowed.update(module.parameters(recurse=False))
    refused = [p for p in reasons if _is_matrix(p) and p not in allowed]
    if refused:
        raise ValueError(
            f"{owner}: strict, but AdamW would train {_listed(refused, names, reasons)}. Freeze what needs "
            "no training, or name the classes of modules that AdamW may train: strict=(nn.Embedding,)"
        )


def _is_matrix(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, UninitializedParameter) or parameter.dim() > 1


def _listed(
    refused: Iterable[nn.Parameter],
    names: Mapping[nn.Parameter, str],
    reasons: Mapping[nn.Parameter, str],
) -> str:
    shown = []
    for p in refused:
        shape = "unknown shape" if isinstance(p, UninitializedParameter) else str(list(p.shape))
        shown.append(f"{names[p]} {shape} ({reasons[p]})")
    more = f" and {len(shown) - _MOST_NAMES} more" if len(shown) > _MOST_NAMES else ""
    return "; ".join(shown[:_MOST_NAMES]) + more

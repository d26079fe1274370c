# SPDX-License-Identifier: Apache-2.0
"""What optimizers ask of parameters and their gradients: names, dtypes, places, and what has changed."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def trainable(
    owner: str, model: nn.Module | Iterable[Any]
) -> tuple[Iterable[Any], dict[nn.Parameter, str]]:
    """Return the trainable parameters of a model and the names of all; of other things no names.

    Raises:
        ValueError: A model without trainable parameters.
    """
    if not isinstance(model, nn.Module):
        return model, {}
    names = {p: name for name, p in model.named_parameters()}
    found = [p for p in model.parameters() if p.requires_grad]
    if not found:
        raise ValueError(f"{owner}: the model has no trainable parameters")
    return found, names


def take_back_unless_floating(optimizer: Optimizer) -> None:
    """Take back the last parameter group where it has a parameter that cannot be trained.

    Raises:
        TypeError: A parameter of a dtype that is not real floating-point.
    """
    for p in optimizer.param_groups[-1]["params"]:
        if not p.is_floating_point():
            del optimizer.param_groups[-1]
            raise TypeError(
                f"{type(optimizer).__name__}: parameters must be of a real floating-point dtype, "
                f"got {p.dtype}"
            )


def wide(parameter: Tensor) -> torch.dtype:
    """Return the dtype that a parameter is computed with: its own, but at least fp32."""
    return torch.promote_types(parameter.dtype, torch.float32)


def are_same(a: list[nn.Parameter], b: list[nn.Parameter]) -> bool:
    """Return whether two lists hold the same parameters, in the same order."""
    return len(a) == len(b) and all(p is q for p, q in zip(a, b, strict=True))


def gradient_marks(groups: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Return what tells whether a backward pass has run: which tensors gradients are, how often written."""
    grads = [p.grad for g in groups for p in g["params"]]
    return [(id(g), 0 if g is None else g._version) for g in grads]


def check_dense(
    owner: str, name_of: Callable[[nn.Parameter], str], parameter: nn.Parameter
) -> None:
    """Check the layout of a gradient.

    Raises:
        RuntimeError: It is sparse.
    """
    grad = parameter.grad
    if grad is not None and grad.layout is not torch.strided:
        raise RuntimeError(
            f"{owner}: gradients must be dense, that of {name_of(parameter)} has layout {grad.layout}"
        )


def check_place(
    owner: str,
    name_of: Callable[[nn.Parameter], str],
    parameter: nn.Parameter,
    known: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """Check that what is ``known`` of a parameter still is where the parameter is, and of this dtype.

    Raises:
        RuntimeError: It is not.
    """
    if known is not None and (known.dtype != dtype or known.device != parameter.device):
        raise RuntimeError(
            f"{owner}: {name_of(parameter)} ({parameter.dtype}, {parameter.device}) was moved or cast after "
            f"the optimizer got its state ({known.dtype}, {known.device}); make the optimizer after that, or "
            "load its state_dict into a new one"
        )

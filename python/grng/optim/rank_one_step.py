# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of a step of the natural policy gradient: its length, its momentum, and what is written."""

import math
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import grng_kernels as kernels
from grng.curvature.tangent import Tangent
from grng.optim.devices import scale_, stacked
from grng.optim.finite import are_finite
from grng.optim.parameters import are_same, wide
from grng.optim.scores import ObservedActions

State = dict[str, Any]
BUFFER = "momentum_buffer"


def step_at_once(
    groups: list[dict[str, Any]],
    seen: ObservedActions,
    moved: list[nn.Parameter],
    damping: float,
) -> float | None:
    """Make a step of fixed length in one call, which forms no direction; or nothing, and return None.

    For one score, without momentum, where the C++ kernel takes the tensors. What is not finite is left to
    the other way, which names it; as is what only leaves the range that the kernel keeps.

    Returns:
        The length of the direction.
    """
    numbers = _rates_and_decays(groups)
    grads = _plain_gradients(moved)
    if numbers is None or grads is None or seen.count != 1:
        return None
    lrs, decays = numbers
    scores = seen.scores
    if not are_same(moved, seen.parameters):
        scores = seen.scores_of(moved, moved)
    # On a CPU: nothing to wait for.
    if not math.isfinite(float(seen.total)):
        return None
    rows = [u.view_as(p) for u, p in zip(scores, moved, strict=True)]
    weights: list[Tensor] = moved  # type: ignore[assignment]
    try:
        norm = kernels.rank1_step_(weights, grads, rows, damping=damping, lr=lrs, decay=decays)
    except ValueError:
        # Nothing was written: a number beyond fp32, which the other way takes, or refuses by its name; or
        # weights that share memory, which it writes one after another.
        return None
    length = float(norm)
    return length if math.isfinite(length) else None


def gradients(groups: list[dict[str, Any]], moved: list[nn.Parameter]) -> list[Tensor]:
    """Return the gradients of these parameters, at least in fp32; negative where a group goes up."""
    signs = {p: g["maximize"] for g in groups for p in g["params"]}
    return [_gradient(p, signs[p]) for p in moved]


def curvature_along(
    owner: str,
    tangent: Tangent,
    moved: list[nn.Parameter],
    directions: list[Tensor],
    length: Tensor,
) -> Tensor:
    """Return the Fisher matrix of all observed actions along the directions made one of length 1, 0-d.

    Raises:
        OutOfMemoryError: As torch says it.
        RuntimeError: An operation has no second derivative.
    """
    safe = torch.where(length > 0, length, 1.0)
    unit = [(d / safe.to(d.device)).to(p.dtype) for p, d in zip(moved, directions, strict=True)]
    try:
        change = tangent.product(moved, unit)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            f'{owner}: step_length="kl" needs second derivatives, which an operation of '
            f'this policy does not have; use step_length="fixed". It says: {error}'
        ) from error
    return change.double().square().mean()


def take_steps(
    states: MutableMapping[Any, State],
    groups: list[dict[str, Any]],
    directions: dict[nn.Parameter, Tensor],
    rates: list[float],
    factor: float,
) -> None:
    """Step, in two passes: what can run out of memory comes before the first parameter is written."""
    plans: list[tuple[list[nn.Parameter], list[Tensor], float, float]] = []
    rounded: list[tuple[nn.Parameter, Tensor]] = []
    for group, lr in zip(groups, rates, strict=True):
        params = [p for p in group["params"] if p in directions]
        if not params:
            continue
        steps, alpha = _with_momentum(states, group, params, directions, factor)
        decay = 1 - lr * group["weight_decay"]
        narrow = [i for i, p in enumerate(params) if p.dtype != steps[i].dtype]
        for i in narrow:
            weight = params[i].to(steps[i].dtype).mul_(decay)
            rounded.append((params[i], weight.add_(steps[i], alpha=-lr * alpha)))
        rest = [i for i in range(len(params)) if i not in set(narrow)]
        plans.append(([params[i] for i in rest], [steps[i] for i in rest], decay, -lr * alpha))
    for params, steps, decay, alpha in plans:
        if params:
            weights: list[Tensor] = list(params)
            if decay != 1:
                scale_(weights, decay)
            torch._foreach_add_(weights, steps, alpha=alpha)
    for p, weight in rounded:
        p.copy_(weight)


def _with_momentum(
    states: MutableMapping[Any, State],
    group: dict[str, Any],
    params: list[nn.Parameter],
    directions: dict[nn.Parameter, Tensor],
    factor: float,
) -> tuple[list[Tensor], float]:
    """Return what the learning rate goes to, as tensors and a number that they are multiplied with."""
    steps = [directions[p] for p in params]
    if group["momentum"] == 0:
        for p in params:
            states.get(p, {}).pop(BUFFER, None)
        return steps, factor
    averages = []
    for p, step in zip(params, steps, strict=True):
        state = states[p]
        # A new tensor: a step that runs out of memory puts the old one back.
        average = step * factor
        if BUFFER in state:
            average.add_(state[BUFFER], alpha=group["momentum"])
        state[BUFFER] = average
        averages.append(average)
    return averages, 1.0


def what_is_wrong(
    total: float,
    moved: list[nn.Parameter],
    grads: list[Tensor],
    scores: list[Tensor],
    name_of: Callable[[nn.Parameter], str],
) -> str:
    """Say why a step cannot be made, of what is not finite."""
    if not math.isfinite(total):
        return "a NaN or infinity in log_probs"
    for what, tensors in (("score", scores), ("gradient", grads)):
        good = are_finite(tensors, exact=True).tolist()
        if not all(good):
            return f"a NaN or infinity in the {what} of {name_of(moved[good.index(False)])}"
    return "a direction or a curvature beyond the range of its dtype"


def fast_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the norm of all elements, fp64, 0-d; infinite where that of a tensor leaves its dtype."""
    # In the dtype of the tensors, which a norm can leave where no element does.
    return stacked(torch._foreach_norm(list(tensors))).double().square().sum().sqrt()


def exact_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the norm of all elements, fp64, 0-d."""
    norms = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]
    return torch.linalg.vector_norm(stacked(norms))


def read(numbers: dict[str, Tensor]) -> dict[str, float]:
    """Return numbers of tensors 0-d, after one wait for the first one's device."""
    values: list[float] = stacked([t.detach().double() for t in numbers.values()]).tolist()
    return dict(zip(numbers, values, strict=True))


def _gradient(parameter: nn.Parameter, maximize: bool) -> Tensor:
    assert parameter.grad is not None
    grad = parameter.grad.to(wide(parameter))
    return -grad if maximize else grad


def _rates_and_decays(groups: list[dict[str, Any]]) -> tuple[list[float], list[float]] | None:
    """Rate and decay for each gradient, of a step of all groups in one call; None: that cannot be."""
    lrs: list[float] = []
    decays: list[float] = []
    for group in groups:
        given, maximize = group["lr"], group["maximize"]
        if group["momentum"] != 0 or maximize != groups[0]["maximize"]:
            return None
        if isinstance(given, Tensor) and not given.is_cpu:
            return None
        lr, count = float(given), sum(p.grad is not None for p in group["params"])
        # The direction changes its sign with the gradient.
        lrs += [-lr if maximize else lr] * count
        decays += [1 - lr * group["weight_decay"]] * count
    return lrs, decays


def _plain_gradients(parameters: list[nn.Parameter]) -> list[Tensor] | None:
    """The gradients, where the C++ kernel of a whole step takes all of them and the parameters."""
    dtype, found = parameters[0].dtype, []
    if dtype is not torch.float32 and dtype is not torch.float64:
        return None
    for p in parameters:
        g = p.grad
        if type(p) is not nn.Parameter or type(g) is not Tensor:
            return None
        if p.dtype is not dtype or g.dtype is not dtype or not (p.is_cpu and g.is_cpu):
            return None
        if not (p.is_contiguous() and g.is_contiguous()):
            return None
        found.append(g)
    return found

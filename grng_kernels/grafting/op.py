# SPDX-License-Identifier: Apache-2.0
"""``adam_moments_`` and ``grafted_step_``: the public functions, their checks, the choice of a backend."""

from collections.abc import Sequence

import torch
from torch import Tensor

from grng_kernels import _checks, _dispatch
from grng_kernels._register import operator
from grng_kernels.grafting import reference

MOMENTS, STEP = "adam_moments_", "grafted_step_"
MOST_DIMENSIONS = 5  # of a direction that lies otherwise than its parameter

Tensors = Sequence[Tensor]


def adam_moments_(
    exp_avg: Tensor | Tensors,
    exp_avg_sq: Tensor | Tensors,
    grad: Tensor | Tensors,
    *,
    step: float | Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Tensor:
    """Average gradients into AdamW's moments; return how long AdamW's step is.

    Torch equivalent: ``exp_avg.lerp_(grad, 1 - β₁)``, ``exp_avg_sq.lerp_(grad·grad, 1 - β₂)``
    and the norm of ``m̂ / (√v̂ + eps)``, with the moments' bias corrected; but the step is never formed.

    Args:
        exp_avg: Average of the gradient, any shape, or a list; fp32 or fp64. Mutated.
        exp_avg_sq: Average of its square, shapes and dtypes of ``exp_avg``. Mutated.
        grad: The gradient, shapes of ``exp_avg``; fp32, bf16, fp16 or fp64.
        step: How many updates the moments will have had, this one included: >= 1; one number, or one for
            each item of a list.
        betas: Decays of the two averages, in [0, 1).
        eps: Added to the root of the second, >= 0.

    Returns:
        ``‖m̂ / (√v̂ + eps)‖₂`` of each item, fp64 on the device, 0-d for a tensor and ``[items]`` for a list.
        There is no ``info``: a gradient that is not finite leaves moments and a norm that are not.

    Raises:
        TypeError: A dtype or layout that is not accepted.
        ValueError: A wrong shape, device or number; moments that overlap each other or the gradient.

    Source: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization" (AdamW).
    """
    single = isinstance(exp_avg, Tensor)
    given = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "grad": grad}
    lists = _lists(MOMENTS, given)
    _check_betas(MOMENTS, betas)
    _checks.check_scalar(MOMENTS, "eps", eps, low=0.0)
    steps = _steps(MOMENTS, step, len(lists["grad"]))
    for i, mean in enumerate(lists["exp_avg"]):
        _check_item(MOMENTS, lists, i, single, mean, _checks.FLOAT_DTYPES, ("exp_avg_sq",))
    norms = _adam_moments_op(
        *([t.detach() for t in lists[name]] for name in given), steps, *betas, eps
    )
    return norms[0] if single else norms


def grafted_step_(
    param: Tensor | Tensors,
    direction: Tensor | Tensors,
    exp_avg: Tensor | Tensors,
    exp_avg_sq: Tensor | Tensors,
    *,
    scale: Tensor,
    lr: float | Tensor,
    decay: float | Tensor = 1.0,
    step: float | Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> None:
    """``param <- decay·param − lr·scale·direction``, and AdamW's own step where the scale is not finite.

    Torch equivalent: ``u = torch.where(scale.isfinite(), scale * direction, m̂ / (√v̂ + eps))`` and
    ``param.mul_(decay).sub_(lr * u)``; but no tensor is formed.

    Args:
        param: What moves, any shape, or a list; fp32, bf16, fp16 or fp64. Mutated.
        direction: Where to, shapes of ``param``, dtypes of ``exp_avg``, any strides.
        exp_avg: AdamW's average of the gradient, shapes of ``param``; fp32 or fp64.
        exp_avg_sq: That of its square, shapes and dtypes of ``exp_avg``.
        scale: Factor of each direction, >= 0, fp64 ``[items]``, 0-d for a tensor; NaN or inf: the direction
            is not used, and AdamW's step is taken, whose scale is 1.
        lr: A number, or a 0-d tensor, whose value is not checked.
        decay: A number, or a 0-d tensor, whose value is not checked.
        step: How many updates the moments have had, >= 1; one number, or one for each item of a list.
        betas: Decays of the two averages, in [0, 1).
        eps: Added to the root of the second, >= 0.

    Raises:
        TypeError: A dtype or layout that is not accepted.
        ValueError: A wrong shape, device or number; a ``param`` that is expanded or overlaps an argument.

    Source: Agarwal et al. 2020, "Disentangling Adaptive Gradient Methods from Learning Rates" (grafting).
    """
    single = isinstance(param, Tensor)
    given = {"param": param, "direction": direction, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    lists = _lists(STEP, given)
    count = len(lists["param"])
    _check_betas(STEP, betas)
    _checks.check_scalar(STEP, "eps", eps, low=0.0)
    _checks.check_scalar(STEP, "lr", lr)
    _checks.check_scalar(STEP, "decay", decay)
    _checks.check_dtype(STEP, "scale", scale, [torch.float64])
    _checks.check_shape(STEP, "scale", scale, () if single else (count,))
    steps = _steps(STEP, step, count)
    for i, mean in enumerate(lists["exp_avg"]):
        _check_item(STEP, lists, i, single, mean, _checks.FLOAT_DTYPES, ("direction", "exp_avg_sq"))
    if count:
        _checks.check_device(STEP, {"param": lists["param"][0], "scale": scale})
        tensors = [lists[name] for name in given]
        _grafted_step_op(
            *([t.detach() for t in ts] for ts in tensors),
            scale.detach().view(-1),
            *_number_or_tensor(lr),
            *_number_or_tensor(decay),
            steps,
            *betas,
            eps,
        )


def _lists(op: str, given: dict[str, Tensor | Tensors]) -> dict[str, list[Tensor]]:
    lists = {name: _checks.as_list(op, name, value) for name, value in given.items()}
    _checks.check_same_form(op, **given)
    _checks.check_lengths(op, **lists)
    return lists


def _check_betas(op: str, betas: tuple[float, float]) -> None:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{op}: betas must be two numbers in [0, 1), got {betas!r}")
    for i, beta in enumerate(betas):
        _checks.check_scalar(op, f"betas[{i}]", beta, low=0.0, high=1 - 1e-9)


def _steps(op: str, step: float | Sequence[float], count: int) -> list[float]:
    steps: list[float] = [step] * count if isinstance(step, (int, float)) else list(step)
    if len(steps) != count:
        raise ValueError(
            f"{op}: step must be one number or one for each item, got {len(steps)} for {count}"
        )
    for n in dict.fromkeys(steps):
        _checks.check_scalar(op, "step", n, low=1.0)
    return [float(n) for n in steps]


def _check_item(
    op: str,
    lists: dict[str, list[Tensor]],
    i: int,
    single: bool,
    mean: Tensor,
    others: Sequence[torch.dtype],
    alike: Sequence[str],
) -> None:
    at = "" if single else f"[{i}]"
    _checks.check_dtype(op, f"exp_avg{at}", mean, _checks.STATE_DTYPES)
    for name, tensors in lists.items():
        t = tensors[i]
        _checks.check_dtype(op, f"{name}{at}", t, [mean.dtype] if name in alike else others)
        if t.shape != mean.shape:
            _checks.check_shape(op, f"{name}{at}", t, mean.shape, "as exp_avg")
        if t.device != lists["exp_avg"][0].device:
            _checks.check_device(
                op,
                {"exp_avg" if single else "exp_avg[0]": lists["exp_avg"][0], f"{name}{at}": t},
            )


def _number_or_tensor(value: float | Tensor) -> tuple[float | None, Tensor | None]:
    return (None, value.detach()) if isinstance(value, Tensor) else (float(value), None)


def _unlike(tensors: Tensors, wanted: Tensors) -> str | None:
    """Why flat memory cannot stand for both."""
    for t, like in zip(tensors, wanted, strict=True):
        if t.stride() != like.stride():
            return "it needs moments that lie like their parameters and gradients"
        if not (t.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(t)):
            return "it needs dense moments"
    return None


def _backend(op: str, device: torch.device, problem: str | None) -> str:
    """Choose; on a GPU torch's kernels for lists of tensors serve whatever was asked for by name."""
    if _dispatch.requested_backend() in ("triton", "cuda"):
        return "reference"
    return _dispatch.select(op, device, cpu=problem)


def _named(name: str, tensors: Tensors) -> list[tuple[str, Tensor]]:
    return [(f"{name}[{i}]", t) for i, t in enumerate(tensors)]


@operator("adam_moments_", mutates_args=("exp_avgs", "exp_avg_sqs"))
def _adam_moments_op(
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    grads: Sequence[Tensor],
    steps: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
) -> Tensor:
    if not exp_avgs:
        return torch.zeros(0, dtype=torch.float64)
    for name, tensors in (("exp_avg", exp_avgs), ("exp_avg_sq", exp_avg_sqs)):
        for i, t in enumerate(tensors):
            _checks.check_no_self_overlap(MOMENTS, f"{name}[{i}]", t)
    _checks.check_no_overlap(
        MOMENTS,
        _named("exp_avg", exp_avgs) + _named("exp_avg_sq", exp_avg_sqs),
        _named("grad", grads),
    )
    found = reference.corrections((beta1, beta2), steps)
    problem = _unlike(exp_avg_sqs, exp_avgs)
    if _backend(MOMENTS, exp_avgs[0].device, problem) == "reference":
        return reference.adam_moments_(exp_avgs, exp_avg_sqs, grads, (beta1, beta2), eps, found)
    norms = torch.empty(len(exp_avgs), dtype=torch.float64)
    alike = [
        g if g.stride() == m.stride() else torch.empty_like(m, dtype=g.dtype).copy_(g)
        for g, m in zip(grads, exp_avgs, strict=True)
    ]
    torch.ops.grng._adam_moments_(exp_avgs, exp_avg_sqs, norms, alike, *found, beta1, beta2, eps)
    return norms


@_adam_moments_op.register_fake
def _(
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    grads: Sequence[Tensor],
    steps: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
) -> Tensor:
    if not exp_avgs:
        return torch.zeros(0, dtype=torch.float64)
    return exp_avgs[0].new_empty(len(exp_avgs), dtype=torch.float64)


@operator("grafted_step_", mutates_args=("params",))
def _grafted_step_op(
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    scales: Tensor,
    lr: float | None,
    lr_tensor: Tensor | None,
    decay: float | None,
    decay_tensor: Tensor | None,
    steps: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    for i, t in enumerate(params):
        _checks.check_no_self_overlap(STEP, f"param[{i}]", t)
    _checks.check_no_overlap(
        STEP,
        _named("param", params),
        [
            *_named("direction", directions),
            *_named("exp_avg", exp_avgs),
            *_named("exp_avg_sq", exp_avg_sqs),
        ],
    )
    rate, kept = (
        lr if lr_tensor is None else lr_tensor,
        decay if decay_tensor is None else decay_tensor,
    )
    assert rate is not None and kept is not None, "the public function passes numbers or tensors"
    found = reference.corrections((beta1, beta2), steps)
    problem = _unlike(exp_avgs, params) or _unlike(exp_avg_sqs, params)
    if _backend(STEP, params[0].device, problem) == "reference":
        reference.grafted_step_(
            params, directions, exp_avgs, exp_avg_sqs, scales, rate, kept, eps, found
        )
        return
    readable = [
        d
        if d.stride() == p.stride() or (p.is_contiguous() and p.dim() <= MOST_DIMENSIONS)
        else torch.empty_like(p, dtype=d.dtype).copy_(d)
        for d, p in zip(directions, params, strict=True)
    ]
    torch.ops.grng._grafted_step_(
        params,
        readable,
        exp_avgs,
        exp_avg_sqs,
        scales.tolist(),
        *found,
        float(rate),
        float(kept),
        eps,
    )


@_grafted_step_op.register_fake
def _(
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    scales: Tensor,
    lr: float | None,
    lr_tensor: Tensor | None,
    decay: float | None,
    decay_tensor: Tensor | None,
    steps: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    return None

# SPDX-License-Identifier: Apache-2.0
"""AdamW, for the parameters that have no curvature."""

from collections.abc import MutableMapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from grng.optim.devices import beside
from grng.optim.grafting import adam_steps, new_moments, update_moments

State = dict[str, Any]
# Root mean square of a table from which on AdamW's rate is not too large for it, and the least part of that
# rate: a table of zeros must be able to leave them.
_USUAL_RMS, _LEAST = 0.1, 0.1
ADAMW_BETAS, ADAMW_EPS = (0.9, 0.999), 1e-8


def adamw_step(
    states: MutableMapping[Any, State], group: dict[str, Any], candidates: list[nn.Parameter]
) -> None:
    """Make a step of those that have a gradient, with the settings of a group."""
    params: list[Tensor] = [p for p in candidates if p.grad is not None]
    for p in params:
        state = states[p]
        if "exp_avg" not in state:
            state.update(new_moments(p))
    betas = group.get("betas", ADAMW_BETAS)
    wide = [p for p in params if states[p]["exp_avg"].dtype != p.dtype]
    if wide:
        # Moments in fp32 of narrower parameters, from when curvature trained them.
        _wide_step(states, group, wide, betas)
        params = [p for p in params if states[p]["exp_avg"].dtype == p.dtype]
    if not params:
        return
    adamw(
        params,
        [cast(Tensor, p.grad) for p in params],
        [states[p]["exp_avg"] for p in params],
        [states[p]["exp_avg_sq"] for p in params],
        [],
        [states[p]["step"] for p in params],
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=ADAMW_EPS,
        maximize=False,
        has_complex=any(p.is_complex() for p in params),
    )


def embedding_step(
    states: MutableMapping[Any, State], group: dict[str, Any], candidates: list[nn.Parameter]
) -> None:
    """Make AdamW's step of tables, shorter where they are small: times ``min(1, RMS(W) / 0.1)``.

    At the rate of layers whose steps a trust region cuts, tables that begin at 0.02, as BERT's do, move by a
    quarter of that in a step, all rows that were looked up alike at first.
    """
    params = [p for p in candidates if p.grad is not None and p.numel()]
    parts = {p: (_rms(p) / _USUAL_RMS).clamp(_LEAST, 1.0) for p in params}
    for p in (p for p in params if _can_be_asked(p)):
        adamw_step(states, {**group, "lr": group["lr"] * float(parts[p])}, [p])
    others = [p for p in params if not _can_be_asked(p)]
    if not others:
        return
    # A rate that is a tensor, torch's AdamW would wait for: the whole step is made and taken back in part.
    before = [p.detach().clone() for p in others]
    adamw_step(states, group, others)
    for p, old in zip(others, before, strict=True):
        p.copy_(old.lerp_(p.detach(), parts[p].to(p.dtype)))


def _can_be_asked(parameter: nn.Parameter) -> bool:
    """Whether a number made of it can be had without waiting for a device."""
    return parameter.is_cpu


def _rms(parameter: nn.Parameter) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    norm = torch.linalg.vector_norm(parameter.detach(), dtype=dtype)
    return cast(Tensor, norm / parameter.numel() ** 0.5)


def _wide_step(
    states: MutableMapping[Any, State],
    group: dict[str, Any],
    params: list[Tensor],
    betas: tuple[float, float],
) -> None:
    used = [states[p] for p in params]
    update_moments(params, used, betas, ADAMW_EPS)
    for p, update in zip(params, adam_steps(used, betas, ADAMW_EPS), strict=True):
        lr = beside(group["lr"], p)
        p.mul_(1 - lr * group["weight_decay"]).sub_((lr * update).to(p.dtype))

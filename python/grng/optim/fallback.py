# SPDX-License-Identifier: Apache-2.0
"""AdamW, for the parameters that have no curvature."""

from collections.abc import MutableMapping
from typing import Any, cast

from torch import Tensor, nn
from torch.optim.adamw import adamw

from grng.optim.devices import beside
from grng.optim.grafting import adam_steps, new_moments, update_moments

State = dict[str, Any]
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

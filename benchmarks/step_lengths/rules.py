# SPDX-License-Identifier: Apache-2.0
"""The rules that are compared, by the name that ``--rules`` takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from grng import RING
from grng.compare.protocols import Protocol
from grng.optim.base import ADAMW
from step_lengths.damping import ModelFloor
from step_lengths.grafting import AdaptiveDamping, MomentumAfter, MoreStatistics, WarmUp
from step_lengths.quadratic import (
    DampedQuadraticDirection,
    DampedQuadraticMomentum,
    QuadraticDirection,
    QuadraticMomentum,
    QuadraticMomentumAlways,
)
from step_lengths.watched import Watched

_DEFAULTS = {k: p.default for k, p in inspect.signature(RING).parameters.items()}
DEFAULT_LR: float = _DEFAULTS["lr"]
# Far beyond any step: the region is measured and never cuts.
_NO_REGION = 1e30
RATES = tuple(factor * DEFAULT_LR for factor in (0.1, 0.3, 1, 3, 10))
ADAMW_RATES = (1e-3, 3e-3, 1e-2)
# Beside that of the rule itself.
KL_CLIP_RATES = (3e-3, 0.3)


@dataclass(frozen=True)
class Rule:
    """One way to choose the length of a step."""

    label: str
    # In a few words, for the picture and the table.
    title: str
    factory: Callable[..., torch.optim.Optimizer]
    options: Mapping[str, Any] = field(default_factory=dict)
    protocol: Protocol = "observe-backward"

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer for this model; what AdamW trains in it is trained the same under every rule."""
        if not issubclass(self.factory, RING):  # type: ignore[arg-type]
            return self.factory([p for p in model.parameters() if p.requires_grad], **self.options)
        built = self.factory(model, **self.options)
        for group in built.param_groups:
            if group["kind"] == ADAMW:
                group["weight_decay"] = _DEFAULTS["weight_decay"]
        return built

    def settings(self) -> dict[str, Any]:
        """Everything that decides a run of this rule, fit for JSON: other settings, another run."""
        given = inspect.signature(self.factory).parameters
        constants = {
            name: value
            for base in reversed(self.factory.__mro__)  # type: ignore[attr-defined]
            if base.__module__.startswith("step_lengths")
            for name, value in vars(base).items()
            if isinstance(value, (int, float)) and not name.startswith("_")
        }
        defaults = {k: p.default for k, p in given.items() if p.default is not p.empty}
        if issubclass(self.factory, RING):  # type: ignore[arg-type]
            defaults = {**{k: v for k, v in _DEFAULTS.items() if k != "model"}, **defaults}
        settled = {**defaults, **constants, **self.options}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in settled.items()}


# lr = 1 is the minimum of the model. What AdamW trains, and the decay of the weights in a step, as in the
# default (Rule.build sees to what AdamW trains).
_MODELLED = {
    "lr": 1.0,
    "adamw_lr": DEFAULT_LR,
    "weight_decay": DEFAULT_LR * _DEFAULTS["weight_decay"],
}

RULES: tuple[Rule, ...] = (
    Rule("graft", "default: AdamW's length per layer, trust region", Watched),
    Rule("no-region", "AdamW's length, no trust region", Watched, {"max_kl": _NO_REGION}),
    Rule(
        "kl-clip",
        "KL clip in K-FAC's own metric",
        Watched,
        {"step_length": "kl_clip", "lr": 0.03, "adamw_lr": DEFAULT_LR},
    ),
    Rule("quadratic", "exact model along D", QuadraticDirection, _MODELLED),
    Rule(
        "quadratic-damped",
        "exact model along D, rho 1, floor",
        DampedQuadraticDirection,
        {**_MODELLED, "rho": 1.0},
    ),
    Rule("quadratic-momentum", "exact model along D and last step", QuadraticMomentum, _MODELLED),
    Rule(
        "quadratic-momentum-damped",
        "exact model along D and last step, rho 1, floor",
        DampedQuadraticMomentum,
        {**_MODELLED, "rho": 1.0},
    ),
    Rule(
        "quadratic-momentum-always",
        "exact model along D and last step, every step",
        QuadraticMomentumAlways,
        _MODELLED,
    ),
    Rule("momentum-after", "default, averaged after preconditioning", MomentumAfter),
    Rule("warm-up", f"default after {WarmUp.warm_up} steps of AdamW", WarmUp),
    Rule("floor", f"default, damping floor {ModelFloor.floor:g} of the model's", ModelFloor),
    Rule("adaptive-damping", "default, rho by the reduction ratio", AdaptiveDamping),
    Rule("statistics", "default, statistics of every step", MoreStatistics),
)
GRAFT, NO_REGION = RULES[0], RULES[1]

RATE_RULES: tuple[Rule, ...] = (
    *(
        Rule(
            f"{rule.label}:lr={lr:g}",
            f"{rule.title}, lr {lr:g}",
            Watched,
            {**rule.options, "lr": lr},
        )
        for rule in (GRAFT, NO_REGION)
        for lr in RATES
        # The default rate is that of the rule itself.
        if lr != DEFAULT_LR
    ),
    *(
        Rule(
            f"kl-clip:lr={lr:g}",
            f"KL clip in K-FAC's own metric, lr {lr:g}",
            Watched,
            {"step_length": "kl_clip", "lr": lr, "adamw_lr": DEFAULT_LR},
        )
        for lr in KL_CLIP_RATES
    ),
    *(
        Rule(f"adamw:lr={lr:g}", f"AdamW, lr {lr:g}", torch.optim.AdamW, {"lr": lr}, "backward")
        for lr in ADAMW_RATES
    ),
)
ALL = {rule.label: rule for rule in (*RULES, *RATE_RULES)}
GROUPS = {
    "all": list(ALL),
    "rules": [r.label for r in RULES],
    "rates": [r.label for r in RATE_RULES],
}


def chosen(text: str) -> list[Rule]:
    """The rules of a comma-separated list of labels and groups, each once.

    Raises:
        ValueError: There is no such rule.
    """
    labels: dict[str, None] = {}
    for name in text.split(","):
        if name not in ALL and name not in GROUPS:
            raise ValueError(f"unknown rule {name!r}; valid: {', '.join([*GROUPS, *ALL])}")
        labels.update(dict.fromkeys(GROUPS.get(name, [name])))
    return [ALL[label] for label in labels]

# SPDX-License-Identifier: Apache-2.0
"""How much memory the state of an optimizer takes as models grow, with and without LoRA: no training."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import grng
from grng.compare.memory import state_bytes
from grng.compare.optimizers import parse_spec
from grng.compare.protocols import take_step
from grng.studies.records import Panel
from studies.definition import Definition, Measured, Options, Planned

# The last: of sides longer than 256 the diagonal alone.
OPTIMIZERS = (
    *("adamw", "ring", "reng", "kfac", "rkalman", "sophiag"),
    "ring:max_factor_dim=256",
)
_CLASSES = {
    "ring": "RING",
    "reng": "RENG",
    "kfac": "KFAC",
    "rkalman": "RKalman",
    "sophiag": "SophiaG",
}
WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096)
_INPUTS, _OUTPUTS, _RANK = 784, 10, 8
# Enough for every state to be there: statistics are taken at the first step.
_STEPS, _SAMPLES = 2, 16
_TOLERANCE = 0.02


class LowRank(nn.Module):
    """A frozen linear layer and two trained matrices of low rank beside it: LoRA."""

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        """Args: frozen: the layer; rank: of the matrices, of which the second begins with zeros."""
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        # PEFT's names: by them the optimizers know the long sides of LoRA, and keep their diagonals.
        self.lora_A = nn.Linear(frozen.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, frozen.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        """The sum of both, ``[n, out]``."""
        outputs: Tensor = self.frozen(inputs) + self.lora_B(self.lora_A(inputs))
        return outputs


def build(width: int, rank: int | None) -> nn.Sequential:
    """An MLP 784-width-width-10.

    Args:
        width: Of the hidden layers.
        rank: None trains everything; else of LoRA's matrices beside the hidden layers, and the last
            layer is trained whole.

    Returns:
        The model.
    """
    hidden = [nn.Linear(_INPUTS, width), nn.Linear(width, width)]
    first, second = hidden if rank is None else [LowRank(one, rank) for one in hidden]
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(width, _OUTPUTS))


def predicted_bytes(name: str, model: nn.Module) -> int:
    """Bytes of the state of an optimizer, written as ``--optimizers`` takes it, counted from shapes."""
    if name == "adamw":
        return grng.memory_estimate("RING", model).adamw
    spec = parse_spec(name)
    return grng.memory_estimate(_CLASSES[spec.name], model, **spec.options).total


def measured_bytes(name: str, model: nn.Module) -> int:
    """The same of a state that was made by training."""
    spec = parse_spec(name)
    optimizer = spec.build(model)
    generator = torch.Generator().manual_seed(0)
    for _ in range(_STEPS):
        inputs = torch.randn(_SAMPLES, _INPUTS, generator=generator)
        labels = torch.randint(0, _OUTPUTS, (_SAMPLES,), generator=generator)
        take_step(model, optimizer, spec.entry.protocol, inputs, labels, lambda: None)
    return state_bytes(optimizer)


def check(name: str, width: int, rank: int | None) -> int:
    """What a trained state holds, where the count from shapes is right.

    Args:
        name: The optimizer.
        width: See :func:`build`.
        rank: See :func:`build`.

    Returns:
        The bytes that were measured.

    Raises:
        ArithmeticError: The count differs by more than 2 %.
    """
    model = build(width, rank)
    predicted = predicted_bytes(name, model)
    found = measured_bytes(name, model)
    if abs(predicted - found) > _TOLERANCE * found:
        raise ArithmeticError(f"{name}: {predicted} bytes predicted, {found} measured")
    return found


def _run(name: str, width: int, is_smallest: bool, seed: int) -> Measured:
    torch.manual_seed(seed)
    points = []
    for rank, suffix in ((None, ""), (_RANK, "_lora")):
        model = build(width, rank)
        state, adamw = predicted_bytes(name, model), predicted_bytes("adamw", model)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        point: dict[str, Any] = {
            "width": width,
            f"trained{suffix}": trained,
            f"state{suffix}": state,
            f"ratio{suffix}": state / adamw,
        }
        if is_smallest:
            point[f"measured{suffix}"] = check(name, width, rank)
        points.append(point)
    return Measured(points)


def _widths(options: Options) -> tuple[int, ...]:
    return WIDTHS[:2] if options.is_quick else WIDTHS


def _plan(options: Options) -> Iterator[Planned]:
    widths = _widths(options)
    # Shapes do not depend on a seed: the first one does.
    seed = options.seeds[0]
    for name in OPTIMIZERS:
        for width in widths:
            run = functools.partial(_run, name, width, width == widths[0], seed)
            yield Planned(name, f"width={width}", seed, run)


def _about(options: Options) -> dict[str, Any]:
    return {
        "model": "MLP 784-width-width-10, fp32",
        "widths": list(_widths(options)),
        "lora_rank": _RANK,
        "optimizers": list(OPTIMIZERS),
    }


STUDY = Definition(
    name="memory",
    title="Memory: the state of the optimizers as models grow",
    subtitle="MLP 784-width-width-10, width 64 to 4,096, fp32, LoRA beside both "
    "hidden layers  ·  counted from shapes, the smallest measured too",
    panels=(
        Panel(
            x="trained",
            y="state",
            title="All weights trained",
            x_label="trained parameters",
            y_label="bytes of state",
            x_scale="log",
            y_scale="log",
        ),
        Panel(
            x="trained",
            y="ratio",
            title="The same, relative to AdamW",
            x_label="trained parameters",
            y_label="state / AdamW's",
            x_scale="log",
            y_scale="log",
        ),
        Panel(
            x="trained_lora",
            y="ratio_lora",
            title="LoRA r 8, relative to AdamW",
            x_label="trained parameters",
            y_label="state / AdamW's",
            x_scale="log",
            y_scale="log",
        ),
    ),
    config=_about,
    plan=_plan,
)

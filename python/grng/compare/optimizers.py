# SPDX-License-Identifier: Apache-2.0
"""Optimizer specs such as ``adamw:lr=3e-4``: parsing, valid options, construction."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from grng.compare.errors import UsageError
from grng.compare.protocols import Protocol
from grng.tasks.data import Likelihood

OptionValue = bool | int | float | str | tuple[float, ...] | None
Factory = Callable[..., torch.optim.Optimizer]


@dataclass(frozen=True)
class OptimizerEntry:
    """One optimizer that can be compared."""

    description: str
    factory: Callable[[], Factory]
    takes_model: bool
    protocol: Protocol
    defaults: Mapping[str, OptionValue]
    # None: every keyword argument of the factory.
    options: tuple[str, ...] | None = None


def _of_grng(attribute: str) -> Callable[[], Factory]:
    def find() -> Factory:
        import grng

        found: Factory | None = getattr(grng, attribute, None)
        if found is None:
            raise UsageError(f"optimizer {attribute.lower()!r} is not part of this build of grng")
        return found

    return find


def _adamw() -> Factory:
    return torch.optim.AdamW


def _sgd() -> Factory:
    return torch.optim.SGD


def _adagrad() -> Factory:
    return torch.optim.Adagrad


def _muon() -> Factory:
    if not hasattr(torch.optim, "Muon"):
        raise UsageError(f"optimizer 'muon' needs torch >= 2.9, this is {torch.__version__}")
    from grng.compare.muon import MuonWithAdamW

    return MuonWithAdamW


def _soap() -> Factory:
    try:
        from pytorch_optimizer import SOAP
    except ImportError:
        raise UsageError(
            "optimizer 'soap' needs pytorch-optimizer: pip install --no-deps pytorch-optimizer"
        ) from None
    found: Factory = SOAP
    return found


OPTIMIZERS: dict[str, OptimizerEntry] = {
    "ring": OptimizerEntry(
        description="regularised natural gradient, grng.RING",
        factory=_of_grng("RING"),
        takes_model=True,
        protocol="observe-backward",
        defaults={},
    ),
    "reng": OptimizerEntry(
        description="natural gradient of a gradient-regularised loss, grng.RENG",
        factory=_of_grng("RENG"),
        takes_model=True,
        protocol="observe-own-backward",
        defaults={},
    ),
    "adamw": OptimizerEntry(
        description="torch.optim.AdamW",
        factory=_adamw,
        takes_model=False,
        protocol="backward",
        defaults={"lr": 1e-3, "weight_decay": 1e-2},
        options=("lr", "betas", "eps", "weight_decay", "amsgrad", "foreach", "fused"),
    ),
    "sgd": OptimizerEntry(
        description="torch.optim.SGD with momentum 0.9",
        factory=_sgd,
        takes_model=False,
        protocol="backward",
        defaults={"lr": 0.1, "momentum": 0.9},
        options=("lr", "momentum", "dampening", "weight_decay", "nesterov", "foreach", "fused"),
    ),
    "adagrad": OptimizerEntry(
        description="torch.optim.Adagrad",
        factory=_adagrad,
        takes_model=False,
        protocol="backward",
        defaults={"lr": 1e-2},
        options=("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps", "foreach"),
    ),
    "muon": OptimizerEntry(
        description="torch.optim.Muon for hidden matrices, AdamW for the rest",
        factory=_muon,
        takes_model=True,
        protocol="backward",
        defaults={},
    ),
    "soap": OptimizerEntry(
        description="Shampoo with Adam in its eigenbasis, SOAP of pytorch-optimizer",
        factory=_soap,
        takes_model=False,
        protocol="backward",
        defaults={"lr": 3e-3, "weight_decay": 1e-2},
        options=(
            *("lr", "betas", "shampoo_beta", "weight_decay", "precondition_frequency"),
            *("max_precondition_dim", "merge_dims", "precondition_1d", "correct_bias"),
            *("normalize_gradient", "eps"),
        ),
    ),
    "rkalman": OptimizerEntry(
        description="Kalman filter with gradient regularisation, grng.RKalman",
        factory=_of_grng("RKalman"),
        takes_model=True,
        protocol="observe-targets",
        defaults={},
    ),
    "loko": OptimizerEntry(
        description="low-rank Kalman optimizer, grng.LoKO",
        factory=_of_grng("LoKO"),
        takes_model=True,
        protocol="observe-targets",
        defaults={},
    ),
    "kfac": OptimizerEntry(
        description="K-FAC, factored Tikhonov damping or kfac-pytorch's, grng.KFAC",
        factory=_of_grng("KFAC"),
        takes_model=True,
        protocol="observe-backward",
        defaults={},
    ),
    "sophiag": OptimizerEntry(
        description="Sophia, Gauss-Newton-Bartlett estimate, grng.SophiaG",
        factory=_of_grng("SophiaG"),
        takes_model=True,
        protocol="observe-backward",
        defaults={},
    ),
    "sophiah": OptimizerEntry(
        description="Sophia, Hutchinson estimate by double backward, grng.SophiaH",
        factory=_of_grng("SophiaH"),
        takes_model=True,
        protocol="observe-loss",
        defaults={},
    ),
}


@dataclass(frozen=True)
class OptimizerSpec:
    """One column of the comparison: an optimizer and the options given for it."""

    label: str
    name: str
    options: dict[str, OptionValue]

    @property
    def entry(self) -> OptimizerEntry:
        """The registry entry of this optimizer."""
        return OPTIMIZERS[self.name]

    def for_likelihood(self, likelihood: Likelihood) -> OptimizerSpec:
        """The spec with what the labels are, which Kalman optimizers are made for."""
        if self.entry.protocol != "observe-targets" or likelihood == "categorical":
            return self
        return replace(self, options={"likelihood": likelihood, **self.options})

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer for this model.

        Args:
            model: The model whose parameters it will update.

        Returns:
            The optimizer.

        Raises:
            UsageError: The optimizer refuses a value.
        """
        arguments = {**self.entry.defaults, **self.options}
        # Frozen parameters would cost Adagrad its state, and count as memory.
        trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
        target = model if self.entry.takes_model else trained
        try:
            return self.entry.factory()(target, **arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"optimizer {self.label!r}: {error}") from error

    def hyperparameters(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Every hyper-parameter with the value that is in force, fit for JSON."""
        resolved: dict[str, Any] = {
            name: parameter.default
            for name, parameter in _parameters(self.entry).items()
            if parameter.default is not inspect.Parameter.empty
        }
        resolved |= {**self.entry.defaults, **self.options}
        resolved |= {key: optimizer.defaults[key] for key in resolved if key in optimizer.defaults}
        return {key: _plain(value) for key, value in sorted(resolved.items())}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    return type(value).__name__


def _parameters(entry: OptimizerEntry) -> dict[str, inspect.Parameter]:
    """Keyword arguments of the factory; the first argument is the model or its parameters."""
    factory = entry.factory()
    found = dict(list(inspect.signature(factory).parameters.items())[1:])
    if isinstance(factory, type) and any(p.kind is p.VAR_KEYWORD for p in found.values()):
        # What it does not name itself, its base class takes.
        found |= dict(list(inspect.signature(factory.__mro__[1]).parameters.items())[1:])
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {name: p for name, p in found.items() if p.kind not in variadic}


def valid_options(name: str) -> tuple[str, ...]:
    """Option keys that a spec of this optimizer may use.

    Args:
        name: A key of ``OPTIMIZERS``.

    Returns:
        The keys in the order of the signature.
    """
    entry = OPTIMIZERS[name]
    return entry.options if entry.options is not None else tuple(_parameters(entry))


def parse_value(text: str) -> OptionValue:
    """Return the value of an option: a number, a tuple, True, False, None, else the text itself."""
    lowered = text.lower()
    if lowered in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[lowered]
    try:
        value: OptionValue = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value


def parse_spec(text: str) -> OptimizerSpec:
    """One optimizer spec, ``name`` or ``name:key=value:key=value``.

    Args:
        text: The spec.

    Returns:
        The parsed spec; its label is the spec without spaces.

    Raises:
        UsageError: Unknown optimizer or option, or an option without a value.
    """
    label = text.replace(" ", "")
    name, *pairs = label.split(":")
    if name not in OPTIMIZERS:
        valid = ", ".join(OPTIMIZERS)
        raise UsageError(f"unknown optimizer {name!r}; valid optimizers: {valid}")
    keys = valid_options(name)
    options: dict[str, OptionValue] = {}
    for pair in pairs:
        key, has_value, value = pair.partition("=")
        if key not in keys:
            valid = ", ".join(keys)
            raise UsageError(f"unknown option {key!r} of {name!r}; valid options: {valid}")
        if not has_value or not value:
            raise UsageError(f"optimizer {label!r}: option {key!r} must be given as {key}=value")
        if key in options:
            raise UsageError(f"optimizer {label!r}: option {key!r} is given twice")
        options[key] = parse_value(value)
    return OptimizerSpec(label, name, options)


def expand(text: str) -> list[str]:
    """The specs that a spec with alternatives stands for.

    Args:
        text: For example ``"sgd:lr=0.1|0.3:momentum=0.9"``.

    Returns:
        ``["sgd:lr=0.1:momentum=0.9", "sgd:lr=0.3:momentum=0.9"]``: every combination.
    """
    choices = []
    for pair in text.split(":"):
        key, has_value, values = pair.partition("=")
        choices.append([key + has_value + value for value in values.split("|")])
    return [":".join(chosen) for chosen in itertools.product(*choices)]


def parse_specs(text: str) -> list[OptimizerSpec]:
    """Comma-separated optimizer specs; commas inside parentheses belong to a value.

    A value may be several, separated by ``|``: each makes a spec of its own.

    Args:
        text: The specs.

    Returns:
        The parsed specs in the given order.

    Raises:
        UsageError: A spec is wrong, empty, or given twice.
    """
    parts = re.split(r",(?![^()]*\))", text)
    specs = [parse_spec(spec) for part in parts for spec in expand(part)]
    labels = [spec.label for spec in specs]
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError(f"optimizer {label!r} is given twice")
    return specs

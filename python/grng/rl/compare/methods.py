# SPDX-License-Identifier: Apache-2.0
"""The methods that can be compared, and specs such as ``rank1:damping=0.1:rollout=32``."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from grng.compare.errors import UsageError
from grng.compare.optimizers import expand, parse_value
from grng.rl.config import POLICY_OPTIMIZERS, ActorCriticConfig
from grng.rl.errors import EnvironmentUnavailable

# Methods of other libraries: where the class is, and what it gets besides its own defaults: rollouts of
# 64 steps, as theirs of 2,048 are meant for one environment.
_RIVALS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "a2c": ("stable_baselines3", "A2C", {}),
    "ppo": ("stable_baselines3", "PPO", {"n_steps": 64}),
    "trpo": ("sb3_contrib", "TRPO", {"n_steps": 64}),
}
NAMES = (*POLICY_OPTIMIZERS, *_RIVALS)
# Set by the comparison, the same for every method.
_SHARED = ("optimizer", "optimizer_options", "seed", "hidden", "normalize_observations")
_NOT_OPTIONS = (
    "policy",
    "env",
    "policy_kwargs",
    "seed",
    "device",
    "verbose",
    "tensorboard_log",
    "_init_setup_model",
)


@dataclass(frozen=True)
class Method:
    """One row of the comparison."""

    label: str
    name: str
    options: dict[str, Any]

    @property
    def is_rival(self) -> bool:
        """Whether Stable-Baselines3 trains it."""
        return self.name in _RIVALS

    @property
    def rival_class(self) -> Callable[..., Any]:
        """The class of Stable-Baselines3.

        Raises:
            EnvironmentUnavailable: It is not installed.
        """
        return _rival(self.name)

    def settings(self) -> dict[str, Any]:
        """Keyword arguments of :class:`grng.rl.ActorCritic` or of the class of Stable-Baselines3."""
        if self.is_rival:
            return {**_RIVALS[self.name][2], **self.options}
        trainer = {k: v for k, v in self.options.items() if k in _trainer_options()}
        others = {k: v for k, v in self.options.items() if k not in trainer}
        return {
            "optimizer": self.name,
            "optimizer_options": others,
            **trainer,
        }

    def resolved(self) -> dict[str, Any]:
        """Every option with the value that is in force, fit for JSON."""
        if self.is_rival:
            keys = valid_options(self.name)
            known = _signature_defaults(self.rival_class, keys) | self.settings()
        else:
            entry = POLICY_OPTIMIZERS[self.name]
            own = [key for key in valid_options(self.name) if key not in _trainer_options()]
            trainer = {f.name: f.default for f in fields(ActorCriticConfig)}
            known = {key: trainer[key] for key in _trainer_options()}
            known |= _signature_defaults(entry.factory, own) | dict(entry.defaults) | self.options
        return {key: _plain(value) for key, value in sorted(known.items())}


def _signature_defaults(factory: Callable[..., Any], keys: list[str]) -> dict[str, Any]:
    known = inspect.signature(factory).parameters
    return {
        key: known[key].default
        for key in keys
        if key in known and known[key].default is not inspect.Parameter.empty
    }


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else str(value)


def _rival(name: str) -> Callable[..., Any]:
    module, attribute, _ = _RIVALS[name]
    if importlib.util.find_spec(module) is None:
        raise EnvironmentUnavailable(
            f'method {name!r} needs {module}: pip install "grng-kernels[rl-rivals]"'
        )
    found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return found


def _trainer_options() -> list[str]:
    return [f.name for f in fields(ActorCriticConfig) if f.name not in _SHARED]


def valid_options(name: str) -> list[str]:
    """Return the option keys that a spec of this method may use.

    Raises:
        EnvironmentUnavailable: The library of the method is not installed.
    """
    if name in _RIVALS:
        found = inspect.signature(_rival(name)).parameters
        return [key for key in found if key not in _NOT_OPTIONS]
    factory = POLICY_OPTIMIZERS[name].factory
    own = [key for key in list(inspect.signature(factory).parameters)[1:] if key != "seed"]
    return _trainer_options() + own


def parse_method(text: str) -> Method:
    """Return the method of one spec, ``name`` or ``name:key=value:key=value``.

    Raises:
        UsageError: Unknown method or option, or an option without a value.
        EnvironmentUnavailable: The library of the method is not installed.
    """
    label = text.replace(" ", "")
    name, *pairs = label.split(":")
    if name not in NAMES:
        raise UsageError(f"unknown optimizer {name!r}; of this task: {', '.join(NAMES)}")
    keys, options = valid_options(name), {}
    for pair in pairs:
        key, has_value, value = pair.partition("=")
        if key not in keys:
            raise UsageError(
                f"unknown option {key!r} of {name!r}; valid options: {', '.join(keys)}"
            )
        if not has_value or not value or key in options:
            raise UsageError(
                f"optimizer {label!r}: option {key!r} must be given once, as {key}=value"
            )
        options[key] = parse_value(value)
    return Method(label, name, options)


def parse_methods(text: str) -> list[Method]:
    """Return the methods of comma-separated specs; ``a|b`` in a value makes two of one.

    Raises:
        UsageError: A spec is wrong, or given twice.
        EnvironmentUnavailable: The library of a method is not installed.
    """
    parts = re.split(r",(?![^()]*\))", text)
    methods = [parse_method(spec) for part in parts for spec in expand(part)]
    labels = [method.label for method in methods]
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError(f"optimizer {label!r} is given twice")
    return methods

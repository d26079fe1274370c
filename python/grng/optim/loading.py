# SPDX-License-Identifier: Apache-2.0
"""State dicts that are loaded whole or not at all, with every tensor in its own dtype."""

from collections import defaultdict
from collections.abc import Iterable
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class ExactLoading(Optimizer):
    """An optimizer that loads what it saved: ``torch.optim.Optimizer`` casts state to the parameter's dtype.

    A subclass says in :meth:`_accepted` what fits a parameter, and does in :meth:`_after_loading` what is
    left to do when all is loaded; both before the hooks that users put behind a load.
    """

    _names: dict[nn.Parameter, str]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict; unlike the base class, keep the dtype of every tensor.

        Settings that an older version did not save stay as they are. The given dict is not changed.

        Raises:
            TypeError: No dict.
            ValueError: No state dict of an optimizer; other parameter groups; or a state that is not whole,
                or of another shape than the parameter it is for, which is named. Nothing is loaded then.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(
                f"{type(self).__name__}: state_dict must be a dict, got {type(state_dict).__name__}"
            )
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            if changed is not None:
                state_dict = changed
        saved, groups = self._matched(state_dict)
        if self._is_only_a_form(state_dict["param_groups"], saved):
            saved = {}
        # All are checked before any is copied: a copy of a whole state is large.
        accepted = {p: self._accepted(p, dict(s)) for p, s in saved.items()}
        known = {i for g in state_dict["param_groups"] for i in g["params"]}
        others = {k: v for k, v in state_dict["state"].items() if k not in known}
        state: defaultdict[Any, Any] = defaultdict(dict, others)
        for p, values in accepted.items():
            state[p] = {key: _copied(key, value, p) for key, value in values.items()}
        self.state, self.param_groups = state, groups
        self._after_loading()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _matched(
        self, state_dict: dict[str, Any]
    ) -> tuple[dict[nn.Parameter, dict[str, Any]], list[dict[str, Any]]]:
        """Return the saved state of each parameter, and the groups to be.

        Raises:
            ValueError: They do not fit.
        """
        owner = type(self).__name__
        for key, kind in (("state", dict), ("param_groups", list)):
            if not isinstance(state_dict.get(key), kind):
                raise ValueError(
                    f"{owner}: the state dict must have {key!r}, a {kind.__name__}: this is not the state "
                    "dict of an optimizer, or not all of it"
                )
        saved, given = state_dict["state"], state_dict["param_groups"]
        if len(given) != len(self.param_groups):
            raise ValueError(
                f"{owner}: loaded state dict has a different number of parameter groups: {len(given)}, not "
                f"{len(self.param_groups)}"
            )
        groups, states = [], {}
        for i, (mine, its) in enumerate(zip(self.param_groups, given, strict=True)):
            ids = its.get("params")
            if not isinstance(ids, list) or len(ids) != len(mine["params"]):
                count = len(ids) if isinstance(ids, list) else "none"
                raise ValueError(
                    f"{owner}: loaded state dict contains a parameter group that doesn't match the size of "
                    f"optimizer's group: group {i} has {count} parameters, not {len(mine['params'])}"
                )
            groups.append({**mine, **deepcopy({k: v for k, v in its.items() if k != "params"})})
            for number, p in zip(ids, mine["params"], strict=True):
                if number not in saved:
                    continue
                found = saved[number]
                if not isinstance(found, dict):
                    raise ValueError(
                        f"{owner}: the state of {self._name_of(p)} must be a dict, the state dict has "
                        f"{type(found).__name__}"
                    )
                # A flat distributed checkpoint gives an empty dict for what it does not have.
                states[p] = {k: v for k, v in found.items() if not (isinstance(v, dict) and not v)}
        return states, groups

    def _is_only_a_form(
        self, groups: list[dict[str, Any]], saved: dict[nn.Parameter, dict[str, Any]]
    ) -> bool:
        # Whether a state was saved before the first step, when somebody only asked for its form.
        raise AssertionError("implemented by each optimizer")

    def _accepted(self, parameter: nn.Parameter, saved: dict[str, Any]) -> dict[str, Any]:
        # What of a saved state, a dict to be changed at will, is loaded; a ValueError where it does not fit.
        raise AssertionError("implemented by each optimizer")

    def _after_loading(self) -> None:
        raise AssertionError("implemented by each optimizer")

    def _name_of(self, parameter: nn.Parameter) -> str:
        """The name that a user knows a parameter by, or what to call it."""
        for group in self.param_groups:
            for p, name in zip(group["params"], group.get("param_names", []), strict=False):
                if p is parameter:
                    return str(name)
        return self._names.get(parameter, "a parameter")

    def _check_shape(
        self, key: str, parameter: nn.Parameter, value: Any, shape: Iterable[int]
    ) -> None:
        """Check one tensor of a saved state.

        Raises:
            ValueError: It is none, or has another shape.
        """
        wanted = list(shape)
        if not isinstance(value, Tensor) or list(value.shape) != wanted:
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{type(self).__name__}: {key} of {self._name_of(parameter)} must have shape {wanted}, "
                f"the state dict has {found}"
            )

    def _check_together(
        self, parameter: nn.Parameter, saved: dict[str, Any], keys: Iterable[str]
    ) -> bool:
        """Check that a saved state has all of some entries, or none; return which.

        Raises:
            ValueError: It lacks one of them.
        """
        keys = list(keys)
        missing = [k for k in keys if k not in saved]
        if missing and len(missing) < len(keys):
            there = next(k for k in keys if k in saved)
            raise ValueError(
                f"{type(self).__name__}: the state of {self._name_of(parameter)} lacks {', '.join(missing)}, "
                f"but has {there}: the state dict is of something else, or not whole"
            )
        return not missing


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return the parameters of all groups, in order."""
    return list(chain.from_iterable(g["params"] for g in optimizer.param_groups))


def _copied(key: str, value: Any, parameter: nn.Parameter) -> Any:
    if isinstance(value, Tensor):
        # The step counts of AdamW live on the host.
        device = torch.device("cpu") if key == "step" else parameter.device
        return value.detach().to(device=device, copy=True)
    return deepcopy(value)

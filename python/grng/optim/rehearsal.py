# SPDX-License-Identifier: Apache-2.0
"""The step by which ``torch.distributed.checkpoint`` learns which tensors a new optimizer will have.

It fills all gradients with zeros, sets every learning rate to zero and calls ``step()``, without a forward
pass. The state that such a step leaves is only a form to read a checkpoint into: it is dropped when a step
with gradients comes without a load, so that a run that was once asked for its state is the run that was
not.
"""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from grng.optim.loading import ExactLoading


def is_rehearsal(optimizer: Optimizer) -> bool:
    """Return whether the step that begins is such a step.

    While there is no state this waits for the device, where the learning rate is a tensor, or zero.
    """
    if any(optimizer.state.values()) or any(float(g["lr"]) != 0 for g in optimizer.param_groups):
        return False
    grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    return bool(grads) and not any(bool(grad.any()) for grad in grads)


class Rehearsing(ExactLoading):
    """An optimizer that gives its state a form when it is asked for it, in :meth:`_rehearse`."""

    _rehearsed = False

    def _rehearse_if_asked(self) -> bool:
        """Return whether this step only asks for the form of the state, which it has got then."""
        if not is_rehearsal(self):
            return False
        self._rehearse()
        self._rehearsed = True
        return True

    def _rehearse(self) -> None:
        raise AssertionError("implemented by each optimizer")

    def _drop_rehearsal(self) -> None:
        if self._rehearsed:
            self.state.clear()
            self._rehearsed = False

    def _is_only_a_form(
        self, groups: list[dict[str, Any]], saved: dict[nn.Parameter, dict[str, Any]]
    ) -> bool:
        # A dict of another optimizer does not count steps in its groups.
        return bool(groups) and groups[0].get("step") == 0

    def _after_loading(self) -> None:
        self._rehearsed = False

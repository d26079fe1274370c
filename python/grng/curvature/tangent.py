# SPDX-License-Identifier: Apache-2.0
"""Products of a Jacobian with a direction of the weights, after the loss has used up its graph."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Tangent:
    """How some outputs move with the weights: ``J d`` for directions d that come later.

    ``Jᵀ v`` is linear in v, so its graph differentiated by v gives ``J d``: two backward passes and no second
    forward pass. That graph keeps what it needs alive, also when ``loss.backward()`` has freed the other.

    Args:
        outputs: ``[N]``, with a graph, which stays usable.
        parameters: What the outputs are differentiated by; those that they do not depend on move nothing.

    Raises:
        RuntimeError: The graph is gone.
    """

    def __init__(self, outputs: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        self._probe = torch.ones_like(outputs).requires_grad_()
        found: Sequence[Tensor | None] = torch.autograd.grad(
            outputs, parameters, self._probe, create_graph=True, allow_unused=True
        )
        self._products = {p: g for p, g in zip(parameters, found, strict=True) if g is not None}

    def product(self, parameters: Sequence[nn.Parameter], directions: Sequence[Tensor]) -> Tensor:
        """Return ``J d``, ``[N]``; may be called again.

        Args:
            parameters: Those that move.
            directions: How, in their shapes and dtypes.

        Raises:
            RuntimeError: An operation cannot be differentiated twice.
        """
        known = [
            (self._products[p], d)
            for p, d in zip(parameters, directions, strict=True)
            # An operation whose derivative is zero everywhere leaves no graph.
            if p in self._products and self._products[p].requires_grad
        ]
        if not known:
            return torch.zeros_like(self._probe)
        products, along = zip(*known, strict=True)
        # Not on a way back to the probe, such an operation is passed over, and the product is wrong.
        if _has_error([g for g in products if isinstance(g, Tensor)]):
            raise RuntimeError("an operation is marked as differentiable once")
        (moved,) = torch.autograd.grad(
            products, self._probe, along, retain_graph=True, allow_unused=True
        )
        return torch.zeros_like(self._probe) if moved is None else moved


def _has_error(tensors: Sequence[Tensor]) -> bool:
    """Whether the graphs have an operation in place of the derivative of one that has none."""
    todo = [t.grad_fn for t in tensors]
    seen = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            return True
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
    return False

# SPDX-License-Identifier: Apache-2.0
"""Linear layers that a forward pass fed a single vector, found in its graph.

Row ``c`` of the Jacobian by such a weight is ``kron(g_c, x)``, of the gradient ``g_c`` of the layer's output
and its input ``x``: the backward pass need not go further than the output. The graph says more than hooks on
modules could (a weight that is also used without its module, outputs of another forward pass), and nothing is
kept between steps.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

# What torch calls the nodes of ``x Wᵀ + b`` and ``x Wᵀ``: where the weight goes in, and the saved input.
_PRODUCTS = {"AddmmBackward0": (2, "_saved_mat1"), "MmBackward0": (1, "_saved_self")}
_LEAF = "torch::autograd::AccumulateGrad"


class LayerOutput(NamedTuple):
    """By what to differentiate for the gradient of a layer's output ``[m]``, and the layer's input."""

    by: nn.Parameter | GradientEdge
    inputs: Tensor | None  # [n], a copy; None: of a bias, whose derivative is that of the output


def find(outputs: Tensor, parameters: list[nn.Parameter]) -> dict[nn.Parameter, LayerOutput]:
    """Return the parameters of the layers that ``outputs`` used once, with one row of input.

    A parameter that is not in the result may be used in any way. Walks the graph once.

    Raises:
        RuntimeError: The graph is gone, or an input was modified in place.
    """
    if outputs.grad_fn is None:
        return {}
    users = _users(outputs.grad_fn)
    leaves = {node.variable: node for node in users if node.name() == _LEAF}
    found: dict[nn.Parameter, LayerOutput] = {}
    biases: dict[Node, nn.Parameter] = {}
    for p in parameters:
        leaf = leaves.get(p)
        # A hook on the parameter may change its gradient.
        if leaf is None or len(users[leaf]) != 1 or p._backward_hooks:
            continue
        user, position = users[leaf][0]
        if user.name() == "TBackward0" and p.dim() == 2 and len(users[user]) == 1:
            layer = _layer(*users[user][0], p)
            if layer is not None:
                found[p] = layer
        elif user.name() == "AddmmBackward0" and position == 0 and p.dim() == 1:
            if _attribute(user, "_saved_beta") == 1:
                biases[user] = p
    for weight, (by, x) in list(found.items()):
        bias = biases.get(by.node) if isinstance(by, GradientEdge) else None
        # A bias of one element is spread over the outputs: its gradient is not theirs.
        if bias is not None and len(bias) == len(weight):
            found[weight], found[bias] = LayerOutput(bias, x), LayerOutput(bias, None)
    return found


def _users(root: Node) -> dict[Any, list[tuple[Any, int]]]:
    """For every node that the root leads to, the nodes that it gives its output to, and as what."""
    users: dict[Any, list[tuple[Any, int]]] = {root: []}
    waiting = [root]
    while waiting:
        node = waiting.pop()
        for position, (source, _) in enumerate(node.next_functions):
            if source is None:
                continue
            if source not in users:
                users[source] = []
                waiting.append(source)
            users[source].append((node, position))
    return users


def _layer(product: Any, position: int, weight: nn.Parameter) -> LayerOutput | None:
    where, saved = _PRODUCTS.get(product.name(), (None, ""))
    if position != where or _attribute(product, "_saved_alpha", 1) != 1:
        return None
    x = getattr(product, saved)
    if x is None or x.shape != (1, weight.shape[1]) or x.layout != torch.strided:
        return None
    return LayerOutput(GradientEdge(product, 0), x.detach()[0].clone())


def _attribute(node: Any, name: str, default: object = None) -> object:
    return getattr(node, name, default)

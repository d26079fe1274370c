# SPDX-License-Identifier: Apache-2.0
"""The two projections inside ``nn.MultiheadAttention``, which calls no module for them."""

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from grng.curvature.layers import ForwardPass, KroneckerLayer, LinearLayer

# What ``linear`` leaves in the graph, with the name under which each node keeps the rows it was given.
_PRODUCTS = {"AddmmBackward0": "_saved_mat1", "MmBackward0": "_saved_self"}
# Nodes between the output of the module and its first product: far fewer than this.
_MOST_NODES = 200


class ProjectionLayer(LinearLayer):
    """The input or the output projection of an ``nn.MultiheadAttention``.

    The rows that meet the weight, and the gradients of the product, are taken from the graph of the forward
    pass: from the matrix product whose second factor is the transposed weight. Its rows are positions:
    *reduce* does not apply.
    """

    kind = "MultiheadAttention"

    def passes(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> list[ForwardPass]:
        """See the base class; none where the graph has another form, as with separate projections."""
        attended = output[0] if isinstance(output, tuple) else output
        if not attended.requires_grad:
            return []
        node = _product_with(attended.grad_fn, self.weight)
        if node is None:
            return []
        rows = getattr(node, _PRODUCTS[node.name()])
        if rows is None:
            return []

        def listen(on_grad: Callable[[Tensor], None]) -> None:
            node.register_prehook(lambda grads: on_grad(grads[0]))

        return [ForwardPass(cast(Tensor, rows).detach(), GradientEdge(node, 0), listen)]


def _product_with(start: Node, weight: nn.Parameter) -> Node | None:
    """Return the node of the product ``rows @ weight.T``, or None where there is no such single node."""
    seen: set[Node] = set()
    waiting = [start]
    while waiting and len(seen) < _MOST_NODES:
        node = waiting.pop(0)
        if node in seen:
            continue
        seen.add(node)
        following = [n for n, _ in node.next_functions if n is not None]
        if node.name() in _PRODUCTS and any(_is_transposed(n, weight) for n in following):
            return node
        waiting += following
    return None


def _is_transposed(node: Node, weight: nn.Parameter) -> bool:
    if node.name() != "TBackward0":
        return False
    leaf = node.next_functions[0][0]
    return getattr(leaf, "variable", None) is weight


def projections(name: str, module: nn.MultiheadAttention) -> list[KroneckerLayer]:
    """Return the layers of an attention module whose weights are trained; none for separate projections."""
    prefix = f"{name}." if name else ""
    layers: list[KroneckerLayer] = []
    packed = cast(nn.Parameter | None, module.in_proj_weight)
    found: list[tuple[str, Any, Any]] = [
        ("in_proj", packed, module.in_proj_bias),
        ("out_proj", module.out_proj.weight, module.out_proj.bias),
    ]
    for label, weight, bias in found:
        if isinstance(weight, nn.Parameter) and weight.requires_grad:
            bias = bias if bias is not None and bias.requires_grad else None
            layers.append(ProjectionLayer(f"{prefix}{label}", module, weight, bias))
    return layers

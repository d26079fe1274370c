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
    pass: from the matrix product whose second factor is the transposed weight.
    """

    kind = "MultiheadAttention"
    pools = False

    def passes(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> list[ForwardPass]:
        """See the base class; none where the graph has another form, as with separate projections."""
        attended = output[0] if isinstance(output, tuple) else output
        if not attended.requires_grad:
            return []
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        node = _product_with(attended.grad_fn, self.weight, {x.grad_fn for x in given})
        rows = None if node is None else getattr(node, _PRODUCTS[node.name()])
        if node is None or rows is None:
            return []
        batch = _batch_size(cast(nn.MultiheadAttention, self.module), given[0])

        def by_example(positions: Tensor) -> Tensor:
            # Inside, the module works on [positions, examples, width], whatever it was given.
            return positions.detach().unflatten(0, (-1, batch)).transpose(0, 1)

        def listen(on_grad: Callable[[Tensor], None]) -> None:
            node.register_prehook(lambda grads: on_grad(by_example(grads[0])))

        return [ForwardPass(by_example(rows), GradientEdge(node, 0), listen, by_example)]


def _batch_size(module: nn.MultiheadAttention, query: Tensor) -> int:
    if query.dim() == 2:
        return 1
    return query.shape[0 if module.batch_first else 1]


def _product_with(start: Node, weight: nn.Parameter, outside: set[Node | None]) -> Node | None:
    """Return the node of the product ``rows @ weight.T``, or None where there is no such single node.

    ``outside`` are the nodes of the module's inputs: what lies before them belongs to somebody else.
    """
    seen: set[Node | None] = set(outside)
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
    if leaf is not None and leaf.name() == "ToCopyBackward0":  # autocast
        leaf = leaf.next_functions[0][0]
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

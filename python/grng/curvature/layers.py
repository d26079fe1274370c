# SPDX-License-Identifier: Apache-2.0
"""What a layer's two Kronecker factors are made of: the interface, and the layers that are one matrix."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

import grng_kernels as kernels
from grng.curvature.diagonal import diagonal_factor_update_

SHARINGS = ("auto", "expand", "reduce")
# Elements of a piece of an input whose scores are computed together on a CPU.
MOST_SCORED = 2**20


class ForwardPass(NamedTuple):
    """One use of a weight in a forward pass.

    Attributes:
        layer_input: What met the weight, without a graph.
        edge: Where the gradient of the output can be asked for.
        listen: Registers what is called with that gradient in a backward pass.
        arrange: Brings a gradient asked for at ``edge`` into the order of ``layer_input``.
    """

    layer_input: Tensor
    edge: GradientEdge
    listen: Callable[[Callable[[Tensor], None]], object]
    arrange: Callable[[Tensor], Tensor] = torch.detach


@dataclass
class Record:
    """Input and output gradient of one forward pass of one layer, as the module saw them."""

    layer_input: Tensor
    output_grad: Tensor | None = None
    # With the exact Fisher one for each class, of which the first is output_grad; and those of further heads.
    further_grads: list[Tensor] = field(default_factory=list)
    # The place of the first gradient among those of all heads.
    first: int = 0
    # Whether the gradient came with a graph of its own: what follows is part of a second derivative.
    is_differentiable: bool = False
    # Gradient of a sampled label (summed over the terms) or of the loss (their mean).
    sampled: bool = False
    # Terms of the loss that this pass contributed to; None where nobody said.
    terms: int | None = None
    # Records of one forward pass of the model have one number.
    observation: int = 0
    # Which backward pass of its layer since the last step this one belongs to.
    round: int = 0
    # Which forward pass of the model it belongs to, as far as can be seen.
    forward: int = 0
    # Whether the loss was differentiated, and its gradient then zeroed.
    passed: bool = False
    outdated: bool = False
    # That of the input when it was recorded, which keeps no copy; None where torch counts none.
    version: int | None = None

    def is_overwritten(self) -> bool:
        """Return whether the input was changed in place since."""
        return self.version is not None and self.layer_input._version != self.version

    def grads(self) -> list[Tensor]:
        """Return all gradients of the output."""
        return [] if self.output_grad is None else [self.output_grad, *self.further_grads]


@dataclass(eq=False)
class KroneckerLayer:
    """One layer whose Fisher information is approximated by two factors per block.

    Its weight is seen as ``blocks`` matrices ``[out, in]``; a bias is the last column of theirs. A side that
    is ``diagonal`` keeps only the diagonal of its factor.
    """

    name: str
    module: nn.Module
    weight: nn.Parameter
    bias: nn.Parameter | None
    # (output side, input side)
    diagonal: tuple[bool, bool] = field(default=(False, False), kw_only=True)

    kind = "matrix"
    blocks = 1
    # Whether *reduce* is the better choice where the model pools the positions of an example.
    pools = True

    def passes(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> list[ForwardPass]:
        """Return the uses of the weight in one call of the module that a gradient can reach."""
        if not isinstance(output, Tensor) or not output.requires_grad:
            return []
        layer_input = args[0] if args else next(iter(kwargs.values()))
        # The edge, not the tensor: an in-place activation may overwrite the output.
        edge = get_gradient_edge(output)
        return [ForwardPass(layer_input.detach(), edge, output.register_hook)]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters this layer owns."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def sizes(self) -> tuple[int, int]:
        """Orders of the output-side and of the input-side factor of a block."""
        out, inp = self.weight_matrix(self.weight).shape
        return out // self.blocks, inp + (self.bias is not None)

    def factor_shape(self, side: int) -> tuple[int, ...]:
        """Shape of a factor, 0 being the output side: ``[n]``, ``[n, n]``, or ``[blocks, n, n]``."""
        n = self.sizes[side]
        if self.diagonal[side]:
            return (n,)
        return (n, n) if self.blocks == 1 else (self.blocks, n, n)

    def weight_matrix(self, weight: Tensor) -> Tensor:
        """Return the weight, or its gradient, as ``[blocks * out, in]``; a view where possible."""
        return weight

    def examples(self, layer_input: Tensor) -> int:
        """Return the number of examples in an input: its leading dimension."""
        return layer_input.shape[0] if layer_input.dim() > 1 else 1

    def positions(self, layer_input: Tensor) -> int:
        """Return how often the weight was used per example."""
        return layer_input.shape[1:-1].numel()

    def update_input_factor(
        self,
        factor: Tensor,
        layer_input: Tensor,
        *,
        decay: float | Tensor,
        scale: float | Tensor,
        reduce: bool,
    ) -> Tensor:
        """``factor <- decay·factor + scale·Σ a aᵀ`` over the rows ``a``; return ``Info``.

        ``reduce`` means one row per example, the mean over its positions.
        """
        rows = layer_input.detach()
        if reduce:
            rows = rows.flatten(1, -2).mean(1)
        rows = rows.reshape(-1, rows.shape[-1])
        return self._update(1, factor, rows, decay, scale, self.bias is not None)

    def update_output_factor(
        self,
        factor: Tensor,
        output_grad: Tensor,
        *,
        decay: float | Tensor,
        scale: float | Tensor,
        reduce: bool,
    ) -> Tensor:
        """``factor <- decay·factor + scale·Σ g gᵀ`` over the rows ``g``; return ``Info``.

        ``reduce`` means one row per example, the sum over its positions.
        """
        rows = output_grad.detach()
        if reduce:
            rows = rows.flatten(1, -2).sum(1)
        return self._update(0, factor, rows.reshape(-1, rows.shape[-1]), decay, scale, False)

    def _update(
        self,
        side: int,
        factor: Tensor,
        rows: Tensor,
        decay: float | Tensor,
        scale: float | Tensor,
        bias: bool,
    ) -> Tensor:
        if self.diagonal[side]:
            return diagonal_factor_update_(factor, rows, decay=decay, scale=scale, bias=bias)
        return kernels.kron_factor_update_(factor, rows, decay=decay, scale=scale, bias=bias)

    def scores(self, layer_input: Tensor, output_grad: Tensor, step: list[Tensor]) -> Tensor:
        """Return ``Σ gᵀ Δ a`` over the positions of each example, fp32 or fp64 ``[examples]``."""
        # fp16 would overflow: the step need not be small.
        wide = torch.promote_types(layer_input.dtype, torch.float32)
        rows, grad = layer_input, output_grad
        if rows.dim() == 1:
            rows, grad = rows[None], grad[None]
        weight = self.weight_matrix(step[0].to(wide))
        bias = step[1].to(wide) if len(step) > 1 else None
        parts = 1
        if rows.is_cpu:
            # What is formed stays in the caches; fresh memory for all of it costs as much as the products.
            parts = max(1, max(rows.numel(), grad.numel()) // MOST_SCORED)
        return torch.cat(
            [
                _scores(r.to(wide), g.to(wide), weight, bias)
                for r, g in zip(rows.chunk(parts), grad.chunk(parts), strict=True)
            ]
        )

    def grads(self) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of weight and bias: zeros for a bias that got none, None without a bias."""
        assert self.weight.grad is not None, "asked only for layers that have a gradient"
        if self.bias is None:
            return self.weight.grad, None
        bias = self.bias.grad
        return self.weight.grad, torch.zeros_like(self.bias) if bias is None else bias

    def split(
        self, weight: Tensor, bias: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Return what is shaped like the parameters as blocks ``[out, in]`` and their last columns."""
        grad = self.weight_matrix(weight)
        columns: list[Tensor | None] = [None] * self.blocks
        if bias is not None:
            dtype = torch.promote_types(grad.dtype, bias.dtype)
            grad = grad.to(dtype)
            columns = list(bias.to(dtype).view(self.blocks, -1))
        return list(grad.unflatten(0, (self.blocks, -1))), columns

    def join(self, blocks: list[Tensor]) -> list[Tensor]:
        """Return blocks ``[out, in (+ 1)]`` as tensors shaped like the parameters: weight, bias."""
        whole = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        d_in = self.weight_matrix(self.weight).shape[1]
        parts = [self.matrix_weight(whole[:, :d_in])]
        if self.bias is not None:
            parts.append(whole[:, -1])
        return parts

    def matrix_weight(self, matrix: Tensor) -> Tensor:
        """Return ``[blocks * out, in]`` in the shape of the weight."""
        return matrix.reshape(self.weight.shape)


def _scores(rows: Tensor, grad: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.shape[0] <= weight.shape[1]:
        inner = torch.nn.functional.linear(rows, weight, bias) * grad
        return inner.flatten(1).sum(1)
    # The narrower side is formed: the output of a head over a vocabulary would be large.
    scores = ((grad @ weight) * rows).flatten(1).sum(1)
    return scores if bias is None else scores + (grad * bias).flatten(1).sum(1)


class LinearLayer(KroneckerLayer):
    """``nn.Linear``: any leading dimensions of the input."""

    kind = "Linear"


class TransposedLinearLayer(KroneckerLayer):
    """``transformers.pytorch_utils.Conv1D``: a linear layer whose weight is ``[d_in, d_out]``."""

    kind = "Conv1D (transposed linear)"

    def weight_matrix(self, weight: Tensor) -> Tensor:
        """Return the transposed weight."""
        return weight.mT

    def matrix_weight(self, matrix: Tensor) -> Tensor:
        """Return the transposed matrix."""
        return matrix.mT

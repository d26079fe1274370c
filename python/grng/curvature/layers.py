# SPDX-License-Identifier: Apache-2.0
"""Which layers have Kronecker factors, of what size, and why the rest is left to AdamW."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class KroneckerLayer:
    """One layer ``y = W x + b`` whose Fisher block is approximated by two factors.

    The bias is the last column of the weight: gradients are handled as ``[d_out, d_in + 1]``.
    """

    name: str
    module: nn.Linear
    weight: nn.Parameter
    bias: nn.Parameter | None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters this layer owns."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def sizes(self) -> tuple[int, int]:
        """Orders of the output-side and of the input-side factor."""
        return self.weight.shape[0], self.weight.shape[1] + (self.bias is not None)

    def input_rows(self, layer_input: Tensor) -> Tensor:
        """Return the layer's input as ``[rows, d_in]``, without the column of ones."""
        return layer_input.detach().reshape(-1, self.weight.shape[1])

    def output_rows(self, output_grad: Tensor) -> Tensor:
        """Return the gradient of the layer's output as ``[rows, d_out]``."""
        return output_grad.detach().reshape(-1, self.weight.shape[0])

    def grads(self) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of the weight ``[d_out, d_in]`` and of the bias, None without a bias.

        Both have one dtype, the wider of the two.
        """
        grad = self.weight.grad
        assert grad is not None, "asked only for layers that have a gradient"
        if self.bias is None:
            return grad, None
        column = self.bias.grad if self.bias.grad is not None else torch.zeros_like(self.bias)
        dtype = torch.promote_types(grad.dtype, column.dtype)
        return grad.to(dtype), column.to(dtype)

    def apply_step(self, step: Tensor, *, decay: float | Tensor) -> None:
        """Shrink the parameters by ``1 − decay`` and subtract ``step [d_out, d_in (+ 1)]``, in place."""
        d_in = self.weight.shape[1]
        parts = (step[:, :d_in], step[:, -1])[: len(self.parameters)]
        for parameter, part in zip(self.parameters, parts, strict=True):
            if parameter.grad is None:  # frozen after the optimizer was made
                continue
            if isinstance(decay, Tensor) or decay != 0:
                parameter.mul_(1 - decay)
            parameter.sub_(part.to(parameter.dtype))


def find_layers(
    model: nn.Module, *, max_factor_dim: int
) -> tuple[list[KroneckerLayer], dict[nn.Parameter, str]]:
    """Return the layers with Kronecker factors, and for all other trainable parameters why not."""
    owners: dict[nn.Parameter, list[str]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(parameter, []).append(f"{module_name}.{name}".lstrip("."))
    layers: list[KroneckerLayer] = []
    reasons: dict[nn.Parameter, str] = {}
    for name, module in model.named_modules():
        mine = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if not mine:
            continue
        reason = _why_not(module, owners, max_factor_dim)
        if reason is None and isinstance(module, nn.Linear):
            bias = module.bias if module.bias is not None and module.bias.requires_grad else None
            weight = cast(nn.Parameter, module.weight)
            layers.append(KroneckerLayer(name or "model", module, weight, bias))
        else:
            reasons.update({p: reason or "" for p in mine})
    taken = {p for layer in layers for p in layer.parameters}
    return layers, {p: why for p, why in reasons.items() if p not in taken}


def _why_not(
    module: nn.Module, owners: dict[nn.Parameter, list[str]], max_factor_dim: int
) -> str | None:
    if not isinstance(module, nn.Linear):
        return f"{type(module).__name__} has no Kronecker factors here"
    if not isinstance(getattr(module, "weight", None), nn.Parameter) or module.weight.is_meta:
        return "the weight is parametrised or not materialised"
    if not module.weight.requires_grad:
        return "the weight is frozen and only the bias is trained"
    if not module.weight.dtype.is_floating_point:
        return f"dtype {module.weight.dtype}"
    for parameter in module.parameters(recurse=False):
        if len(owners[parameter]) > 1:
            return "shared: " + ", ".join(owners[parameter])
    largest = max(module.weight.shape[0], module.weight.shape[1] + (module.bias is not None))
    if largest > max_factor_dim:
        return f"a factor of order {largest} exceeds max_factor_dim={max_factor_dim}"
    if min(module.weight.shape) == 0:
        return "the weight is empty"
    return None

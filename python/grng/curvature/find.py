# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model have Kronecker factors, of what kind, and why the rest is left to AdamW."""

from typing import cast

from torch import nn
from torch.nn.parameter import UninitializedParameter

from grng.curvature import convolution
from grng.curvature.attention import projections
from grng.curvature.convolution import ConvolutionLayer
from grng.curvature.layers import KroneckerLayer, LinearLayer, TransposedLinearLayer

# A side that is this many times longer than the other keeps a diagonal factor: for the weights of LoRA the
# dense one would be tens of times larger than the weight itself.
WIDE_SIDE = 16


def find_layers(
    model: nn.Module, *, max_factor_dim: int, diagonal: bool = True
) -> tuple[list[KroneckerLayer], dict[nn.Parameter, str]]:
    """Return the layers with Kronecker factors, and for all other trainable parameters why not.

    Args:
        model: The model.
        max_factor_dim: Largest order of a dense factor; beyond, the factor of a linear layer is diagonal.
        diagonal: Whether a factor may be diagonal; else layers with larger factors are left out.
    """
    owners: dict[nn.Parameter, list[str]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(parameter, []).append(f"{module_name}.{name}".lstrip("."))
    layers: list[KroneckerLayer] = []
    reasons: dict[nn.Parameter, str] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if type(module) is nn.MultiheadAttention:
            # Its output projection is a module that is never called.
            inside.add(module.out_proj)
            layers += [
                layer
                for layer in projections(name, module)
                if max(layer.sizes) <= max_factor_dim and _is_own(layer, owners)
            ]
        mine = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if not mine:
            continue
        if module in inside:
            reasons.update({p: "part of MultiheadAttention" for p in mine})
            continue
        found = _layer_of(name, module, owners, max_factor_dim, diagonal)
        if isinstance(found, KroneckerLayer):
            layers.append(found)
            extra = f"extra parameter of {type(module).__name__}"
            owned = set(found.parameters)
            reasons.update({p: extra for p in mine if p not in owned})
        else:
            reasons.update({p: found for p in mine})
    taken = {p for layer in layers for p in layer.parameters}
    return layers, {p: why for p, why in reasons.items() if p not in taken}


def embedding_weights(model: nn.Module) -> set[nn.Parameter]:
    """Return the tables that are looked up in: the weights of the embeddings of a model."""
    found = [x.weight for x in model.modules() if isinstance(x, (nn.Embedding, nn.EmbeddingBag))]
    # What a parametrisation computes is no parameter.
    return {weight for weight in found if isinstance(weight, nn.Parameter)}


def _is_own(layer: KroneckerLayer, owners: dict[nn.Parameter, list[str]]) -> bool:
    return all(len(owners[p]) == 1 for p in layer.parameters)


def _layer_of(
    name: str,
    module: nn.Module,
    owners: dict[nn.Parameter, list[str]],
    max_factor_dim: int,
    diagonal: bool,
) -> KroneckerLayer | str:
    """Return the layer that a module is, or why it is none."""
    cls = _class_for(module)
    if cls is None:
        if isinstance(module, nn.Linear):
            return f"{type(module).__name__} has a forward of its own"
        return f"{type(module).__name__} has no Kronecker factors here"
    reason = _why_not(module, owners)
    if reason is not None:
        return reason
    bias = cast(nn.Parameter | None, getattr(module, "bias", None))
    bias = bias if bias is not None and bias.requires_grad else None
    layer = cls(name or "model", module, cast(nn.Parameter, module.weight), bias)
    if diagonal and cls is not ConvolutionLayer:
        layer.diagonal = _diagonal_sides(layer, max_factor_dim)
    elif max(layer.sizes) > max_factor_dim:
        return f"a factor of order {max(layer.sizes)} exceeds max_factor_dim={max_factor_dim}"
    return layer


def _why_not(module: nn.Module, owners: dict[nn.Parameter, list[str]]) -> str | None:
    """Return why a module of a class that can have factors has none."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, UninitializedParameter):
        return "the weight was not initialized when the optimizer was made"
    if not isinstance(weight, nn.Parameter) or weight.is_meta:
        return "the weight is parametrised or not materialised"
    if not weight.requires_grad:
        return "the weight is frozen and only the bias is trained"
    if not weight.dtype.is_floating_point:
        return f"dtype {weight.dtype}"
    for parameter in module.parameters(recurse=False):
        if len(owners[parameter]) > 1:
            return "shared: " + ", ".join(owners[parameter])
    if weight.numel() == 0:
        return "the weight is empty"
    return convolution.why_not(module) if convolution.is_convolution(module) else None


def _diagonal_sides(layer: KroneckerLayer, max_factor_dim: int) -> tuple[bool, bool]:
    out, inp = layer.sizes
    is_low_rank = min(out, inp) * WIDE_SIDE <= max(out, inp) and ".lora_" in f".{layer.name}"
    return (
        out > max_factor_dim or (is_low_rank and out > inp),
        inp > max_factor_dim or (is_low_rank and inp > out),
    )


def _class_for(module: nn.Module) -> type[KroneckerLayer] | None:
    # What a forward of its own does with the weight, its factors would not tell.
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return LinearLayer
    if convolution.is_convolution(module):
        return ConvolutionLayer
    kind = type(module)
    if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        return TransposedLinearLayer
    return None

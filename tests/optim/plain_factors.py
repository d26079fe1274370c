# SPDX-License-Identifier: Apache-2.0
"""Kronecker factors and Fisher information of one layer, written out in plain torch, for tests."""

import torch
import torch.nn.functional as F
from torch import nn


def is_convolution(module):
    return isinstance(module, (nn.Conv1d, nn.Conv2d))


def has_bias(module):
    return module.bias is not None and module.bias.requires_grad


def output_rows(module, z):
    """The output of a module as [examples, positions, d_out]; one example where it has no batch dimension."""
    if not is_convolution(module):
        z = z[None] if z.dim() == 1 else z
        return z.reshape(len(z), z.shape[1:-1].numel(), z.shape[-1])
    spatial = 1 if isinstance(module, nn.Conv1d) else 2
    z = z if z.dim() == spatial + 2 else z.unsqueeze(0)
    return z.flatten(2).mT


def input_rows(module, x):
    """The inputs of each group as [examples, positions, d_in (+ 1)], patches for a convolution."""
    if not is_convolution(module):
        groups = [output_rows(module, x)]
    else:
        flat = isinstance(module, nn.Conv1d)
        x = x if x.dim() == (3 if flat else 4) else x.unsqueeze(0)
        kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
        padding = module.padding
        if padding == "same":
            padding = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
        if padding == "valid":
            padding = (0,) * len(kernel)
        if flat:
            x = x.unsqueeze(2)
            kernel, stride, dilation, padding = (
                (1, *kernel),
                (1, *stride),
                (1, *dilation),
                (0, *padding),
            )
        groups = [
            F.unfold(part, kernel, dilation, padding, stride).mT
            for part in x.chunk(module.groups, 1)
        ]
    if has_bias(module):
        groups = [torch.cat([r, r.new_ones(*r.shape[:2], 1)], 2) for r in groups]
    return groups


def second_moments(rows):
    """The sum of r rᵀ over all rows of all but the last dimension."""
    rows = rows.reshape(-1, rows.shape[-1])
    return rows.T @ rows


def plain_factors(module, x, grads, *, reduce, terms):
    """Λ and Γ of each group, from output gradients of the sum of the terms: what update_factors defines."""
    blocks = getattr(module, "groups", 1)
    inputs = input_rows(module, x)
    outputs = [output_rows(module, g).chunk(blocks, 2) for g in grads]
    if reduce:
        inputs = [r.mean(1) for r in inputs]
        outputs = [[r.sum(1) for r in parts] for parts in outputs]
    out = [sum(second_moments(parts[k]) for parts in outputs) / terms for k in range(blocks)]
    inp = [second_moments(r) / r[..., 0].numel() for r in inputs]
    return torch.stack(out), torch.stack(inp)


def exact_grads(outputs, z, likelihood="categorical"):
    """Gradients at z of one loss per class, whose second moments add up to the Fisher information."""
    flat = outputs.reshape(-1, outputs.shape[-1])
    if likelihood == "gaussian":
        roots = torch.eye(flat.shape[1], dtype=flat.dtype).expand(len(flat), -1, -1)
    else:
        p = flat.detach().softmax(-1)
        hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        values, vectors = torch.linalg.eigh(hessian)
        roots = vectors * values.clamp(min=0).sqrt()[:, None, :]
    return [
        torch.autograd.grad((flat * roots[:, :, c]).sum(), z, retain_graph=True)[0]
        for c in range(flat.shape[1])
    ]


def exact_fisher(outputs, parameters, likelihood="categorical"):
    """The Fisher information of all parameters, the mean over the terms, from their Jacobian."""
    flat = outputs.reshape(-1, outputs.shape[-1])
    rows = [
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(v, parameters, retain_graph=True)])
        for v in flat.reshape(-1)
    ]
    jacobian = torch.stack(rows).view(*flat.shape, -1)
    if likelihood == "gaussian":
        hessian = torch.eye(flat.shape[1], dtype=flat.dtype).expand(len(flat), -1, -1)
    else:
        p = flat.detach().softmax(-1)
        hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("tci,tcd,tdj->ij", jacobian, hessian, jacobian) / len(flat)

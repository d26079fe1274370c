# SPDX-License-Identifier: Apache-2.0
"""The factor update of a convolution in plain PyTorch: patches by ``unfold``, then the matrix reference."""

import torch
from torch import Tensor
from torch.nn import functional

from grng_kernels._precision import matmul
from grng_kernels.info import Info
from grng_kernels.kron_factor.geometry import Conv2dGeometry
from grng_kernels.kron_factor.reference import batch_info, mirror_lower


def patches(x: Tensor, geometry: Conv2dGeometry) -> Tensor:
    """Return the patches of ``x [B, C, H, W]`` as ``[groups, B·O1·O2, C/groups·K1·K2]``.

    Rows are ordered (b, o1, o2), columns (c, k1, k2); outside of the image is zero.
    """
    # unfold has no kernel for fp16 and bf16 everywhere: the caller passes the dtype of the factor.
    columns = functional.unfold(
        x,
        geometry.kernel_size,
        dilation=geometry.dilation,
        padding=geometry.padding,
        stride=geometry.stride,
    )  # [B, C·K1·K2, O1·O2]
    batch, width, places = columns.shape
    groups = geometry.groups
    split = columns.reshape(batch, groups, width // groups, places)
    return split.permute(1, 0, 3, 2).reshape(groups, batch * places, width // groups)


def mean_patches(x: Tensor, geometry: Conv2dGeometry) -> Tensor:
    """Return the mean patch of each image, ``[B, C·K1·K2, 1, 1]``, in at least fp32.

    That is the input of the *reduce* setting as the image of a 1 x 1 convolution: column (c, k1, k2)
    holds the mean of what tap (k1, k2) of channel c meets. Patches are not formed: each tap is the mean
    of a slice.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    size = geometry.output_size(x.shape[2], x.shape[3])
    places = size[0] * size[1]
    taps = []
    for k1 in range(geometry.kernel_size[0]):
        for k2 in range(geometry.kernel_size[1]):
            lines = geometry.visited(0, k1, x.shape[2])
            columns = geometry.visited(1, k2, x.shape[3])
            # Summed in fp64: a sum of large fp32 numbers could leave the range that their mean is in.
            seen = x[:, :, lines, columns].sum(dim=(2, 3), dtype=torch.float64)
            taps.append((seen / places).to(dtype))
    return torch.stack(taps, dim=2).flatten(1)[:, :, None, None]


def kron_factor_conv2d_update(
    factor: Tensor,
    x: Tensor,
    *,
    geometry: Conv2dGeometry,
    decay: float | Tensor,
    scale: float | Tensor,
    bias: bool,
) -> tuple[Tensor, Tensor]:
    """Return ``(decay·factor + scale·PᵀP, info)`` for ``factor [groups, N, N]``, in the dtype of ``factor``.

    ``P`` are the patches of a group and, with ``bias``, a last column of ones. Where ``info != 0`` the
    returned factor is the given one, for all groups.
    """
    rows = x.shape[0] * geometry.places(x)
    # A matrix of the same elements and as many rows as there are patches has the same bounds.
    info = batch_info(factor, x, decay=decay, scale=scale, bias=bias, rows=rows)
    rows_of = patches(x.to(factor.dtype), geometry)
    if bias:
        rows_of = torch.cat([rows_of, rows_of.new_ones(*rows_of.shape[:2], 1)], dim=2)
    products = matmul(rows_of.mT, rows_of) * scale
    if isinstance(decay, Tensor):
        old = torch.where(decay == 0, torch.zeros_like(factor), decay.to(factor.dtype) * factor)
    else:
        old = decay * factor if decay != 0 else torch.zeros_like(factor)
    return torch.where(info == int(Info.OK), mirror_lower(old + products), factor), info

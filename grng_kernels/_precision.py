# SPDX-License-Identifier: Apache-2.0
"""Products of fp32 matrices that are fp32, whatever precision the user allows elsewhere."""

import torch
from torch import Tensor


def _reduced(device_type: str) -> bool:
    """Return whether the user allows fp32 products to be computed in TF32 or bf16 on such a device."""
    backend = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    precision = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if precision is None:  # torch < 2.9
        return torch.get_float32_matmul_precision() != "highest"
    # Not get_float32_matmul_precision(): it raises after a switch was set through the newer interface.
    return precision not in ("none", "ieee")


def is_plain(device_type: str) -> bool:
    """Return whether torch's own products are what ``matmul`` computes: no autocast, no reduced precision."""
    return not (torch.is_autocast_enabled(device_type) or _reduced(device_type))


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``a @ b`` in the dtype of ``a``, never through TF32, bf16 or fp16.

    torch's switches for reduced precision are global. They are neither obeyed here nor touched, since
    other threads may read them: where one is on, the product is taken in fp64. Autocast is per thread
    and is turned off. ``out`` is where to put it, as in torch.
    """
    device_type = a.device.type
    if torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return matmul(a, b, out)
    if a.dtype == torch.float32 and _reduced(device_type):
        product = (a.double() @ b.double()).float()
        return product if out is None else out.copy_(product)
    return torch.matmul(a, b, out=out)

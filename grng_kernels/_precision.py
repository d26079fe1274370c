# SPDX-License-Identifier: Apache-2.0
"""Products of fp32 matrices that are fp32, whatever precision the user allows elsewhere."""

import torch
from torch import Tensor


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` in the dtype of ``a``, never through TF32 or bf16.

    torch's switches for reduced precision are global. They are neither obeyed here nor touched, since
    other threads may read them: where one is on, the product is taken in fp64.
    """
    if a.dtype != torch.float32:
        return a @ b
    reduced = torch.get_float32_matmul_precision() != "highest" or (
        a.is_cuda and torch.backends.cuda.matmul.allow_tf32
    )
    return (a.double() @ b.double()).float() if reduced else a @ b

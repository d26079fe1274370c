# SPDX-License-Identifier: Apache-2.0
"""Whether tensors are finite, on the device."""

import torch
from torch import Tensor


def are_finite(tensors: list[Tensor], *, exact: bool = False) -> Tensor:
    """Return for each tensor whether all of it is finite, bool ``[tensors]`` on the device of the first.

    By their norms, in few calls; a norm can leave the range of its dtype where no element does, which
    ``exact`` does not take for infinity.
    """
    if exact:
        flags = [torch.isfinite(t).all() for t in tensors]
    else:
        flags = [torch.isfinite(n) for n in torch._foreach_norm(tensors)]
    return torch.stack([f.to(flags[0].device) for f in flags])

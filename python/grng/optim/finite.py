# SPDX-License-Identifier: Apache-2.0
"""Whether tensors are finite, on the device."""

import torch
from torch import Tensor

from grng.optim.devices import stacked


def are_finite(tensors: list[Tensor], *, exact: bool = False) -> Tensor:
    """Return for each tensor whether all of it is finite, bool ``[tensors]`` on the device of the first.

    By their norms, in few calls; a norm can leave the range of its dtype where no element does, which
    ``exact`` does not take for infinity.
    """
    if exact:
        return stacked([torch.isfinite(t).all() for t in tensors])
    return torch.isfinite(stacked(torch._foreach_norm(tensors)))

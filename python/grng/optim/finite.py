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


def all_finite(*lists: list[Tensor]) -> list[bool]:
    """Return for each list whether all of it is finite, after one wait as long as all is well."""
    flags = []
    for tensors in lists:
        if tensors:
            norms = torch._foreach_norm(tensors)
            flags.append(torch.stack([torch.isfinite(n).to(norms[0].device) for n in norms]).all())
        else:
            flags.append(torch.ones((), dtype=torch.bool))
    device = next((f.device for f in flags if f.device.type != "cpu"), torch.device("cpu"))
    results = torch.stack([f.to(device) for f in flags]).tolist()
    # A norm can leave the range of its dtype where no element does.
    return [
        ok or all(bool(torch.isfinite(t).all()) for t in tensors)
        for ok, tensors in zip(results, lists, strict=True)
    ]

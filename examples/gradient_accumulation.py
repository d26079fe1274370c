# SPDX-License-Identifier: Apache-2.0
"""Gradient accumulation: one ``observe`` for each micro-batch, one ``step`` for all of them.

The curvature is that of the whole batch, with no argument that says how many micro-batches there are.

``python examples/gradient_accumulation.py``
"""

import torch
import torch.nn.functional as F
from torch import nn

from grng import RING

MICRO_BATCHES = 4


def main() -> list[float]:
    """Return the loss of each step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4))
    opt = RING(model)
    x = torch.randn(256, 20)
    y = (x @ torch.randn(20, 4)).argmax(1)
    losses = []
    for _ in range(40):
        total = 0.0
        for xs, ys in zip(x.chunk(MICRO_BATCHES), y.chunk(MICRO_BATCHES), strict=True):
            logits = model(xs)
            opt.observe(logits)
            loss = F.cross_entropy(logits, ys) / MICRO_BATCHES
            loss.backward()
            total += float(loss.detach())
        opt.step()
        opt.zero_grad()
        losses.append(total)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()

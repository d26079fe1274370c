# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's Accelerate: prepare model, optimizer and data as with any optimizer.

The wrapper that ``prepare`` returns steps the optimizer; ``observe`` belongs to the optimizer itself.

``python examples/accelerate_loop.py`` (needs ``accelerate``)
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from grng import RING


def main() -> list[float]:
    """Return the loss of each step."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4))
    model.to(accelerator.device)  # before the optimizer is made
    x = torch.randn(256, 20)
    y = (x @ torch.randn(20, 4)).argmax(1)
    ring = RING(model)
    loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
    model, opt, loader = accelerator.prepare(model, ring, loader)
    losses = []
    for _ in range(10):
        for xs, ys in loader:
            logits = model(xs)
            ring.observe(logits)
            loss = F.cross_entropy(logits, ys)
            accelerator.backward(loss)
            opt.step()
            opt.zero_grad()
            losses.append(float(loss.detach()))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()

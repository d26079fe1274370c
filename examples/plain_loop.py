# SPDX-License-Identifier: Apache-2.0
"""A plain training loop: schedule, clipping, a checkpoint, and going on from it.

``python examples/plain_loop.py``
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from grng import RING


def build() -> tuple[nn.Module, RING, torch.optim.lr_scheduler.LRScheduler]:
    """Return a model, its optimizer and a schedule."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4))
    opt = RING(model)
    return model, opt, torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=60)


def train(model, opt, schedule, x, y, steps) -> list[float]:
    """Return the loss of each step."""
    losses = []
    for _ in range(steps):
        logits = model(x)
        opt.observe(logits)  # between forward and backward; free on most steps
        loss = F.cross_entropy(logits, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        schedule.step()
        opt.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def main() -> list[float]:
    """Train, save, and go on in new objects."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, 20, generator=generator)
    y = (x @ torch.randn(20, 4, generator=generator)).argmax(1)

    model, opt, schedule = build()
    losses = train(model, opt, schedule, x, y, 30)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        parts = {"model": model, "optimizer": opt, "schedule": schedule}
        torch.save({name: part.state_dict() for name, part in parts.items()}, path)
        saved = torch.load(path, weights_only=True)

    model, opt, schedule = build()
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    losses += train(model, opt, schedule, x, y, 30)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(opt.explain())
    return losses


if __name__ == "__main__":
    main()

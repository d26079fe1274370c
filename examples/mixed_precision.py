# SPDX-License-Identifier: Apache-2.0
"""Mixed precision: bf16 autocast, or fp16 autocast with a GradScaler.

Factors and their inverses are fp32 whatever the model computes in. With ``observe`` the statistics do not see
the scale of the loss; a step that the scaler skips leaves everything as it was.

``python examples/mixed_precision.py``
"""

import torch
import torch.nn.functional as F
from torch import nn

from grng import RING


def main(dtype: torch.dtype | None = None) -> list[float]:
    """Return the loss of each step; ``dtype`` is bf16 on a CPU and fp16 on a GPU if not given."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        dtype = torch.float16 if device == "cuda" else torch.bfloat16
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4)).to(device)
    opt = RING(model)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)  # bf16 needs none
    x = torch.randn(256, 20, device=device)
    y = (x @ torch.randn(20, 4, device=device)).argmax(1)
    losses = []
    for _ in range(40):
        with torch.autocast(device, dtype):
            logits = model(x)
            opt.observe(logits)
            loss = F.cross_entropy(logits, y)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        losses.append(float(loss.detach()))
    print(f"{dtype}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()

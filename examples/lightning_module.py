# SPDX-License-Identifier: Apache-2.0
"""Lightning: return the optimizer from ``configure_optimizers``, and observe in ``training_step``.

Lightning calls ``step`` with a closure that runs ``training_step`` and the backward pass.

``python examples/lightning_module.py`` (needs ``pytorch-lightning``)
"""

import logging
import warnings

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from grng import RING


class Classifier(pl.LightningModule):
    """A small network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4))
        self.losses: list[float] = []

    def training_step(self, batch, index):
        """Return the loss of a batch."""
        x, y = batch
        logits = self.net(x)
        self.optimizers(use_pl_optimizer=False).observe(logits)
        loss = F.cross_entropy(logits, y)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        """Return optimizer and schedule."""
        opt = RING(self.net)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=10)
        return {"optimizer": opt, "lr_scheduler": schedule}


def main() -> list[float]:
    """Return the loss of each step."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    pl.seed_everything(0, verbose=False)
    x = torch.randn(256, 20)
    y = (x @ torch.randn(20, 4)).argmax(1)
    model = Classifier()
    trainer = pl.Trainer(
        max_epochs=10,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        trainer.fit(model, DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True))
    print(f"loss {model.losses[0]:.3f} -> {model.losses[-1]:.3f}")
    return model.losses


if __name__ == "__main__":
    main()

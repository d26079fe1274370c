# SPDX-License-Identifier: Apache-2.0
"""Muon as its authors use it: for the matrices inside a model, with AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """``torch.optim.Muon`` for the hidden matrices, ``torch.optim.AdamW`` for the other parameters.

    Hidden are the two-dimensional parameters of all modules but embeddings and the last linear layer, as the
    source asks for; convolutions are AdamW's, as torch's Muon takes matrices alone. Both have one learning
    rate: Muon's steps are scaled to the size of AdamW's.

    Args:
        model: Whose trainable parameters are updated.
        lr: Of both.
        weight_decay: Decoupled, of both.
        momentum: Muon's.
        nesterov: Muon's.
        betas: AdamW's.

    Raises:
        ValueError: A hyperparameter is out of range, or nothing is trainable.

    Source: Jordan et al. 2024, "Muon"; Liu et al. 2025, "Muon is Scalable for LLM Training", arXiv
    2502.16982, for the scale.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        nesterov: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        hidden = _hidden_matrices(model)
        matrices = [p for p in trained if id(p) in hidden]
        rest = [p for p in trained if id(p) not in hidden]
        self._both: list[torch.optim.Optimizer] = []
        if matrices:
            self._both.append(
                torch.optim.Muon(
                    matrices,
                    lr=lr,
                    weight_decay=weight_decay,
                    momentum=momentum,
                    nesterov=nesterov,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if rest:
            self._both.append(
                torch.optim.AdamW(rest, lr=lr, betas=betas, weight_decay=weight_decay)
            )
        defaults = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov)
        super().__init__(trained, defaults | {"betas": betas})
        # The groups of the two, so that a schedule of this one is theirs.
        self.param_groups = [group for one in self._both for group in one.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make a step of both.

        Args:
            closure: As for any torch optimizer.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for one in self._both:
            one.step()
            self.state.update(one.state)
        return result


def _hidden_matrices(model: nn.Module) -> set[int]:
    """Ids of the parameters that are Muon's."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    spared = (nn.Embedding, nn.EmbeddingBag)
    found = {
        id(p)
        for module in model.modules()
        if not isinstance(module, spared)
        for p in module.parameters(recurse=False)
        if p.dim() == 2 and p.requires_grad
    }
    # The one that gives the outputs; tied to an embedding it is out as well.
    out = {id(p) for module in linear[-1:] for p in module.parameters(recurse=False)}
    embedded = {
        id(p) for m in model.modules() if isinstance(m, spared) for p in m.parameters(recurse=False)
    }
    return found - out - embedded

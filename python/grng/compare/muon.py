# SPDX-License-Identifier: Apache-2.0
"""Muon as its authors use it: for the matrices inside a model, with AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class MuonWithAdamW(torch.optim.Optimizer):
    """``torch.optim.Muon`` for the hidden matrices, ``torch.optim.AdamW`` for the other parameters.

    Hidden are the weights of all linear layers but the last, and of all convolutions, as the source has it;
    position embeddings, biases and norms are AdamW's. A convolution is a matrix with a line for each output
    channel: torch's Muon takes matrices alone, so it is given views. Both have one learning rate: Muon's
    steps are scaled to the size of AdamW's.

    Args:
        model: Whose trainable parameters are updated.
        lr: Of both.
        weight_decay: Decoupled, of both.
        momentum: Muon's.
        nesterov: Muon's.
        betas: AdamW's.

    Raises:
        ValueError: A hyperparameter is out of range, or nothing is trainable.
        RuntimeError: The weight of a convolution does not lie in memory like a matrix.

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
        # With what Muon moves: the same memory, as a matrix.
        self._matrices = [(p, _matrix(p)) for p in trained if id(p) in hidden]
        rest = [p for p in trained if id(p) not in hidden]
        self._both: list[torch.optim.Optimizer] = []
        if self._matrices:
            self._both.append(
                torch.optim.Muon(
                    [matrix for _, matrix in self._matrices],
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
        for p, matrix in self._matrices:
            if matrix is not p:
                matrix.grad = None if p.grad is None else p.grad.reshape(matrix.shape)
        for one in self._both:
            one.step()
            self.state.update(one.state)
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, those of the convolutions too, which are in no group themselves."""
        super().zero_grad(set_to_none)
        for p, _ in self._matrices:
            if p.grad is not None:
                p.grad = None if set_to_none else torch.zeros_like(p)


def _matrix(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dim() == 2:
        return parameter
    return nn.Parameter(parameter.detach().view(len(parameter), -1))


def _hidden_matrices(model: nn.Module) -> set[int]:
    """Ids of the parameters that are Muon's."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    convolutions = [module for module in model.modules() if isinstance(module, _CONVOLUTIONS)]
    spared = [m.weight for m in linear[-1:]]
    # An output layer is tied to an embedding at times.
    spared += [m.weight for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    out = {id(p) for p in spared}
    return {
        id(m.weight)
        for m in (*linear, *convolutions)
        if m.weight.requires_grad and id(m.weight) not in out
    }

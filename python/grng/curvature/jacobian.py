# SPDX-License-Identifier: Apache-2.0
"""Rows of the Jacobian of outputs by parameters, by batched vector-Jacobian products."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

DEFAULT_BUDGET_MB = 512


class Jacobian:
    """Differentiates outputs by a fixed list of parameters, in few backward passes.

    One batched backward serves as many rows as the memory budget allows; models with operations that cannot
    be batched (custom autograd functions without a vmap rule) are differentiated row by row, and
    :attr:`route` says so. Rows that do not fit into one batch go to buffers that are kept between calls.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], *, budget_mb: float = DEFAULT_BUDGET_MB
    ) -> None:
        self.parameters = list(parameters)
        self.size = sum(p.numel() for p in self.parameters)
        self._budget = int(budget_mb * 2**20)
        self._buffers: list[Tensor] = []
        self.route = "batched"

    @property
    def rows_per_pass(self) -> int:
        """Rows that one backward pass may compute: they have to fit into the budget."""
        return max(1, self._budget // (4 * max(1, self.size)))

    def rows(self, outputs: Tensor, directions: Tensor) -> list[Tensor]:
        """Return the derivatives of ``Σ direction·outputs``, one matrix ``[k, numel]`` per parameter.

        Args:
            outputs: ``[N, C]``, with a graph.
            directions: ``[k, N, C]``.

        Returns:
            fp32 (fp64 for fp64 parameters); zeros for a parameter that the outputs do not depend on. Valid
            until the next call.

        Raises:
            RuntimeError: The graph is gone.
        """
        directions = directions.to(outputs.dtype)
        k = len(directions)
        step = min(k, self.rows_per_pass)
        if step == k:
            found = self._differentiate(outputs, directions)
            return [self._as_rows(g, p, k) for g, p in zip(found, self.parameters, strict=True)]
        buffers = self._buffers_for(k)
        for begin in range(0, k, step):
            part = directions[begin : begin + step]
            found = self._differentiate(outputs, part)
            for buffer, g, p in zip(buffers, found, self.parameters, strict=True):
                buffer[begin : begin + len(part)] = self._as_rows(g, p, len(part))
        return buffers

    def _differentiate(self, outputs: Tensor, directions: Tensor) -> Sequence[Tensor | None]:
        if self.route == "batched":
            try:
                with warnings.catch_warnings():
                    # torch's remark that an operation has no batching rule: slower, not wrong.
                    warnings.filterwarnings("ignore", message=".*performance drop.*")
                    return torch.autograd.grad(
                        outputs,
                        self.parameters,
                        directions,
                        retain_graph=True,
                        allow_unused=True,
                        is_grads_batched=True,
                    )
            except RuntimeError as error:
                if "second time" in str(error):
                    raise
                self.route = f"row by row: {str(error).splitlines()[0][:80]}"
        single = [
            torch.autograd.grad(
                outputs, self.parameters, direction, retain_graph=True, allow_unused=True
            )
            for direction in directions
        ]
        return [
            None
            if all(g is None for g in column)
            else torch.stack([torch.zeros_like(p) if g is None else g for g in column])
            for column, p in zip(zip(*single, strict=True), self.parameters, strict=True)
        ]

    @staticmethod
    def _as_rows(gradient: Tensor | None, parameter: nn.Parameter, k: int) -> Tensor:
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        if gradient is None:
            return torch.zeros(k, parameter.numel(), dtype=dtype, device=parameter.device)
        return gradient.reshape(k, -1).to(dtype)

    def _buffers_for(self, k: int) -> list[Tensor]:
        if not self._buffers or len(self._buffers[0]) != k:
            self._buffers = [
                torch.empty(
                    k,
                    p.numel(),
                    dtype=torch.float64 if p.dtype == torch.float64 else torch.float32,
                    device=p.device,
                )
                for p in self.parameters
            ]
        return self._buffers

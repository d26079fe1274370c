# SPDX-License-Identifier: Apache-2.0
"""Rows of the Jacobian of outputs by parameters, by batched vector-Jacobian products."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from grng.curvature import single_row
from grng.curvature.rows import Rows
from grng_kernels import KroneckerJacobian

DEFAULT_BUDGET_MB = 512
JACOBIANS = ("auto", "dense")


@dataclass
class _Target:
    """What is differentiated by: a parameter, or the output of a layer, in its place."""

    by: nn.Parameter | GradientEdge
    size: int
    dtype: torch.dtype
    device: torch.device


class Jacobian:
    """Differentiates outputs by a fixed list of parameters, in few backward passes.

    One batched backward serves as many rows as the memory budget allows; models with operations that cannot
    be batched (custom autograd functions without a vmap rule) are differentiated row by row, and
    :attr:`route` says so. Rows that do not fit into one batch go to buffers that are kept between calls.

    With ``"auto"`` the rows of a weight whose layer was fed a single vector stay factored, and its gradient
    products are not computed; :attr:`factored` says which they were.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        budget_mb: float = DEFAULT_BUDGET_MB,
        jacobian: str = "auto",
    ) -> None:
        self.parameters = list(parameters)
        self.factored: list[bool] = [False] * len(self.parameters)
        self._may_factor = jacobian == "auto"
        self._budget = int(budget_mb * 2**20)
        self._buffers: list[Tensor] = []
        self.route = "batched"

    def rows(self, outputs: Tensor, directions: Tensor) -> list[Rows]:
        """Return the derivatives of ``Σ direction·outputs``, the rows ``[k, numel]`` of each parameter.

        Args:
            outputs: ``[N, C]``, with a graph.
            directions: ``[k, N, C]``.

        Returns:
            fp32 (fp64 for fp64 parameters); zeros for a parameter that the outputs do not depend on. Valid
            until the next call. Factored where the layer of a weight was fed a single vector.

        Raises:
            RuntimeError: The graph is gone.
        """
        directions = directions.to(outputs.dtype)
        # More samples than one are more rows of every layer, but for odd models.
        layers = {}
        if self._may_factor and len(outputs) == 1:
            layers = single_row.find(outputs, self.parameters)
        targets, sources = self._targets(layers)
        k = len(directions)
        step = min(k, max(1, self._budget // (4 * max(1, sum(t.size for t in targets)))))
        if step == k:
            found = self._differentiate(outputs, targets, directions)
            rows = [self._as_rows(g, t, k) for g, t in zip(found, targets, strict=True)]
        else:
            rows = self._buffers_for(targets, k)
            for begin in range(0, k, step):
                part = directions[begin : begin + step]
                found = self._differentiate(outputs, targets, part)
                for buffer, g, t in zip(rows, found, targets, strict=True):
                    buffer[begin : begin + len(part)] = self._as_rows(g, t, len(part))
        result: list[Rows] = []
        for p, source in zip(self.parameters, sources, strict=True):
            row, inputs = rows[source], layers[p].inputs if p in layers else None
            result.append(row if inputs is None else KroneckerJacobian(row, inputs.to(row.dtype)))
        self.factored = [isinstance(h, KroneckerJacobian) for h in result]
        return result

    def _targets(
        self, layers: dict[nn.Parameter, single_row.LayerOutput]
    ) -> tuple[list[_Target], list[int]]:
        """What to differentiate by, and for each parameter which of it: weight and bias share an output."""
        targets: list[_Target] = []
        sources, places = [], {}
        for p in self.parameters:
            dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
            if p not in layers:
                sources.append(len(targets))
                targets.append(_Target(p, p.numel(), dtype, p.device))
                continue
            by = layers[p].by
            place = by.node if isinstance(by, GradientEdge) else by
            if place not in places:
                places[place] = len(targets)
                targets.append(_Target(by, len(p), dtype, p.device))
            sources.append(places[place])
        return targets, sources

    def _differentiate(
        self, outputs: Tensor, targets: list[_Target], directions: Tensor
    ) -> Sequence[Tensor | None]:
        # Either kind may be mixed; torch's annotation allows lists of one only.
        by: Any = [t.by for t in targets]
        # A single row is an ordinary backward pass, without the detour through vmap.
        if self.route == "batched" and len(directions) > 1:
            try:
                with warnings.catch_warnings():
                    # torch's remark that an operation has no batching rule: slower, not wrong.
                    warnings.filterwarnings("ignore", message=".*performance drop.*")
                    return torch.autograd.grad(
                        outputs,
                        by,
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
            torch.autograd.grad(outputs, by, direction, retain_graph=True, allow_unused=True)
            for direction in directions
        ]
        columns = []
        for column in zip(*single, strict=True):
            known = next((g for g in column if g is not None), None)
            columns.append(
                None
                if known is None
                else torch.stack([torch.zeros_like(known) if g is None else g for g in column])
            )
        return columns

    @staticmethod
    def _as_rows(gradient: Tensor | None, target: _Target, k: int) -> Tensor:
        if gradient is None:
            return torch.zeros(k, target.size, dtype=target.dtype, device=target.device)
        return gradient.reshape(k, -1).to(target.dtype)

    def _buffers_for(self, targets: list[_Target], k: int) -> list[Tensor]:
        if [b.shape for b in self._buffers] != [(k, t.size) for t in targets]:
            self._buffers = [
                torch.empty(k, t.size, dtype=t.dtype, device=t.device) for t in targets
            ]
        return self._buffers

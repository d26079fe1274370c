# SPDX-License-Identifier: Apache-2.0
"""Module hooks that record the inputs and output gradients of layers, on the steps that need them.

The only place with hooks. A record belongs to one forward pass of one layer: a module that is used twice,
or several micro-batches before one step, give several records.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from grng.curvature.layers import KroneckerLayer


@dataclass
class Record:
    """Input and output gradient of one forward pass of one layer."""

    layer_input: Tensor  # [rows, d_in]
    edge: (
        GradientEdge | None
    )  # where the gradient of the output can be asked for, until the backward
    output_grad: Tensor | None = None  # [rows, d_out]
    sampled: bool = False  # gradient of a sampled label (per term) or of the loss (of the mean)


class Capture:
    """Records of all layers since the last :meth:`clear`."""

    def __init__(
        self, layers: list[KroneckerLayer], wanted: Callable[[KroneckerLayer], bool]
    ) -> None:
        self.records: dict[KroneckerLayer, list[Record]] = {layer: [] for layer in layers}
        self._wanted = wanted
        self._observing = False
        # The hooks live as long as the model, but must not keep a discarded optimizer alive.
        this = weakref.ref(self)
        for layer in layers:
            layer.module.register_forward_hook(_ForwardHook(this, layer), with_kwargs=True)

    def start_record(self, layer: KroneckerLayer, layer_input: Tensor, output: Tensor) -> None:
        """Record one forward pass, if this step needs it and a gradient can come."""
        if not (torch.is_grad_enabled() and output.requires_grad and self._wanted(layer)):
            return
        # The edge, not the tensor: an in-place activation may overwrite the output.
        record = Record(layer.input_rows(layer_input), get_gradient_edge(output))
        self.records[layer].append(record)

        def on_grad(grad: Tensor) -> None:
            # The gradient of the loss: used where no labels were sampled (empirical Fisher).
            if not self._observing and record.output_grad is None:
                record.output_grad = layer.output_rows(grad)

        output.register_hook(on_grad)

    def waiting(self) -> list[tuple[KroneckerLayer, Record]]:
        """Return the records whose output gradient has not come yet."""
        return [
            (layer, record)
            for layer, records in self.records.items()
            for record in records
            if record.edge is not None and record.output_grad is None
        ]

    def observe(self, loss: Tensor) -> None:
        """Take the output gradients of ``loss``; no parameter's ``.grad`` is touched.

        Raises:
            RuntimeError: The graph is gone: the loss was already differentiated.
        """
        waiting = self.waiting()
        if not waiting:
            return
        self._observing = True
        try:
            grads = torch.autograd.grad(
                loss,
                [record.edge for _, record in waiting if record.edge is not None],
                retain_graph=True,
                allow_unused=True,
            )
        except RuntimeError as error:
            if "second time" in str(error):
                raise RuntimeError(
                    "observe: call it before loss.backward(), which frees the graph it needs"
                ) from error
            raise
        finally:
            self._observing = False
        for (layer, record), grad in zip(waiting, grads, strict=True):
            # None: a forward pass that these outputs do not depend on (another micro-batch).
            if grad is not None:
                record.output_grad, record.sampled = layer.output_rows(grad), True
                record.edge = None

    def complete(self, layer: KroneckerLayer) -> list[Record]:
        """Return the records of a layer that have both parts and any rows."""
        return [
            r for r in self.records[layer] if r.output_grad is not None and len(r.layer_input) > 0
        ]

    def only_empty(self, layer: KroneckerLayer) -> bool:
        """Return whether a layer was used, but only with empty batches."""
        records = self.records[layer]
        return bool(records) and all(len(r.layer_input) == 0 for r in records)

    def clear(self) -> None:
        """Forget everything recorded."""
        for records in self.records.values():
            records.clear()


class _ForwardHook:
    """Reports the forward passes of one module, not those of its copies."""

    def __init__(self, capture: "weakref.ref[Capture]", layer: KroneckerLayer) -> None:
        self._capture, self._layer = capture, layer

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        alive = self._capture()
        if alive is not None and module is self._layer.module:
            alive.start_record(self._layer, args[0] if args else kwargs["input"], output)

    def __reduce__(self) -> tuple[Any, ...]:
        # A model that is copied or saved leaves its optimizer behind.
        return (_NoHook, ())


class _NoHook:
    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        return None

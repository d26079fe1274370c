# SPDX-License-Identifier: Apache-2.0
"""Module hooks that record the inputs and output gradients of layers, on the steps that need them.

The only place with hooks. A record belongs to one forward pass of one layer: a module that is used twice,
or several micro-batches before one step, give several records.
"""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils.hooks import RemovableHandle

from grng.curvature.layers import KroneckerLayer, Record

# Backward passes without a step whose statistics are kept: more than gradients are usually accumulated over.
# As many forward passes may wait for their backward pass.
MOST_ROUNDS = 128
# Calls of one layer that may wait where a forward pass has no end to be seen, as not all layers are used.
MOST_WAITING = 16 * MOST_ROUNDS


class Capture:
    """Records of all layers since the last :meth:`clear`.

    Activation checkpointing that is not reentrant runs a forward pass twice: both make a record, and only
    that of the first, whose graph the backward pass walks, ever gets a gradient. The reentrant kind runs the
    first without a graph, so that only the second counts; what :meth:`observe` would differentiate is then
    not there, and the gradient of the loss serves instead.

    Records are those of one large batch until a step clears them. Where steps do not come, a new forward pass
    drops what :meth:`outdate` marked, and what is older than :data:`MOST_ROUNDS` backward passes, or that
    many forward passes without one: those of a validation that does not switch gradients off, whose graphs
    are kept alive here.
    """

    # Of all captures: what one of them differentiates is no gradient of the loss to the others either.
    _observing = False

    def __init__(
        self, layers: list[KroneckerLayer], wanted: Callable[[KroneckerLayer], bool]
    ) -> None:
        self.records: dict[KroneckerLayer, list[Record]] = {layer: [] for layer in layers}
        # Where the gradient of a record's output can be asked for, until it has come.
        self._edges: dict[int, tuple[GradientEdge, Callable[[Tensor], Tensor]]] = {}
        self._wanted = wanted
        self._observations = 1
        # A round is what one layer does up to the end of a backward pass.
        self._rounds = dict.fromkeys(layers, 0)
        self._ended: set[KroneckerLayer] = set()
        self._outdated: set[KroneckerLayer] = set()
        self._warned = False
        # A forward pass of the model ends when all its layers were called and the first one is called again.
        self._forward = 0
        self._called: dict[KroneckerLayer, None] = {}
        self._warned_forward = False
        # The hooks live as long as the model, but must not keep a discarded optimizer alive.
        this = weakref.ref(self)
        handles = [
            layer.module.register_forward_hook(_ForwardHook(this, layer), with_kwargs=True)
            for layer in layers
        ]
        self._finalizer = weakref.finalize(self, _remove, handles)
        self._finalizer.atexit = False

    def start_records(
        self, layer: KroneckerLayer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Record one forward pass, if this step needs it and a gradient can come."""
        if self._observing or not (torch.is_grad_enabled() and self._wanted(layer)):
            # While observing: what activation checkpointing computes again is already recorded.
            return
        self._make_room(layer)
        self._count_forward(layer)
        for found in layer.passes(args, kwargs, output):
            x = found.layer_input
            version = None if x.is_inference() else x._version
            record = Record(x, round=self._rounds[layer], forward=self._forward, version=version)
            self.records[layer].append(record)
            self._edges[id(record)] = (found.edge, found.arrange)
            found.listen(self._receiver(layer, record))

    def _make_room(self, layer: KroneckerLayer) -> None:
        """Begin a new round where the last one has ended; drop records that no step will want."""
        if layer in self._ended:
            self._ended.remove(layer)
            self._rounds[layer] += 1
            oldest = self._rounds[layer] - MOST_ROUNDS
            if any(r.round <= oldest for r in self.records[layer][:1]):
                self._drop(layer, [r for r in self.records[layer] if r.round <= oldest])
                if not self._warned:
                    self._warned = True
                    warnings.warn(
                        f"grng: more than {MOST_ROUNDS} backward passes without a step(): the statistics of "
                        "older ones are dropped. opt.zero_grad() drops those of gradients that are not used",
                        RuntimeWarning,
                        stacklevel=2,
                    )
        if layer in self._outdated:
            self._outdated.remove(layer)
            self._drop(layer, [r for r in self.records[layer] if r.outdated])

    def _count_forward(self, layer: KroneckerLayer) -> None:
        """Begin a new forward pass where the last one has ended; drop what waits for too long."""
        if layer is next(iter(self._called), None) and all(
            x in self._called or not self._wanted(x) for x in self.records
        ):
            self._called.clear()
            self._forward += 1
            for x, records in self.records.items():
                oldest = self._forward - MOST_ROUNDS
                if any(r.forward <= oldest and not r.passed for r in records):
                    self._drop_waiting(x, [r for r in records if r.forward <= oldest])
        self._called[layer] = None
        count = len(self.records[layer])
        if count and count % MOST_WAITING == 0:
            waiting = [r for r in self.records[layer] if not r.passed]
            if len(waiting) == MOST_WAITING:
                self._drop_waiting(layer, waiting[: MOST_WAITING // 2])

    def _drop_waiting(self, layer: KroneckerLayer, old: list[Record]) -> None:
        self._drop(layer, [r for r in old if not r.passed])
        if not self._warned_forward:
            self._warned_forward = True
            warnings.warn(
                f"grng: more than {MOST_ROUNDS} forward passes without a backward pass: the statistics of "
                "older ones are dropped. Validate under torch.no_grad()",
                RuntimeWarning,
                stacklevel=2,
            )

    def _drop(self, layer: KroneckerLayer, old: list[Record]) -> None:
        for record in old:
            self._edges.pop(id(record), None)
        gone = {id(record) for record in old}
        self.records[layer] = [r for r in self.records[layer] if id(r) not in gone]

    def outdate(self) -> None:
        """Mark the records whose gradients were zeroed: the next forward pass of their layer drops them.

        Not at once: somebody may put those gradients back, added up in another way, and make a step.
        """
        for layer, records in self.records.items():
            for record in records:
                if record.passed:
                    record.outdated = True
                    self._outdated.add(layer)

    def _receiver(self, layer: KroneckerLayer, record: Record) -> Callable[[Tensor], None]:
        def on_grad(grad: Tensor) -> None:
            if not self._observing:
                record.passed = True
                self._ended.add(layer)
            if self._observing or record.sampled:
                return
            # The gradient of the loss: used where no labels were sampled (empirical Fisher).
            if record.output_grad is None:
                record.output_grad = grad.detach()
                record.is_differentiable = torch.is_grad_enabled()
            elif not record.is_differentiable:
                # A further part of the loss: .grad has the sum too.
                record.output_grad = record.output_grad + grad.detach()

        return on_grad

    def waiting(self) -> list[Record]:
        """Return the records whose loss has not been differentiated yet."""
        return [
            record
            for records in self.records.values()
            for record in records
            if not record.passed and id(record) in self._edges
        ]

    def is_batched(self) -> bool:
        """Return whether a forward pass that waits was not of a single example."""
        waiting = {id(record) for record in self.waiting()}
        return any(
            id(record) in waiting and layer.examples(record.layer_input) != 1
            for layer, records in self.records.items()
            for record in records
        )

    def announce(self, terms: int) -> None:
        """Tell the forward passes that wait how many terms of the loss they lead to."""
        for record in self.waiting():
            if record.terms is None:
                record.terms, record.observation = terms, self._observations
        self._observations += 1

    def is_new(self, outputs: Tensor) -> bool:
        """Return whether outputs are new; the mark that they no longer are lives as long as their graph."""
        if outputs.grad_fn is None:
            return True
        marks: dict[Any, Any] = cast(Any, outputs.grad_fn).metadata
        seen = marks.setdefault("observed by grng", weakref.WeakSet())
        known = self in seen
        seen.add(self)
        return not known

    def observe(self, losses: list[Tensor], terms: int) -> None:
        """Take the output gradients of each of ``losses``, sums of ``terms``; no ``.grad`` is touched.

        Passes that lead to several outputs, each observed, have the sum of their Fisher informations; the
        loss is taken to be the sum of the means of the terms of each.

        Raises:
            RuntimeError: The graph is gone: the loss was already differentiated.
        """
        waiting = self.waiting()
        if not waiting:
            return
        edges = [self._edges[id(record)][0] for record in waiting]
        Capture._observing = True
        try:
            grads = [
                torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True)
                for loss in losses
            ]
        except RuntimeError as error:
            if "second time" in str(error):
                raise RuntimeError(
                    "observe: call it before loss.backward(), which frees the graph it needs"
                ) from error
            if "checkpoint" in str(error).lower() and ".grad()" in str(error):
                # Behind reentrant checkpointing: the gradient of the loss comes with its backward pass.
                self.announce(terms)
                return
            raise
        finally:
            Capture._observing = False
        # None: a forward pass that these outputs do not depend on (another micro-batch).
        reached = [
            (record, found)
            for record, found in zip(waiting, zip(*grads, strict=True), strict=True)
            if found[0] is not None
        ]
        before = [record for record, _ in reached if record.sampled]
        observation, scale, first = self._observations, 1.0, 0
        if before:  # by another head: together one observation, with the terms of the first
            observation, known = before[0].observation, cast(int, before[0].terms)
            scale, terms = (known / max(terms, 1)) ** 0.5, known
            first = max(record.first + len(record.grads()) for record in before)
        for record, found in reached:
            arrange = self._edges[id(record)][1]
            new = [arrange(g).detach() for g in found]
            if scale != 1.0:
                new = [g * scale for g in new]
            if record.sampled:
                record.further_grads += new
            else:
                record.output_grad, *record.further_grads = new
                record.sampled, record.terms, record.first = True, terms, first
                record.observation = observation
        self._observations += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Record no forward pass inside."""
        before, self._wanted = self._wanted, lambda layer: False
        try:
            yield
        finally:
            self._wanted = before

    def complete(self, layer: KroneckerLayer) -> list[Record]:
        """Return the records of a layer that have both parts, as they were recorded, and any rows."""
        return [
            r
            for r in self.records[layer]
            if r.output_grad is not None and r.layer_input.numel() > 0 and not r.is_overwritten()
        ]

    def overwritten(self, layer: KroneckerLayer) -> int:
        """Return how many records of a layer cannot serve, as their input was changed in place since."""
        return sum(r.output_grad is not None and r.is_overwritten() for r in self.records[layer])

    def only_empty(self, layer: KroneckerLayer) -> bool:
        """Return whether a layer was used, but only with empty batches."""
        records = self.records[layer]
        return bool(records) and all(r.layer_input.numel() == 0 for r in records)

    def has_passed(self) -> bool:
        """Return whether a backward pass came whose gradients were not zeroed since."""
        return any(r.passed and not r.outdated for rs in self.records.values() for r in rs)

    def close(self) -> None:
        """Take the hooks off, and forget everything recorded."""
        self._finalizer()
        self.clear()

    def clear(self) -> None:
        """Forget everything recorded."""
        for records in self.records.values():
            records.clear()
        self._edges.clear()
        self._observations = 1
        self._rounds = dict.fromkeys(self.records, 0)
        self._ended.clear()
        self._outdated.clear()
        self._forward = 0
        self._called.clear()


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


class _ForwardHook:
    """Reports the forward passes of one module, not those of its copies."""

    def __init__(self, capture: "weakref.ref[Capture]", layer: KroneckerLayer) -> None:
        self._capture, self._layer = capture, layer
        # The compiler would trace what it can of this, and compile again whenever the step count changes.
        self._report = torch.compiler.disable(
            self._report_pass,
            reason="an optimizer of grng takes statistics between the layers: use fullgraph=False",
        )

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        self._report(module, args, kwargs, output)

    def _report_pass(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        alive = self._capture()
        if alive is not None and module is self._layer.module:
            alive.start_records(self._layer, args, kwargs, output)

    def __reduce__(self) -> tuple[Any, ...]:
        # A model that is copied or saved leaves its optimizer behind.
        return (_NoHook, ())


class _NoHook:
    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        return None

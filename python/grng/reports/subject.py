# SPDX-License-Identifier: Apache-2.0
"""An optimizer with Kronecker factors as its reports need it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from grng.curvature.layers import KroneckerLayer
from grng.reports.costs import Flops, flops_of
from grng.reports.measures import Measured, measure
from grng.reports.memory import MemoryEstimate, bytes_of


@dataclass(frozen=True)
class Subject:
    """An optimizer as a report needs it.

    Attributes:
        owner: Its name.
        layers: With curvature, those without statistics so far included.
        curved: Those of them that have factors.
        parameters: All that are trained.
        reasons: Of those that AdamW trains, why.
        names: Of the parameters.
        states: What the state holds, or will hold, by parameter.
        memory: What that takes.
        leaders: For layers whose input factor is that of another layer, that layer.
        step: Steps so far.
        refresh_every: Steps between refreshes.
        kept: What part of the last step was taken, 0-d; None where there was none yet.
        kept_by: What cuts the step.
        skipped: Steps in a row with non-finite gradients.
        fisher: What the statistics are of.
    """

    owner: str
    layers: Sequence[KroneckerLayer]
    curved: Sequence[KroneckerLayer]
    parameters: Sequence[nn.Parameter]
    reasons: Mapping[nn.Parameter, str]
    names: Mapping[nn.Parameter, str]
    states: Mapping[nn.Parameter, Mapping[str, Any]]
    memory: MemoryEstimate
    leaders: Mapping[KroneckerLayer, KroneckerLayer]
    step: int
    refresh_every: int
    kept: Tensor | None
    kept_by: str
    skipped: int
    fisher: str

    def others(self) -> list[nn.Parameter]:
        """Return the parameters that AdamW trains."""
        owned = {p for x in self.layers for p in x.parameters}
        return [p for p in self.parameters if p not in owned]

    def bytes_of(self, layer: KroneckerLayer) -> int:
        """Return the bytes of a layer's state."""
        return sum(bytes_of(self.states.get(p, {})) for p in layer.parameters)

    def flops_of(self, layer: KroneckerLayer) -> Flops:
        """Return the operations of a layer's curvature."""
        return flops_of(layer, shares_input=layer in self.leaders)

    def flops(self) -> Flops:
        """Return those of all layers."""
        found = [self.flops_of(x) for x in self.layers]
        return Flops(
            sum(f.row for f in found), sum(f.refresh for f in found), sum(f.step for f in found)
        )

    def age_of(self, layer: KroneckerLayer) -> int:
        """Return how many steps the inverses of a layer have served."""
        state = self.states[layer.weight]
        # An older version did not say when they were made.
        return self.step - int(state.get("inverted_at", state.get("updated_at", self.step)))


def read(subject: Subject) -> tuple[dict[KroneckerLayer, Measured], float | None]:
    """Read what the devices know: of the layers, and what part of the last step was taken."""
    states = [subject.states[x.weight] for x in subject.curved]
    extra = [] if subject.kept is None else [subject.kept]
    measured, numbers = measure(subject.curved, states, extra)
    return dict(zip(subject.curved, measured, strict=True)), numbers[0] if numbers else None

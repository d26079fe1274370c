# SPDX-License-Identifier: Apache-2.0
"""An optimizer's numbers in TensorBoard, or in anything else with ``add_scalar``."""

from typing import Any, Protocol


class ScalarWriter(Protocol):
    """What takes numbers: ``torch.utils.tensorboard.SummaryWriter``, or another object with this method."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Write one number."""


class Diagnosed(Protocol):
    """An optimizer of this package."""

    def diagnostics(self) -> dict[str, float]:
        """Return its numbers."""


def write_diagnostics(
    writer: ScalarWriter,
    optimizer: Diagnosed,
    *,
    step: int | None = None,
    prefix: str = "optimizer",
    layers: bool = False,
) -> None:
    """Write ``optimizer.diagnostics()``: one wait for the device, so every few hundred steps is often enough.

    ::

        writer = torch.utils.tensorboard.SummaryWriter()
        ...
        if step % 100 == 0:
            write_diagnostics(writer, opt)

    Args:
        writer: Takes the numbers.
        optimizer: Has them.
        step: Where they stand on the axis; by default the optimizer's count of its steps.
        prefix: Comes before their names, with ``/``.
        layers: Write those of each layer too: some twenty for each.
    """
    numbers = optimizer.diagnostics()
    at = int(numbers["step"]) if step is None else step
    for name, value in numbers.items():
        if name != "step" and (layers or "/" not in name):
            writer.add_scalar(f"{prefix}/{name}", value, at)

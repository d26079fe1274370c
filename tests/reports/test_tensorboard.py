# SPDX-License-Identifier: Apache-2.0
"""Diagnostics written to TensorBoard are read back from its file."""

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from grng import RING, RKalman
from grng.integrations.tensorboard import write_diagnostics


def trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    opt = RING(model)
    for _ in range(2):
        out = model(torch.randn(8, 4))
        opt.observe(out)
        F.cross_entropy(out, torch.arange(8) % 3).backward()
        opt.step()
        opt.zero_grad()
    return opt


@pytest.mark.parametrize("layers", [False, True])
def test_what_is_written_can_be_read(layers, tmp_path):
    opt = trained()
    with SummaryWriter(str(tmp_path)) as writer:
        write_diagnostics(writer, opt, layers=layers)
        write_diagnostics(writer, opt, step=70, prefix="second")
    events = EventAccumulator(str(tmp_path)).Reload()
    tags, numbers = events.Tags()["scalars"], opt.diagnostics()
    assert "optimizer/step" not in tags
    assert ("optimizer/0/input_condition" in tags) == layers
    for name, value in numbers.items():
        if name == "step" or ("/" in name and not layers):
            continue
        [event] = events.Scalars(f"optimizer/{name}")
        assert event.step == 2 and event.value == pytest.approx(value, rel=1e-6)
    assert events.Scalars("second/largest_condition")[0].step == 70


def test_any_object_with_add_scalar_will_do():
    written = {}

    class Writer:
        def add_scalar(self, tag, scalar_value, global_step):
            written[tag] = (scalar_value, global_step)

    write_diagnostics(Writer(), RKalman(nn.Linear(4, 3)), prefix="filter")
    assert written["filter/skipped"] == (0.0, 0)

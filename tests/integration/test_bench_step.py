# SPDX-License-Identifier: Apache-2.0
"""``benchmarks/bench_step.py``: the clock counts each moment once, the parts make up the step."""

import json
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import profile_step  # noqa: E402
from step_costs import contenders, workloads  # noqa: E402
from step_costs.clock import PARTS, Clock, Seam  # noqa: E402

CPU = torch.device("cpu")


class Ticking:
    """A clock that moves when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def run(self, seconds):
        self.now += seconds


def test_a_part_inside_another_is_counted_once(monkeypatch):
    ticking, clock = Ticking(monkeypatch), Clock(CPU)
    library = types.SimpleNamespace(invert=lambda: ticking.run(5.0))
    plain = library.invert
    with clock.watching([Seam("refresh", library, "invert")]), clock.part("update"):
        ticking.run(1.0)
        library.invert()
        ticking.run(2.0)
    assert clock.take() == dict.fromkeys(PARTS, 0.0) | {"update": 3.0, "refresh": 5.0}
    assert clock.take() == dict.fromkeys(PARTS, 0.0)
    assert library.invert is plain


def test_a_method_is_wrapped_on_its_object_only(monkeypatch):
    ticking, clock = Ticking(monkeypatch), Clock(CPU)

    class Solver:
        def solve(self):
            ticking.run(1.0)

    watched, other = Solver(), Solver()
    with clock.watching([Seam("precondition", watched, "solve")]):
        watched.solve()
        other.solve()
    assert clock.take()["precondition"] == 1.0
    assert "solve" not in vars(watched)


@pytest.mark.parametrize("name", ["RING", "KFAC", "AdamW foreach", "AdamW fused", "Muon + AdamW"])
def test_contenders_train(name):
    model = workloads.mlp(6, 5, 3)
    contender = contenders.CONTENDERS[name](model)
    x, y = torch.randn(32, 6), torch.randint(3, (32,))
    losses = []
    for _ in range(12):
        contender.optimizer.zero_grad()
        logits = model(x)
        if contender.observe is not None:
            contender.observe(logits)
        loss = torch.nn.functional.cross_entropy(logits, y)
        loss.backward()
        contender.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    # A matrix of Muon's has one moment, of the others two; the biases are trained by AdamW.
    assert contender.state_bytes() >= 4 * sum(p.numel() for p in model.parameters())
    for seam in contender.seams:
        assert callable(getattr(seam.owner, seam.name))


def test_all_models_can_be_built_and_run():
    for name, workload in workloads.WORKLOADS.items():
        if name in ("vit-s", "vit-b-lora", "resnet-18"):
            continue  # the same classes, too large for a test
        model, x, y = workload.make(CPU)
        assert model(x[:2]).shape == (2, workload.classes)
        assert y.shape == (workload.batch,)
    assert workloads.resnet18(7)(torch.randn(2, 3, 16, 16)).shape == (2, 7)
    lora = workloads.vit_lora(16, 1, 2, 4, 5)
    assert lora(torch.randn(2, 224 * 224)).shape == (2, 5)
    trained = {n for n, p in lora.named_parameters() if p.requires_grad}
    layers = ("qkv.a", "qkv.b", "proj.a", "proj.b")
    assert trained == {f"blocks.0.attention.{x}.weight" for x in layers} | {
        "head.weight",
        "head.bias",
    }


def test_profile_tells_refreshes_from_other_steps():
    text = profile_step.section("mlp")
    between, at_refresh = text.split("at a refresh")
    assert "grng::_adam_moments_" in between
    assert "_damped_inverse_" in at_refresh
    assert "_damped_inverse_" not in between


def test_quick_run_writes_table_json_and_picture(tmp_path):
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "bench_step.py"), "--workloads", "mlp", "--periods", "1",
         "--optimizers", "RING;AdamW foreach;kfac-pytorch", "--out", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "step.json").read_text())
    ring, adamw, foreign = content["rows"]
    for row in (ring, adamw):
        assert sum(row["ms"].values()) == pytest.approx(row["step_ms"])
        assert row["peak_mb"] > 0
    assert all(ring["ms"][part] > 0 for part in PARTS)
    assert adamw["ms"]["refresh"] == adamw["ms"]["precondition"] == 0.0
    assert adamw["units"]["forward"] + adamw["units"]["backward"] == pytest.approx(1.0)
    # Whoever is not installed is named, with the reason; nobody else is stopped by that.
    assert "ms" in foreign or "ModuleNotFoundError" in foreign["problem"]
    assert (tmp_path / "step.png").stat().st_size > 10_000
    assert "RING" in done.stdout

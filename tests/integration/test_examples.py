# SPDX-License-Identifier: Apache-2.0
"""Every recipe under examples/ runs, learns, and has its curvature from sampled labels."""

import importlib.util
from pathlib import Path

import pytest

from grng import RING

EXAMPLES = Path(__file__).parents[2] / "examples"
# Beyond torch; make test installs all of them.
NEEDS = {
    "plain_loop": [],
    "gradient_accumulation": [],
    "mixed_precision": [],
    "peft_lora": ["transformers", "peft"],
    "hf_trainer": ["transformers", "accelerate"],
    "accelerate_loop": ["accelerate"],
    "lightning_module": ["pytorch_lightning"],
}


def test_all_recipes_are_run():
    assert {p.stem for p in EXAMPLES.glob("*.py")} == set(NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_recipe(name, monkeypatch, capsys):
    for library in NEEDS[name]:
        pytest.importorskip(library)
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = []

    class Recorded(RING):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(module, "RING", Recorded)
    losses = module.main()
    # Lightning's and Accelerate's batches differ from step to step.
    first, last = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
    assert last < 0.8 * first
    assert f"-> {losses[-1]:.3f}" in capsys.readouterr().out
    opt = made[-1]
    assert "sampled labels" in str(opt.explain())
    assert opt.diagnostics()["kronecker_layers"] > 0

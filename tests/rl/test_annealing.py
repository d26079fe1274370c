# SPDX-License-Identifier: Apache-2.0
"""The learning rate of the policy falls to zero, and a resumed run goes on from where it was."""

import pytest

from grng.rl import ActorCritic
from tests.rl.environments import Bandit, agent


@pytest.mark.parametrize("optimizer", ["rank1", "adamw"])
def test_the_rate_falls_linearly_to_zero_and_stays_there(optimizer):
    options = {"lr": 0.5}
    one = agent(Bandit, optimizer=optimizer, optimizer_options=options, rollout=4, anneal_steps=160)
    step = 4 * one.config.environments
    for number in range(160 // step + 2):
        one.update()
        rate = 0.5 * max(0.0, 1 - number * step / 160)
        assert one.optimizer.param_groups[0]["lr"] == pytest.approx(rate, abs=1e-12)
    before = {k: v.clone() for k, v in one.policy.state_dict().items()}
    one.update()
    assert all((one.policy.state_dict()[k] == v).all() for k, v in before.items())


def test_a_resumed_run_anneals_on(tmp_path):
    one = agent(Bandit, rollout=4, anneal_steps=320)
    one.update()
    one.update()
    one.save(tmp_path / "a.pt")
    other = ActorCritic.load(tmp_path / "a.pt", Bandit)
    for run in (one, other):
        run.update()
    assert other.optimizer.param_groups[0]["lr"] == one.optimizer.param_groups[0]["lr"] < 1.0

# SPDX-License-Identifier: Apache-2.0
"""Settings that are out of range are refused by name, before anything is trained."""

import gymnasium
import pytest

from grng.rl import ActorCritic, ActorCriticConfig, RLError
from tests.rl.environments import Bandit, agent

NAN, INF = float("nan"), float("inf")
WRONG = {
    "optimizer": ["sgd", None, []],
    "optimizer_options": [None, [1]],
    "environments": [0, -1, 1.5, True, "8", None],
    "rollout": [0, 2.0],
    "gamma": [-0.1, 1.1, NAN, "0.9", None],
    "gae_lambda": [-0.1, 1.1, NAN],
    "entropy": [-0.1, INF, NAN],
    "anneal_steps": [0, -5, 2.5, True],
    "critic_lr": [-1e-3, INF, NAN],
    "critic_epochs": [0, 1.0],
    "critic_batch": [0, False],
    "hidden": [64, (0,), (1.5,), (-3, 4), (True,), "64", None],
    "normalize_observations": ["no", 1],
    "normalize_rewards": [None],
    "seed": [-1, 1.5, None, 2**70],
}


@pytest.mark.parametrize(
    "name, value", [(name, value) for name, values in WRONG.items() for value in values]
)
def test_out_of_range(name, value):
    with pytest.raises(RLError, match=rf"^{name} must be .*got ") as caught:
        ActorCriticConfig(**{name: value})
    assert repr(value) in str(caught.value)


def test_every_setting_is_checked():
    assert set(WRONG) == set(ActorCriticConfig().plain())


def test_the_ends_of_the_ranges_are_allowed():
    ActorCriticConfig(gamma=0, gae_lambda=1, entropy=0, critic_lr=0, hidden=[], seed=0, rollout=1)
    one = agent(Bandit, gamma=0, gae_lambda=1, hidden=[], rollout=1, environments=1)
    one.train(3)
    assert one.steps == 3


def test_an_unknown_setting():
    with pytest.raises(RLError, match=r"unknown setting 'gama'; valid settings: .*gamma"):
        agent(Bandit, gama=0.9)


@pytest.mark.parametrize("optimizer", ["rank1", "adamw", "rmsprop"])
@pytest.mark.parametrize("options", [{"lr": -1.0}, {"dampnig": 1.0}])
def test_options_that_the_optimizer_refuses(optimizer, options):
    (name,) = options
    with pytest.raises(RLError, match=rf"optimizer '{optimizer}': .*(?i:{name}|learning rate)"):
        agent(Bandit, optimizer=optimizer, optimizer_options=options)


def test_settings_do_not_change_with_what_was_given():
    options = {"lr": 0.5}
    config = ActorCriticConfig(optimizer_options=options)
    options["lr"] = 7.0
    config.plain()["optimizer_options"]["lr"] = 8.0
    assert config.optimizer_options == {"lr": 0.5}


@pytest.mark.parametrize("name", ["steps", "checkpoint_every", "episodes"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
def test_numbers_of_steps_and_episodes(name, value):
    one = agent(Bandit)
    call = one.evaluate if name == "episodes" else one.train
    given = {"steps": 16, name: value} if name == "checkpoint_every" else {name: value}
    with pytest.raises(RLError, match=rf"^{name} must be a whole number > 0, got {value}"):
        call(**given)
    assert one.steps == 0


@pytest.mark.parametrize("given", [gymnasium.make("CartPole-v1"), None, 3])
def test_an_environment_that_is_no_name_and_no_function(given):
    with pytest.raises(
        RLError, match="environment must be a name or a function that makes one, got"
    ):
        ActorCritic(given)

# SPDX-License-Identifier: Apache-2.0
"""Specs of methods: what they mean, and what is refused."""

import importlib.util
import json

import pytest

from grng.compare.errors import UsageError
from grng.rl import ActorCritic, EnvironmentUnavailable
from grng.rl.compare.methods import NAMES, parse_methods, valid_options
from grng.rl.config import POLICY_OPTIMIZERS


def settings(spec):
    [method] = parse_methods(spec)
    return method.settings()


def test_options_go_to_the_trainer_or_to_its_optimizer():
    assert settings("rank1:damping=0.5:rollout=32:score=mean:normalize_rewards=false") == {
        "optimizer": "rank1",
        "optimizer_options": {"damping": 0.5, "score": "mean"},
        "rollout": 32,
        "normalize_rewards": False,
    }
    assert settings("adamw: betas=(0.8,0.9)") == {
        "optimizer": "adamw",
        "optimizer_options": {"betas": (0.8, 0.9)},
    }


def test_options_of_rivals():
    assert settings("ppo:n_steps=64:gamma=0.9") == {"n_steps": 64, "gamma": 0.9}
    assert settings("ppo") == settings("trpo") == {"n_steps": 64}
    assert settings("a2c") == {}


@pytest.mark.parametrize(
    "spec, message",
    [
        ("ring", "unknown optimizer 'ring'; of this task: rank1, adamw, rmsprop, a2c, ppo, trpo"),
        ("", "unknown optimizer ''"),
        ("rank1,", "unknown optimizer ''"),
        ("rank1:dampnig=1", "unknown option 'dampnig' of 'rank1'; valid options: .*damping"),
        ("ppo:n_step=1", "unknown option 'n_step' of 'ppo'; valid options: .*n_steps"),
        ("rank1:damping", "option 'damping' must be given once, as damping=value"),
        ("rank1:damping=", "option 'damping' must be given once, as damping=value"),
        ("rank1:damping=1:damping=2", "option 'damping' must be given once"),
        ("a2c,rank1,a2c", "optimizer 'a2c' is given twice"),
        ("rank1:damping=1|1", "optimizer 'rank1:damping=1' is given twice"),
    ],
)
def test_wrong_specs(spec, message):
    with pytest.raises(UsageError, match=message):
        parse_methods(spec)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["seed", "hidden", "policy_kwargs", "env", "optimizer", "params"])
def test_what_the_comparison_decides_is_no_option(name, key):
    with pytest.raises(UsageError, match=f"unknown option '{key}' of '{name}'"):
        parse_methods(f"{name}:{key}=1")


def test_alternatives_are_every_combination():
    methods = parse_methods("rank1:damping=0.1|1:rollout=8|16,a2c")
    assert [method.label for method in methods] == [
        "rank1:damping=0.1:rollout=8",
        "rank1:damping=0.1:rollout=16",
        "rank1:damping=1:rollout=8",
        "rank1:damping=1:rollout=16",
        "a2c",
    ]
    assert methods[1].settings()["optimizer_options"] == {"damping": 0.1}


@pytest.mark.parametrize("name", POLICY_OPTIMIZERS)
def test_no_option_means_two_things(name):
    keys = valid_options(name)
    assert len(keys) == len(set(keys)) and "lr" in keys and "rollout" in keys


@pytest.mark.parametrize("name, module", [("a2c", "stable_baselines3"), ("trpo", "sb3_contrib")])
def test_without_the_rivals(name, module, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda x: None if x == module else find(x))
    with pytest.raises(
        EnvironmentUnavailable, match=rf"'{name}' needs {module}: .*grng-kernels\[rl-rivals\]"
    ):
        parse_methods(f"rank1,{name}")
    assert [method.name for method in parse_methods("rank1,adamw")] == ["rank1", "adamw"]


def test_every_option_in_force_is_known():
    rank1 = parse_methods("rank1:damping=0.5:gamma=0.9")[0].resolved()
    assert rank1["damping"] == 0.5 and rank1["gamma"] == 0.9
    made = ActorCritic("cartpole", optimizer_options={"damping": 0.5}, gamma=0.9)
    group = made.optimizer.param_groups[0]
    for key in ("scores", "max_kl", "damping", "momentum", "step_length", "lr", "weight_decay"):
        assert rank1[key] == group[key]
    assert rank1["rollout"] == made.config.rollout
    made.close()
    a2c = parse_methods("a2c:n_steps=16")[0].resolved()
    assert a2c["n_steps"] == 16 and a2c["learning_rate"] == 7e-4 and a2c["use_rms_prop"] is True
    assert json.loads(json.dumps([rank1, a2c])) == [rank1, a2c]

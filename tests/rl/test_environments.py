# SPDX-License-Identifier: Apache-2.0
"""Environments by name, and what is said where one, or a package, is not there."""

import importlib.util
import subprocess
import sys

import pytest

import grng.rl
from grng.rl import TASKS, ActorCritic, EnvironmentUnavailable, RLError
from grng.rl.environments import maker


@pytest.fixture
def without(monkeypatch):
    """Makes packages look as if they were not installed."""

    def forget(*names):
        for name in list(sys.modules):
            if name.startswith(("gymnasium.envs.mujoco", "gymnasium.envs.box2d")):
                monkeypatch.delitem(sys.modules, name)
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)

    return forget


def test_every_task_can_be_made():
    for name, task in TASKS.items():
        env = maker(name)()
        assert env.spec.id == task.id
        env.reset(seed=0)
        env.close()


def test_options_of_a_task_reach_the_environment():
    assert maker("cartpole-1000")().spec.max_episode_steps == 1000
    assert maker("cartpole")().spec.max_episode_steps == 500


def test_an_id_of_gymnasium_is_taken_as_it_is():
    assert maker("MountainCar-v0")().spec.id == "MountainCar-v0"


@pytest.mark.parametrize("name", ["cartpol", "", "CartPole-v99", "no_such_module:Env-v0"])
def test_an_unknown_environment(name):
    with pytest.raises(RLError, match=r"environment must be one of cartpole, .*, got") as caught:
        ActorCritic(name)
    assert repr(name) in str(caught.value)
    assert not isinstance(caught.value, EnvironmentUnavailable)


@pytest.mark.parametrize("name", ["hopper", "Hopper-v5", "Ant-v5"])
def test_without_mujoco(name, without):
    without("mujoco")
    with pytest.raises(
        EnvironmentUnavailable, match=r'pip install "grng-kernels\[mujoco\]"'
    ) as caught:
        ActorCritic(name)
    assert repr(name) in str(caught.value) and "MuJoCo is not installed" in str(caught.value)


@pytest.mark.parametrize("name", ["lunarlander", "LunarLander-v3"])
def test_without_box2d(name, without):
    without("Box2D")
    with pytest.raises(EnvironmentUnavailable, match=r'pip install "grng-kernels\[box2d\]"'):
        ActorCritic(name)


def test_without_gymnasium(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gymnasium" else find(name)
    )
    with pytest.raises(EnvironmentUnavailable, match=r"gymnasium.*grng-kernels\[rl\]"):
        grng.rl.ActorCritic  # noqa: B018
    with pytest.raises(EnvironmentUnavailable, match=r"'cartpole'.*gymnasium.*grng-kernels\[rl\]"):
        maker("cartpole")
    with pytest.raises(
        EnvironmentUnavailable, match=r"'hopper'.*gymnasium.*grng-kernels\[mujoco\]"
    ):
        maker("hopper")


def test_the_package_and_the_command_need_none_of_them():
    code = (
        "import sys\n"
        "for name in ('gymnasium', 'mujoco', 'stable_baselines3', 'sb3_contrib'):\n"
        "    sys.modules[name] = None\n"
        "from grng.rl import TASKS, ActorCriticConfig, TensorBoardLog\n"
        "from grng.__main__ import main\n"
        "assert main(['info']) == 0\n"
        "sys.exit(main(['compare', '--task', 'cartpole']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "cartpole: CartPole-v1" in done.stdout
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert 'gymnasium: pip install "grng-kernels[rl]"' in done.stderr

# SPDX-License-Identifier: Apache-2.0
"""``python -m grng compare`` with an environment, end to end in a few hundred steps."""

import importlib.util
import re
import sys
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import sb3_contrib
import stable_baselines3
from gymnasium.envs.classic_control import CartPoleEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from grng.__main__ import main
from grng.rl import ActorCritic
from grng.rl.compare import cli, rivals, runs
from grng.rl.compare.methods import parse_methods
from grng.rl.compare.results import load
from grng.rl.environments import find_task, maker
from grng.rl.evaluation import EVALUATION_SEED
from tests.rl.comparison import SPECS, compare

LABELS = SPECS.split(",")
# The advantage of a single step, to mean 0, is 0; a gradient of 0 without eps is 0/0.
NAN = "adamw:eps=0:rollout=1:environments=1"


def test_end_to_end(monkeypatch, tmp_path, capsys):
    code, content, folder = compare(
        monkeypatch, tmp_path, "--optimizers", SPECS, "--steps", "400", "--seeds", "0,1"
    )
    out = capsys.readouterr().out
    assert code == 0 and content["status"] == "finished"
    # Seed by seed, in the order given.
    each = [(run["method"], run["seed"]) for run in content["runs"]]
    assert each == [(label, seed) for seed in (0, 1) for label in LABELS]
    for run in content["runs"]:
        assert run["status"] == "finished" and len(run["evaluation"]) == 3
        assert run["curve_steps"] == [8 * (i + 1) for i in range(50)]
        assert len(run["curve_return"]) == 50 and run["curve_return"][0] is None
        # CartPole pays 1 a step: no episode is shorter than 8, nor longer than 500.
        assert 8 <= run["curve_return"][-1] <= 500 and run["episodes"] > 5
        assert run["seconds"] > 0 and run["solved_at"] is None
    assert [row["method"] for row in content["summary"]] == LABELS
    assert content["config"]["hidden"] == [8]
    assert content["command"][-4:] == ["--steps", "400", "--seeds", "0,1"]
    assert str(tmp_path) not in (folder / "result.json").read_text()
    assert (folder / "return.png").read_bytes().startswith(b"\x89PNG")
    assert load(folder).runs[0].method == LABELS[0]
    assert "CartPole-v1: 400 steps, 2 seeds" in out and f"wrote {folder / 'result.json'}" in out
    assert "rank1:rollout=16 seed 1  finished  final return" in out


def test_no_progress_prints_only_the_table(monkeypatch, tmp_path, capsys):
    compare(monkeypatch, tmp_path, "--optimizers", "adamw", "--steps", "9", "--no-progress")
    assert "seed 0  finished" not in capsys.readouterr().out


def test_a_run_is_what_the_trainer_does(monkeypatch, tmp_path):
    _, content, _ = compare(
        monkeypatch,
        tmp_path,
        "--optimizers",
        "adamw:rollout=50:lr=0.01",
        "--steps",
        "800",
        "--seed",
        "4",
    )
    [run] = content["runs"]
    agent, episodes = (
        ActorCritic(
            "cartpole",
            optimizer="adamw",
            optimizer_options={"lr": 0.01},
            rollout=50,
            hidden=(8,),
            seed=4,
            anneal_steps=800,
        ),
        [],
    )
    agent.train(800, report=lambda update: episodes.extend(update.episodes))
    assert run["episodes"] == len(episodes)
    expected = np.mean([value for _, value, _ in episodes][-100:])
    assert run["curve_return"][-1] == pytest.approx(expected, abs=1e-4)
    assert run["evaluation"] == agent.evaluate(3)


def test_a_rivals_run_is_what_stable_baselines3_does(monkeypatch, tmp_path):
    # 20 rollouts of 5 steps of 8 environments: none goes beyond.
    _, content, _ = compare(
        monkeypatch, tmp_path, "--optimizers", "a2c:ent_coef=0.01", "--steps", "800", "--seed", "4"
    )
    [run] = content["runs"]
    env = DummyVecEnv([lambda: Monitor(gymnasium.make("CartPole-v1"))] * 8)
    env = VecNormalize(env, norm_obs=False)
    model = stable_baselines3.A2C(
        "MlpPolicy",
        env,
        # From the default of the class to zero.
        learning_rate=LinearSchedule(7e-4, 0.0, 1.0),
        ent_coef=0.01,
        seed=4,
        policy_kwargs={"net_arch": [8]},
        device="cpu",
    )
    # Runs of neighbouring seeds have no episode in common.
    env.seed(4 * 8)
    model.learn(800)
    expected = np.mean([episode["r"] for episode in model.ep_info_buffer])
    assert run["curve_return"][-1] == pytest.approx(expected, abs=1e-4)
    assert run["curve_steps"][-1] == model.num_timesteps == 800


def test_observations_are_normalised_for_every_method_where_it_is_usual(monkeypatch, tmp_path):
    code, content, _ = compare(
        monkeypatch,
        tmp_path,
        *("--optimizers", "rank1:rollout=8,a2c", "--steps", "40", "--checkpoints", "2"),
        task="pendulum",
    )
    assert code == 0 and content["config"]["is_normalized"] is True
    for run in content["runs"]:
        # Episodes have 200 steps: none has ended, but for those of the evaluation.
        assert run["curve_return"] == [None, None] and run["episodes"] == 0
        # The environment's own rewards.
        assert all(-2000 < value < -1 for value in run["evaluation"])


def test_a_rival_is_evaluated_with_the_scale_it_learned_with(monkeypatch, tmp_path):
    _, content, _ = compare(
        monkeypatch,
        tmp_path,
        *("--optimizers", "a2c:gamma=0.9", "--steps", "80", "--checkpoints", "2"),
        task="pendulum",
    )

    def make():
        return gymnasium.wrappers.RescaleAction(gymnasium.make("Pendulum-v1"), -1.0, 1.0)

    env = VecNormalize(DummyVecEnv([make] * 8), gamma=0.9)
    model = stable_baselines3.A2C(
        "MlpPolicy",
        env,
        learning_rate=LinearSchedule(7e-4, 0.0, 1.0),
        gamma=0.9,
        seed=0,
        policy_kwargs={"net_arch": [8]},
        device="cpu",
    )
    model.learn(80)
    one = make()
    seen, _ = one.reset(seed=EVALUATION_SEED)
    total, has_ended = 0.0, False
    while not has_ended:
        action, _ = model.predict(env.normalize_obs(seen[None]), deterministic=True)
        seen, reward, _, has_ended, _ = one.step(action[0])
        total += reward
    assert content["runs"][0]["evaluation"][0] == pytest.approx(total, rel=1e-4)


def test_no_environment_stays_open(monkeypatch, tmp_path):
    opened, closed = [], set()
    made, close = CartPoleEnv.__init__, CartPoleEnv.close

    def keep(self, *arguments, **options):
        opened.append(self)
        made(self, *arguments, **options)

    def forget(self):
        closed.add(id(self))
        close(self)

    monkeypatch.setattr(CartPoleEnv, "__init__", keep)
    monkeypatch.setattr(CartPoleEnv, "close", forget)
    compare(monkeypatch, tmp_path, "--optimizers", f"adamw,a2c,{NAN}", "--steps", "20")
    assert len(opened) > 40 and closed == {id(env) for env in opened}


def test_a_run_that_diverges_is_recorded_and_the_others_are_made(monkeypatch, tmp_path, capsys):
    code, content, folder = compare(
        monkeypatch,
        tmp_path,
        *("--optimizers", f"{NAN},a2c:learning_rate=1e30,rank1:rollout=16"),
        *("--steps", "600"),
    )
    assert code == 1 and content["status"] == "diverged"
    assert [run["status"] for run in content["runs"]] == ["diverged", "diverged", "finished"]
    assert "training diverged" in content["runs"][0]["problem"]
    assert "\n" not in content["runs"][1]["problem"]
    assert (folder / "return.png").is_file()
    assert f"{NAN} seed 0 failed: policy" in capsys.readouterr().out


def test_what_a_rival_fails_with_is_recorded(monkeypatch, tmp_path, capsys):
    # An option that its library takes, and then cannot train with.
    code, content, _ = compare(
        monkeypatch, tmp_path, "--optimizers", "a2c:n_steps=0,adamw", "--steps", "64"
    )
    assert code == 1
    assert [run["status"] for run in content["runs"]] == ["diverged", "finished"]
    assert content["runs"][0]["problem"].startswith("UnboundLocalError: ")
    assert "a2c:n_steps=0 seed 0 failed: UnboundLocalError" in capsys.readouterr().out


def test_a_defect_of_ours_is_not_hidden(monkeypatch, tmp_path):
    def fail(*arguments, **options):
        raise KeyError("ours")

    monkeypatch.setattr(runs, "_agent", lambda *arguments: SimpleNamespace(close=bool))
    monkeypatch.setattr(runs, "_train", fail)
    with pytest.raises(KeyError, match="ours"):
        compare(monkeypatch, tmp_path, "--optimizers", "adamw", "--steps", "64")


def test_a_policy_that_is_not_finite_only_in_the_evaluation(monkeypatch, tmp_path):
    # Nothing is drawn after the one step.
    code, content, _ = compare(
        monkeypatch,
        tmp_path,
        *("--optimizers", f"{NAN},adamw", "--steps", "1"),
        task="pendulum",
    )
    assert code == 1
    assert [run["status"] for run in content["runs"]] == ["diverged", "finished"]


@pytest.mark.parametrize("where", ["start", "middle"])
def test_ctrl_c_leaves_what_was_done(where, monkeypatch, tmp_path):
    def interrupt(progress, run):
        if run.method == "a2c":
            raise KeyboardInterrupt

    def at_once(*arguments):
        raise KeyboardInterrupt

    if where == "middle":
        monkeypatch.setattr(cli._Progress, "grown", interrupt)
    else:
        monkeypatch.setattr(cli, "execute", at_once)
    code, content, folder = compare(
        monkeypatch, tmp_path, "--optimizers", "rank1:rollout=16,a2c,adamw", "--steps", "400"
    )
    assert code == 130 and content["status"] == "interrupted"
    found = [(run["method"], run["status"]) for run in content["runs"]]
    if where == "middle":
        assert found == [("rank1:rollout=16", "finished"), ("a2c", "interrupted")]
        assert content["runs"][1]["curve_steps"] == [8]
    else:
        assert found == [("rank1:rollout=16", "interrupted")]
    assert [row["runs"] for row in content["summary"]][2] == 0
    assert (folder / "return.png").is_file()


# ---- what is refused, before there is a folder ----


@pytest.mark.parametrize(
    "options",
    [
        ("--epochs", "2"),
        ("--model", "mlp"),
        ("--stream", "5"),
        ("--batch-size", "4"),
        ("--lora-rank", "2"),
        ("--schedule", "cosine"),
        ("--train-limit", "5"),
        ("--validation", "3"),
        ("--data-dir", "x"),
        ("--warmup-fraction", "0.2"),
        ("--reference", "rank1"),
    ],
)
def test_options_of_other_tasks(options, monkeypatch, tmp_path, capsys):
    code, content, _ = compare(monkeypatch, tmp_path, *options)
    assert (code, content) == (2, None)
    assert f"{options[0]} does not go with --task cartpole" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (("--steps", "0"), "--steps must be > 0, got 0"),
        (("--checkpoints", "-1"), "--checkpoints must be > 0, got -1"),
        (("--seeds", "0,0"), "--seeds must be different numbers >= 0"),
        (("--seeds", ""), "--seeds must be whole numbers"),
        (("--seed", "-1"), "--seeds must be different numbers >= 0"),
        (("--hidden", "0"), "--hidden must be numbers > 0"),
        (("--hidden", ""), "--hidden must be whole numbers"),
        (("--threads", "0"), "--threads must be > 0, got 0"),
        (("--device", "cuda"), "--device must be cpu or auto"),
        (("--optimizers", "ring"), "unknown optimizer 'ring'"),
        (("--optimizers", ""), "unknown optimizer ''"),
        (("--optimizers", "rank1,adamw:lr=-1"), "optimizer 'adamw:lr=-1': .*learning rate"),
        (("--optimizers", "rank1,rank1:rollout=0"), "'rank1:rollout=0': rollout must be"),
        (("--optimizers", "rank1,ppo:learning_rate=x"), "optimizer 'ppo:learning_rate=x': "),
        (("--optimizers", "rank1,a2c:gamma=x"), "optimizer 'a2c:gamma=x': "),
    ],
)
def test_wrong_options(options, message, monkeypatch, tmp_path, capsys):
    # No run may begin before all was checked.
    monkeypatch.setattr(runs, "_train", None)
    code, content, _ = compare(monkeypatch, tmp_path, *options)
    assert (code, content) == (2, None)
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == 1


def test_an_unknown_task_names_the_environments(monkeypatch, tmp_path, capsys):
    code, _, _ = compare(monkeypatch, tmp_path, task="cartpol")
    assert code == 2 and "cartpole" in capsys.readouterr().err


def missing(monkeypatch, module):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda x: None if x == module else find(x))


@pytest.mark.parametrize(
    "module, options, extra",
    [
        ("stable_baselines3", ("--optimizers", "rank1,ppo"), "rl-rivals"),
        ("sb3_contrib", ("--optimizers", "rank1,trpo"), "rl-rivals"),
        ("gymnasium", (), "rl"),
    ],
)
def test_a_missing_package(module, options, extra, monkeypatch, tmp_path, capsys):
    missing(monkeypatch, module)
    code, content, _ = compare(monkeypatch, tmp_path, *options)
    assert code == 2 and content is None
    assert f'pip install "grng-kernels[{extra}]"' in capsys.readouterr().err


def test_the_id_of_gymnasium_is_a_name_too(monkeypatch, tmp_path):
    options = ("--optimizers", "adamw", "--steps", "40")
    code, content, _ = compare(monkeypatch, tmp_path, *options, task="CartPole-v1")
    assert (code, content["config"]["solved"]) == (0, 475.0)


def test_missing_mujoco(monkeypatch, tmp_path, capsys):
    for name in list(sys.modules):
        if name.startswith("gymnasium.envs.mujoco"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mujoco", None)
    code, content, _ = compare(monkeypatch, tmp_path, task="hopper")
    assert (code, content) == (2, None)
    assert 'pip install "grng-kernels[mujoco]"' in capsys.readouterr().err


def test_info_lists_the_environments(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "  lunarlander: LunarLander-v3; extra: box2d" in out


def test_the_divergence_of_trpo_is_annealed_as_the_rates_of_the_others(monkeypatch):
    task, divergences = find_task("cartpole"), []
    learn = sb3_contrib.TRPO.train

    def train(model):
        divergences.append(model.target_kl)
        rates.append(model.policy.optimizer.param_groups[0]["lr"])
        learn(model)

    rates = []
    monkeypatch.setattr(sb3_contrib.TRPO, "train", train)
    method = parse_methods("trpo:n_steps=5:target_kl=0.04")[0]
    rivals.train(
        method,
        task,
        maker("cartpole"),
        steps=80,
        seed=0,
        hidden=(8,),
        tell=lambda steps, returns: None,
    )
    # After 40 of 80 steps a step is half as long, and its divergence a quarter.
    assert divergences == pytest.approx([0.04 / 4, 1e-12])
    # The rate is that of its critic alone.
    assert set(rates) == {1e-3}

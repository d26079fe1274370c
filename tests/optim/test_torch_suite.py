# SPDX-License-Identifier: Apache-2.0
"""PyTorch's own machinery for testing optimizers, run over every class in the form that takes parameters.

The classes with Kronecker layers train bare parameters by AdamW, with a warning: it is that route, and all
that surrounds a step, which is tested here; ``test_contract.py`` does the same with modules. The tests are
our own words for those of torch's ``test_optim.py``, which is in no wheel.

RKalman and LoKO have no loss, and read no ``.grad``: their steps are made by ``observe()``. Of torch's list
these do not apply to them: the direction of gradients (in its place, that observations are learned),
``maximize``, weight decay, steps without gradients or with zero ones (a step without an observation is an
error), and a ``step`` of each parameter that is no tensor (they have none). All the rest runs over them
too. RankOneNPG reads ``.grad`` and needs an observation: of the list it leaves out the last two. Like
torch's SGD it has no state without momentum.
"""

import copy
import io
import warnings

import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
    optims,
)
from torch.testing._internal.common_utils import TestCase

from grng import KFAC, RENG, RING, LoKO, RankOneNPG, RKalman, SophiaG, SophiaH

BARE = "given parameters and not a model"
KRONECKER = (RING, RENG, KFAC)
KALMAN = (RKalman, LoKO)
# Besides the settings of a class, with the first of which they are combined.
SHARED = ({"weight_decay": 0.1}, {"maximize": True})


def _inputs(*many, shared=SHARED):
    """The settings of one class, without parameters, as torch's table has them."""

    def inputs(device, dtype=None):
        settings = [*many, *({**many[0], **s} for s in shared)]
        return [OptimizerInput(params=None, kwargs=dict(k), desc=str(k)) for k in settings]

    return inputs


def _errors(**wrong):
    """What every class refuses at construction, and numbers that this one refuses."""

    def errors(device, dtype):
        found = get_error_inputs_for_all_optims(device, dtype)
        for name, (value, message) in wrong.items():
            p = nn.Parameter(torch.randn(2, 2, device=device, dtype=dtype))
            given = OptimizerInput(params=[p], kwargs={name: value}, desc=name)
            found.append(ErrorOptimizerInput(given, error_type=ValueError, error_regex=message))
        return found

    return errors


SCHEDULERS = (
    [lambda opt: StepLR(opt, gamma=0.99, step_size=10)],
    [lambda opt: ExponentialLR(opt, gamma=0.995), ReduceLROnPlateau],
    [lambda opt: LinearLR(opt, start_factor=0.4, total_iters=4)],
)
PLAIN = dict(
    scheduler_inputs=SCHEDULERS,
    supported_impls=(),
    not_og_supported_flags=("maximize",),
    supports_complex=False,
)
ADAMW = dict(adamw_lr=0.02)
INFOS = [
    OptimizerInfo(
        RING,
        optim_inputs_func=_inputs(
            {"lr": 0.02}, {"lr": 0.02, "betas": (0.5, 0.9)}, {**ADAMW, "step_length": "kl_clip"}
        ),
        optim_error_inputs_func=_errors(lr=(-1.0, "lr must be"), rho=(0.0, "rho must be")),
        **PLAIN,
    ),
    OptimizerInfo(
        RENG,
        optim_inputs_func=_inputs({"lr": 0.02}, {"lr": 0.02, "rho_gr": 0.1}),
        optim_error_inputs_func=_errors(rho_gr=(-1.0, "rho_gr must be")),
        **PLAIN,
    ),
    OptimizerInfo(
        KFAC,
        optim_inputs_func=_inputs(ADAMW, {**ADAMW, "convention": "kfac-pytorch"}),
        optim_error_inputs_func=_errors(
            damping=(0.0, "damping must be"), momentum=(1.0, "momentum must be")
        ),
        **PLAIN,
    ),
    *(
        OptimizerInfo(
            cls,
            optim_inputs_func=_inputs({"lr": 0.02}, {"lr": 0.02, "betas": (0.5, 0.9)}),
            optim_error_inputs_func=_errors(
                gamma=(0.0, "gamma must be"), betas=((0.9, 1.0), r"betas\[1\] must be")
            ),
            **PLAIN,
        )
        for cls in (SophiaG, SophiaH)
    ),
]
FILTERS = [
    OptimizerInfo(
        cls,
        optim_inputs_func=_inputs(
            {"likelihood": "gaussian", "sigma0": 1.0, "noise": 0.1},
            {"likelihood": "gaussian", "sigma0": 1.0},
            {"likelihood": "gaussian", "sigma0": 1.0, "forgetting": 0.99},
            shared=(),
        ),
        optim_error_inputs_func=_errors(
            sigma0=(0.0, "sigma0 must be"), forgetting=(2.0, "forgetting must be")
        ),
        **PLAIN,
    )
    for cls in KALMAN
]
POLICY = [
    OptimizerInfo(
        RankOneNPG,
        optim_inputs_func=_inputs(
            {"lr": 0.5},
            {"lr": 0.5, "scores": 3, "momentum": 0.5},
            {"lr": 0.01, "step_length": "fixed", "score": "mean"},
        ),
        optim_error_inputs_func=_errors(
            damping=(0.0, "damping must be"), max_kl=(0.0, "max_kl must be")
        ),
        **PLAIN,
    )
]
DESCENDING = [*INFOS, *POLICY]
BOTH = [*INFOS, *FILTERS, *POLICY]


def build(info, params, **kwargs):
    """An optimizer of bare parameters; the warning that goes with them is expected, and no other."""
    with warnings.catch_warnings():
        if info.optim_cls in KRONECKER:
            warnings.filterwarnings("ignore", message=f".*{BARE}")
        return info.optim_cls(params, **kwargs)


def problem(device, dtype, contiguous=True):
    """A linear map whose error shall vanish: its two parameters, the closure, and the observation."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    if contiguous:
        weight, bias = nn.Parameter(normal(4, 3)), nn.Parameter(normal(4))
    else:
        weight, bias = nn.Parameter(normal(4, 3, 2)[..., 0]), nn.Parameter(normal(4, 2)[..., 0])
    x, y = normal(3), normal(4)

    def outputs():
        return weight.mv(x) + bias

    def loss():
        return (outputs() - y).square().sum()

    return [weight, bias], outputs, y, loss


class Run:
    """A class on that problem: one way to make a step, whatever it needs."""

    def __init__(self, info, device, dtype, kwargs, *, contiguous=True, form=list):
        self.info = info
        self.params, self.outputs, self.targets, self.loss = problem(device, dtype, contiguous)
        self.sign = -1.0 if kwargs.get("maximize") else 1.0
        self.opt = build(info, form(self.params), **kwargs)

    def backward(self):
        if self.info.optim_cls in KALMAN:
            self.opt.observe(self.outputs().unsqueeze(0), self.targets.unsqueeze(0))
            return self.loss().detach()
        if self.info.optim_cls is RankOneNPG:
            # As if the targets were actions of a Gaussian policy.
            self.opt.observe(-0.5 * (self.outputs() - self.targets).square())
        loss = self.sign * self.loss()
        loss.backward()
        return loss

    def step(self, times=1):
        for _ in range(times):
            self.opt.zero_grad()
            self.backward()
            self.opt.step()

    def closure(self):
        self.opt.zero_grad()
        return self.backward()

    def values(self):
        return [p.detach().clone() for p in self.params]


def kwargs_of(info, device, dtype):
    return [i.kwargs for i in info.optim_inputs_func(device=device, dtype=dtype)]


class TestTorchSuite(TestCase):
    # ---- construction ----

    @optims(BOTH)
    def test_errors(self, device, dtype, optim_info):
        errors = optim_info.optim_error_inputs_func(device=device, dtype=dtype)
        self.assertGreater(len(errors), 6)
        for error in errors:
            given = error.optimizer_error_input
            params = given.params
            if params is None:
                params = [nn.Parameter(torch.randn(1, device=device, dtype=dtype))]
            if issubclass(error.error_type, Warning):
                with self.assertWarnsRegex(error.error_type, error.error_regex):
                    build(optim_info, params, **given.kwargs)
            else:
                with self.assertRaisesRegex(error.error_type, error.error_regex):
                    build(optim_info, params, **given.kwargs)

    @optims(BOTH)
    def test_an_empty_list_is_refused(self, device, dtype, optim_info):
        with self.assertRaisesRegex(ValueError, "empty parameter list"):
            build(optim_info, [])

    @optims(BOTH)
    def test_param_groups_keep_their_options_and_names(self, device, dtype, optim_info):
        p, q = (nn.Parameter(torch.randn(2, device=device, dtype=dtype)) for _ in range(2))
        groups = [{"params": [("p", p)], "lr": 0.5}, {"params": [("q", q)]}]
        opt = build(optim_info, groups)
        self.assertEqual(opt.param_groups[0]["lr"], 0.5)
        self.assertEqual([g["param_names"] for g in opt.param_groups], [["p"], ["q"]])
        self.assertEqual(repr(opt).splitlines()[0], f"{optim_info.optim_cls.__name__} (")

    # ---- steps ----

    @optims(DESCENDING)
    def test_goes_right_direction(self, device, dtype, optim_info):
        for schedulers in ((), *optim_info.scheduler_inputs):
            for contiguous in (True, False):
                for kwargs in kwargs_of(optim_info, device, dtype):
                    run = Run(optim_info, device, dtype, kwargs, contiguous=contiguous)
                    made = [make(run.opt) for make in schedulers]
                    first = float(run.loss().detach())
                    for _ in range(20):
                        loss = run.closure()
                        run.opt.step()
                        for scheduler in made:
                            plateau = isinstance(scheduler, ReduceLROnPlateau)
                            scheduler.step(loss) if plateau else scheduler.step()
                    self.assertLess(float(run.loss().detach()), first)

    @optims(FILTERS)
    def test_observations_are_learned(self, device, dtype, optim_info):
        for contiguous in (True, False):
            for kwargs in kwargs_of(optim_info, device, dtype):
                run = Run(optim_info, device, dtype, kwargs, contiguous=contiguous)
                first = float(run.loss().detach())
                run.step(20)
                self.assertLess(float(run.loss().detach()), 0.5 * first)

    @optims(BOTH)
    def test_param_group_with_lrscheduler_goes_right_direction(self, device, dtype, optim_info):
        for schedulers in optim_info.scheduler_inputs:
            run = Run(
                optim_info,
                device,
                dtype,
                kwargs_of(optim_info, device, dtype)[0],
                form=lambda ps: [{"params": [ps[0]]}, {"params": [ps[1]], "lr": 0.01}],
            )
            made = [make(run.opt) for make in schedulers]
            first = float(run.loss().detach())
            for _ in range(20):
                loss = run.closure()
                run.opt.step()
                for scheduler in made:
                    plateau = isinstance(scheduler, ReduceLROnPlateau)
                    scheduler.step(loss) if plateau else scheduler.step()
            self.assertLess(float(run.loss().detach()), first)

    @optims(BOTH)
    def test_tensor_lr(self, device, dtype, optim_info):
        for kwargs in kwargs_of(optim_info, device, dtype):
            key = "adamw_lr" if "adamw_lr" in kwargs else "lr"
            number = kwargs.get(key, 1.0)
            for schedulers in ((), *optim_info.scheduler_inputs):
                plain = Run(optim_info, device, dtype, {**kwargs, key: number})
                given = torch.tensor(number, device=device, dtype=torch.float64)
                tensor = Run(optim_info, device, dtype, {**kwargs, key: given})
                made = [[make(r.opt) for make in schedulers] for r in (plain, tensor)]
                for _ in range(5):
                    for run, mine in zip((plain, tensor), made, strict=True):
                        loss = run.closure()
                        run.opt.step()
                        for scheduler in mine:
                            plateau = isinstance(scheduler, ReduceLROnPlateau)
                            scheduler.step(loss) if plateau else scheduler.step()
                self.assertEqual(plain.values(), tensor.values())
                self.assertIsInstance(tensor.opt.param_groups[0]["lr"], torch.Tensor)

    @optims(DESCENDING)
    def test_maximize_is_the_step_of_the_negative_loss(self, device, dtype, optim_info):
        for kwargs in kwargs_of(optim_info, device, dtype):
            plain = Run(optim_info, device, dtype, {**kwargs, "maximize": False})
            other = Run(optim_info, device, dtype, {**kwargs, "maximize": True})
            for run in (plain, other):
                run.step(5)
            self.assertEqual(plain.values(), other.values(), rtol=0, atol=0)
            grads = [[p.grad for p in run.params] for run in (plain, other)]
            self.assertEqual(grads[0], [-g for g in grads[1]])

    @optims(INFOS)
    def test_step_is_noop_without_gradients_and_for_zero_ones(self, device, dtype, optim_info):
        for kwargs in kwargs_of(optim_info, device, dtype):
            run = Run(optim_info, device, dtype, {**kwargs, "weight_decay": 0.0})
            before = run.values()
            run.opt.step()
            self.assertEqual(run.values(), before, rtol=0, atol=0)
            for p in run.params:
                p.grad = torch.zeros_like(p)
            run.opt.step()
            self.assertEqual(run.values(), before, rtol=0, atol=0)

    @optims(BOTH)
    def test_a_closure_is_called_once_with_gradients_on(self, device, dtype, optim_info):
        run = Run(optim_info, device, dtype, kwargs_of(optim_info, device, dtype)[0])
        calls = []

        def closure():
            calls.append(torch.is_grad_enabled())
            return run.closure()

        before = run.values()
        with torch.no_grad():
            loss = run.opt.step(closure)
        self.assertEqual(calls, [True])
        self.assertIsInstance(loss, torch.Tensor)
        self.assertFalse(all(map(torch.equal, before, run.values())))

    @optims(BOTH)
    def test_a_parameter_of_size_zero_is_stepped_over(self, device, dtype, optim_info):
        run = Run(optim_info, device, dtype, kwargs_of(optim_info, device, dtype)[0])
        empty = nn.Parameter(torch.zeros(0, device=device, dtype=dtype))
        run.opt.add_param_group({"params": [empty]})
        before = run.values()
        empty.grad = torch.zeros_like(empty)
        run.backward()
        run.opt.step()
        self.assertFalse(all(map(torch.equal, before, run.values())))

    # ---- state ----

    @optims([*INFOS, *FILTERS])
    def test_non_empty_state(self, device, dtype, optim_info):
        for kwargs in kwargs_of(optim_info, device, dtype):
            run = Run(optim_info, device, dtype, kwargs)
            run.step()
            self.assertEqual([len(run.opt.state[p]) > 0 for p in run.params], [True, True])

    @optims(BOTH)
    def test_can_load_older_state_dict(self, device, dtype, optim_info):
        for kwargs in kwargs_of(optim_info, device, dtype):
            run = Run(optim_info, device, dtype, kwargs)
            run.step(3)
            old = copy.deepcopy(run.opt.state_dict())
            for group in old["param_groups"]:
                for flag in ("maximize", "foreach", "capturable", "differentiable", "fused"):
                    group.pop(flag, None)
            twin = Run(optim_info, device, dtype, kwargs)
            for p, q in zip(twin.params, run.params, strict=True):
                p.data.copy_(q.data)
            twin.opt.load_state_dict(old)
            for r in (run, twin):
                r.step(3)
            self.assertEqual(run.values(), twin.values(), rtol=0, atol=0)

    @optims(BOTH)
    def test_can_load_from_to_named_state_dict(self, device, dtype, optim_info):
        def named(params):
            return list(zip(("weight", "bias"), params, strict=True))

        for kwargs in kwargs_of(optim_info, device, dtype):
            for mine, its in ((list, named), (named, list), (named, named)):
                run = Run(optim_info, device, dtype, kwargs, form=mine)
                run.step(3)
                twin = Run(optim_info, device, dtype, kwargs, form=its)
                for p, q in zip(twin.params, run.params, strict=True):
                    p.data.copy_(q.data)
                twin.opt.load_state_dict(run.opt.state_dict())
                names = twin.opt.param_groups[0].get("param_names")
                self.assertEqual(names, ["weight", "bias"])
                for r in (run, twin):
                    r.step(3)
                self.assertEqual(run.values(), twin.values(), rtol=0, atol=0)

    @optims(BOTH, dtypes=[torch.float32, torch.bfloat16])
    def test_save_load_equality_with_weights_only(self, device, dtype, optim_info):
        for kwargs in kwargs_of(optim_info, device, dtype):
            run, twin = (Run(optim_info, device, dtype, kwargs) for _ in range(2))
            run.step(3)
            file = io.BytesIO()
            torch.save(run.opt.state_dict(), file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            untouched = copy.deepcopy(saved)
            twin.opt.load_state_dict(saved)
            self.assertEqual(twin.opt.state_dict(), run.opt.state_dict(), rtol=0, atol=0)
            for p, q in zip(twin.params, run.params, strict=True):
                p.data.copy_(q.data)
            for r in (run, twin):
                r.step(20)
            self.assertEqual(run.values(), twin.values(), rtol=0, atol=0)
            self.assertEqual(saved, untouched, rtol=0, atol=0)

    @optims(INFOS)
    def test_load_nontensor_step(self, device, dtype, optim_info):
        for kwargs in kwargs_of(optim_info, device, dtype):
            run = Run(optim_info, device, dtype, kwargs)
            run.step(3)
            saved = copy.deepcopy(run.opt.state_dict())
            for state in saved["state"].values():
                if "step" in state:
                    state["step"] = state["step"].item()
            twin = Run(optim_info, device, dtype, kwargs)
            for p, q in zip(twin.params, run.params, strict=True):
                p.data.copy_(q.data)
            twin.opt.load_state_dict(saved)
            self.assertEqual(twin.opt.state_dict(), run.opt.state_dict(), rtol=0, atol=0)
            for r in (run, twin):
                r.step(3)
            self.assertEqual(run.values(), twin.values(), rtol=0, atol=0)

    @optims(BOTH)
    def test_deepcopy_copies_all_public_attrs(self, device, dtype, optim_info):
        def public(opt):
            return {k for k in opt.__dict__ if not k.startswith("_")}

        for kwargs in kwargs_of(optim_info, device, dtype):
            run = Run(optim_info, device, dtype, kwargs)
            run.step(3)
            for twin in (copy.deepcopy(run.opt), copy.deepcopy(copy.deepcopy(run.opt))):
                self.assertEqual(public(twin), public(run.opt))
                self.assertEqual(twin.state_dict(), run.opt.state_dict())

    # ---- hooks ----

    @optims(BOTH)
    def test_state_dict_pre_and_post_hooks(self, device, dtype, optim_info):
        run = Run(optim_info, device, dtype, kwargs_of(optim_info, device, dtype)[0])

        def before(opt):
            opt.param_groups[0]["seen"] = "before"

        def after(opt, state_dict):
            return {**state_dict, "state": {"seen": "after"}}

        run.opt.register_state_dict_pre_hook(before)
        handle = run.opt.register_state_dict_post_hook(after)
        given = run.opt.state_dict()
        self.assertEqual(given["param_groups"][0]["seen"], "before")
        self.assertEqual(given["state"], {"seen": "after"})
        handle.remove()
        self.assertNotIn("seen", run.opt.state_dict()["state"])

    @optims(BOTH)
    def test_load_state_dict_pre_hooks(self, device, dtype, optim_info):
        kwargs = kwargs_of(optim_info, device, dtype)[0]
        run, twin = (Run(optim_info, device, dtype, kwargs) for _ in range(2))
        run.step(3)
        saved = run.opt.state_dict()
        # As a user mends a checkpoint whose parameters are counted from another number: what a hook puts in
        # the place of the state dict counts, and what was given stays as it was.
        moved = {
            "state": {i + 7: s for i, s in saved["state"].items()},
            "param_groups": [
                {**g, "params": [i + 7 for i in g["params"]], "lr": 0.25}
                for g in saved["param_groups"]
            ],
        }
        order = []

        def replaces(opt, state_dict):
            order.append("replaces")
            groups = [
                {**g, "params": [i - 7 for i in g["params"]]} for g in state_dict["param_groups"]
            ]
            state = {i - 7: dict(s) for i, s in state_dict["state"].items()}
            return {"state": state, "param_groups": groups}

        def changes(opt, state_dict):
            order.append("changes")
            state_dict["param_groups"][0]["lr"] = 0.125

        twin.opt.register_load_state_dict_pre_hook(changes)
        twin.opt.register_load_state_dict_pre_hook(replaces, prepend=True)
        twin.opt.load_state_dict(moved)
        self.assertEqual(order, ["replaces", "changes"])
        self.assertEqual(twin.opt.param_groups[0]["lr"], 0.125)
        self.assertEqual(moved["param_groups"][0]["lr"], 0.25)
        self.assertEqual(twin.opt.state_dict()["state"], saved["state"], rtol=0, atol=0)

    @optims(BOTH)
    def test_load_state_dict_post_hooks(self, device, dtype, optim_info):
        kwargs = kwargs_of(optim_info, device, dtype)[0]
        run, twin = (Run(optim_info, device, dtype, kwargs) for _ in range(2))
        run.step(3)
        order = []

        def last(opt):
            order.append("last")
            opt.param_groups[0]["lr"] = 0.5

        def first(opt):
            order.append("first")
            # All is there already, and what is written now stays.
            for state in opt.state.values():
                for value in state.values():
                    if isinstance(value, torch.Tensor) and value.is_floating_point():
                        value.fill_(2.0)

        twin.opt.register_load_state_dict_post_hook(last)
        twin.opt.register_load_state_dict_post_hook(first, prepend=True)
        twin.opt.load_state_dict(run.opt.state_dict())
        self.assertEqual(order, ["first", "last"])
        self.assertEqual(twin.opt.param_groups[0]["lr"], 0.5)
        for state in twin.opt.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    self.assertTrue(bool((value == 2.0).all()))

    @optims(BOTH)
    def test_step_hooks(self, device, dtype, optim_info):
        run = Run(optim_info, device, dtype, kwargs_of(optim_info, device, dtype)[0])
        calls = []
        handles = [
            register_optimizer_step_pre_hook(lambda o, a, k: calls.append("all, before")),
            register_optimizer_step_post_hook(lambda o, a, k: calls.append("all, after")),
            run.opt.register_step_pre_hook(lambda o, a, k: calls.append("mine, before")),
            run.opt.register_step_post_hook(lambda o, a, k: calls.append("mine, after")),
        ]
        run.step()
        for handle in handles:
            handle.remove()
        run.step()
        order = ["all, before", "mine, before", "mine, after", "all, after"]
        self.assertEqual(sorted(calls), sorted(order))
        self.assertEqual([c.split(", ")[1] for c in calls], ["before"] * 2 + ["after"] * 2)
        self.assertEqual(calls[1], "mine, before")


instantiate_device_type_tests(TestTorchSuite, globals(), only_for=("cpu",))

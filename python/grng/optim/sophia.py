# SPDX-License-Identifier: Apache-2.0
"""Sophia: momentum over a diagonal estimate of the Hessian, clipped elementwise; the two of its paper."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from grng.curvature.fisher import sampled_loss
from grng.optim.ascent import ascending, check_maximize
from grng.optim.base import PreconditionerError, check_hyperparameter
from grng.optim.devices import refuse_graph_capture, scale_
from grng.optim.rehearsal import Rehearsing
from grng.optim.undo import undone_on_error

MAX_FAILURES = 3


class SophiaOptimizer(Rehearsing):
    """What the two Sophias share; see :class:`grng.SophiaG`. A subclass implements ``observe``.

    State per parameter: ``exp_avg`` and ``hessian``, in fp32 (fp64 for fp64 parameters) whatever the dtype
    of the parameter, and kept so by ``load_state_dict``. The first parameter group also counts: ``step``,
    ``next_refresh``, ``skipped_steps``, ``dropped_statistics``. As that is on the host, a step cannot be
    captured into a CUDA graph, and says so.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        lr: float | Tensor,
        *,
        betas: tuple[float, float],
        gamma: float,
        eps: float,
        weight_decay: float,
        refresh_every: int,
        maximize: bool,
    ) -> None:
        owner = type(self).__name__
        check_maximize(owner, maximize)
        check_hyperparameter(owner, "lr", lr)
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"{owner}: betas must be two numbers, got {betas!r}")
        for i, beta in enumerate(betas):
            check_hyperparameter(owner, f"betas[{i}]", beta, high=1 - 1e-9)
        check_hyperparameter(owner, "gamma", gamma, low=1e-30)
        check_hyperparameter(owner, "eps", eps, low=1e-30)
        check_hyperparameter(owner, "weight_decay", weight_decay)
        check_hyperparameter(owner, "refresh_every", refresh_every, low=1)
        self._names: dict[nn.Parameter, str] = {}
        params: Any = model
        if isinstance(model, nn.Module):
            self._names = {p: name for name, p in model.named_parameters()}
            params = [p for p in model.parameters() if p.requires_grad]
            if not params:
                raise ValueError(f"{owner}: the model has no trainable parameters")
        # Of the forward passes since the last step: what their statistics add up to.
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._terms, self._observations = 0, 0
        self._gradients_seen: list[tuple[int, int]] = []  # when the first of them came
        self._failures = 0
        defaults = dict(
            lr=lr,
            betas=tuple(betas),
            gamma=gamma,
            eps=eps,
            weight_decay=weight_decay,
            refresh_every=refresh_every,
            step=0,
            next_refresh=0,
            skipped_steps=0,
            dropped_statistics=0,
            maximize=maximize,
        )
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as for any torch optimizer.

        Raises:
            TypeError: A parameter of a dtype that is not real floating-point.
        """
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if not p.is_floating_point():
                del self.param_groups[-1]
                raise TypeError(
                    f"{type(self).__name__}: parameters must be of a real floating-point dtype, "
                    f"got {p.dtype}"
                )

    # ---- statistics ----

    def _is_wanted(self) -> bool:
        # At the first chance once it is due: a step without observe() does not cost a whole period.
        group = self.param_groups[0]
        return bool(group["step"] >= group["next_refresh"])

    def _trained(self) -> list[nn.Parameter]:
        return [p for g in self.param_groups for p in g["params"] if p.requires_grad]

    def _add(self, parameter: nn.Parameter, value: Tensor) -> None:
        if not self._sums:
            self._gradients_seen = self._gradients()
        value = value.detach().to(_state_dtype(parameter))
        known = self._sums.get(parameter)
        self._sums[parameter] = value if known is None else known.add_(value)

    def _estimates(self) -> dict[nn.Parameter, Tensor]:
        # The diagonal of the Hessian as observed since the last step, by parameter.
        raise AssertionError("implemented by each optimizer")

    def _forget(self) -> None:
        self._sums = {}
        self._terms, self._observations = 0, 0

    # ---- step ----

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Perform one optimization step.

        A step with NaN or infinity in a gradient changes nothing and is counted; statistics with NaN or
        infinity in them are dropped and counted. One wait for the device finds both.

        Args:
            closure: Re-evaluates the model and returns the loss; optional.

        Returns:
            What the closure returned, or None.

        Raises:
            PreconditionerError: Non-finite gradients for more than 3 steps in a row.
            RuntimeError: A sparse gradient; or the model was moved or cast after the optimizer got its state.
        """
        refuse_graph_capture(type(self).__name__)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        elif not self._sums and self._rehearse_if_asked():
            return None
        self._drop_rehearsal()
        estimates = self._estimates()
        with_grad = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        self._refuse_sparse(with_grad)
        self._check_places(with_grad)
        good, usable = _all_finite([_grad(p) for p in with_grad], list(estimates.values()))
        first = self.param_groups[0]
        if not usable:
            first["dropped_statistics"] += 1
        if not good:
            self._forget()
            first["skipped_steps"] += 1
            self._note_failure(with_grad)
            return loss
        self._failures = 0
        with (
            ascending(self.param_groups),
            undone_on_error(self.state, but=PreconditionerError),
        ):
            if estimates and usable:
                self._update_hessian(estimates)
            for group in self.param_groups:
                params = [p for p in group["params"] if p.grad is not None]
                if params:
                    self._update(group, params)
        if estimates and usable:
            first["next_refresh"] = first["step"] + first["refresh_every"]
        first["step"] += 1
        self._forget()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and drop the statistics that came before those that no step used."""
        if self._sums and self._gradients_seen != self._gradients():
            # A backward pass came after them: its step was skipped.
            self._forget()
        super().zero_grad(set_to_none)
        if self._sums:
            self._gradients_seen = self._gradients()

    def _gradients(self) -> list[tuple[int, int]]:
        """What tells whether a backward pass has run: which tensors gradients are, and how often written."""
        grads = [p.grad for g in self.param_groups for p in g["params"]]
        return [(id(g), 0 if g is None else g._version) for g in grads]

    def _check_places(self, params: list[nn.Parameter]) -> None:
        for p in params:
            known = self.state.get(p, {}).get("exp_avg")
            if known is not None and (known.dtype != _state_dtype(p) or known.device != p.device):
                raise RuntimeError(
                    f"{type(self).__name__}: {self._name_of(p)} ({p.dtype}, {p.device}) was moved or cast "
                    f"after the optimizer got its state ({known.dtype}, {known.device}); make the "
                    "optimizer after that, or load its state_dict into a new one"
                )

    def _refuse_sparse(self, params: list[nn.Parameter]) -> None:
        for p in params:
            if _grad(p).layout is not torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__}: gradients must be dense, that of {self._name_of(p)} has layout "
                    f"{_grad(p).layout}"
                )

    def _note_failure(self, params: list[nn.Parameter]) -> None:
        self._failures += 1
        if self._failures > MAX_FAILURES:
            bad = next(p for p in params if not bool(torch.isfinite(_grad(p)).all()))
            raise PreconditionerError(
                f"{type(self).__name__}: non-finite gradients in {self._failures} steps in a row, now at "
                f"step {self.param_groups[0]['step']}, first in {self._name_of(bad)} {list(bad.shape)}; "
                "the parameters are unchanged since. Lower the learning rate, or look for the first "
                "non-finite loss."
            )

    def _rehearse(self) -> None:
        """Give the state the form that it will have; see :mod:`grng.optim.rehearsal`."""
        for p in (p for g in self.param_groups for p in g["params"] if p.grad is not None):
            self._state_of(p)

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            for key in ("exp_avg", "hessian"):
                state[key] = torch.zeros_like(parameter, dtype=_state_dtype(parameter))
        return state

    def _update_hessian(self, estimates: dict[nn.Parameter, Tensor]) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p in estimates]
            if params:
                # New tensors: a step that runs out of memory puts the old ones back.
                averages = torch._foreach_mul(
                    [self._state_of(p)["hessian"] for p in params], group["betas"][1]
                )
                torch._foreach_add_(
                    averages, [estimates[p] for p in params], alpha=1 - group["betas"][1]
                )
                for p, average in zip(params, averages, strict=True):
                    self.state[p]["hessian"] = average

    def _update(self, group: dict[str, Any], params: list[nn.Parameter]) -> None:
        states = [self._state_of(p) for p in params]
        grads = [_grad(p).to(_state_dtype(p)) for p in params]
        # New tensors, and all of them before a parameter is written: see _update_hessian.
        momenta = torch._foreach_mul([s["exp_avg"] for s in states], group["betas"][0])
        torch._foreach_add_(momenta, grads, alpha=1 - group["betas"][0])
        scales = torch._foreach_mul([s["hessian"] for s in states], group["gamma"])
        torch._foreach_clamp_min_(scales, group["eps"])
        steps = list(torch._foreach_div(momenta, scales))
        torch._foreach_clamp_max_(steps, 1.0)
        torch._foreach_clamp_min_(steps, -1.0)
        lr = group["lr"]
        for state, momentum in zip(states, momenta, strict=True):
            state["exp_avg"] = momentum
        # A parameter with fewer bits is rounded once, after decay and step.
        weights: list[Tensor] = [p.to(m.dtype) for p, m in zip(params, momenta, strict=True)]
        scale_(weights, 1 - lr * group["weight_decay"])
        if isinstance(lr, Tensor):  # which nothing waits for
            scale_(steps, lr)
            torch._foreach_sub_(weights, steps)
        else:
            torch._foreach_add_(weights, steps, alpha=-lr)
        for p, weight in zip(params, weights, strict=True):
            if weight is not p:
                p.copy_(weight)

    # ---- state and reports ----

    def _accepted(self, parameter: nn.Parameter, saved: dict[str, Any]) -> dict[str, Any]:
        if self._check_together(parameter, saved, ("exp_avg", "hessian")):
            for key in ("exp_avg", "hessian"):
                self._check_shape(key, parameter, saved[key], parameter.shape)
                # Another dtype only where the weights have changed between fp64 and a narrower one.
                saved[key] = saved[key].to(_state_dtype(parameter))
        return saved

    def _after_loading(self) -> None:
        super()._after_loading()
        self._forget()
        self._failures = 0

    def __getstate__(self) -> dict[str, Any]:
        """What torch's optimizers keep, and the names; not statistics that wait for a step."""
        kept = super().__getstate__()
        return {
            **kept,
            "_names": self._names,
            "_failures": self._failures,
            "_rehearsed": self._rehearsed,
            "_sums": {},
            "_gradients_seen": [],
            "_terms": 0,
            "_observations": 0,
        }

    def diagnostics(self) -> dict[str, float]:
        """Return plain numbers for a logger; reading them waits for the device.

        ``unclipped`` is the share of coordinates whose last step was not clipped; the method's authors tune
        ``gamma`` until it is between 0.1 and 0.5.
        """
        first = self.param_groups[0]
        unclipped, total = 0.0, 0
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.get(p, {})
                if "hessian" in state:
                    scale = (group["gamma"] * state["hessian"]).clamp(min=group["eps"])
                    unclipped += float((state["exp_avg"].abs() < scale).sum())
                    total += p.numel()
        return {
            "step": float(first["step"]),
            "skipped_steps": float(first["skipped_steps"]),
            "skipped_steps_in_a_row": float(self._failures),
            "dropped_statistics": float(first["dropped_statistics"]),
            "unclipped": unclipped / max(total, 1),
        }


class SophiaG(SophiaOptimizer):
    """Sophia with the Gauss-Newton-Bartlett estimate, in the clip form of its paper.

    With the gradient ``g`` of the loss, and ``ĝ`` that of the mean cross entropy of B loss terms whose labels
    are drawn from the model::

        every refresh_every steps:  h <- β₂ h + (1 − β₂) B ĝ∘ĝ
        every step:                 m <- β₁ m + (1 − β₁) g
                                    θ <- (1 − lr·weight_decay) θ
                                    θ <- θ − lr · clip(m / max(gamma·h, eps), −1, 1)

    ``m`` and ``h`` start at zero and are not corrected for it. Until the first :meth:`observe` every
    coordinate is clipped and the method is descent by the sign of the momentum. The estimate is of the mean
    loss: a loss that is a sum wants ``gamma`` larger by the number of its terms.

    Its authors published two parametrisations of it, whose ``h`` leaves out B. For constant B they take the
    same steps as this class (but for ``eps``, 1e-15 and added there) with

    ============================  ===================  =============  ====================
    published                     lr                   gamma          weight_decay
    ============================  ===================  =============  ====================
    release of 2024,              ``lr``               ``rho``        ``weight_decay``
    ``step(bs=B)``
    snapshot of 2023              ``lr·gamma``         ``gamma/B``    ``weight_decay/gamma``
    ============================  ===================  =============  ====================

    The defaults are the release's. They differ from the snapshot's (there lr 1e-5, gamma 2e4, which is 0.2
    and 2e4/B here) and a little from the paper's text (β₁ 0.96).

    Args:
        model: The model, or parameters as for any torch optimizer.
        lr: Learning rate; no coordinate moves further in one step.
        betas: Decay of the momentum per step, and of the Hessian per refresh.
        gamma: Scale of the Hessian: larger clips less. See :meth:`diagnostics` for how it is tuned.
        eps: Smallest denominator.
        weight_decay: Decoupled, multiplied by the learning rate.
        refresh_every: Steps between estimates of the Hessian, the paper's k. The first group's counts.
        maximize: Go up and not down: the step is that of the negative of the loss. The estimate, of the
            model's outputs, has no sign.

    Raises:
        TypeError: A parameter that is not of a real floating-point dtype.
        ValueError: A hyperparameter is out of range, or the model has no trainable parameter.

    Statistics are those of this process: nothing is averaged between processes.
    Source: Liu et al. 2023, "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
    Pre-training", algorithms 2 and 3.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-4,
        *,
        betas: tuple[float, float] = (0.965, 0.99),
        gamma: float = 0.04,
        eps: float = 1e-12,
        weight_decay: float = 0.1,
        refresh_every: int = 10,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            model,
            lr,
            betas=betas,
            gamma=gamma,
            eps=eps,
            weight_decay=weight_decay,
            refresh_every=refresh_every,
            maximize=maximize,
        )

    def observe(self, outputs: Tensor, *, likelihood: str = "categorical") -> None:
        """Sample labels from the model and take their gradient, on the steps that need it.

        Call it between the forward pass and ``loss.backward()``. On other steps it does nothing, at no
        cost; it never touches ``.grad`` or the global random state. Several calls before one step are
        micro-batches of one large batch.

        Args:
            outputs: The model's outputs, one loss term per leading index: logits ``[..., C]``, or means for
                ``likelihood="gaussian"``. Leave out what the loss leaves out (padding).
            likelihood: ``"categorical"`` or ``"gaussian"`` (unit variance).

        Raises:
            RuntimeError: The graph is gone: the loss was already differentiated.
            ValueError: Unknown likelihood, or outputs without a graph or without classes.
        """
        if not self._is_wanted():
            return
        _check_attached("outputs", outputs)
        if outputs.dim() == 0:
            raise ValueError("observe: outputs must have shape [..., C], got a scalar")
        terms = outputs.shape[:-1].numel()
        if outputs.numel() == 0:
            return
        generator = torch.Generator(device=outputs.device)
        # As RING: a resumed run draws what the uninterrupted one would, and micro-batches differ.
        generator.manual_seed(self.param_groups[0]["step"] + self._observations * 0x9E3779B9)
        params = self._trained()
        with torch.enable_grad():
            # Between sum and mean: of many terms the sum can overflow in fp16, and the mean underflow.
            loss = sampled_loss(outputs, likelihood, generator) / terms**0.5
        grads = _differentiate([loss], params)
        self._observations += 1
        self._terms += terms
        for p, grad in zip(params, grads, strict=True):
            if grad is not None:
                self._add(p, grad.to(_state_dtype(p)) * terms**0.5)

    def _estimates(self) -> dict[nn.Parameter, Tensor]:
        # B ĝ² with ĝ = sum / B.
        return {p: (s / self._terms**0.5).square_() for p, s in self._sums.items()}


class SophiaH(SophiaOptimizer):
    """Sophia with Hutchinson's estimate, in the clip form of its paper.

    As :class:`SophiaG`, but ``h`` is an average of ``u∘(∇²L u)`` with ``u ~ N(0, I)``, which needs a double
    backward pass of the loss on the steps that refresh it, and may be negative: such coordinates take the
    sign of the momentum. An early public version corrects the momentum for its zero start; the paper's form,
    and this class, do not.

    Args:
        model: The model, or parameters as for any torch optimizer.
        lr: Learning rate; no coordinate moves further in one step.
        betas: Decay of the momentum per step, and of the Hessian per refresh.
        gamma: Scale of the Hessian: larger clips less. See :meth:`diagnostics` for how it is tuned.
        eps: Smallest denominator.
        weight_decay: Decoupled, multiplied by the learning rate.
        refresh_every: Steps between estimates of the Hessian, the paper's k. The first group's counts.
        maximize: Go up and not down: step and Hessian are those of the negative of the loss.

    Raises:
        TypeError: A parameter that is not of a real floating-point dtype.
        ValueError: A hyperparameter is out of range, or the model has no trainable parameter.

    Statistics are those of this process: nothing is averaged between processes.
    Source: Liu et al. 2023, "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
    Pre-training", algorithms 1 and 3.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-4,
        *,
        betas: tuple[float, float] = (0.965, 0.99),
        gamma: float = 0.01,
        eps: float = 1e-12,
        weight_decay: float = 0.1,
        refresh_every: int = 10,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            model,
            lr,
            betas=betas,
            gamma=gamma,
            eps=eps,
            weight_decay=weight_decay,
            refresh_every=refresh_every,
            maximize=maximize,
        )

    def observe(self, loss: Tensor) -> None:
        """Differentiate the loss twice in a random direction, on the steps that need it.

        Call it between the forward pass and ``loss.backward()``, with the tensor that ``backward`` is called
        on. On other steps it does nothing, at no cost; it never touches ``.grad`` or the global random
        state. Several calls before one step add up, as the gradients of several ``backward`` do. Autograd
        functions marked ``once_differentiable`` count as having no curvature: torch reports no error here.

        Args:
            loss: Scalar, with its graph.

        Raises:
            RuntimeError: The graph is gone (the loss was already differentiated), or part of the model has
                no second derivative.
            ValueError: The loss is no scalar, or has no graph.
        """
        if not self._is_wanted():
            return
        _check_attached("loss", loss)
        if loss.numel() != 1:
            raise ValueError(f"observe: loss must be a scalar, got shape {list(loss.shape)}")
        params = self._trained()
        directions = self._directions(params)
        with torch.enable_grad():
            grads = _differentiate([loss], params, create_graph=True)
            # A gradient without a graph is constant: its part of the Hessian is zero.
            curved = [
                (g, u)
                for g, u in zip(grads, directions, strict=True)
                if g is not None and g.requires_grad
            ]
            products: Sequence[Tensor | None] = [None] * len(params)
            if curved:
                products = _differentiate(
                    [g for g, _ in curved], params, grad_outputs=[u for _, u in curved]
                )
        self._observations += 1
        for p, grad, u, product in zip(params, grads, directions, products, strict=True):
            if grad is not None:
                dtype = _state_dtype(p)
                self._add(p, torch.zeros_like(u) if product is None else u.to(dtype) * product)

    def _directions(self, params: list[nn.Parameter]) -> list[Tensor]:
        """The same for all micro-batches of a step: their products add up to that of the whole batch."""
        generators: dict[torch.device, torch.Generator] = {}
        directions = []
        for p in params:
            if p.device not in generators:
                generators[p.device] = torch.Generator(device=p.device)
                generators[p.device].manual_seed(self.param_groups[0]["step"])
            directions.append(
                torch.randn(p.shape, generator=generators[p.device], device=p.device, dtype=p.dtype)
            )
        return directions

    def _estimates(self) -> dict[nn.Parameter, Tensor]:
        # Of what is maximised the Hessian has the other sign, as the gradient has.
        up = {p for g in self.param_groups if g["maximize"] for p in g["params"]}
        return {p: -s if p in up else s for p, s in self._sums.items()}


def _grad(parameter: nn.Parameter) -> Tensor:
    return cast(Tensor, parameter.grad)


def _state_dtype(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _check_attached(name: str, value: Tensor) -> None:
    if not value.requires_grad:
        raise ValueError(f"observe: {name} must be attached to the graph of the forward pass")


def _differentiate(
    outputs: list[Tensor],
    inputs: list[nn.Parameter],
    *,
    grad_outputs: list[Tensor] | None = None,
    create_graph: bool = False,
) -> Sequence[Tensor | None]:
    """Gradients of ``outputs`` by ``inputs``, None where there are none; the graph stays.

    Raises:
        RuntimeError: The graph is gone, or has no second derivative.
    """
    try:
        return torch.autograd.grad(
            outputs,
            inputs,
            grad_outputs=grad_outputs,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
    except RuntimeError as error:
        if "second time" in str(error):
            raise RuntimeError(
                "observe: call it before loss.backward(), which frees the graph it needs"
            ) from error
        if "not implemented" in str(error):
            raise RuntimeError(
                f"observe: part of the model has no second derivative ({error}). Replace it (attention: "
                "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)), or use SophiaG, which needs none"
            ) from error
        raise


def _all_finite(*lists: list[Tensor]) -> list[bool]:
    """For each list whether all of it is finite; one wait for the device, as long as all is well."""
    flags = []
    for tensors in lists:
        if tensors:
            norms = torch._foreach_norm(tensors)
            flags.append(torch.stack([torch.isfinite(n).to(norms[0].device) for n in norms]).all())
        else:
            flags.append(torch.ones((), dtype=torch.bool))
    device = next((f.device for f in flags if f.device.type != "cpu"), torch.device("cpu"))
    results = torch.stack([f.to(device) for f in flags]).tolist()
    # A norm can leave the range of its dtype where no element does.
    return [
        ok or all(bool(torch.isfinite(t).all()) for t in tensors)
        for ok, tensors in zip(results, lists, strict=True)
    ]

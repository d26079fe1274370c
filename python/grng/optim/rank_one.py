# SPDX-License-Identifier: Apache-2.0
"""Natural policy gradient with a Fisher matrix of rank one, or of a few sampled scores."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from grng.curvature.jacobian import DEFAULT_BUDGET_MB
from grng.curvature.low_rank import solve
from grng.optim.ascent import check_maximize
from grng.optim.checks import PreconditionerError, check_hyperparameter, check_rates
from grng.optim.devices import refuse_graph_capture
from grng.optim.finite import are_finite
from grng.optim.parameters import (
    check_dense,
    check_place,
    gradient_marks,
    take_back_unless_floating,
    trainable,
    wide,
)
from grng.optim.rank_one_checks import check_group, check_log_probs, shared_settings
from grng.optim.rank_one_reports import RankOneReports
from grng.optim.rank_one_step import (
    BUFFER,
    curvature_along,
    exact_norm,
    fast_norm,
    gradients,
    read,
    step_at_once,
    take_steps,
    what_is_wrong,
)
from grng.optim.scores import ObservedActions, directions_of, observed
from grng.optim.undo import undone_on_error


class RankOneNPG(RankOneReports):
    """Natural policy gradient with ``damping·I`` plus the outer products of a few scores as Fisher matrix.

    With the gradient g of the loss and the scores ``u_j``, gradients of the log-probabilities of m actions
    that the policy took::

        F̂ = damping·I + (1/m) Σ_j u_j u_jᵀ
        d = F̂⁻¹ g                             m = 1: (g − u (uᵀg)/(damping + ‖u‖²)) / damping
        η = √(2·max_kl / q),  q = mean_i (∇log p_i · d)² + damping·‖d‖²     "kl"; else η = 1
        b <- momentum·b + η d
        θ <- (1 − lr·weight_decay) θ − lr·b

    All parameters are one vector, and no matrix of its size is formed. q is the curvature of the KL
    divergence from the old to the new policy, in second order and damped, over all actions that were
    observed and not only those whose scores were drawn; η is the length at which that model says ``max_kl``.

    ::

        log_probs = policy(states).log_prob(actions)    # actions drawn from this policy
        optimizer.observe(log_probs)
        loss = -(log_probs * advantages).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    Do not expect much of one score. On the small policies of ``benchmarks/policy_direction.py``, at a
    damping of 0.1, its direction gains no more at equal divergence than the plain gradient; 32 of 256
    scores gain more on a new policy, 128 on one that has decided, and all 256 come near the exact natural
    gradient. The length serves any of them. It is that of a quadratic model, and nobody looks at what
    came of it: with a small damping a divergence can be well beyond the one predicted.

    Where g is the gradient of one action's ``A·log p`` and u that action's score, ``d = A u/(damping +
    ‖u‖²)`` has the direction of the plain gradient: give it batches.

    Momentum is that of ``torch.optim.SGD``: equal steps grow to ``1/(1 − momentum)`` of one, and it is one
    step of which ``max_kl`` holds. A parameter without a gradient does not move, is not decayed, and does not
    count in any product; one that the log-probabilities do not depend on (a critic) has a score of zero, and
    ``g/damping`` for its direction: give it an optimizer of its own.

    State per parameter: ``momentum_buffer``, in fp32 (fp64 for fp64 parameters), only with momentum. The
    first group counts ``step``, ``skipped`` and ``skipped_in_a_row``. Parameters of fewer bits are computed
    with in fp32 and rounded once; no copy in fp32 is kept. A step waits for the device once, and cannot be
    captured into a CUDA graph. Scores are those of this process: nothing is averaged between processes.

    Args:
        params: The policy, or parameters as for any torch optimizer.
        lr: Factor of the step. With ``"kl"``, 1 is the step whose predicted divergence is ``max_kl``.
        damping: λ, > 0.
        scores: m, how many different log-probabilities are drawn, at most all of them. Memory and time of
            m vectors of the size of the parameters, from :meth:`observe` to :meth:`step`.
        score: ``"sample"``: as above. ``"mean"``: u is the gradient of the mean of all log-probabilities.
            Its expectation is zero, so that with many samples this is near the plain gradient.
        step_length: ``"kl"``: see η. ``"fixed"``: ``θ − lr·d``, as in the paper, and no second derivative.
        max_kl: See η.
        momentum: In [0, 1).
        weight_decay: Decoupled, multiplied by the learning rate.
        maximize: Go up and not down: g is that of an objective.
        seed: Of the draws of scores. The number of the step goes into them too, so that a resumed run draws
            what the uninterrupted one would.
        max_failures: Steps in a row that cannot be used before :class:`PreconditionerError`; a step with NaN
            or infinity is skipped and counted, and changes nothing else.

    Raises:
        TypeError: A parameter that is not of a real floating-point dtype.
        ValueError: A hyperparameter is out of range, or the model has no trainable parameter.

    Source: Huo et al. 2026, arXiv 2601.18626, for the direction of rank one, by the formula of Sherman &
    Morrison 1950 (several scores: Woodbury); Schulman et al. 2015, "Trust Region Policy Optimization", for
    the length, there without a damping that is part of the step's length and with a line search.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1.0,
        *,
        damping: float = 0.1,
        scores: int = 1,
        score: str = "sample",
        step_length: str = "kl",
        max_kl: float = 0.01,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
        seed: int = 0,
        max_failures: int = 10,
    ) -> None:
        owner = type(self).__name__
        check_maximize(owner, maximize)
        check_hyperparameter(owner, "lr", lr)
        check_hyperparameter(owner, "max_failures", max_failures)
        check_hyperparameter(owner, "seed", seed)
        params, self._names = trainable(owner, params)
        defaults = dict(
            lr=lr,
            damping=damping,
            scores=scores,
            score=score,
            step_length=step_length,
            max_kl=max_kl,
            momentum=momentum,
            weight_decay=weight_decay,
            maximize=maximize,
            seed=seed,
            step=0,
            skipped=0,
            skipped_in_a_row=0,
        )
        check_group(owner, defaults)
        self._max_failures = max_failures
        self._pending: ObservedActions | None = None
        self._stopped = False  # whether a step with it has begun and not ended
        self._gradients_seen: list[tuple[int, int]] = []  # when it came
        self._engine = None
        self._last: dict[str, float] = {}  # numbers of the last step
        self._norms: dict[nn.Parameter, Tensor] = {}  # of the scores that were last observed
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as for any torch optimizer.

        Raises:
            TypeError: A parameter of a dtype that is not real floating-point.
        """
        super().add_param_group(param_group)
        take_back_unless_floating(self)

    # ---- observation ----

    def observe(self, log_probs: Tensor) -> None:
        """Differentiate log-probabilities and keep what the next :meth:`step` needs.

        Call it between the forward pass and ``loss.backward()``, whose graph it leaves usable; it never
        touches ``.grad`` or the global random state.

        Args:
            log_probs: Log-probabilities or log-densities of actions that were drawn from the policy itself,
                one for each action, of any shape, with their graph. An action of several numbers has their
                sum.

        Raises:
            RuntimeError: Called twice without a step between; or the graph is gone.
            TypeError: No tensor, or not of a real floating-point dtype.
            ValueError: Empty, or without a graph; or the groups disagree on what there is once.
        """
        owner = type(self).__name__
        self._begin_observation()
        check_log_probs(owner, log_probs)
        shared = shared_settings(owner, self.param_groups)
        parameters = [p for g in self.param_groups for p in g["params"] if p.requires_grad]
        engine = self._jacobian_by(parameters, budget_mb=DEFAULT_BUDGET_MB, jacobian="dense")
        self._pending = None  # before new memory is asked for
        flat = log_probs.reshape(-1)
        directions = directions_of(
            flat,
            score=shared["score"],
            scores=shared["scores"],
            seed=shared["seed"],
            step=self.param_groups[0]["step"],
        )
        is_kl = shared["step_length"] == "kl"
        self._pending = observed(flat, engine, directions, with_tangent=is_kl)
        self._norms = dict(zip(parameters, self._pending.norms, strict=True))
        self._stopped, self._gradients_seen = False, gradient_marks(self.param_groups)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients; drop an observation whose gradients came, and which no step used.

        As where a gradient scaler skips a step.
        """
        if self._pending is not None and self._gradients_seen != gradient_marks(self.param_groups):
            self._pending = None
        super().zero_grad(set_to_none)
        self._gradients_seen = gradient_marks(self.param_groups)

    # ---- step ----

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Move the parameters along the natural gradient of what ``loss.backward()`` left in ``.grad``.

        Args:
            closure: Runs the policy, calls :meth:`observe` and ``loss.backward()``; what it returns is
                returned.

        Raises:
            RuntimeError: There was no :meth:`observe` since the last step; a sparse gradient; an operation
                without second derivative, with ``step_length="kl"``; or the model was moved or cast after
                the optimizer got its state.
            PreconditionerError: More than ``max_failures`` steps in a row could not be used.
            ValueError: The groups disagree on what there is once; or a setting that was changed is out of
                range.
        """
        owner = type(self).__name__
        refuse_graph_capture(owner)
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        seen: ObservedActions | None = self._waiting(
            closure, "observe(log_probs) before loss.backward()"
        )
        if seen is None:
            return None
        shared = shared_settings(owner, self.param_groups)
        check_rates(owner, self.param_groups)
        # Until the end: a step that runs out of memory can be made again, or with another observation.
        self._stopped = True
        moved = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        problem = None
        if moved:
            self._check_places(moved)
            with undone_on_error(self.state, but=PreconditionerError):
                problem = self._update(seen, moved, shared)
        self._pending = None
        if problem is not None:
            self._fail(problem)
            return result
        self.param_groups[0]["skipped_in_a_row"] = 0
        for group in self.param_groups:
            group["step"] += 1
        return result

    def _update(
        self, seen: ObservedActions, moved: list[nn.Parameter], shared: dict[str, Any]
    ) -> str | None:
        """Make the step, or nothing; return why nothing.

        Raises:
            ValueError: A learning rate in a tensor is not finite.
        """
        if seen.tangent is None and self._step_at_once(seen, moved, float(shared["damping"])):
            return None
        grads = gradients(self.param_groups, moved)
        scores = seen.scores_of(moved, grads)
        damping = float(shared["damping"])
        directions, info = solve(grads, scores, damping)
        numbers = {"total": seen.total, "info": info, "squared_norm": seen.squared_norm}
        if seen.tangent is None:
            numbers["length"] = fast_norm(directions)
        else:
            numbers["length"] = length = exact_norm(directions)
            numbers["curvature"] = curvature_along(
                type(self).__name__, seen.tangent, moved, directions, length
            )
        rates = [g["lr"] for g in self.param_groups]
        lrs = {f"lr{i}": lr for i, lr in enumerate(rates) if isinstance(lr, Tensor)}
        # The one wait.
        values = read({**numbers, **lrs})
        if not math.isfinite(values["length"]) and bool(are_finite(directions, exact=True).all()):
            values["length"] = float(exact_norm(directions))
        needed = ("total", "length", *(("curvature",) if seen.tangent else ()))
        if values["info"] != 0 or not all(math.isfinite(values[k]) for k in needed):
            return what_is_wrong(values["total"], moved, grads, scores, self._name_of)
        for i, lr in enumerate(rates):
            rates[i] = values.get(f"lr{i}", lr)
            if not math.isfinite(rates[i]):
                raise ValueError(
                    f"{type(self).__name__}: lr of param_groups[{i}] must be a finite number or a 0-d "
                    f"tensor, got {lr!r}"
                )
        factor, divergence = 1.0, None
        if seen.tangent is not None:
            # Of a direction of length one, which no gradient is too large or too small for.
            curvature = values["curvature"] + damping
            factor, divergence = 0.0, 0.0
            if values["length"] > 0:
                factor = math.sqrt(2 * shared["max_kl"] / curvature) / values["length"]
                divergence = shared["max_kl"] * values["curvature"] / curvature
        steps = dict(zip(moved, directions, strict=True))
        take_steps(self.state, self.param_groups, steps, rates, factor)
        self._last = {
            "step_factor": factor,
            "direction_norm": values["length"],
            "score_squared_norm": values["squared_norm"],
        }
        if divergence is not None:
            self._last["predicted_kl"] = divergence
        return None

    def _step_at_once(
        self, seen: ObservedActions, moved: list[nn.Parameter], damping: float
    ) -> bool:
        """Make a step in one call, which forms no direction; or nothing, and return False."""
        length = step_at_once(self.param_groups, seen, moved, damping)
        if length is None:
            return False
        if self.state:
            for p in moved:
                self.state.get(p, {}).pop(BUFFER, None)
        self._last = {
            "step_factor": 1.0,
            "direction_norm": length,
            "score_squared_norm": float(seen.squared_norm),
        }
        return True

    def _fail(self, what: str) -> None:
        first = self.param_groups[0]
        first["skipped"] += 1
        first["skipped_in_a_row"] += 1
        if first["skipped_in_a_row"] > self._max_failures:
            raise PreconditionerError(
                f"{type(self).__name__}: {first['skipped_in_a_row']} steps in a row could not be used, the "
                f"last for {what}; the parameters are unchanged since"
            )

    def _check_places(self, params: list[nn.Parameter]) -> None:
        owner = type(self).__name__
        for p in params:
            check_dense(owner, self._name_of, p)
            known = self.state.get(p, {}).get(BUFFER)
            check_place(owner, self._name_of, p, known, wide(p))

    # ---- state and reports ----

    def _rehearse(self) -> None:
        """Give the state the form that it will have; see :mod:`grng.optim.rehearsal`."""
        for group in self.param_groups:
            if group["momentum"] != 0:
                for p in (p for p in group["params"] if p.grad is not None):
                    self.state[p][BUFFER] = torch.zeros_like(p, dtype=wide(p))

    def _accepted(self, parameter: nn.Parameter, saved: dict[str, Any]) -> dict[str, Any]:
        # What another optimizer kept is of no use here; SGD has None before its first step.
        average = saved.get(BUFFER)
        if average is None:
            return {}
        self._check_shape(BUFFER, parameter, average, parameter.shape)
        # Another dtype only where the weights have changed between fp64 and a narrower one.
        return {BUFFER: average.to(wide(parameter))}

    def _after_loading(self) -> None:
        super()._after_loading()
        # A flat distributed state dict has an empty one for each parameter.
        for p in [p for p, state in self.state.items() if not state]:
            del self.state[p]
        self._last = {}

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the observation that waits: a copy is whole, for the copied parameters."""
        return {**super().__getstate__(), "_gradients_seen": []}

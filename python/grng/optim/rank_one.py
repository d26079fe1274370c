# SPDX-License-Identifier: Apache-2.0
"""Natural policy gradient with a Fisher matrix of rank one, or of a few sampled scores."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import grng_kernels as kernels
from grng.curvature.jacobian import DEFAULT_BUDGET_MB, Jacobian
from grng.curvature.low_rank import solve
from grng.curvature.tangent import Tangent
from grng.optim.ascent import check_maximize
from grng.optim.checks import PreconditionerError, check_hyperparameter, check_rates
from grng.optim.devices import refuse_graph_capture, scale_, stacked
from grng.optim.finite import are_finite
from grng.optim.rehearsal import Rehearsing
from grng.optim.undo import undone_on_error
from grng.reports.diagonal import explain, read
from grng.reports.memory import MemoryEstimate, estimate, planned
from grng.reports.text import Report, bytes_text

SCORES = ("sample", "mean")
STEP_LENGTHS = ("kl", "fixed")
# There is one Fisher matrix, and one length: these cannot differ between the groups.
_SHARED = ("damping", "scores", "score", "step_length", "max_kl", "seed")
_BUFFER = "momentum_buffer"


@dataclass(frozen=True)
class _Observation:
    """What a step needs of the log-probabilities.

    Attributes:
        parameters: What they were differentiated by.
        scores: ``[m, numel]`` of each.
        squared_norm: Mean of ``‖u_j‖²``, 0-d.
        total: Sum of the log-probabilities, 0-d; NaN or infinity is in it.
        tangent: Their change along a direction; None for steps of fixed length.
    """

    parameters: list[nn.Parameter]
    scores: list[Tensor]
    squared_norm: Tensor
    total: Tensor
    tangent: Tangent | None


class RankOneNPG(Rehearsing):
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
        self._names: dict[nn.Parameter, str] = {}
        if isinstance(params, nn.Module):
            self._names = {p: n for n, p in params.named_parameters()}
            params = [p for p in params.parameters() if p.requires_grad]
            if not params:
                raise ValueError(f"{owner}: the model has no trainable parameters")
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
        _check_group(owner, defaults)
        self._max_failures = max_failures
        self._pending: _Observation | None = None
        self._stopped = False  # whether a step with it has begun and not ended
        self._gradients_seen: list[tuple[int, int]] = []  # when it came
        self._engine: Jacobian | None = None
        self._last: dict[str, float] = {}  # numbers of the last step
        self._norms: dict[nn.Parameter, Tensor] = {}  # of the scores that were last observed
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
        self._drop_rehearsal()
        if self._pending is not None and not self._stopped:
            raise RuntimeError(f"{owner}: observe() was called twice; call step() between")
        _check_log_probs(owner, log_probs)
        shared = self._shared_settings()
        parameters = [p for g in self.param_groups for p in g["params"] if p.requires_grad]
        if self._engine is None or not _same(self._engine.parameters, parameters):
            self._engine = Jacobian(parameters, budget_mb=DEFAULT_BUDGET_MB, jacobian="dense")
        self._pending = None  # before new memory is asked for
        flat = log_probs.reshape(-1)
        is_kl = shared["step_length"] == "kl"
        # First: where the graph is gone, this is what says so.
        tangent = Tangent(flat, parameters) if is_kl else None
        rows = self._engine.rows(flat[:, None], self._directions(flat, shared))
        scores = [row for row in rows if isinstance(row, Tensor)]  # "dense" has no others
        norms = torch._foreach_norm(scores)
        self._norms = dict(zip(parameters, norms, strict=True))
        squared = stacked(norms).double().square().sum() / len(scores[0])
        total = flat.detach().double().sum()
        self._pending = _Observation(parameters, scores, squared, total, tangent)
        self._stopped, self._gradients_seen = False, self._gradient_marks()

    def _directions(self, log_probs: Tensor, shared: dict[str, Any]) -> Tensor:
        """Return of which sums of log-probabilities the scores are the gradients, ``[m, N, 1]``."""
        size = len(log_probs)
        if shared["score"] == "mean":
            return torch.full_like(log_probs.detach(), 1 / size).view(1, size, 1)
        count = min(shared["scores"], size)
        chosen = torch.arange(size)
        if count < size:
            generator = torch.Generator()
            # Neighbouring seeds and steps draw differently.
            mixed = shared["seed"] * 0x9E3779B97F4A7C15 + self.param_groups[0]["step"]
            generator.manual_seed(mixed % 2**63)
            chosen = torch.randperm(size, generator=generator)[:count]
        directions = torch.zeros(count, size, dtype=log_probs.dtype)
        directions[torch.arange(count), chosen] = 1
        return directions.to(log_probs.device).unsqueeze(-1)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients; drop an observation whose gradients came, and which no step used.

        As where a gradient scaler skips a step.
        """
        if self._pending is not None and self._gradients_seen != self._gradient_marks():
            self._pending = None
        super().zero_grad(set_to_none)
        self._gradients_seen = self._gradient_marks()

    def _gradient_marks(self) -> list[tuple[int, int]]:
        """What tells whether a backward pass has run: which tensors gradients are, and how often written."""
        grads = [p.grad for g in self.param_groups for p in g["params"]]
        return [(id(g), 0 if g is None else g._version) for g in grads]

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
        if self._pending is None:
            if closure is None and self._rehearse_if_asked():
                return None
            raise RuntimeError(
                f"{owner}: step() needs an observation; call observe(log_probs) before loss.backward()"
            )
        shared = self._shared_settings()
        check_rates(owner, self.param_groups)
        # Until the end: a step that runs out of memory can be made again, or with another observation.
        self._stopped = True
        moved = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        problem = None
        if moved:
            self._check_places(moved)
            with undone_on_error(self.state, but=PreconditionerError):
                problem = self._update(self._pending, moved, shared)
        self._pending = None
        if problem is not None:
            self._fail(problem)
            return result
        self.param_groups[0]["skipped_in_a_row"] = 0
        for group in self.param_groups:
            group["step"] += 1
        return result

    def _update(
        self, seen: _Observation, moved: list[nn.Parameter], shared: dict[str, Any]
    ) -> str | None:
        """Make the step, or nothing; return why nothing.

        Raises:
            ValueError: A learning rate in a tensor is not finite.
        """
        if seen.tangent is None and self._step_at_once(seen, moved, float(shared["damping"])):
            return None
        signs = {p: g["maximize"] for g in self.param_groups for p in g["params"]}
        grads = [_gradient(p, signs[p]) for p in moved]
        known = dict(zip(seen.parameters, seen.scores, strict=True))
        count = len(seen.scores[0])
        scores = [_score(p, g, known, count) for p, g in zip(moved, grads, strict=True)]
        damping = float(shared["damping"])
        directions, info = solve(grads, scores, damping)
        numbers = {"total": seen.total, "info": info, "squared_norm": seen.squared_norm}
        if seen.tangent is None:
            numbers["length"] = _fast_norm(directions)
        else:
            numbers["length"] = length = _exact_norm(directions)
            numbers["curvature"] = self._curvature(seen.tangent, moved, directions, length)
        rates = [g["lr"] for g in self.param_groups]
        lrs = {f"lr{i}": lr for i, lr in enumerate(rates) if isinstance(lr, Tensor)}
        # The one wait.
        values = _read({**numbers, **lrs})
        if not math.isfinite(values["length"]) and bool(are_finite(directions, exact=True).all()):
            values["length"] = float(_exact_norm(directions))
        needed = ("total", "length", *(("curvature",) if seen.tangent else ()))
        if values["info"] != 0 or not all(math.isfinite(values[k]) for k in needed):
            return self._what_is_wrong(values["total"], moved, grads, scores)
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
        self._write(dict(zip(moved, directions, strict=True)), rates, factor)
        self._last = {
            "step_factor": factor,
            "direction_norm": values["length"],
            "score_squared_norm": values["squared_norm"],
        }
        if divergence is not None:
            self._last["predicted_kl"] = divergence
        return None

    def _step_at_once(self, seen: _Observation, moved: list[nn.Parameter], damping: float) -> bool:
        """Make a step of fixed length in one call, which forms no direction; or nothing, and return False.

        For one score, without momentum, where the C++ kernel takes the tensors. What is not finite is left to
        the other way, which names it; as is what only leaves the range that the kernel keeps.
        """
        numbers = _rates_and_decays(self.param_groups)
        grads = _plain_gradients(moved)
        if numbers is None or grads is None or len(seen.scores[0]) != 1:
            return False
        lrs, decays = numbers
        scores = seen.scores
        if not _same(moved, seen.parameters):
            known = dict(zip(seen.parameters, scores, strict=True))
            scores = [_score(p, p, known, 1) for p in moved]
        # On a CPU: nothing to wait for.
        total, squared_norm = float(seen.total), float(seen.squared_norm)
        if not math.isfinite(total):
            return False
        rows = [u.view_as(p) for u, p in zip(scores, moved, strict=True)]
        weights: list[Tensor] = moved  # type: ignore[assignment]
        try:
            norm = kernels.rank1_step_(weights, grads, rows, damping=damping, lr=lrs, decay=decays)
        except ValueError:
            # Nothing was written: a number beyond fp32, which the other way takes, or refuses by its name; or
            # weights that share memory, which it writes one after another.
            return False
        length = float(norm)
        if not math.isfinite(length):
            return False
        if self.state:
            for p in moved:
                self.state.get(p, {}).pop(_BUFFER, None)
        self._last = {
            "step_factor": 1.0,
            "direction_norm": length,
            "score_squared_norm": squared_norm,
        }
        return True

    def _curvature(
        self,
        tangent: Tangent,
        moved: list[nn.Parameter],
        directions: list[Tensor],
        length: Tensor,
    ) -> Tensor:
        """The Fisher matrix of all observed actions along the directions made one of length 1, 0-d.

        Raises:
            OutOfMemoryError: As torch says it.
            RuntimeError: An operation has no second derivative.
        """
        safe = torch.where(length > 0, length, 1.0)
        unit = [(d / safe.to(d.device)).to(p.dtype) for p, d in zip(moved, directions, strict=True)]
        try:
            change = tangent.product(moved, unit)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f'{type(self).__name__}: step_length="kl" needs second derivatives, which an operation of '
                f'this policy does not have; use step_length="fixed". It says: {error}'
            ) from error
        return change.double().square().mean()

    def _write(
        self, directions: dict[nn.Parameter, Tensor], rates: list[float], factor: float
    ) -> None:
        """Step, in two passes: what can run out of memory comes before the first parameter is written."""
        plans: list[tuple[list[nn.Parameter], list[Tensor], float, float]] = []
        rounded: list[tuple[nn.Parameter, Tensor]] = []
        for group, lr in zip(self.param_groups, rates, strict=True):
            params = [p for p in group["params"] if p in directions]
            if not params:
                continue
            steps, alpha = self._with_momentum(group, params, directions, factor)
            decay = 1 - lr * group["weight_decay"]
            wide = [i for i, p in enumerate(params) if p.dtype != steps[i].dtype]
            for i in wide:
                weight = params[i].to(steps[i].dtype).mul_(decay)
                rounded.append((params[i], weight.add_(steps[i], alpha=-lr * alpha)))
            rest = [i for i in range(len(params)) if i not in set(wide)]
            plans.append(([params[i] for i in rest], [steps[i] for i in rest], decay, -lr * alpha))
        for params, steps, decay, alpha in plans:
            if params:
                weights: list[Tensor] = list(params)
                if decay != 1:
                    scale_(weights, decay)
                torch._foreach_add_(weights, steps, alpha=alpha)
        for p, weight in rounded:
            p.copy_(weight)

    def _with_momentum(
        self,
        group: dict[str, Any],
        params: list[nn.Parameter],
        directions: dict[nn.Parameter, Tensor],
        factor: float,
    ) -> tuple[list[Tensor], float]:
        """Return what the learning rate goes to, as tensors and a number that they are multiplied with."""
        steps = [directions[p] for p in params]
        if group["momentum"] == 0:
            for p in params:
                self.state.get(p, {}).pop(_BUFFER, None)
            return steps, factor
        averages = []
        for p, step in zip(params, steps, strict=True):
            state = self.state[p]
            # A new tensor: a step that runs out of memory puts the old one back.
            average = step * factor
            if _BUFFER in state:
                average.add_(state[_BUFFER], alpha=group["momentum"])
            state[_BUFFER] = average
            averages.append(average)
        return averages, 1.0

    def _what_is_wrong(
        self,
        total: float,
        moved: list[nn.Parameter],
        grads: list[Tensor],
        scores: list[Tensor],
    ) -> str:
        if not math.isfinite(total):
            return "a NaN or infinity in log_probs"
        for what, tensors in (("score", scores), ("gradient", grads)):
            good = are_finite(tensors, exact=True).tolist()
            if not all(good):
                return (
                    f"a NaN or infinity in the {what} of {self._name_of(moved[good.index(False)])}"
                )
        return "a direction or a curvature beyond the range of its dtype"

    def _fail(self, what: str) -> None:
        first = self.param_groups[0]
        first["skipped"] += 1
        first["skipped_in_a_row"] += 1
        if first["skipped_in_a_row"] > self._max_failures:
            raise PreconditionerError(
                f"{type(self).__name__}: {first['skipped_in_a_row']} steps in a row could not be used, the "
                f"last for {what}; the parameters are unchanged since"
            )

    def _shared_settings(self) -> dict[str, Any]:
        """Return what all groups have in common.

        Raises:
            ValueError: They do not; or a setting is out of range.
        """
        owner, first = type(self).__name__, self.param_groups[0]
        for group in self.param_groups:
            for name in _SHARED:
                if group[name] != first[name]:
                    raise ValueError(
                        f"{owner}: {name} must be the same in all parameter groups (they are one vector), "
                        f"got {first[name]!r} and {group[name]!r}"
                    )
            _check_group(owner, group)
        return {name: first[name] for name in _SHARED}

    def _check_places(self, params: list[nn.Parameter]) -> None:
        owner = type(self).__name__
        for p in params:
            grad = p.grad
            if grad is not None and grad.layout is not torch.strided:
                raise RuntimeError(
                    f"{owner}: gradients must be dense, that of {self._name_of(p)} has layout {grad.layout}"
                )
            known = self.state.get(p, {}).get(_BUFFER)
            if known is not None and (known.dtype != _wide(p) or known.device != p.device):
                raise RuntimeError(
                    f"{owner}: {self._name_of(p)} ({p.dtype}, {p.device}) was moved or cast after the "
                    f"optimizer got its state ({known.dtype}, {known.device}); make the optimizer after "
                    "that, or load its state_dict into a new one"
                )

    # ---- state and reports ----

    def _rehearse(self) -> None:
        """Give the state the form that it will have; see :mod:`grng.optim.rehearsal`."""
        for group in self.param_groups:
            if group["momentum"] != 0:
                for p in (p for p in group["params"] if p.grad is not None):
                    self.state[p][_BUFFER] = torch.zeros_like(p, dtype=_wide(p))

    def _accepted(self, parameter: nn.Parameter, saved: dict[str, Any]) -> dict[str, Any]:
        # What another optimizer kept is of no use here; SGD has None before its first step.
        average = saved.get(_BUFFER)
        if average is None:
            return {}
        self._check_shape(_BUFFER, parameter, average, parameter.shape)
        # Another dtype only where the weights have changed between fp64 and a narrower one.
        return {_BUFFER: average.to(_wide(parameter))}

    def _after_loading(self) -> None:
        super()._after_loading()
        # A flat distributed state dict has an empty one for each parameter.
        for p in [p for p, state in self.state.items() if not state]:
            del self.state[p]
        self._pending = None
        self._last = {}

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the observation that waits: a copy is whole, for the copied parameters."""
        # A scheduler puts a step on the instance that is bound to it: the copy's would step the original.
        kept = {name: value for name, value in self.__dict__.items() if name != "step"}
        return {**kept, "_pending": None, "_engine": None, "_gradients_seen": []}

    def explain(self) -> Report:
        """Return a table to print: the norm of the last scores by each parameter, and how steps are made.

        ``state`` is what a parameter holds in bytes, ``score`` the norm of all its scores together. A
        parameter whose score is 0 takes steps along its gradient. Waits for the device.
        """
        first, states = self.param_groups[0], self._states()
        if first["score"] == "mean":
            kind = "the mean of all log-probabilities"
        else:
            kind = f"{first['scores']} drawn by seed {first['seed']}"
        numbers = {p: {"score": self._norms[p]} if p in self._norms else {} for p in states}
        length = "fixed"
        if first["step_length"] == "kl":
            length = f"KL divergence {first['max_kl']:g}"
        report = self._last.items()
        last = ", ".join(f"{k} {v:.3g}" for k, v in report) if report else "none yet"
        return explain(
            {p: self._name_of(p) for p in states},
            states,
            ("score",),
            numbers,
            {"score": "none yet"},
            [
                f"Scores: {kind}, {bytes_text(self._score_bytes())} from observe() to step()",
                f"Damping: {first['damping']:g}",
                f"Step length: {length}",
                f"Last step: {last}",
                f"State: {self.memory_estimate()}",
            ],
        )

    def diagnostics(self) -> dict[str, float]:
        """Return plain numbers for a logger, after one wait for the device.

        ==============================  ======================================================================
        ``step``                        steps taken
        ``skipped``                     for NaN or infinity; ``skipped_in_a_row``
        ``state_bytes``                 held from step to step
        ``step_factor``                 η of the last step
        ``predicted_kl``                of the last step at a learning rate of 1, without momentum; below
                                        ``max_kl`` by what damping takes; only with ``"kl"``
        ``direction_norm``              ‖d‖
        ``score_squared_norm``          mean of ``‖u_j‖²``, to compare damping with
        ==============================  ======================================================================

        The last four from the first step on. Behind the name of a parameter and ``/`` its ``score``, as in
        :meth:`explain`.
        """
        first = self.param_groups[0]
        report = {
            "step": float(first["step"]),
            "skipped": float(first["skipped"]),
            "skipped_in_a_row": float(first["skipped_in_a_row"]),
            "state_bytes": float(self.memory_estimate().total),
            **self._last,
        }
        for p, found in read({p: {"score": norm} for p, norm in self._norms.items()}).items():
            report.update({f"{self._name_of(p)}/{key}": value for key, value in found.items()})
        return report

    def memory_estimate(self) -> MemoryEstimate:
        """Return the bytes that the state holds once all parameters were trained; see the class.

        ``refresh`` is what the scores take from :meth:`observe` to :meth:`step`, on every step. With
        ``step_length="kl"`` the graph of a second backward pass comes to it, which depends on the batch.
        """
        states = self._states()
        return estimate(list(states), states, refresh=self._score_bytes())

    def _score_bytes(self) -> int:
        count = self.param_groups[0]["scores"]
        known = [p for g in self.param_groups for p in g["params"] if _has_shape(p)]
        return sum(count * p.numel() * _wide(p).itemsize for p in known)

    def _states(self) -> dict[nn.Parameter, dict[str, Any]]:
        """What the state holds, or will hold: tensors without memory."""
        return {
            p: dict(planned(p, *([_BUFFER] if g["momentum"] != 0 else []), dtype=_wide(p)))
            for g in self.param_groups
            for p in g["params"]
        }


def _check_group(owner: str, group: dict[str, Any]) -> None:
    check_hyperparameter(owner, "damping", group["damping"], low=1e-30)
    check_hyperparameter(owner, "scores", group["scores"], low=1)
    check_hyperparameter(owner, "max_kl", group["max_kl"], low=1e-12)
    check_hyperparameter(owner, "momentum", group["momentum"], high=1 - 1e-9)
    check_hyperparameter(owner, "weight_decay", group["weight_decay"])
    for name, choices in (("score", SCORES), ("step_length", STEP_LENGTHS)):
        if group[name] not in choices:
            raise ValueError(
                f"{owner}: {name} must be one of {', '.join(choices)}, got {group[name]!r}"
            )
    if group["score"] == "mean" and group["scores"] != 1:
        raise ValueError(
            f'{owner}: scores must be 1 with score="mean", which is one score, got {group["scores"]}'
        )


def _check_log_probs(owner: str, log_probs: Any) -> None:
    where = f"{owner}.observe"
    if not isinstance(log_probs, Tensor):
        raise TypeError(f"{where}: log_probs must be a tensor, got {type(log_probs).__name__}")
    if not log_probs.is_floating_point():
        raise TypeError(
            f"{where}: log_probs must be of a real floating-point dtype, got {log_probs.dtype}"
        )
    if log_probs.numel() == 0:
        raise ValueError(
            f"{where}: log_probs must have at least one element, got shape {list(log_probs.shape)}"
        )
    if not log_probs.requires_grad:
        raise ValueError(
            f"{where}: log_probs must be attached to the graph of the forward pass; they have none "
            "(no_grad, inference_mode or detach)"
        )


def _gradient(parameter: nn.Parameter, maximize: bool) -> Tensor:
    assert parameter.grad is not None
    grad = parameter.grad.to(_wide(parameter))
    return -grad if maximize else grad


def _score(
    parameter: nn.Parameter, grad: Tensor, known: dict[nn.Parameter, Tensor], count: int
) -> Tensor:
    """The scores of a parameter; zeros where it was not trained when they were taken."""
    if parameter in known:
        return known[parameter]
    return torch.zeros(count, parameter.numel(), dtype=grad.dtype, device=grad.device)


def _rates_and_decays(groups: list[dict[str, Any]]) -> tuple[list[float], list[float]] | None:
    """Rate and decay for each gradient, of a step of all groups in one call; None: that cannot be."""
    lrs: list[float] = []
    decays: list[float] = []
    for group in groups:
        given, maximize = group["lr"], group["maximize"]
        if group["momentum"] != 0 or maximize != groups[0]["maximize"]:
            return None
        if isinstance(given, Tensor) and not given.is_cpu:
            return None
        lr, count = float(given), sum(p.grad is not None for p in group["params"])
        # The direction changes its sign with the gradient.
        lrs += [-lr if maximize else lr] * count
        decays += [1 - lr * group["weight_decay"]] * count
    return lrs, decays


def _plain_gradients(parameters: list[nn.Parameter]) -> list[Tensor] | None:
    """The gradients, where the C++ kernel of a whole step takes all of them and the parameters."""
    dtype, found = parameters[0].dtype, []
    if dtype is not torch.float32 and dtype is not torch.float64:
        return None
    for p in parameters:
        g = p.grad
        if type(p) is not nn.Parameter or type(g) is not Tensor:
            return None
        if p.dtype is not dtype or g.dtype is not dtype or not (p.is_cpu and g.is_cpu):
            return None
        if not (p.is_contiguous() and g.is_contiguous()):
            return None
        found.append(g)
    return found


def _fast_norm(tensors: Sequence[Tensor]) -> Tensor:
    # In the dtype of the tensors, which a norm can leave where no element does.
    return stacked(torch._foreach_norm(list(tensors))).double().square().sum().sqrt()


def _exact_norm(tensors: Sequence[Tensor]) -> Tensor:
    norms = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]
    return torch.linalg.vector_norm(stacked(norms))


def _read(numbers: dict[str, Tensor]) -> dict[str, float]:
    """Return numbers of tensors 0-d, after one wait for the first one's device."""
    values: list[float] = stacked([t.detach().double() for t in numbers.values()]).tolist()
    return dict(zip(numbers, values, strict=True))


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _has_shape(parameter: nn.Parameter) -> bool:
    return not isinstance(parameter, nn.parameter.UninitializedParameter)


def _same(a: list[nn.Parameter], b: list[nn.Parameter]) -> bool:
    return len(a) == len(b) and all(p is q for p, q in zip(a, b, strict=True))

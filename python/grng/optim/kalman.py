# SPDX-License-Identifier: Apache-2.0
"""What the Kalman optimizers share: one filter over all parameters, fed by observations."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from grng.curvature import rows as of_rows
from grng.curvature.full_covariance import MAX_PARAMETERS, FullCovariance
from grng.curvature.observation import Observation
from grng.curvature.prior import count_more_often, initial_variances
from grng.curvature.rows import Rows
from grng.optim import evidence
from grng.optim.checks import PreconditionerError
from grng.optim.devices import refuse_graph_capture
from grng.optim.kalman_checks import check_settings, checked, shared_settings
from grng.optim.kalman_reports import KalmanReports
from grng.optim.kalman_step import (
    coherences,
    mean_squares,
    part_within,
    predict,
    update_diagonal,
    update_full,
    weights_of,
    write_weights,
)
from grng.optim.loading import parameters_of
from grng.optim.output_noise import OutputNoise
from grng.optim.parameters import check_place, trainable, wide
from grng.optim.undo import undone_on_error

# What the state of a parameter can have, and what that of the first can have besides.
_KEYS = (
    *("variance", "prior", "weights", "trace", "overlap", "observations"),
    *("score", "score_outputs", "score_inputs"),
)
_FIRST_KEYS = ("noise", "prior_scale", "evidence", "skipped", "skipped_in_a_row")


class KalmanOptimizer(KalmanReports):
    """Diagonal extended Kalman filter over the trainable parameters; see :class:`grng.RKalman`.

    State per parameter, tensors or numbers: ``variance`` and the ``prior`` it began with; for the coherence
    ``score`` (or ``score_outputs`` and ``score_inputs``), ``trace``, ``overlap``, ``observations``;
    ``weights`` in fp32 where the parameter has fewer bits. It keeps its dtype through ``load_state_dict``.
    The first parameter also has what there is once: the estimated ``noise``, the full ``covariance``, the
    ``evidence`` that decides how long a step may be, and the number of observations ``skipped``.

    ``torch.distributed.checkpoint`` makes a step with zero gradients at no learning rate, to learn which
    tensors a new optimizer has. It is no step here, and gets the names of all that a state can have, so that
    ``set_optimizer_state_dict`` reads a whole state dict, flat or not (flat not with the full covariance);
    what there will be depends on the observations, so that ``dcp.load`` reads in place only what had some.
    A step waits for the device, and cannot be captured into a CUDA graph.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        defaults: dict[str, Any],
        *,
        sigma0: float,
        prior: str,
        likelihood: str,
        noise: float | str,
        beta: float,
        form: str,
        covariance: str,
        regularization: str,
        correct_coherence: bool,
        max_kl: float | str | None,
        batch: str,
        max_rows: int,
        max_failures: int,
        budget_mb: float,
        jacobian: str,
    ) -> None:
        owner = type(self).__name__
        check_settings(
            owner,
            dict(
                **defaults,
                sigma0=sigma0,
                prior=prior,
                likelihood=likelihood,
                beta=beta,
                form=form,
                covariance=covariance,
                regularization=regularization,
                max_kl=max_kl,
                batch=batch,
                max_rows=max_rows,
                max_failures=max_failures,
                jacobian_budget_mb=budget_mb,
                jacobian=jacobian,
            ),
        )
        params, self._names = trainable(owner, model)
        self._sigma0, self._prior, self._form = sigma0, prior, form
        self._likelihood, self._regularization = likelihood, regularization
        self._correct_coherence, self._batch, self._max_rows = correct_coherence, batch, max_rows
        # "auto" is no limit where the noise is not what the predicted classes state: what a regression
        # estimates of it says nothing of how far to trust the model.
        self._follows_evidence = max_kl == "auto" and noise == "fisher"
        self._max_kl = None if max_kl is None or max_kl == "auto" else float(max_kl)
        self._max_failures = max_failures
        self._budget_mb, self._jacobian = budget_mb, jacobian
        self._noise = OutputNoise(owner, likelihood, noise, beta)
        self._pending: tuple[Observation, list[Rows], list[nn.Parameter]] | None = None
        self._gained: Tensor | None = None  # evidence of what waits
        self._samples = 1  # in the last observation
        self._stopped = False  # whether a step with it has begun and not ended
        # Squared norms of the rows of the outputs' Jacobian by each parameter, while a prior needs them.
        self._squares: Tensor | None = None
        self._engine = None
        self._rows = "none yet"
        self._is_full = covariance == "full"
        super().__init__(params, {"step": 0, **defaults})
        self._check_size(0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as for any torch optimizer; variances start with the first gradient."""
        # While the base class is made there is nothing yet to compare with.
        if self.param_groups:
            given = param_group["params"]
            given = [given] if isinstance(given, Tensor) else list(given)
            param_group = {**param_group, "params": given}
            tensors = [p[1] if isinstance(p, tuple) else p for p in given]
            self._check_size(sum(p.numel() for p in tensors if isinstance(p, Tensor)))
        super().add_param_group(param_group)

    def _check_size(self, more: int) -> None:
        size = more + sum(p.numel() for g in self.param_groups for p in g["params"])
        if self._is_full and size > MAX_PARAMETERS:
            raise ValueError(
                f'{type(self).__name__}: covariance="full" must have at most {MAX_PARAMETERS} weights to '
                f"train, got {size}"
            )

    # ---- observation ----

    def observe(self, outputs: Tensor, targets: Tensor) -> None:
        """Differentiate the outputs and keep what the next :meth:`step` needs; the graph is not used after.

        Args:
            outputs: The model's outputs with their graph: logits ``[..., C]`` for
                ``likelihood="categorical"``, means ``[..., C]``, or ``[N]``, for ``"gaussian"``. All
                leading dimensions are samples.
            targets: Classes ``[...]``, int64; or the observed values, like ``outputs``.

        Raises:
            RuntimeError: Called twice without a step between.
            TypeError: Targets of the wrong kind.
            ValueError: Wrong shape, a class out of range, or outputs without a graph.
        """
        self._begin_observation()
        outputs, targets = checked(type(self).__name__, self._likelihood, outputs, targets)
        parameters = [p for g in self.param_groups for p in g["params"] if p.requires_grad]
        engine = self._jacobian_by(parameters, budget_mb=self._budget_mb, jacobian=self._jacobian)
        seen = self._observation(outputs, targets)
        self._squares = None
        if not all("variance" in self.state[p] for p in parameters):
            probes, unit = self._noise.probes(outputs, targets)
            # In units of the prior: where the outputs' unit is large, so are their variances.
            self._squares = mean_squares(engine.rows(outputs, probes)) / unit.double() ** 2
        rows = engine.rows(outputs, seen.directions)
        if self._follows_evidence:
            self._gained, self._samples = evidence.of_predictions(outputs, targets), len(targets)
        self._pending, self._stopped = (seen, rows, parameters), False

    def _observation(self, outputs: Tensor, targets: Tensor) -> Observation:
        n, c = outputs.shape
        stacked = n * (c - 1 if self._likelihood == "categorical" else c)
        batch = self._batch
        if batch == "auto":
            batch = "stacked" if stacked <= self._max_rows else "sampled"
        generator = torch.Generator(device=outputs.device)
        generator.manual_seed(self.param_groups[0]["step"])
        self._noise.covariance = self._first_state().get("noise")
        seen = self._noise.observation(outputs, targets, batch, self._max_rows, generator)
        self._rows = f"{batch}, {len(seen.directions)} rows for {n} x {c} outputs"
        return seen

    # ---- step ----

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Move the parameters by the gain times the innovation, and shrink their variances.

        Args:
            closure: Runs the model and calls :meth:`observe`; what it returns is returned.

        Raises:
            RuntimeError: There was no :meth:`observe` since the last step; or the model was moved or cast
                after the optimizer got its state.
            PreconditionerError: More than ``max_failures`` observations in a row could not be used.
            ValueError: The groups disagree on what a filter has once.
        """
        owner = type(self).__name__
        refuse_graph_capture(owner)
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        waiting: tuple[Observation, list[Rows], list[nn.Parameter]] | None = self._waiting(
            closure, "observe(outputs, targets) first"
        )
        if waiting is None:
            return None
        seen, rows, parameters = waiting
        shared = shared_settings(owner, self.param_groups)
        # Until the end: a step that runs out of memory can be made again, or with another observation.
        self._stopped = True
        problem: str | None = "a NaN or infinity in the outputs, the targets or the Jacobian"
        if self._usable(seen, rows):
            self._check_places(parameters)
            with undone_on_error(self.state, but=PreconditionerError):
                problem = self._start_and_update(seen, rows, parameters, shared)
        self._pending = None
        if problem is not None:
            self._fail(problem)
            return result
        for group in self.param_groups:
            group["step"] += 1
        return result

    def _start_and_update(
        self,
        seen: Observation,
        rows: list[Rows],
        parameters: list[nn.Parameter],
        shared: dict[str, float],
    ) -> str | None:
        """Make the step, or nothing; return why nothing."""
        started = self._start_variances(rows, parameters)
        used = [i for i, p in enumerate(parameters) if "variance" in self.state[p]]
        moved = [parameters[i] for i in used]
        if not moved:
            return None
        problem = self._update(seen, [rows[i] for i in used], moved, shared)
        if problem is not None:
            for state, key in started:
                del state[key]
            return problem
        self._first_state().pop("skipped_in_a_row", None)
        return None

    def _check_places(self, parameters: list[nn.Parameter]) -> None:
        """Check that variances still are where, and as wide as, their parameters want them.

        Raises:
            RuntimeError: They are not.
        """
        for p in parameters:
            variance = self.state.get(p, {}).get("variance")
            check_place(type(self).__name__, self._name_of, p, variance, wide(p))

    def _usable(self, seen: Observation, rows: list[Rows]) -> bool:
        values = [part for h in rows for part in of_rows.parts(h)] + [seen.score, seen.root]
        if self._squares is not None:
            values.append(self._squares)
        flags = torch.stack([torch.isfinite(v).all().to(seen.score.device) for v in values])
        return bool(flags.all())

    def _fail(self, what: str) -> None:
        state = self._first_state()
        for name in ("skipped", "skipped_in_a_row"):
            state[name] = state.get(name, 0) + 1
        count = state["skipped_in_a_row"]
        if count > self._max_failures:
            raise PreconditionerError(
                f"{type(self).__name__}: {count} observations in a row could not be used, the last for "
                f"{what}; the parameters are unchanged since"
            )

    def _start_variances(
        self, rows: list[Rows], parameters: list[nn.Parameter]
    ) -> list[tuple[dict[str, Any], str]]:
        """Give a variance to each parameter that can have one now; return what of the state is new."""
        if self._squares is None:
            return []
        known = [self.state[p].get("prior") for p in parameters]
        first = self._first_state()
        scale = first.get("prior_scale")
        values, new_scale = initial_variances(
            parameters, self._squares.tolist(), known, self._prior, self._sigma0, scale
        )
        started: list[tuple[dict[str, Any], str]] = []
        if scale is None and new_scale is not None:
            first["prior_scale"] = new_scale
            started.append((first, "prior_scale"))
        for p, row, value in zip(parameters, rows, values, strict=True):
            if value is not None:
                state = self.state[p]
                dtype = of_rows.dtype_of(row)
                state["variance"] = torch.full(p.shape, value, dtype=dtype, device=p.device)
                state["prior"] = value
                started += [(state, "variance"), (state, "prior")]
        return started

    def _update(
        self,
        seen: Observation,
        jacobians: list[Rows],
        parameters: list[nn.Parameter],
        shared: dict[str, float],
    ) -> str | None:
        """Update all parameters and their state, or nothing; return why nothing."""
        states = [self.state[p] for p in parameters]
        variances = [s["variance"].view(-1) for s in states]
        means = [weights_of(p, s).view(-1) for p, s in zip(parameters, states, strict=True)]
        before = [m.clone() for m in means], [v.clone() for v in variances]
        try:
            return self._update_from(before, seen, jacobians, parameters, means, variances, shared)
        except BaseException:
            # Wherever it stopped: these are the tensors that are written in place.
            for targets, copies in zip((means, variances), before, strict=True):
                torch._foreach_copy_(targets, copies)
            raise

    def _update_from(
        self,
        before: tuple[list[Tensor], list[Tensor]],
        seen: Observation,
        jacobians: list[Rows],
        parameters: list[nn.Parameter],
        means: list[Tensor],
        variances: list[Tensor],
        shared: dict[str, float],
    ) -> str | None:
        states = [self.state[p] for p in parameters]
        first = self._first_state()
        full_before = {k: first[k] for k in FullCovariance.KEYS if k in first}
        regularization, rho = self._regularization, shared["rho"]
        given = (self._noise, seen, jacobians, means, variances)
        if self._is_full:
            numbers = {p: i for i, p in enumerate(parameters_of(self))}
            info = update_full(
                *given,
                state=first,
                places=[numbers[p] for p in parameters],
                regularization=regularization,
                rho=rho,
            )
        else:
            info = update_diagonal(*given, form=self._form, regularization=regularization, rho=rho)
        if int(info) != 0:
            FullCovariance(first).restore(full_before)
            return f"info {int(info)} of the Kalman update"
        groups = [(float(g["lr"]), g["params"]) for g in self.param_groups]
        lr_of = {p: lr for lr, members in groups for p in members}
        rates = [lr_of[p] for p in parameters]
        largest = self._largest_divergence()
        trust = part_within(largest, self._noise, seen, jacobians, means, before[0], rates)
        if not bool(torch.isfinite(trust)):
            for targets, copies in zip((means, variances), before, strict=True):
                torch._foreach_copy_(targets, copies)
            FullCovariance(first).restore(full_before)
            return "a step whose effect is beyond the range of its dtype"
        self._noise.commit()
        if self._noise.covariance is not None:
            first["noise"] = self._noise.covariance
        if self._gained is not None:
            known = self._evidence()
            first["evidence"] = evidence.grown(known, self._gained.to(known.device))
        if self._correct_coherence and not self._is_full:
            sizes, seed = [p.numel() for p in parameters], self.param_groups[0]["step"] + 1
            found = coherences(states, sizes, seen, jacobians, seed)
            count_more_often(variances, before[1], found)
        for state, variance in zip(states, variances, strict=True):
            predict(variance, state["prior"], shared["forgetting"], shared["process_noise"])
        if self._is_full and (shared["forgetting"] != 1 or shared["process_noise"] != 0):
            FullCovariance(first).rescale_(variances)
        write_weights(parameters, means, before[0], [rate * trust for rate in rates])
        return None

    def _largest_divergence(self) -> Tensor | float | None:
        if not self._follows_evidence:
            return self._max_kl
        return evidence.largest_divergence(self._evidence(), self._samples)

    def _evidence(self) -> Tensor:
        known: Tensor | None = self._first_state().get("evidence")
        if known is None:
            return evidence.none_yet(self.param_groups[0]["params"][0].device)
        return known

    # ---- state and reports ----

    def _first_state(self) -> dict[str, Any]:
        """The state of the first parameter, which also keeps what all parameters share."""
        state: dict[str, Any] = self.state[self.param_groups[0]["params"][0]]
        return state

    def _accepted(self, parameter: nn.Parameter, saved: dict[str, Any]) -> dict[str, Any]:
        self._check_together(parameter, saved, ("variance", "prior"))
        self._check_together(parameter, saved, ("trace", "overlap", "observations"))
        shapes: dict[str, Any] = {
            "variance": parameter.shape,
            "weights": parameter.shape,
            "score": (parameter.numel(),),
            "score_outputs": parameter.shape[:1],
            # A bias has no inputs; it has none of the two.
            "score_inputs": parameter.shape[1:],
            "trace": (),
            "overlap": (),
            "evidence": (),
        }
        for key in (k for k in shapes if k in saved):
            self._check_shape(key, parameter, saved[key], shapes[key])
            if key.startswith(("variance", "score")):
                # Another dtype only where the weights have changed between fp64 and a narrower one.
                saved[key] = saved[key].to(wide(parameter))
        return saved

    def _is_only_a_form(
        self, groups: list[dict[str, Any]], saved: dict[nn.Parameter, dict[str, Any]]
    ) -> bool:
        # Observations that could not be used are counted before the first step too.
        is_form = super()._is_only_a_form(groups, saved)
        return is_form and not any(s.get("skipped") for s in saved.values())

    def _rehearse(self) -> None:
        """Name what a state can have; see :mod:`grng.optim.rehearsal`."""
        for p in parameters_of(self):
            self.state[p] = {key: 0 for key in _KEYS}
        self._first_state().update({key: 0 for key in _FIRST_KEYS})

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the observation that waits: a copy is whole, for the copied parameters."""
        return {**super().__getstate__(), "_gained": None}

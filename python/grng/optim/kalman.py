# SPDX-License-Identifier: Apache-2.0
"""What the Kalman optimizers share: one filter over all parameters, fed by observations."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import grng_kernels as kernels
from grng.curvature import rows as of_rows
from grng.curvature.full_covariance import MAX_PARAMETERS, FullCovariance, full_kalman_update_
from grng.curvature.jacobian import JACOBIANS, Jacobian
from grng.curvature.observation import BATCHES, LIKELIHOODS, Observation
from grng.curvature.prior import (
    PRIORS,
    coherence,
    count_more_often,
    initial_variances,
    update_coherence,
)
from grng.curvature.rows import Rows
from grng.optim import evidence
from grng.optim.checks import PreconditionerError, check_hyperparameter
from grng.optim.devices import refuse_graph_capture
from grng.optim.loading import parameters_of
from grng.optim.output_noise import OutputNoise
from grng.optim.rehearsal import Rehearsing
from grng.optim.undo import undone_on_error
from grng.reports.diagonal import explain, read
from grng.reports.memory import MemoryEstimate, estimate, planned
from grng.reports.text import Report

# One filter has one observation: these cannot differ between the groups.
_SHARED = ("rho", "forgetting", "process_noise")
# What the state of a parameter can have, and what that of the first can have besides.
_KEYS = (
    *("variance", "prior", "weights", "trace", "overlap", "observations"),
    *("score", "score_outputs", "score_inputs"),
)
_FIRST_KEYS = ("noise", "prior_scale", "evidence", "skipped", "skipped_in_a_row")


class KalmanOptimizer(Rehearsing):
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
        for name in ("lr", "rho", "process_noise"):
            check_hyperparameter(owner, name, defaults[name])
        check_hyperparameter(owner, "forgetting", defaults["forgetting"], low=1e-3, high=1.0)
        check_hyperparameter(owner, "sigma0", sigma0, low=1e-15, high=1e15)
        check_hyperparameter(owner, "beta", beta, high=1.0)
        if max_kl is not None and max_kl != "auto":
            if isinstance(max_kl, str):
                raise ValueError(
                    f'{owner}: max_kl must be a number, "auto" or None, got {max_kl!r}'
                )
            check_hyperparameter(owner, "max_kl", max_kl, low=1e-12)
        check_hyperparameter(owner, "max_rows", max_rows, low=1)
        check_hyperparameter(owner, "max_failures", max_failures)
        check_hyperparameter(owner, "jacobian_budget_mb", budget_mb, low=1e-3)
        for name, value, choices in (
            ("prior", prior, PRIORS),
            ("likelihood", likelihood, LIKELIHOODS),
            ("form", form, ("vdekf", "fdekf")),
            ("covariance", covariance, ("diagonal", "full")),
            ("regularization", regularization, ("gradient", "noise")),
            ("batch", batch, BATCHES),
            ("jacobian", jacobian, JACOBIANS),
        ):
            if value not in choices:
                raise ValueError(
                    f"{owner}: {name} must be one of {', '.join(choices)}, got {value!r}"
                )
        self._names = (
            {p: n for n, p in model.named_parameters()} if isinstance(model, nn.Module) else {}
        )
        params: Any = model
        if isinstance(model, nn.Module):
            params = [p for p in model.parameters() if p.requires_grad]
            if not params:
                raise ValueError(f"{owner}: the model has no trainable parameters")
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
        self._engine: Jacobian | None = None
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
        owner = type(self).__name__
        self._drop_rehearsal()
        if self._pending is not None and not self._stopped:
            raise RuntimeError(f"{owner}: observe() was called twice; call step() between")
        outputs, targets = self._checked(outputs, targets)
        parameters = [p for g in self.param_groups for p in g["params"] if p.requires_grad]
        if self._engine is None or not _same(self._engine.parameters, parameters):
            self._engine = Jacobian(parameters, budget_mb=self._budget_mb, jacobian=self._jacobian)
        seen = self._observation(outputs, targets)
        self._squares = None
        if not all("variance" in self.state[p] for p in parameters):
            probes, unit = self._noise.probes(outputs, targets)
            # In units of the prior: where the outputs' unit is large, so are their variances.
            self._squares = _mean_squares(self._engine.rows(outputs, probes)) / unit.double() ** 2
        rows = self._engine.rows(outputs, seen.directions)
        if self._follows_evidence:
            self._gained, self._samples = evidence.of_predictions(outputs, targets), len(targets)
        self._pending, self._stopped = (seen, rows, parameters), False

    def _checked(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs ``[N, C]`` and targets ``[N]`` or ``[N, C]``.

        Raises:
            TypeError: No tensor, or targets of the wrong kind.
            ValueError: A wrong shape, a class out of range, or outputs without a graph.
        """
        where, likelihood = f"{type(self).__name__}.observe", self._likelihood
        for name, value in (("outputs", outputs), ("targets", targets)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{where}: {name} must be a tensor, got {type(value).__name__}")
        if not outputs.requires_grad:
            raise ValueError(
                f"{where}: outputs must be attached to the graph of the forward pass; they have none "
                "(no_grad, inference_mode or detach)"
            )
        if likelihood == "gaussian" and outputs.dim() == 1:
            outputs, targets = outputs.unsqueeze(-1), targets.unsqueeze(-1)
        least = 2 if likelihood == "categorical" else 1
        if outputs.dim() < 2 or outputs.numel() == 0 or outputs.shape[-1] < least:
            raise ValueError(
                f"{where}: outputs must have shape [..., C] with samples and C >= {least}; "
                f"got {list(outputs.shape)}"
            )
        flat = outputs.reshape(-1, outputs.shape[-1])
        wanted = outputs.shape[:-1] if likelihood == "categorical" else outputs.shape
        if targets.shape != wanted:
            raise ValueError(
                f"{where}: targets must have shape {list(wanted)} with likelihood={likelihood!r}, "
                f"got {list(targets.shape)}"
            )
        if likelihood == "categorical":
            return flat, _checked_classes(where, targets, outputs.shape[-1]).reshape(-1)
        if not targets.is_floating_point():
            raise TypeError(
                f"{where}: targets must be of a floating-point dtype, got {targets.dtype}"
            )
        return flat, targets.reshape(flat.shape)

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
        refuse_graph_capture(type(self).__name__)
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        if self._pending is None:
            if closure is None and self._rehearse_if_asked():
                return None
            raise RuntimeError(
                f"{type(self).__name__}: step() needs an observation; call observe(outputs, targets) first"
            )
        seen, rows, parameters = self._pending
        shared = self._shared_settings()
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
            wide = torch.promote_types(p.dtype, torch.float32)
            if variance is not None and (variance.device != p.device or variance.dtype != wide):
                raise RuntimeError(
                    f"{type(self).__name__}: {self._name_of(p)} ({p.dtype}, {p.device}) was moved or cast "
                    f"after the optimizer got its state ({variance.dtype}, {variance.device}); make the "
                    "optimizer after that, or load its state_dict into a new one"
                )

    def _shared_settings(self) -> dict[str, float]:
        first = self.param_groups[0]
        for group in self.param_groups[1:]:
            for name in _SHARED:
                if group[name] != first[name]:
                    raise ValueError(
                        f"{type(self).__name__}: {name} must be the same in all parameter groups (they are "
                        f"one filter), got {first[name]} and {group[name]}"
                    )
        return {name: float(first[name]) for name in _SHARED}

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
        means = [self._weights(p).view(-1) for p in parameters]
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
        if self._is_full:
            info = self._update_full(seen, jacobians, parameters, means, variances, shared["rho"])
        else:
            info = self._update_diagonal(seen, jacobians, means, variances, shared["rho"])
        if int(info) != 0:
            FullCovariance(first).restore(full_before)
            return f"info {int(info)} of the Kalman update"
        groups = [(float(g["lr"]), g["params"]) for g in self.param_groups]
        lr_of = {p: lr for lr, members in groups for p in members}
        rates = [lr_of[p] for p in parameters]
        trust = self._trust(seen, jacobians, means, before[0], rates)
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
            count_more_often(variances, before[1], self._coherences(seen, jacobians, parameters))
        for state, variance in zip(states, variances, strict=True):
            _predict(variance, state["prior"], shared["forgetting"], shared["process_noise"])
        if self._is_full and (shared["forgetting"] != 1 or shared["process_noise"] != 0):
            FullCovariance(first).rescale_(variances)
        _write(parameters, means, before[0], [rate * trust for rate in rates])
        return None

    def _update_diagonal(
        self,
        seen: Observation,
        jacobians: list[Rows],
        means: list[Tensor],
        variances: list[Tensor],
        rho: float,
    ) -> Tensor:
        def gram() -> Tensor:
            zero = torch.zeros_like(seen.root)
            return sum(map(of_rows.gram, jacobians, variances), zero)

        innovation, noise, likelihood = self._noise.arguments(seen, gram)
        return kernels.kalman_update_(
            means,
            variances,
            jacobians,
            innovation.to(means[0].dtype),
            noise.to(means[0].dtype),
            form=self._form,
            likelihood=likelihood,
            regularization=self._regularization,
            rho=rho,
        )

    def _update_full(
        self,
        seen: Observation,
        jacobians: list[Rows],
        parameters: list[nn.Parameter],
        means: list[Tensor],
        variances: list[Tensor],
        rho: float,
    ) -> Tensor:
        numbers = {p: i for i, p in enumerate(p for g in self.param_groups for p in g["params"])}
        first = self._first_state()
        # A copy: where the update comes to nothing, the old one is put back.
        covariance = FullCovariance(first).of([numbers[p] for p in parameters], variances).clone()
        h = torch.cat([of_rows.dense(part) for part in jacobians], dim=1).double()
        innovation, noise, likelihood = self._noise.arguments(seen, lambda: h @ covariance @ h.mT)
        mean = torch.cat(means)
        info = full_kalman_update_(
            mean,
            covariance,
            h,
            innovation,
            noise,
            likelihood=likelihood,
            rho=rho,
            regularization=self._regularization,
        )
        if int(info) != 0:
            return info
        begin = 0
        for m, v in zip(means, variances, strict=True):
            part = slice(begin, begin + m.numel())
            m.copy_(mean[part])
            v.copy_(covariance.diagonal()[part])
            begin += m.numel()
        first["covariance"] = covariance
        return info

    def _trust(
        self,
        seen: Observation,
        jacobians: list[Rows],
        means: list[Tensor],
        before: list[Tensor],
        rates: list[float],
    ) -> Tensor:
        """The part of the step, 0-d in (0, 1], that is predicted to change the outputs by ``max_kl``."""
        largest = self._largest_divergence()
        if largest is None:
            return torch.ones_like(seen.score[0])
        if isinstance(largest, Tensor):
            largest = largest.to(seen.score.device)
        change = torch.zeros_like(seen.score)
        for h, new, old, rate in zip(jacobians, means, before, rates, strict=True):
            change += rate * of_rows.product(h, new - old).to(change.dtype)
        divergence = 0.5 * (self._noise.whiten(seen, change)).square().sum()
        smallest = torch.finfo(change.dtype).tiny
        part = (largest / divergence.clamp(min=smallest)).sqrt().clamp(max=1.0)
        return torch.where(torch.isfinite(divergence), part, torch.nan).to(change.dtype)

    def _largest_divergence(self) -> Tensor | float | None:
        if not self._follows_evidence:
            return self._max_kl
        return evidence.largest_divergence(self._evidence(), self._samples)

    def _evidence(self) -> Tensor:
        known: Tensor | None = self._first_state().get("evidence")
        if known is None:
            return evidence.none_yet(self.param_groups[0]["params"][0].device)
        return known

    def _coherences(
        self, seen: Observation, jacobians: list[Rows], parameters: list[nn.Parameter]
    ) -> Tensor:
        generator = torch.Generator(device=seen.root.device)
        generator.manual_seed(self.param_groups[0]["step"] + 1)
        # A score drawn from the model has the information as its covariance: T times white noise.
        noise = torch.randn(
            seen.root.shape[1], generator=generator, device=seen.root.device, dtype=seen.root.dtype
        )
        drawn = seen.root @ noise
        values = []
        for h, p in zip(jacobians, parameters, strict=True):
            state = self.state[p]
            whitened, score = of_rows.mixed(seen.root, h), of_rows.combination(h, drawn)
            update_coherence(state, whitened, score)
            values.append(coherence(state, p.numel()))
        return torch.stack(values).float()

    def _weights(self, parameter: nn.Parameter) -> Tensor:
        """The tensor that the kernel updates: the parameter, or its contiguous copy in fp32."""
        if parameter.dtype in (torch.float32, torch.float64):
            return parameter.data if parameter.is_contiguous() else parameter.data.contiguous()
        state = self.state[parameter]
        if "weights" not in state:
            state["weights"] = parameter.detach().float().contiguous()
        # Somebody else may have written the parameter since.
        same = state["weights"].to(parameter.dtype) == parameter
        state["weights"] = torch.where(same, state["weights"], parameter.float())
        weights: Tensor = state["weights"]
        return weights

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
        wide = torch.promote_types(parameter.dtype, torch.float32)
        for key in (k for k in shapes if k in saved):
            self._check_shape(key, parameter, saved[key], shapes[key])
            if key.startswith(("variance", "score")):
                # Another dtype only where the weights have changed between fp64 and a narrower one.
                saved[key] = saved[key].to(wide)
        return saved

    def _after_loading(self) -> None:
        super()._after_loading()
        self._pending = None

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
        # A scheduler puts a step on the instance that is bound to it: the copy's would step the original.
        kept = {name: value for name, value in self.__dict__.items() if name != "step"}
        return {**kept, "_pending": None, "_gained": None, "_engine": None}

    def explain(self) -> Report:
        """Return a table to print: variance, coherence, Jacobian of each parameter; how outputs are observed.

        ``state`` is what a parameter holds in bytes. Waits for the device.
        """
        kinds: dict[nn.Parameter, str] = {}
        if self._engine is not None:
            names = {True: "factored", False: "dense"}
            flags = zip(self._engine.parameters, self._engine.factored, strict=True)
            kinds = {p: names[factored] for p, factored in flags}
        route = self._engine.route if self._engine is not None else "none yet"
        return explain(
            self._names,
            self._states(),
            ("variance", "coherence"),
            self._numbers(),
            {"variance": "not yet", "coherence": "1"},
            [
                f"Observation: {self._likelihood}, {self._rows}",
                f"Jacobian: {route}",
                f"Noise: {self._noise.describe()}",
                f"Covariance: {'full' if self._is_full else 'diagonal'}",
                f"Step: {self._describe_limit()}",
                f"State: {self.memory_estimate()}",
            ],
            last=("jacobian", kinds, "none yet"),
        )

    def _describe_limit(self) -> str:
        largest = self._largest_divergence()
        if largest is None:
            return "as long as the filter makes it"
        why = "; more with evidence" if self._follows_evidence else ""
        return f"at most {float(largest):.3g} nats of KL divergence{why}"

    def diagnostics(self) -> dict[str, float]:
        """Return plain numbers for a logger, after waiting for the device.

        ``step``, ``skipped`` and ``skipped_in_a_row`` observations, ``state_bytes``; ``max_kl`` of the next
        step, where there is a limit, from as many samples as the last; behind the name of a parameter and
        ``/`` its mean ``variance`` and its ``coherence``.
        """
        first = self._first_state()
        report = {
            "step": float(self.param_groups[0]["step"]),
            "skipped": float(first.get("skipped", 0)),
            "skipped_in_a_row": float(first.get("skipped_in_a_row", 0)),
            "state_bytes": float(self.memory_estimate().total),
        }
        largest = self._largest_divergence()
        if largest is not None:
            report["max_kl"] = float(largest)
        for p, numbers in read(self._numbers()).items():
            report.update({f"{self._name_of(p)}/{key}": value for key, value in numbers.items()})
        return report

    def memory_estimate(self) -> MemoryEstimate:
        """Return the bytes that the state holds once there was an observation; see the class.

        Before the first one at most: of a layer that is fed single samples the last score takes less. The
        estimated noise, a number for each pair of outputs, is not counted before.
        """
        states = self._states()
        return estimate(list(states), states)

    def _numbers(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        numbers: dict[nn.Parameter, dict[str, Tensor]] = {}
        for p in (p for g in self.param_groups for p in g["params"]):
            state = self.state.get(p, {})
            numbers[p] = {}
            if "variance" in state:
                numbers[p]["variance"] = state["variance"].mean()
            if "trace" in state:
                numbers[p]["coherence"] = coherence(state, p.numel())
        return numbers

    def _states(self) -> dict[nn.Parameter, dict[str, Any]]:
        """What the state holds, or will hold: tensors without memory."""
        parameters = [p for g in self.param_groups for p in g["params"]]
        states: dict[nn.Parameter, dict[str, Any]] = {}
        for p in parameters:
            dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
            keys = ["variance"] + (["weights"] if p.dtype.itemsize < dtype.itemsize else [])
            state = dict(planned(p, *keys, dtype=dtype))
            known = self.state.get(p, {})
            if self._correct_coherence and not self._is_full and "trace" not in known:
                state.update(planned(p, "score", dtype=dtype))
                for key in ("trace", "overlap"):
                    state[key] = torch.empty((), dtype=torch.float64, device="meta")
            states[p] = {**state, **known}
        if self._is_full:
            size = sum(p.numel() for p in parameters)
            full = torch.empty(size, size, dtype=torch.float64, device="meta")
            states[parameters[0]].setdefault("covariance", full)
        return states


def _checked_classes(where: str, targets: Tensor, classes: int) -> Tensor:
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise TypeError(
            f"{where}: targets must be classes of an integer dtype, got {targets.dtype}"
        )
    if bool(((targets < 0) | (targets >= classes)).any()):
        raise ValueError(
            f"{where}: targets must be classes in [0, {classes}), got "
            f"{int(targets.min())} to {int(targets.max())}"
        )
    return targets.long()


def _same(a: list[nn.Parameter], b: list[nn.Parameter]) -> bool:
    return len(a) == len(b) and all(p is q for p, q in zip(a, b, strict=True))


def _mean_squares(rows: list[Rows]) -> Tensor:
    return torch.stack([of_rows.squares(h).mean().double() for h in rows])


def _predict(variance: Tensor, prior: float, forgetting: float, process_noise: float) -> None:
    """The variance before the next observation, in place; what was never learned cannot be forgotten."""
    if forgetting != 1:
        variance.copy_(torch.minimum(variance / forgetting, variance.clamp(min=prior)))
    if process_noise:
        variance.add_(process_noise).clamp_(max=torch.finfo(variance.dtype).max)


def _write(
    parameters: list[nn.Parameter], means: list[Tensor], before: list[Tensor], parts: list[Tensor]
) -> None:
    """Take a part of each step, and give the parameters that are no means themselves their values."""
    for p, mean, old, part in zip(parameters, means, before, parts, strict=True):
        mean.copy_(torch.lerp(old, mean, part.to(mean.dtype)))
        if mean.data_ptr() != p.data_ptr():
            p.copy_(mean.view(p.shape))
        else:
            torch.autograd.graph.increment_version(p)

# SPDX-License-Identifier: Apache-2.0
"""Sophia: momentum over a diagonal estimate of the Hessian, clipped elementwise; the two of its paper."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grng.curvature.fisher import sampled_loss
from grng.optim.sophia_base import SophiaOptimizer, state_dtype


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
                self._add(p, grad.to(state_dtype(p)) * terms**0.5)

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
                dtype = state_dtype(p)
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

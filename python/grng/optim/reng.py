# SPDX-License-Identifier: Apache-2.0
"""RENG: regularised explicit natural gradient."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from grng.optim.base import check_hyperparameter
from grng.optim.ring import RING

METHODS = ("double_backprop", "finite_difference")
# Length of the step along the gradient, relative to the norm of the weights: small against them, large
# against rounding. For a norm between 2 and 20 that is the 0.01 to 0.1 that the literature takes.
RELATIVE_LENGTH = 5e-3


class RENG(RING):
    """Natural gradient of a loss whose gradient norm is penalised, ``L + (rho_gr/2)·‖∇L‖²``.

    The direction is RING's, of the gradient ``∇L + rho_gr·H·∇L``, with the Hessian ``H``::

        logits = model(x)
        opt.observe(logits)
        opt.backward(F.cross_entropy(logits, y))   # instead of loss.backward()
        opt.step()
        opt.zero_grad()

    Args:
        model: As for :class:`RING`.
        rho_gr: Weight of the penalty, >= 0, in units of one over the curvature of the loss: a loss that is
            scaled, or divided over micro-batches, is penalised by another part of itself.
        method: How :meth:`backward` finds ``H·∇L``. ``"double_backprop"``: exactly, about two more backward
            passes and their memory; all operations need a second derivative. ``"finite_difference"``:
            ``(∇L(θ + ε∇L) − ∇L(θ))/ε`` with ``ε = 0.005·‖θ‖/‖∇L‖``, over the parameters that have a gradient
            (0.005 in place of 0.005·‖θ‖ where they are all zero); an error of first order in the length,
            one more forward and backward pass; needs a closure.
        **options: As for :class:`RING`; its ``rho`` is the damping, whatever ``rho_gr`` is.

    Raises:
        ValueError: As :class:`RING`; an unknown method.

    Under DistributedDataParallel ``"double_backprop"`` penalises the gradient norm of each process on its own
    and averages the results, which is not the penalty of the whole batch; ``"finite_difference"`` is refused
    there, as what it writes into ``.grad`` would not be averaged.

    Source: Dash et al. 2026, "Gradient Regularized Natural Gradients" (RENG); Zhao et al. 2022 for the finite
    difference.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        *args: Any,
        rho_gr: float = 1e-2,
        method: str = "double_backprop",
        **options: Any,
    ) -> None:
        check_hyperparameter("RENG", "rho_gr", rho_gr)
        if method not in METHODS:
            raise ValueError(f"RENG: method must be one of {', '.join(METHODS)}, got {method!r}")
        self._rho_gr, self._method = rho_gr, method
        self._model = model if isinstance(model, nn.Module) else None
        super().__init__(model, *args, **options)

    def backward(self, loss: Tensor | Callable[[], Tensor]) -> Tensor:
        """Add ``∇L + rho_gr·H·∇L`` to the gradients, in place of ``loss.backward()``.

        With ``maximize`` ``∇L − rho_gr·H·∇L``: the penalty lowers the objective.

        Args:
            loss: The loss, 0-d, with its graph; or a closure that runs the model and returns it, which
                ``"finite_difference"`` calls twice, with the same random numbers. What the second call does
                to the buffers of the model is undone.

        Returns:
            The loss, without a graph.

        Raises:
            RuntimeError: ``"finite_difference"`` with several processes.
            TypeError: A loss where a closure is needed.
            ValueError: A loss that is not one number.
        """
        if self._method == "finite_difference" and _processes() > 1:
            raise RuntimeError(
                f'RENG.backward: method="finite_difference" is for one process, there are {_processes()}: '
                'its gradients would not be averaged. Use method="double_backprop"'
            )
        if self._method == "finite_difference" and not callable(loss):
            raise TypeError(
                'RENG.backward: with method="finite_difference" loss must be a closure that returns the '
                f"loss, got {type(loss).__name__}"
            )
        parameters = [p for g in self.param_groups for p in g["params"] if p.requires_grad]
        random = _random_states(parameters)
        with torch.enable_grad():
            value = loss() if callable(loss) else loss
        if value.numel() != 1:
            raise ValueError(
                f"RENG.backward: loss must be one number, got shape {list(value.shape)}"
            )
        if self._rho_gr == 0:
            value.backward()
        elif self._method == "double_backprop":
            self._double_backprop(value, parameters)
        else:
            assert callable(loss)
            self._difference(loss, value, parameters, random)
        return value.detach()

    def _weight(self) -> float:
        """The weight of the penalty, which makes an objective that is maximised smaller."""
        return -self._rho_gr if self.param_groups[0]["maximize"] else self._rho_gr

    def _double_backprop(self, loss: Tensor, parameters: list[nn.Parameter]) -> None:
        with torch.enable_grad():
            grads = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
            penalty = sum((g.square().sum() for g in grads if g is not None), loss.new_zeros(()))
            (loss + 0.5 * self._weight() * penalty).backward()

    def _difference(
        self,
        closure: Callable[[], Tensor],
        loss: Tensor,
        parameters: list[nn.Parameter],
        random: dict[torch.device, Tensor],
    ) -> None:
        used = [p for p in parameters if p.requires_grad]
        first = torch.autograd.grad(loss, used, allow_unused=True)
        moving = [(p, g) for p, g in zip(used, first, strict=True) if g is not None]
        norm = _norm([g for _, g in moving])
        size = _norm([p.detach() for p, _ in moving])
        length = RELATIVE_LENGTH * torch.where(size > 0, size, 1.0)
        ratio = torch.where(norm > 0, length / norm, 0.0)
        weights = [p.detach().clone() for p, _ in moving]
        # Looked up now: moving a model to a device or a dtype replaces its buffers.
        buffers = [
            (module, name, b, b.clone())
            for module in (self._model.modules() if self._model is not None else [])
            for name, b in module._buffers.items()
            if b is not None
        ]
        observations = self._observations
        with torch.no_grad():
            for p, g in moving:
                p.add_(g * ratio.to(g))
        after = _random_states(parameters)
        _set_random_states(random)
        try:
            with self._capture.paused(), torch.enable_grad():
                second = torch.autograd.grad(closure(), [p for p, _ in moving], allow_unused=True)
        finally:
            _set_random_states(after)
            self._observations = observations
            with torch.no_grad():
                for (p, _), w in zip(moving, weights, strict=True):
                    p.copy_(w)
                for module, name, b, old in buffers:
                    module._buffers[name] = b
                    b.copy_(old)
        factor = torch.where(norm > 0, self._weight() * norm / length, 0.0)
        for (p, g), h in zip(moving, second, strict=True):
            total = g if h is None else g + factor.to(g) * (h - g)
            p.grad = total if p.grad is None else p.grad + total


def _norm(tensors: list[Tensor]) -> Tensor:
    """The norm of all elements, at least in fp32, on the device of the first tensor."""
    squares = [t.to(torch.promote_types(t.dtype, torch.float32)).square().sum() for t in tensors]
    return torch.stack([s.to(squares[0]) for s in squares]).sum().sqrt()


def _processes() -> int:
    distributed = torch.distributed
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1


def _random_states(parameters: list[nn.Parameter]) -> dict[torch.device, Tensor]:
    """Return the states of the generators of the CPU and of the GPUs that hold the parameters."""
    states = {torch.device("cpu"): torch.random.get_rng_state()}
    for device in {p.device for p in parameters if p.is_cuda}:
        states[device] = torch.cuda.get_rng_state(device)
    return states


def _set_random_states(states: dict[torch.device, Tensor]) -> None:
    for device, state in states.items():
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.random.set_rng_state(state)

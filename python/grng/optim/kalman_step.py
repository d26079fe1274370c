# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of a step of a Kalman optimizer: the update, how much of it is taken, what is written."""

from typing import Any

import torch
from torch import Tensor, nn

import grng_kernels as kernels
from grng.curvature import rows as of_rows
from grng.curvature.full_covariance import FullCovariance, full_kalman_update_
from grng.curvature.observation import Observation
from grng.curvature.prior import coherence, update_coherence
from grng.curvature.rows import Rows
from grng.optim.output_noise import OutputNoise

State = dict[str, Any]


def update_diagonal(
    output_noise: OutputNoise,
    seen: Observation,
    jacobians: list[Rows],
    means: list[Tensor],
    variances: list[Tensor],
    *,
    form: str,
    regularization: str,
    rho: float,
) -> Tensor:
    """Update means and variances in place; return how it ended, see ``kalman_update_``."""

    def gram() -> Tensor:
        zero = torch.zeros_like(seen.root)
        return sum(map(of_rows.gram, jacobians, variances), zero)

    innovation, noise, likelihood = output_noise.arguments(seen, gram)
    return kernels.kalman_update_(
        means,
        variances,
        jacobians,
        innovation.to(means[0].dtype),
        noise.to(means[0].dtype),
        form=form,
        likelihood=likelihood,
        regularization=regularization,
        rho=rho,
    )


def update_full(
    output_noise: OutputNoise,
    seen: Observation,
    jacobians: list[Rows],
    means: list[Tensor],
    variances: list[Tensor],
    *,
    state: State,
    places: list[int],
    regularization: str,
    rho: float,
) -> Tensor:
    """Do what :func:`update_diagonal` does with the full covariance, which a ``state`` keeps.

    ``places`` are the numbers of the parameters among those of all groups.
    """
    # A copy: where the update comes to nothing, the old one is put back.
    covariance = FullCovariance(state).of(places, variances).clone()
    h = torch.cat([of_rows.dense(part) for part in jacobians], dim=1).double()
    innovation, noise, likelihood = output_noise.arguments(seen, lambda: h @ covariance @ h.mT)
    mean = torch.cat(means)
    info = full_kalman_update_(
        mean,
        covariance,
        h,
        innovation,
        noise,
        likelihood=likelihood,
        rho=rho,
        regularization=regularization,
    )
    if int(info) != 0:
        return info
    begin = 0
    for m, v in zip(means, variances, strict=True):
        part = slice(begin, begin + m.numel())
        m.copy_(mean[part])
        v.copy_(covariance.diagonal()[part])
        begin += m.numel()
    state["covariance"] = covariance
    return info


def part_within(
    largest: Tensor | float | None,
    output_noise: OutputNoise,
    seen: Observation,
    jacobians: list[Rows],
    means: list[Tensor],
    before: list[Tensor],
    rates: list[float],
) -> Tensor:
    """Return the part of the step, 0-d in (0, 1], that is predicted to change the outputs by ``largest``.

    ``largest`` is a KL divergence; None: no limit. NaN where the change leaves the range of its dtype.
    """
    if largest is None:
        return torch.ones_like(seen.score[0])
    if isinstance(largest, Tensor):
        largest = largest.to(seen.score.device)
    change = torch.zeros_like(seen.score)
    for h, new, old, rate in zip(jacobians, means, before, rates, strict=True):
        change += rate * of_rows.product(h, new - old).to(change.dtype)
    divergence = 0.5 * (output_noise.whiten(seen, change)).square().sum()
    smallest = torch.finfo(change.dtype).tiny
    part = (largest / divergence.clamp(min=smallest)).sqrt().clamp(max=1.0)
    return torch.where(torch.isfinite(divergence), part, torch.nan).to(change.dtype)


def coherences(
    states: list[State],
    sizes: list[int],
    seen: Observation,
    jacobians: list[Rows],
    seed: int,
) -> Tensor:
    """Return the coherence of each parameter, with what this observation says of it."""
    generator = torch.Generator(device=seen.root.device)
    generator.manual_seed(seed)
    # A score drawn from the model has the information as its covariance: T times white noise.
    noise = torch.randn(
        seen.root.shape[1], generator=generator, device=seen.root.device, dtype=seen.root.dtype
    )
    drawn = seen.root @ noise
    values = []
    for h, state, size in zip(jacobians, states, sizes, strict=True):
        whitened, score = of_rows.mixed(seen.root, h), of_rows.combination(h, drawn)
        update_coherence(state, whitened, score)
        values.append(coherence(state, size))
    return torch.stack(values).float()


def weights_of(parameter: nn.Parameter, state: State) -> Tensor:
    """Return the tensor that the kernel updates: the parameter, or its contiguous copy in fp32."""
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter.data if parameter.is_contiguous() else parameter.data.contiguous()
    if "weights" not in state:
        state["weights"] = parameter.detach().float().contiguous()
    # Somebody else may have written the parameter since.
    same = state["weights"].to(parameter.dtype) == parameter
    state["weights"] = torch.where(same, state["weights"], parameter.float())
    weights: Tensor = state["weights"]
    return weights


def mean_squares(rows: list[Rows]) -> Tensor:
    """Return the mean squared norm of the rows by each parameter, fp64."""
    return torch.stack([of_rows.squares(h).mean().double() for h in rows])


def predict(variance: Tensor, prior: float, forgetting: float, process_noise: float) -> None:
    """Age a variance in place until the next observation; what was never learned cannot be forgotten."""
    if forgetting != 1:
        variance.copy_(torch.minimum(variance / forgetting, variance.clamp(min=prior)))
    if process_noise:
        variance.add_(process_noise).clamp_(max=torch.finfo(variance.dtype).max)


def write_weights(
    parameters: list[nn.Parameter], means: list[Tensor], before: list[Tensor], parts: list[Tensor]
) -> None:
    """Take a part of each step, and give the parameters that are no means themselves their values."""
    for p, mean, old, part in zip(parameters, means, before, parts, strict=True):
        mean.copy_(torch.lerp(old, mean, part.to(mean.dtype)))
        if mean.data_ptr() != p.data_ptr():
            p.copy_(mean.view(p.shape))
        else:
            torch.autograd.graph.increment_version(p)

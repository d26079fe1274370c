# SPDX-License-Identifier: Apache-2.0
"""A small policy, steps of RankOneNPG on it, and its scores one by one."""

import torch
from torch import nn

from grng import RankOneNPG

ACTIONS = 3


def policy(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, ACTIONS)).to(dtype)


def drawn(model, rows=5, seed=0):
    """Log-probabilities of actions that a policy took, and what they were worth."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    states = torch.randn(rows, 4, generator=generator).to(dtype)
    log_probs = model(states).log_softmax(-1)
    actions = log_probs.detach().float().exp().multinomial(1, generator=generator)
    worth = torch.randn(rows, generator=generator).to(dtype)
    return log_probs.gather(1, actions).squeeze(1), worth


def take_step(model, opt, rows=5, seed=0, scale=1.0):
    log_probs, worth = drawn(model, rows, seed)
    opt.observe(log_probs)
    (-scale * (log_probs * worth).mean()).backward()
    opt.step()
    opt.zero_grad()


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def jacobian(log_probs, parameters):
    """Scores of all actions, ``[N, d]``, one backward pass each."""
    rows = [
        torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True) for x in log_probs
    ]
    return torch.stack(
        [
            flat(
                torch.zeros_like(p) if g is None else g
                for g, p in zip(row, parameters, strict=True)
            )
            for row in rows
        ]
    )


def dense(scores, grad, damping):
    """``(damping·I + UUᵀ/m)⁻¹ g`` by a Cholesky factor of that matrix."""
    matrix = scores.mT @ scores / len(scores)
    matrix.diagonal().add_(damping)
    return torch.cholesky_solve(grad[:, None], torch.linalg.cholesky(matrix))[:, 0]


def observed(rows=5, seed=0, **settings):
    """A step of fixed length: all scores, the gradient, and the direction that was taken."""
    model = policy()
    parameters = list(model.parameters())
    opt = RankOneNPG(model, step_length="fixed", **settings)
    log_probs, worth = drawn(model, rows, seed)
    scores = jacobian(log_probs, parameters)
    opt.observe(log_probs)
    (-(log_probs * worth).mean()).backward()
    grad, before = flat(p.grad for p in parameters), flat(parameters)
    opt.step()
    return scores, grad, before - flat(parameters)


def close(a, b, rtol=1e-9):
    """fp64, of systems with a condition below 1e4."""
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))

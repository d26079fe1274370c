# SPDX-License-Identifier: Apache-2.0
"""``kalman_update_``: the public function, its checks, and the choice of a backend."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from grng_kernels import _checks, _dispatch
from grng_kernels._register import operator
from grng_kernels.info import Info
from grng_kernels.kalman_update import cpu, gpu, kronecker, reference
from grng_kernels.kalman_update.innovation import gain_from_gram, largest_magnitude
from grng_kernels.kalman_update.kronecker import Jacobian, KroneckerJacobian
from grng_kernels.kalman_update.regularization import REGULARIZATIONS

OP = "kalman_update_"
FORMS = ("fdekf", "vdekf")
LIKELIHOODS = ("gaussian", "categorical", "fisher")
HALF_DTYPES = (torch.bfloat16, torch.float16)
FAST_DTYPES = (torch.float32, *HALF_DTYPES)
LARGEST = torch.finfo(torch.float32).max


def kalman_update_(
    mean: Tensor | Sequence[Tensor],
    variance: Tensor | Sequence[Tensor],
    jacobian: Jacobian | Sequence[Jacobian],
    innovation: Tensor,
    noise: float | Tensor,
    *,
    form: str = "fdekf",
    likelihood: str = "gaussian",
    forgetting: float = 1.0,
    process_noise: float = 0.0,
    rho: float = 0.0,
    regularization: str = "gradient",
) -> Tensor:
    """Kalman update with a diagonal covariance, in place: ``mean <- mean + diag(p) Hᵀ S⁻¹ e``.

    ``S = H diag(p) Hᵀ + R``, summed over the blocks. Then the variances, with ``h`` a column of ``H``:
    ``p <- p·(1 − p·hᵀS⁻¹h)`` for ``"fdekf"`` (the diagonal of the full EKF update), or
    ``1/p <- 1/p + hᵀR⁻¹h`` for ``"vdekf"`` (variational; the smaller of the two). Then the prediction for
    the next observation, ``p <- p / forgetting + process_noise``. The fast backends store neither the
    gain nor ``H·p``.

    Args:
        mean: ``[d]``, fp32 or fp64, or a list of blocks ``[d_i]``: one state, cut in pieces. Mutated.
        variance: The diagonal ``p`` of the covariance, >= 0, same form. Mutated.
        jacobian: ``H``, derivative of the outputs by the parameters, ``[C, d]`` or a list of ``[C, d_i]``,
            same dtype, any strides; bf16 or fp16 beside an fp32 state (read as such, computed in fp32). A
            block whose rows are ``kron(g_c, x)``, the weight of a linear layer that was fed one vector, may
            be a :class:`KroneckerJacobian` of ``G [C, m]`` and ``x [n]`` instead, ``d = m·n``.
        innovation: ``e``, target minus prediction, ``[C]``.
        noise: ``R``, observation noise: ``[C, C]`` symmetric positive definite, its diagonal ``[C]``, or a
            number > 0 for that times the identity. With ``likelihood="categorical"`` the class
            probabilities ``[C]`` instead, or ``[N, C]`` for N observations at once; with ``"fisher"`` the
            root ``T [C, k]``, ``k <= C``.
        form: ``"fdekf"`` or ``"vdekf"``.
        likelihood: ``"gaussian"``; ``"categorical"``: softmax outputs, ``e`` = one-hot label minus
            probabilities, ``H`` = derivative of the logits; ``"fisher"``: any other, ``e`` = score
            (derivative of the log-likelihood by the outputs), ``T Tᵀ`` = Fisher information of the outputs,
            which may be singular and is never inverted (Gaussian: ``e = R⁻¹·error``, ``T Tᵀ = R⁻¹``;
            categorical: ``T Tᵀ = diag(q) − q qᵀ``).
        forgetting: In (0, 1]; 1 forgets nothing.
        process_noise: >= 0, in units of the variance.
        rho: >= 0, strength of the gradient regularisation ``l + (rho/2)·‖∇l‖²``.
        regularization: What ``rho`` does: ``"gradient"`` is exact for the linearised model and makes the
            noise smaller, ``R (R + rho·H Hᵀ)⁻¹ R``; ``"noise"`` makes it larger, ``R + rho·H Hᵀ``.

    Returns:
        :class:`Info`, int32, 0-d, on the device. Where it is not 0, mean and variance are unchanged:
        ``NONFINITE_INPUT`` (NaN, infinity or a negative variance; the CUDA C++ kernel reports an infinite
        Jacobian as ``OVERFLOW``), ``NOT_CONVERGED`` (``S`` or ``R`` not positive definite), ``OVERFLOW``.

    Raises:
        TypeError: A dtype or layout that is not accepted.
        ValueError: A wrong shape, device, number or name; a state that is expanded or overlaps another
            argument in memory.

    Accuracy: for ``C <= d`` at most twice the error of PyTorch in the same dtype against fp64.
    Cost: two passes over ``H``, ``C²·d`` FLOPs each (a dense whitener: twice that in the second); with
    ``rho > 0`` half as many again, and no pass more. For a factored block two passes over the variances,
    whatever C is, and ``H`` is never formed; but for the C++ kernel (fp32, at most 256 outputs) the backends
    expand it, and where that overflows the reference says ``NONFINITE_INPUT``.
    Source: public code of FDEKF and VDEKF (probml/rebayes); Ollivier 2018 for the categorical form; the
    regularised forms are derived from Dash et al. 2026 in ``regularization.py``.
    """
    usual = _usual_call(
        mean, variance, jacobian, innovation, noise, form=form, likelihood=likelihood,
        forgetting=forgetting, process_noise=process_noise, rho=rho, regularization=regularization,
    )  # fmt: skip
    if usual is not None:
        return usual
    means = _checks.as_list(OP, "mean", mean)
    variances = _checks.as_list(OP, "variance", variance)
    jacobians, inputs, factored = kronecker.as_blocks(OP, "jacobian", jacobian)
    single = isinstance(mean, Tensor)
    form_of = jacobians[0] if isinstance(jacobian, KroneckerJacobian) else jacobian
    _checks.check_same_form(OP, mean=mean, variance=variance, jacobian=form_of)  # type: ignore[arg-type]
    _checks.check_lengths(OP, mean=means, variance=variances, jacobian=jacobians)
    _checks.check_choice(OP, "form", form, FORMS)
    _checks.check_choice(OP, "likelihood", likelihood, LIKELIHOODS)
    _checks.check_choice(OP, "regularization", regularization, REGULARIZATIONS)
    for name, value in (
        ("forgetting", forgetting), ("process_noise", process_noise), ("rho", rho),
    ):  # fmt: skip
        if isinstance(value, Tensor):
            raise TypeError(f"{OP}: {name} must be a number, got a tensor")
    _checks.check_scalar(OP, "forgetting", forgetting, low=0.0, high=1.0, open_low=True)
    _checks.check_scalar(OP, "process_noise", process_noise, low=0.0)
    _checks.check_scalar(OP, "rho", rho, low=0.0)
    if not means:
        raise ValueError(f"{OP}: mean must have at least one block, got an empty list")
    dtype = means[0].dtype
    _checks.check_dtype(OP, "mean" if single else "mean[0]", means[0], _checks.STATE_DTYPES)
    _checks.check_dtype(OP, "innovation", innovation, [dtype])
    _checks.check_rank(OP, "innovation", innovation, 1, "[C]")
    outputs = innovation.shape[0]
    noise = _checked_noise(noise, innovation, likelihood)
    for i, block in enumerate(zip(means, variances, jacobians, strict=True)):
        at = "" if single else f"[{i}]"
        names = [f"mean{at}", f"variance{at}", f"jacobian{at}"]
        for name, tensor in zip(names[:2], block[:2], strict=True):
            _checks.check_dtype(OP, name, tensor, [dtype])
        dtypes = [dtype, *(HALF_DTYPES if dtype == torch.float32 else ())]
        x = inputs[factored.index(i)] if i in factored else None
        if x is None:
            _checks.check_dtype(OP, names[2], block[2], dtypes)
        _checks.check_rank(OP, names[0], block[0], 1, "[d]")
        d = block[0].shape[0]
        _checks.check_shape(OP, names[1], block[1], [d], "as mean")
        if x is None:
            _checks.check_shape(OP, names[2], block[2], [outputs, d], "outputs C, parameters d")
        else:
            kronecker.check_block(OP, names[2], block[2], x, (outputs, d), dtypes)
        for name, tensor in zip(names[:2], block[:2], strict=True):
            _checks.check_no_self_overlap(OP, name, tensor)
        tensors: dict[str, Tensor | None] = {"innovation": innovation, "noise": noise}
        tensors |= dict(zip(names, block, strict=True))
        _checks.check_device(OP, tensors | {f"inputs of {names[2]}": x})
    return _kalman_update_op(
        [t.detach() for t in means],
        [t.detach() for t in variances],
        [t.detach() for t in (*jacobians, *inputs)],
        innovation.detach(),
        noise.detach(),
        form,
        likelihood,
        float(forgetting),
        float(process_noise),
        float(rho),
        regularization,
        factored or None,
    )


def _usual_call(
    mean: Tensor | Sequence[Tensor],
    variance: Tensor | Sequence[Tensor],
    jacobian: Jacobian | Sequence[Jacobian],
    innovation: Tensor,
    noise: float | Tensor,
    *,
    form: str,
    likelihood: str,
    forgetting: float,
    process_noise: float,
    rho: float,
    regularization: str,
) -> Tensor | None:
    """Run a call on CPU tensors at once where nothing about it is unusual, else return None.

    What is accepted here passes every check of the general way, but for shapes, dtypes and overlaps, which
    the C++ operator looks at before it writes: what it refuses goes the general way, where the error is
    said in the user's terms. The general way takes longer than the update of a small net.

    Raises:
        RuntimeError: The operator failed for another reason, such as memory.
    """
    if isinstance(mean, Tensor):
        if not (isinstance(variance, Tensor) and isinstance(jacobian, (Tensor, KroneckerJacobian))):
            return None
        means, variances, jacobians = [mean], [variance], [jacobian]
    else:
        if not (type(mean) is type(variance) is type(jacobian) is list and mean):
            return None
        means, variances, jacobians = mean, variance, jacobian  # type: ignore[assignment]
    rows, inputs, factored = kronecker.split(jacobians)
    if (
        not _dispatch.runs_at_once()
        or not _dispatch.serves_cpu()
        or form not in FORMS
        or likelihood not in LIKELIHOODS
        or regularization not in REGULARIZATIONS
        or type(forgetting) is not float
        or not 2.0**-149 < forgetting <= 1.0
        or type(process_noise) is not float
        or not 0.0 <= process_noise <= LARGEST
        or type(rho) is not float
        or not 0.0 <= rho <= LARGEST
        or not _is_usual(innovation)
        or innovation.dim() != 1
        or not 0 < innovation.shape[0] <= cpu.MAX_OUTPUTS
        or not all(map(_is_usual, means))
        or not all(map(_is_usual, variances))
        or not all(map(_is_usual, rows))
        or not all(map(_is_usual, inputs))
    ):
        return None
    if isinstance(noise, Tensor):
        if not _is_usual(noise):
            return None
    elif type(noise) is not float or likelihood != "gaussian" or not 2.0**-149 <= noise <= LARGEST:
        return None
    try:
        info = cpu.call(
            means, variances, rows, innovation, noise, form=form, likelihood=likelihood,
            forgetting=forgetting, process_noise=process_noise, rho=rho, regularization=regularization,
            inputs=inputs, factored=factored,
        )  # fmt: skip
    except RuntimeError as error:
        if "grng: " in str(error):
            return None
        raise
    torch.autograd.graph.increment_version(means)
    torch.autograd.graph.increment_version(variances)
    return info


def _is_usual(t: Tensor) -> bool:
    return (
        type(t) is Tensor
        and t.is_cpu
        and t.dtype in FAST_DTYPES
        and t.layout is torch.strided
        and not t.requires_grad
    )


def _checked_noise(noise: float | Tensor, innovation: Tensor, likelihood: str) -> Tensor:
    outputs = innovation.shape[0]
    if not isinstance(noise, Tensor):
        if likelihood != "gaussian":
            wanted = {"categorical": "probabilities [C]", "fisher": "root [C, k]"}[likelihood]
            raise TypeError(
                f"{OP}: noise must be the {wanted} with likelihood={likelihood!r}, "
                f"got {type(noise).__name__}"
            )
        _checks.check_scalar(OP, "noise", noise, low=0.0, open_low=True)
        return noise * torch.eye(outputs, dtype=innovation.dtype, device=innovation.device)
    _checks.check_dtype(OP, "noise", noise, [innovation.dtype])
    shape = list(noise.shape)
    if likelihood == "fisher":
        if len(shape) != 2 or shape[0] != outputs or shape[1] > outputs:
            raise ValueError(
                f"{OP}: noise must have shape [C, k] with k <= C = {outputs}, got {shape}"
            )
    elif likelihood == "categorical":
        if len(shape) == 2 and noise.numel() == outputs:
            return noise
        _checks.check_shape(OP, "noise", noise, [outputs], "class probabilities")
    elif len(shape) == 1:
        _checks.check_shape(OP, "noise", noise, [outputs], "diagonal of the noise")
        return torch.diag(noise)
    else:
        _checks.check_shape(OP, "noise", noise, [outputs, outputs], "as innovation [C]")
    return noise


@operator("kalman_update_", mutates_args=("means", "variances"))
def _kalman_update_op(
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    jacobians: Sequence[Tensor],
    innovation: Tensor,
    noise: Tensor,
    form: str,
    likelihood: str,
    forgetting: float,
    process_noise: float,
    rho: float,
    regularization: str,
    factored: Sequence[int] | None = None,
) -> Tensor:
    # Behind the Jacobians lie the inputs of the blocks `factored`: schemas have no optional lists of tensors.
    jacobians, inputs = jacobians[: len(means)], jacobians[len(means) :]
    factored = factored or []
    blocks = range(len(means))
    _checks.check_no_overlap(
        OP,
        [(f"mean[{i}]", means[i]) for i in blocks]
        + [(f"variance[{i}]", variances[i]) for i in blocks],
        [(f"jacobian[{i}]", jacobians[i]) for i in blocks]
        + [(f"inputs of jacobian[{i}]", x) for i, x in zip(factored, inputs, strict=True)]
        + [("innovation", innovation), ("noise", noise)],
    )
    outputs = innovation.shape[0]
    if outputs == 0 or all(m.numel() == 0 for m in means):
        return torch.zeros((), dtype=torch.int32, device=innovation.device)
    problem = cpu.unsupported(means, variances, innovation)
    backend = _dispatch.select(
        OP,
        innovation.device,
        cpu=problem,
        **gpu.unsupported(
            problem, [h for i, h in enumerate(jacobians) if i not in factored], outputs
        ),
    )
    fused = backend == "cpu" and outputs <= cpu.MAX_OUTPUTS
    given = [*jacobians, *inputs]
    if factored and not fused:
        jacobians = kronecker.expand(jacobians, inputs, factored, innovation.dtype)
    run: Callable[..., Tensor]
    if backend == "reference":
        run = _run_reference
    elif fused:
        run = functools.partial(cpu.call, inputs=inputs, factored=factored)
    elif backend == "triton":
        run = gpu.run_triton
    else:
        run = functools.partial(_run_by_parts, given=given)
    return run(
        means,
        variances,
        jacobians,
        innovation,
        noise,
        form=form,
        likelihood=likelihood,
        forgetting=forgetting,
        process_noise=process_noise,
        rho=rho,
        regularization=regularization,
    )


def _run_by_parts(
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    jacobians: Sequence[Tensor],
    innovation: Tensor,
    noise: Tensor,
    *,
    form: str,
    likelihood: str,
    forgetting: float,
    process_noise: float,
    rho: float,
    regularization: str,
    given: Sequence[Tensor],
) -> Tensor:
    """The two passes of the CUDA kernel, or of the C++ kernel for many outputs, and torch between them.

    ``given`` is what the user gave for the Jacobian; in ``jacobians`` every block is dense.
    """
    outputs = innovation.shape[0]
    if innovation.is_cuda:
        jacobians = [h.to(innovation.dtype) for h in jacobians]
        jacobians = [h if h.stride(1) == 1 else h.contiguous() for h in jacobians]
    gram = torch.zeros(outputs, outputs, dtype=torch.float64, device=innovation.device)
    torch.ops.grng._kalman_gram_(gram, variances, jacobians)
    plain_gram = None
    if rho > 0:
        plain_gram = torch.zeros_like(gram)
        torch.ops.grng._kalman_gram_(plain_gram, [torch.ones_like(v) for v in variances], jacobians)
    direction, whitener, info = gain_from_gram(
        gram,
        plain_gram,
        innovation,
        noise,
        form=form,
        likelihood=likelihood,
        rho=rho,
        regularization=regularization,
        mean_max=largest_magnitude(means),
        variance_max=largest_magnitude(variances),
    )
    if (
        not innovation.is_cuda
        and info == int(Info.OVERFLOW)
        and not reference.all_finite(list(given))
    ):
        info.fill_(int(Info.NONFINITE_INPUT))
    if whitener.shape[0] < outputs:
        whitener = torch.nn.functional.pad(whitener, (0, 0, 0, outputs - whitener.shape[0]))
    torch.ops.grng._kalman_apply_(
        means,
        variances,
        jacobians,
        direction,
        whitener,
        info,
        form == "vdekf",
        forgetting,
        process_noise,
    )
    return info


@_kalman_update_op.register_fake
def _(
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    jacobians: Sequence[Tensor],
    innovation: Tensor,
    noise: Tensor,
    form: str,
    likelihood: str,
    forgetting: float,
    process_noise: float,
    rho: float,
    regularization: str,
    factored: Sequence[int] | None = None,
) -> Tensor:
    return innovation.new_empty((), dtype=torch.int32)


def _run_reference(
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    jacobians: Sequence[Tensor],
    innovation: Tensor,
    noise: Tensor,
    *,
    form: str,
    likelihood: str,
    forgetting: float,
    process_noise: float,
    rho: float,
    regularization: str,
) -> Tensor:
    sizes = [m.shape[0] for m in means]
    mean, variance, info = reference.kalman_update(
        torch.cat(list(means)),
        torch.cat(list(variances)),
        torch.cat([h.to(innovation.dtype) for h in jacobians], dim=1),
        innovation,
        noise,
        form=form,
        likelihood=likelihood,
        forgetting=forgetting,
        process_noise=process_noise,
        rho=rho,
        regularization=regularization,
    )
    for target, source in zip(means, mean.split(sizes), strict=True):
        target.copy_(source)
    for target, source in zip(variances, variance.split(sizes), strict=True):
        target.copy_(source)
    return info

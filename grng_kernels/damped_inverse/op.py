# SPDX-License-Identifier: Apache-2.0
"""``damped_inverse``: the public function, its checks, and the grouping of equal sizes."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from grng_kernels import _checks, _dispatch
from grng_kernels._register import operator
from grng_kernels.damped_inverse import cpu, cuda_small, reference, triton
from grng_kernels.damped_inverse.entry import Entry
from grng_kernels.damped_inverse.reference import DampedInverse

OP = "damped_inverse"
METHODS = ("auto", "cholesky", "newton_schulz")
PRECISIONS = ("auto", "fp32")
# A larger one goes the general way, which refuses what fp32 cannot hold.
LARGE_RHO = 1e6
# Up to this order the inverses of a list share buffers on the CPU.
SHARED_BUFFER_ORDER = 128
# Damping below the rounding of the diagonal is no damping at all.
SMALLEST_RHO = (4 * torch.finfo(torch.float32).eps) ** 2


def damped_inverse(
    factor: Tensor | Sequence[Tensor],
    *,
    rho: float | None = None,
    damping: float | Tensor | Sequence[Tensor] | None = None,
    method: str = "auto",
    precision: str = "auto",
    spectral_vector: Tensor | Sequence[Tensor] | None = None,
) -> DampedInverse:
    """Inverse of damped symmetric PSD matrices: ``X ≈ (factor + damping·I)⁻¹``.

    Torch equivalent: ``torch.cholesky_inverse(torch.linalg.cholesky(factor + damping * I))``.

    Args:
        factor: Symmetric PSD, ``[N, N]``, ``[L, N, N]``, or a list of ``[N, N]`` of mixed sizes; fp32,
            bf16, fp16 (both computed in fp32) or fp64; any strides. The mean of the two triangles is
            inverted; one that is asymmetric beyond rounding is reported, see ``info``.
        rho: Relative regulariser, > 0, dimensionless: the damping is ``max(√rho·s, 1e-36)`` with ``s`` the
            estimate of ``‖factor‖₂``, which bounds the condition number by ``1 + 1/√rho``.
        damping: Absolute regulariser instead of ``rho``, > 0, in units of ``factor``: a number, a tensor
            (0-d or ``[L]``) or, for a list of matrices, a list of 0-d tensors.
        method: ``"cholesky"`` (a factorisation or an elimination), ``"newton_schulz"`` (a number of products
            fixed by ``rho`` alone; needs ``rho``), or ``"auto"``, the faster of those that keep the accuracy
            below: today ``"cholesky"`` everywhere.
        precision: ``"auto"`` or ``"fp32"``, the same: which products a kernel takes inside is fixed by its
            method, and no other name is accepted.
        spectral_vector: ``[N]``, ``[L, N]`` or a list of ``[N]``: state of the norm estimate, updated in
            place where ``info`` is 0. Start it with zeros: the estimate sharpens from refresh to refresh.

    Returns:
        :class:`DampedInverse` ``(inverse, damping, spectral_norm, residual, info)``, tensors for a tensor
        and lists for a list (on the CPU small inverses of one order then share their storage).
        ``residual`` is measured, not predicted: up to order 16 (on the CPU 32) by the whole product, and
        beyond through 16 fixed vectors of signs, which estimate its square without bias (standard
        deviation 35 % at worst). Near 1e-6 the rounding of its own products is most of it, so that it is
        high rather than low. It has no meaning where ``info`` is not 0.
        ``info`` is ``NONFINITE_INPUT`` for a matrix with NaN or infinity, or a damping on the device that
        is not positive; ``ASYMMETRIC`` where two mirrored entries differ by more than ``√eps`` of the largest
        entry (``eps`` of the dtype of ``factor``, for fp64 that of fp32), which no rounding of sums explains:
        the reference and the CPU kernel look for it, the Triton and CUDA kernels take the mean unasked;
        ``NOT_CONVERGED`` where the factorisation failed or the residual exceeds 1e-2; ``OVERFLOW`` where the
        inverse leaves the range of its dtype. That matrix must not be used, and the others are bitwise what
        they would be without the fault. A zero matrix gives ``I/1e-36``.

    Raises:
        TypeError: A dtype or layout that is not accepted.
        ValueError: A wrong shape, device, number or name.

    Accuracy: at most twice the error of PyTorch in the same dtype against fp64.
    Several matrices are compared with PyTorch together: a single one may flatter either by luck. The
    Triton kernels have shown it in the interpreter and with emulated products, not yet on a GPU.
    Cost: ``N³`` FLOPs for the inverse, ``64N²`` for the residual, at most ``34N²`` for the norm.
    Source: Dash et al. 2026 (GRNG) for the spectral damping.
    """
    usual = _usual_call(factor, rho, damping, method, precision, spectral_vector)
    if usual is not None:
        return usual
    factors = _checks.as_list(OP, "factor", factor)
    single = isinstance(factor, Tensor)
    for i, f in enumerate(factors):
        name = "factor" if single else f"factor[{i}]"
        _checks.check_dtype(OP, name, f)
        _check_matrices(name, f, batched=single)
        _checks.check_device(OP, {"factor" if single else "factor[0]": factors[0], name: f})
    _check_numbers(rho, damping, method, precision)
    dampings = _per_matrix("damping", damping, factors, single, trailing=0)
    vectors = _per_matrix("spectral_vector", spectral_vector, factors, single, trailing=1)
    if not factors:
        return DampedInverse([], [], [], [], [])
    *tensors, results, wide, info = _damped_inverse_op(
        [_batched(f) for f in factors],
        None if rho is None else float(rho),
        [d.detach() for d in dampings],
        method,
        [v.detach() if v.dim() == 2 else v.detach().unsqueeze(0) for v in vectors],
    )
    inverses = tensors[: len(factors)]
    for vector, new in zip(vectors, tensors[len(factors) :], strict=True):
        vector.detach().copy_(new.view(vector.shape))
    if not single:
        for k, f in enumerate(factors):
            inverses[k] = inverses[k].view(f.shape)
        return _listed(inverses, results, wide, info)
    inverse = inverses[0].view(factors[0].shape)
    values = wide if inverse.dtype == torch.float64 else results
    scalars = [v.view(inverse.shape[:-2]) for v in (*values, info)]
    return DampedInverse(inverse, *scalars)


def _listed(inverses: list[Tensor], results: Tensor, wide: Tensor, info: Tensor) -> DampedInverse:
    columns = [list(row.unbind()) for row in results]
    if wide.numel():
        for column, row in zip(columns, wide, strict=True):
            for i, x in enumerate(inverses):
                if x.dtype == torch.float64:
                    column[i] = row[i]
    return DampedInverse._make([inverses, *columns, list(info.unbind())])


def _usual_call(
    factor: Tensor | Sequence[Tensor],
    rho: float | None,
    damping: object,
    method: str,
    precision: str,
    vector: Tensor | Sequence[Tensor] | None,
) -> DampedInverse | None:
    """Run a call on CPU tensors at once where nothing about it is unusual, else return None.

    What is accepted here passes every check of the general way but the one that the C++ operator repeats.
    The general way takes longer than the inverses of a small LoRA model.

    Raises:
        RuntimeError: The operator failed for another reason, such as memory.
    """
    single = isinstance(factor, Tensor)
    factors = [factor] if isinstance(factor, Tensor) else factor
    if (
        not _dispatch.runs_at_once()
        or not _dispatch.serves_cpu()
        or damping is not None
        or type(rho) is not float
        or not SMALLEST_RHO <= rho <= LARGE_RHO
        or method not in ("auto", "cholesky")
        or precision not in PRECISIONS
        or not isinstance(factors, list)
        or not factors
        or not all(_is_usual(f, batched=single) for f in factors)
    ):
        return None
    vectors = _usual_vectors(vector, factors, single)
    if vectors is None:
        return None
    try:
        if not single:
            return _usual_list(factors, vectors, rho)
        inverse = torch.empty_like(factors[0], memory_format=torch.contiguous_format)
        results, info = cpu.call([inverse], vectors, factors, [], rho, inverse.shape[:-2])
    except RuntimeError as error:
        if "overlap" in str(error):  # found before anything was written: said in the user's terms
            return None
        raise
    if vectors:
        torch.autograd.graph.increment_version(vectors)
    return DampedInverse._make((inverse, *results.unbind(), info))


def _usual_list(factors: list[Tensor], vectors: list[Tensor], rho: float) -> DampedInverse:
    # Small inverses of one order lie in one buffer: a tensor from an allocation of its own takes longer than
    # its inverse. They are cut out of it in order, so the matrices are put in the order of their sizes.
    sizes = [len(f) for f in factors]
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    buffers: list[Tensor] = []
    inverses: list[Tensor] = []
    for n, run in itertools.groupby(order, key=sizes.__getitem__):
        count = sum(1 for _ in run)
        for rows in [n * count] if n <= SHARED_BUFFER_ORDER else [n] * count:
            buffers.append(torch.empty((rows, n), dtype=torch.float32, device="cpu"))
            # Not views: each is a tensor of its own to autograd.
            inverses += torch.unsafe_split(buffers[-1], n)
    ordered = order == sorted(order)
    results, info = cpu.call(
        buffers,
        vectors if ordered or not vectors else [vectors[i] for i in order],
        factors if ordered else [factors[i] for i in order],
        [],
        rho,
        (len(factors),),
    )
    if vectors:
        torch.autograd.graph.increment_version(vectors)
    columns = [inverses, *map(list, map(Tensor.unbind, (*results.unbind(), info)))]
    if not ordered:
        places = sorted(range(len(order)), key=order.__getitem__)
        columns = [[column[i] for i in places] for column in columns]
    return DampedInverse._make(columns)


def _usual_vectors(
    vector: Tensor | Sequence[Tensor] | None, factors: list[Tensor], single: bool
) -> list[Tensor] | None:
    if vector is None:
        return []
    vectors = [vector] if isinstance(vector, Tensor) else vector
    if isinstance(vector, Tensor) != single or not isinstance(vectors, list):
        return None
    if len(vectors) != len(factors) or not all(map(_is_usual_vector, vectors, factors)):
        return None
    return vectors


def _is_usual(f: Tensor, *, batched: bool) -> bool:
    if not (
        type(f) is Tensor
        and f.dtype is torch.float32
        and f.is_cpu
        and f.layout is torch.strided
        and not f.requires_grad
    ):
        return False
    shape = f.shape
    return (
        (len(shape) == 2 or (batched and len(shape) == 3))
        and shape[-1] == shape[-2]
        and 0 not in shape
    )


def _is_usual_vector(v: Tensor, f: Tensor) -> bool:
    return (
        type(v) is Tensor
        and v.dtype is torch.float32
        and v.is_cpu
        and not v.requires_grad
        and v.shape == f.shape[:-1]
        and v.is_contiguous()
    )


def _batched(factor: Tensor) -> Tensor:
    return factor.detach() if factor.dim() == 3 else factor.detach().unsqueeze(0)


def _check_matrices(name: str, factor: Tensor, *, batched: bool) -> None:
    square = factor.dim() in ((2, 3) if batched else (2,)) and factor.shape[-1] == factor.shape[-2]
    if not square:
        form = "[N, N] or [L, N, N]" if batched else "[N, N]"
        raise ValueError(f"{OP}: {name} must be square, {form}, got shape {list(factor.shape)}")


def _check_numbers(rho: float | None, damping: object, method: str, precision: str) -> None:
    _checks.check_choice(OP, "method", method, METHODS)
    _checks.check_choice(OP, "precision", precision, PRECISIONS)
    if (rho is None) == (damping is None):
        raise ValueError(f"{OP}: give rho (relative) or damping (absolute), and not both")
    if rho is not None:
        if isinstance(rho, Tensor):
            raise TypeError(f"{OP}: rho must be a number: it decides the schedule, got a tensor")
        _checks.check_scalar(OP, "rho", rho, low=0.0, open_low=True)
        if rho < SMALLEST_RHO:
            raise ValueError(
                f"{OP}: rho must be at least {SMALLEST_RHO:.1e}: its root is added relative to the largest "
                f"eigenvalue and would round away in fp32, got {rho}"
            )
    if isinstance(damping, (int, float)):
        _checks.check_scalar(OP, "damping", damping, low=0.0, open_low=True)
    if method == "newton_schulz" and rho is None:
        raise ValueError(
            f"{OP}: method 'newton_schulz' needs rho, which bounds the condition number"
        )


def _per_matrix(
    name: str,
    value: float | Tensor | Sequence[Tensor] | None,
    factors: Sequence[Tensor],
    single: bool,
    *,
    trailing: int,
) -> list[Tensor]:
    """Return one tensor per factor, or none; ``trailing`` is how many dimensions of it are kept.

    Raises:
        TypeError: A number where only tensors make sense.
    """
    if value is None:
        return []
    if isinstance(value, (int, float)):
        if trailing:
            raise TypeError(f"{OP}: {name} must be a tensor or a list of tensors, got a number")
        return [
            torch.full(f.shape[: f.dim() - 2], float(value), dtype=_state_dtype(f), device=f.device)
            for f in factors
        ]
    if isinstance(value, Tensor) and value.dim() == 0 and trailing == 0:
        value = [value.expand(f.shape[: f.dim() - 2]) for f in factors]
    items = _checks.as_list(OP, name, value)
    _checks.check_lengths(OP, factor=factors, **{name: items})
    for i, (item, f) in enumerate(zip(items, factors, strict=True)):
        full = name if single else f"{name}[{i}]"
        _checks.check_dtype(OP, full, item)
        _checks.check_shape(OP, full, item, f.shape[: f.dim() - 2 + trailing], "as factor")
        _checks.check_device(OP, {"factor": f, full: item})
        if trailing == 1:
            _checks.check_no_self_overlap(OP, full, item)
    return items


def _state_dtype(factor: Tensor) -> torch.dtype:
    return torch.float64 if factor.dtype == torch.float64 else torch.float32


@operator("damped_inverse")
def _damped_inverse_op(
    factors: Sequence[Tensor],
    rho: float | None,
    damping: Sequence[Tensor],
    method: str,
    vectors: Sequence[Tensor],
) -> list[Tensor]:
    """The inverse per entry of ``factors`` ``[L, N, N]``, the new ``vectors``, and the scalars of all.

    Those are ``[3, matrices]`` (damping, norm, residual) in fp32, the same in fp64 (empty where no factor
    is), and ``info`` ``[matrices]``. ``damping`` and ``vectors`` may be empty. The vectors are not mutated
    here: the compiler accepts no operator that does so and returns a list.
    """
    _checks.check_no_overlap(
        OP,
        [(f"spectral_vector[{i}]", v) for i, v in enumerate(vectors)],
        [(f"factor[{i}]", f) for i, f in enumerate(factors)],
    )
    inverses, results, wide, info = _empty_results(factors)
    lengths = [f.shape[0] for f in factors]
    columns = [
        [*zip(*(row.split(lengths) for row in scalars), strict=True)]
        for scalars in (results, wide)
        if scalars.numel()
    ]
    codes = info.split(lengths)
    entries, starts = [], []
    for i, (f, x) in enumerate(zip(factors, inverses, strict=True)):
        start = x.new_zeros(f.shape[:2])
        if vectors:
            start.copy_(vectors[i])
        given = damping[i].reshape(-1).to(x.dtype).contiguous() if damping else None
        if x.numel():
            scalars = columns[-1 if x.dtype == torch.float64 else 0][i]
            entries.append(Entry._make([f, given, start, x, *scalars, codes[i]]))
        starts.append(start)
    places: dict[str, list[Entry]] = {}
    for entry in entries:
        places.setdefault(_backend(entry, rho, method), []).append(entry)
    for backend, group in places.items():
        _RUN[backend](group, rho, method)
    new = [starts[i].to(v.dtype) for i, v in enumerate(vectors)]
    return [*inverses, *new, results, wide, info]


def _backend(entry: Entry, rho: float | None, method: str) -> str:
    return _dispatch.select(
        OP,
        entry.factor.device,
        cpu=cpu.unsupported(entry, method),
        cuda=cuda_small.unsupported(entry, method),
        triton=triton.unsupported(entry),
    )


# What runs entries of one backend: ``(entries, rho, method)``.
_RUN: dict[str, Callable[[Sequence[Entry], float | None, str], None]] = {
    "reference": reference.run,
    "cpu": cpu.run,
    "cuda": cuda_small.run,
    "triton": triton.run,
}


@_damped_inverse_op.register_fake
def _(
    factors: Sequence[Tensor],
    rho: float | None,
    damping: Sequence[Tensor],
    method: str,
    vectors: Sequence[Tensor],
) -> list[Tensor]:
    inverses, *scalars = _empty_results(factors)
    new = [torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in vectors]
    return [*inverses, *new, *scalars]


def _empty_results(factors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    device = factors[0].device
    inverses = [torch.empty(f.shape, dtype=_state_dtype(f), device=device) for f in factors]
    total = sum(f.shape[0] for f in factors)
    wide = total if any(x.dtype == torch.float64 for x in inverses) else 0
    return (
        inverses,
        torch.zeros(3, total, dtype=torch.float32, device=device),
        torch.zeros(3, wide, dtype=torch.float64, device=device),
        torch.zeros(total, dtype=torch.int32, device=device),
    )

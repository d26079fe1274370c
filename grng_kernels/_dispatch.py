# SPDX-License-Identifier: Apache-2.0
"""Which backend serves a call: the fastest that can, or the one that was asked for."""

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")


class BackendStatus(NamedTuple):
    """Whether a backend can run on this machine, and the reason or a remark."""

    available: bool
    reason: str


def _named_backend(name: str, source: str) -> str:
    if name not in ("auto", *BACKENDS):
        raise ValueError(
            f"{source}: backend must be one of auto, {', '.join(BACKENDS)}, got {name!r}"
        )
    return name


_requested: ContextVar[str | None] = ContextVar("grng_backend", default=None)


def requested_backend() -> str:
    """Return the backend in force: ``use_backend``, else the variable GRNG_BACKEND, else ``auto``."""
    inner = _requested.get()
    if inner is not None:
        return inner
    return _named_backend(os.environ.get("GRNG_BACKEND", "auto"), "GRNG_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op of this package on one backend inside a ``with`` block.

    Args:
        name: ``"auto"`` (the fastest that supports the tensors), ``"reference"``, ``"cpu"``,
            ``"triton"`` or ``"cuda"``. A named backend that cannot serve a call is an error there;
            ``"auto"`` falls back to a slower one. The environment variable ``GRNG_BACKEND`` does the
            same for a whole process.

    Yields:
        Nothing.
    """
    token = _requested.set(_named_backend(name, "use_backend"))
    try:
        yield
    finally:
        _requested.reset(token)


@functools.cache
def extension_error() -> str | None:
    """Load the compiled extension; return why that failed, or None."""
    try:
        importlib.import_module("grng_kernels._C")
    except ImportError as error:
        return f"the compiled extension does not load ({error})"
    except OSError as error:
        return f"the compiled extension does not load: {error}"
    return None


def interpreting_triton() -> bool:
    """Return whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _triton_error() -> str | None:
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken Triton must not break the import of this package
        return f"triton does not import ({type(error).__name__}: {error})"
    if not torch.cuda.is_available() and not interpreting_triton():
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels in the interpreter)"
    return None


@functools.cache
def _cuda_error() -> str | None:
    problem = extension_error()
    if problem is not None:
        return problem
    if not importlib.import_module("grng_kernels._C").built_with_cuda:
        return "the extension was built without CUDA (nvcc was not found, or GRNG_BUILD_CUDA=0)"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return None


def _unavailable(backend: str) -> str | None:
    if backend == "cpu":
        return extension_error()
    if backend == "triton":
        return _triton_error()
    if backend == "cuda":
        return _cuda_error()
    return None


def backends() -> dict[str, BackendStatus]:
    """Return what can run on this machine, and why the rest cannot.

    Returns:
        One :class:`BackendStatus` for each of ``reference``, ``cpu``, ``triton``, ``cuda``.
    """
    remarks = {
        "reference": "plain PyTorch, every device",
        "cpu": "C++ kernels, CPU tensors",
        "triton": "interpreter, CPU tensors" if interpreting_triton() else "Triton, CUDA tensors",
        "cuda": "CUDA C++ kernels, CUDA tensors",
    }
    found = {}
    for name in BACKENDS:
        problem = _unavailable(name)
        found[name] = BackendStatus(problem is None, problem or remarks[name])
    return found


def _wrong_device(backend: str, device: torch.device) -> str | None:
    wanted = {
        "cpu": "cpu",
        "triton": "cpu" if interpreting_triton() else "cuda",
        "cuda": "cuda",
    }[backend]
    return None if device.type == wanted else f"it serves {wanted} tensors, got {device.type}"


@functools.cache
def _say_slow(problem: str) -> None:
    warnings.warn(
        f"grng_kernels: {problem}; CPU tensors run on the PyTorch reference, which is slower",
        RuntimeWarning,
        stacklevel=2,
    )


def runs_at_once() -> bool:
    """Return whether a call computes now: nothing traces, compiles, transforms or intercepts it.

    Then a C++ operator may be called without the Python operator around it, which exists for the rest and
    costs as much as the work of a small factor.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def serves_cpu() -> bool:
    """Return whether the C++ kernels serve CPU tensors now, for the ops that have one."""
    return requested_backend() in ("auto", "cpu") and extension_error() is None


def select(op: str, device: torch.device, **unsupported: str | None) -> str:
    """Choose the backend of one call.

    Args:
        op: Name of the public function, for messages.
        device: Where the tensors are.
        **unsupported: One entry for each fast backend that this op has, fastest first: why it cannot
            serve these tensors, or None.

    Returns:
        ``"reference"`` or one of the keys of ``unsupported``.

    Raises:
        RuntimeError: A backend was asked for by name and cannot serve the call.
    """
    wanted = requested_backend()
    if wanted == "reference":
        return wanted
    if wanted != "auto":
        if wanted not in unsupported:
            problem: str | None = f"{op} has no {wanted} kernel"
        else:
            problem = _unavailable(wanted) or _wrong_device(wanted, device) or unsupported[wanted]
        if problem:
            raise RuntimeError(f"{op}: backend {wanted!r} was asked for, but {problem}")
        return wanted
    for backend, problem in unsupported.items():
        # In the interpreter Triton is slower than the reference: only on request.
        if backend == "triton" and interpreting_triton():
            continue
        if _wrong_device(backend, device) or problem:
            continue
        missing = _unavailable(backend)
        if missing is None:
            return backend
        if backend == "cpu":
            _say_slow(missing)
    return "reference"

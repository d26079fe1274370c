# SPDX-License-Identifier: Apache-2.0
"""Which backend runs: by name, by environment, by what is there; and what is said when it cannot."""

import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch

import grng_kernels as gk
from grng_kernels import _dispatch


@pytest.fixture(autouse=True)
def no_backend_in_the_environment(monkeypatch):
    monkeypatch.delenv("GRNG_BACKEND", raising=False)


@pytest.fixture
def chosen(monkeypatch):
    """The backends that were chosen, in order: by ``select``, or at once for usual CPU tensors."""
    names = []

    def serves_cpu():
        if at_once():
            names.append("cpu")
            return True
        return False

    at_once = _dispatch.serves_cpu
    monkeypatch.setattr(_dispatch, "serves_cpu", serves_cpu)

    def select(*args, **kwargs):
        names.append(original(*args, **kwargs))
        return names[-1]

    original = _dispatch.select
    monkeypatch.setattr(_dispatch, "select", select)
    return names


def update():
    factor = torch.eye(4)
    gk.kron_factor_update_(factor, torch.ones(3, 4), decay=0.5, scale=1.0)
    return factor


WANT = 0.5 * torch.eye(4) + 3
needs_extension = pytest.mark.skipif(
    not gk.backends()["cpu"].available, reason=gk.backends()["cpu"].reason
)

# ---- choice ----


@needs_extension
def test_automatic_choice_on_cpu_tensors_is_the_cpu_kernel(chosen):
    assert torch.equal(update(), WANT)
    assert chosen == ["cpu"]


@needs_extension
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_named_backend_runs(chosen, name):
    with gk.use_backend(name):
        assert torch.equal(update(), WANT)
    assert chosen == [name]


@needs_extension
def test_backends_nest_and_end_with_their_block(chosen):
    with gk.use_backend("reference"):
        update()
        with gk.use_backend("cpu"):
            update()
            with gk.use_backend("auto"):
                update()
        update()
    update()
    assert chosen == ["reference", "cpu", "cpu", "reference", "cpu"]


@needs_extension
def test_backend_ends_with_its_block_after_an_error(chosen):
    with pytest.raises(ZeroDivisionError), gk.use_backend("reference"):
        _ = 1 / 0
    update()
    assert chosen == ["cpu"]


def test_backend_of_one_thread_is_not_that_of_another():
    inside, leave, seen = threading.Event(), threading.Event(), []

    def other():
        with gk.use_backend("reference"):
            inside.set()
            leave.wait(10)
            seen.append(_dispatch.requested_backend())

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    assert _dispatch.requested_backend() == "auto"
    with gk.use_backend("cpu"):
        leave.set()
        thread.join()
    assert seen == ["reference"]


@needs_extension
def test_environment_variable_is_read_at_each_call(chosen, monkeypatch):
    monkeypatch.setenv("GRNG_BACKEND", "reference")
    update()
    monkeypatch.setenv("GRNG_BACKEND", "cpu")
    update()
    with gk.use_backend("reference"):
        update()
    assert chosen == ["reference", "cpu", "reference"]


@needs_extension
def test_unsupported_layout_falls_back(chosen):
    factor = torch.eye(8)[::2, ::2]
    gk.kron_factor_update_(factor, torch.ones(3, 4), decay=0.5, scale=1.0)
    assert torch.equal(factor, WANT)
    assert chosen == ["reference"]


# ---- errors ----


def test_unknown_name():
    with pytest.raises(ValueError) as caught, gk.use_backend("gpu"):
        pass
    assert str(caught.value) == (
        "use_backend: backend must be one of auto, reference, cpu, triton, cuda, got 'gpu'"
    )


def test_unknown_name_in_the_environment(monkeypatch):
    monkeypatch.setenv("GRNG_BACKEND", "fast")
    with pytest.raises(ValueError) as caught:
        update()
    assert str(caught.value) == (
        "GRNG_BACKEND: backend must be one of auto, reference, cpu, triton, cuda, got 'fast'"
    )


CALLS = {
    "kron_factor_update_": update,
    "kron_factor_conv2d_update_": lambda: gk.kron_factor_conv2d_update_(
        torch.eye(4), torch.ones(1, 1, 3, 3), kernel_size=2, decay=0.5
    ),
    "damped_inverse": lambda: gk.damped_inverse(torch.eye(4), rho=0.1),
    "kalman_update_": lambda: gk.kalman_update_(
        torch.zeros(4), torch.ones(4), torch.ones(2, 4), torch.ones(2), 1.0
    ),
    "precondition": lambda: gk.precondition(torch.ones(2, 3), torch.eye(2), torch.eye(3)),
    "rank1_precondition": lambda: gk.rank1_precondition(torch.ones(4), torch.ones(4), damping=0.1),
}
# What each op has beside the reference.
KERNELS = {
    "kron_factor_update_": {"cpu", "triton"},
    "kron_factor_conv2d_update_": {"cpu", "triton"},
    "damped_inverse": {"cpu", "cuda", "triton"},
    "kalman_update_": {"cpu", "cuda", "triton"},
    "precondition": {"cpu", "triton"},
    "rank1_precondition": {"cpu", "triton"},
}


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
@pytest.mark.parametrize("op", CALLS)
def test_named_backend_without_a_kernel_says_so(op, backend):
    if backend in KERNELS.get(op, ()):
        pytest.skip("it has one")
    with gk.use_backend(backend), pytest.raises(RuntimeError) as caught:
        CALLS[op]()
    assert str(caught.value) == (
        f"{op}: backend {backend!r} was asked for, but {op} has no {backend} kernel"
    )


@pytest.mark.parametrize(
    ("op", "backend"),
    [
        ("kron_factor_update_", "triton"),
        ("kron_factor_conv2d_update_", "triton"),
        ("kalman_update_", "cuda"),
        ("kalman_update_", "triton"),
        ("precondition", "triton"),
        ("rank1_precondition", "triton"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_named_backend_that_cannot_run_says_why(op, backend):
    with gk.use_backend(backend), pytest.raises(RuntimeError) as caught:
        CALLS[op]()
    assert str(caught.value).startswith(f"{op}: backend {backend!r} was asked for, but ")
    assert gk.backends()[backend].reason in str(caught.value)


def test_named_backend_on_another_device_says_so(monkeypatch):
    monkeypatch.setattr(_dispatch, "_triton_error", lambda: None)
    with (
        gk.use_backend("triton"),
        pytest.raises(RuntimeError, match="it serves cuda tensors, got cpu"),
    ):
        update()


def test_named_backend_that_does_not_take_the_dtype_says_so(monkeypatch):
    monkeypatch.setattr(_dispatch, "_triton_error", lambda: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with gk.use_backend("triton"), pytest.raises(RuntimeError, match="but it has no fp64 products"):
        gk.kron_factor_update_(torch.eye(4).double(), torch.ones(3, 4).double(), decay=0.5)


def test_error_leaves_the_state(monkeypatch):
    factor = torch.eye(4)
    with gk.use_backend("cuda"), pytest.raises(RuntimeError):
        gk.kron_factor_update_(factor, torch.ones(3, 4), decay=0.5)
    assert torch.equal(factor, torch.eye(4))


# ---- what is there ----


def test_backends_lists_four_with_reasons():
    found = gk.backends()
    assert list(found) == ["reference", "cpu", "triton", "cuda"]
    assert found["reference"] == (True, "plain PyTorch, every device")
    assert all(status.reason for status in found.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_backends_says_why_there_is_no_gpu_backend():
    found = gk.backends()
    assert not found["triton"].available
    assert (
        "triton does not import" in found["triton"].reason
        or "no CUDA device" in found["triton"].reason
    )
    assert not found["cuda"].available
    assert any(
        text in found["cuda"].reason
        for text in ("no CUDA device", "built without CUDA", "extension does not load")
    )


@pytest.fixture
def missing_extension(monkeypatch):
    monkeypatch.setattr(
        _dispatch, "extension_error", lambda: "the compiled extension does not load (test)"
    )
    _dispatch._cuda_error.cache_clear()
    _dispatch._say_slow.cache_clear()
    yield
    _dispatch._cuda_error.cache_clear()
    _dispatch._say_slow.cache_clear()


def test_without_the_extension_the_reference_runs_and_says_so_once(missing_extension, chosen):
    with pytest.warns(RuntimeWarning, match="the compiled extension does not load") as caught:
        assert torch.equal(update(), WANT)
        assert torch.equal(update(), WANT)
        CALLS["kalman_update_"]()
    assert [w.category for w in caught] == [RuntimeWarning]
    assert chosen == ["reference"] * 3


def test_without_the_extension_the_named_backend_is_an_error(missing_extension):
    with (
        gk.use_backend("cpu"),
        pytest.raises(RuntimeError, match="the compiled extension does not load"),
    ):
        update()
    assert gk.backends()["cpu"] == (False, "the compiled extension does not load (test)")
    assert gk.backends()["cuda"] == (False, "the compiled extension does not load (test)")


def test_asking_for_the_reference_warns_of_nothing(missing_extension):
    with warnings.catch_warnings(), gk.use_backend("reference"):
        warnings.simplefilter("error")
        update()


BARE = """
import sys, warnings
for name in ("grng_kernels._C", "triton"):
    sys.modules[name] = None  # as if it were not installed
warnings.simplefilter("ignore")
import torch
import grng_kernels as gk
found = gk.backends()
assert found["reference"].available and not found["cpu"].available, found
assert not found["triton"].available and not found["cuda"].available, found
assert "triton does not import" in found["triton"].reason, found
factor = torch.eye(4)
assert gk.kron_factor_update_(factor, torch.ones(3, 4), decay=0.5, scale=1.0).item() == 0
assert torch.equal(factor, 0.5 * torch.eye(4) + 3)
patches = torch.eye(4)
assert gk.kron_factor_conv2d_update_(patches, torch.ones(1, 1, 3, 3), kernel_size=2, decay=0.5).item() == 0
assert torch.equal(patches, 0.5 * torch.eye(4) + 0.5)
mean, variance = torch.zeros(4), torch.ones(4)
assert gk.kalman_update_(mean, variance, torch.ones(2, 4), torch.ones(2), 1.0).item() == 0
assert (variance < 1).all()
assert gk.damped_inverse(factor, rho=0.1).info.item() == 0
gk.precondition(torch.ones(2, 3), torch.eye(2), torch.eye(3))
gk.rank1_precondition(torch.ones(4), torch.ones(4), damping=0.1)
assert gk.rank1_step_(torch.ones(4), torch.ones(4), torch.ones(4), damping=0.1, lr=0.1).isfinite()
norm = gk.adam_moments_(torch.zeros(4), torch.zeros(4), torch.ones(4), step=1)
assert abs(norm.item() - 2) < 1e-6
gk.grafted_step_(*(torch.ones(4) for _ in range(4)), scale=norm, lr=0.1, step=1)
"""


def test_everything_works_with_neither_extension_nor_triton():
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("GRNG_", "TRITON_"))}
    done = subprocess.run(
        [sys.executable, "-c", BARE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_broken_triton_does_not_break_the_import(tmp_path):
    """A Triton that raises something else than ImportError, as one built for another machine may."""
    (tmp_path / "triton.py").write_text("raise OSError('libtriton.so: broken')\n")
    code = "import grng_kernels as gk; print(gk.backends()['triton'].reason)"
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "triton does not import (OSError: libtriton.so: broken)" in done.stdout

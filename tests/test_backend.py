"""Which path runs, what is said about it, and what happens where CuPy cannot."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from roi.kernels import KernelCompilationError

import roi
from roi import _backend as backend
from roi import cupy_path, roi_pool, torchvision_path
from roi._problem import Pooling

INPUT, BOXES = torch.arange(64.0).view(1, 1, 8, 8), torch.tensor([[0.0, 0, 0, 7, 7]])
EXPECTED = torch.tensor([[[[27.0, 31.0], [59.0, 63.0]]]])
CUDA = torch.device("cuda")
ARGUMENTS = ([INPUT], BOXES, Pooling((1.0,), 2, 2))


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_default", "auto")
    monkeypatch.setattr(backend, "_warned", set())
    monkeypatch.setattr(backend, "_last_problems", {})


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_cpu_tensors_take_the_torch_path(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(roi_pool(INPUT, BOXES, 2, backend=name), EXPECTED)


def test_cupy_on_the_cpu_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="backend 'cupy' cannot run roi_pool: its kernels run on CUDA tensors"):
        roi_pool(INPUT, BOXES, 2, backend="cupy")


def test_process_default() -> None:
    roi.set_default_backend("cupy")
    assert roi.default_backend() == "cupy"
    with pytest.raises(RuntimeError, match="cannot run roi_pool"):
        roi_pool(INPUT, BOXES, 2)
    assert torch.equal(roi_pool(INPUT, BOXES, 2, backend="torch"), EXPECTED)
    roi.set_default_backend("torch")
    assert roi.backend_info() == backend.BackendInfo("torch", "torch", "torch", "torch is the default of this process")
    with pytest.raises(ValueError, match="backend must be one of auto, torch, cupy, torchvision; got 'numpy'"):
        roi.set_default_backend("numpy")


@pytest.mark.parametrize(
    ("value", "outcome"),
    [
        ("torch", "(1, 1, 2, 2)"),
        ("auto", "(1, 1, 2, 2)"),
        ("cupy", "RuntimeError: backend 'cupy' cannot run roi_pool"),
        (
            "numpy",
            "ROI_BACKEND must be one of auto, torch, cupy, torchvision; got 'numpy'",
        ),
    ],
)
def test_environment_variable(value: str, outcome: str) -> None:
    program = "import torch, roi; print(tuple(roi.roi_pool(torch.zeros(1, 1, 8, 8), torch.zeros(1, 5), 2).shape))"
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"ROI_BACKEND": value}, check=False)
    assert outcome in (run.stdout if run.returncode == 0 else run.stderr)


def test_auto_falls_back_with_one_warning_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "cupy_problem", lambda device_type: "CuPy does not import (reason)")
    monkeypatch.setattr(backend, "torchvision_problem", lambda device_type: "torchvision has no operators")
    expected = r"roi_pool runs on the torch path.*CuPy does not import \(reason\); torchvision has no operators"
    with pytest.warns(UserWarning, match=expected) as caught:
        output = backend.run("max_pool", "roi_pool", CUDA, "auto", *ARGUMENTS)
    assert torch.equal(output, EXPECTED)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.run("max_pool", "roi_pool", CUDA, "auto", *ARGUMENTS)
    assert roi.backend_info().cuda == "torch"
    assert "(CuPy does not import (reason); torchvision has no operators)" in str(roi.backend_info())


def test_the_warning_points_at_the_users_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the public function, the dispatcher and autograd."""
    program = """
def run(function, operator, *rest):
    backend.warn(operator, "the torch path", [function])
    return original(function, operator, *rest)
"""
    inside: dict[str, Any] = {"__name__": "roi.inside", "backend": backend, "original": backend.run}
    exec(program, inside)
    monkeypatch.setattr(backend, "run", inside["run"])
    features = torch.rand(1, 2, 8, 8, requires_grad=True)
    for pool in (roi.roi_pool, roi.roi_align):
        with pytest.warns(UserWarning, match="slower than CuPy's kernels") as caught:
            pool(features, torch.tensor([[0.0, 0, 0, 5, 5]]), 2)
        assert caught[0].filename == __file__


@pytest.mark.torchvision
def test_torchvision_stands_in_for_cupy_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is needed to see which path is chosen: torchvision's operators run on the CPU too."""
    monkeypatch.setattr(backend, "cupy_problem", lambda device_type: "CuPy does not import (reason)")
    monkeypatch.setattr(backend, "torchvision_problem", lambda device_type: None)
    calls = count_calls(monkeypatch, "max_pool")
    with pytest.warns(UserWarning, match=r"roi_pool runs on torchvision's CUDA operators.*does not import \(reason\)"):
        output = backend.run("max_pool", "roi_pool", CUDA, "auto", *ARGUMENTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.run("max_pool", "roi_pool", CUDA, "auto", *ARGUMENTS)
    assert torch.equal(output, EXPECTED)
    assert calls == ["max_pool"] * 2
    assert str(roi.backend_info()).endswith("cpu -> torch; cuda -> torchvision (CuPy does not import (reason))")


@pytest.mark.torchvision
def test_torchvision_where_a_kernel_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pyramid of nine levels is more than the kernels take, and torchvision's operators take it."""
    monkeypatch.setattr(backend, "cupy_problem", lambda device_type: None)
    monkeypatch.setattr(backend, "torchvision_problem", lambda device_type: None)
    calls = count_calls(monkeypatch, "max_pool")
    pooling = Pooling((1.0,) * 9, 2, 2)
    with pytest.warns(UserWarning, match="torchvision's CUDA operators.*at most 8 levels, got 9"):
        output = backend.run("max_pool", "multiscale_roi_pool", CUDA, "auto", [INPUT] * 9, BOXES, pooling)
    assert torch.equal(output, EXPECTED)
    assert calls == ["max_pool"]


@pytest.mark.torchvision
def test_torchvision_as_the_default_of_the_process() -> None:
    roi.set_default_backend("torchvision")
    assert roi.backend_info().cpu == "torchvision"
    assert torch.equal(roi_pool(INPUT, BOXES, 2), EXPECTED)


def test_torchvision_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.ops", None)
    backend.torchvision_problem.cache_clear()
    try:
        with pytest.raises(
            RuntimeError, match="backend 'torchvision' cannot run roi_pool: torchvision does not import"
        ):
            roi_pool(INPUT, BOXES, 2, backend="torchvision")
    finally:
        backend.torchvision_problem.cache_clear()


def count_calls(monkeypatch: pytest.MonkeyPatch, function: str) -> list[str]:
    """The calls of a function of torchvision's path from now on."""
    calls: list[str] = []
    whole = getattr(torchvision_path, function)

    def counted(*args: object) -> object:
        calls.append(function)
        return whole(*args)

    monkeypatch.setattr(torchvision_path, function, counted)
    return calls


@pytest.mark.parametrize(
    "error", [KernelCompilationError("log of the compiler"), cupy_path.KernelLimitError("too large")]
)
def test_a_kernel_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(backend, "cupy_problem", lambda device_type: None)
    monkeypatch.setattr(cupy_path, "max_pool", fail, raising=False)
    assert roi.backend_info().cuda == "cupy"
    with pytest.raises(RuntimeError, match=str(error)):
        backend.run("max_pool", "roi_pool", CUDA, "cupy", *ARGUMENTS)
    with pytest.warns(UserWarning, match=str(error)):
        output = backend.run("max_pool", "roi_pool", CUDA, "auto", *ARGUMENTS)
    assert torch.equal(output, EXPECTED)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_device_the_reason_is_that() -> None:
    assert backend.cupy_problem("cuda") == "this torch sees no CUDA device"
    assert str(roi.backend_info()) == (
        "RoI operators (default auto): cpu -> torch; cuda -> torch (this torch sees no CUDA device)"
    )

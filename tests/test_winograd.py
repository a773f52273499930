"""Winograd's convolution beside the plain one in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fpn._activation import RELU
from fpn.inference import winograd
from fpn.inference.fused_conv import FusedConv2d, one_pass_works
from tests.reference.comparison import relative_error

# The transforms, with factors of up to 8, cost some bits: by norm, four times the error of the plain sum, 6e-7.
ALLOWED = 5e-6

needs_mkl = pytest.mark.skipif(
    not (torch.backends.mkl.is_available() and one_pass_works(torch.float32)), reason="this torch has no MKL"
)


def problem(
    batch: int, channels: int, out: int, height: int, width: int, bias: bool = True
) -> tuple[nn.Conv2d, Tensor]:
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, out, 3, padding=1, bias=bias).requires_grad_(False)
    return conv, torch.randn(batch, channels, height, width).contiguous(memory_format=torch.channels_last)


def exact(conv: nn.Conv2d, x: Tensor) -> Tensor:
    wide: Tensor = copy.deepcopy(conv).double()(x.double())
    return wide


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("channels", "out"), [(3, 5), (128, 128), (160, 64), (64, 256)])
@pytest.mark.parametrize(
    ("batch", "height", "width"),
    [
        (1, 1, 1), (1, 4, 4), (2, 5, 3), (3, 1, 9), (1, 120, 33), (5, 14, 14), (40, 7, 7), (2, 47, 61), (1, 3, 700),
    ],
)  # fmt: skip
def test_equals_the_plain_convolution(batch: int, height: int, width: int, channels: int, out: int, bias: bool) -> None:
    """Of one tile and of many, of maps in several parts and of several maps in a part, whole and cut off tiles."""
    conv, x = problem(batch, channels, out, height, width, bias)
    weight = winograd.transform(conv, x)
    expected = exact(conv, x)
    addend = torch.randn_like(expected, dtype=torch.float32)
    before = x.clone(), addend.clone()
    for addition in (None, addend):
        for relu in (False, True):
            y = winograd.conv2d(x, weight, conv.bias, addition, RELU if relu else None)
            wanted = expected if addition is None else expected + addition
            assert relative_error(y, wanted.relu() if relu else wanted) < ALLOWED
            assert y.shape == expected.shape
            assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, before[0])
    assert torch.equal(addend, before[1])


@pytest.mark.parametrize("size", [24, 40, 300])
def test_parts_are_even(size: int) -> None:
    for most in (0, 1, 7, 24, 1000):
        share = winograd.even_share(size, most)
        parts = -(-size // share)
        assert 1 <= share <= max(1, most)
        assert parts == -(-size // max(1, min(most, size)))


@needs_mkl
@pytest.mark.parametrize(
    ("options", "size", "served"),
    [
        ({}, 16, True),
        ({"out_channels": 256, "bias": False}, 16, True),
        ({"padding": "same"}, 16, False),
        ({}, 12, False),
        ({"in_channels": 127}, 16, False),
        ({"out_channels": 127}, 16, False),
        ({"padding": 0}, 16, False),
        ({"stride": 2}, 16, False),
        ({"dilation": 2}, 16, False),
        ({"in_channels": 256, "groups": 2}, 16, False),
        ({"padding_mode": "reflect"}, 16, False),
        ({"kernel_size": 5}, 16, False),
        ({"kernel_size": 1}, 16, False),
        ({"dtype": torch.float64}, 16, False),
    ],
    ids=str,
)
def test_the_convolutions_that_it_computes(
    options: dict[str, Any], size: int, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are computed too, otherwise."""
    calls = []
    original = winograd.conv2d
    monkeypatch.setattr(winograd, "conv2d", lambda *args: calls.append(args) or original(*args))
    torch.manual_seed(0)
    conv = nn.Conv2d(**({"in_channels": 128, "out_channels": 128, "kernel_size": 3, "padding": 1} | options))
    x = torch.randn(1, conv.in_channels, size, size, dtype=conv.weight.dtype)
    with torch.inference_mode():
        assert relative_error(FusedConv2d(conv)(x), exact(conv, x)) < ALLOWED
    assert bool(calls) == served


@needs_mkl
@pytest.mark.parametrize("trained", ["x", "addend", "weight", "bias"])
def test_where_a_gradient_is_recorded_it_is_the_plain_convolution(trained: str) -> None:
    conv, x = problem(1, 128, 128, 16, 16)
    addend = torch.randn_like(x)
    tensors = {"x": x, "addend": addend, "weight": conv.weight, "bias": conv.bias}
    tensors[trained].requires_grad_()
    # Multiplied by one, as a leaf may not be overwritten.
    FusedConv2d(conv)(x, addend * 1).sum().backward()
    assert tensors[trained].grad is not None


@needs_mkl
@pytest.mark.parametrize("size", [1, 3])
def test_default_dtype_and_device_are_not_asked(size: int) -> None:
    conv = nn.Conv2d(128, 128, size, padding=size // 2).requires_grad_(False)
    x = torch.randn(1, 128, 16, 16)
    one_pass_works.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.device("meta"):
            y = FusedConv2d(conv)(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert relative_error(y, exact(conv, x)) < ALLOWED


@needs_mkl
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.contiguous(),
        lambda x: x[:1].expand(2, -1, -1, -1),
        lambda x: x[:, :1].expand(-1, 8, -1, -1),
        lambda x: x.transpose(2, 3),
        lambda x: x[:, :, 3:, ::2],
    ],
    ids=["contiguous", "expanded", "one channel", "transposed", "sliced"],
)
def test_strides_of_any_kind(change: Callable[[Tensor], Tensor]) -> None:
    conv, x = problem(2, 8, 12, 30, 34)
    conv.weight.data = conv.weight.data.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    x = change(x)
    y = winograd.conv2d(x, winograd.transform(conv, x), conv.bias, None, None)
    assert relative_error(y, exact(conv, x)) < ALLOWED


@needs_mkl
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_numbers_that_are_not_finite_stay_near(value: float) -> None:
    """In the tiles whose 6×6 inputs they are among, and nowhere else."""
    conv, x = problem(2, 8, 8, 32, 32)
    weight = winograd.transform(conv, x)
    finite = winograd.conv2d(x, weight, conv.bias, None, None)
    x[1, 3, 12, 17] = value
    y = winograd.conv2d(x, weight, conv.bias, None, None)
    reached = torch.zeros(2, 32, 32, dtype=torch.bool)
    reached[1, 8:16, 16:20] = True  # row 12 is in the tile row 12-15 and just below that of 8-11
    assert not y.isfinite().all(dim=1)[reached].any()
    assert torch.equal(y.permute(0, 2, 3, 1)[~reached], finite.permute(0, 2, 3, 1)[~reached])


@needs_mkl
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_where_the_processor_has_no_other(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded once, at the end: to the numbers nearest to the exact ones, but for float32's own rounding."""
    monkeypatch.setattr("fpn.inference.fused_conv.working_dtype", lambda dtype: torch.float32)
    conv, x = problem(2, 128, 128, 20, 20)
    conv, x = conv.to(dtype), x.to(dtype)
    fused = FusedConv2d(conv, activation=RELU)
    addend = torch.randn_like(x)
    with torch.inference_mode():
        y = fused(x, addend.clone())
    assert y.dtype == dtype
    expected = (exact(conv, x) + addend.double()).relu()
    half = torch.finfo(dtype).eps / 2
    assert ((y.double() - expected).abs() <= expected.abs() * half * 1.01 + 1e-5).all()

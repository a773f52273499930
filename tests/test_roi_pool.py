"""roi_pool against torchvision and against the slow reference; the operator's contract with PyTorch."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import Tensor

import roi
from roi import RoIPool, roi_pool, torch_path
from roi._problem import Maps, Pooling
from roi.torch_path import adaptive, memory, product
from roi.torch_path.bins import Bins, roi_windows, round_half_away
from tests.reference import max_pool
from tests.reference.boxes import hostile_boxes, ordinary_boxes
from tests.reference.comparison import same_bits
from tests.reference.maps import features
from tests.reference.torchvision_bins import torchvision_bins_are_exact

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def pooled(input: Tensor, rois: Tensor, scale: float, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Output and argmax by the torch path, straight from the dispatcher."""
    output, argmax = torch.ops.fpn_roi.roi_pool_with_argmax(input, rois, scale, height, width, "torch")
    return output, argmax


def grid_aligned(count: int, images: int, stride: int, height: int, width: int) -> Tensor:
    """Boxes whose corners are odd multiples of half a cell: every coordinate rounds from exactly one half."""
    generator = torch.Generator().manual_seed(count)
    corners = torch.randint(-4, max(height, width) + 4, (count, 4), generator=generator).double() * stride + stride / 2
    index = torch.randint(images, (count, 1), generator=generator).double()
    return torch.cat([index, corners], dim=1)  # half of them reversed, too


def tiny(count: int, images: int, stride: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    corner = torch.rand(count, 2, generator=generator).double() * torch.tensor([width * stride, height * stride])
    size = torch.rand(count, 2, generator=generator).double() * stride
    index = torch.randint(images, (count, 1), generator=generator).double()
    return torch.cat([index, corner, corner + size], dim=1)


def around(count: int, images: int, stride: int, height: int, width: int) -> Tensor:
    return ordinary_boxes(count, images, height * stride, width * stride, seed=count)


@pytest.mark.torchvision
@layouts
@pytest.mark.parametrize("boxes_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [around, grid_aligned, tiny])
@pytest.mark.parametrize("output_size", [1, 2, 7, (7, 7), (3, 14), 16])
@pytest.mark.parametrize(("shape", "stride"), [((2, 5, 25, 38), 16), ((1, 16, 50, 33), 8), ((3, 1, 7, 64), 4)])
def test_torchvisions_output_argmax_and_gradient_to_the_bit(
    shape: tuple[int, int, int, int], stride: int, output_size, kind, boxes_dtype: torch.dtype, layout
) -> None:
    import torchvision

    torch.manual_seed(0)
    input = torch.randn(shape, dtype=boxes_dtype)  # torchvision wants one dtype for both
    rois = kind(60, shape[0], stride, *shape[2:]).to(boxes_dtype)
    height, width = (output_size, output_size) if isinstance(output_size, int) else output_size
    exact = torchvision_bins_are_exact(rois, 1 / stride, height, width)
    assert exact.float().mean() > 0.8
    rois = rois[exact]
    expected, positions = torch.ops.torchvision.roi_pool(input, rois, 1 / stride, height, width)
    output, argmax = pooled(input.contiguous(memory_format=layout), rois, 1 / stride, height, width)
    assert same_bits(output, expected)
    assert torch.equal(argmax, positions)

    theirs = input.clone().requires_grad_()
    ours = input.clone(memory_format=torch.preserve_format).contiguous(memory_format=layout).requires_grad_()
    grad = torch.randn_like(output)
    torchvision.ops.roi_pool(theirs, rois, output_size, 1 / stride).backward(grad)
    roi_pool(ours, rois, output_size, 1 / stride).backward(grad)
    # Sums in another order: within the rounding of adding up to a few hundred terms.
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-4 if boxes_dtype == torch.float32 else 1e-12)


@layouts
@dtypes
@pytest.mark.parametrize("output_size", [(1, 1), (7, 7), (3, 5)])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_reference_with_special_values_and_wild_boxes(
    dtype, layout, output_size: tuple[int, int], scale: float
) -> None:
    shape = (2, 6, 13, 17)
    input = features(shape, dtype).contiguous(memory_format=layout)
    rois = torch.cat([ordinary_boxes(40, 2, 13 / scale, 17 / scale), hostile_boxes(2, 13, 17)])
    rois = rois[rois.isfinite().all(dim=1) & (rois[:, 0] >= 0) & (rois[:, 0] < 2)]
    for boxes in (rois, rois.float()[rois.float().isfinite().all(dim=1)]):
        expected, positions = max_pool.roi_pool(input.double().numpy(), boxes.numpy(), scale, *output_size)
        output, argmax = pooled(input, boxes, scale, *output_size)
        assert output.is_contiguous(memory_format=layout)
        assert same_bits(output, torch.from_numpy(expected).to(dtype))
        assert torch.equal(argmax, torch.from_numpy(positions).int())


@layouts
@dtypes
@pytest.mark.parametrize("output_size", [(1, 1), (7, 7), (3, 5)])
@pytest.mark.parametrize("count", [2, 50])
def test_gradient_is_the_reference_in_float64(dtype, layout, count: int, output_size: tuple[int, int]) -> None:
    shape = (3, 6, 13, 17)
    torch.manual_seed(0)
    input = features(shape, dtype, special=False).contiguous(memory_format=layout).requires_grad_()
    rois = ordinary_boxes(count, 2, 13, 17)  # none of the third image
    output = roi_pool(input, rois, output_size)
    grad = torch.randn(output.shape, dtype=torch.float64).to(dtype)
    output.backward(grad)
    _, argmax = pooled(input.detach(), rois, 1.0, *output_size)
    expected = max_pool.roi_pool_backward(grad.double().numpy(), rois.numpy(), argmax.numpy(), shape)
    # Sums are float32 or better, and rounded once to the dtype.
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(input.grad.double(), torch.from_numpy(expected), rtol=rounding, atol=50 * 2**-23)
    assert input.grad.is_contiguous(memory_format=layout)


# --- the ways of the torch path


def far_off(images: int) -> Tensor:
    rois = hostile_boxes(images, 52, 68)
    return rois[rois.isfinite().all(dim=1) & (rois[:, 0] >= 0) & (rois[:, 0] < images)]


@layouts
@dtypes
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("kind", [around, grid_aligned, tiny])
@pytest.mark.parametrize(("count", "channels"), [(1, 3), (200, 1), (200, 5), (50, 40)])
@pytest.mark.parametrize("way", ["adaptive", "product"])
def test_every_way_is_the_reference(
    way: str, count: int, channels: int, kind, special: bool, dtype: torch.dtype, layout, monkeypatch
) -> None:
    """NaN, infinities, subnormal numbers and zeros of both signs included; each way for every problem it can do."""
    rois = torch.cat([kind(count, 2, 4, 13, 17), far_off(2)])
    input = features((2, channels, 13, 17), dtype, special=special).contiguous(memory_format=layout)
    expected, positions = max_pool.roi_pool(input.double().numpy(), rois.numpy(), 1 / 4, 7, 3)
    pooling = Pooling((1 / 4,), 7, 3)
    if way == "adaptive":
        monkeypatch.setattr(product, "serves", lambda *_: False)
    else:  # wherever it is right, however few the RoIs are
        monkeypatch.setattr(product, "cells_read", lambda _: 10**9)
    output, argmax = torch_path.max_pool_with_argmax([input], rois, pooling)
    for result in (output, torch_path.max_pool([input], rois, pooling)):
        assert same_bits(result, torch.from_numpy(expected).to(dtype))
        assert result.is_contiguous(memory_format=layout)
    assert torch.equal(argmax, torch.from_numpy(positions).int())
    assert argmax.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("value", "maxima", "argmaxima"), [(1.0, True, True), (-0.0, False, False), (torch.nan, True, False)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_product_serves_where_it_is_right(dtype: torch.dtype, value: float, maxima: bool, argmaxima: bool) -> None:
    map_ = torch.ones(1, 2, 8, 8, dtype=dtype)
    map_[0, 1, 3, 3] = value
    bins = Bins.of(roi_windows(np.array([[0.0, 0, 0, 7, 7]] * 9), 1.0), Pooling((1.0,), 2, 2), 8, 8)
    assert product.serves(map_, bins) == maxima
    assert product.serves_argmax(map_, bins) == (argmaxima and dtype != torch.float64)


@layouts
def test_few_rois_read_less_than_the_map(layout) -> None:
    map_ = torch.zeros(1, 256, 50, 84).contiguous(memory_format=layout)
    for count, whole in ((1, False), (512, True)):
        windows = roi_windows(around(count, 1, 16, 50, 84).numpy(), 1 / 16)
        assert product.serves(map_, Bins.of(windows, Pooling((1 / 16,), 7, 7), 50, 84)) == whole


@layouts
@pytest.mark.parametrize("limit", [1, 37, 1000])
def test_parts_of_any_size_give_the_same(limit: int, layout, monkeypatch) -> None:
    input = torch.randn(3, 6, 13, 17).contiguous(memory_format=layout).requires_grad_()
    rois = torch.cat([around(200, 3, 4, 13, 17), tiny(200, 3, 4, 13, 17), far_off(3)])

    def outcome() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        output = roi_pool(input, rois, (4, 3), 1 / 4)
        (gradient,) = torch.autograd.grad(output.double().square().sum(), input)
        return (
            output,
            roi_pool(input.detach(), rois, (4, 3), 1 / 4),
            pooled(input.detach(), rois, 1 / 4, 4, 3)[1],
            gradient,
        )

    *expected, gradient = outcome()
    for module in (product, adaptive):
        for name in [name for name in vars(module) if name.endswith(("_AT_ONCE", "_IN_CACHE", "_VALUES"))]:
            monkeypatch.setattr(module, name, limit)
    *actual, sums = outcome()
    assert all(map(same_bits, actual, expected))
    torch.testing.assert_close(sums, gradient, rtol=1e-5, atol=1e-4)


def test_no_warning_of_pytorchs() -> None:
    """That its sparse tensors are in beta is nothing to the users of pooling."""
    script = "import torch, warnings; warnings.simplefilter('error'); import roi; "
    script += "roi.roi_pool(torch.zeros(1, 8, 50, 84), torch.zeros(600, 5), 2)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert not run.stderr


@pytest.mark.parametrize("size", [57, 114, 121])
def test_no_bin_reaches_beyond_its_roi(size: int) -> None:
    """At these sizes torchvision's float32 bins end one row late; a spike planted there must not be seen."""
    for axis in (2, 3):
        input = torch.zeros(1, 1, 130, 130)
        input.select(axis, size).fill_(100.0)
        rois = torch.tensor([[0.0, 0, 0, size - 1, size - 1]])
        assert roi_pool(input, rois, 7).max() == 0


@pytest.mark.torchvision
def test_torchvisions_bins_do_reach_beyond() -> None:
    """The documented difference; when torchvision mends it, the documentation is to be mended too."""
    from torchvision.ops import roi_pool as theirs

    input = torch.zeros(1, 1, 130, 130)
    input[:, :, 57] = 100.0
    assert theirs(input, torch.tensor([[0.0, 0, 0, 56, 56]]), 7).max() == 100


@pytest.mark.parametrize("coordinate", [0.5, 1.5, 2.5, -0.5, 0.49999997, 8388609.0, 4503599627370497.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_halves_round_away_from_zero(coordinate: float, dtype: torch.dtype) -> None:
    value = torch.tensor([coordinate], dtype=dtype).numpy()
    expected = math.copysign(math.floor(abs(value.item()) + 0.5), coordinate)
    if abs(value.item()) > 2**50 or value.item() == torch.tensor(0.49999997, dtype=torch.float32).item():
        expected = float(round(value.item()))  # where adding a half would itself round
    assert round_half_away(value).item() == expected


@pytest.mark.parametrize("boxes_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@dtypes
def test_boxes_keep_a_dtype_of_their_own(dtype: torch.dtype, boxes_dtype: torch.dtype) -> None:
    input = features((2, 4, 13, 17), dtype, special=False)
    rois = ordinary_boxes(30, 2, 13, 17).to(boxes_dtype)
    output = roi_pool(input, rois, 7)
    assert output.dtype == dtype
    assert same_bits(output, roi_pool(input.double(), rois.double(), 7).to(dtype))


def test_a_list_of_boxes_is_one_tensor_per_image() -> None:
    input = torch.randn(3, 4, 13, 17)
    rois = ordinary_boxes(30, 3, 13, 17).float()
    rois = rois[rois[:, 0].argsort(stable=True)]
    parts = [rois[rois[:, 0] == image, 1:] for image in range(3)]
    assert same_bits(roi_pool(input, parts, 7), roi_pool(input, rois, 7))
    parts[1] = parts[1][:0]
    assert same_bits(roi_pool(input, tuple(parts), 7), roi_pool(input, rois[rois[:, 0] != 1], 7))


@layouts
@pytest.mark.parametrize(
    ("shape", "count"), [((2, 3, 8, 8), 0), ((0, 3, 8, 8), 0), ((2, 0, 8, 8), 4), ((1, 1, 1, 1), 3), ((1, 3, 1, 9), 3)]
)
def test_empty_and_smallest(shape: tuple[int, int, int, int], count: int, layout) -> None:
    input = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
    output = roi_pool(input, torch.zeros(count, 5), (2, 3))
    assert output.shape == (count, shape[1], 2, 3)
    output.sum().backward()
    assert input.grad.shape == shape
    assert input.grad.sum() == output.numel()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x[:, :, 1:, 2:],
        lambda x: x.transpose(2, 3),
        lambda x: x.flip(3),
        lambda x: x[:1].expand(2, -1, -1, -1),
        lambda x: x.permute(0, 3, 1, 2),
    ],
)
def test_any_strides(view) -> None:
    input = view(torch.randn(2, 8, 9, 10))
    rois = ordinary_boxes(30, 2, *input.shape[2:])
    assert same_bits(roi_pool(input, rois, 3), roi_pool(input.clone(memory_format=torch.contiguous_format), rois, 3))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": [1]}, TypeError, r"input must be a Tensor\[N, C, H, W\]; got list"),
        ({"input": torch.zeros(3, 8, 8)}, ValueError, r"input must be a Tensor\[N, C, H, W\]; got shape \(3, 8, 8\)"),
        ({"input": torch.zeros(2, 3, 8, 8).int()}, TypeError, "must be floating point, of 16 to 64 bits; got torch.i"),
        ({"input": torch.zeros(2, 3, 0, 8)}, ValueError, "at least one cell"),
        ({"boxes": torch.zeros(2, 4)}, ValueError, r"boxes must be a Tensor\[K, 5\] on cpu; got shape"),
        ({"boxes": torch.zeros(5)}, ValueError, r"Tensor\[K, 5\]"),
        ({"boxes": torch.zeros(2, 5, dtype=torch.bool)}, TypeError, r"Tensor\[K, 5\] on cpu, of numbers; got torch.bo"),
        ({"boxes": np.zeros((2, 5), bool)}, TypeError, r"Tensor\[K, 5\] on cpu, of numbers; got bool"),
        ({"boxes": [torch.zeros(2, 4)]}, ValueError, r"one Tensor\[Ki, 4\] per image; got 1 for a batch of 2"),
        ({"boxes": [torch.zeros(2, 4), torch.zeros(2, 5)]}, ValueError, r"boxes\[1\] must be .* got shape \(2, 5\)"),
        ({"boxes": [torch.zeros(2, 4), None]}, TypeError, r"boxes\[1\] must be .* got NoneType"),
        ({"boxes": {"a": 1}}, TypeError, r"boxes must be a Tensor\[K, 5\] or a list of Tensor\[Ki, 4\]; got dict"),
        ({"boxes": torch.zeros(2, 5, device="meta")}, ValueError, "on cpu; got one on meta"),
        ({"boxes": torch.tensor([[0.0] * 5, [2.0, 0, 0, 1, 1]])}, ValueError, r"indices in \[0, 2\); row 1 is \[2.0"),
        ({"boxes": torch.tensor([[-1.0, 0, 0, 1, 1]])}, ValueError, "row 0 is"),
        ({"boxes": torch.tensor([[0.0, 0, 0, math.nan, 1]])}, ValueError, "finite coordinates.*row 0"),
        ({"boxes": torch.tensor([[0.0, 0, 0, math.inf, 1]])}, ValueError, "finite coordinates.*row 0"),
        ({"output_size": 0}, ValueError, "output_size must be .* at least 1; got 0"),
        ({"output_size": (7, -1)}, ValueError, "output_size"),
        ({"output_size": (7, 7, 7)}, ValueError, "output_size"),
        ({"output_size": 2.5}, ValueError, "output_size"),
        ({"spatial_scale": 0.0}, ValueError, "spatial_scale must be finite and positive"),
        ({"spatial_scale": math.nan}, ValueError, "spatial_scale"),
        ({"backend": "cuda"}, ValueError, "backend must be one of auto, torch, cupy, torchvision; got 'cuda'"),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    good = {"input": torch.zeros(2, 3, 8, 8), "boxes": torch.zeros(2, 5), "output_size": 2}
    with pytest.raises(error, match=message):
        roi_pool(**(good | change))


@pytest.mark.parametrize("number", [int, np.int64, np.int32])
def test_output_size_may_be_any_integer(number: type) -> None:
    input, rois = torch.randn(2, 3, 8, 8), ordinary_boxes(9, 2, 8, 8)
    assert same_bits(roi_pool(input, rois, (number(3), number(2))), roi_pool(input, rois, (3, 2)))


def test_module_is_the_function() -> None:
    input, rois = torch.randn(2, 3, 8, 8), ordinary_boxes(9, 2, 64, 64)
    module = RoIPool((3, 2), 1 / 8)
    assert same_bits(module(input, rois), roi_pool(input, rois, (3, 2), 1 / 8))
    assert repr(module) == "RoIPool(output_size=(3, 2), spatial_scale=0.125)"
    module = RoIPool((3, 2), 1 / 8, backend="torch")
    assert repr(module) == "RoIPool(output_size=(3, 2), spatial_scale=0.125, backend='torch')"


# --- the operator's contract with PyTorch


@layouts
@pytest.mark.parametrize("output_size", [1, (2, 3)])
def test_gradients_of_first_and_second_order(layout, output_size) -> None:
    torch.manual_seed(0)
    # Distinct values a unit apart: a step of the numerical gradient moves no maximum.
    input = torch.randperm(2 * 3 * 6 * 7).double().view(2, 3, 6, 7).contiguous(memory_format=layout).requires_grad_()
    rois = ordinary_boxes(6, 2, 6, 7)
    assert torch.autograd.gradcheck(lambda x: roi_pool(x, rois, output_size), input)
    assert torch.autograd.gradgradcheck(lambda x: roi_pool(x, rois, output_size).square(), input)


@layouts
@dtypes
def test_opcheck(dtype: torch.dtype, layout) -> None:
    input = torch.randn(2, 3, 8, 9).to(dtype).contiguous(memory_format=layout)
    rois = ordinary_boxes(5, 2, 8, 9)
    torch.library.opcheck(torch.ops.fpn_roi.roi_pool.default, (input, rois, 1.0, 3, 2, "torch"))
    leaf = input.clone().requires_grad_()
    torch.library.opcheck(torch.ops.fpn_roi.roi_pool.default, (leaf, rois, 1.0, 3, 2, "torch"))
    output, argmax = pooled(input, rois, 1.0, 3, 2)
    grad = torch.randn_like(output).requires_grad_()
    args = (grad, rois, argmax, 1.0, 3, 2, *input.shape, layout is torch.channels_last, "torch")
    torch.library.opcheck(torch.ops.fpn_roi.roi_pool_backward.default, args)


@layouts
def test_boxes_take_no_gradient(layout) -> None:
    """Predicted boxes come with a gradient function; pooling from frozen features must not mind."""
    input = torch.randn(2, 3, 8, 9).contiguous(memory_format=layout)
    boxes = ordinary_boxes(5, 2, 8, 9).requires_grad_()
    frozen = roi_pool(input, boxes, 3)  # as torchvision's: it requires a gradient, and gives none
    frozen.sum().backward()
    assert boxes.grad is None
    roi_pool(input.requires_grad_(), boxes, 3).sum().backward()
    assert boxes.grad is None
    assert input.grad is not None


@layouts
@pytest.mark.parametrize(("count", "output_size"), [(0, 3), (5, 1), (5, 3)])
def test_the_gradient_has_the_features_format(count: int, output_size: int, layout) -> None:
    input = torch.randn(2, 3, 8, 9).contiguous(memory_format=layout).requires_grad_()
    (gradient,) = torch.autograd.grad(roi_pool(input, ordinary_boxes(count, 2, 8, 9), output_size).sum(), input)
    assert gradient.stride() == input.stride()


@layouts
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compile_with_as_many_boxes_as_the_data_say(layout) -> None:
    """The graph after non-maximum suppression: the number of RoIs is known at run time only."""

    def head(x: Tensor, boxes: Tensor, kept: Tensor) -> Tensor:
        return roi_pool(x * 2, boxes[kept.nonzero().squeeze(1)], 3, 1 / 2).square()

    torch.compiler.reset()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    boxes = ordinary_boxes(6, 2, 16, 18)
    for kept in (torch.tensor([1, 0, 1, 1, 0, 1]), torch.tensor([0, 1, 0, 0, 0, 0]), torch.zeros(6)):
        input = torch.randn(2, 3, 8, 9).contiguous(memory_format=layout).requires_grad_()
        expected = head(input, boxes, kept)
        actual = compiled(input, boxes, kept)
        assert same_bits(actual, expected)
        (wanted,) = torch.autograd.grad(expected.sum(), input)
        (got,) = torch.autograd.grad(actual.sum(), input)
        assert same_bits(got, wanted)


def test_no_image_is_no_row() -> None:
    """The torch path on CUDA reaches this; on the CPU such boxes are refused before."""
    input, rois = torch.zeros(0, 3, 8, 9), torch.zeros(4, 5)
    pooling = Pooling((1.0,), 2, 2)
    output, argmax = torch_path.max_pool_with_argmax([input], rois, pooling)
    assert output.isnan().all()
    assert (argmax == -1).all()
    (gradient,) = torch_path.max_gather_adjoint(torch.ones_like(output), rois, argmax, pooling, Maps.of([input]))
    assert gradient.shape == input.shape
    assert not torch_path.max_gather([input], rois, argmax, pooling).any()


def test_no_gradient_where_none_is_wanted() -> None:
    input, rois = torch.randn(1, 2, 8, 8), torch.zeros(3, 5)
    assert not roi_pool(input, rois, 2).requires_grad
    with torch.no_grad():
        assert not roi_pool(input.requires_grad_(), rois, 2).requires_grad


def test_what_a_thread_keeps_is_freed() -> None:
    input, rois = torch.randn(1, 64, 50, 84), around(300, 1, 16, 50, 84)
    roi_pool(input, rois, 7, 1 / 16)
    kept = memory._kept.blocks
    assert sum(block.numel() for block in kept.values()) >= input.numel() * 4
    before = {use: block.data_ptr() for use, block in kept.items()}
    roi_pool(input, rois, 7, 1 / 16)
    assert {use: block.data_ptr() for use, block in kept.items()} == before
    roi.empty_cache()
    assert not kept


def test_autocast_leaves_features_and_boxes_as_they_are() -> None:
    input, rois = torch.randn(1, 2, 64, 64), torch.tensor([[0.0, 1000.3, 1001.7, 2047.9, 2049.1]])
    expected = roi_pool(input.bfloat16(), rois, 7, 1 / 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert roi_pool(input, rois, 7, 1 / 32).dtype == torch.float32
        assert same_bits(roi_pool(input.bfloat16(), rois, 7, 1 / 32), expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic: bool) -> None:
    def head(x: Tensor, boxes: list[Tensor]) -> Tensor:
        return roi_pool(x * 2, boxes, 7, 1 / 4).relu() + 1

    torch.compiler.reset()
    compiled = torch.compile(head, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size, counts in (((2, 3, 16, 20), (4, 5)), ((2, 3, 11, 13), (6, 1))):
        input = torch.randn(size, requires_grad=True)
        boxes = [ordinary_boxes(count, 1, size[2] * 4, size[3] * 4)[:, 1:] for count in counts]
        expected = head(input, boxes)
        actual = compiled(input, boxes)
        assert same_bits(actual, expected)
        (wanted,) = torch.autograd.grad(expected.square().sum(), input)
        (got,) = torch.autograd.grad(actual.square().sum(), input)
        assert same_bits(got, wanted)


def test_export_with_dynamic_shapes() -> None:
    program = torch.export.export(
        RoIPool(7, 1 / 4),
        (torch.randn(2, 3, 16, 20), ordinary_boxes(5, 2, 64, 80)),
        dynamic_shapes=(
            {0: torch.export.Dim("n"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")},
            {0: torch.export.Dim("k")},
        ),
    )
    input, rois = torch.randn(4, 3, 9, 31), ordinary_boxes(8, 4, 36, 124)
    assert same_bits(program.module()(input, rois), roi_pool(input, rois, 7, 1 / 4))

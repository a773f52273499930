"""roi_align against torchvision and against the slow reference; the operator's contract with PyTorch."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import Tensor

from roi import RoIAlign, roi_align, torch_path
from roi._problem import Maps, Pooling
from roi.torch_path import linear, tables, weighted_sums
from roi.torch_path.bins import rounded_up
from tests.reference import weighted_pool
from tests.reference.boxes import hostile_boxes, ordinary_boxes
from tests.reference.comparison import same_bits
from tests.reference.maps import features

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
ratios = pytest.mark.parametrize("ratio", [-1, 1, 2, 3, 5])
aligned_or_not = pytest.mark.parametrize("aligned", [False, True])

# Weighted sums of values of about 1, in another order than the reference's.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def slow(bins: tuple[int, int], ratio: int, aligned: bool, input: Tensor, rois: Tensor) -> Tensor:
    """The reference at scale 1/4."""
    pool = weighted_pool.roi_align(bins, ratio, aligned)
    return torch.from_numpy(pool.forward([input.numpy()], rois.numpy(), [1 / 4]))


def around(count: int, images: int, stride: int, height: int, width: int) -> Tensor:
    return ordinary_boxes(count, images, height * stride, width * stride, seed=count)


def reversed_(count: int, images: int, stride: int, height: int, width: int) -> Tensor:
    return around(count, images, stride, height, width)[:, [0, 3, 4, 1, 2]]


def tiny(count: int, images: int, stride: int, height: int, width: int) -> Tensor:
    boxes = around(count, images, stride, height, width)
    boxes[:, 3:] = boxes[:, 1:3] + boxes[:, 3:] / 1000
    return boxes


def huge(count: int, images: int, stride: int, height: int, width: int) -> Tensor:
    boxes = around(count, images, stride, height, width)
    return torch.cat([boxes[:, :1], boxes[:, 1:] + torch.tensor([-500.0, -300.0, 300.0, 700.0])], dim=1)


@pytest.mark.torchvision
@layouts
@aligned_or_not
@ratios
@pytest.mark.parametrize("kind", [around, reversed_, tiny, huge])
@pytest.mark.parametrize("boxes_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "stride", "output_size"),
    [((2, 5, 25, 38), 16, (7, 7)), ((1, 3, 20, 13), 4, (3, 5)), ((3, 1, 7, 24), 8, 1), ((2, 2, 1, 6), 2, (2, 14))],
)
def test_torchvisions_output_and_gradient(
    shape: tuple[int, int, int, int], stride: int, output_size, boxes_dtype, kind, ratio: int, aligned: bool, layout
) -> None:
    import torchvision

    torch.manual_seed(0)
    input = torch.randn(shape, dtype=boxes_dtype)  # torchvision wants one dtype for both
    rois = kind(12, shape[0], stride, *shape[2:]).to(boxes_dtype)
    theirs = input.clone().requires_grad_()
    ours = input.contiguous(memory_format=layout).clone(memory_format=torch.preserve_format).requires_grad_()
    expected = torchvision.ops.roi_align(theirs, rois, output_size, 1 / stride, ratio, aligned)
    output = roi_align(ours, rois, output_size, 1 / stride, ratio, aligned)
    torch.testing.assert_close(output, expected, rtol=0, atol=TOLERANCE[boxes_dtype])
    grad = torch.randn_like(expected)
    expected.backward(grad)
    output.backward(grad)
    # A cell's gradient sums up to some hundred terms.
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=100 * TOLERANCE[boxes_dtype])
    assert ours.grad.is_contiguous(memory_format=layout)


@layouts
@dtypes
@aligned_or_not
@ratios
def test_reference_in_float64(dtype: torch.dtype, ratio: int, aligned: bool, layout) -> None:
    """Half precision is widened before it is summed: what is left is one rounding of the output."""
    input = features((2, 6, 13, 17), dtype, special=False).contiguous(memory_format=layout)
    rois = torch.cat([around(8, 2, 4, 13, 17), tiny(3, 2, 4, 13, 17), reversed_(3, 2, 4, 13, 17)])
    output = roi_align(input, rois, (3, 4), 1 / 4, ratio, aligned)
    expected = slow((3, 4), ratio, aligned, input.double(), rois)
    assert output.dtype == dtype
    assert output.is_contiguous(memory_format=layout)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), expected, rtol=rounding, atol=1e-12 if rounding < 1e-10 else 1e-6)


@dtypes
@layouts
@ratios
def test_gradient_is_the_adjoint(dtype: torch.dtype, ratio: int, layout) -> None:
    """<pool(x), g> = <x, adjoint(g)> in float64; other dtypes sum in float32 or better."""
    torch.manual_seed(0)
    input = torch.randn(2, 6, 13, 17, dtype=torch.float64)
    rois = torch.cat([around(8, 2, 4, 13, 17), tiny(3, 2, 4, 13, 17), reversed_(3, 2, 4, 13, 17)])
    grad = torch.randn(len(rois), 6, 3, 4, dtype=torch.float64).contiguous(memory_format=layout)
    reference = weighted_pool.roi_align((3, 4), ratio, True)
    (expected,) = reference.backward(grad.to(dtype).double().numpy(), [input.numpy()], rois.numpy(), [1 / 4])
    pooling, maps = Pooling((1 / 4,), 3, 4, ratio, True), Maps(2, 6, (13,), (17,), layout is torch.channels_last)
    (ours,) = torch_path.align_adjoint(grad.to(dtype), rois, pooling, maps)
    assert ours.dtype == dtype
    assert ours.is_contiguous(memory_format=layout)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(
        ours.double(), torch.from_numpy(expected), rtol=rounding, atol=1e-12 if rounding < 1e-10 else 1e-4
    )


# --- hostile content


def valid_part(rois: Tensor, images: int) -> Tensor:
    return rois.isfinite().all(dim=1) & (rois[:, 0] >= 0) & (rois[:, 0] < images)


@layouts
@aligned_or_not
@pytest.mark.parametrize("ratio", [-1, 2, 3])
@pytest.mark.parametrize("boxes_dtype", [torch.float32, torch.float64])
def test_hostile_boxes(boxes_dtype: torch.dtype, ratio: int, aligned: bool, layout) -> None:
    """What a CUDA tensor may hold: nothing hangs, rows that are not valid are NaN and take no gradient."""
    input = torch.randn(2, 6, 13, 17).contiguous(memory_format=layout)
    rois = hostile_boxes(2, 13, 17).to(boxes_dtype)
    valid = valid_part(rois, 2)
    pooling = Pooling((1.0,), 3, 4, ratio, aligned)
    output = torch_path.align([input], rois, pooling)
    assert output[~valid].isnan().all()
    assert output[valid].isfinite().all()
    alone = torch.cat([torch_path.align([input], box[None], pooling) for box in rois[valid]])
    torch.testing.assert_close(output[valid], alone, rtol=0, atol=1e-6)
    grad = torch.randn(output.shape)
    clean = grad.masked_fill(~valid[:, None, None, None], 0)
    (expected,) = torch_path.align_adjoint(clean, rois, pooling, Maps.of([input]))
    grad[~valid] = torch.nan
    assert same_bits(torch_path.align_adjoint(grad, rois, pooling, Maps.of([input]))[0], expected)


@ratios
@aligned_or_not
@layouts
def test_nan_stays_where_it_is(ratio: int, aligned: bool, layout) -> None:
    """A bin is NaN where a NaN cell has a weight in it, and else only where the cell is a corner of weight 0: it would
    have a weight if the samples lay a little further down or to the right.
    """
    input = torch.randn(1, 2, 13, 17, dtype=torch.float64)
    rois = around(20, 1, 4, 13, 17)
    rois[10:] = rois[10:] * 2 - 30  # beyond the map on all sides
    rois[:, 0] = 0
    for y, x in ((0, 0), (12, 16), (6, 8)):
        holed = input.clone()
        holed[:, :, y, x] = torch.nan
        spike = torch.zeros_like(input)
        spike[:, :, y, x] = 1
        moves = [rois.new_tensor([0, dx, dy, dx, dy]) for dx in (0, 2**-20) for dy in (0, 2**-20)]
        weighs, *near = (slow((3, 3), ratio, aligned, spike, rois + move)[:, 0] != 0 for move in moves)
        output = roi_align(holed.contiguous(memory_format=layout), rois, 3, 1 / 4, ratio, aligned)[:, 0]
        assert output[weighs].isnan().all()
        assert not output[~torch.stack([weighs, *near]).any(dim=0)].isnan().any()


# --- the ways of the torch path


@layouts
@pytest.mark.parametrize("ratio", [-1, 2, 4])
@pytest.mark.parametrize("count", [1, 3, 200])
def test_ways_and_chunks_of_any_size_give_the_same(
    count: int, ratio: int, layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    input = torch.randn(3, 6, 40, 50, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    rois = torch.cat([around(count, 3, 4, 40, 50), tiny(count, 3, 4, 40, 50), huge(count, 3, 4, 40, 50)])
    outcomes = []
    limits = ((), (1000,), (2**20,)) if count > 3 else ((), (1,), (37,), (2**20,))
    for limit in limits:
        for line in (64, 10**9):  # crops where they move less memory, never
            for value in limit:
                for name in ("LOOKUPS_AT_ONCE", "LOOKUPS_PER_STEP", "VALUES_AT_ONCE", "LOOKUPS_PER_GROUP"):
                    monkeypatch.setattr(weighted_sums, name, value)
                monkeypatch.setattr(linear, "LOOKUPS_AHEAD", value)
            monkeypatch.setattr(tables, "LINE_BYTES", line)
            output = roi_align(input, rois, (4, 3), 1 / 4, ratio)
            (gradient,) = torch.autograd.grad(output.square().sum(), input)
            outcomes.append((output.detach(), gradient))
    for output, gradient in outcomes[1:]:
        torch.testing.assert_close(output, outcomes[0][0], rtol=0, atol=1e-12)
        torch.testing.assert_close(gradient, outcomes[0][1], rtol=1e-12, atol=1e-10)
        assert output.stride() == outcomes[0][0].stride()
        assert gradient.stride() == input.stride()


def test_counts_are_rounded_up_to_few() -> None:
    rounded = rounded_up(np.arange(1, 1000))
    assert (rounded >= np.arange(1, 1000)).all()
    assert (rounded <= 1.5 * np.arange(1, 1000)).all()
    assert len(np.unique(rounded)) < 21


MEMORY = """
import resource, torch
from roi import roi_align
from tests.reference.boxes import rpn_like
torch.set_num_threads(1)
features = torch.rand(1, 32, 200, 336)
boxes = rpn_like(10_000, 1, 800, 1344)
boxes[::100, 1:] = torch.tensor([-1e30, -1e30, 1e30, 1e30])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
features.requires_grad_()
output = roi_align(features, boxes, 7, 1 / 4)
forward = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before - output.numel() * 4 / 1024
output.backward(output.detach())
backward = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before - 2 * output.numel() * 4 / 1024
print(forward / 1024, backward / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak resident set as Linux reports it")
def test_memory_of_ten_thousand_rois_is_bounded() -> None:
    """Adaptive samples of boxes up to the whole map, and a hundred of 1e30: below 1 GB beyond input and output."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    forward, backward = map(float, run.stdout.split())
    assert forward < 1000
    assert backward < 1000


# --- forms of the arguments


@dtypes
def test_boxes_in_half_precision_are_widened(dtype: torch.dtype) -> None:
    input = torch.randn(1, 2, 40, 40).to(dtype)
    rois = torch.tensor([[0, 1000, 1001, 2047, 2049]]).half()
    assert same_bits(roi_align(input, rois, 7, 1 / 64), roi_align(input, rois.float(), 7, 1 / 64))


def test_a_list_of_boxes_is_one_tensor_per_image() -> None:
    input = torch.randn(3, 4, 13, 17)
    rois = ordinary_boxes(30, 3, 13, 17).float()
    rois = rois[rois[:, 0].argsort(stable=True)]
    parts = [rois[rois[:, 0] == image, 1:] for image in range(3)]
    assert same_bits(roi_align(input, parts, 7), roi_align(input, rois, 7))
    assert same_bits(roi_align(input, tuple(parts), 7), roi_align(input, rois, 7))


@layouts
@pytest.mark.parametrize(
    ("shape", "count"), [((2, 3, 8, 8), 0), ((0, 3, 8, 8), 0), ((2, 0, 8, 8), 4), ((1, 1, 1, 1), 3), ((1, 3, 1, 9), 3)]
)
def test_empty_and_smallest(shape: tuple[int, int, int, int], count: int, layout) -> None:
    input = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
    output = roi_align(input, torch.zeros(count, 5), (2, 3))
    assert output.shape == (count, shape[1], 2, 3)
    output.sum().backward()
    assert input.grad.shape == shape
    assert input.grad.stride() == input.stride()
    torch.testing.assert_close(input.grad.sum(), torch.tensor(float(output.numel())))


def test_no_image_is_no_row() -> None:
    """The torch path on CUDA reaches this; on the CPU such boxes are refused before."""
    input, pooling = torch.zeros(0, 3, 8, 9), Pooling((1.0,), 2, 2, 2)
    output = torch_path.align([input], torch.zeros(4, 5), pooling)
    assert output.isnan().all()
    (gradient,) = torch_path.align_adjoint(output, torch.zeros(4, 5), pooling, Maps.of([input]))
    assert gradient.shape == (0, 3, 8, 9)


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
@pytest.mark.parametrize("count", [1, 30])
def test_any_strides(view, count: int) -> None:
    input = view(torch.randn(2, 8, 40, 50))
    rois = ordinary_boxes(count, 2, *input.shape[2:])
    expected = roi_align(input.clone(memory_format=torch.contiguous_format), rois, 3)
    torch.testing.assert_close(roi_align(input, rois, 3), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.zeros(3, 8, 8)}, ValueError, r"input must be a Tensor\[N, C, H, W\]; got shape \(3, 8, 8\)"),
        ({"boxes": torch.zeros(2, 4)}, ValueError, r"boxes must be a Tensor\[K, 5\] on cpu; got shape"),
        ({"boxes": torch.tensor([[0.0] * 5, [2.0, 0, 0, 1, 1]])}, ValueError, r"indices in \[0, 2\); row 1 is \[2.0"),
        ({"boxes": torch.tensor([[0.0, 0, 0, math.nan, 1]])}, ValueError, "finite coordinates.*row 0"),
        ({"output_size": (7, -1)}, ValueError, "output_size"),
        ({"spatial_scale": 0.0}, ValueError, "spatial_scale must be finite and positive"),
        ({"sampling_ratio": 2.5}, TypeError, "sampling_ratio must be an int; got 2.5"),
        ({"sampling_ratio": None}, TypeError, "sampling_ratio must be an int; got None"),
        ({"backend": "cuda"}, ValueError, "backend must be one of auto, torch, cupy, torchvision; got 'cuda'"),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    good = {"input": torch.zeros(2, 3, 8, 8), "boxes": torch.zeros(2, 5), "output_size": 2}
    with pytest.raises(error, match=message):
        roi_align(**(good | change))


def test_module_is_the_function() -> None:
    input, rois = torch.randn(2, 3, 8, 8), ordinary_boxes(9, 2, 64, 64)
    module = RoIAlign((3, 2), 1 / 8, 2, aligned=True)
    assert same_bits(module(input, rois), roi_align(input, rois, (3, 2), 1 / 8, 2, True))
    expected = "output_size=(3, 2), spatial_scale=0.125, sampling_ratio=2, aligned=True"
    assert repr(module) == f"RoIAlign({expected})"
    assert repr(RoIAlign((3, 2), 1 / 8, 2, True, backend="torch")) == f"RoIAlign({expected}, backend='torch')"


# --- the operator's contract with PyTorch


@layouts
@pytest.mark.parametrize("ratio", [-1, 2])
@pytest.mark.parametrize("output_size", [1, (2, 3)])
def test_gradients_of_first_and_second_order(layout, output_size, ratio: int) -> None:
    torch.manual_seed(0)
    input = torch.randn(2, 3, 6, 7, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    rois = ordinary_boxes(6, 2, 6, 7)
    assert torch.autograd.gradcheck(lambda x: roi_align(x, rois, output_size, 1.0, ratio), input)
    assert torch.autograd.gradgradcheck(lambda x: roi_align(x, rois, output_size, 1.0, ratio).square(), input)


@layouts
@dtypes
def test_opcheck(dtype: torch.dtype, layout) -> None:
    input = torch.randn(2, 3, 8, 9).to(dtype).contiguous(memory_format=layout)
    rois = ordinary_boxes(5, 2, 8, 9)
    for leaf in (input, input.clone().requires_grad_()):
        torch.library.opcheck(torch.ops.fpn_roi.roi_align.default, (leaf, rois, 1.0, 3, 2, 2, True, "torch"))
    grad = torch.randn(5, 3, 3, 2).to(dtype).contiguous(memory_format=layout).requires_grad_()
    args = (grad, rois, 1.0, 3, 2, -1, False, *input.shape, layout is torch.channels_last, "torch")
    torch.library.opcheck(torch.ops.fpn_roi.roi_align_backward.default, args)


@layouts
def test_boxes_take_no_gradient(layout) -> None:
    input = torch.randn(2, 3, 8, 9).contiguous(memory_format=layout)
    boxes = ordinary_boxes(5, 2, 8, 9).requires_grad_()
    frozen = roi_align(input, boxes, 3)  # as torchvision's: it requires a gradient, and gives none
    frozen.sum().backward()
    assert boxes.grad is None
    roi_align(input.requires_grad_(), boxes, 3).sum().backward()
    assert boxes.grad is None
    assert input.grad is not None


def test_autocast_leaves_features_and_boxes_as_they_are() -> None:
    input, rois = torch.randn(1, 2, 64, 64), torch.tensor([[0.0, 1000.3, 1001.7, 2047.9, 2049.1]])
    expected = roi_align(input.bfloat16(), rois, 7, 1 / 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert roi_align(input, rois, 7, 1 / 32).dtype == torch.float32
        assert same_bits(roi_align(input.bfloat16(), rois, 7, 1 / 32), expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic: bool) -> None:
    def head(x: Tensor, boxes: list[Tensor]) -> Tensor:
        return roi_align(x * 2, boxes, 7, 1 / 4, 2).relu() + 1

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


@layouts
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compile_with_as_many_boxes_as_the_data_say(layout) -> None:
    def head(x: Tensor, boxes: Tensor, kept: Tensor) -> Tensor:
        return roi_align(x * 2, boxes[kept.nonzero().squeeze(1)], 3, 1 / 2).square()

    torch.compiler.reset()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    boxes = ordinary_boxes(6, 2, 16, 18)
    for kept in (torch.tensor([1, 0, 1, 1, 0, 1]), torch.tensor([0, 1, 0, 0, 0, 0]), torch.zeros(6)):
        input = torch.randn(2, 3, 8, 9).contiguous(memory_format=layout).requires_grad_()
        expected, actual = head(input, boxes, kept), compiled(input, boxes, kept)
        assert same_bits(actual, expected)
        (wanted,) = torch.autograd.grad(expected.sum(), input)
        (got,) = torch.autograd.grad(actual.sum(), input)
        assert same_bits(got, wanted)


def test_export_with_dynamic_shapes() -> None:
    program = torch.export.export(
        RoIAlign(7, 1 / 4, 2),
        (torch.randn(2, 3, 16, 20), ordinary_boxes(5, 2, 64, 80)),
        dynamic_shapes=(
            {0: torch.export.Dim("n"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")},
            {0: torch.export.Dim("k")},
        ),
    )
    input, rois = torch.randn(4, 3, 9, 31), ordinary_boxes(8, 4, 36, 124)
    assert same_bits(program.module()(input, rois), roi_align(input, rois, 7, 1 / 4, 2))


def test_every_run_and_number_of_threads_give_the_same_gradient() -> None:
    input, rois = torch.randn(1, 64, 50, 84), around(300, 1, 16, 50, 84)
    grad = torch.randn(300, 64, 7, 7)
    threads = torch.get_num_threads()
    gradients = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        gradients += torch_path.align_adjoint(grad, rois, Pooling((1 / 16,), 7, 7, 2), Maps.of([input]))
    torch.set_num_threads(threads)
    assert same_bits(gradients[1], gradients[0])
    assert same_bits(gradients[2], gradients[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
@pytest.mark.parametrize("ratio", [-1, 2, 9])
def test_far_boxes_warn_of_nothing(ratio: int, scale: float, dtype: torch.dtype) -> None:
    """NumPy speaks of what overflows; that saturates, and is no concern of the user's."""
    most = torch.finfo(dtype).max
    corners = [[-most, -most, most, most], [most] * 4, [-most] * 4, [0, 0, most, most], [most, 0, -most, 5]]
    rois = torch.tensor([[0.0, *corner] for corner in corners], dtype=dtype)
    input = torch.ones(1, 2, 13, 17, dtype=dtype, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for aligned in (False, True):
            for some in (rois, *rois.split(1)):
                output = roi_align(input, some, 3, scale, ratio, aligned)
                (gradient,) = torch.autograd.grad(output.sum(), input)
                assert output.isfinite().all()
                assert gradient.isfinite().all()

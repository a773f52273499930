"""ps_roi_pool and ps_roi_align against torchvision and the slow reference; the operators' contract with PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from roi import PSRoIAlign, PSRoIPool, ps_roi_align, ps_roi_pool, torch_path
from roi._problem import Maps, Pooling
from tests.reference import weighted_pool
from tests.reference.boxes import hostile_boxes, ordinary_boxes
from tests.reference.comparison import same_bits
from tests.reference.maps import features
from tests.reference.torchvision_bins import sizes_exact

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

# Weighted sums of values of about 1, in another order than torchvision's.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}

Op = Callable[..., Tensor]  # (input, boxes, output_size, spatial_scale)
OPS = {"pool": ps_roi_pool, "align": ps_roi_align, "align 2": partial(ps_roi_align, sampling_ratio=2)}
ops = pytest.mark.parametrize("name", list(OPS))


def torchvisions(name: str) -> Op:
    import torchvision

    if name == "pool":
        return torchvision.ops.ps_roi_pool
    return partial(torchvision.ops.ps_roi_align, sampling_ratio=2 if name == "align 2" else -1)


def slow(name: str, input: Tensor, rois: Tensor, pooled: tuple[int, int], scale: float) -> Tensor:
    pool = weighted_pool.ps_roi_align(pooled, 2 if name == "align 2" else -1)
    if name == "pool":
        pool = weighted_pool.ps_roi_pool(pooled)
    return torch.from_numpy(pool.forward([input.numpy()], rois.numpy(), [scale]))


def exact(name: str, rois: Tensor, scale: float, pooled: tuple[int, int]) -> Tensor:
    """Where torchvision's bins are these: those of average pooling are floating point, those without a sample NaN."""
    if name == "align 2":
        return torch.ones(len(rois), dtype=torch.bool)
    if name == "align":
        samples = (rois[:, 3:] - rois[:, 1:3]) * scale / torch.tensor([pooled[1], pooled[0]])
        return (samples.ceil() != 0).all(dim=1)
    number = rois.numpy().dtype.type
    corners = (rois[:, 1:] * scale).double()
    corners = (corners.sign() * (corners.abs() + 0.5).floor()).long()
    height = (corners[:, 3] - corners[:, 1]).clamp(min=1).numpy()
    width = (corners[:, 2] - corners[:, 0]).clamp(min=1).numpy()
    return torch.from_numpy(sizes_exact(height, pooled[0], number) & sizes_exact(width, pooled[1], number))


@pytest.mark.torchvision
@ops
@layouts
@pytest.mark.parametrize("boxes_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("size", "stride", "pooled"),
    [((25, 38), 16, (7, 7)), ((50, 33), 8, (3, 5)), ((7, 64), 4, (1, 1)), ((2, 3), 2, (2, 2))],
)
def test_torchvisions_output_and_gradient(
    name: str, size: tuple[int, int], stride: int, pooled: tuple[int, int], reverse: bool, boxes_dtype, layout
) -> None:
    torch.manual_seed(0)
    input = torch.randn(2, 3 * pooled[0] * pooled[1], *size, dtype=boxes_dtype)  # torchvision wants one dtype for both
    rois = ordinary_boxes(60, 2, size[0] * stride, size[1] * stride).to(boxes_dtype)
    if reverse:
        rois = rois[:, [0, 3, 4, 1, 2]]
    kept = exact(name, rois, 1 / stride, pooled)
    assert kept.float().mean() > 0.8 or name == "align"
    rois = rois[kept]
    theirs = input.clone().requires_grad_()
    ours = input.contiguous(memory_format=layout).clone(memory_format=torch.preserve_format).requires_grad_()
    expected = torchvisions(name)(theirs, rois, pooled, 1 / stride)
    output = OPS[name](ours, rois, pooled, 1 / stride)
    torch.testing.assert_close(output, expected, rtol=0, atol=TOLERANCE[boxes_dtype])
    grad = torch.randn_like(expected)
    if name == "pool":  # torchvision's gradient takes the map's last row and column in, which its output leaves out
        right, bottom = (rois[:, 1:].view(-1, 2, 2).amax(dim=1) / stride).unbind(1)
        grad[(right >= size[1] - 2) | (bottom >= size[0] - 2)] = 0
    expected.backward(grad)
    output.backward(grad)
    # A cell's gradient sums up to some hundred terms.
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=100 * TOLERANCE[boxes_dtype])
    assert ours.grad.stride() == ours.stride()


@ops
@dtypes
@layouts
def test_reference_in_float64(name: str, dtype: torch.dtype, layout) -> None:
    input = features((2, 2 * 3 * 4, 13, 17), dtype, special=False).contiguous(memory_format=layout)
    rois = torch.cat([ordinary_boxes(12, 2, 52, 68), ordinary_boxes(6, 2, 52, 68)[:, [0, 3, 4, 1, 2]]])
    output = OPS[name](input, rois, (3, 4), 1 / 4)
    expected = slow(name, input.double(), rois, (3, 4), 1 / 4)
    assert output.dtype == dtype
    assert output.is_contiguous(memory_format=layout)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), expected, rtol=rounding, atol=1e-12 if rounding < 1e-10 else 1e-6)


@pytest.mark.parametrize("boxes_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("operator", ["ps_roi_pool", "ps_roi_align"])
def test_hostile_boxes(operator: str, boxes_dtype: torch.dtype) -> None:
    """What a CUDA tensor may hold: rows that are not valid are NaN and take no gradient."""
    input = torch.randn(2, 24, 13, 17)
    rois = hostile_boxes(2, 13, 17).to(boxes_dtype)
    valid = rois.isfinite().all(dim=1) & (rois[:, 0] >= 0) & (rois[:, 0] < 2)
    pooling = Pooling((1.0,), 3, 4, aligned=True, position_sensitive=True)
    pool, adjoint = {
        "ps_roi_pool": (torch_path.average_pool, torch_path.average_pool_adjoint),
        "ps_roi_align": (torch_path.align, torch_path.align_adjoint),
    }[operator]
    output = pool([input], rois, pooling)
    assert output[~valid].isnan().all()
    assert output[valid].isfinite().all()
    grad = torch.randn(output.shape)
    (expected,) = adjoint(grad.masked_fill(~valid[:, None, None, None], 0), rois, pooling, Maps.of([input]))
    grad[~valid] = torch.nan
    assert same_bits(adjoint(grad, rois, pooling, Maps.of([input]))[0], expected)


@pytest.mark.parametrize("operator", ["ps_roi_pool", "ps_roi_align"])
def test_a_bin_off_the_map_is_0_and_takes_no_gradient(operator: str) -> None:
    input = torch.full((1, 4, 6, 6), torch.nan, dtype=torch.float64, requires_grad=True)
    output = OPS[operator.removeprefix("ps_roi_")](input, torch.tensor([[0.0, -20, -20, -10, -10]]), 2)
    assert (output == 0).all()
    output.backward(torch.full_like(output, torch.nan))
    assert (input.grad == 0).all()


@ops
@layouts
@pytest.mark.parametrize(
    ("shape", "count"),
    [((2, 12, 8, 8), 0), ((0, 12, 8, 8), 0), ((2, 0, 8, 8), 4), ((1, 6, 1, 1), 3), ((1, 6, 1, 9), 3)],
)
def test_empty_and_smallest(name: str, shape: tuple[int, int, int, int], count: int, layout) -> None:
    input = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
    output = OPS[name](input, torch.zeros(count, 5), (2, 3))
    assert output.shape == (count, shape[1] // 6, 2, 3)
    output.sum().backward()
    assert input.grad.shape == shape
    assert input.grad.is_contiguous(memory_format=layout)


@ops
def test_bad_arguments(name: str) -> None:
    input, rois = torch.zeros(2, 12, 8, 8), torch.zeros(2, 5)
    with pytest.raises(ValueError, match="input must have a multiple of 2 · 4 channels, some for each bin; got 12"):
        OPS[name](input, rois, (2, 4))
    with pytest.raises(ValueError, match="boxes must be"):
        OPS[name](input, rois[:, 1:], 2)
    with pytest.raises(ValueError, match="row 0"):
        OPS[name](input, rois - 1, 2)
    with pytest.raises(ValueError, match="backend must be one of"):
        OPS[name](input, rois, 2, backend="cuda")
    with pytest.raises(RuntimeError, match="backend 'cupy' cannot run ps_roi"):
        OPS[name](input, rois, 2, backend="cupy")


def test_modules_are_the_functions() -> None:
    input, rois = torch.randn(2, 12, 8, 8), ordinary_boxes(9, 2, 64, 64)
    pool, align = PSRoIPool((3, 2), 1 / 8), PSRoIAlign((3, 2), 1 / 8, 2)
    assert same_bits(pool(input, rois), ps_roi_pool(input, rois, (3, 2), 1 / 8))
    assert same_bits(align(input, rois), ps_roi_align(input, rois, (3, 2), 1 / 8, 2))
    options = "output_size=(3, 2), spatial_scale=0.125"
    assert repr(pool) == f"PSRoIPool({options})"
    assert repr(align) == f"PSRoIAlign({options}, sampling_ratio=2)"
    assert repr(PSRoIPool((3, 2), 1 / 8, backend="torch")) == f"PSRoIPool({options}, backend='torch')"
    assert (
        repr(PSRoIAlign((3, 2), 1 / 8, 2, backend="torch"))
        == f"PSRoIAlign({options}, sampling_ratio=2, backend='torch')"
    )
    parts = [rois[rois[:, 0] == image, 1:] for image in range(2)]
    ordered = rois[rois[:, 0].argsort(stable=True)]
    assert same_bits(pool(input, parts), pool(input, ordered))


@ops
@layouts
def test_gradients_of_first_and_second_order(name: str, layout) -> None:
    torch.manual_seed(0)
    input = torch.randn(2, 4, 5, 4, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    rois = ordinary_boxes(4, 2, 5, 4)
    assert torch.autograd.gradcheck(lambda x: OPS[name](x, rois, 2), input)
    assert torch.autograd.gradgradcheck(lambda x: OPS[name](x, rois, 2).square(), input)


@layouts
@dtypes
def test_opcheck(dtype: torch.dtype, layout) -> None:
    input = torch.randn(2, 12, 8, 9).to(dtype).contiguous(memory_format=layout)
    rois = ordinary_boxes(5, 2, 8, 9)
    operators = torch.ops.fpn_roi
    for leaf in (input, input.clone().requires_grad_()):
        torch.library.opcheck(operators.ps_roi_pool.default, (leaf, rois, 1.0, 3, 2, "torch"))
        torch.library.opcheck(operators.ps_roi_align.default, (leaf, rois, 1.0, 3, 2, -1, "torch"))
    grad = torch.randn(5, 2, 3, 2).to(dtype).contiguous(memory_format=layout).requires_grad_()
    shape = *input.shape, layout is torch.channels_last, "torch"
    torch.library.opcheck(operators.ps_roi_pool_backward.default, (grad, rois, 1.0, 3, 2, *shape))
    torch.library.opcheck(operators.ps_roi_align_backward.default, (grad, rois, 1.0, 3, 2, 2, *shape))


@ops
def test_autocast_leaves_features_and_boxes_as_they_are(name: str) -> None:
    input, rois = torch.randn(1, 8, 64, 64), torch.tensor([[0.0, 1000.3, 1001.7, 2047.9, 2049.1]])
    expected = OPS[name](input.bfloat16(), rois, 2, 1 / 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert OPS[name](input, rois, 2, 1 / 32).dtype == torch.float32
        assert same_bits(OPS[name](input.bfloat16(), rois, 2, 1 / 32), expected)


@ops
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(name: str, dynamic: bool) -> None:
    def head(x: Tensor, rois: Tensor) -> Tensor:
        return OPS[name](x * 2, rois, 2, 1 / 4).relu() + 1

    torch.compiler.reset()
    compiled = torch.compile(head, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size, count in (((2, 8, 16, 20), 9), ((2, 8, 11, 13), 7)):
        input = torch.randn(size, requires_grad=True)
        rois = ordinary_boxes(count, 2, size[2] * 4, size[3] * 4)
        expected, actual = head(input, rois), compiled(input, rois)
        assert same_bits(actual, expected)
        (wanted,) = torch.autograd.grad(expected.square().sum(), input)
        (got,) = torch.autograd.grad(actual.square().sum(), input)
        assert same_bits(got, wanted)


@pytest.mark.parametrize("module", [PSRoIPool(2, 1 / 4), PSRoIAlign(2, 1 / 4, 2)], ids=["pool", "align"])
def test_export_with_dynamic_shapes(module: torch.nn.Module) -> None:
    program = torch.export.export(
        module,
        (torch.randn(2, 8, 16, 20), ordinary_boxes(5, 2, 64, 80)),
        dynamic_shapes=(
            {0: torch.export.Dim("n"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")},
            {0: torch.export.Dim("k")},
        ),
    )
    input, rois = torch.randn(4, 8, 9, 31), ordinary_boxes(8, 4, 36, 124)
    assert same_bits(program.module()(input, rois), module(input, rois))

"""The pyramid poolers against torchvision's, in its detectors too; the operators' contract with PyTorch."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from roi import (
    MultiScaleRoIAlign,
    MultiScaleRoIPool,
    multiscale_roi_align,
    multiscale_roi_pool,
    roi_align,
    roi_pool,
    torch_path,
)
from roi._problem import Maps, Pooling
from roi.torch_path.levels import map_levels
from tests.reference.boxes import hostile_boxes
from tests.reference.comparison import same_bits

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

IMAGE = (200, 300)
SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def pyramid(
    dtype: torch.dtype = torch.float32, layout: torch.memory_format = torch.contiguous_format, channels: int = 3
) -> list[Tensor]:
    """P2–P5 of two images."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(math.ceil(IMAGE[0] * scale), math.ceil(IMAGE[1] * scale)) for scale in SCALES]
    maps = [torch.randn(2, channels, *size, generator=generator, dtype=torch.float64) for size in sizes]
    return [map_.to(dtype).contiguous(memory_format=layout) for map_ in maps]


def boxes_of_all_sizes(count: int, seed: int = 0) -> Tensor:
    """Tensor[count, 5] of float64, image after image: sides of 8 … 1000 pixels, some exactly a level's."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(count, 2, dtype=torch.float64, generator=generator) * torch.tensor([IMAGE[1], IMAGE[0]])
    side = 8 * 125 ** torch.rand(count, 2, dtype=torch.float64, generator=generator)
    side[::5] = 14.0 * 2 ** torch.randint(0, 7, (len(side[::5]), 1), generator=generator)
    index = (torch.arange(count) * 2 // count)[:, None].double()
    return torch.cat([index, centre - side / 2, centre + side / 2], dim=1)


def pyramid_pooling(scales: Sequence[float] = SCALES, canonical: tuple[float, float] = (224, 4), **options) -> Pooling:
    return Pooling(tuple(scales), 2, 2, canonical_scale=canonical[0], canonical_level=canonical[1], **options)


def per_image(rois: Tensor) -> list[Tensor]:
    return [rois[rois[:, 0] == image, 1:] for image in range(2)]


# --- levels


@pytest.mark.torchvision
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("canonical", [(224, 4), (112, 3), (224, 5)])
def test_levels_are_torchvisions(dtype: torch.dtype, canonical: tuple[int, int]) -> None:
    from torchvision.ops.poolers import LevelMapper

    rois = boxes_of_all_sizes(5000).to(dtype)
    mapper = LevelMapper(2, 5, *canonical)
    assert torch.equal(map_levels(rois, pyramid_pooling(canonical=canonical)), mapper([rois[:, 1:]]))


@pytest.mark.parametrize(
    ("side", "level"), [(1, 0), (111.9, 0), (112, 1), (223.9, 1), (224, 2), (447.9, 2), (448, 3), (1e5, 3), (1e30, 3)]
)
def test_equation_1(side: float, level: int) -> None:
    box = torch.tensor([[0, 10, 10, 10 + side, 10 + side]], dtype=torch.float64)
    assert map_levels(box, pyramid_pooling()).item() == level


@pytest.mark.parametrize(
    "corners", [[5.0, 5, 5, 5], [5.0, 5, 5, 500], [500.0, 5, 5, 500], [math.nan, 0, 1, 1], [math.inf, 0, math.inf, 1]]
)
def test_a_box_without_an_area_belongs_to_the_finest_level(corners: list[float]) -> None:
    assert map_levels(torch.tensor([[0.0, *corners]]), pyramid_pooling()).item() == 0


# --- values


@pytest.mark.torchvision
@layouts
@pytest.mark.parametrize("ratio", [2, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("names", [["0", "1", "2", "3"], ["1", "2"], ["2"]])
def test_torchvisions_output_and_gradient(names: list[str], dtype: torch.dtype, ratio: int, layout) -> None:
    import torchvision

    ours = OrderedDict((str(i), map_.requires_grad_()) for i, map_ in enumerate(pyramid(dtype, layout)))
    theirs = OrderedDict((name, map_.detach().clone().requires_grad_()) for name, map_ in ours.items())
    boxes = per_image(boxes_of_all_sizes(80).to(dtype))
    shapes = [IMAGE, (150, 280)]
    expected = torchvision.ops.MultiScaleRoIAlign(names, 7, ratio)(theirs, boxes, shapes)
    output = MultiScaleRoIAlign(names, 7, ratio)(ours, boxes, shapes)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5  # of sums in another order
    torch.testing.assert_close(output, expected, rtol=0, atol=tolerance)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    output.backward(grad)
    for name in names:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=0, atol=100 * tolerance)


def one_by_one(op, features: Sequence[Tensor], rois: Tensor, *args) -> Tensor:
    levels = map_levels(rois, pyramid_pooling()).tolist()
    return torch.cat(
        [op(features[level], box[None], 7, SCALES[level], *args) for level, box in zip(levels, rois, strict=True)]
    )


@layouts
@dtypes
@pytest.mark.parametrize("boxes_dtype", [torch.float32, torch.float64])
def test_align_is_roi_align_of_each_box_on_its_level(boxes_dtype: torch.dtype, dtype: torch.dtype, layout) -> None:
    features, rois = pyramid(dtype, layout), boxes_of_all_sizes(60).to(boxes_dtype)
    output = multiscale_roi_align(features, rois, 7, SCALES, 2, True)
    assert output.dtype == dtype
    assert output.is_contiguous(memory_format=layout)
    tolerance = max(1e-6, torch.finfo(dtype).eps)
    torch.testing.assert_close(output, one_by_one(roi_align, features, rois, 2, True), rtol=tolerance, atol=1e-6)


@layouts
@dtypes
@pytest.mark.parametrize("boxes_dtype", [torch.float32, torch.float64])
def test_pool_is_roi_pool_of_each_box_on_its_level(boxes_dtype: torch.dtype, dtype: torch.dtype, layout) -> None:
    features = [map_.requires_grad_() for map_ in pyramid(dtype, layout)]
    copies = [map_.detach().clone().requires_grad_() for map_ in features]
    rois = boxes_of_all_sizes(60).to(boxes_dtype)
    output, expected = multiscale_roi_pool(features, rois, 7, SCALES), one_by_one(roi_pool, copies, rois)
    assert same_bits(output, expected)
    assert output.is_contiguous(memory_format=layout)
    grad = torch.randn(output.shape).to(dtype)
    output.backward(grad)
    expected.backward(grad)
    for map_, copy in zip(features, copies, strict=True):
        # Here half precision is rounded once; box after box, after each.
        loose = dtype in (torch.float16, torch.bfloat16)
        torch.testing.assert_close(map_.grad, copy.grad, rtol=0, atol=0.2 if loose else 1e-4)
        assert map_.grad.stride() == map_.stride()


@pytest.mark.parametrize("boxes_dtype", [torch.float32, torch.float64])
def test_hostile_boxes(boxes_dtype: torch.dtype) -> None:
    """What a CUDA tensor may hold: rows that are not valid are NaN and take no gradient."""
    features, rois = pyramid(), hostile_boxes(2, *IMAGE).to(boxes_dtype)
    valid = rois.isfinite().all(dim=1) & (rois[:, 0] >= 0) & (rois[:, 0] < 2)
    pooling = pyramid_pooling()
    output = torch_path.align(features, rois, pooling)
    pooled, argmax = torch_path.max_pool_with_argmax(features, rois, pooling)
    for result in (output, pooled):
        assert result[~valid].isnan().all()
        assert result[valid].isfinite().all()
    grad = torch.full_like(output, torch.nan)
    grad[valid] = 1
    clean = grad.nan_to_num(0)
    for backward, args in (
        (torch_path.align_adjoint, (rois, pooling, Maps.of(features))),
        (torch_path.max_gather_adjoint, (rois, argmax, pooling, Maps.of(features))),
    ):
        for actual, expected in zip(backward(grad, *args), backward(clean, *args), strict=True):
            assert same_bits(actual, expected)


@pytest.mark.parametrize("op", [multiscale_roi_align, multiscale_roi_pool])
@pytest.mark.parametrize(("images", "count"), [(2, 0), (0, 0)])
def test_no_boxes(op, images: int, count: int) -> None:
    features = [map_[:images].requires_grad_() for map_ in pyramid()]
    output = op(features, torch.zeros(count, 5), 7, SCALES)
    assert output.shape == (0, 3, 7, 7)
    output.sum().backward()
    for map_ in features:
        assert not map_.grad.any()


@pytest.mark.parametrize("op", [multiscale_roi_align, multiscale_roi_pool])
def test_levels_of_different_formats_take_the_first_ones(op) -> None:
    features, rois = pyramid(), boxes_of_all_sizes(30)
    mixed = [features[0], features[1].contiguous(memory_format=torch.channels_last), *features[2:]]
    assert same_bits(op(mixed, rois, 7, SCALES), op(features, rois, 7, SCALES))


# --- in torchvision's detectors


class Trunk(nn.Module):
    """A pyramid of random convolutions: what a detector needs of a backbone, and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.out_channels = 8

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        levels = [self.stem(x)]
        for _ in range(3):
            levels.append(nn.functional.max_pool2d(levels[-1], 2, ceil_mode=True))
        return OrderedDict(zip(("0", "1", "2", "3"), levels, strict=True))


def detector(kind: str) -> nn.Module:
    from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    torch.manual_seed(0)
    anchors = AnchorGenerator(((16,), (32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 4)
    build = {"faster": FasterRCNN, "mask": MaskRCNN, "keypoint": KeypointRCNN}[kind]
    options = {"rpn_anchor_generator": anchors, "min_size": 128, "max_size": 160, "box_score_thresh": 0.0}
    options |= {"rpn_pre_nms_top_n_test": 100, "rpn_post_nms_top_n_test": 50, "box_detections_per_img": 10}
    return build(Trunk(), num_classes=2 if kind == "keypoint" else 5, **options)


def with_our_poolers(model: nn.Module) -> nn.Module:
    heads = model.roi_heads
    for name in ("box_roi_pool", "mask_roi_pool", "keypoint_roi_pool"):
        pooler = getattr(heads, name, None)
        if pooler is not None:
            setattr(heads, name, MultiScaleRoIAlign(pooler.featmap_names, pooler.output_size, pooler.sampling_ratio))
    return model


@pytest.mark.torchvision
@pytest.mark.parametrize("kind", ["faster", "mask", "keypoint"])
def test_detections_are_the_same(kind: str) -> None:
    images = [torch.rand(3, 96, 128), torch.rand(3, 120, 100)]
    model = detector(kind).eval()
    with torch.inference_mode():
        expected = model(images)
        actual = with_our_poolers(model)(images)
    assert any(len(detection["boxes"]) for detection in expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            # Rounding of the pooled features, through a head of random weights and a box decoder.
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-3)


@pytest.mark.torchvision
@pytest.mark.parametrize("kind", ["faster", "mask", "keypoint"])
def test_losses_and_their_gradients_are_the_same(kind: str) -> None:
    images = [torch.rand(3, 96, 128), torch.rand(3, 120, 100)]
    boxes = torch.tensor([[10.0, 12, 60, 80], [30, 5, 90, 70]])
    target = {"boxes": boxes, "labels": torch.ones(2, dtype=torch.int64)}
    if kind == "keypoint":
        target["keypoints"] = torch.cat([torch.rand(2, 17, 2) * 40 + 20, torch.ones(2, 17, 1)], dim=2)
    outcomes = []
    for change in (lambda model: model, with_our_poolers):
        model = change(detector(kind)).train()
        targets = [dict(target) for _ in images]
        if kind == "mask":
            for image, one in zip(images, targets, strict=True):
                one["masks"] = torch.ones(2, *image.shape[1:], dtype=torch.uint8)
        torch.manual_seed(1)  # the detector samples its proposals
        losses = model(images, targets)
        sum(losses.values()).backward()
        outcomes.append((losses, model.backbone.stem.weight.grad))
    for name, loss in outcomes[0][0].items():
        torch.testing.assert_close(outcomes[1][0][name], loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outcomes[1][1], outcomes[0][1], rtol=1e-3, atol=1e-3 * float(outcomes[0][1].abs().max()))


# --- forms of the arguments


def test_the_fpns_tuple_goes_in_as_it_is() -> None:
    import fpn

    model = fpn.FPN18(upsample="nearest").eval()
    with torch.inference_mode():
        features = model(torch.rand(1, 3, 64, 96))
        output = multiscale_roi_align(features, [torch.tensor([[3.0, 4, 60, 50]])], 7, [1 / s for s in model.strides])
    assert output.shape == (1, model.out_channels, 7, 7)


def test_modules_are_the_functions() -> None:
    features, rois = pyramid(), boxes_of_all_sizes(30)
    named = {"a": features[0], "skipped": features[0], "b": features[1], "c": features[2], "d": features[3]}
    align = MultiScaleRoIAlign(list("abcd"), (7, 5), 2, canonical_scale=100, canonical_level=3)
    options = {"canonical_scale": 100, "canonical_level": 3}
    expected = multiscale_roi_align(features, rois, (7, 5), SCALES, 2, **options)
    assert same_bits(align(named, per_image(rois), [IMAGE, IMAGE]), expected)
    pool = MultiScaleRoIPool(list("abcd"), 3, **options)
    assert same_bits(
        pool(named, per_image(rois), [IMAGE, IMAGE]), multiscale_roi_pool(features, rois, 3, SCALES, **options)
    )
    assert align.output_size == (7, 5)
    assert repr(align) == (
        "MultiScaleRoIAlign(featmap_names=['a', 'b', 'c', 'd'], output_size=(7, 5), sampling_ratio=2)"
    )
    assert repr(pool) == "MultiScaleRoIPool(featmap_names=['a', 'b', 'c', 'd'], output_size=(3, 3))"
    align = MultiScaleRoIAlign(["a"], 7, 2, aligned=True, backend="torch")
    options = "sampling_ratio=2, aligned=True, backend='torch'"
    assert repr(align) == f"MultiScaleRoIAlign(featmap_names=['a'], output_size=(7, 7), {options})"
    pool = MultiScaleRoIPool(["a"], 7, backend="torch")
    assert repr(pool) == "MultiScaleRoIPool(featmap_names=['a'], output_size=(7, 7), backend='torch')"


@pytest.mark.parametrize("op", [multiscale_roi_align, multiscale_roi_pool])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": torch.zeros(2, 3, 8, 8)}, TypeError, "features must be a list of .* per level; got Tensor"),
        ({"features": []}, TypeError, "features must be a list"),
        (
            {"features": [torch.zeros(2, 3, 8, 8), [1]]},
            TypeError,
            r"features\[1\] must be a Tensor\[N, C, H, W\]; got l",
        ),
        (
            {"features": [torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 4, 4)]},
            ValueError,
            r"features\[1\] must have batch",
        ),
        ({"features": [torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 4, 4).half()]}, ValueError, "got .*float16, cpu"),
        ({"boxes": torch.zeros(2, 4)}, ValueError, "boxes must be"),
        ({"boxes": torch.full((1, 5), 2.0)}, ValueError, r"batch indices in \[0, 2\); row 0"),
        ({"spatial_scales": [1 / 4]}, ValueError, "spatial_scales must have one scale per level; got 1 for 2"),
        ({"spatial_scales": [0, 1]}, ValueError, "spatial_scales must be finite and positive"),
        ({"output_size": 0}, ValueError, "output_size"),
        ({"canonical_scale": 0}, ValueError, "canonical_scale must be positive; got 0"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_arguments(op, change: dict[str, object], error: type[Exception], message: str) -> None:
    features = [torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 4, 4)]
    good = {"features": features, "boxes": torch.zeros(2, 5), "output_size": 2, "spatial_scales": [1 / 4, 1 / 8]}
    with pytest.raises(error, match=message):
        op(**(good | change))


def test_bad_arguments_of_the_modules() -> None:
    features, boxes = {"0": torch.zeros(1, 3, 8, 8)}, [torch.zeros(1, 4)]
    with pytest.raises(ValueError, match=r"x must have a map of \['1'\]; got \['0'\]"):
        MultiScaleRoIAlign(["1"], 7, 2)(features, boxes, [(32, 32)])
    with pytest.raises(ValueError, match=r"image_shapes must have the \(height, width\) of an image; got none"):
        MultiScaleRoIPool(["0"], 7)(features, boxes, [])
    with pytest.raises(TypeError, match=r"spatial_scales must be a list or a dict of numbers; got str"):
        MultiScaleRoIAlign(["0"], 7, 2, spatial_scales="0")
    with pytest.raises(ValueError, match=r"spatial_scales must have a scale for a map of \['0'\]; got none"):
        MultiScaleRoIPool(["0"], 7, spatial_scales={"1": 0.5})
    with pytest.raises(ValueError, match=r"spatial_scales must be finite and positive; got -1"):
        MultiScaleRoIPool(["0"], 7, spatial_scales=[-1])
    with pytest.raises(ValueError, match=r"spatial_scales must have one scale per level; got 2 for 1"):
        MultiScaleRoIAlign(["0"], 7, 2, spatial_scales=[1 / 4, 1 / 8])(features, boxes, [(32, 32)])


# --- the operators' contract with PyTorch


@layouts
def test_gradients_of_first_and_second_order(layout) -> None:
    torch.manual_seed(0)
    rois = torch.tensor([[0.0, 1, 2, 9, 12], [1, 0, 0, 24, 20], [1, 3, 3, 4, 5], [0, 5, 6, 14, 15]]).double()
    scales, options = [1 / 4, 1 / 8], {"canonical_scale": 10, "canonical_level": 3}
    assert set(map_levels(rois, pyramid_pooling(scales, (10, 3))).tolist()) == {0, 1}

    def align(*features: Tensor) -> Tensor:
        return multiscale_roi_align(features, rois, 2, scales, 2, **options)

    def pool(*features: Tensor) -> Tensor:
        return multiscale_roi_pool(features, rois, 2, scales, **options)

    # Distinct values a unit apart: a step of the numerical gradient moves no maximum.
    features = [
        torch.randperm(2 * 2 * h * w).double().view(2, 2, h, w).contiguous(memory_format=layout).requires_grad_()
        for h, w in ((5, 6), (3, 3))
    ]
    for op in (align, pool):
        assert torch.autograd.gradcheck(op, features)
        assert torch.autograd.gradgradcheck(lambda *maps, op=op: op(*maps).square(), features)


@layouts
@dtypes
def test_opcheck(dtype: torch.dtype, layout) -> None:
    features, rois = pyramid(dtype, layout), boxes_of_all_sizes(12)
    operators, canonical = torch.ops.fpn_roi, (224.0, 4.0)
    shapes = 2, 3, [map_.shape[2] for map_ in features], [map_.shape[3] for map_ in features]
    shapes = *shapes, layout is torch.channels_last, "torch"
    align, pool = (SCALES, 3, 2, 2, True, *canonical), (SCALES, 3, 2, *canonical)
    leaves = [map_.clone().requires_grad_() for map_ in features]
    for maps in (features, leaves):
        torch.library.opcheck(operators.multiscale_roi_align.default, (maps, rois, *align, "torch"))
        torch.library.opcheck(operators.multiscale_roi_pool.default, (maps, rois, *pool, "torch"))
        torch.library.opcheck(operators.multiscale_roi_pool_with_argmax.default, (maps, rois, *pool, "torch"))
    output, argmax = operators.multiscale_roi_pool_with_argmax(features, rois, *pool, "torch")
    for maps in (features, leaves):
        torch.library.opcheck(operators.multiscale_roi_pool_gather.default, (maps, rois, argmax, *pool, "torch"))
    grad = torch.randn_like(output).requires_grad_()
    torch.library.opcheck(operators.multiscale_roi_align_backward.default, (grad, rois, *align, *shapes))
    torch.library.opcheck(operators.multiscale_roi_pool_backward.default, (grad, rois, argmax, *pool, *shapes))


@pytest.mark.parametrize("op", [multiscale_roi_align, multiscale_roi_pool])
def test_some_levels_need_no_gradient(op) -> None:
    features, rois = pyramid(), boxes_of_all_sizes(20).requires_grad_()
    features[1].requires_grad_()
    op(features, rois, 7, SCALES).sum().backward()
    assert features[1].grad is not None
    assert features[0].grad is None
    assert rois.grad is None
    with torch.no_grad():
        assert not op(features, rois, 7, SCALES).requires_grad


@pytest.mark.parametrize("op", [multiscale_roi_align, multiscale_roi_pool])
def test_autocast_leaves_features_and_boxes_as_they_are(op) -> None:
    features, rois = pyramid(), boxes_of_all_sizes(20)
    half = [map_.bfloat16() for map_ in features]
    expected = op(half, rois, 7, SCALES)
    with torch.autocast("cpu", torch.bfloat16):
        assert op(features, rois, 7, SCALES).dtype == torch.float32
        assert same_bits(op(half, rois, 7, SCALES), expected)


@pytest.mark.parametrize("op", [multiscale_roi_align, multiscale_roi_pool])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(op, dynamic: bool) -> None:
    def head(features: list[Tensor], boxes: list[Tensor]) -> Tensor:
        return op([map_ * 2 for map_ in features], boxes, 7, SCALES).relu() + 1

    torch.compiler.reset()
    compiled = torch.compile(head, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for crop, count in ((0, 20), (1, 14)):
        features = [map_[:, :, crop:].clone().requires_grad_() for map_ in pyramid()]
        boxes = per_image(boxes_of_all_sizes(count))
        expected, actual = head(features, boxes), compiled(features, boxes)
        assert same_bits(actual, expected)
        wanted = torch.autograd.grad(expected.square().sum(), features)
        got = torch.autograd.grad(actual.square().sum(), features)
        for a, b in zip(got, wanted, strict=True):
            assert same_bits(a, b)


@pytest.mark.parametrize("op", [multiscale_roi_align, multiscale_roi_pool])
def test_export_with_any_number_of_boxes(op) -> None:
    class Head(nn.Module):
        def forward(self, features: list[Tensor], boxes: Tensor) -> Tensor:
            return op(features, boxes, 7, SCALES)

    dynamic = ([{}] * 4, {0: torch.export.Dim("k")})
    program = torch.export.export(Head(), (pyramid(), boxes_of_all_sizes(20)), dynamic_shapes=dynamic)
    rois = boxes_of_all_sizes(32, seed=1)
    assert same_bits(program.module()(pyramid(), rois), Head()(pyramid(), rois))


class Head(nn.Module):
    """Two maps of the images, pooled."""

    def __init__(self, pooler: MultiScaleRoIAlign) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(3, 4, 3, stride, padding=1) for stride in (4, 8))
        self.pooler = pooler

    def forward(self, images: Tensor, boxes: list[Tensor]) -> Tensor:
        maps = {str(level): convolution(images) for level, convolution in enumerate(self.levels)}
        return self.pooler(maps, boxes, [tuple(images.shape[-2:])] * len(boxes))


def images_and_boxes(height: int, width: int, *counts: int) -> tuple[Tensor, list[Tensor]]:
    return torch.randn(2, 3, height, width), [boxes_of_all_sizes(count)[:, 1:] for count in counts]


# The sides of the images and the number of boxes of each.
OPEN = (
    {2: torch.export.Dim("height", min=33), 3: torch.export.Dim("width", min=33)},
    [{0: torch.export.Dim("first")}, {0: torch.export.Dim("second")}],
)


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_the_module_with_open_sizes(strict: bool) -> None:
    """Scales that are given: neither the images' sides nor the number of boxes is tied to the example's."""
    head = Head(MultiScaleRoIAlign(["0", "1"], 3, 2, spatial_scales=[1 / 4, 1 / 8]))
    program = torch.export.export(head, images_and_boxes(64, 80, 4, 5), dynamic_shapes=OPEN, strict=strict)
    for given in (images_and_boxes(64, 80, 4, 5), images_and_boxes(101, 37, 7, 2), images_and_boxes(200, 333, 0, 1)):
        assert same_bits(program.module()(*given), head(*given))


def test_export_with_scales_that_the_example_would_decide() -> None:
    """Scales inferred from the example's sizes would be wrong at others: the export says what to give."""
    head, example = Head(MultiScaleRoIAlign(["0", "1"], 3, 2)), images_and_boxes(64, 80, 4, 5)
    with pytest.raises(ValueError, match=r"sizes that are left open: give the pooler spatial_scales"):
        torch.export.export(head, example, dynamic_shapes=OPEN, strict=False)
    with pytest.raises(Exception, match=r"spatial_scales|onstraint"):
        torch.export.export(head, example, dynamic_shapes=OPEN, strict=True)
    head(*example)  # the first call infers them, once and for all
    program = torch.export.export(head, example, dynamic_shapes=OPEN, strict=False)
    given = images_and_boxes(101, 37, 7, 2)
    assert same_bits(program.module()(*given), head(*given))

"""The RoI operators in ONNX: exported by torch, run by onnxruntime, beside the operators themselves."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from fpn import FPN
from fpn.resnet import BasicBlock, ResNet
from roi import (
    MultiScaleRoIAlign,
    MultiScaleRoIPool,
    RoIPool,
    multiscale_roi_align,
    multiscale_roi_pool,
    ps_roi_align,
    ps_roi_pool,
    roi_align,
    roi_pool,
)
from tests.reference.comparison import largest_deviation, same_bits
from tests.reference.random_weights import randomise

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

from roi.onnx import translations  # noqa: E402 - it needs onnxscript

version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
backbones = pytest.mark.skipif(version < (2, 13), reason="torch 2.6 does not leave a backbone's sizes open")

Head = Callable[[Any, Tensor], Tensor]
SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
OPEN = {"features": {0: Dim("batch"), 2: Dim("height"), 3: Dim("width")}, "boxes": {0: Dim("boxes")}}
LEVEL = {0: Dim("batch"), 2: Dim.AUTO, 3: Dim.AUTO}
SIZES = [(1, 1, 1), (3, 31, 8), (2, 1, 40), (1, 50, 84)]  # (batch, height, width) of maps
COUNTS = (0, 1, 50)  # boxes
# Of the largest value. The sums are float32's, and so is the place of a sample: at cell 100 it is 1e-5 of a cell off.
TOLERANCE = 1e-5


class Heads(nn.Module):
    """Functions of features and boxes as one module, for every export takes seconds."""

    def __init__(self, *functions: Head) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, features: Any, boxes: Tensor) -> list[Tensor]:
        return [function(features, boxes) for function in self.functions]


class InOnnxruntime:
    """A module exported with these example inputs and open dimensions, in onnxruntime on the CPU."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], dynamic_shapes: Any, **options: Any) -> None:
        program = torch.onnx.export(
            module.eval(),
            args,
            dynamo=True,
            custom_translation_table=translations(),
            dynamic_shapes=dynamic_shapes,
            verbose=False,
            **options,
        )
        self.file = program.model_proto
        onnx.checker.check_model(self.file, full_check=True)
        assert not self.file.functions
        assert {node.domain for node in self.file.graph.node} == {""}
        self.operators = {node.op_type for node in self.file.graph.node}
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(self.file.SerializeToString(), providers=providers)

    def __call__(self, *args: Any) -> list[Tensor]:
        tensors = [part for arg in args for part in (arg if isinstance(arg, list) else [arg])]
        names = [input.name for input in self.session.get_inputs()]
        feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(output) for output in self.session.run(None, feed)]


def all_same_bits(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return all(same_bits(a, b) for a, b in zip(actual, expected, strict=True))


def random_rois(count: int, batch: int, height: float, width: float, seed: int = 0) -> Tensor:
    """On, off and partly on an image of height × width; some reversed in one or both sides, some points, some whole."""
    generator = torch.Generator().manual_seed(seed)
    side = torch.tensor([width, height])
    corner = (torch.rand(count, 2, generator=generator) * 1.8 - 0.4) * side
    size = torch.rand(count, 2, generator=generator) ** 2 * side * 1.5
    size[::7] *= -1
    size[1::7, 0] *= -1
    size[2::7] = 0
    rois = torch.cat([torch.zeros(count, 1), corner, corner + size], dim=1)
    rois[3::7] = rois[3::7].round()
    rois[:, 0] = torch.randint(0, batch, (count,), generator=generator)
    return rois


def pyramid(batch: int, height: int, width: int, levels: int = 4) -> list[Tensor]:
    return [torch.randn(batch, 3, -(-height // 2**k), -(-width // 2**k)) for k in range(2, 2 + levels)]


@pytest.mark.parametrize(("scale", "output_size"), [(1 / 16, 7), (0.25, (3, 5)), (0.3, (7, 2)), (1.0, 1)])
def test_roi_align(scale: float, output_size: Any) -> None:
    options = list(product((-1, 1, 2, 3), (False, True)))  # sampling_ratio, aligned
    heads = [
        partial(roi_align, output_size=output_size, spatial_scale=scale, sampling_ratio=ratio, aligned=aligned)
        for ratio, aligned in options
    ]
    runtime = InOnnxruntime(Heads(*heads), (torch.randn(2, 3, 13, 17), random_rois(5, 2, 100, 100)), OPEN)
    assert "RoiAlign" in runtime.operators
    for seed, (batch, height, width) in enumerate(SIZES):
        features = torch.randn(batch, 3, height, width)
        for count in COUNTS:
            rois = random_rois(count, batch, height / scale, width / scale, seed)
            assert largest_deviation(runtime(features, rois), Heads(*heads)(features, rois)) < TOLERANCE


@pytest.fixture(scope="module")
def max_pooling() -> tuple[InOnnxruntime, Heads]:
    options = [(7, 1 / 16), (7, 1.0), ((3, 5), 0.25), ((7, 2), 0.3)]
    module = Heads(*(RoIPool(*each) for each in options))
    return InOnnxruntime(module, (torch.randn(2, 3, 13, 17), random_rois(5, 2, 100, 100)), OPEN), module


@pytest.mark.parametrize(("batch", "height", "width"), SIZES)
def test_roi_pool(batch: int, height: int, width: int, max_pooling: tuple[InOnnxruntime, Heads]) -> None:
    runtime, module = max_pooling
    assert "MaxRoiPool" in runtime.operators
    features = torch.randn(batch, 3, height, width)
    for scale, count in product((1 / 16, 1.0, 0.25, 0.3), COUNTS):
        rois = random_rois(count, batch, height / scale, width / scale)
        assert all_same_bits(runtime(features, rois), module(features, rois))


def test_roi_pool_of_every_size_and_half_cells(max_pooling: tuple[InOnnxruntime, Heads]) -> None:
    """Of 57, 114 and 121 cells float32 makes bins that are a cell too large; halves are rounded away from zero."""
    runtime, module = max_pooling
    features = torch.arange(3.0 * 128 * 128).reshape(1, 3, 128, 128)
    image, size = torch.zeros(126), torch.arange(126.0)
    whole = torch.stack([image, image, image, size, size.flip(0)], dim=1)
    half = torch.stack([image, size - 63.5, 0.5 - size, size - 60.5, size + 0.5], dim=1)
    for boxes in (whole, half, torch.nextafter(half, torch.zeros(())), torch.nextafter(half, half * 2)):
        rois = boxes * torch.tensor([1.0, 16, 16, 16, 16])
        for maps, given in product((features, -features), (boxes, rois)):
            assert all_same_bits(runtime(maps, given), module(maps, given))


def test_roi_pool_of_far_boxes(max_pooling: tuple[InOnnxruntime, Heads]) -> None:
    runtime, module = max_pooling
    features = torch.randn(1, 3, 20, 20)
    rois = torch.tensor([[0, -1e9, -1e9, 1e9, 1e9], [0, 0, -1e30, 9, 1e30], [0, 1e12, 3, 2e12, 9]])
    assert all_same_bits(runtime(features, rois), module(features, rois))


def test_roi_pool_gives_nan_where_there_is_one(max_pooling: tuple[InOnnxruntime, Heads]) -> None:
    runtime, module = max_pooling
    features, rois = torch.randn(2, 3, 20, 20), random_rois(60, 2, 20, 20)
    features[torch.rand(features.shape) < 0.02] = torch.nan
    features[torch.rand(features.shape) < 0.02] = torch.inf
    features[1, 2] = torch.nan
    expected = module(features, rois)
    assert 0 < expected[1].isnan().sum() < expected[1].numel()
    assert all_same_bits(runtime(features, rois), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("box_dtype", [torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype, box_dtype: torch.dtype) -> None:
    """bfloat16, which NumPy has not, within the graph."""
    given = torch.float32 if dtype == torch.bfloat16 else dtype

    def one(op: Callable[..., Tensor]) -> Head:
        return lambda features, rois: op(features[0].to(dtype), rois, 7, SCALES[0]).to(given)

    def several(op: Callable[..., Tensor]) -> Head:
        return lambda features, rois: op([map_.to(dtype) for map_ in features], rois, 7, SCALES).to(given)

    heads = [one(roi_align), several(multiscale_roi_align)]
    if dtype != torch.float64:  # which onnxruntime's MaxRoiPool does not take
        heads += [one(roi_pool), several(multiscale_roi_pool)]
    features = [map_.to(given) for map_ in pyramid(1, 256, 256)]
    rois = random_rois(40, 1, 256, 256).to(box_dtype)
    actual = InOnnxruntime(Heads(*heads), (features, rois), None)(features, rois)
    expected = Heads(*heads)(features, rois)
    # A mean is rounded to half precision once more: to its neighbour where the float32 sums differ in their last bit.
    neighbour = {torch.float16: 2**-10, torch.bfloat16: 2**-7}.get(dtype, 0.0)
    assert largest_deviation(actual[:2], expected[:2]) < TOLERANCE + neighbour
    assert all_same_bits(actual[2:], expected[2:])


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_pyramid(levels: int) -> None:
    scales = SCALES[:levels]
    heads = [
        lambda features, rois: multiscale_roi_align(features, rois, (7, 5), scales, 2),
        lambda features, rois: multiscale_roi_align(features, rois, 7, scales, -1, True),
        lambda features, rois: multiscale_roi_align(
            features, rois, 7, scales, 2, canonical_scale=99, canonical_level=3
        ),
        lambda features, rois: multiscale_roi_pool(features, rois, (7, 5), scales),
    ]
    dynamic = {"features": [LEVEL] * levels, "boxes": OPEN["boxes"]}
    runtime = InOnnxruntime(Heads(*heads), (pyramid(2, 256, 320, levels), random_rois(5, 2, 256, 320)), dynamic)
    for seed, (batch, height, width) in enumerate([(1, 64, 64), (3, 800, 601), (2, 513, 1333)]):
        maps = pyramid(batch, height, width, levels)
        for count in (0, 1, 2, 100):
            rois = random_rois(count, batch, height, width, seed)
            assert largest_deviation(runtime(maps, rois), Heads(*heads)(maps, rois)) < TOLERANCE


def test_boxes_of_one_level() -> None:
    """So that the others have none; some of exactly the size at which a level begins, or next to it."""
    module = Heads(lambda features, rois: multiscale_roi_align(features, rois, 2, SCALES, 2))
    dynamic = {"features": [LEVEL] * 4, "boxes": OPEN["boxes"]}
    runtime = InOnnxruntime(module, (pyramid(2, 256, 320), random_rois(5, 2, 256, 320)), dynamic)
    maps = pyramid(1, 480, 640)
    for size in (1.0, 20.0, 111.999, 112.0, 223.999, 224.0, 224.001, 448.0, 5000.0):
        for count in (1, 3):
            rois = torch.tensor([[0.0, 0.0, 0.0, size, size]]).repeat(count, 1)
            assert largest_deviation(runtime(maps, rois), module(maps, rois)) < TOLERANCE


def small_fpn(**options: Any) -> FPN:
    torch.manual_seed(0)
    return randomise(FPN(ResNet(BasicBlock, (1, 1, 1, 1)), out_channels=16, **options)).eval()


class Detector(nn.Module):
    """A backbone and poolers of its levels, as torchvision's detectors have them."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = small_fpn(upsample="nearest", smooth_top=True, extra="maxpool")
        self.box_pooler = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
        self.mask_pooler = MultiScaleRoIAlign(["0", "1", "2", "3"], 14, 0)
        self.max_pooler = MultiScaleRoIPool(["0", "1", "2", "3"], 7)

    def forward(self, images: Tensor, boxes: list[Tensor]) -> list[Tensor]:
        levels = dict(zip("01234", self.backbone(images), strict=True))
        image_shapes = [tuple(images.shape[-2:])] * len(boxes)
        return [pooler(levels, boxes, image_shapes) for pooler in (self.box_pooler, self.mask_pooler, self.max_pooler)]


@backbones
def test_backbone_and_poolers() -> None:
    """Images and the boxes of each in, pooled features out, in one file."""
    model = Detector().eval()
    sides = {2: Dim("height", min=65), 3: Dim("width", min=65)}
    dynamic = {"images": sides, "boxes": [{0: Dim("first")}, {0: Dim("second")}]}
    example = torch.randn(2, 3, 128, 160), [random_rois(k, 1, 128, 160)[:, 1:] for k in (4, 5)]
    runtime = InOnnxruntime(model, example, dynamic)
    assert [input.shape for input in runtime.session.get_inputs()] == [
        [2, 3, "height", "width"],
        ["first", 4],
        ["second", 4],
    ]
    with torch.no_grad():
        for height, width in ((128, 160), (320, 256), (301, 467)):
            images = torch.randn(2, 3, height, width)
            for counts in ((7, 20), (0, 1), (1, 0), (0, 0)):
                boxes = [random_rois(k, 1, height, width, seed)[:, 1:] for seed, k in enumerate(counts)]
                assert largest_deviation(runtime(images, boxes), model(images, boxes)) < 1e-4


@backbones
@pytest.mark.parametrize("fused", [False, True])
def test_open_batch(fused: bool) -> None:
    """Boxes that have their image's number beside them."""

    class AnyBatch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = small_fpn().fuse() if fused else small_fpn()

        def forward(self, images: Tensor, boxes: Tensor) -> list[Tensor]:
            return [multiscale_roi_align(self.backbone(images), boxes, 7, SCALES, 2)]

    model = AnyBatch().eval()
    images = {0: Dim("batch"), 2: Dim("height", min=65), 3: Dim("width", min=65)}
    example = torch.randn(2, 3, 128, 160), random_rois(5, 2, 128, 160)
    runtime = InOnnxruntime(model, example, {"images": images, "boxes": OPEN["boxes"]})
    with torch.no_grad():
        for batch, height, width, count in ((1, 96, 128, 1), (3, 301, 467, 64), (2, 200, 70, 0)):
            inputs = torch.randn(batch, 3, height, width), random_rois(count, batch, height, width)
            assert largest_deviation(runtime(*inputs), model(*inputs)) < 1e-4


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("opset", [18, 20])
def test_opsets(opset: int, optimize: bool) -> None:
    """Of features that require a gradient, for which max pooling has a second result."""
    weight = nn.Parameter(torch.ones(3, 1, 1))
    module = Heads(
        lambda features, boxes: roi_align(features * weight, boxes, 7, 1 / 4),
        lambda features, boxes: roi_pool(features * weight, boxes, 7, 1 / 4),
    )
    module.weight = weight
    inputs = torch.randn(2, 3, 13, 17), random_rois(5, 2, 52, 68)
    runtime = InOnnxruntime(module, inputs, OPEN, opset_version=opset, optimize=optimize)
    assert ("", opset) in {(entry.domain, entry.version) for entry in runtime.file.opset_import}
    with torch.no_grad():
        assert largest_deviation(runtime(*inputs), module(*inputs)) < TOLERANCE


@pytest.mark.parametrize("op", [ps_roi_align, ps_roi_pool])
def test_position_sensitive_operators_are_refused_by_name(op: Callable[..., Tensor]) -> None:
    example = torch.randn(1, 8, 9, 9), random_rois(3, 1, 9, 9)
    with pytest.raises(torch.onnx.OnnxExporterError, match=rf"No ONNX function found for .*fpn_roi\.{op.__name__}"):
        InOnnxruntime(Heads(partial(op, output_size=2)), example, None)


def test_missing_onnxscript_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.delitem(sys.modules, "roi.onnx")
    with pytest.raises(ImportError, match="ONNX export needs onnxscript: pip install onnx onnxscript"):
        importlib.import_module("roi.onnx")

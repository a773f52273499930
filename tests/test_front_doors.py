"""The poolers in torchvision's own detectors: through its constructors, in files, at sizes that pipelines meet."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import roi
from fpn import FPN18

pytestmark = pytest.mark.torchvision

NAMES = ["0", "1", "2", "3"]
# Panoramas, text lines, small images, sides that no stride divides.
SIZES = [(100, 2000), (40, 60), (33, 33), (65, 67), (801, 161)]


def pyramid(size: int = 64) -> OrderedDict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sides = [size // 2**level for level in range(4)]
    return OrderedDict(
        (name, torch.randn(2, 8, side, side, generator=generator)) for name, side in zip(NAMES, sides, strict=True)
    )


def boxes(count: int = 9, *, far: float = 200) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(2, count, 2, 2, generator=generator).sort(dim=2).values.flatten(2) * far
    return list(corners.unbind())


def theirs(*arguments: object, **options: object) -> nn.Module:
    from torchvision.ops import MultiScaleRoIAlign

    return MultiScaleRoIAlign(*arguments, **options)


def detector(kind: str, pooler: Callable[..., nn.Module], **options: object) -> nn.Module:
    """A detector over our backbone, with these poolers given to its constructor."""
    from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN

    from fpn.detection import TorchvisionBackbone

    torch.manual_seed(0)
    backbone = TorchvisionBackbone(FPN18())
    poolers = {"box_roi_pool": pooler(NAMES, 7, 2)}
    if kind != "faster":
        poolers[f"{kind}_roi_pool"] = pooler(NAMES, 14, 2)
    build = {"faster": FasterRCNN, "mask": MaskRCNN, "keypoint": KeypointRCNN}[kind]
    sizes = {"min_size": 96, "max_size": 160, "box_detections_per_img": 5, "rpn_post_nms_top_n_test": 30}
    return build(backbone, 3, **poolers, **{**sizes, **options}).eval()


@pytest.mark.parametrize("kind", ["faster", "mask", "keypoint"])
def test_constructors_take_the_poolers(kind: str) -> None:
    ours, original = (detector(kind, pooler) for pooler in (roi.MultiScaleRoIAlign, theirs))
    images = [torch.rand(3, 120, 150), torch.rand(3, 96, 96)]
    with torch.inference_mode():
        for found, expected in zip(ours(images), original(images), strict=True):
            assert found.keys() == expected.keys()
            for name in found:
                torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-3)
    assert isinstance(ours.roi_heads.box_roi_pool, roi.MultiScaleRoIAlign)
    assert ours.roi_heads.box_roi_pool.scales == original.roi_heads.box_roi_pool.scales


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_whole_detector_is_copied_and_saved(way: str) -> None:
    model = detector("mask", roi.MultiScaleRoIAlign)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert type(twin.roi_heads.mask_roi_pool) is roi.MultiScaleRoIAlign
    images = [torch.rand(3, 96, 120)]
    with torch.inference_mode():
        for name, expected in model(images)[0].items():
            assert torch.equal(twin(images)[0][name], expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("options", [{"min_size": 40, "max_size": 1333}, {"min_size": 33, "max_size": 2000}], ids=str)
def test_any_image_comes_first(size: tuple[int, int], options: dict[str, int]) -> None:
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    from fpn.detection import accelerate

    none = {"weights": None, "weights_backbone": None}
    model = accelerate(fasterrcnn_resnet50_fpn(**none, rpn_post_nms_top_n_test=20, **options).eval())
    with torch.inference_mode():
        model([torch.rand(3, *size)])
    assert model.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def test_levels_of_equal_strides_and_with_gaps() -> None:
    """MobileNet's pyramid has two levels of stride 32; `returned_layers` may leave some out."""
    from torchvision.models.detection import FasterRCNN, fasterrcnn_mobilenet_v3_large_fpn
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    from fpn.detection import accelerate

    torch.manual_seed(0)
    mobile = fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None, min_size=96, max_size=160)
    gaps = FasterRCNN(
        resnet_fpn_backbone(backbone_name="resnet18", weights=None, returned_layers=[2, 4]),
        3,
        rpn_anchor_generator=AnchorGenerator(((16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 3),
        box_roi_pool=theirs(["0", "1"], 7, 2),
        min_size=96,
        max_size=160,
    )
    for model in (mobile.eval(), gaps.eval()):
        fast = accelerate(copy.deepcopy(model))
        images = [torch.rand(3, 96, 128)]
        with torch.inference_mode():
            for name, expected in model(images)[0].items():
                torch.testing.assert_close(fast(images)[0][name], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("scales", [[1 / 4, 1 / 8, 1 / 8, 1 / 32], [1 / 3, 1 / 7, 1 / 20, 1 / 50]], ids=str)
def test_what_is_set_on_a_pooler_holds(scales: list[float]) -> None:
    """torchvision's attributes mean the same on ours: `scales`, `map_levels`, and None to infer anew."""
    from torchvision.ops.poolers import LevelMapper

    ours, original = roi.MultiScaleRoIAlign(NAMES, 3, 2), theirs(NAMES, 3, 2)
    shapes = [(256, 256), (256, 256)]
    for pooler in (ours, original):
        pooler.scales, pooler.map_levels = scales, LevelMapper(2, 5)
    torch.testing.assert_close(ours(pyramid(), boxes(), shapes), original(pyramid(), boxes(), shapes))
    for pooler in (ours, original):
        pooler.map_levels = lambda per_image: torch.full((sum(map(len, per_image)),), 2)
    torch.testing.assert_close(ours(pyramid(), boxes(), shapes), original(pyramid(), boxes(), shapes))
    for pooler in (ours, original):
        pooler.scales = None
    torch.testing.assert_close(ours(pyramid(), boxes(), shapes), original(pyramid(), boxes(), shapes))
    assert ours.scales == original.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def test_accelerate_keeps_what_was_set_on_a_pooler() -> None:
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    from fpn.detection import accelerate

    model = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).eval()
    pooler = model.roi_heads.box_roi_pool
    pooler.scales, pooler.map_levels = (
        [1 / 4, 1 / 8, 1 / 8, 1 / 32],
        lambda per_image: torch.zeros(9, dtype=torch.int64),
    )
    before = copy.deepcopy(pooler)
    accelerated = accelerate(model).roi_heads.box_roi_pool
    shapes = [(256, 256), (256, 256)]
    per_image = [boxes()[0], boxes()[1][:0]]
    torch.testing.assert_close(accelerated(pyramid(), per_image, shapes), before(pyramid(), per_image, shapes))


def test_import_loads_no_framework() -> None:
    program = (
        "import sys, roi, fpn; print([name for name in ('torchvision', 'cupy', 'detectron2') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


@pytest.mark.parametrize("kind", ["numpy", "int64", "int32 numpy", "requires_grad", "no boxes", "BoundingBoxes"])
def test_forms_of_boxes(kind: str) -> None:
    """A pooler gives for each form what torchvision's gives for the same boxes as float32 tensors."""
    from torchvision.tv_tensors import BoundingBoxes

    whole = [box.round() for box in boxes()]
    given: list[object] = {
        "numpy": [box.numpy() for box in whole],
        "int64": [box.long() for box in whole],
        "int32 numpy": [box.numpy().astype(np.int32) for box in whole],
        "requires_grad": [box.clone().requires_grad_() for box in whole],
        "no boxes": [torch.empty(0, 4), torch.zeros(0, dtype=torch.int64)],
        "BoundingBoxes": [BoundingBoxes(box, format="XYXY", canvas_size=(256, 256)) for box in whole],
    }[kind]
    if kind == "no boxes":
        whole = [torch.empty(0, 4)] * 2
    shapes = [(256, 256), (256, 256)]
    found, expected = (
        pooler(pyramid(), form, shapes)
        for pooler, form in ((roi.MultiScaleRoIAlign(NAMES, 3, 2), given), (theirs(NAMES, 3, 2), whole))
    )
    torch.testing.assert_close(found.detach(), expected)


def test_frozen_features_and_boxes_that_require_gradients() -> None:
    """requires_grad of the output is as torchvision's."""
    from torchvision import ops

    input, rois = torch.randn(1, 2, 8, 8), torch.tensor([[0.0, 0, 0, 6, 6]], requires_grad=True)
    for name in ("roi_align", "roi_pool"):
        assert getattr(roi, name)(input, rois, 2).requires_grad == getattr(ops, name)(input, rois, 2).requires_grad


def test_boxes_of_another_format_are_named() -> None:
    from torchvision.tv_tensors import BoundingBoxes

    form = BoundingBoxes(torch.rand(3, 4), format="CXCYWH", canvas_size=(64, 64))
    with pytest.raises(ValueError, match="got boxes of the format CXCYWH"):
        roi.roi_align(torch.rand(1, 2, 16, 16), [form], 2)


def test_scalars_of_any_kind() -> None:
    input, rois = torch.rand(1, 2, 16, 16), [boxes(far=60)[0]]
    expected = roi.roi_align(input, rois, (2, 3), 0.25, 2)
    for size in ([2, 3], torch.Size((2, 3)), np.array([2, 3])):
        for scale in (np.float32(0.25), torch.tensor(0.25), (0.25, 0.25)):
            assert torch.equal(roi.roi_align(input, rois, size, scale, np.int64(2)), expected)
    tall = roi.roi_align(input, rois, (2, 3), (0.125, 0.25), 2)
    half = [rois[0] * torch.tensor([1, 0.5, 1, 0.5])]
    torch.testing.assert_close(tall, roi.roi_align(input, half, (2, 3), 0.25, 2))

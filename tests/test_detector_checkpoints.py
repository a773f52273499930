"""Around an accelerated detector: saving, loading, resuming and averaging, as training scripts do them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fpn import FPN18, SimpleFeaturePyramid
from fpn.detection import TorchvisionBackbone, accelerate
from tests.reference.comparison import relative_error, unmatched
from tests.test_detection import DETECTORS, output_of, photos, random_detector, target

pytestmark = pytest.mark.torchvision


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    image = photos()[0]
    torch.manual_seed(1)  # of the samples that the losses take
    loss: Tensor = sum(model.train()([image], [target(*image.shape[1:])]).values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.005, momentum=0.9)


@pytest.mark.parametrize(
    "name",
    ["FasterRCNN", "FasterRCNN, batch norm", "MaskRCNN", "RetinaNet, P6 from C5", "FCOS", "FasterRCNN v2"],
)
def test_state_dict_is_torchvisions(name: str, tmp_path: Path) -> None:
    original = random_detector(name)
    detector = accelerate(copy.deepcopy(original))
    assert list(detector.state_dict()) == list(original.state_dict())
    assert all(torch.equal(value, original.state_dict()[key]) for key, value in detector.state_dict().items())
    for kind in ("named_parameters", "named_buffers"):
        assert [part for part, _ in getattr(detector, kind)()] == [part for part, _ in getattr(original, kind)()]

    with torch.no_grad():
        for value in detector.state_dict().values():  # by way of a file, into torchvision's and back
            value.mul_(2)
    torch.save(detector.state_dict(), tmp_path / "model.pth")
    original.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))
    twin = accelerate(random_detector(name))
    twin.load_state_dict(original.state_dict())
    for key, value in detector.state_dict().items():
        assert torch.equal(original.state_dict()[key], value), key
        assert torch.equal(twin.state_dict()[key], value), key


def test_files_from_before_013_load() -> None:
    """Their convolutions in the neck lack the ".0"."""
    original = random_detector("FasterRCNN")
    old = {
        key.replace(".0.weight", ".weight").replace(".0.bias", ".bias") if "_blocks." in key else key: value
        for key, value in original.state_dict().items()
    }
    assert "backbone.fpn.inner_blocks.0.weight" in old
    detector = accelerate(random_detector("FasterRCNN"))
    with torch.no_grad():
        detector.backbone.fpn.inner_blocks[0][0].weight.zero_()
    detector.load_state_dict(old)
    assert torch.equal(
        detector.state_dict()["backbone.fpn.inner_blocks.0.0.weight"], old["backbone.fpn.inner_blocks.0.weight"]
    )


@pytest.mark.parametrize("start", ["torchvision", "accelerated"])
@pytest.mark.parametrize("resume", ["torchvision", "accelerated"])
def test_training_is_resumed_across_the_two(start: str, resume: str, tmp_path: Path) -> None:
    """Model and optimizer, saved after two steps, go on with the losses of those that were not interrupted."""
    change: dict[str, Callable[[nn.Module], nn.Module]] = {
        "torchvision": lambda model: model,
        "accelerated": accelerate,
    }
    model = change[start](random_detector("FasterRCNN, batch norm"))
    optimizer = optimizer_of(model)
    for _ in range(2):
        training_step(model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pth")
    expected = [training_step(model, optimizer) for _ in range(2)]

    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    resumed = change[resume](DETECTORS["FasterRCNN, batch norm"]())
    resumed.load_state_dict(checkpoint["model"])
    optimizer = optimizer_of(resumed)
    optimizer.load_state_dict(checkpoint["optimizer"])
    losses = [training_step(resumed, optimizer) for _ in range(2)]
    assert losses == pytest.approx(expected, rel=1e-3)


def test_the_whole_detector_is_copied_and_saved(tmp_path: Path) -> None:
    detector = accelerate(random_detector("FasterRCNN"))
    expected = output_of(detector, photos()[:1])[0]
    torch.save(detector, tmp_path / "detector.pth")
    for twin in (copy.deepcopy(detector), torch.load(tmp_path / "detector.pth", weights_only=False)):
        assert unmatched(output_of(twin, photos()[:1])[0], expected) == 0


@pytest.mark.parametrize("average", ["torch", "timm"])
def test_an_average_of_the_weights(average: str) -> None:
    """As torchvision's reference scripts and timm keep it: of every entry, and torchvision's detector loads it."""
    model = accelerate(random_detector("FasterRCNN, batch norm"))
    ema: Any
    if average == "torch":
        from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
        ema.update_parameters(model)
        update = ema.update_parameters
    else:
        ema = pytest.importorskip("timm").utils.ModelEmaV3(model, decay=0.5)
        update = ema.update
    expected = {key: value.double() for key, value in model.state_dict().items()}
    optimizer = optimizer_of(model)
    for _ in range(2):
        training_step(model, optimizer)
        update(model)
        expected = {key: (value + model.state_dict()[key].double()) / 2 for key, value in expected.items()}
    state = ema.module.state_dict()
    original = DETECTORS["FasterRCNN, batch norm"]()
    assert list(state) == list(original.state_dict())
    trained = "backbone.body.layer4.0.conv1.weight"  # conv1 is frozen
    assert not torch.equal(state[trained], model.state_dict()[trained])
    for key, value in state.items():
        if value.is_floating_point():
            assert relative_error(value, expected[key]) < 1e-6, key
    original.load_state_dict(state)


@pytest.mark.parametrize("strict", [True, False])
def test_a_fused_detector_says_when_to_load(strict: bool) -> None:
    original = random_detector("FasterRCNN")
    fused = accelerate(copy.deepcopy(original), fuse=True)
    before = copy.deepcopy(fused.state_dict())
    with pytest.raises(RuntimeError, match=r"load it before fuse\(\) or accelerate\(fuse=True\)") as error:
        fused.load_state_dict(original.state_dict(), strict=strict)
    assert str(error.value).count("this model is fused") == 1
    with pytest.raises(RuntimeError, match="this model is fused"):
        fused.roi_heads.box_head.load_state_dict(original.roi_heads.box_head.state_dict())
    with pytest.raises(RuntimeError, match="this model is fused"):
        FPN18().eval().fuse().load_state_dict(FPN18().state_dict(), strict=strict)

    twin = accelerate(random_detector("FasterRCNN"), fuse=True)  # its own state dict it takes
    twin.load_state_dict(before)
    expected = output_of(original, photos()[:1])[0]
    assert unmatched(output_of(twin, photos()[:1])[0], expected) == 0


@pytest.mark.parametrize("name", ["FasterRCNN", "RetinaNet", "FCOS"])
def test_a_bare_pyramid_in_a_detector_says_what_to_write(name: str) -> None:
    from torchvision.models import detection

    model = FPN18()
    detector = getattr(detection, name)(model, num_classes=2, min_size=64).eval()
    with pytest.raises(TypeError, match=rf"write {name}\(fpn\.detection\.TorchvisionBackbone\(backbone\), \.\.\.\)"):
        detector([torch.rand(3, 64, 64)])
    assert len(model(torch.rand(1, 3, 64, 64))) == 4
    detector = getattr(detection, name)(TorchvisionBackbone(model), num_classes=2, min_size=64).eval()
    assert "boxes" in detector([torch.rand(3, 64, 64)])[0]


def test_vitdets_too() -> None:
    from torchvision.models.detection import FasterRCNN

    trunk = nn.Conv2d(3, 32, 16, 16)
    detector = FasterRCNN(SimpleFeaturePyramid(trunk, 32, 16), num_classes=2, min_size=64).eval()
    with pytest.raises(TypeError, match="SimpleFeaturePyramid returns a tuple: write FasterRCNN"):
        detector([torch.rand(3, 64, 64)])

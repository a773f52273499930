"""What a checkpoint's source feeds its model, and whether the command feeds the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fpn
import fpn.weights
from fpn.command.options import load_model
from fpn.demo.photo import DEFAULT_PHOTO, read_photo
from fpn.demo.run import run_model
from fpn.preprocessing import CAFFE, IMAGENET, Preprocessing
from tests.reference.comparison import relative_error

RGB = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))


def caffes(rgb: Tensor) -> Tensor:
    """detectron2's: BGR from 0 to 255, less the pixel mean."""
    return rgb[:, [2, 1, 0]] * 255 - torch.tensor([103.53, 116.28, 123.675])[:, None, None]


def test_of_imagenet() -> None:
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(IMAGENET(RGB), (RGB - mean) / std)
    assert str(IMAGENET) == "images in RGB, from 0 to 1, less (0.485, 0.456, 0.406), divided by (0.229, 0.224, 0.225)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_of_caffe(dtype: torch.dtype) -> None:
    assert CAFFE(RGB.to(dtype)).dtype == dtype
    torch.testing.assert_close(CAFFE(RGB), caffes(RGB))
    torch.testing.assert_close(CAFFE(RGB[0]), caffes(RGB)[0])
    torch.testing.assert_close(CAFFE.reversed()(RGB), caffes(RGB)[:, [2, 1, 0]])
    assert CAFFE.reversed().reversed() == CAFFE


def detectron2_trunk() -> dict[str, Tensor]:
    """A classifier in detectron2's names."""
    torch.manual_seed(0)
    state = {}
    for name, value in fpn.resnet.resnet50().state_dict().items():
        part, _, leaf = name.rpartition(".")
        part = part.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        for index in (1, 2, 3):
            part = part.replace(f"bn{index}", f"conv{index}.norm")
        part = f"stem.{part}" if part.startswith("conv1") else part
        for stage in (4, 3, 2, 1):
            part = part.replace(f"layer{stage}.", f"res{stage + 1}.")
        state[f"{part}.{leaf}"] = value
    return {name: value for name, value in state.items() if "num_batches" not in name and not name.startswith("fc.")}


@pytest.mark.parametrize("order", [None, "rgb", "bgr"])
def test_from_a_checkpoint(order: str | None) -> None:
    """The same features whatever order the channels are given in."""
    model = fpn.from_checkpoint(detectron2_trunk(), channel_order=order, stride_in_1x1=True).eval()
    expected = fpn.from_checkpoint(detectron2_trunk(), stride_in_1x1=True).eval()
    assert isinstance(model.preprocessing, Preprocessing)
    assert str(model.preprocessing) in model.report.notes
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        features, wanted = model.bottom_up(model.preprocessing(images)), expected.bottom_up(caffes(images))
    assert relative_error(features[-1], wanted[-1]) < 1e-4


def test_of_constructors() -> None:
    assert fpn.FPN18().preprocessing is None
    assert fpn.FPN18(weights=fpn.resnet.resnet18().state_dict()).preprocessing == IMAGENET


def test_the_command_feeds_what_the_source_feeds(tmp_path: Path) -> None:
    torch.save(detectron2_trunk(), tmp_path / "c.pth")
    model, _ = load_model("FPN50", str(tmp_path / "c.pth"), stride_in_1x1=True)
    expected = fpn.from_checkpoint(tmp_path / "c.pth", stride_in_1x1=True).eval()
    photo = read_photo(DEFAULT_PHOTO)
    inputs: list[Tensor] = []
    model.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    run_model(model, photo, [(10.0, 10.0, 200.0, 150.0)], calibrate=False)
    rgb = torch.from_numpy(np.array(photo.image)).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        features, wanted = (trunk.bottom_up(x)[-1] for trunk, x in ((model, inputs[-1]), (expected, caffes(rgb))))
    assert relative_error(features, wanted) < 1e-4


# --- another number of channels


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_weights_for_another_number_of_channels(channels: int) -> None:
    torch.manual_seed(0)
    state = fpn.resnet.resnet18().state_dict()
    weight = state["conv1.weight"]
    models = [
        fpn.from_checkpoint(state, in_channels=channels),
        fpn.FPN18(weights=state, trunk={"in_channels": channels}, adapt_channels=True),
    ]
    grey = torch.randn(2, 1, 16, 16)
    expected = torch.nn.functional.conv2d(grey.expand(-1, 3, -1, -1), weight, padding=3)
    for model in models:
        conv = model.bottom_up.conv1
        assert conv.in_channels == channels
        assert model.preprocessing is None
        if channels in (1, 6):  # all of the three are there equally often
            actual = torch.nn.functional.conv2d(grey.expand(-1, channels, -1, -1), conv.weight, padding=3)
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_they_are_timms(channels: int) -> None:
    manipulate = pytest.importorskip("timm.models._manipulate")
    torch.manual_seed(0)
    state = fpn.resnet.resnet18().state_dict()
    expected = manipulate.adapt_input_conv(channels, state["conv1.weight"])
    actual = fpn.from_checkpoint(state, in_channels=channels).bottom_up.conv1.weight
    torch.testing.assert_close(actual.detach(), expected)


def test_without_the_option_it_is_an_error() -> None:
    state = fpn.resnet.resnet18().state_dict()
    with pytest.raises(fpn.weights.CheckpointError, match=r"conv1\.weight is \(64, 4, 7, 7\), given \(64, 3, 7, 7\)"):
        fpn.FPN18(weights=state, trunk={"in_channels": 4})
    four = fpn.from_checkpoint(state, in_channels=4).bottom_up.state_dict()
    with pytest.raises(fpn.weights.CheckpointError, match="its images have 4 channels"):
        fpn.from_checkpoint(four, in_channels=5)

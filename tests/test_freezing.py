"""Freezing a trunk that somebody has altered, and loading what was frozen, or cannot be loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fpn
from fpn import FPN18
from fpn._freezing import freeze
from fpn.export import export_onnx
from fpn.norm import FrozenBatchNorm2d
from fpn.resnet import BasicBlock, ResNet
from fpn.weights import CheckpointError, transfer
from tests.reference.random_weights import randomise
from tests.trust.altered import ActivatedNorm, doubling


def small_trunk(norm_layer: Any = nn.BatchNorm2d) -> ResNet:
    torch.manual_seed(0)
    return randomise(ResNet(BasicBlock, (1, 1, 1, 1), norm_layer=norm_layer)).eval()


def outputs(trunk: ResNet) -> list[Tensor]:
    with torch.no_grad():
        return list(trunk(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))))


def test_a_norm_in_two_places_is_frozen_in_both() -> None:
    trunk = small_trunk()
    trunk.layer2[0].bn2 = trunk.layer2[0].bn1
    trunk.layer3[0].downsample[1] = trunk.layer3[0].bn1
    expected = outputs(trunk)
    changes = freeze(trunk, 1)
    assert changes.left == {}
    assert {"layer2.0.bn1", "layer2.0.bn2", "layer3.0.downsample.1"} <= changes.replaced.keys()
    assert trunk.layer2[0].bn2 is trunk.layer2[0].bn1
    assert type(trunk.layer2[0].bn1) is FrozenBatchNorm2d
    assert not any(module.training for module in trunk.modules())
    assert [torch.allclose(c, other, atol=1e-5) for c, other in zip(outputs(trunk), expected, strict=True)] == [
        True
    ] * 4


def test_what_computes_more_or_is_watched_is_left(caplog: pytest.LogCaptureFixture) -> None:
    trunk = small_trunk()
    trunk.bn1.__class__ = ActivatedNorm
    trunk.layer1[0].bn1.register_forward_hook(doubling)
    nn.utils.parametrize.register_parametrization(trunk.layer1[0].bn2, "weight", nn.Softplus())
    trunk.layer2[0].bn1 = nn.BatchNorm2d(128, track_running_stats=False)
    expected = outputs(trunk)
    left = freeze(trunk, 2).left
    assert "ActivatedNorm" in left["bn1"]
    assert left["layer1.0.bn1"] == "it has hooks"
    assert "remove_parametrizations" in left["layer1.0.bn2"]
    assert left["layer2.0.bn1"] == "it has no running statistics"
    assert left.keys() == {"bn1", "layer1.0.bn1", "layer1.0.bn2", "layer2.0.bn1"}
    assert not any(parameter.requires_grad for parameter in trunk.layer1.parameters())
    assert [torch.allclose(c, other, atol=1e-5) for c, other in zip(outputs(trunk), expected, strict=True)] == [
        True
    ] * 4
    assert caplog.records[-1].levelname == "WARNING"


def test_the_model_keeps_the_report() -> None:
    model = FPN18(trunk={"norm_layer": ActivatedNorm}, trainable_layers=4, out_channels=8)
    assert model.freezing is not None
    assert model.freezing.left.keys() == {"bn1"}


@pytest.mark.parametrize("load", [lambda state: transfer(FPN18(), state), fpn.from_checkpoint])
def test_nothing_is_loaded_on_the_meta_device(load: Any) -> None:
    state = FPN18().state_dict()
    with torch.device("meta"), pytest.raises(CheckpointError, match="is on the meta device, which holds no numbers"):
        load(state)


@pytest.mark.parametrize("load", [lambda state: transfer(FPN18(), state), fpn.from_checkpoint])
def test_float8_is_refused(load: Any) -> None:
    state = {k: v.to(torch.float8_e4m3fn) if v.is_floating_point() else v for k, v in FPN18().state_dict().items()}
    with pytest.raises(CheckpointError, match=r"is of torch\.float8_e4m3fn"):
        load(state)


def test_a_partly_frozen_model_comes_back_so() -> None:
    model = FPN18(trainable_layers=3)
    loaded = fpn.from_checkpoint(model.state_dict())
    kinds = [
        [type(module) for module in network.modules() if hasattr(module, "running_var")] for network in (model, loaded)
    ]
    assert kinds[0] == kinds[1]
    assert "batch norm without a counter is frozen, as the checkpoint's: bottom_up.bn1, bottom_up.layer1" in str(
        loaded.report
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_onnx_in_a_dtype_that_onnxruntime_lacks_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    with pytest.raises(ValueError, match="float32 or float16"):
        export_onnx(FPN18().eval().to(dtype), tmp_path / "model.onnx")

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fpn
from fpn import FPN, FPN18, FPN50, export_state_dict, from_checkpoint, resnet
from fpn.checkpoints import conversion
from fpn.levels import P6P7
from fpn.norm import FrozenBatchNorm2d
from fpn.resnet import BasicBlock, ResNetClassifier, build
from fpn.weights import CheckpointError
from tests import recipe
from tests.reference.comparison import largest_relative_error
from tests.reference.random_weights import randomise

State = dict[str, Tensor]

CAFFE = {"stride_in_1x1": True}
FCOS = {"extra": "p6p7_on_p5"}

# Whose own outputs are stored, and the arguments for what the keys cannot tell.
REFERENCES: dict[str, dict[str, Any]] = {
    "detectron2-r18": {},
    "detectron2-r34": {},
    "detectron2-r50": {},
    "detectron2-r101": {},
    "detectron2-x101": {},
    "detectron2-r50-gn": {},
    "detectron2-r50-bn": {},
    "detectron2-r50-retinanet": {},
    "mmdetection-faster-rcnn-r50": {},
    "mmdetection-faster-rcnn-r101-caffe": CAFFE,
    "mmdetection-retinanet-r18": {},
    "mmdetection-retinanet-r50-caffe": CAFFE,
    "mmdetection-fcos-r50-caffe": CAFFE | FCOS,
    "mmdetection-atss-r50": {},
    "mmdetection-reppoints-r50-gn": {},
    "mmdetection-mask-rcnn-r50-gn": {},
    "mmdetection-mask-rcnn-x50": {},
    "kuangliu-fpn-2-2-2-2": {},
    "kuangliu-fpn-2-4-23-3": {},
    "kuangliu-retina-2-2-2-2": {},
}
TRUNK_REFERENCES = ("detectron2-imagenet-msra", "detectron2-imagenet-fb", "detectron2-imagenet-gn")


@lru_cache(maxsize=2)
def reference_state(name: str) -> State:
    return recipe.state_dict(recipe.load_reference(name)["entries"])


def reference_error(model: nn.Module, name: str) -> float:
    """The worst level's against the stored outputs; infinite where the levels have other shapes."""
    reference = recipe.load_reference(name)
    with torch.no_grad():
        levels = model.eval()(recipe.images(*reference["size"]))
    if [list(level.shape) for level in levels] != reference["shapes"]:
        return float("inf")
    return largest_relative_error(map(recipe.sample, levels), map(torch.tensor, reference["samples"]))


def same(model: nn.Module, other: nn.Module, size: tuple[int, int] = (75, 101)) -> bool:
    with torch.no_grad():
        ours, expected = (m.eval()(recipe.images(*size)) for m in (model, other))
    return largest_relative_error(ours, expected) < 1e-4


# --- each source, against its own outputs


@pytest.mark.parametrize("name", REFERENCES)
def test_features_are_the_sources(name: str) -> None:
    model = from_checkpoint(reference_state(name), **REFERENCES[name])
    assert reference_error(model, name) < 1e-4
    assert model.report is not None
    assert sorted(model.report.matched.values()) == sorted(reference_state(name))
    assert str(model.report).startswith(f"{len(reference_state(name))} of {len(reference_state(name))} entries matched")
    assert f"from {name.partition('-')[0]}" in str(model.report)


@pytest.mark.parametrize("name", TRUNK_REFERENCES)
def test_maps_of_detectron2s_imagenet_files(name: str) -> None:
    model = from_checkpoint(reference_state(name), stride_in_1x1=False if name.endswith("gn") else None)
    assert reference_error(model.bottom_up, name) < 1e-4
    assert model.report is not None
    assert model.report.unexpected == ("conv1_b", "fc1000_w", "fc1000_b")
    assert "the pyramid is new: random weights" in str(model.report)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("detectron2-r50", {"stride_in_1x1": False}),
        ("detectron2-x101", {"stride_in_1x1": True}),
        ("mmdetection-faster-rcnn-r101-caffe", {}),
        ("mmdetection-faster-rcnn-r50", {"upsample": "bilinear"}),
        ("mmdetection-faster-rcnn-r50", {"extra": None}),
        ("mmdetection-faster-rcnn-r50", {"channel_order": "bgr"}),
        ("mmdetection-faster-rcnn-r50", {"norm_eps": 1e-2}),
        ("mmdetection-fcos-r50-caffe", CAFFE),
        ("mmdetection-atss-r50", FCOS),
        ("kuangliu-fpn-2-2-2-2", {"upsample": "nearest"}),
    ],
)
def test_the_references_tell_a_wrong_option(name: str, wrong: dict[str, Any]) -> None:
    assert reference_error(from_checkpoint(reference_state(name), **wrong), name) > 1e-3


def old_generation(state: State) -> State:
    """The names that torchvision's pyramid had until 0.13."""
    return {
        key.replace(".0.weight", ".weight").replace(".0.bias", ".bias") if "_blocks." in key else key: value
        for key, value in state.items()
    }


def torchvision_detector(name: str) -> nn.Module:
    from torchvision.models import detection
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops.misc import FrozenBatchNorm2d as TorchvisionFrozen

    torch.manual_seed(0)
    if hasattr(detection, name):
        # Without trained weights they have batch norm; with them frozen batch norm.
        detector = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=2)
    else:
        trunk = resnet_fpn_backbone(backbone_name=name, weights=None, norm_layer=TorchvisionFrozen)
        detector = detection.FasterRCNN(trunk, num_classes=2)
    return randomise(detector).eval()


@pytest.mark.torchvision
@pytest.mark.parametrize(
    "name",
    [
        "fasterrcnn_resnet50_fpn",
        "fasterrcnn_resnet50_fpn_v2",
        "maskrcnn_resnet50_fpn",
        "maskrcnn_resnet50_fpn_v2",
        "keypointrcnn_resnet50_fpn",
        "retinanet_resnet50_fpn",
        "retinanet_resnet50_fpn_v2",
        "fcos_resnet50_fpn",
        "resnet18",
        "resnet50",
        "resnext50_32x4d",
        "wide_resnet50_2",
    ],
)
def test_features_are_torchvisions(name: str) -> None:
    detector = torchvision_detector(name)
    present = dict(detector.state_dict())
    generations = [present]
    if "backbone.fpn.inner_blocks.0.1.weight" not in present:  # before 0.13 the pyramid had no norm
        generations.append(old_generation(present))
        assert "backbone.fpn.inner_blocks.0.weight" in generations[-1]
    with torch.no_grad():
        images = recipe.images(75, 101)
        expected = list(detector.backbone(images).values())
        for state in generations:
            model = from_checkpoint(state).eval()
            assert largest_relative_error(model(images), expected) < 1e-4
            assert model.report is not None
            assert "from torchvision, under 'backbone.'" in str(model.report)
            assert sorted([*model.report.matched.values(), *model.report.unexpected]) == sorted(state)
            assert not any(key.startswith("backbone.") for key in model.report.unexpected)


@pytest.mark.torchvision
@pytest.mark.parametrize("layers", [(2, 4), (4,), (1, 3, 4)])
def test_any_levels_of_torchvisions(layers: tuple[int, ...]) -> None:
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    backbone = randomise(resnet_fpn_backbone(backbone_name="resnet18", weights=None, returned_layers=list(layers)))
    model = from_checkpoint(backbone.state_dict(), extra="maxpool")
    assert model.strides == (*(2 ** (layer + 1) for layer in layers), 64)
    with torch.no_grad():
        images = recipe.images(75, 101)
        assert largest_relative_error(model.eval()(images), backbone.eval()(images).values()) < 1e-4


CLASSIFIERS = {
    "torchvision": ("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "resnet152"),
    "timm": ("resnet18", "resnet26", "resnet50", "resnext50_32x4d", "resnet50_gn", "resnet34"),
}


@pytest.mark.torchvision
@pytest.mark.parametrize(("library", "name"), [(lib, name) for lib, names in CLASSIFIERS.items() for name in names])
def test_maps_of_classifiers(library: str, name: str) -> None:
    images = recipe.images(75, 101)
    torch.manual_seed(0)
    if library == "timm":
        timm = pytest.importorskip("timm")
        source = randomise(timm.create_model(name)).eval()
        with torch.no_grad():
            expected = source.forward_intermediates(images, indices=(1, 2, 3, 4), intermediates_only=True)
    else:
        from torchvision.models import get_model
        from torchvision.models.feature_extraction import create_feature_extractor

        source = randomise(get_model(name, weights=None)).eval()
        with torch.no_grad():
            expected = create_feature_extractor(source, [f"layer{i}" for i in (1, 2, 3, 4)])(images).values()
    model = from_checkpoint(source.state_dict()).eval()
    with torch.no_grad():
        assert largest_relative_error(model.bottom_up(images), expected) < 1e-4
    assert model.strides == (4, 8, 16, 32)
    assert model.report is not None
    assert model.report.unexpected == ("fc.weight", "fc.bias")
    assert "from a classifier (torchvision, timm)" in str(model.report)
    assert "the pyramid is new: random weights" in str(model.report)


@pytest.mark.torchvision
@pytest.mark.parametrize("name", ["resnet50d", "seresnet50", "resnet26t", "res2net50_26w_4s"])
def test_timms_resnets_of_other_designs_are_refused(name: str) -> None:
    timm = pytest.importorskip("timm")
    with pytest.raises(CheckpointError, match=r"unexpected|it has no convolution"):
        from_checkpoint(timm.create_model(name).state_dict())


def test_torchvisions_classifier_in_detectron2s_names() -> None:
    source = randomise(build(ResNetClassifier, "resnet50"))
    state = {}
    for key, value in source.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            key = key if "layer" in key else f"stem.{key}"
            for ours, theirs in (
                ("bn1", "conv1.norm"),
                ("bn2", "conv2.norm"),
                ("bn3", "conv3.norm"),
                ("downsample.0", "shortcut"),
                ("downsample.1", "shortcut.norm"),
                ("layer4", "res5"),
                ("layer3", "res4"),
                ("layer2", "res3"),
                ("layer1", "res2"),
            ):
                key = key.replace(ours, theirs)
            state[key] = value
    model = from_checkpoint(
        {"model": {key: value.numpy() for key, value in state.items()}, "__author__": "torchvision"}
    )
    trunk = resnet.resnet50()
    trunk.load_state_dict({key: value for key, value in source.state_dict().items() if not key.startswith("fc.")})
    assert same(model.bottom_up, trunk)


OWN: dict[str, Callable[[], FPN]] = {
    "default": FPN18,
    "paper's": partial(FPN18, upsample="nearest", smooth_top=True),
    "P6, P7": partial(FPN18, extra="p6p7", out_channels=64),
    "P6, P7 on P5": partial(FPN50, extra="p6p7_on_p5", upsample="nearest", smooth_top=True),
    "levels": partial(FPN18, trunk={"returned_layers": (2, 3, 4)}),
    "frozen": partial(FPN50, trunk={"norm_layer": FrozenBatchNorm2d}),
    "partly frozen": partial(FPN18, trainable_layers=3),
    "group norm": partial(FPN50, norm_layer=nn.GroupNorm, neck_norm_layer=nn.GroupNorm, out_channels=96),
    "normed neck": partial(FPN18, neck_norm_layer=nn.BatchNorm2d, extra=partial(P6P7, norm_layer=nn.BatchNorm2d)),
    "5 channels": partial(FPN18, trunk={"in_channels": 5}),
    "other blocks": lambda: FPN(resnet.ResNet(BasicBlock, (1, 3, 1, 2))),
}


@pytest.mark.parametrize("prefix", ["", "backbone.fpn."])
@pytest.mark.parametrize("name", OWN)
def test_our_own_state_dict(name: str, prefix: str) -> None:
    torch.manual_seed(0)
    source = randomise(OWN[name]())
    model = from_checkpoint({prefix + key: value for key, value in source.state_dict().items()})
    expected = source.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items() if key in expected)
    images = torch.randn(1, 5 if name == "5 channels" else 3, 75, 101)
    with torch.no_grad():
        assert largest_relative_error(model.eval()(images), source.eval()(images)) < 1e-4


# --- forms: prefixes, wrappers, files, dtypes


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod.model.", "detector.net."])
def test_prefixes(prefix: str) -> None:
    state = {prefix + key: value for key, value in reference_state("detectron2-r18").items()}
    state |= {prefix + "roi_heads.box_predictor.weight": torch.zeros(2), "pixel_mean": torch.zeros(3)}
    model = from_checkpoint(state)
    assert reference_error(model, "detectron2-r18") < 1e-4
    assert model.report is not None
    assert len(model.report.unexpected) == 2


@pytest.mark.parametrize("form", ["pth", "legacy pth", "pkl", "safetensors"])
def test_files(tmp_path: Path, form: str) -> None:
    state = reference_state("detectron2-r18")
    path = tmp_path / f"model.{form.rpartition(' ')[2]}"
    if form == "pkl":  # as detectron2's model zoo
        content = {"model": {k: v.numpy() for k, v in state.items()}, "__author__": "x", "matching_heuristics": True}
        path.write_bytes(pickle.dumps(content))
    elif form == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        content = {"model": state, "optimizer": {"state": {0: {"step": 1}}}, "iteration": 9}
        torch.save(content, path, _use_new_zipfile_serialization=form == "pth")
    for given in (path, str(path)):
        assert reference_error(from_checkpoint(given), "detectron2-r18") < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(dtype: torch.dtype) -> None:
    state = {key: value.to(dtype) for key, value in reference_state("detectron2-r18").items()}
    model = from_checkpoint(state)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert torch.equal(model.get_parameter("lateral.0.weight"), state["backbone.fpn_lateral5.weight"].float())


@pytest.mark.parametrize("swap", ["shortcut", "downsample"])
def test_kuanglius_blocks_under_either_name(swap: str) -> None:
    state = {k.replace("shortcut", swap): v for k, v in reference_state("kuangliu-fpn-2-2-2-2").items()}
    assert reference_error(from_checkpoint(state), "kuangliu-fpn-2-2-2-2") < 1e-4


# --- what the keys cannot tell


def test_channel_order() -> None:
    images = recipe.images(64, 96)
    with torch.no_grad():
        source = from_checkpoint(reference_state("detectron2-r18")).eval()(images)
        for order, given in (("bgr", images), ("rgb", images.flip(1))):
            model = from_checkpoint(reference_state("detectron2-r18"), channel_order=order)
            assert largest_relative_error(model.eval()(given), source) < 1e-5
            assert f"images in {order.upper()} where the source has BGR" in str(model.report)


@pytest.mark.parametrize(
    ("name", "options", "lines"),
    [
        (
            "detectron2-r50",
            {},
            ("stride_in_1x1=True", "images in BGR where the source has BGR", "upsample='nearest'", "extra=maxpool"),
        ),
        ("detectron2-x101", {}, ("stride_in_1x1=False", "images in BGR where the source has BGR", "32 × 8 wide")),
        ("mmdetection-faster-rcnn-r50", {}, ("stride_in_1x1=False", "images in RGB where the source has RGB")),
        ("mmdetection-faster-rcnn-r50", CAFFE, ("stride_in_1x1=True", "images in BGR where the source has BGR")),
        ("mmdetection-atss-r50", {}, ("extra=P6P7(relu=False)", "norm_eps=1e-05")),
        (
            "kuangliu-fpn-2-4-23-3",
            {},
            ("upsample='bilinear'", "images in RGB where the source has RGB", "Bottleneck × (2, 4, 23, 3)"),
        ),
    ],
)
def test_the_report_says_what_was_assumed(
    name: str, options: dict[str, Any], lines: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fpn.checkpoints.conversion"):
        from_checkpoint(reference_state(name), **options)
    assert all(line in caplog.text for line in lines), caplog.text


@pytest.mark.torchvision
def test_eps_of_torchvisions_coco_files(tmp_path: Path) -> None:
    from torchvision.models import detection

    names = [f"{model}_ResNet50_FPN_Weights" for model in ("FasterRCNN", "MaskRCNN", "KeypointRCNN", "RetinaNet")]
    urls = [getattr(detection, name).COCO_V1.url for name in names]
    assert sorted(conversion.NORM_EPS_0) == sorted(url.rpartition("/")[2] for url in urls)
    state = export_state_dict(
        FPN18(upsample="nearest", smooth_top=True, trunk={"norm_layer": FrozenBatchNorm2d}), "torchvision"
    )
    for name, eps in ((conversion.NORM_EPS_0[0], 0.0), ("mine.pth", 1e-5)):
        torch.save(state, tmp_path / name)
        assert {m.eps for m in from_checkpoint(tmp_path / name).modules() if isinstance(m, FrozenBatchNorm2d)} == {eps}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("detectron2-r18", {"stride_in_1x1": True}, "stride_in_1x1 is for Bottleneck"),
        ("detectron2-r18", {"channel_order": "gbr"}, "channel_order must be"),
        ("detectron2-r18", {"upsample": "cubic"}, "upsample must be"),
        ("detectron2-r18", {"extra": "p8"}, "extra must be"),
        ("detectron2-r18", {"extra": "p6p7"}, "4 missing: backbone.top_block.p6.weight"),
        ("detectron2-r50-retinanet", {"extra": "maxpool"}, "4 unexpected: backbone.top_block.p6.weight"),
    ],
)
def test_arguments_that_do_not_fit(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_checkpoint(reference_state(name), **options)


# --- damage


@pytest.mark.parametrize(
    ("name", "step"), [("detectron2-r18", 1), ("mmdetection-retinanet-r18", 5), ("kuangliu-retina-2-2-2-2", 5)]
)
def test_any_entry_missing_is_an_error(name: str, step: int) -> None:
    whole = reference_state(name)
    for key in list(whole)[::step]:
        if not key.endswith("num_batches_tracked"):
            with pytest.raises(CheckpointError):
                from_checkpoint({other: value for other, value in whole.items() if other != key})


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("detectron2-r18", "backbone.bottom_up.res4.1.conv2.norm.bias"),
        ("detectron2-r18", "backbone.fpn_output5.weight"),
        ("mmdetection-retinanet-r18", "neck.fpn_convs.4.conv.bias"),
        ("kuangliu-fpn-2-2-2-2", "latlayer2.bias"),
    ],
)
@pytest.mark.parametrize("damage", ["missing", "shape", "NaN", "infinity", "integers", "surplus"])
def test_damage_is_told_in_the_sources_names(name: str, key: str, damage: str) -> None:
    state = dict(reference_state(name))
    value = state[key]
    if damage == "missing":
        del state[key]
    elif damage == "shape":
        state[key] = torch.zeros(7)
    elif damage in ("NaN", "infinity"):
        state[key] = value.clone()
        state[key].view(-1)[-1] = float(damage.replace("inity", ""))
    elif damage == "integers":
        state[key] = value.to(torch.int32)
    else:
        key = key.rpartition(".")[0] + ".alpha"
        state[key] = value
    message = {"missing": f"1 missing: {key}", "shape": f"1 of another shape: {key}", "surplus": f"1 unexpected: {key}"}
    with pytest.raises(CheckpointError) as caught:
        from_checkpoint(state)
    assert message.get(damage, f"the checkpoint's {key}") in str(caught.value)


def test_stages_and_levels_missing_or_out_of_order() -> None:
    def without(*parts: str, name: str = "detectron2-r34") -> State:
        return {k: v for k, v in reference_state(name).items() if not any(part in k for part in parts)}

    for state, message in (
        (without(".res5."), "layer4 must have blocks 0, 1, …; it has none"),
        (without(".res4.2."), r"layer3 must have blocks 0, 1, …; it has \[0, 1, 3, 4, 5\]"),
        (without("lateral5", "output5"), "a level lacks its lateral"),
        (without("lateral3", "output3"), "a level lacks its lateral"),
        (without("fpn_output"), "missing: backbone.fpn_output"),
        (without("fpn_"), "not the checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=message):
            from_checkpoint(state)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": torch.ones(1), "b": torch.ones(2)}, "not the checkpoint of a ResNet-FPN.*its 2 names begin with a, b"),
        ({}, "no state dict"),
        ({"features.0.weight": torch.ones(64, 3, 3, 3)}, "not the checkpoint of a ResNet-FPN"),
    ],
)
def test_what_is_no_fpn(state: State, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        from_checkpoint(state)


@pytest.mark.torchvision
@pytest.mark.parametrize("name", ["vgg11", "mobilenet_v3_large", "densenet121", "vit_b_16"])
def test_torchvisions_other_models_are_refused(name: str) -> None:
    from torchvision.models import get_model

    with pytest.raises(CheckpointError, match=r"unexpected|not the checkpoint"):
        from_checkpoint(get_model(name, weights=None).state_dict())


@pytest.mark.torchvision
@pytest.mark.parametrize("name", ["deeplabv3_resnet50", "fcn_resnet50"])
def test_the_trunk_of_torchvisions_segmentation_models(name: str) -> None:
    from torchvision.models import get_model

    source = get_model(name, weights=None, weights_backbone=None, aux_loss=True)
    trunk = from_checkpoint(source.state_dict()).bottom_up.state_dict()
    expected = source.backbone.state_dict()
    assert all(torch.equal(trunk[key], value) for key, value in expected.items())
    assert trunk.keys() == expected.keys()


@pytest.mark.torchvision
@pytest.mark.parametrize("extra", ["maxpool", "p6p7"])
def test_a_detector_of_ours_comes_back_whole(extra: str) -> None:
    from torchvision.models.detection import FasterRCNN

    from fpn.detection import TorchvisionBackbone

    torch.manual_seed(0)
    source = fpn.FPN18(extra=extra, upsample="nearest", smooth_top=True)
    state = FasterRCNN(TorchvisionBackbone(source), num_classes=3).state_dict()
    for model in (
        from_checkpoint(state),
        fpn.FPN18(weights=state, extra=extra, upsample="nearest", smooth_top=True),
    ):
        assert model.strides == source.strides
        assert model.report.complete
        images = torch.randn(1, 3, 64, 96)
        with torch.no_grad():
            for level, expected in zip(model.eval()(images), source.eval()(images), strict=True):
                torch.testing.assert_close(level, expected)


def test_two_models_in_one_checkpoint() -> None:
    state = reference_state("detectron2-r18")
    with pytest.raises(CheckpointError, match=r"several models.*'student\.backbone\.' or 'teacher\.backbone\.'"):
        from_checkpoint({f"{who}.{key}": value for who in ("student", "teacher") for key, value in state.items()})


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("backbone.bottom_up.stem.conv1.weight", (2**20, 3, 7, 7), "of another shape"),
        ("backbone.fpn_lateral5.weight", (2**20, 512, 1, 1), "of another shape"),
        ("backbone.fpn_lateral5.weight", (2**40, 512, 1, 1), "its shapes are those of no model"),
        ("backbone.bottom_up.res2.99999999.conv1.weight", (64, 64, 3, 3), "layer1 must have blocks 0, 1"),
    ],
)
def test_hostile_shapes_take_no_memory(name: str, shape: tuple[int, ...], message: str) -> None:
    state = reference_state("detectron2-r18") | {name: torch.zeros(1).expand(shape)}
    with pytest.raises(CheckpointError, match=message):
        from_checkpoint(state)


@pytest.mark.parametrize("damage", ["NaN", "sparse", "meta"])
def test_load_weights_leaves_the_model_as_it_was(tmp_path: Path, damage: str) -> None:
    state = dict(build(ResNetClassifier, "resnet18").state_dict())
    key = "layer4.1.bn2.bias"
    state[key] = {
        "NaN": torch.full((512,), float("nan")),
        "sparse": torch.ones(512).to_sparse(),
        "meta": torch.ones(512, device="meta"),
    }[damage]
    model = FPN18()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=key):
        fpn.weights.transfer(model.bottom_up, state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- and back


@pytest.mark.parametrize("name", [name for name in REFERENCES if name.startswith("detectron2")])
def test_export_to_detectron2_is_the_inverse(name: str) -> None:
    state = reference_state(name)
    exported = export_state_dict(from_checkpoint(state), "detectron2")
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[key], state[key]) for key in state)


@pytest.mark.torchvision
@pytest.mark.parametrize(
    "name",
    ["fasterrcnn_resnet50_fpn_v2", "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2", "resnet18", "resnet50"],
)
def test_export_to_torchvision_is_the_inverse(name: str) -> None:
    detector = torchvision_detector(name)
    state = detector.state_dict()
    exported = export_state_dict(from_checkpoint(state), "torchvision")
    backbone = {key: value for key, value in state.items() if key.startswith("backbone.")}
    assert exported.keys() == backbone.keys()
    assert all(torch.equal(exported[key], backbone[key]) for key in backbone)
    detector.backbone.load_state_dict(
        {key.removeprefix("backbone."): value for key, value in exported.items()}, strict=True
    )


@pytest.mark.parametrize("naming", ["torchvision", "detectron2"])
@pytest.mark.parametrize("extra", [None, "maxpool", "p6p7", "p6p7_on_p5"])
@pytest.mark.parametrize("prefix", ["backbone.", ""])
def test_from_one_framework_to_the_other(naming: str, extra: Any, prefix: str) -> None:
    torch.manual_seed(0)
    source = randomise(
        FPN18(
            upsample="nearest",
            smooth_top=True,
            extra=extra,
            neck_norm_layer=nn.BatchNorm2d if extra == "maxpool" else None,
            trunk={"returned_layers": (2, 3, 4)} if extra else None,
            out_channels=64,
        )
    )
    exported = export_state_dict(source, naming, prefix)
    model = from_checkpoint(exported, extra=None) if extra is None else from_checkpoint(exported)
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in source.state_dict().items()
    }
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())
    assert same(model, source)


@pytest.mark.parametrize(
    ("model", "naming", "message"),
    [
        (FPN18, "torchvision", "does not have: upsample='bilinear', smooth_top=False"),
        (FPN18, "mmdetection", "naming must be one of"),
        (
            partial(FPN50, trunk=CAFFE, upsample="nearest", smooth_top=True),
            "torchvision",
            "does not have: stride_in_1x1=True",
        ),
        (
            partial(FPN18, upsample="nearest", smooth_top=True, extra=partial(P6P7, relu=False)),
            "detectron2",
            r"does not have: P6P7\(relu=False\)",
        ),
        (
            lambda: FPN(
                nn.Identity(),
                (3,),
                (1,),
                upsample="nearest",
                smooth_top=True,
                norm_layer=nn.BatchNorm2d,
                extra=partial(P6P7, norm_layer=nn.BatchNorm2d),
            ),
            "detectron2",
            "does not have: entry extra.p6.0.weight",
        ),
    ],
)
def test_export_of_what_the_framework_does_not_compute(model: Callable[[], FPN], naming: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export_state_dict(model(), naming)


# --- the options that checkpoints need


@pytest.mark.parametrize("layers", [(), (1, 2), (4, 3), (1, 1, 4), (0, 4), (1, 2, 3, 4, 5)])
def test_returned_layers_are_checked(layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="returned_layers must be"):
        resnet.resnet18(returned_layers=layers)


def test_returned_layers_are_announced() -> None:
    trunk = resnet.resnet50(returned_layers=(2, 4)).eval()
    assert (trunk.out_channels, trunk.strides) == ((512, 2048), (8, 32))
    assert [info["module"] for info in trunk.feature_info] == ["layer2", "layer4"]
    assert [c.shape[1] for c in trunk(torch.zeros(1, 3, 33, 33))] == [512, 2048]

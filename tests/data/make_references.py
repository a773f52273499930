"""Writes the `*.json.gz` beside it: features of other frameworks' own code on the weights of `tests/recipe.py`.

Run from the top of the repository, in an environment where that framework imports:

    PYTHONPATH=. python tests/data/make_references.py detectron2   # pip install detectron2, or a checkout
    PYTHONPATH=. python tests/data/make_references.py mmdetection  # pip install mmdet mmengine mmcv
    PYTHONPATH=REPO:. python tests/data/make_references.py kuangliu # REPO: a checkout of kuangliu/pytorch-fpn
"""

from __future__ import annotations

import pickle
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.recipe import images, save_reference, state_dict


def save(
    name: str, made_with: str, modules: dict[str, nn.Module], forward: Callable[[Tensor], Any], size: tuple[int, int]
) -> None:
    """`modules`: the prefix that the module's keys have in the framework's detectors -> the module."""
    shapes = {
        prefix + key: value.shape for prefix, module in modules.items() for key, value in module.state_dict().items()
    }
    state = state_dict(shapes)
    for prefix, module in modules.items():
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        module.load_state_dict(own, strict=True)
        module.eval()
    with torch.no_grad():
        levels = forward(images(*size))
    levels = list(levels.values()) if isinstance(levels, dict) else list(levels)
    save_reference(name, made_with, size, state, levels)
    print(name, len(state), [tuple(level.shape) for level in levels])


def detectron2() -> None:
    from detectron2 import __version__
    from detectron2.config import get_cfg
    from detectron2.modeling.backbone import build_backbone

    basic = ["MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
    group_norm = ["MODEL.RESNETS.NORM", "GN", "MODEL.FPN.NORM", "GN", "MODEL.RESNETS.STRIDE_IN_1X1", False]
    resnext = ["MODEL.RESNETS.NUM_GROUPS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.RESNETS.STRIDE_IN_1X1", False]
    sync = ["MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN", "MODEL.RESNETS.STRIDE_IN_1X1", False]
    cases: dict[str, tuple[int, bool, list[Any]]] = {  # depth, whether RetinaNet's, options
        "r18": (18, False, basic),
        "r34": (34, False, basic),
        "r50": (50, False, []),
        "r101": (101, False, []),
        "x101": (101, False, resnext),
        "r50-gn": (50, False, group_norm),
        "r50-bn": (50, False, sync),
        "r50-retinanet": (50, True, []),
    }
    for name, (depth, retinanet, options) in cases.items():
        cfg = get_cfg()
        features = ["res3", "res4", "res5"] if retinanet else ["res2", "res3", "res4", "res5"]
        cfg.MODEL.BACKBONE.NAME = f"build_{'retinanet_' if retinanet else ''}resnet_fpn_backbone"
        cfg.MODEL.RESNETS.OUT_FEATURES = features
        cfg.MODEL.FPN.IN_FEATURES = features
        cfg.MODEL.FPN.OUT_CHANNELS = 64
        cfg.merge_from_list(["MODEL.RESNETS.DEPTH", depth, *options])
        backbone = build_backbone(cfg)
        # Its pyramid wants multiples of 32.
        save(f"detectron2-{name}", f"detectron2 {__version__}", {"backbone.": backbone}, backbone, (64, 96))
    detectron2_imagenet()


def detectron2_imagenet() -> None:
    """The trunk, C2 to C5, from pickles in the naming of detectron2's ImageNet files, through its own conversion."""
    from detectron2 import __version__
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone.resnet import build_resnet_backbone

    folded = {"weight": "bn_s", "bias": "bn_b"}
    plain = {
        "weight": "bn_gamma",
        "bias": "bn_beta",
        "running_mean": "bn_running_mean",
        "running_var": "bn_running_var",
    }
    group_norm = {"weight": "gn_s", "bias": "gn_b"}
    for name, leaves, norm in (("msra", plain, "FrozenBN"), ("fb", folded, "FrozenBN"), ("gn", group_norm, "GN")):
        cfg = get_cfg()
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
        cfg.MODEL.RESNETS.NORM = norm
        cfg.MODEL.RESNETS.STRIDE_IN_1X1 = norm != "GN"
        trunk = build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()
        shapes = {"conv1_b": (64,), "fc1000_w": (1000, 2048), "fc1000_b": (1000,)}
        for key, value in trunk.state_dict().items():
            shapes[caffe2_name(key, leaves)] = value.shape
        state = state_dict({key: shape for key, shape in shapes.items() if key})
        with tempfile.NamedTemporaryFile(suffix=".pkl") as file:
            pickle.dump({key: value.numpy() for key, value in state.items()}, file)
            file.flush()
            DetectionCheckpointer(trunk).load(file.name)
        with torch.no_grad():
            levels = list(trunk(images(64, 96)).values())
        save_reference(f"detectron2-imagenet-{name}", f"detectron2 {__version__}", (64, 96), state, levels)


def caffe2_name(key: str, leaves: dict[str, str]) -> str:
    """Detectron's name of a trunk's entry of detectron2's; empty where its file has none."""
    branches = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c", "shortcut": "branch1"}
    *place, last, leaf = key.split(".")
    is_norm = last == "norm"
    if is_norm:
        *place, last = place
        if leaf not in leaves:
            return ""
        leaf = leaves[leaf]
    else:
        leaf = "w"
    if place == ["stem"]:
        return f"res_conv1_{leaf}" if is_norm else f"conv1_{leaf}"
    return "_".join((*place, branches[last], leaf))


def mmdetection() -> None:
    from mmdet import __version__
    from mmdet.models.backbones import ResNet, ResNeXt
    from mmdet.models.necks import FPN

    group_norm = {"norm_cfg": {"type": "GN", "num_groups": 32}}
    retinanet = {"start_level": 1, "add_extra_convs": "on_input"}
    fcos = {"start_level": 1, "add_extra_convs": "on_output", "relu_before_extra_convs": True}
    atss = {"start_level": 1, "add_extra_convs": "on_output"}
    resnext = {"groups": 32, "base_width": 4}
    cases: dict[str, tuple[type[nn.Module], int, dict[str, Any], dict[str, Any]]] = {
        "faster-rcnn-r50": (ResNet, 50, {}, {}),
        "faster-rcnn-r101-caffe": (ResNet, 101, {"style": "caffe"}, {}),
        "retinanet-r18": (ResNet, 18, {}, retinanet),
        "retinanet-r50-caffe": (ResNet, 50, {"style": "caffe"}, retinanet),
        "fcos-r50-caffe": (ResNet, 50, {"style": "caffe"}, fcos),
        "atss-r50": (ResNet, 50, {}, atss),
        "reppoints-r50-gn": (ResNet, 50, {}, retinanet | group_norm),
        "mask-rcnn-r50-gn": (ResNet, 50, group_norm, group_norm),
        "mask-rcnn-x50": (ResNeXt, 50, resnext, {}),
    }
    for name, (trunk, depth, trunk_options, neck_options) in cases.items():
        backbone = trunk(depth=depth, **trunk_options)
        channels = [64, 128, 256, 512] if depth < 50 else [256, 512, 1024, 2048]
        neck = FPN(channels, 64, 5, **neck_options)

        def forward(batch: Tensor, backbone: nn.Module = backbone, neck: nn.Module = neck) -> Sequence[Tensor]:
            levels: Sequence[Tensor] = neck(backbone(batch))
            return levels

        save(f"mmdetection-{name}", f"mmdet {__version__}", {"backbone.": backbone, "neck.": neck}, forward, (75, 101))


def kuangliu() -> None:
    import retina_fpn

    import fpn as source  # theirs

    for name, model in (
        ("fpn-2-2-2-2", source.FPN(source.Bottleneck, [2, 2, 2, 2])),
        ("fpn-2-4-23-3", source.FPN(source.Bottleneck, [2, 4, 23, 3])),
        ("retina-2-2-2-2", retina_fpn.RetinaFPN(retina_fpn.Bottleneck, [2, 2, 2, 2])),
    ):
        save(f"kuangliu-{name}", "kuangliu/pytorch-fpn 4421a71", {"": model}, model, (75, 101))


if __name__ == "__main__":
    {"detectron2": detectron2, "mmdetection": mmdetection, "kuangliu": kuangliu}[sys.argv[1]]()

"""torchvision's Faster R-CNN on our backbone and pooler, and on torchvision's, with the same random weights."""

from __future__ import annotations

import torch
from scenes import CLASSES
from torch import nn
from torchvision import ops
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

from fpn import FPN, FPN18, export_state_dict
from fpn.detection import TorchvisionBackbone
from roi import MultiScaleRoIAlign

POOLED = ["0", "1", "2", "3"]  # P2 to P5
OUTPUT_SIZE, SAMPLING_RATIO = 7, 2  # torchvision's defaults
FPN_CHANNELS = 256  # of either pyramid, by default
HIDDEN = 256  # features of the box head; torchvision has 1024, for 91 classes

ANCHORS = ((16,), (32,), (64,), (128,), (256,))  # pixels, a level each
ASPECTS = (1.0, 1.5, 2.5)  # height / width


def ours(seed: int, size: int) -> FasterRCNN:
    """FPN18 as it is by default, and `roi.MultiScaleRoIAlign`.

    Args:
        seed: of the random weights.
        size: of the images, which the detector leaves at their size.
    """
    fpn = FPN18()
    # The top level's 3×3 convolution is the one thing that the default leaves out of torchvision's pyramid.
    fpn.load_state_dict(initial_pyramid(seed).state_dict(), strict=False)
    backbone = TorchvisionBackbone(fpn)
    pooler = MultiScaleRoIAlign(POOLED, OUTPUT_SIZE, SAMPLING_RATIO, spatial_scales=backbone.spatial_scales)
    return faster_rcnn(backbone, pooler, seed, size)


def torchvisions(seed: int, size: int) -> FasterRCNN:
    """torchvision's `resnet_fpn_backbone` and `MultiScaleRoIAlign`. Arguments as `ours`."""
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    backbone.load_state_dict(export_state_dict(initial_pyramid(seed), "torchvision", prefix=""))
    return faster_rcnn(backbone, ops.MultiScaleRoIAlign(POOLED, OUTPUT_SIZE, SAMPLING_RATIO), seed, size)


BUILDERS = {"fpn-roi": ours, "torchvision": torchvisions}


def initial_pyramid(seed: int) -> FPN:
    """The random weights that both backbones start from, in the form that torchvision has too."""
    torch.manual_seed(seed)
    return FPN18(upsample="nearest", smooth_top=True, extra="maxpool")


def faster_rcnn(backbone: nn.Module, pooler: ops.MultiScaleRoIAlign, seed: int, size: int) -> FasterRCNN:
    """All but the backbone and the pooler. There is less of everything than for photos of 800 pixels."""
    torch.manual_seed(seed)
    return FasterRCNN(
        backbone,
        min_size=size,
        max_size=size,
        rpn_anchor_generator=AnchorGenerator(ANCHORS, (ASPECTS,) * len(ANCHORS)),
        rpn_pre_nms_top_n_train=400,
        rpn_post_nms_top_n_train=200,
        rpn_pre_nms_top_n_test=200,
        rpn_post_nms_top_n_test=100,
        rpn_batch_size_per_image=128,
        box_roi_pool=pooler,
        box_head=TwoMLPHead(FPN_CHANNELS * OUTPUT_SIZE**2, HIDDEN),
        box_predictor=FastRCNNPredictor(HIDDEN, len(CLASSES)),
        box_batch_size_per_image=64,
        box_positive_fraction=0.5,
        box_detections_per_img=20,
    )

"""Our backbones in torchvision's and detectron2's detectors, and `accelerate`, which puts them into yours."""

from fpn.detection.acceleration import Acceleration, accelerate, torchvision_state_dict
from fpn.detection.adapters import Detectron2Backbone, ShapeSpec, TorchvisionBackbone
from fpn.detection.trunks import torchvision_trunk

__all__ = [
    "Acceleration",
    "Detectron2Backbone",
    "ShapeSpec",
    "TorchvisionBackbone",
    "accelerate",
    "torchvision_state_dict",
    "torchvision_trunk",
]

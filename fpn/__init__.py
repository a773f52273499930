"""FPN backbones: ResNet bottom-up trunks and the top-down Feature Pyramid Network."""

from fpn.checkpoint import export_state_dict, from_checkpoint
from fpn.pyramid import FPN, FPN18, FPN34, FPN50, FPN101, FPN152
from fpn.simple_pyramid import SimpleFeaturePyramid

__all__ = [
    "FPN",
    "FPN18",
    "FPN34",
    "FPN50",
    "FPN101",
    "FPN152",
    "SimpleFeaturePyramid",
    "export_state_dict",
    "from_checkpoint",
]

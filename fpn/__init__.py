"""FPN backbones: ResNet bottom-up trunks and the top-down Feature Pyramid Network."""

import importlib
from types import ModuleType

from fpn.checkpoints.conversion import from_checkpoint
from fpn.checkpoints.export import export_state_dict
from fpn.models import FPN18, FPN34, FPN50, FPN101, FPN152
from fpn.norm import FrozenBatchNorm2d
from fpn.pyramid import FPN
from fpn.simple_pyramid import SimpleFeaturePyramid

__version__ = "0.1.0"

__all__ = [
    "FPN",
    "FPN18",
    "FPN34",
    "FPN50",
    "FPN101",
    "FPN152",
    "FrozenBatchNorm2d",
    "SimpleFeaturePyramid",
    "export_state_dict",
    "from_checkpoint",
]

ON_FIRST_USE = ("detection", "export", "graphs")  # public modules that most programs do not need


def __getattr__(name: str) -> ModuleType:
    if name in ON_FIRST_USE:
        return importlib.import_module(f"fpn.{name}")
    raise AttributeError(f"module 'fpn' has no attribute {name!r}")

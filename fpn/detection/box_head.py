"""torchvision's box head in a form for inference that reads channels_last RoIs as they lie."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads

from fpn.detection.conversion import is_untouched
from roi import MultiScaleRoIAlign


class FusedTwoMLPHead(nn.Module):
    """torchvision's `TwoMLPHead`, the columns of whose first layer are in the order of channels_last RoIs.

    Flattening such RoIs in the order of `TwoMLPHead` is a copy of them all.

    Args:
        head: torchvision's, for RoIs of height × width bins; it is left as it is.
    """

    def __init__(self, head: Any, height: int, width: int) -> None:
        super().__init__()
        weight = head.fc6.weight.detach().unflatten(1, (-1, height, width))
        self.fc6 = nn.Linear(head.fc6.in_features, head.fc6.out_features, device="meta")
        self.fc6.weight = nn.Parameter(weight.permute(0, 2, 3, 1).flatten(1), requires_grad=False)
        self.fc6.bias = nn.Parameter(head.fc6.bias.detach(), requires_grad=False)
        self.fc7 = head.fc7

    def forward(self, rois: Tensor) -> Tensor:
        """Tensor[K, C, height, width] -> Tensor[K, features]."""
        x = rois.permute(0, 2, 3, 1).flatten(1)
        return F.relu_(self.fc7(F.relu_(self.fc6(x))))


def fuse_box_heads(model: nn.Module) -> dict[nn.Module, FusedTwoMLPHead]:
    """The fused form of every `TwoMLPHead` inside `model` that is fed by our pooler; of what differs there is none."""
    fused = {}
    for module in model.modules():
        if isinstance(module, RoIHeads) and isinstance(module.box_roi_pool, MultiScaleRoIAlign):
            head, (height, width) = module.box_head, module.box_roi_pool.output_size
            if is_plain(head) and head.fc6.in_features % (height * width) == 0:
                fused[head] = FusedTwoMLPHead(head, height, width).eval()
    return fused


def is_plain(head: Any) -> bool:
    """Whether it is torchvision's own, of linear layers."""
    plain = type(head) is TwoMLPHead and type(head.fc6) is nn.Linear and type(head.fc7) is nn.Linear
    return plain and is_untouched(head)

"""torchvision's box head in a form for inference that reads channels_last RoIs as they lie."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fpn.inference.fused_conv import LOAD_BEFORE_FUSING, note_once


class FusedTwoMLPHead(nn.Module):
    """torchvision's `TwoMLPHead` for channels_last RoIs: the columns of its first layer are in their order.

    `TwoMLPHead` itself would copy such RoIs, to flatten them in its own order.

    Args:
        head: torchvision's, for RoIs of height × width bins; it is left as it is.
    """

    def __init__(self, head: Any, height: int, width: int) -> None:
        super().__init__()
        weight = head.fc6.weight.detach().unflatten(1, (-1, height, width))
        # Another name than "fc6": neither state dict may load into the other head.
        self.fc6_by_cell = nn.Linear(head.fc6.in_features, head.fc6.out_features, device="meta")
        self.fc6_by_cell.weight = nn.Parameter(weight.permute(0, 2, 3, 1).flatten(1), requires_grad=False)
        self.fc6_by_cell.bias = nn.Parameter(head.fc6.bias.detach(), requires_grad=False)
        self.fc7 = head.fc7

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}fc6.weight" in state_dict:
            note_once(LOAD_BEFORE_FUSING, args[-1])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, rois: Tensor) -> Tensor:
        """Tensor[K, C, height, width] -> Tensor[K, features]."""
        x = rois.permute(0, 2, 3, 1).flatten(1)
        return F.relu(self.fc7(F.relu(self.fc6_by_cell(x))))

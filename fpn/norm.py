"""Normalisation layers of the trunk and the pyramid: what `norm_layer` may be, and frozen batch norm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

NormLayer = Callable[[int], nn.Module]

GROUP_NORM_GROUPS = 32  # Wu & He, Group Normalization (2018), and detectron2's and mmdetection's "GN"


def resolve_norm_layer(norm_layer: NormLayer | type[nn.GroupNorm]) -> NormLayer:
    """The factory `channels -> module` that `norm_layer` stands for.

    `nn.GroupNorm` itself asks for the number of groups first; it stands for 32 groups here.
    """
    if norm_layer is nn.GroupNorm:
        return partial(nn.GroupNorm, GROUP_NORM_GROUPS)
    return norm_layer


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine terms are constants: y = x · scale + shift per channel.

    Same formula in train and eval mode; nothing is learned and `train()` changes nothing. State keys are
    torchvision's `FrozenBatchNorm2d`'s, and a `BatchNorm2d` checkpoint loads strictly.

    Args:
        num_features: channels C of the (N, C, H, W) input.
        eps: added to the variance.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    @classmethod
    def from_batch_norm(cls, norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> FrozenBatchNorm2d:
        """The frozen layer that computes what `norm` computes in eval mode, in the mode of `norm`.

        Raises:
            ValueError: `norm` has no running statistics.
        """
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError("a batch norm without running statistics (track_running_stats=False) cannot be frozen")
        frozen = cls(norm.num_features, norm.eps).to(norm.running_mean.device, norm.running_mean.dtype)
        with torch.no_grad():
            for name in ("weight", "bias", "running_mean", "running_var"):
                value = getattr(norm, name)
                if value is not None:  # affine=False has neither weight nor bias, bias=False no bias
                    getattr(frozen, name).copy_(value)
        return frozen.train(norm.training)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)  # BatchNorm2d has it; a constant layer counts nothing
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy) or not (x.requires_grad and torch.is_grad_enabled()):
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        # batch_norm would keep x for the gradients of scale and shift, which nobody wants here.
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        y = torch.addcmul(shift[:, None, None], x, scale[:, None, None])
        return y.to(x.dtype)  # under autocast x is narrower than the buffers

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"

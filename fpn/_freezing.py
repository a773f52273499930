"""Freezing: layers of a trunk that are not trained."""

from __future__ import annotations

import logging
from typing import Any, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fpn._changes import Changes
from fpn._recognition import COUNTER, STATISTICS, is_frozen_batch_norm, norm_obstacle
from fpn.norm import FrozenBatchNorm2d

logger = logging.getLogger(__name__)

STAGES = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))


def freeze(trunk: nn.Module, trainable_layers: int) -> Changes:
    """Freezes all but the last `trainable_layers` of a ResNet's stem, layer1, layer2, layer3 and layer4, in place.

    Frozen parameters take no gradient. `nn.BatchNorm2d` and `nn.SyncBatchNorm` become `FrozenBatchNorm2d`, which
    `train()` does not change, at every place in the trunk where the module is. Other modules with statistics are left:
    a subclass, a norm with hooks or a parametrization, a norm without running statistics. Their parameters take no
    gradient, and in training mode their statistics go on changing.

    Args:
        trunk: a trunk of `fpn.resnet`.
        trainable_layers: 0 (nothing is trained) to 5 (everything is).

    Returns:
        Which norms were frozen, and which were left and why. It is also logged: at level INFO, or WARNING where one
        was left.

    Raises:
        ValueError: `trainable_layers` is not in 0..5.
    """
    if not 0 <= trainable_layers <= 5:
        raise ValueError(f"trainable_layers must be 0 to 5; got {trainable_layers}")
    parts = [trunk.get_submodule(name) for stage in STAGES[: 5 - trainable_layers] for name in stage]
    changes = freeze_norms(trunk, [norm for part in parts for norm in part.modules()])
    for stage in STAGES[: 5 - trainable_layers]:
        for name in stage:
            trunk.get_submodule(name).requires_grad_(False)
    if changes.left:
        logger.warning("%s", changes)
    elif changes.replaced:
        logger.info("%s", changes)
    return changes


def freeze_norms(model: nn.Module, norms: list[nn.Module]) -> Changes:
    """Replaces those of `norms` that are batch norm by `FrozenBatchNorm2d`, at every place in `model`."""
    replaced, left = {}, {}
    wanted, frozen = set(norms), dict[nn.Module, nn.Module]()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module not in wanted or is_frozen_batch_norm(module) or not keeps_statistics(module):
            continue
        if why := norm_obstacle(module):
            left[name] = why
            continue
        if module not in frozen:
            frozen[module] = FrozenBatchNorm2d.from_batch_norm(cast(Any, module))
        model.set_submodule(name, frozen[module])
        replaced[name] = "FrozenBatchNorm2d"
    return Changes(replaced, left)


def keeps_statistics(module: nn.Module) -> bool:
    """Whether it is a batch norm of any kind, or keeps something like its statistics."""
    return isinstance(module, _BatchNorm) or any(
        module._buffers.get(name) is not None for name in (*STATISTICS, COUNTER)
    )

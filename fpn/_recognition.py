"""What a module computes, recognised by its exact class, its parameters, buffers, children and hooks.

A subclass may compute anything, and so may an instance with hooks or with a method of its own. What is recognised here
may be replaced by something else that computes the same; all else has to stay, and `reason` says why.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from fpn._activation import Activation, activation_of

STATISTICS = ("running_mean", "running_var")
COUNTER = "num_batches_tracked"
# torchvision's and detectron2's compute what ours does; neither has to be installed.
FROZEN_BATCH_NORMS = (
    "fpn.norm.FrozenBatchNorm2d",
    "torchvision.ops.misc.FrozenBatchNorm2d",
    "detectron2.layers.batch_norm.FrozenBatchNorm2d",
)
# PyTorch's hooks that compute a weight before each call, and the function that makes the weight a plain parameter.
REMOVED_BY = {
    "torch.nn.utils.weight_norm.WeightNorm": "torch.nn.utils.remove_weight_norm",
    "torch.nn.utils.spectral_norm.SpectralNorm": "torch.nn.utils.remove_spectral_norm",
}


def class_name(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def obstacle(module: nn.Module) -> str | None:
    """What would be lost if this module were replaced by one that computes what its class computes; else None."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            return "it is pruned; torch.nn.utils.prune.remove makes that permanent"
        if class_name(hook) in REMOVED_BY:
            return f"its weight is computed before each call; {REMOVED_BY[class_name(hook)]} makes it a parameter"
    if parametrize.is_parametrized(module):
        return "it is parametrized; torch.nn.utils.parametrize.remove_parametrizations makes that permanent"
    if any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks") and isinstance(hooks, dict)):
        return "it has hooks"
    return own_method(module)


def own_method(module: nn.Module) -> str | None:
    """The method that the instance overrides; None where it overrides none."""
    for name, value in vars(module).items():
        if callable(value) and callable(getattr(type(module), name, None)):
            return f"it has a {name} of its own"
    return None if module._compiled_call_impl is None else "it is compiled"


def is_touched(module: nn.Module) -> bool:
    """Whether the module itself has hooks or overrides a method."""
    return obstacle(module) is not None


def is_untouched(module: nn.Module) -> bool:
    """Whether no module in it, itself included, has hooks or overrides a method."""
    return not any(map(is_touched, module.modules()))


def is_watched(module: nn.Module) -> bool:
    """Whether hooks may see the inputs or outputs of this module, or of a module in it, at this call."""
    return any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in module.modules())


def all_is_watched() -> bool:
    """Whether global module hooks or a torch function mode see every map now."""
    hooks = module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks
    return bool(hooks) or torch._C._len_torch_function_stack() > 0


def conv_obstacle(module: nn.Module) -> str | None:
    """Why it is no plain `nn.Conv2d`; None where it is one."""
    if type(module) is not nn.Conv2d:
        return obstacle(module) or f"it is {class_name(module)}, not nn.Conv2d"
    return obstacle(module) or contents_obstacle(module, parameters=("weight", "bias"))


def norm_obstacle(module: nn.Module) -> str | None:
    """Why it is no batch norm, plain, synchronised or frozen, with running statistics; None where it is one."""
    if type(module) is nn.BatchNorm2d or type(module) is nn.SyncBatchNorm:
        found = obstacle(module) or contents_obstacle(
            module, parameters=("weight", "bias"), buffers=(*STATISTICS, COUNTER)
        )
    elif is_frozen_batch_norm(module):
        found = obstacle(module) or contents_obstacle(module, buffers=("weight", "bias", *STATISTICS, COUNTER))
    else:
        return obstacle(module) or f"it is {class_name(module)}, no batch norm that is known"
    if found is None and any(getattr(module, name, None) is None for name in STATISTICS):
        return "it has no running statistics"
    return found


def is_frozen_batch_norm(module: nn.Module) -> bool:
    """Whether it is of one of the classes of frozen batch norm."""
    return class_name(module) in FROZEN_BATCH_NORMS


def is_plain_conv(module: nn.Module) -> bool:
    """Whether it is `nn.Conv2d` itself, with a weight of its own and without hooks."""
    return conv_obstacle(module) is None


def is_batch_norm(module: nn.Module) -> bool:
    """Whether it is batch norm, plain, synchronised or frozen (ours, torchvision's, detectron2's), with statistics."""
    return norm_obstacle(module) is None


def plain_activation(module: nn.Module) -> Activation | None:
    """The activation that the module is, without hooks; None where it is another, or none."""
    return None if is_touched(module) else activation_of(module)


def is_identity(module: nn.Module) -> bool:
    return type(module) is nn.Identity and not is_touched(module)


def is_sequence(module: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Sequential,)) -> bool:
    """Whether its class is exactly one of `kinds`, which call one child after the other, and it has no hooks."""
    return type(module) in kinds and not is_touched(module)


def contents_obstacle(
    module: nn.Module, *, parameters: Collection[str] = (), buffers: Collection[str] = ()
) -> str | None:
    """What the module holds other than these parameters and buffers as plain tensors; None where there is nothing."""
    for kind, held, known in (
        ("the parameter", module._parameters, parameters),
        ("the buffer", module._buffers, buffers),
        ("the child", module._modules, ()),
    ):
        for name in held:
            if name not in known:
                return f"it has {kind} {name}"
    for name, tensor in (module._parameters | module._buffers).items():
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            return f"its {name} is no plain tensor"
        if tensor.is_meta:
            return f"its {name} is on the meta device"
        if name != COUNTER and not tensor.is_floating_point():
            return f"its {name} is {tensor.dtype}"
    return None

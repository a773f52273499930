"""Activation checkpointing: the backward pass computes a stage again instead of keeping what is in it.

The second pass sees the same random numbers and the same buffers as the first, which may have changed them
(running statistics, the vectors of spectral norm). Afterwards the buffers have the values that the first pass left.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils.checkpoint import checkpoint

from fpn._changes import Changes
from fpn._recognition import class_name, is_frozen_batch_norm, is_sequence
from fpn._tracing import is_exported

# Wrappers that cannot be run twice in one step, or do themselves what is asked for.
REFUSING = {
    "torch.nn.parallel.distributed.DistributedDataParallel": "that collects its gradients once per forward pass",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper": "that computes itself again",
}


def run_stage(stage: nn.Module, x: Tensor, checkpointed: bool) -> Tensor:
    """The stage's map. With `checkpointed` the backward pass keeps only the input of the stage, or of its blocks."""
    if not checkpointed or not torch.is_grad_enabled() or isinstance(x, Proxy) or is_exported():
        return cast(Tensor, stage(x))
    if why := refusal(stage):
        warnings.warn(f"a stage is not checkpointed: {why}", stacklevel=2)
        return cast(Tensor, stage(x))
    for part in cast(nn.Sequential, stage) if is_sequence(stage) else [stage]:
        x = run_again_in_backward(part, x)
    return x


def run_again_in_backward(module: nn.Module, x: Tensor) -> Tensor:
    before: list[Buffers] = []

    def computed(x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # the compiler sees to it that buffers move once
            return cast(Tensor, module(x))
        if not before:
            before.append(Buffers(module))
            return cast(Tensor, module(x))
        with before[0]:
            return cast(Tensor, module(x))

    return checkpoint(computed, x, use_reentrant=False)


class Buffers(AbstractContextManager[None]):
    """The present values of a module's buffers; as a context manager it puts them back for a while."""

    def __init__(self, module: nn.Module) -> None:
        self.kept = [
            (owner, name, buffer.detach().clone())
            for owner in module.modules()
            if not is_frozen_batch_norm(owner)  # whose buffers never move
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]
        self.present: list[Tensor | None] = []

    def __enter__(self) -> None:
        self.present = [owner._buffers[name] for owner, name, _ in self.kept]
        # Other tensors and not other numbers in the same ones: what autograd has kept of those stays as it is.
        for owner, name, buffer in self.kept:
            owner._buffers[name] = buffer.clone()

    def __exit__(self, *_: object) -> None:
        for (owner, name, _buffer), present in zip(self.kept, self.present, strict=True):
            owner._buffers[name] = present


def checkpointing_of(stages: Mapping[str, nn.Module]) -> Changes:
    """How `run_stage` treats checkpointed stages."""
    left = {name: why for name, stage in stages.items() if (why := refusal(stage))}
    by_block = "computed again block by block"
    return Changes(
        {
            name: by_block if is_sequence(stage) else f"computed again as a whole: it is {class_name(stage)}"
            for name, stage in stages.items()
            if name not in left
        },
        left,
    )


def refusal(stage: nn.Module) -> str | None:
    """Why a stage cannot be computed again; None where it can."""
    for module in stage.modules():
        for kind in type(module).__mro__:
            if why := REFUSING.get(f"{kind.__module__}.{kind.__qualname__}"):
                return f"there is a {class_name(module)} in it, {why}"
    return None

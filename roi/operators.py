"""How the operators are made known to PyTorch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from roi.boxes import check_content

NAMESPACE = "fpn_roi"


def register(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
) -> None:
    """Define the operator fpn_roi::name.

    Args:
        schema: its arguments and results.
        implementation: the operator itself, for tensors of any device.
        fake: its results' shapes, dtypes and formats.
        save: puts into the context what `backward` needs: (context, inputs, output).
        backward: the gradients with respect to the inputs: (context, gradients of the results).
    """
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema)
    torch.library.impl(qualified, "CompositeExplicitAutograd")(implementation)
    torch.library.register_fake(qualified, fake)
    torch.library.register_autograd(qualified, backward, setup_context=save)


def check_rois(rois: Tensor, batch_size: int) -> None:
    """`check_content` where that does not wait for the device."""
    if rois.device.type == "cpu":
        check_content(rois, batch_size)

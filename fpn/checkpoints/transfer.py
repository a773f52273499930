"""Entries of a checkpoint into a module: all that were matched, or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from fpn._report import Report
from fpn.checkpoints.errors import CheckpointError
from fpn.checkpoints.matching import COUNTER, match_by_name, match_by_order

NUMBERS = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),  # of counters
)


def transfer(module: nn.Module, checkpoint: Mapping[str, Tensor], by: Literal["name", "order"] = "name") -> Report:
    """Loads `checkpoint` into `module`: all of the module's entries, or none.

    Args:
        module: any module; `checkpoint` is matched with its `state_dict()`.
        checkpoint: names -> tensors, in any dtype and on any device; it may hold more than the module.
        by: "name": an entry is loaded into the entry of the same name. "order": the first entry of the checkpoint is
            loaded into the first of the module, and so on. Every pair must have the same shape. Names that the module
            knows, and the names of batch norm's entries, must agree. Order is for a checkpoint with names of its own.

    Returns:
        What was matched, and what of the checkpoint was left over.

    Raises:
        CheckpointError: an entry of the module is missing or of another shape, and the message is the report; or the
            order does not fit; or an entry holds NaN or infinity.
        ValueError: `by` is unknown.
    """
    if by not in ("name", "order"):
        raise ValueError(f"by must be 'name' or 'order'; got {by!r}")
    own = module.state_dict()
    report = match_by_name(own, checkpoint) if by == "name" else match_by_order(own, checkpoint)
    if report is None:
        raise CheckpointError(
            f"the checkpoint does not fit {type(module).__name__} by order: shapes, or names that both know, disagree"
        )
    if not report.complete:
        in_order = by == "name" and match_by_order(own, checkpoint) is not None
        hint = "; its entries fit by order: transfer(module, checkpoint, by='order')" if in_order else ""
        raise CheckpointError(f"the checkpoint does not fit {type(module).__name__}: {report}{hint}")
    load_matched(module, checkpoint, report)
    return report


def load_matched(module: nn.Module, checkpoint: Mapping[str, Tensor], report: Report) -> None:
    """Loads into `module` what a complete `report` has matched, once every value is found to be a number.

    Raises:
        CheckpointError: an entry holds NaN or infinity, or is no plain tensor in memory, or the module is on the meta
            device and cannot hold it; the module is as it was.
    """
    own = module.state_dict()
    for name in report.matched:
        if own[name].is_meta:
            raise CheckpointError(f"{name} of the model is on the meta device, which holds no numbers to load")
    for name in report.matched.values():
        tensor = checkpoint[name]
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_complex():
            raise CheckpointError(f"the checkpoint's {name} is no plain tensor of real numbers in memory")
        if not name.endswith(COUNTER) and not tensor.is_floating_point():
            raise CheckpointError(f"the checkpoint's {name} must be floating point; got {tensor.dtype}")
        if tensor.dtype not in NUMBERS:
            raise CheckpointError(
                f"the checkpoint's {name} is of {tensor.dtype}; convert it, by its scale if it has one"
            )
        if not tensor.isfinite().all():
            raise CheckpointError(f"the checkpoint's {name} holds NaN or infinity")
    # Not strict, for the counters alone: `complete` has seen to the rest.
    module.load_state_dict({name: checkpoint[other] for name, other in report.matched.items()}, strict=False)

"""A script with every RoI operator, run as it stands with torchvision's and, its import line swapped, with ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.reference.boxes import rpn_like
from tests.reference.torchvision_bins import torchvision_bins_are_exact

THEIRS, OURS = "from torchvision.ops import", "from roi import"
SCRIPT = """
from torchvision.ops import MultiScaleRoIAlign, PSRoIAlign, PSRoIPool, RoIAlign, RoIPool
from torchvision.ops import ps_roi_align, ps_roi_pool, roi_align, roi_pool

p2, p3, p4, p5 = pyramid
images = [(4 * p2.shape[2], 4 * p2.shape[3])] * len(p2)
pooler = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
calls = {
    "roi_pool": lambda: roi_pool(p4, rois, 7, 1 / 16),
    "RoIPool": lambda: RoIPool((7, 5), 1 / 8)(p3, boxes),
    "roi_align": lambda: roi_align(p4, boxes, (7, 7), 1 / 16, sampling_ratio=2, aligned=True),
    "RoIAlign": lambda: RoIAlign(7, 1 / 8, -1)(p3, rois),
    "ps_roi_pool": lambda: ps_roi_pool(scores, rois, 3, 1 / 16),
    "PSRoIPool": lambda: PSRoIPool(3, 1 / 16)(scores, boxes),
    "ps_roi_align": lambda: ps_roi_align(scores, boxes, 3, 1 / 16, 2),
    "PSRoIAlign": lambda: PSRoIAlign(3, 1 / 16, -1)(scores, rois),
    "MultiScaleRoIAlign": lambda: pooler({"0": p2, "1": p3, "2": p4, "3": p5}, boxes, images),
}
"""
Calls = dict[str, Callable[[], Tensor]]


def inputs(rois: int, channels: int, height: int, width: int) -> dict[str, Any]:
    """What the script is given: two images' pyramid, score maps, and boxes in both forms.

    Without the few boxes where a bin of torchvision's max pooling leaves its RoI (see `roi.roi_pool`).
    """
    torch.manual_seed(0)
    pyramid = [torch.randn(2, channels, -(-height // s), -(-width // s), requires_grad=True) for s in (4, 8, 16, 32)]
    scores = torch.randn(2, 9 * 21, -(-height // 16), -(-width // 16), requires_grad=True)
    rows = rpn_like(2 * rois, 2, height, width)
    rows = rows[torchvision_bins_are_exact(rows, 1 / 16, 7, 7) & torchvision_bins_are_exact(rows, 1 / 8, 7, 5)]
    boxes = [rows[rows[:, 0] == image, 1:] for image in range(2)]
    return {"pyramid": pyramid, "scores": scores, "rois": rows, "boxes": boxes}


def calls_of(script: str, given: dict[str, Any]) -> Calls:
    names = dict(given)
    exec(script, names)
    calls: Calls = names["calls"]
    return calls


def both(given: dict[str, Any]) -> tuple[Calls, Calls]:
    """The script's calls as they stand, and with the import swapped."""
    return calls_of(SCRIPT, given), calls_of(SCRIPT.replace(THEIRS, OURS), given)


def gradients(output: Tensor, given: dict[str, Any]) -> list[Tensor | None]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    leaves = [*given["pyramid"], given["scores"]]
    return list(torch.autograd.grad((output * weights).sum(), leaves, allow_unused=True))


def compare(given: dict[str, Any]) -> int:
    """How many tensors of the two runs were compared.

    Sums are made in another order, and coordinates rounded in another place: a few units of float32's last place times
    differences of neighbouring values. The gradient of torchvision's `ps_roi_pool` is left out, which is not that of
    its output (it adds to cells that the forward pass does not read).
    """
    compared = 0
    theirs, ours = both(given)
    for name, call in theirs.items():
        expected, actual = call(), ours[name]()
        pairs: list[tuple[Tensor | None, Tensor | None]] = [(actual, expected)]
        if name not in ("ps_roi_pool", "PSRoIPool"):
            pairs += zip(gradients(actual, given), gradients(expected, given), strict=True)
        for got, wanted in pairs:
            if got is None and wanted is None:  # a level that the operator does not read
                continue
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3, msg=partial("{}: {}".format, name))
            compared += 1
    return compared

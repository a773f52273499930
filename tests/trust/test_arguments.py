"""Arguments that are none: an error of two kinds, which names the argument."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

import roi

pytestmark = pytest.mark.trust

INPUT, ROIS = torch.rand(2, 4, 8, 8), torch.tensor([[0.0, 0, 0, 4, 4]])
SINGLE = {"input": INPUT, "boxes": ROIS, "output_size": 2, "spatial_scale": 1.0, "backend": "auto"}
PYRAMID = {"features": [INPUT], "boxes": ROIS, "output_size": 2, "spatial_scales": [1.0], "backend": "auto"}
PYRAMID |= {"canonical_scale": 224, "canonical_level": 4}
SAMPLED = {"sampling_ratio": 2}
GOOD: dict[str, dict[str, Any]] = {
    "roi_pool": SINGLE,
    "roi_align": SINGLE | SAMPLED | {"aligned": False},
    "ps_roi_pool": SINGLE,
    "ps_roi_align": SINGLE | SAMPLED,
    "multiscale_roi_pool": PYRAMID,
    "multiscale_roi_align": PYRAMID | SAMPLED | {"aligned": False},
}

# Of anything, wherever it may come. No large sizes: they are sizes all the same, of memory that is not there.
ANYTHING: list[Any] = [
    None, True, 0, -1, 0.5, -0.0, math.nan, math.inf, 1j, "", "7", "77", b"7", [], (), {}, set(), object(),
    [None], [[1]], (1, 2, 3), range(2), int, np.zeros(2), np.float32(1), np.array("a"), torch.Size([2, 2]),
    torch.zeros(()), torch.zeros(0), torch.zeros(0, 5), torch.zeros(1, 5).to_sparse(), torch.zeros(1, 5, device="meta"),
    torch.zeros(1, 5, dtype=torch.complex64), torch.zeros(1, 5, dtype=torch.bool), torch.zeros(2, 4, 8, 8).to_sparse(),
    torch.zeros(2, 4, 8, 8, device="meta"), torch.zeros(2, 4, 8, 8, dtype=torch.complex64),
    torch.zeros(2, 4, 8, 8).to(torch.float8_e4m3fn), torch.zeros(1, 5).to(torch.float8_e5m2),
    [torch.zeros(1, 4)],
    [torch.zeros(1, 4), torch.zeros(1, 4).double()], [torch.zeros(1, 4), torch.zeros(1, 4, device="meta")],
    [torch.zeros(1, 4).to_sparse()] * 2, iter([]), "torch", "cupy", "cuda",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of torch's, and how NumPy turns arrays into numbers
@pytest.mark.parametrize(
    ("operator", "argument"),
    [(operator, name) for operator, good in GOOD.items() for name in good],
)
def test_anything_for_an_argument(operator: str, argument: str, tally: Counter[str]) -> None:
    wrong = []
    for value in ANYTHING:
        tally["arguments of any kind"] += 1
        try:
            output = getattr(roi, operator)(**(GOOD[operator] | {argument: value}))
            assert isinstance(output, torch.Tensor)
        except (TypeError, ValueError) as error:
            # An input on another device than the boxes: either is the wrong one.
            if not any(name in str(error) for name in (argument.removesuffix("s"), "boxes")):
                wrong.append(f"{value!r:.60} -> {type(error).__name__}: {error}")
        except Exception as error:
            if not (argument == "backend" and value == "cupy" and isinstance(error, RuntimeError)):
                wrong.append(f"{value!r:.60} -> {type(error).__name__}: {error}")
    assert wrong == []

"""roi_align, the pyramid poolers and the position-sensitive operators beside torchvision's on random cases in float64.

    python benchmarks/parity_roi_align.py
    python benchmarks/parity_roi_align.py --cases 1000 --seed 7 --backend cupy --device cuda
    python benchmarks/parity_roi_align.py --seed 7 --case 123    # that one alone

Features are normally distributed. Both sides compute where samples lie by the same formulas, so that what is left to
differ by is the order of the sums: an output is a mean, and may differ by TOLERANCE; a gradient is a sum over as many
bins as touch a cell, and may differ by TOLERANCE times the sum of those terms' absolute values, or TOLERANCE if that is
less than 1. Max pooling is compared to the bit. The exit status is 1 if anything differs by more.

Left out are the boxes for which torchvision does something else, which are recognised from their coordinates: those of
a negative area in a pyramid (it pools nothing), those of position-sensitive RoIAlign whose bins get no adaptive sample
(it divides by zero), bins of average and max pooling that its floating-point arithmetic widens, and of average pooling
the gradient of boxes that reach the map's last row or column (its gradient takes that in, its output does not).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # a script's own folder comes first otherwise

import numpy as np
import torch
from torch import Tensor

import roi
from benchmarks import arguments
from benchmarks.harness import describe, environment
from roi.torch_path.bins import roi_windows
from tests.reference.random_boxes import KINDS
from tests.reference.torchvision_bins import sizes_exact, torchvision_bins_are_exact

TOLERANCE = 1e-12
SCALES = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 3, 0.3, 0.0619)
FINEST = 1 / 4  # scale of a pyramid's first level
FARTHEST_ADAPTIVE = 200.0  # cells beyond the map: torchvision visits every sample, on the map or off it
SHOWN = 10  # failed cases printed


@dataclass(frozen=True)
class Case:
    operator: str
    kind: str
    maps: list[Tensor]  # one, or a pyramid's
    rois: Tensor
    scales: list[float]
    bins: tuple[int, int]
    ratio: int
    aligned: bool

    def __str__(self) -> str:
        shapes = ", ".join("×".join(map(str, level.shape)) for level in self.maps)
        layout = "contiguous" if self.maps[0].is_contiguous() else "channels_last"
        return (
            f"{self.operator}, {self.kind} boxes, {len(self.rois)} RoIs, {shapes} {layout}, scales {self.scales}, "
            f"{self.bins} bins, sampling {self.ratio}, aligned {self.aligned}"
        )


def comparable(case: Case) -> Tensor:
    """Tensor[K] of bool: the boxes for which torchvision computes what is to be computed."""
    rois, scale = case.rois.cpu(), case.scales[0]
    width, height = (rois[:, 3] - rois[:, 1]), (rois[:, 4] - rois[:, 2])
    if case.operator == "multiscale_roi_align":
        return width * height >= 0
    if case.operator == "multiscale_roi_pool":
        return (width * height >= 0) & torch.stack(
            [torchvision_bins_are_exact(rois, scale, *case.bins) for scale in case.scales]
        ).all(dim=0)
    if case.operator == "ps_roi_align" and case.ratio <= 0:
        return ((height * scale / case.bins[0]).ceil() != 0) & ((width * scale / case.bins[1]).ceil() != 0)
    if case.operator == "ps_roi_pool":
        heights, widths = np.maximum(roi_windows(rois.numpy(), scale)[:, 3:] - 1, 1).T
        exact = sizes_exact(heights, case.bins[0], np.float64) & sizes_exact(widths, case.bins[1], np.float64)
        return torch.from_numpy(exact)
    return torch.ones(len(rois), dtype=torch.bool)


def ours(case: Case, backend: str) -> Tensor:
    feature, scale = case.maps[0], case.scales[0]
    calls: dict[str, Callable[[], Tensor]] = {
        "roi_align": lambda: roi.roi_align(
            feature, case.rois, case.bins, scale, case.ratio, case.aligned, backend=backend
        ),
        "multiscale_roi_align": lambda: roi.multiscale_roi_align(
            case.maps, case.rois, case.bins, case.scales, case.ratio, backend=backend
        ),
        "multiscale_roi_pool": lambda: roi.multiscale_roi_pool(
            case.maps, case.rois, case.bins, case.scales, backend=backend
        ),
        "ps_roi_align": lambda: roi.ps_roi_align(feature, case.rois, case.bins, scale, case.ratio, backend=backend),
        "ps_roi_pool": lambda: roi.ps_roi_pool(feature, case.rois, case.bins, scale, backend=backend),
    }
    return calls[case.operator]()


def torchvisions(case: Case) -> Tensor:
    from torchvision import ops
    from torchvision.ops.poolers import LevelMapper

    feature, scale = case.maps[0], case.scales[0]
    if case.operator == "multiscale_roi_align":
        pooler: Any = ops.MultiScaleRoIAlign([str(i) for i in range(len(case.maps))], case.bins, case.ratio)
        named = {str(i): level for i, level in enumerate(case.maps)}
        boxes = [case.rois[case.rois[:, 0] == image, 1:] for image in range(len(feature))]
        size = int(feature.shape[2] / scale), int(feature.shape[3] / scale)
        return pooler(named, boxes, [size] * len(feature))
    if case.operator == "multiscale_roi_pool":  # torchvision has the parts of it
        levels = LevelMapper(2, 1 + len(case.maps))([case.rois[:, 1:]])
        output = feature.new_zeros(len(case.rois), feature.shape[1], *case.bins)
        for level, (map_, scale) in enumerate(zip(case.maps, case.scales, strict=True)):
            own = levels == level
            output = output.index_put((own.nonzero().flatten(),), ops.roi_pool(map_, case.rois[own], case.bins, scale))
        return output
    calls: dict[str, Callable[[], Tensor]] = {
        "roi_align": lambda: ops.roi_align(feature, case.rois, case.bins, scale, case.ratio, case.aligned),
        "ps_roi_align": lambda: ops.ps_roi_align(feature, case.rois, case.bins, scale, case.ratio),
        "ps_roi_pool": lambda: ops.ps_roi_pool(feature, case.rois, case.bins, scale),
    }
    return calls[case.operator]()


OPERATORS = ("roi_align", "multiscale_roi_align", "multiscale_roi_pool", "ps_roi_align", "ps_roi_pool")


def make_case(seed: int, index: int, device: torch.device) -> Case:
    """Case `index` of that seed: everything about it is drawn, and it does not depend on the other cases."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)

    def draw(low: int, high: int) -> int:
        """An integer in [low, high]."""
        return int(torch.randint(low, high + 1, (), generator=generator))

    operator = OPERATORS[(0, 0, 1, 2, 3, 4)[draw(0, 5)]]
    pyramid, sensitive = operator.startswith("multiscale"), operator.startswith("ps")
    bins = (7, 7) if draw(0, 3) == 0 else (draw(1, 14), draw(1, 14))
    side = 200 if pyramid else 40
    batch, height, width = draw(1, 3), draw(1, side), draw(1, side)
    channels = draw(1, 2) * bins[0] * bins[1] if sensitive else draw(1, 6)
    scales = [SCALES[draw(0, len(SCALES) - 1)]]
    sizes = [(height, width)]
    if pyramid:
        height, width = max(height // 16, 1) * 16, max(width // 16, 1) * 16  # the levels' scales are exact
        count = draw(1, 4)
        sizes = [(height >> level, width >> level) for level in range(count)]
        scales = [FINEST / 2**level for level in range(count)]
    layout = (torch.contiguous_format, torch.channels_last)[draw(0, 1)]
    ratio, aligned = (-1, 0, 1, 2, 3, 4)[draw(0, 5)], bool(draw(0, 1))
    kind = list(KINDS)[draw(0, len(KINDS) - 1)]
    rois = draw(1, 24)

    maps = [torch.randn(batch, channels, *size, dtype=torch.float64, generator=generator) for size in sizes]
    image = torch.randint(batch, (rois, 1), generator=generator).sort(dim=0).values
    corners = KINDS[kind](rois, height, width, generator)
    if ratio <= 0 and operator != "ps_roi_pool":
        corners = corners.clamp(-FARTHEST_ADAPTIVE, max(height, width) + FARTHEST_ADAPTIVE)
    boxes = torch.cat([image.double(), corners / scales[0]], dim=1)
    maps = [level.to(device).contiguous(memory_format=layout) for level in maps]
    case = Case(operator, kind, maps, boxes, scales, bins, ratio, aligned)
    return Case(operator, kind, maps, boxes[comparable(case)].to(device), scales, bins, ratio, aligned)


def differences(case: Case, backend: str) -> list[str]:
    """What differs in a case by more than it may, in words."""
    outputs, gradients = [], []
    sums: list[Tensor] = []
    for call in (lambda leaf: ours(leaf, backend), torchvisions):
        leaves = [level.detach().requires_grad_() for level in case.maps]
        copy = Case(case.operator, case.kind, leaves, case.rois, case.scales, case.bins, case.ratio, case.aligned)
        output = call(copy)
        weight = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(len(case.rois)))
        weight = weight.to(output.device)
        if case.operator == "ps_roi_pool":
            farthest = case.rois[:, 1:].view(-1, 2, 2).amax(dim=1) * case.scales[0]
            limit = torch.tensor([case.maps[0].shape[3], case.maps[0].shape[2]], device=farthest.device) - 2
            weight[(farthest >= limit).any(dim=1)] = 0
        outputs.append(output.detach())
        gradients.append(torch.autograd.grad(output, leaves, weight, retain_graph=True))
        sums = list(torch.autograd.grad(output, leaves, weight.abs()))  # of torchvision's, in the end
    found = []
    exact = case.operator == "multiscale_roi_pool"
    if not bool(((outputs[0] - outputs[1]).abs() <= (0 if exact else TOLERANCE)).all()):
        found.append(f"output, by {float((outputs[0] - outputs[1]).abs().max()):.2g}")
    for level, (mine, theirs, terms) in enumerate(zip(*gradients, sums, strict=True)):
        if not bool(((mine - theirs).abs() <= TOLERANCE * terms.abs().clamp(min=1)).all()):
            found.append(f"gradient of level {level}, by {float((mine - theirs).abs().max()):.2g}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=arguments.count, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run only the case of this number")
    parser.add_argument("--backend", choices=["torch", "cupy", "auto"], default="auto")
    parser.add_argument("--device", type=arguments.device, default=arguments.DEFAULT_DEVICE)
    options = parser.parse_args()
    device = torch.device(options.device)
    print(describe(environment(device)), end="\n\n")
    begin = time.perf_counter()
    counts: Counter[str] = Counter()
    for index in range(options.cases) if options.case is None else [options.case]:
        case = make_case(options.seed, index, device)
        found = differences(case, options.backend)
        counts.update({"cases": 1, "rois": len(case.rois), case.operator: 1, case.kind: 1, "mismatches": bool(found)})
        if found and counts["mismatches"] <= SHOWN:
            print(f"case {index}, {case}: differs in {'; '.join(found)}")
    print(f"{counts['cases']} cases, {counts['rois']} RoIs, outputs and gradients, backend {options.backend}")
    print("operators: " + ", ".join(f"{name} {counts[name]}" for name in OPERATORS))
    print("boxes: " + ", ".join(f"{kind} {counts[kind]}" for kind in KINDS))
    print(f"{counts['mismatches']} mismatches at tolerance {TOLERANCE}, {time.perf_counter() - begin:.0f} s")
    sys.exit(1 if counts["mismatches"] else 0)


if __name__ == "__main__":
    main()

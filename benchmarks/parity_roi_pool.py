"""roi_pool beside torchvision's on random cases: outputs and argmax to the bit, gradients within float64's rounding.

    python benchmarks/parity_roi_pool.py
    python benchmarks/parity_roi_pool.py --cases 1000 --seed 7 --backend cupy --device cuda
    python benchmarks/parity_roi_pool.py --seed 7 --case 123    # that one alone

torchvision computes the bins in floating point, so that at some sizes (7 bins over 57, 114 or 121 cells in float32) a
bin ends a cell late. Those sizes are recognised by that very arithmetic, without looking at an output, and the RoIs
that have one are compared with a slow reference in Python's integers. The exit status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # a script's own folder comes first otherwise

import torch
from torch import Tensor

import roi
from benchmarks import arguments
from benchmarks.harness import describe, environment
from roi._problem import memory_format
from tests.reference import max_pool
from tests.reference.comparison import same_bits
from tests.reference.random_boxes import KINDS
from tests.reference.torchvision_bins import torchvision_bins_are_exact

SCALES = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 3, 0.3, 0.0619)
GRADIENT_EVERY = 4  # of the float64 cases
GRADIENT_TOLERANCE = 1e-12  # sums of up to a few thousand terms of about 1, in two orders
SHOWN = 10  # mismatches printed


@dataclass(frozen=True)
class Case:
    kind: str
    input: Tensor  # [N, C, H, W]
    rois: Tensor  # [K, 5], of the same dtype
    scale: float
    bins: tuple[int, int]

    def __str__(self) -> str:
        shape = "×".join(map(str, self.input.shape))
        layout = "contiguous" if self.input.is_contiguous() else "channels_last"
        dtype = str(self.input.dtype).removeprefix("torch.")
        return (
            f"{self.kind} boxes, {len(self.rois)} RoIs, {shape} {dtype} {layout}, scale {self.scale}, {self.bins} bins"
        )


def make_case(seed: int, index: int, device: torch.device) -> Case:
    """Case `index` of that seed: everything about it is drawn, and it does not depend on the other cases."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)

    def draw(low: int, high: int) -> int:
        """An integer in [low, high]."""
        return int(torch.randint(low, high + 1, (), generator=generator))

    side = 140 if draw(0, 9) == 0 else 40  # the sizes at which float32's seven bins are off begin at 57
    shape = draw(1, 3), draw(1, 9), draw(1, side), draw(1, side)
    dtype = (torch.float32, torch.float64)[draw(0, 1)]
    layout = (torch.contiguous_format, torch.channels_last)[draw(0, 1)]
    scale = SCALES[draw(0, len(SCALES) - 1)]
    bins = (7, 7) if draw(0, 3) == 0 else (draw(1, 16), draw(1, 16))
    kind = list(KINDS)[draw(0, len(KINDS) - 1)]
    count = draw(1, 24)

    values = torch.randn(shape, dtype=dtype, generator=generator)
    if draw(0, 1):  # few values: the first of many equal maxima is the one to find, zeros of both signs among them
        values = (values * 2).round() / 2
    image = torch.randint(shape[0], (count, 1), generator=generator)
    corners = KINDS[kind](count, *shape[2:], generator) / scale
    rois = torch.cat([image.double(), corners], dim=1).to(dtype)
    input = values.to(device).contiguous(memory_format=layout)
    return Case(kind, input, rois.to(device), scale, bins)


def differences(case: Case, backend: str, with_gradient: bool) -> tuple[list[str], int]:
    """What differs in a case, in words, and how many of its RoIs were compared with the reference."""
    found = []
    args = case.scale, *case.bins
    output, argmax = torch.ops.fpn_roi.roi_pool_with_argmax(case.input, case.rois, *args, backend)
    if memory_format(output) != memory_format(case.input) and output.shape[1] > 1 and output[0, 0].numel() > 1:
        found.append("memory format from the input's")
    exact = torchvision_bins_are_exact(case.rois, *args)
    kept = exact.to(case.rois.device)
    theirs = case.rois[kept]
    expected, positions = torch.ops.torchvision.roi_pool(case.input, theirs, *args)
    found += compared("torchvision", output[kept], argmax[kept], expected, positions)
    if not exact.all():
        slow = max_pool.roi_pool(case.input.cpu().numpy(), case.rois.cpu()[~exact].numpy(), *args)
        expected, positions = map(torch.from_numpy, slow)
        found += compared("the reference", output[~kept].cpu(), argmax[~kept].cpu(), expected, positions)
    if with_gradient:
        difference = gradient_difference(case, theirs, backend)
        if not difference <= GRADIENT_TOLERANCE:
            found.append(f"gradient from torchvision's, by {difference:.2g}")
    return found, int((~exact).sum())


def compared(peer: str, output: Tensor, argmax: Tensor, expected: Tensor, positions: Tensor) -> list[str]:
    found = []
    if not same_bits(output.contiguous(), expected):
        found.append(f"output from {peer}'s")
    if not torch.equal(argmax.long(), positions.long()):
        found.append(f"argmax from {peer}'s")
    return found


def gradient_difference(case: Case, rois: Tensor, backend: str) -> float:
    """The largest difference between the two packages' gradients over those RoIs."""
    from torchvision.ops import roi_pool as torchvisions

    ours, theirs = case.input.clone().requires_grad_(), case.input.clone().requires_grad_()
    output = roi.roi_pool(ours, rois, case.bins, case.scale, backend=backend)
    grad = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(len(rois)))
    output.backward(grad.to(output.device))
    torchvisions(theirs, rois, case.bins, case.scale).backward(grad.to(output.device))
    assert ours.grad is not None
    assert theirs.grad is not None
    return float((ours.grad - theirs.grad).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=arguments.count, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run only the case of this number")
    parser.add_argument("--backend", choices=["torch", "cupy", "auto"], default="auto")
    parser.add_argument("--device", type=arguments.device, default=arguments.DEFAULT_DEVICE)
    options = parser.parse_args()
    import torchvision  # noqa: F401  registers its operators

    device = torch.device(options.device)
    print(describe(environment(device)), end="\n\n")
    begin = time.perf_counter()
    counts: Counter[str] = Counter()
    for index in range(options.cases) if options.case is None else [options.case]:
        case = make_case(options.seed, index, device)
        with_gradient = case.input.dtype == torch.float64 and index % GRADIENT_EVERY == 0
        found, slow = differences(case, options.backend, with_gradient)
        counts.update({"cases": 1, "rois": len(case.rois), "reference": slow, case.kind: 1})
        counts.update({"gradients": int(with_gradient), "mismatches": bool(found)})
        if found and counts["mismatches"] <= SHOWN:
            print(f"case {index}, {case}: differs in {'; '.join(found)}")
    seconds = time.perf_counter() - begin
    print(f"{counts['cases']} cases, {counts['rois']} RoIs, {counts['gradients']} gradients, backend {options.backend}")
    print("kinds: " + ", ".join(f"{kind} {counts[kind]}" for kind in KINDS))
    print(f"{counts['reference']} RoIs at sizes where torchvision's bins are not the integer ones: with the reference")
    print(f"{counts['mismatches']} mismatches, {seconds:.0f} s")
    sys.exit(1 if counts["mismatches"] else 0)


if __name__ == "__main__":
    main()

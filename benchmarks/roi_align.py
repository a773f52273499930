"""roi_align and multiscale_roi_align beside torchvision's: forward, backward and both, on detectors' workloads.

    python benchmarks/roi_align.py                                  # CUDA where there is a device, else the CPU
    python benchmarks/roi_align.py --problems rpn pyramid --modes forward --plot out.png --json out.json
    python benchmarks/roi_align.py --device cpu --threads 1 2

Contestants: this package's CuPy kernels (CUDA only) and its torch path, and torchvision's operators. Before anything is
timed, the output and the gradients of ours are compared with torchvision's in float64; a difference ends the run.
"pyramid" is 2 × 512 RoIs on P2–P5 of 800 × 1344 images, against torchvision's MultiScaleRoIAlign; "one RoI" is what a
call costs where there is little to do. Times are taken as benchmarks/roi_pool.py takes them.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # a script's own folder comes first otherwise

import torch
from torch import Tensor

import roi
from benchmarks import arguments
from benchmarks.harness import (
    describe,
    device_milliseconds,
    environment,
    interleaved,
    ratio,
    rounds_within,
    table,
    write_json,
)
from benchmarks.roi_pool import BACKENDS, DTYPES, LAYOUTS, MODES, call_of, copies, plot, readable
from benchmarks.workloads import LARGE_IMAGE, WORKLOADS
from roi._backend import cupy_problem
from tests.reference.boxes import rpn_like

BINS = 7
STRIDES = (4, 8, 16, 32)
SAMPLING = {"2": 2, "adaptive": -1}
# (levels, boxes) -> Tensor[K, C, 7, 7]
Op = Callable[[Sequence[Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """Boxes on one map or on a pyramid's.

    Attributes:
        shapes: (N, C, H, W) of each level.
        scales: of each level, cells per pixel.
        image: (height, width) in pixels.
    """

    name: str
    rois: int
    shapes: tuple[tuple[int, int, int, int], ...]
    scales: tuple[float, ...]
    image: tuple[int, int]

    def boxes(self) -> Tensor:
        """Tensor[rois, 5], float32, on the CPU; image after image."""
        return rpn_like(self.rois, self.shapes[0][0], *self.image)

    def features(self, dtype: torch.dtype, layout: torch.memory_format, device: torch.device) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        maps = [torch.randn(shape, generator=generator, device=device) for shape in self.shapes]
        return [map_.to(dtype).contiguous(memory_format=layout) for map_ in maps]


def problems() -> dict[str, Problem]:
    height, width = LARGE_IMAGE
    sizes = tuple((2, 256, -(-height // stride), -(-width // stride)) for stride in STRIDES)
    single = [Problem(w.name, w.rois, (w.shape,), (w.scale,), w.image) for w in WORKLOADS.values()]
    rpn = WORKLOADS["rpn"]
    single.append(Problem("one RoI", 1, (rpn.shape,), (rpn.scale,), rpn.image))
    pyramid = Problem("pyramid", 2 * 512, sizes, tuple(1 / stride for stride in STRIDES), LARGE_IMAGE)
    return {problem.name: problem for problem in (*single, pyramid)}


# --- contestants


def ours(levels: Sequence[Tensor], rois: Tensor, problem: Problem, sampling: int, backend: str) -> Tensor:
    if len(levels) == 1:
        return roi.roi_align(levels[0], rois, BINS, problem.scales[0], sampling, backend=backend)
    return roi.multiscale_roi_align(levels, rois, BINS, problem.scales, sampling, backend=backend)


def torchvisions(levels: Sequence[Tensor], rois: Tensor, problem: Problem, sampling: int) -> Tensor:
    from torchvision import ops

    rois = rois.to(levels[0].dtype)
    if len(levels) == 1:
        return ops.roi_align(levels[0], rois, BINS, problem.scales[0], sampling)
    named = {str(i): level for i, level in enumerate(levels)}
    pooler: Any = ops.MultiScaleRoIAlign(list(named), BINS, sampling)
    images = len(levels[0])
    boxes = list(rois[:, 1:].split(problem.rois // images))
    return pooler(named, boxes, [problem.image] * images)


def contestants(problem: Problem, sampling: int, device: torch.device, backends: Sequence[str]) -> dict[str, Op]:
    """By name, ours first."""
    usable = [name for name in backends if name == "torch" or cupy_problem(device.type) is None]
    ops: dict[str, Op] = {
        backend: partial(ours, problem=problem, sampling=sampling, backend=backend) for backend in usable
    }
    return ops | {"torchvision": partial(torchvisions, problem=problem, sampling=sampling)}


def supported(op: Op, levels: Sequence[Tensor], rois: Tensor) -> bool:
    """Whether a contestant takes that dtype."""
    try:
        op(levels, rois[:0])
    except RuntimeError as error:  # NotImplementedError is one
        if "not implemented" not in str(error):
            raise
        return False
    return True


def check(problem: Problem, op: Op, peer: Op, levels: Sequence[Tensor], rois: Tensor, with_gradient: bool) -> None:
    """Ends the run unless `op` is torchvision in float64 up to rounding.

    The coordinates of both are computed from float32 boxes, ours in float32: so is its rounding of them, 2⁻²³ of up to
    a hundred cells, times differences of neighbouring values of up to about 10.
    """
    wide = [level.double().requires_grad_() for level in levels]
    leaves = [level.detach().requires_grad_() for level in levels]
    output, expected = op(leaves, rois), peer(wide, rois.double())
    rounding = torch.finfo(output.dtype).eps
    allowed = 1e-3 + 4 * rounding * expected.abs()
    same = bool(((output - expected).abs() <= allowed).all())
    if with_gradient:
        ones = torch.ones_like(expected)
        actual = torch.autograd.grad(output, leaves, ones.to(output.dtype))
        theirs = torch.autograd.grad(expected, wide, ones)
        for a, b in zip(actual, theirs, strict=True):  # sums of positive terms
            same &= bool(((a - b).abs() <= 1e-3 * b.abs().max() + 4 * rounding * b.abs()).all())
    if not same:
        raise SystemExit(f"{problem}: the results differ, so there is nothing to compare")


@dataclass(frozen=True)
class Setting:
    """How to time: the parts of the command line that every measurement needs."""

    device: torch.device
    runs: int
    seconds: float
    backends: tuple[str, ...]


def measure(problem: Problem, sampling: str, dtype: str, layout: str, mode: str, setting: Setting) -> dict[str, Any]:
    device, runs = setting.device, setting.runs
    rois = problem.boxes().to(device)
    levels = problem.features(DTYPES[dtype], LAYOUTS[layout], device)
    ops = contestants(problem, SAMPLING[sampling], device, setting.backends)
    taking_part = {name: op for name, op in ops.items() if supported(op, levels, rois)}
    first, *_ = taking_part
    check(problem, ops[first], ops["torchvision"], levels, rois, with_gradient=mode != "forward")
    inputs = [list(turn) for turn in zip(*(copies(level) for level in levels), strict=False)]
    turn = itertools.cycle(range(len(inputs)))
    calls = {name: call_of(mode, op, inputs, rois, turn) for name, op in taking_part.items()}
    warmup = 10 if device.type == "cuda" else 1
    if device.type == "cpu":
        runs = rounds_within(setting.seconds, calls, device, runs)
    times = interleaved(calls, device, runs, warmup, timer=device_milliseconds)
    name = problem.name if sampling == "2" else f"{problem.name}, {sampling}"
    row: dict[str, Any] = {"workload": name, "mode": mode, "dtype": dtype, "layout": layout}
    row["threads"] = torch.get_num_threads()
    row |= {f"{name} ms": median(times[name]) if name in times else "not supported" for name in ops}
    row |= {
        f"{name} / ours": ratio(times, peer=name, ours=first) if name in times else "-" for name in ops if name != first
    }
    return row | {"rounds": runs}


def main() -> None:
    every = problems()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=list(every), default=list(every))
    parser.add_argument("--sampling", nargs="+", choices=list(SAMPLING), default=list(SAMPLING))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), help="default: all on CUDA, float32 on the CPU")
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="of ours")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--runs", type=arguments.count, help="rounds that count (default: 50 on CUDA, at most 30 on the CPU)"
    )
    parser.add_argument(
        "--seconds", type=float, default=10, help="on the CPU fewer rounds where they would take longer"
    )
    parser.add_argument("--threads", nargs="+", type=arguments.count, help="CPU threads (default: torch's)")
    parser.add_argument("--device", type=arguments.device, default=arguments.DEFAULT_DEVICE)
    parser.add_argument("--json", type=Path, help="also write the environment and the rows there")
    parser.add_argument("--plot", type=Path, help="also draw the rows there")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    dtypes = options.dtypes or (list(DTYPES) if device.type == "cuda" else ["float32"])
    runs = options.runs or (50 if device.type == "cuda" else 30)
    setting = Setting(device, runs, options.seconds, tuple(options.backends))
    threads = options.threads or [torch.get_num_threads()]
    facts = environment(device) | {"threads": ", ".join(map(str, threads))}
    print(describe(facts), end="\n\n")
    rows = []
    for count, *case in itertools.product(
        threads, options.problems, options.sampling, dtypes, options.layouts, options.modes
    ):
        torch.set_num_threads(count)
        name, *how = case
        rows.append(measure(every[name], *how, setting))
        print(rows[-1], file=sys.stderr)
        if options.json:  # after every problem: what was measured stays if the run is ended
            write_json(options.json, facts, rows)
    print(table([readable(row) for row in rows]))
    print("\nours: the first; “… / ours”: median over the rounds; above 1, ours is faster")
    if options.plot:
        plot(options.plot, rows, facts)


if __name__ == "__main__":
    main()

"""The RoI operators beside torchvision's on the CPU, on a quiet machine and with busy processes beside them.

    python benchmarks/roi_shared_machine.py --json out.json
    python benchmarks/roi_shared_machine.py --busy 0 1 --rows pyramid few-boxes --layouts contiguous

The neighbours are processes of this script's that compute without a pause, as a DataLoader's workers or another job
would. In every row the contestants take turns in one process; outputs are compared before they are timed. "pyramid" is
2 × 512 boxes on P2–P5 of 800 × 1344 images, "one map" 1,000 boxes on P4; "few boxes" and "many images" are what a
service and a tracker ask for. torchvision has no pooler for max pooling: its operator runs on each level's boxes.

The row "parts" has what contiguous maps cost at least where pooling works on channels_last ones: a copy into memory
that is mapped already, the pooling, and the transposition of the output. All three are timed in the same rounds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from subprocess import DEVNULL, Popen
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # a script's own folder comes first otherwise

import torch
from torch import Tensor

import roi
from benchmarks import arguments
from benchmarks.harness import describe, environment, interleaved, ratio, rounds_within, table, write_json
from benchmarks.workloads import LARGE_IMAGE
from roi._problem import Pooling
from roi.torch_path.levels import map_levels
from tests.reference.boxes import rpn_like

CPU = torch.device("cpu")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
STRIDES = (4, 8, 16, 32)
BINS = 7
Op = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Row:
    """One problem for both libraries.

    Attributes:
        shapes: (N, C, H, W) of each level.
        rois: Tensor[K, 5], float32.
        scales: of each level, cells per unit of the boxes.
    """

    name: str
    operator: str
    shapes: tuple[tuple[int, int, int, int], ...]
    rois: Tensor
    scales: tuple[float, ...]
    backward: bool = False

    def features(self, layout: torch.memory_format) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        maps = [torch.randn(shape, generator=generator).contiguous(memory_format=layout) for shape in self.shapes]
        return [map_.requires_grad_(self.backward) for map_ in maps]

    def ours(self, maps: Sequence[Tensor]) -> Tensor:
        options = (2,) if self.operator == "roi_align" else ()
        if len(maps) == 1:
            return getattr(roi, self.operator)(maps[0], self.rois, BINS, self.scales[0], *options)
        return getattr(roi, f"multiscale_{self.operator}")(maps, self.rois, BINS, self.scales, *options)

    def theirs(self, maps: Sequence[Tensor]) -> Tensor:
        from torchvision import ops

        options = (2,) if self.operator == "roi_align" else ()
        operator = getattr(ops, self.operator)
        if len(maps) == 1:
            return operator(maps[0], self.rois, BINS, self.scales[0], *options)
        if self.operator == "roi_align":
            pooler: Any = ops.MultiScaleRoIAlign([str(i) for i in range(len(maps))], BINS, 2)
            boxes = [self.rois[self.rois[:, 0] == n, 1:] for n in range(len(maps[0]))]
            return pooler({str(i): map_ for i, map_ in enumerate(maps)}, boxes, [LARGE_IMAGE] * len(maps[0]))
        level = map_levels(self.rois, Pooling(self.scales, BINS, BINS))
        places = [(level == index).nonzero().flatten() for index in range(len(maps))]
        parts = [
            operator(map_, self.rois[own], BINS, scale)
            for map_, own, scale in zip(maps, places, self.scales, strict=True)
        ]
        return torch.cat(parts)[torch.cat(places).argsort()]


def rows(backward: bool) -> Iterator[Row]:
    height, width = LARGE_IMAGE
    sizes = tuple((2, 256, -(-height // stride), -(-width // stride)) for stride in STRIDES)
    scales = tuple(1 / stride for stride in STRIDES)
    p4 = ((1, 256, 50, 84),)
    for operator in ("roi_align", "roi_pool"):
        yield Row("pyramid", operator, sizes, rpn_like(1024, 2, height, width), scales, backward)
        yield Row("one-map", operator, p4, rpn_like(1000, 1, height, width), (1 / 16,), backward)
        for count in (1, 3, 10, 30):
            yield Row(f"few-boxes {count}", operator, p4, rpn_like(count, 1, height, width), (1 / 16,), backward)
        whole = torch.tensor([[n, 0, 0, 13, 13] for n in range(256)], dtype=torch.float32)
        yield Row("many-images 1024 × 1", operator, ((1024, 64, 14, 14),), images_with(1024, 1), (1.0,), backward)
        yield Row("many-images 256 × 1 whole", operator, ((256, 64, 14, 14),), whole, (1.0,), backward)
        yield Row("many-images 16 × 8", operator, ((16, 64, 14, 14),), images_with(16, 8), (1.0,), backward)
        yield Row("one-channel", operator, ((1, 1, 50, 84),), rpn_like(1, 1, height, width), (1 / 16,), backward)


def images_with(images: int, boxes: int) -> Tensor:
    """Tensor[images·boxes, 5]: boxes of 3 to 10 cells on maps of 14 × 14."""
    generator = torch.Generator().manual_seed(0)
    first, size = torch.rand(2, images * boxes, 2, generator=generator)
    size = 3 + 7 * size
    first = first * (13 - size)
    image = torch.arange(images).repeat_interleave(boxes).float()
    return torch.cat([image[:, None], first, first + size], dim=1)


def call_of(op: Op, maps: list[Tensor], grad: Tensor | None) -> Callable[[], Any]:
    if grad is None:

        def forward() -> Tensor:
            with torch.no_grad():
                return op(maps)

        return forward
    return lambda: torch.autograd.grad(op(maps), maps, grad)


def check(row: Row, maps: list[Tensor]) -> None:
    """Ends the run unless the outputs agree: max pooling's to the bit, sums up to rounding."""
    with torch.no_grad():
        ours, theirs = row.ours(maps), row.theirs(maps)
    allowed = 0 if row.operator == "roi_pool" else 1e-3  # torchvision interpolates in float32, at up to 1,000 cells
    if float((ours - theirs).abs().max()) > allowed:
        raise SystemExit(f"{row.name}, {row.operator}: the outputs differ, so there is nothing to compare")


def measure(row: Row, layout: str, runs: int, seconds: float) -> dict[str, Any]:
    maps = row.features(LAYOUTS[layout])
    check(row, maps)
    grad = torch.randn(row.ours(maps).shape) if row.backward else None
    calls = {"ours": call_of(row.ours, maps, grad), "torchvision": call_of(row.theirs, maps, grad)}
    times = interleaved(calls, CPU, rounds_within(seconds, calls, CPU, runs), warmup=1)
    middle = {name: median(times[name]) for name in calls}
    return {
        "ours ms": middle["ours"],
        "torchvision ms": middle["torchvision"],
        "ratio": ratio(times, "torchvision", "ours"),
    }


def parts(row: Row, runs: int, seconds: float) -> dict[str, Any]:
    """Of a row on contiguous maps: ours beside a warm copy, channels_last pooling and the output's transposition."""
    maps = row.features(torch.contiguous_format)
    copies = [map_.clone(memory_format=torch.channels_last) for map_ in maps]
    with torch.no_grad():
        pooled = row.ours(copies)

        def copy() -> None:
            for target, map_ in zip(copies, maps, strict=True):
                target.copy_(map_)

        calls: dict[str, Callable[[], Any]] = {
            "ours": lambda: row.ours(maps),
            "copy": copy,
            "pooling": lambda: row.ours(copies),
            "transposition": pooled.contiguous,
        }
        times = interleaved(calls, CPU, rounds_within(seconds, calls, CPU, runs), warmup=1)
    sums = [sum(each) for each in zip(times["copy"], times["pooling"], times["transposition"], strict=True)]
    times["sum"] = sums
    return {**{f"{name} ms": median(each) for name, each in times.items()}, "ours / sum": ratio(times, "ours", "sum")}


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Processes that keep a core busy each."""
    busy = [Popen([sys.executable, "-c", "while True: pass"], stdout=DEVNULL) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def main() -> None:
    names = ["pyramid", "one-map", "few-boxes", "many-images", "one-channel", "parts"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2], help="busy processes beside the benchmark")
    parser.add_argument("--rows", nargs="+", choices=names, default=names)
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--modes", nargs="+", choices=("forward", "both"), default=("forward", "both"))
    parser.add_argument("--runs", type=arguments.count, default=30, help="rounds that count, at most")
    parser.add_argument("--seconds", type=float, default=5, help="fewer rounds where they would take longer")
    parser.add_argument("--json", type=Path, help="also write the environment and the rows there")
    options = parser.parse_args()
    facts = environment(CPU)
    print(describe(facts), end="\n\n")
    found: list[dict[str, Any]] = []

    def note(result: dict[str, Any]) -> None:
        found.append(result)
        if options.json:  # after every row: what was measured stays if the run is ended
            write_json(options.json, facts, found)

    for busy in options.busy:
        with neighbours(busy):
            for mode in options.modes:
                for row in rows(mode == "both"):
                    if row.name.split()[0] not in options.rows:
                        continue
                    for layout in options.layouts:
                        head = {"busy": busy, "row": row.name, "operator": row.operator, "mode": mode, "layout": layout}
                        note(head | measure(row, layout, options.runs, options.seconds))
                        print(table([found[-1]]).rpartition("\n")[2], flush=True)
            if "parts" in options.rows:
                for row in rows(False):
                    if row.name in ("pyramid", "one-map") and row.operator == "roi_align":
                        head = {"busy": busy, "row": f"parts of {row.name}", "operator": row.operator}
                        note(head | parts(row, options.runs, options.seconds))
                        print(found[-1], flush=True)
    timed = [row for row in found if "ratio" in row]
    if timed:
        print("\n" + table(timed))
    print("\nratio: torchvision's time by ours, the median over the rounds; above 1, ours is faster")


if __name__ == "__main__":
    main()

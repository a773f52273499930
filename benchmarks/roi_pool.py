"""roi_pool beside torchvision's op and a hand-written loop: forward, backward and both, on detectors' workloads.

    python benchmarks/roi_pool.py                                  # CUDA where there is a device, else the CPU
    python benchmarks/roi_pool.py --workloads rpn training --modes forward --plot out.png --json out.json
    python benchmarks/roi_pool.py --device cpu --threads 1 2
    python benchmarks/roi_pool.py --grid                           # extremes, forward: the worst ratios first

Contestants: this package's CuPy kernels (CUDA only) and its torch path, torchvision's op, and "loop": one
`adaptive_max_pool2d` per RoI as people write it by hand, for RoIs clipped to the map. Before anything is timed, the
output and the gradient of ours are compared with torchvision's (in float32 where the features are half precision, for
its bins are computed in their dtype); a difference ends the run.

On CUDA a time is the device's, by events, while the features come in turn from several copies that together exceed the
L2 cache; the loops, which wait for the device or keep it waiting, are timed in fewer rounds. On the CPU it is the wall
clock, and the features stay in cache where they fit.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # a script's own folder comes first otherwise

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

import roi
from benchmarks import arguments
from benchmarks.harness import (
    copy_bandwidth,
    describe,
    device_milliseconds,
    environment,
    host_milliseconds,
    interleaved,
    ratio,
    rounds_within,
    table,
    write_json,
)
from benchmarks.workloads import LARGE_IMAGE, WORKLOADS, Workload, cells_touched, past_the_map
from roi._backend import cupy_problem
from roi.torch_path.bins import roi_windows
from tests.reference import max_pool
from tests.reference.boxes import rpn_like
from tests.reference.comparison import same_bits
from tests.reference.torchvision_bins import torchvision_bins_are_exact

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
MODES = ("forward", "backward", "both")
PEERS = ("torchvision", "loop")
BACKENDS = ("cupy", "torch")  # ours; the first that runs is what the others are compared with
NOT_SUPPORTED = "not supported"
TOO_LONG = "too long"
LOOP_GRADIENT_BYTES = {"cpu": 2e10, "cuda": 2e12}  # beyond it the loop's backward takes minutes, and is left out
SLOW_ROUNDS = 3  # of the loops on CUDA
BYTES_COUNTED = """\
forward: the input's cells that some RoI covers, the boxes, the output. backward: the output's gradient, the argmax
(4 bytes each), the input's gradient, all of it. both: the two, and the argmax written. Not counted: cells read more
than once, the zeros that a sum starts from and the reading and writing of adding to it."""
GRID_OUTPUTS = 2**26  # elements of the largest output in the grid
GRID_READS = 2**31  # elements that RoIs of the whole map read, at most
GRID_GOAL = 1.5  # times torchvision's time

Op = Callable[[Tensor, Tensor], Tensor]


# --- contestants


def torchvisions(input: Tensor, rois: Tensor, bins: int, scale: float) -> Tensor:
    from torchvision.ops import roi_pool

    return roi_pool(input, rois, bins, scale)


def loop(input: Tensor, rois: Tensor, bins: int, scale: float) -> Tensor:
    """The way it is written by hand. Its RoIs are clipped to the map: where one leaves it, the bins are others."""
    height, width = input.shape[2:]
    cells = (rois[:, 1:] * scale).round().long()
    x1, x2 = cells[:, 0].clamp(0, width - 1), cells[:, 2].clamp(0, width - 1)
    y1, y2 = cells[:, 1].clamp(0, height - 1), cells[:, 3].clamp(0, height - 1)
    boxes = torch.stack([rois[:, 0].long(), x1, y1, x2.maximum(x1), y2.maximum(y1)], dim=1).tolist()
    crops = [input[i : i + 1, :, top : bottom + 1, left : right + 1] for i, left, top, right, bottom in boxes]
    return torch.cat([adaptive_max_pool2d(crop, bins) for crop in crops])


def operators(device: torch.device, bins: int, scale: float, backends: Sequence[str] = BACKENDS) -> dict[str, Op]:
    """The contestants by name, ours first."""
    ops: dict[str, Op] = {}
    for backend in backends:
        if backend == "torch" or cupy_problem(device.type) is None:
            ops[backend] = partial(roi.roi_pool, output_size=bins, spatial_scale=scale, backend=backend)
    return ops | {
        "torchvision": partial(torchvisions, bins=bins, scale=scale),
        "loop": partial(loop, bins=bins, scale=scale),
    }


def rois_for(name: str, rois: Tensor, dtype: torch.dtype) -> Tensor:
    """torchvision wants boxes in the dtype of the features; the others take them as they are."""
    return rois.to(dtype) if name == "torchvision" else rois


def supported(op: Op, name: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a contestant has that dtype, forward and backward; asked with the smallest problem."""
    input = torch.zeros(1, 1, 8, 8, dtype=dtype, device=device, requires_grad=True)
    rois = torch.zeros(1, 5, device=device)
    try:
        op(input, rois_for(name, rois, dtype)).sum().backward()
    except RuntimeError as error:  # NotImplementedError is one
        if "not implemented" not in str(error):
            raise
        return False
    return True


# --- what is asked of them before they are timed


def check_output(workload: Workload, op: Op, input: Tensor, rois: Tensor) -> int:
    """Ends the run unless `op` gives torchvision's bits; how many RoIs have sizes at which its bins are not exact.

    Those are compared with the slow reference instead. Maxima are values of the input, so that torchvision's float32
    output, rounded to half precision, is what half precision has to give.
    """
    wide = torch.promote_types(input.dtype, torch.float32)
    bins, scale = workload.bins, workload.scale
    exact = torchvision_bins_are_exact(rois.to(wide), scale, bins, bins)
    kept = exact.to(rois.device)
    with torch.no_grad():
        output = op(input, rois).contiguous()
        expected = torchvisions(input.to(wide), rois[kept].to(wide), bins, scale).to(input.dtype)
    same = same_bits(output[kept], expected)
    if not exact.all():
        features = input.detach().cpu().to(wide).contiguous().numpy()
        slow, _ = max_pool.roi_pool(features, rois[~kept].cpu().to(wide).numpy(), scale, bins, bins)
        same &= same_bits(output[~kept].cpu(), torch.from_numpy(slow).to(input.dtype))
    if not same:
        raise SystemExit(f"{workload}: the outputs differ, so there is nothing to compare")
    return int((~exact).sum())


def check_gradient(workload: Workload, op: Op, input: Tensor, rois: Tensor) -> None:
    """Ends the run unless `op` gives torchvision's gradient within the rounding of the dtype."""
    wide = torch.promote_types(input.dtype, torch.float32)
    bins, scale = workload.bins, workload.scale
    exact = torchvision_bins_are_exact(rois.to(wide), scale, bins, bins).to(rois.device)
    rois = rois[exact]
    ours, theirs = input.detach().requires_grad_(), input.detach().to(wide).requires_grad_()
    output = op(ours, rois)
    grad = gradient_of(output)
    (actual,) = torch.autograd.grad(output, ours, grad)
    pooled = torchvisions(theirs, rois.to(wide), bins, scale)
    (expected,) = torch.autograd.grad(pooled, theirs, grad.to(wide).contiguous())
    (sums,) = torch.autograd.grad(
        torchvisions(theirs, rois.to(wide), bins, scale), theirs, grad.abs().to(wide).contiguous()
    )
    # Two sums of the same terms in two orders, then one rounding to the dtype.
    allowed = 64 * torch.finfo(wide).eps * sums + torch.finfo(input.dtype).eps * expected.abs()
    if not bool(((actual.to(wide) - expected).abs() <= allowed).all()):
        raise SystemExit(f"{workload}: the gradients differ, so there is nothing to compare")


def gradient_of(output: Tensor) -> Tensor:
    """Normally distributed values in the shape, dtype and memory format of an output."""
    generator = torch.Generator(output.device).manual_seed(1)
    values = torch.randn(output.shape, generator=generator, device=output.device)
    return torch.empty_like(output, requires_grad=False).copy_(values)


# --- what is timed


def call_of(mode: str, op: Op, inputs: list[Tensor], rois: Tensor, turn: Iterator[int]) -> Callable[[], Any]:
    """One call of a contestant in a mode, on whichever of `inputs` is next."""
    if mode == "forward":

        def forward() -> None:
            with torch.no_grad():
                op(inputs[next(turn)], rois)

        return forward
    if mode == "backward":
        outputs = [op(input, rois) for input in inputs]
        grad = gradient_of(outputs[0])

        def backward() -> None:
            i = next(turn)
            torch.autograd.grad(outputs[i], inputs[i], grad, retain_graph=True)

        return backward
    grad = gradient_of(op(inputs[0], rois))

    def both() -> None:
        input = inputs[next(turn)]
        torch.autograd.grad(op(input, rois), input, grad)

    return both


def copies(input: Tensor) -> list[Tensor]:
    """Leaves to take in turn: on CUDA so many that one has left the L2 cache when its turn comes again."""
    count = 1
    if input.device.type == "cuda":
        cache = torch.cuda.get_device_properties(input.device).L2_cache_size
        count += -(-2 * cache // (input.numel() * input.element_size()))
    return [input.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(count)]


def bytes_to_move(workload: Workload, rois: Tensor, dtype: torch.dtype, mode: str) -> int:
    """Bytes that a perfect implementation moves, each once: BYTES_COUNTED says which."""
    inputs, outputs = torch.Size(workload.shape).numel(), workload.rois * workload.channels * workload.bins**2
    windows = roi_windows(rois.cpu().numpy(), workload.scale)
    touched = cells_touched(windows, workload.batch, workload.height, workload.width) * workload.channels
    forward = (touched + outputs) * dtype.itemsize + rois.numel() * rois.element_size()
    backward = (outputs + inputs) * dtype.itemsize + 4 * outputs
    return {"forward": forward, "backward": backward, "both": forward + backward + 4 * outputs}[mode]


@dataclass(frozen=True)
class Setting:
    """How to time: the parts of the command line that every measurement needs."""

    device: torch.device
    threads: int
    runs: int
    seconds: float
    backends: tuple[str, ...]
    peers: tuple[str, ...]
    copy: float  # gigabytes per second


def contestants(
    workload: Workload, dtype: torch.dtype, mode: str, setting: Setting
) -> tuple[dict[str, Op], dict[str, str]]:
    """Those that take part in a measurement, and of the others why they do not."""
    everyone = operators(setting.device, workload.bins, workload.scale, setting.backends)
    absent: dict[str, str] = {}
    for name, op in everyone.items():
        if name in PEERS and name not in setting.peers:
            absent[name] = "-"
        elif not supported(op, name, dtype, setting.device):
            absent[name] = NOT_SUPPORTED
    gradients = workload.rois * torch.Size(workload.shape).numel() * dtype.itemsize  # each slice's is a map of zeros
    if mode != "forward" and gradients > LOOP_GRADIENT_BYTES[setting.device.type]:
        absent.setdefault("loop", TOO_LONG)
    return {name: op for name, op in everyone.items() if name not in absent}, absent


def times_of(
    ops: Mapping[str, Op], mode: str, input: Tensor, rois: Tensor, setting: Setting
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Milliseconds of each round of each contestant, and how many times slower than ours (the first) each other is."""
    ours, *others = ops
    loops = [name for name in others if name in ("torch", "loop")] if setting.device.type == "cuda" else []

    def timed(names: list[str], inputs: list[Tensor], warmup: int, runs: int) -> dict[str, list[float]]:
        turn = itertools.cycle(range(len(inputs)))  # one for all: no call finds its features left there by another
        calls = {name: call_of(mode, ops[name], inputs, rois_for(name, rois, input.dtype), turn) for name in names}
        if setting.device.type == "cpu":
            runs, warmup = rounds_within(setting.seconds, calls, setting.device, runs), 0
        return interleaved(calls, setting.device, runs, warmup, timer=device_milliseconds)

    times = timed([name for name in ops if name not in loops], copies(input), warmup=10, runs=setting.runs)
    ratios = {peer: ratio(times, peer=peer, ours=ours) for peer in times if peer != ours}
    if loops:
        slow = timed([ours, *loops], [input.detach().requires_grad_()], warmup=1, runs=SLOW_ROUNDS)
        ratios |= {peer: ratio(slow, peer=peer, ours=ours) for peer in loops}
        times |= {peer: slow[peer] for peer in loops}
    return times, ratios


def measure(workload: Workload, dtype: str, layout: str, mode: str, setting: Setting) -> dict[str, Any]:
    kind = DTYPES[dtype]
    rois = workload.boxes().to(setting.device)
    input = workload.features(kind, LAYOUTS[layout], setting.device)
    ops, absent = contestants(workload, kind, mode, setting)
    ours = next(iter(ops))
    for name in ops:
        if name not in PEERS:
            check_output(workload, ops[name], input, rois)
            if mode != "forward":
                check_gradient(workload, ops[name], input, rois)
    times, ratios = times_of(ops, mode, input, rois, setting)
    middle = {name: median(values) for name, values in times.items()}
    bandwidth = bytes_to_move(workload, rois, kind, mode) / middle[ours] / 1e6
    row: dict[str, Any] = {"workload": workload.name, "mode": mode, "dtype": dtype, "layout": layout}
    row["threads"] = setting.threads
    row |= {f"{name} ms": middle.get(name, absent.get(name)) for name in (*ops, *absent)}
    row |= {f"{name} / ours": ratios.get(name, "-") for name in (*ops, *absent) if name != ours}
    row |= {"rounds": len(times[ours]), "GB/s": bandwidth, "of a copy": bandwidth / setting.copy}
    return row


def overheads(device: torch.device, backends: Sequence[str]) -> list[dict[str, Any]]:
    """Host time of one call on the smallest problem, without waiting for the device: microseconds."""
    calls_per_run = 100
    input = torch.randn(1, 4, 8, 8, device=device, requires_grad=True)
    rois = torch.tensor([[0.0, 0, 0, 6, 6]], device=device)
    rows = []
    for mode in ("forward", "both"):
        calls = {}
        for name, op in operators(device, 2, 1.0, backends).items():
            call = call_of(mode, op, [input], rois, itertools.repeat(0))
            calls[name] = partial(repeated, call, calls_per_run)
        times = interleaved(calls, device, runs=21, timer=host_milliseconds)
        rows.append({"mode": mode} | {f"{name} µs": median(t) * 1e3 / calls_per_run for name, t in times.items()})
    return rows


def repeated(call: Callable[[], Any], count: int) -> None:
    for _ in range(count):
        call()


# --- the grid of extremes


def grid_boxes(kind: str, workload: Workload) -> Tensor:
    """Tensor[K, 5], float32, of one kind."""
    height, width = workload.image
    boxes = rpn_like(workload.rois, workload.batch, height, width)
    if kind == "one cell":
        boxes[:, 3:] = boxes[:, 1:3]
    elif kind == "whole map":
        boxes[:, 1:] = torch.tensor([0, 0, width - 16.0, height - 16.0])
    elif kind == "far off":
        boxes[:, 1:] += 10 * width
    return boxes


GRID_KINDS = ("one cell", "whole map", "far off", "rpn")
GRID_ROIS = (1, 10, 512, 10_000)
GRID_CHANNELS = (1, 3, 16, 64, 256, 1024, 2048)


def grid_row(kind: str, workload: Workload, dtype: str, layout: str, setting: Setting) -> dict[str, Any]:
    """Ours and torchvision's forward on one problem."""
    rois = grid_boxes(kind, workload).to(setting.device)
    input = workload.features(DTYPES[dtype], LAYOUTS[layout], setting.device)
    ops = operators(setting.device, workload.bins, workload.scale, setting.backends)
    ours = next(iter(ops))
    check_output(workload, ops[ours], input, rois)
    calls = {
        name: call_of("forward", ops[name], [input], rois_for(name, rois, input.dtype), itertools.repeat(0))
        for name in (ours, "torchvision")
    }
    runs = rounds_within(setting.seconds, calls, setting.device, setting.runs)
    times = interleaved(calls, setting.device, runs, warmup=0, timer=device_milliseconds)
    return {
        "boxes": kind,
        "rois": workload.rois,
        "channels": workload.channels,
        "dtype": dtype,
        "layout": layout,
        "threads": setting.threads,
        "ours ms": median(times[ours]),
        "torchvision ms": median(times["torchvision"]),
        "ours / torchvision": 1 / ratio(times, peer="torchvision", ours=ours),
        "rounds": runs,
    }


def grid(dtypes: list[str], layouts: list[str], settings: list[Setting]) -> list[dict[str, Any]]:
    """The worst first."""
    problem = Workload("grid", 1, 1, 1, 50, 84, 1 / 16, LARGE_IMAGE)
    rows, left_out = [], set()
    for setting, dtype, layout in itertools.product(settings, dtypes, layouts):
        set_threads(setting)
        for kind, rois, channels in itertools.product(GRID_KINDS, GRID_ROIS, GRID_CHANNELS):
            workload = replace(problem, rois=rois, channels=channels)
            reads = rois * torch.Size(workload.shape).numel() if kind == "whole map" else 0
            if rois * channels * workload.bins**2 > GRID_OUTPUTS or reads > GRID_READS:
                left_out.add((kind, rois, channels))
            else:
                rows.append(grid_row(kind, workload, dtype, layout, setting))
                print(rows[-1], file=sys.stderr)
    names = ", ".join(f"{kind} {rois} × {channels}" for kind, rois, channels in sorted(left_out))
    print(f"left out, as too large (boxes, RoIs × channels): {names}\n")
    return sorted(rows, key=lambda row: -row["ours / torchvision"])


def print_grid(rows: list[dict[str, Any]], shown: int = 25) -> None:
    print(table([readable(row) for row in rows[:shown]]))
    slower = sum(row["ours / torchvision"] > 1 for row in rows)
    beyond = sum(row["ours / torchvision"] > GRID_GOAL for row in rows)
    middle = median(row["ours / torchvision"] for row in rows)
    print(f"\n{len(rows)} problems, the worst {min(shown, len(rows))} shown; median of ours / torchvision {middle:.2f}")
    print(f"slower than torchvision: {slower}; by more than {GRID_GOAL} times: {beyond}")


# --- what is shown


def figures(value: float) -> str:
    """Three figures, or a whole number: 0.0294, 12.3, 1870."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def readable(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row for the table: milliseconds to three figures."""
    return {k: figures(v) if k.endswith(" ms") and isinstance(v, float) else v for k, v in row.items()}


COLOURS = {"cupy": "#1b6ca8", "torch": "#59a5d8", "torchvision": "#e07b39", "loop": "#9a9a9a"}


def plot(path: Path, rows: list[dict[str, Any]], facts: Mapping[str, Any]) -> None:
    """Milliseconds of each contestant, logarithmic: a panel per mode and per dtype, layout and threads."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    modes = list(dict.fromkeys(row["mode"] for row in rows))
    variants = list(dict.fromkeys((row["dtype"], row["layout"], row["threads"]) for row in rows))
    groups = len({row["workload"] for row in rows})
    figure = Figure(figsize=(4.5 * len(modes) + 1, (0.75 * groups + 0.7) * len(variants) + 0.9), layout="constrained")
    axes = figure.subplots(len(variants), len(modes), squeeze=False)
    for variant, line in zip(variants, axes, strict=True):
        for mode, axis in zip(modes, line, strict=True):
            shown = [r for r in rows if (r["dtype"], r["layout"], r["threads"]) == variant and r["mode"] == mode]
            panel(axis, shown)
            threads = f", threads {variant[2]}" if len({v[2] for v in variants}) > 1 else ""
            axis.set_title(f"{mode}, {variant[0]}, {variant[1]}{threads}", fontsize=10, loc="left")
    for axis in axes[-1]:
        axis.set_xlabel("milliseconds, logarithmic", fontsize=9)
    present = [name for name in COLOURS if any(isinstance(row.get(f"{name} ms"), float) for row in rows)]
    labels = {"cupy": "fpn-roi, CuPy", "torch": "fpn-roi, torch"}
    handles = [Line2D([], [], marker="o", ls="", color=COLOURS[n], label=labels.get(n, n)) for n in present]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=10)
    threads = f", threads {facts['threads']}" if facts["device"] == "cpu" else ""
    device = facts["cpu"] if facts["device"] == "cpu" else facts["device"]
    figure.supxlabel(
        f"{device}{threads}, torch {facts['torch']}, torchvision {facts['torchvision']}; × how many times ours",
        fontsize=8,
    )
    figure.savefig(path, dpi=120)


def panel(axis: Any, rows: list[dict[str, Any]]) -> None:
    """A group of lines per workload, a dot per contestant, labelled with its time and its ratio to ours."""
    names = [name for name in COLOURS if any(row.get(f"{name} ms", "-") != "-" for row in rows)]
    times = [value for row in rows for name in names if isinstance(value := row[f"{name} ms"], float)]
    for i, row in enumerate(rows):
        for j, name in enumerate(names):
            y, value = i - 0.4 + 0.8 * (j + 0.5) / len(names), row[f"{name} ms"]
            if not isinstance(value, float):
                axis.text(0.01, y, f"{name}: {value}", transform=axis.get_yaxis_transform(), fontsize=7, va="center")
                continue
            axis.axhline(y, color="#ececec", linewidth=0.8, zorder=0)
            axis.plot(value, y, "o", color=COLOURS[name], markersize=6)
            times_ours = row.get(f"{name} / ours")
            label = f"{figures(value)} ms" + (f"  ({figures(times_ours)}×)" if isinstance(times_ours, float) else "")
            axis.annotate(label, (value, y), xytext=(6, 0), textcoords="offset points", fontsize=7, va="center")
        if i:
            axis.axhline(i - 0.5, color="#c8c8c8", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xlim(min(times) / 1.5, max(times) * (max(times) / min(times)) ** 0.4 * 2)  # room for the labels
    axis.xaxis.set_major_formatter("{x:g}")
    axis.tick_params(axis="x", which="minor", labelbottom=False)
    axis.set_yticks(range(len(rows)), [row["workload"] for row in rows], fontsize=9)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.tick_params(axis="x", labelsize=8)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)


def set_threads(setting: Setting) -> None:
    torch.set_num_threads(setting.threads)


def print_workloads(names: list[str]) -> None:
    for name in names:
        workload = WORKLOADS[name]
        rois = workload.boxes()
        outside = past_the_map(rois, workload.scale, workload.height, workload.width)
        inexact = int((~torchvision_bins_are_exact(rois, workload.scale, workload.bins, workload.bins)).sum())
        print(f"{workload}; {outside:.1%} reach past the map; {inexact} at sizes where torchvision's bins are inexact")
    print()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), help="default: all on CUDA, float32 on the CPU")
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="of ours")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument(
        "--runs", type=arguments.count, help="rounds that count (default: 50 on CUDA, at most 9 on the CPU)"
    )
    parser.add_argument(
        "--seconds", type=float, help="on the CPU fewer rounds, down to 3, where they would take longer"
    )
    parser.add_argument(
        "--threads", nargs="+", type=arguments.count, help="CPU threads (default: torch's; 1 and 2 with --grid)"
    )
    parser.add_argument("--device", type=arguments.device, default=arguments.DEFAULT_DEVICE)
    parser.add_argument("--grid", action="store_true", help="extremes instead of the workloads")
    parser.add_argument("--json", type=Path, help="also write the environment and the rows there")
    parser.add_argument("--plot", type=Path, help="also draw the rows there")
    return parser.parse_args()


def settings_of(options: argparse.Namespace, device: torch.device) -> list[Setting]:
    """One for each number of threads."""
    on_cuda = device.type == "cuda"
    runs = options.runs or (50 if on_cuda else 30 if options.grid else 9)
    seconds = options.seconds or (0.3 if options.grid else 20)
    default = [1, 2] if options.grid and not on_cuda else [torch.get_num_threads()]
    settings = []
    for threads in options.threads or default:
        torch.set_num_threads(threads)
        contestants = tuple(options.backends), tuple(options.peers)
        settings.append(Setting(device, threads, runs, seconds, *contestants, copy_bandwidth(device)))
    return settings


def main() -> None:
    options = parse()
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
        if problem := cupy_problem("cuda"):
            print(f"without the CuPy path: {problem}\n")
    else:
        reason = "asked for the CPU" if torch.cuda.is_available() else "no CUDA device"
        print(f"{reason}: CPU paths only\n")
    dtypes = options.dtypes or (list(DTYPES) if device.type == "cuda" and not options.grid else ["float32"])
    facts = environment(device)
    settings = settings_of(options, device)
    facts["threads"] = ", ".join(str(setting.threads) for setting in settings)
    print(describe(facts))
    facts["copy GB/s"] = [setting.copy for setting in settings]
    for setting in settings:
        print(f"copy:        {setting.copy:.1f} GB/s with {setting.threads} CPU threads")
    print()

    if options.grid:
        rows = grid(dtypes, options.layouts, settings)
        print_grid(rows)
        if options.json:
            write_json(options.json, facts, rows)
    else:
        print_workloads(options.workloads)
        rows = []
        for setting, name, dtype, layout, mode in itertools.product(
            settings, options.workloads, dtypes, options.layouts, options.modes
        ):
            set_threads(setting)
            rows.append(measure(WORKLOADS[name], dtype, layout, mode, setting))
            print(rows[-1], file=sys.stderr)
            if options.json:  # after every problem: what was measured stays if the run is ended
                write_json(options.json, facts, rows)
        print(table([readable(row) for row in rows]))
        ours = "cupy" if "cupy ms" in rows[0] else "torch"
        print(f"\nours: {ours}; “… / ours”: median over the rounds; above 1, ours is faster")
        print(f"GB/s: of ours, the bytes that must move, each once, by the time.\n{BYTES_COUNTED}")
        calls = overheads(device, options.backends)
        print("\nhost time of one call on the smallest problem:\n")
        print(table(calls))
        if options.json:
            write_json(options.json, facts, [*rows, *calls])
        if options.plot:
            plot(options.plot, rows, facts)


if __name__ == "__main__":
    main()

"""FPN50 and FPN101 beside torchvision's `resnet_fpn_backbone`: the same pyramid, weights, sizes and rounds.

    python benchmarks/fpn.py
    python benchmarks/fpn.py --models FPN50 --sizes 480x640 --runs 20 --json out.json

torchvision's function takes frozen batch norm by default; both packages run with that and with plain batch norm, so
that neither is compared with another network. The outputs are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

# This file is called fpn, and its folder comes first on the path of a script.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

import fpn
from benchmarks.harness import describe, environment, interleaved, ratio, table, write_json
from fpn.norm import FrozenBatchNorm2d

NORMS = ("batch norm", "frozen batch norm")


def ours(model: str, norm: str) -> nn.Module:
    layer = nn.BatchNorm2d if norm == "batch norm" else FrozenBatchNorm2d
    build = getattr(fpn, model)
    return build(upsample="nearest", smooth_top=True, extra="maxpool", trunk={"norm_layer": layer})


def torchvisions(model: str, norm: str) -> nn.Module:
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops import FrozenBatchNorm2d as TheirFrozenBatchNorm2d

    layer = nn.BatchNorm2d if norm == "batch norm" else TheirFrozenBatchNorm2d
    name = model.replace("FPN", "resnet")
    return resnet_fpn_backbone(backbone_name=name, weights=None, norm_layer=layer, trainable_layers=5)


BUILDERS = {"fpn-roi": ours, "torchvision": torchvisions}


def same_weights(model: nn.Module, theirs: nn.Module) -> None:
    """Gives torchvision's backbone the weights of ours."""
    state = {f"body.{k}": v for k, v in model.bottom_up.state_dict().items()}
    for part, name in (("lateral", "inner"), ("smooth", "layer")):
        for key, value in getattr(model, part).state_dict().items():
            index, _, rest = key.partition(".")
            state[f"fpn.{name}_blocks.{3 - int(index)}.0.{rest}"] = value
    theirs.load_state_dict(state)


def levels(output: Any) -> list[Tensor]:
    return list(output.values() if isinstance(output, dict) else output)


def forward(model: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        return levels(model(images))


def step(model: nn.Module, images: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    sum(level.mean() for level in levels(model(images))).backward()


MODES: dict[str, tuple[bool, Callable[[nn.Module, Tensor], Any]]] = {
    "inference": (False, forward),
    "forward + backward": (True, step),
}


def largest_difference(model: nn.Module, theirs: nn.Module, images: Tensor) -> float:
    pairs = zip(forward(model, images), forward(theirs, images), strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def peak_megabytes(package: str, model: str, norm: str, mode: str, shape: tuple[int, ...], device: str) -> float:
    """Peak memory of one call beyond that of the model and its input, in MB.

    On the CPU it is the growth of the resident set of a process that does nothing else, which is why this is run in
    one; NaN where the system does not tell (it is read from Linux's /proc).
    """
    training, call = MODES[mode]
    network = BUILDERS[package](model, norm).to(device).train(training)
    images = torch.randn(shape, device=device)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(network, images)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    before = reset_peak_resident()
    call(network, images)
    return (resident("VmHWM") - before) / 1e6


def reset_peak_resident() -> float:
    """Lowers the process's mark of its peak resident set to what is resident now, in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return math.nan
    return resident("VmRSS")


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return float(kilobytes) * 1024


def in_a_process(call: Callable[[], float]) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(call)


def measure(model: str, norm: str, mode: str, shape: tuple[int, ...], device: str, runs: int) -> dict[str, Any]:
    training, call = MODES[mode]
    networks = {package: build(model, norm) for package, build in BUILDERS.items()}
    same_weights(networks["fpn-roi"], networks["torchvision"])
    images = torch.randn(shape, device=device)
    for network in networks.values():
        network.to(device).eval()
    difference = largest_difference(*networks.values(), images)
    if not difference < 1e-4:
        raise SystemExit(f"{model}, {norm}: outputs differ by {difference:.2g}, so there is nothing to compare")
    calls = {package: partial(call, network.train(training), images) for package, network in networks.items()}
    times = interleaved(calls, torch.device(device), runs)
    peaks = {
        package: in_a_process(partial(peak_megabytes, package, model, norm, mode, shape, device))
        for package in BUILDERS
    }
    return {
        "model": model,
        "norm": norm,
        "mode": mode,
        "images": "×".join(map(str, shape)),
        "fpn-roi ms": median(times["fpn-roi"]),
        "torchvision ms": median(times["torchvision"]),
        "ratio": ratio(times, peer="torchvision", ours="fpn-roi"),
        "fpn-roi MB": peaks["fpn-roi"],
        "torchvision MB": peaks["torchvision"],
        "difference": f"{difference:.1e}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["FPN50", "FPN101"], metavar="NAME")
    parser.add_argument("--sizes", nargs="+", default=["480x640", "800x1344"], metavar="HxW")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", type=int, default=9, help="rounds that count, after two that do not")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the environment and the rows there")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    facts = environment(torch.device(options.device))
    print(describe(facts), end="\n\n")
    rows = []
    for model in options.models:
        for size in options.sizes:
            height, width = map(int, size.split("x"))
            for mode in MODES:
                for norm in NORMS:
                    shape = (options.batch, 3, height, width)
                    rows.append(measure(model, norm, mode, shape, options.device, options.runs))
                    print(rows[-1], file=sys.stderr)
    print(table(rows))
    print("\nratio: median over the rounds of torchvision's time / fpn-roi's; above 1, fpn-roi is faster")
    if options.json:
        write_json(options.json, facts, rows)


if __name__ == "__main__":
    main()

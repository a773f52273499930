"""What the benchmarks share: timing side by side in one run, the machine's description, tables and JSON."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PAUSE_CYCLES = 2_000_000  # about a millisecond of a GPU: longer than the host takes to queue one call

Timer = Callable[[Callable[[], Any], torch.device], float]


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """One call, from its start to the end of the work that it gave the device."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def device_milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """One call's work on the device alone: the host queues it while the device pauses. On the CPU, `milliseconds`.

    A call that waits for the device itself is measured with its host work from there on.
    """
    if device.type == "cuda":
        torch.cuda._sleep(PAUSE_CYCLES)
    return milliseconds(call, device)


def host_milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """One call until it returns, whatever it leaves the device to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def interleaved(
    contestants: Mapping[str, Callable[[], Any]],
    device: torch.device,
    runs: int,
    warmup: int = 2,
    timer: Timer = milliseconds,
) -> dict[str, list[float]]:
    """Milliseconds of each contestant in each of `runs` rounds; every round has each of them once, in turn.

    A machine whose speed drifts slows the neighbours in a round alike, so that ratios within a round hold.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    for round_ in range(warmup + runs):
        for name in order if round_ % 2 else order[::-1]:  # no contestant always runs behind the same one
            elapsed = timer(contestants[name], device)
            if round_ >= warmup:
                times[name].append(elapsed)
    return times


def rounds_within(
    seconds: float, contestants: Mapping[str, Callable[[], Any]], device: torch.device, most: int, least: int = 3
) -> int:
    """How many rounds of the contestants take about that long, from one round of them."""
    one = sum(milliseconds(call, device) for call in contestants.values()) / 1e3
    return min(most, max(least, int(seconds / one)))


def copy_bandwidth(device: torch.device, runs: int = 9) -> float:
    """Gigabytes per second of a copy on the device, bytes read and bytes written both counted."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, device, runs, timer=device_milliseconds)
    return 2 * size / median(times["copy"]) / 1e6


def ratio(times: Mapping[str, Sequence[float]], peer: str, ours: str) -> float:
    """How many times faster `ours` is than `peer`: the median over the rounds of peer / ours."""
    return median(theirs / own for theirs, own in zip(times[peer], times[ours], strict=True))


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure was measured on."""
    facts: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version_of("torchvision"),
        "cupy": version_of("cupy"),
        "threads": torch.get_num_threads(),
        "cpu": processor(),
    }
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts |= {
            "device": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "driver": output_of(query).partition("\n")[0],
        }
    else:
        facts["device"] = "cpu"
    return facts


def commit() -> str:
    revision = output_of(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"])
    changed = output_of(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return f"{revision} with changes" if changed else revision


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.processor()


def version_of(module: str) -> str | None:
    try:
        return str(__import__(module).__version__)
    except Exception as error:
        return f"none ({type(error).__name__})"


def output_of(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"{name + ':':<13}{value}" for name, value in facts.items())


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same columns as Markdown, numbers to the right."""
    columns = list(rows[0])
    cells = [columns, *([cell(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    numeric = [all(isinstance(row[column], int | float) for row in rows) for column in columns]

    def line(values: Sequence[str]) -> str:
        padded = [v.rjust(w) if n else v.ljust(w) for v, w, n in zip(values, widths, numeric, strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (w + 1) + (":" if n else "-") for w, n in zip(widths, numeric, strict=True))
    return "\n".join([line(cells[0]), f"|{rule}|", *(line(values) for values in cells[1:])])


def cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def write_json(path: Path, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": dict(facts), "rows": list(rows)}, indent=1) + "\n", encoding="utf-8")
